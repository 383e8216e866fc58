"""The index of one cache layer: what a sparse step reads beside K and V, in whatever storage those lie."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import sparq_kernels
import torch
from sparq_kernels import BLOCK, GROUP, layout
from torch import Tensor

from sparq.contents import outside_inference_mode
from sparq.devices import can_read


class Indexed(NamedTuple):
    """What a sparse step is given."""

    components: Tensor  # [B, Hkv, blocks, d, BLOCK], or codes of them
    ranges: Tensor | None  # of the codes
    value_sum: Tensor  # [B, Hkv, d] float32, over the valid positions
    mean_is_stale: Tensor | None  # bool [], whether that sum is of other positions; None: it surely is not


class Components:
    """K a second time, by components (`layout.py` of sparq_kernels): by them the positions to read are chosen.

    Another index of K goes here: a class with these methods in place of this one, named in `KINDS`, and another call of
    the kernel. Paged storage would be a pool and a table.
    """

    ranges: Tensor | None = None
    run = BLOCK  # positions that lie together

    def __init__(self) -> None:
        self.blocks: Tensor | None = None  # [B, Hkv, capacity / BLOCK, d, BLOCK]

    @staticmethod
    def bytes_read(valid: Any, tail: Any, r: int, itemsize: int) -> Any:
        """Of one KV head, by queries that see `valid` positions together, `tail` of these behind the last whole group;
        numbers, or int64 []."""
        return valid * (r * itemsize)

    @property
    def capacity(self) -> int:
        """Positions that there is room for."""
        return 0 if self.blocks is None else self.blocks.shape[2] * self.run

    @property
    def nbytes(self) -> int:
        return 0 if self.blocks is None else self.blocks.nbytes

    def allocate(self, keys: Tensor, used: int = 0) -> Tensor:
        """Make room for as many positions as there are keys [B, Hkv, n, d]; the first `used` ones are kept."""
        old, (batch, heads, capacity, head_dim) = self.blocks, keys.shape
        with outside_inference_mode():
            self.blocks = layout.allocate_components(batch, heads, capacity, head_dim, keys.dtype, keys.device)
        if old is not None:
            kept = layout.num_blocks(used)
            self.blocks[:, :, :kept] = old[:, :, :kept]
        return self.blocks

    def write(self, keys: Tensor, begin: int, end: int) -> None:
        """Take in the positions [begin, end) of the layer's keys [B, Hkv, S, d]; all before them are there."""
        assert self.blocks is not None
        layout.write_components(self.blocks, keys[:, :, begin:end], begin)

    def append(
        self, held: tuple[Tensor, Tensor], value_sum: Tensor | None, *new: Tensor, position: int | Tensor
    ) -> None:
        """Write a token's K and V, `new`, into the storage `held`, into this, and into the sum if it is given."""
        assert self.blocks is not None
        key, value = held
        new_key, new_value = new
        cached = sparq_kernels.Cached(key, self.blocks, value, value_sum, self.ranges)
        sparq_kernels.append(cached, new_key, new_value, position)

    def map(self, f: Callable[[Tensor], Tensor]) -> None:
        self.blocks = None if self.blocks is None else f(self.blocks)

    def drop(self) -> None:
        self.blocks = None


class Codes(Components):
    """The same in codes of four bits, of whole groups of positions; the kernel reads the rest from K."""

    run = GROUP

    def __init__(self) -> None:
        self.blocks: Tensor | None = None  # uint8 [B, Hkv, capacity / GROUP, d, GROUP / 2]
        self.ranges: Tensor | None = None  # [B, Hkv, capacity / GROUP, d, 2]

    @staticmethod
    def bytes_read(valid: Any, tail: Any, r: int, itemsize: int) -> Any:
        per_group = GROUP // 2 + 2 * itemsize  # of one component
        return (valid - tail) * (r * per_group) // GROUP + tail * (r * itemsize)

    @property
    def nbytes(self) -> int:
        return super().nbytes + (0 if self.ranges is None else self.ranges.nbytes)

    def allocate(self, keys: Tensor, used: int = 0) -> Tensor:
        old, ranges, (batch, heads, capacity, head_dim) = self.blocks, self.ranges, keys.shape
        with outside_inference_mode():
            made = layout.allocate_codes(batch, heads, capacity, head_dim, keys.dtype, keys.device)
            self.blocks, self.ranges = made
        if old is not None and ranges is not None:
            kept = used // GROUP
            self.blocks[:, :, :kept], self.ranges[:, :, :kept] = old[:, :, :kept], ranges[:, :, :kept]
        return self.blocks

    def write(self, keys: Tensor, begin: int, end: int) -> None:
        assert self.blocks is not None and self.ranges is not None
        sparq_kernels.encode(sparq_kernels.Cached(keys, self.blocks, keys, None, self.ranges), begin, end)

    def map(self, f: Callable[[Tensor], Tensor]) -> None:
        super().map(f)
        self.ranges = None if self.ranges is None else f(self.ranges)

    def drop(self) -> None:
        self.blocks = self.ranges = None


KINDS: dict[str, type[Components]] = {"full": Components, "int4": Codes}


class Index:
    """What is kept of K by components, and the sum of V over the valid positions, of a layer whose length Python knows.

    The layer keeps K and V, and gives its storage [B, Hkv, capacity, d] to what reads or writes it here. It tells what
    becomes of its tokens, and asks for the index when a sparse step needs it (`extend`): until then nothing is read.

    Which positions the sum is of, is what `extend` was last given. V is summed anew where the validity of older ones
    has changed. On a GPU and in a compiled graph nobody can wait for that comparison: there the validity of a position
    must not change after the step (of one or many tokens) that wrote it, and the device notes where it has.
    """

    def __init__(self, positions: int = 0, kind: str = "full") -> None:
        """positions: that the layer holds already.  kind: of KINDS."""
        self.kind = kind
        self.components = KINDS[kind]()
        self.remade = 0  # times that it was made anew, because others had changed what it was of
        self._was_there = False
        self.value_sum: Tensor | None = None  # [B, Hkv, d] float32
        self.start: Tensor | None = None  # [B] int64, first valid position of each row in the sum; None: 0
        self.mask: Tensor | None = None  # [B, >= summed] bool, further invalid positions; None: there are none
        self.stale: Tensor | None = None  # [B] bool, whether the sum is of others than `start` and `mask` say
        # The newest positions, which are not among the components, or not in the sum: none in most steps, so that a
        # compiled graph knows it, and depends on one number of a layer only, which grows.
        self.unindexed = self.unsummed = positions

    def drop(self, positions: int) -> None:
        """What it was of is no more; it is to be made anew of the `positions` that the layer holds."""
        self.components.drop()
        self.value_sum = self.start = self.mask = self.stale = None
        self.unindexed = self.unsummed = positions

    def grow(self, positions: int) -> None:
        """The layer has taken up so many by itself."""
        self.unindexed += positions
        self.unsummed += positions

    def can_append(self, capacity: int) -> bool:
        """Whether it covers all that is held, and is as roomy as the layer's storage."""
        covers_all = self.value_sum is not None and self.unindexed == self.unsummed == 0
        return covers_all and capacity <= self.components.capacity

    def append(self, keys: Tensor, values: Tensor, *new: Tensor, position: int | Tensor) -> None:
        """Write a token's K and V [B, Hkv, 1, d] into the layer's storage and the index in one go; position: int64 [B]
        where the device alone knows it."""
        # Where a mask says what is valid, it is not known yet what it says of this token.
        value_sum = self.value_sum if self.mask is None else None
        self.components.append((keys, values), value_sum, *new, position=position)
        if value_sum is None:
            self.unsummed += 1

    def extend(self, keys: Tensor, values: Tensor, length: Any, start: Tensor | None, mask: Tensor | None) -> Indexed:
        """Bring it up to the `length` (an int; int64 [] where the device alone knows) and return it.

        Args:
            start: [B] int64, first valid position of each row (left padding), never behind the newest. None: 0.
            mask: [B, length] bool, further invalid positions. None: there are none.
        """
        # Most steps on a CPU end here.
        if start is self.start and mask is self.mask and self.stale is None and self.can_append(0):
            return self._indexed(None)
        with torch.no_grad():  # not as a decorator: Dynamo cannot look through one on a layer made inside a graph
            mean_is_stale = self._extend_sum(values, length, start, mask)
            rows = keys.shape[2] if isinstance(length, Tensor) else length  # as far as Python knows
            # As roomy as the keys' storage: until then no token goes into both at once. A graph does not look that far.
            if self.components.capacity < (rows if torch.compiler.is_compiling() else keys.shape[2]):
                if self.components.blocks is None and self._was_there:
                    self.remade += 1
                self._was_there = True
                self.components.allocate(keys, rows - self.unindexed)
            if self.unindexed:
                self.components.write(keys, rows - self.unindexed, rows)
                self.unindexed = 0
            return self._indexed(mean_is_stale)

    def _indexed(self, mean_is_stale: Tensor | None) -> Indexed:
        assert self.components.blocks is not None and self.value_sum is not None
        return Indexed(self.components.blocks, self.components.ranges, self.value_sum, mean_is_stale)

    def _extend_sum(self, values: Tensor, length: Any, start: Tensor | None, mask: Tensor | None) -> Tensor | None:
        """Bring the sum up to the length; returns `mean_is_stale`."""
        value_sum, summed = self.value_sum, length - self.unsummed
        with outside_inference_mode():
            if value_sum is not None and (start is not self.start or mask is not self.mask):
                if not can_read(value_sum.device):
                    before, now = _valid(0, summed, self.start, self.mask), _valid(0, summed, start, mask)
                    differs = (True if before is None else before) != (True if now is None else now)
                    if isinstance(differs, Tensor):
                        rows = differs.any(1)
                        self.stale = rows if self.stale is None else self.stale | rows
                elif not (_equal(self.start, start) and _equal(self.mask, mask, summed)):
                    value_sum = None
            if value_sum is None:
                value_sum, self.stale = torch.zeros_like(values[:, :, 0], dtype=torch.float32), None
                self.unsummed = length
            if self.unsummed:
                value_sum = value_sum + _sum(values, length - self.unsummed, length, start, mask)
                self.unsummed = 0
        self.value_sum, self.start, self.mask = value_sum, start, mask
        return None if self.stale is None else self.stale.any()

    def sum_before(self, later: int, values: Tensor, length: Any) -> Tensor:
        """The sum of V over the valid positions but the newest `later`, [B, Hkv, d] float32, right after `extend`."""
        assert self.value_sum is not None
        with torch.no_grad():
            return self.value_sum - _sum(values, length - later, length, self.start, self.mask)

    def truncate(self, cut: int, values: Tensor, length: int) -> None:
        """The newest `cut` positions are gone, and `length` are left; `values` hold what was cut off still."""
        self.unindexed = max(0, self.unindexed - cut)
        cut, self.unsummed = max(0, cut - self.unsummed), max(0, self.unsummed - cut)
        if not cut or self.value_sum is None:
            return
        # A few tokens (a rejected draft) are taken back from the sum; after a longer cut it is made anew.
        rest = None
        if cut < length:
            with outside_inference_mode(), torch.no_grad():
                rest = self.value_sum - _sum(values, length, length + cut, self.start, self.mask)
        self.value_sum = rest if rest is not None and bool(rest.isfinite().all()) else None

    def map(self, f: Callable[[Tensor], Tensor]) -> None:
        """Replace everything held by `f` of it: `f` works along the batch, or moves."""
        self.components.map(f)
        held = (self.value_sum, self.start, self.mask, self.stale)
        self.value_sum, self.start, self.mask, self.stale = [None if t is None else f(t) for t in held]

    @property
    def nbytes(self) -> int:
        """`start` and `mask` are the caller's."""
        return self.components.nbytes + (0 if self.value_sum is None else self.value_sum.nbytes)


class FixedIndex(Index):
    """The same of a layer whose storage is of a fixed size, and whose length the device alone knows (int64 []).

    All of it is allocated once and written in place, where a captured graph finds it. `mask` is its own, and says of
    each position whether it is in the sum. What Python knows is whether the newest token is missing there (`unsummed`
    is 1), or anything at all everywhere (`drop`). Both are as before when a decode step is over, so none is compiled
    twice.
    """

    def allocate(self, keys: Tensor) -> None:
        """Make it, of nothing, for keys [B, Hkv, capacity, d]."""
        batch, heads, capacity, head_dim = keys.shape
        blocks = self.components.allocate(keys).zero_()
        ranges = self.components.ranges
        with outside_inference_mode():
            self.value_sum = torch.zeros((batch, heads, head_dim), dtype=torch.float32, device=keys.device)
            self.mask = torch.zeros((batch, capacity), dtype=torch.bool, device=keys.device)
        self.unindexed = self.unsummed = 0
        if not torch.compiler.is_compiling():  # as StaticLayer does with K and V
            for tensor in (blocks, ranges, self.value_sum, self.mask):
                if tensor is not None:
                    torch._dynamo.mark_static_address(tensor)

    def drop(self, positions: int) -> None:
        self.unindexed = self.unsummed = positions

    def clear(self) -> None:
        """The layer holds nothing any more; what the components still hold is never read."""
        if self.value_sum is not None and self.mask is not None:
            self.value_sum.zero_()
            self.mask.zero_()
            self.unindexed = self.unsummed = 0

    def _extend_sum(self, values: Tensor, length: Any, start: Tensor | None, mask: Tensor | None) -> Tensor | None:
        assert self.value_sum is not None and self.mask is not None and mask is not None
        if self.unsummed and not self.unindexed:
            sparq_kernels.extend_sum(self.value_sum, self.mask, values, mask, length=length.expand(mask.shape[0]))
        self.unsummed = 0
        if self.unindexed or (can_read(mask.device) and not torch.equal(self.mask, mask)):
            self.value_sum.copy_(_sum(values, 0, values.shape[2], None, mask))
            self.mask.copy_(mask)
        elif not can_read(mask.device):
            return (self.mask != mask).any()
        return None

    def sum_before(self, later: int, values: Tensor, length: Any) -> Tensor:
        assert self.value_sum is not None and self.mask is not None
        with torch.no_grad():
            newest = length - later + torch.arange(later, device=values.device)
            values, mask = values.index_select(2, newest), self.mask.index_select(1, newest)
            return self.value_sum - _sum(values, 0, later, None, mask)

    @property
    def nbytes(self) -> int:
        return super().nbytes + (0 if self.mask is None else self.mask.nbytes)


def _valid(begin: int, end: int, start: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """Which positions in [begin, end) are valid, bool [B, end - begin]; None: all."""
    valid = None if mask is None else mask[:, begin:end]
    if start is not None:
        is_behind = torch.arange(begin, end, device=start.device) >= start[:, None]
        valid = is_behind if valid is None else valid & is_behind
    return valid


def _sum(values: Tensor, begin: int, end: int, start: Tensor | None, mask: Tensor | None) -> Tensor:
    """Sum of `values` [B, Hkv, n, d] over the valid positions in [begin, end), [B, Hkv, d] float32."""
    if not torch.compiler.is_compiling() and values.device.type == "cpu" and end - begin > BLOCK:
        # Block by block: what is widened to float32 then stays in a processor cache, which is ten times as fast.
        parts = [_sum(values, at, min(at + BLOCK, end), start, mask) for at in range(begin, end, BLOCK)]
        return torch.stack(parts).sum(0)
    values, valid = values[:, :, begin:end], _valid(begin, end, start, mask)
    if valid is not None:
        # masked_fill, not a product: padding may hold anything, NaN included
        values = values.masked_fill(~valid[:, None, :, None], 0)
    return values.sum(2, dtype=torch.float32)


def _equal(a: Tensor | None, b: Tensor | None, end: int | None = None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a[..., :end], b[..., :end]))
