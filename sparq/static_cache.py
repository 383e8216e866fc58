"""A layer of a transformers static cache that also holds what SparQ reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import StaticLayer

from sparq.contents import outside_inference_mode, versions
from sparq.devices import has_kernel
from sparq.index import FixedIndex, Indexed

# What `StaticLayer.lazy_initialization` sets (`dtype` before transformers 5.24 only).
TAKEN_OVER = (
    "keys",
    "values",
    "dtype",
    "device",
    "batch_size",
    "num_heads",
    "v_head_dim",
    "k_head_dim",
    "is_initialized",
)


class SparqStaticLayer(StaticLayer):
    """One attention layer's static cache: a `StaticLayer` with an index for SparQ, all of it of a fixed size.

    How many positions are filled is known to the device alone (`cumulative_length`), and so is what the index covers:
    nothing here reads a value back, so that a decode step can be compiled and captured.
    """

    keys: Tensor  # [B, Hkv, max_cache_len, d]; None before initialisation, like `values`
    values: Tensor

    def __init__(self, max_cache_len: int, index: str = "full", **kwargs: Any) -> None:
        """index: its kind, of `index.KINDS`."""
        super().__init__(max_cache_len, **kwargs)
        self._index = FixedIndex(max_cache_len, index)
        self.is_filled = False
        self._indexed: tuple[Tensor, Tensor, tuple[int, ...]] | None = None  # K, V and their versions

    @classmethod
    def adopt(cls, layer: StaticLayer, index: str = "full") -> SparqStaticLayer:
        """A SparQ layer in place of `layer`, which may hold tokens; it takes over the very tensors."""
        new = cls(layer.max_cache_len, index)
        new.cumulative_length = layer.cumulative_length
        if layer.is_initialized:
            for name in TAKEN_OVER:
                if hasattr(layer, name):
                    setattr(new, name, getattr(layer, name))
            new._leave_inference_mode()
            # In a compiled graph nobody can ask the device.
            new.is_filled = torch.compiler.is_compiling() or bool(layer.cumulative_length > 0)
            new._allocate_index()
            if new.is_filled:
                new._drop_index()
        return new

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        with outside_inference_mode():
            super().lazy_initialization(key_states, value_states)
        self._allocate_index()

    def _leave_inference_mode(self) -> None:
        """Of inference tensors PyTorch counts no writes: what was made in that mode is copied."""
        if torch.compiler.is_compiling():
            return
        for name in ("keys", "values"):
            tensor = getattr(self, name)
            if tensor.is_inference():
                with torch.inference_mode(False):
                    copied = tensor.clone()
                torch._dynamo.mark_static_address(copied)
                setattr(self, name, copied)

    def _note_contents(self) -> None:
        """Call after every write of our own, and when the index has been made: it is of what is held now."""
        if not torch.compiler.is_compiling():
            self._indexed = (self.keys, self.values, versions(self.keys, self.values))

    def _check_contents(self) -> None:
        """Call before the index is used or extended: it is of nothing if anybody else has changed what is held."""
        if torch.compiler.is_compiling() or self._indexed is None:
            return
        keys, values, seen = self._indexed
        if self.keys is not keys or self.values is not values or versions(keys, values) != seen:
            if (self.keys.shape, self.keys.dtype, self.keys.device) != (keys.shape, keys.dtype, keys.device):
                self._index = FixedIndex(kind=self._index.kind)
                self._allocate_index()
            self._drop_index()

    def use_index(self, kind: str) -> None:
        """Keep an index of that kind from now on (`index.KINDS`); another one is made anew, where nothing that was
        captured in a graph finds it."""
        if self._index.kind == kind:
            return
        self._index = FixedIndex(self.max_cache_len, kind)
        if self.is_initialized:
            self._allocate_index()
            self._drop_index()
            self._note_contents()

    def _drop_index(self) -> None:
        self._index.drop(self.keys.shape[2])

    def _allocate_index(self) -> None:
        if self.keys.shape != self.values.shape or (torch.compiler.is_compiling() and self.keys.device.type != "cpu"):
            return  # what is allocated inside a CUDA graph is gone after it
        if has_kernel(self.keys.device.type, self.keys.dtype):  # or else steps stay dense
            self._index.allocate(self.keys)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write [B, Hkv, n, d] new keys and values; returns the whole storage, [B, Hkv, max_cache_len, d]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.is_filled = True
        self._check_contents()
        is_recorded = torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad)
        if key_states.shape[2] == 1 and self._index.can_append(self.keys.shape[2]) and not is_recorded:
            position = self.cumulative_length.expand(key_states.shape[0])
            self._index.append(self.keys, self.values, key_states, value_states, position=position)
            self.cumulative_length.add_(1)
        else:
            self._drop_index()
            super().update(key_states, value_states, *args, **kwargs)
        self._note_contents()
        return self.keys, self.values

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)  # there since transformers 5.24
        if tokens_to_remove:
            if self.is_initialized:
                self._drop_index()
            self.is_filled = bool(self.cumulative_length > 0)

    @property
    def storage_device(self) -> torch.device | None:
        """Where the keys lie; None before initialisation."""
        return None if self.keys is None else self.keys.device

    @property
    def allocated_bytes(self) -> int:
        """Bytes of storage held: K, V and the index."""
        return sum(t.nbytes for t in (self.keys, self.values) if t is not None) + self._index.nbytes

    @property
    def has_index(self) -> bool:
        return self._index.value_sum is not None

    def index(self, start: None, mask: Tensor) -> Indexed:
        """Bring the index up to the current length and return it. The layer must have one (`has_index`).

        mask: [B, max_cache_len] bool, the positions that may be seen, none of them beyond the current length.
        """
        self._check_contents()
        indexed = self._index.extend(self.keys, self.values, self.cumulative_length, start, mask)
        self._note_contents()
        return indexed

    def holds(self, key: Tensor, value: Tensor) -> bool:
        return key is self.keys and value is self.values

    def sum_before(self, later: int) -> Tensor:
        """The sum of V over the valid positions but the newest `later`, [B, Hkv, d] float32, right after `index`."""
        return self._index.sum_before(later, self.values, self.cumulative_length)

    def reset(self) -> None:
        if self.is_initialized:
            self._check_contents()
        super().reset()
        self.is_filled = False
        self._index.clear()
        if self.is_initialized:
            self._note_contents()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._check_contents()
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self._map_index(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def offload(self) -> None:
        self._check_contents()
        super().offload()
        self._map_index(lambda t: t.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self._check_contents()
        super().prefetch()
        if self._index.value_sum is not None and self._index.value_sum.device != self.device:
            self._map_index(lambda t: t.to(self.device, non_blocking=True))

    def _map_index(self, f: Any) -> None:
        self._index.map(f)
        if self.is_initialized:
            self._note_contents()
