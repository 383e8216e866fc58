"""A layer of a transformers static cache that also holds what SparQ reads."""

from __future__ import annotations

from typing import Any

import sparq_kernels
import torch
from sparq_kernels import layout
from torch import Tensor
from transformers.cache_utils import StaticLayer

from sparq.contents import outside_inference_mode, versions
from sparq.devices import has_kernel

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

    The index is the component copy of K, and the sum of V over the valid positions. How many positions are filled is
    known to the device alone (`cumulative_length`), and so is what the index covers: nothing here reads a value back,
    so that a decode step can be compiled and captured. What Python does know is how far the index is behind: one new
    token (`sum_pending`) or anything at all (`stale`). Both are as before when a decode step is over, so no step is
    compiled twice.
    """

    keys: Tensor  # [B, Hkv, max_cache_len, d]; None before initialisation, like `values`
    values: Tensor
    components: Tensor | None  # [B, Hkv, blocks, d, BLOCK], for all positions
    value_sum: Tensor | None  # [B, Hkv, d] float32
    summed: Tensor | None  # [B, max_cache_len] bool, the positions that `value_sum` is the sum of

    def __init__(self, max_cache_len: int, **kwargs: Any) -> None:
        super().__init__(max_cache_len, **kwargs)
        self.components = self.value_sum = self.summed = None
        self.stale = True  # K and V were written without the index
        self.sum_pending = False  # the newest token is among the components, and not in the sum
        self.is_filled = False
        self._indexed: tuple[Tensor, Tensor, tuple[int, ...]] | None = None  # K, V and their versions

    @classmethod
    def adopt(cls, layer: StaticLayer) -> SparqStaticLayer:
        """A SparQ layer in place of `layer`, which may hold tokens; it takes over the very tensors."""
        new = cls(layer.max_cache_len)
        new.cumulative_length = layer.cumulative_length
        if layer.is_initialized:
            for name in TAKEN_OVER:
                if hasattr(layer, name):
                    setattr(new, name, getattr(layer, name))
            new._leave_inference_mode()
            # In a compiled graph nobody can ask the device.
            new.is_filled = torch.compiler.is_compiling() or bool(layer.cumulative_length > 0)
            new._allocate_index()
            new.stale = new.is_filled
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
                self.components = self.value_sum = self.summed = None
                self._allocate_index()
            self.stale, self.sum_pending = True, False

    def _allocate_index(self) -> None:
        compiling = torch.compiler.is_compiling()
        if self.keys.shape != self.values.shape or (compiling and self.keys.device.type != "cpu"):
            return  # what is allocated inside a CUDA graph is gone after it
        if not has_kernel(self.keys.device.type, self.keys.dtype):
            return  # steps stay dense
        batch, heads, capacity, head_dim = self.keys.shape
        with outside_inference_mode():
            self.components = layout.allocate_components(
                batch, heads, capacity, head_dim, self.keys.dtype, self.device
            ).zero_()
            self.value_sum = torch.zeros((batch, heads, head_dim), dtype=torch.float32, device=self.keys.device)
            self.summed = torch.zeros((batch, capacity), dtype=torch.bool, device=self.keys.device)
        self.stale = False
        if not compiling:  # as StaticLayer does with K and V
            for tensor in (self.components, self.value_sum, self.summed):
                torch._dynamo.mark_static_address(tensor)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write [B, Hkv, n, d] new keys and values; returns the whole storage, [B, Hkv, max_cache_len, d]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.is_filled = True
        self._check_contents()
        if (
            key_states.shape[2] != 1
            or self.stale
            or self.sum_pending
            or (torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad))
        ):
            self.stale, self.sum_pending = True, False
            super().update(key_states, value_states, *args, **kwargs)
            self._note_contents()
            return self.keys, self.values
        assert self.components is not None
        position = self.cumulative_length.expand(key_states.shape[0])
        cached = sparq_kernels.Cached(self.keys, self.components, self.values, None)
        sparq_kernels.append(cached, key_states, value_states, position)
        self.cumulative_length.add_(1)
        self.sum_pending = True
        self._note_contents()
        return self.keys, self.values

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)  # there since transformers 5.24
        if tokens_to_remove:
            self.stale, self.sum_pending = True, False
            self.is_filled = bool(self.cumulative_length > 0)

    @property
    def storage_device(self) -> torch.device | None:
        """Where the keys lie; None before initialisation."""
        return None if self.keys is None else self.keys.device

    @property
    def allocated_bytes(self) -> int:
        """Bytes of storage held: K, V, the component copy of K, the sum of V and the positions in it."""
        held = (self.keys, self.values, self.components, self.value_sum, self.summed)
        return sum(t.numel() * t.element_size() for t in held if t is not None)

    def index(self, valid: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Bring the index up to the current length and return it. The layer must have one (`components`).

        Args:
            valid: [B, max_cache_len] bool, the positions that may be seen, none of them beyond the current length.

        Returns:
            The component copy of K [B, Hkv, blocks, d, BLOCK]; the sum of V over the valid positions [B, Hkv, d]
            float32; and bool [], whether that sum is of other positions, or None where it surely is not. On a GPU and
            in a compiled graph nobody can wait for that answer: there the validity of a position must not change
            after the step (of one or many tokens) that wrote it. Elsewhere V is summed anew where it has.
        """
        with torch.no_grad():  # not as a decorator: Dynamo cannot look through one on a layer made inside a graph
            return self._index(valid)

    def _index(self, valid: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        assert self.components is not None and self.value_sum is not None and self.summed is not None
        self._check_contents()
        if self.stale:
            layout.write_components(self.components, self.keys, 0)
            self._sum_anew(valid)
            self.stale = self.sum_pending = False
            self._note_contents()
            return self.components, self.value_sum, None
        if self.sum_pending:
            length = self.cumulative_length.expand(valid.shape[0])
            sparq_kernels.extend_sum(self.value_sum, self.summed, self.values, valid, length=length)
            self.sum_pending = False
        if torch.compiler.is_compiling() or valid.device.type != "cpu":
            return self.components, self.value_sum, (self.summed != valid).any()
        if not torch.equal(self.summed, valid):
            self._sum_anew(valid)
        return self.components, self.value_sum, None

    def holds(self, key: Tensor, value: Tensor) -> bool:
        return key is self.keys and value is self.values

    def sum_before(self, later: int, valid: Tensor) -> Tensor:
        """The sum of V over the valid positions but the newest `later`, [B, Hkv, d] float32, right after `index`."""
        assert self.value_sum is not None
        with torch.no_grad():
            newest = self.cumulative_length - later + torch.arange(later, device=self.cumulative_length.device)
            values = self.values.index_select(2, newest)
            rest = values.masked_fill(~valid.index_select(1, newest)[:, None, :, None], 0).sum(2, dtype=torch.float32)
            return self.value_sum - rest

    def _sum_anew(self, valid: Tensor) -> None:
        assert self.value_sum is not None and self.summed is not None
        values = self.values.masked_fill(~valid[:, None, :, None], 0)
        self.value_sum.copy_(values.sum(2, dtype=torch.float32))
        self.summed.copy_(valid)

    def reset(self) -> None:
        if self.is_initialized:
            self._check_contents()
        super().reset()
        self.is_filled = self.sum_pending = False
        if self.value_sum is not None and self.summed is not None:
            self.value_sum.zero_()
            self.summed.zero_()
            self.stale = False  # an index of nothing; what the components still hold is never read
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
        if self.summed is not None and self.summed.device != self.device:
            self._map_index(lambda t: t.to(self.device, non_blocking=True))

    def _map_index(self, f: Any) -> None:
        if self.components is not None and self.value_sum is not None and self.summed is not None:
            self.components, self.value_sum, self.summed = f(self.components), f(self.value_sum), f(self.summed)
        if self.is_initialized:
            self._note_contents()
