"""A layer of a transformers cache that also holds what SparQ reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sparq_kernels import BLOCK, layout
from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from sparq.contents import is_held_elsewhere, outside_inference_mode, versions
from sparq.index import Index, Indexed
from sparq.static_cache import SparqStaticLayer

CAPACITY_STEP = 256  # positions: storage is made for a multiple of this


class SparqLayer(DynamicLayer):
    """One attention layer's cache: a `DynamicLayer` whose storage has room to grow, with an index for SparQ.

    The index is extended to the current length when a sparse step asks for it (`index`), so a prompt, a chunk of tokens
    or an ordinary cache that was already filled costs nothing extra until then, and a dense model can use the layer as
    it is.

    `keys` and `values` are views [B, Hkv, length, d] of the storage [B, Hkv, capacity, d]. Code that knows only
    `DynamicLayer` stays right: a tensor assigned to one of them, of whatever length, is adopted as its storage; what
    is written into them is found by PyTorch's version counters, which `.data` and numpy pass by; either drops the
    index. Tokens that somebody else still holds are never overwritten. (Who holds views from before an `update` and
    writes into them writes into the layer; a `DynamicLayer` has copied its tokens by then.)
    """

    _key_storage: Tensor | None
    _value_storage: Tensor | None
    _length: int  # of the keys
    _values_ahead: int  # what the values hold more; 0 but between two assignments from outside

    def __init__(self, **kwargs: Any) -> None:
        self._index = Index()
        self._drop_storage()
        super().__init__(**kwargs)

    @classmethod
    def adopt(cls, layer: DynamicLayer) -> SparqLayer:
        """A SparQ layer in place of `layer`, which may hold tokens; its tensors are copied when it next grows."""
        new = cls()
        if layer.is_initialized:
            assert layer.keys is not None and layer.values is not None
            new.lazy_initialization(layer.keys, layer.values)
            new.device = layer.device  # an offloaded layer's tensors lie elsewhere
            if layer.get_seq_length() > 0:
                new.keys, new.values = layer.keys, layer.values
        return new

    @property
    def keys(self) -> Tensor | None:
        return None if self._key_storage is None else self._key_storage[:, :, : self._length]

    @keys.setter
    def keys(self, keys: Tensor | None) -> None:
        value_length = self._length + self._values_ahead
        keys = _tokens(keys)
        self._key_storage, self._owned = keys, False
        self._length = 0 if keys is None else keys.shape[2]
        self._values_ahead = value_length - self._length
        self._drop_index()

    @property
    def storage_device(self) -> torch.device | None:
        """Where the keys lie; None where there are none."""
        return None if self._key_storage is None else self._key_storage.device

    @property
    def values(self) -> Tensor | None:
        return None if self._value_storage is None else self._value_storage[:, :, : self._length + self._values_ahead]

    @values.setter
    def values(self, values: Tensor | None) -> None:
        values = _tokens(values)
        self._value_storage, self._owned = values, False
        self._values_ahead = (0 if values is None else values.shape[2]) - self._length
        self._drop_index()

    def _drop_storage(self) -> None:
        self._key_storage = self._value_storage = None
        self._owned = False  # an adopted tensor may be in use elsewhere: it is read, never written
        self._length = self._values_ahead = 0
        self._index = Index(kind=self._index.kind)
        self._drop_index()

    def use_index(self, kind: str) -> None:
        """Keep an index of that kind from now on (`index.KINDS`); another one is dropped."""
        if self._index.kind != kind:
            self._index = Index(self._length, kind)
            self._drop_index()

    def _drop_index(self) -> None:
        self._index.drop(self._length)
        self._versions: tuple[int, ...] | None = None  # of the storage, when the index was last known to be right
        self._given: tuple[Tensor, Tensor] | None = None  # what `update` has returned

    def _note_contents(self) -> None:
        """Call after every write of our own: what the storage holds now is what the index is of."""
        if not torch.compiler.is_compiling():
            self._versions = versions(self._key_storage, self._value_storage)

    def _check_contents(self) -> None:
        """Call before an index is used or extended: drop it if anybody else has written into the storage."""
        if torch.compiler.is_compiling():
            return  # a graph cannot look; after it the counters differ, and the index is made anew
        if self._versions != versions(self._key_storage, self._value_storage):
            self._drop_index()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append [B, Hkv, n, d] new keys and values; returns views of all of them, [B, Hkv, length, d].

        Raises:
            ValueError: they do not fit what is held, or `keys` and `values` hold different numbers of tokens.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._check_fit(key_states, value_states)
        self._check_contents()
        if self._is_recorded(key_states, value_states):
            self._write_recorded(key_states, value_states)
        else:
            self._write(key_states, value_states)
        self._note_contents()
        keys, values = self.keys, self.values
        assert keys is not None and values is not None
        self._given = keys, values
        return keys, values

    def holds(self, key: Tensor, value: Tensor) -> bool:
        """Whether these are the keys and values that the last `update` has given, or the same memory."""
        if self._given is not None and key is self._given[0] and value is self._given[1]:
            return True
        if torch.compiler.is_compiling():
            return False  # a graph cannot compare addresses
        return all(
            held is not None and (given.shape, given.data_ptr()) == (held.shape, held.data_ptr())
            for given, held in ((key, self.keys), (value, self.values))
        )

    def _check_fit(self, key_states: Tensor, value_states: Tensor) -> None:
        if self._values_ahead:
            raise ValueError(
                f"keys and values must hold the same number of tokens, got {self._length} and "
                f"{self._length + self._values_ahead}: whoever has assigned one of them has to assign the other"
            )
        if not self._length:
            return
        held = (self._key_storage, key_states, "key_states"), (self._value_storage, value_states, "value_states")
        for old, new, name in held:
            assert old is not None
            batch, heads, _, head_dim = old.shape
            if new.dim() != 4 or new.shape != (batch, heads, new.shape[2], head_dim):
                raise ValueError(
                    f"{name} must match the cached [batch, heads, length, head_dim] of {tuple(old.shape)} "
                    f"in all but the length, got {tuple(new.shape)}"
                )

    def _is_recorded(self, *states: Tensor) -> bool:
        """Whether autograd records what happens to the tokens: they may be needed as they are by a backward pass."""
        if not torch.is_grad_enabled():
            return False
        held = [t for t in (self._key_storage, self._value_storage) if t is not None]
        if any(t.requires_grad for t in (*states, *held)):
            return True
        # Attention of queries that are recorded saves keys and values, which need not be recorded themselves.
        self._given = None
        return not torch.compiler.is_compiling() and any(is_held_elsewhere(t) for t in held)

    def _write_recorded(self, key_states: Tensor, value_states: Tensor) -> None:
        """As `DynamicLayer` does it, a new tensor for every token: nothing that was recorded is overwritten."""
        new = key_states.shape[2]
        if self._length:
            assert self.keys is not None and self.values is not None
            key_states = torch.cat([self.keys, key_states], 2)
            value_states = torch.cat([self.values, value_states], 2)
        else:
            self._drop_index()
        self._key_storage, self._value_storage, self._owned = key_states, value_states, False
        self._length += new
        self._index.grow(new)

    def _write(self, key_states: Tensor, value_states: Tensor) -> None:
        new = key_states.shape[2]
        start, end = self._length, self._length + new
        keys, values = self._make_room(key_states, value_states, end)
        if new == 1 and self._index.can_append(keys.shape[2]):
            self._index.append(keys, values, key_states, value_states, position=start)
        else:
            keys[:, :, start:end] = key_states
            values[:, :, start:end] = value_states
            self._index.grow(new)
        self._length = end

    def _make_room(self, key_states: Tensor, value_states: Tensor, needed: int) -> tuple[Tensor, Tensor]:
        """Storage that can be written up to position `needed`; when it grows, it does so for many tokens to come."""
        keys, values = self._key_storage, self._value_storage
        if keys is not None and values is not None and self._length:
            if self._owned and needed <= keys.shape[2]:
                return keys, values
            needed = max(needed, self._length + room_to_grow(self._length, keys.device))
        else:
            self._drop_index()  # the new tokens may be of another batch
        capacity = -(-needed // CAPACITY_STEP) * CAPACITY_STEP
        self._key_storage = _grown(keys, key_states, self._length, capacity)
        self._value_storage = _grown(values, value_states, self._length, capacity)
        self._owned = True
        return self._key_storage, self._value_storage

    def get_seq_length(self) -> int:
        return self._length

    def __getstate__(self) -> dict[str, Any]:
        """For a copy or a file: the tokens held, without slack to grow and without the index, which is made again when
        a sparse step asks for it."""
        state = self.__dict__.copy()
        for name, held in (("_key_storage", self.keys), ("_value_storage", self.values)):
            if held is not None:
                # a view would take all of its storage along
                state[name] = held.clone(memory_format=torch.contiguous_format)
        return state | dict(_index=Index(self._length, self._index.kind), _owned=True, _versions=None, _given=None)

    @property
    def allocated_bytes(self) -> int:
        """Bytes of storage held: K, V and the index, growth slack included."""
        held = (self._key_storage, self._value_storage)
        return sum([t.nbytes for t in held if t is not None]) + self._index.nbytes

    def index(self, start: Tensor | None = None, mask: Tensor | None = None) -> Indexed:
        """Bring the index up to the current length and return it; the arguments as `Index.extend` has them."""
        assert self._key_storage is not None and self._value_storage is not None
        self._check_contents()
        indexed = self._index.extend(self._key_storage, self._value_storage, self._length, start, mask)
        self._note_contents()
        return indexed

    def sum_before(self, later: int) -> Tensor:
        """The sum of V over the valid positions but the newest `later`, [B, Hkv, d] float32, right after `index`."""
        assert self._value_storage is not None
        return self._index.sum_before(later, self._value_storage, self._length)

    def crop(self, tokens_to_remove: int) -> None:
        if self._key_storage is None:
            return
        self._check_contents()
        # What the argument means differs between versions of transformers: its own layer says what is left.
        plain = DynamicLayer()
        plain.keys, plain.values, plain.is_initialized = self.keys, self.values, True
        plain.crop(tokens_to_remove)
        length = plain.get_seq_length()
        self._given = None
        del plain
        if length < self._length and any(
            is_held_elsewhere(t) for t in (self._key_storage, self._value_storage) if t is not None
        ):
            self._owned = False  # what is cut off is still somebody's
        cut, self._length = self._length - length, length
        if self._value_storage is not None:
            self._index.truncate(cut, self._value_storage, length)

    def reset(self) -> None:
        self._drop_storage()
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda t: t[indices.to(t.device) if isinstance(indices, Tensor) else indices])

    def offload(self) -> None:
        self._map(lambda t: t.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        if self._key_storage is not None and self._key_storage.device != self.device:
            self._map(lambda t: t.to(self.device, non_blocking=True))

    def _map(self, f: Callable[[Tensor], Tensor]) -> None:
        """Replace everything held by `f` of it: `f` works along the batch, or moves."""
        keys, values = self._key_storage, self._value_storage
        if keys is None or values is None or not self._length:
            return
        self._check_contents()
        self._given = None
        with outside_inference_mode():
            self._key_storage, self._value_storage = f(keys), f(values)
            self._index.map(f)
        # `f` may give back what it was given (a move to where it is): an adopted tensor stays an adopted one
        self._owned = self._owned or (self._key_storage is not keys and self._value_storage is not values)
        self._note_contents()


# What transformers 5.17 calls its quantized layers' base has got a base itself.
QUANTIZED_LAYER: type = getattr(cache_utils, "BaseQuantizedLayer", cache_utils.QuantizedLayer)


def refuse_quantized(cache: Cache) -> None:
    """Raise a ValueError if `cache` holds quantized keys and values."""
    for layer in cache.layers:
        if isinstance(layer, QUANTIZED_LAYER):
            raise ValueError(
                f"sparq cannot read a quantized cache ({type(layer).__name__}): whoever reads single components or "
                "positions of it has to dequantize all of it first. Leave out cache_implementation='quantized', or "
                "call sparq.unpatch(model)"
            )


def upgrade(cache: Cache, index: str = "full") -> None:
    """Make the plain dynamic and static layers of `cache` SparQ layers, in place, that keep an index of that kind
    (`index.KINDS`); all other layers stay as they are.

    So does an offloaded cache: all of it is moved to the device and back with each token, however little is read there,
    and storage with room to grow and an index would be more to move.
    """
    if cache.offloading:
        return
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[i] = layer = SparqLayer.adopt(layer)
        elif type(layer) is StaticLayer:
            cache.layers[i] = layer = SparqStaticLayer.adopt(layer, index)
        if isinstance(layer, (SparqLayer, SparqStaticLayer)):
            layer.use_index(index)


def begin_pass(cache: Cache, layers: int) -> None:
    """Note how many tokens the layers hold, until `end_pass`; `layers`: how many the model has that attend.

    Raises:
        RuntimeError: an exception has ended the pass before this one between two layers, and nobody has put it right.
            Where there is no mask to be of the wrong size, transformers goes on and answers wrongly.
    """
    if torch.compiler.is_compiling():
        return  # a graph would be compiled anew for every number of tokens
    lengths = [layer.get_seq_length() if isinstance(layer, SparqLayer) else None for layer in cache.layers]
    before = getattr(cache, "_sparq_pass", None)
    if before is not None:
        # A cache that was made without a configuration gets its layers one by one.
        earlier = [*before, *[0] * (len(lengths) - len(before))]
        grown = {
            now - then for now, then in zip(lengths, earlier, strict=False) if now is not None and then is not None
        }
        if len(grown) > 1 or len(earlier) > len(lengths) or (len(before) < len(lengths) < layers):
            raise RuntimeError(
                f"sparq: a forward pass was interrupted between layers, which now hold {lengths} tokens; crop each of "
                "them to the shortest, or start with a new cache"
            )
    cache._sparq_pass = lengths  # type: ignore[attr-defined]


def end_pass(cache: Cache) -> None:
    if torch.compiler.is_compiling():
        return
    cache._sparq_pass = None  # type: ignore[attr-defined]


def allocated_bytes(cache: Cache) -> int:
    """Bytes that the SparQ layers of a cache hold, growth slack included; layers of other types are not counted."""
    return sum(layer.allocated_bytes for layer in cache.layers if isinstance(layer, (SparqLayer, SparqStaticLayer)))


def take_remade(cache: Cache) -> int:
    """How often an index was made anew since the last call, because others had changed the layer."""
    remade = 0
    for layer in cache.layers:
        if isinstance(layer, SparqLayer):
            remade, layer._index.remade = remade + layer._index.remade, 0
    return remade


def room_to_grow(length: int, device: torch.device) -> int:
    """Positions that storage of `length` tokens gets room for when it is full: as many again while they are few, then a
    quarter: steps read far more until the next growth than it copies. A GPU copies fast, and memory is what is short
    there: an eighth, or a block of the index."""
    if device.type != "cpu":
        return max(BLOCK, length // 8)
    return max(min(length, BLOCK), length // 4)


def _grown(storage: Tensor | None, states: Tensor, used: int, capacity: int) -> Tensor:
    """Storage [B, Hkv, capacity, d] for more of `states` that begins with the `used` positions of `storage`."""
    batch, heads, _, head_dim = states.shape
    with outside_inference_mode():
        grown = layout.empty(batch, heads, capacity, head_dim, dtype=states.dtype, device=states.device)
    if storage is not None and used:
        grown[:, :, :used] = storage[:, :, :used]
    return grown


def _tokens(tensor: Tensor | None) -> Tensor | None:
    """[B, Hkv, n, d]; None for the empty tensor that a `DynamicLayer` begins with."""
    return None if tensor is None or tensor.dim() < 4 else tensor
