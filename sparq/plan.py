"""What the newest tokens may see of a cache, and how much of it a decode step reads."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from sparq_kernels import GROUP
from torch import Tensor

from sparq import reasons
from sparq.config import SparqConfig
from sparq.devices import can_read, count_once
from sparq.index import KINDS


@dataclass(frozen=True, eq=False, slots=True)
class Plan:
    """Of the `queries` newest tokens of a pass, or of those that have so many later ones behind them.

    A position s of row b is valid where start[b] <= s < length[b] and mask[b, s]. Where the device alone knows how many
    there are (storage of a fixed size, a compiled graph, a mask on a GPU), the numbers are tensors, int64 [].
    """

    length: Tensor  # [B] int64
    start: Tensor | None  # [B] int64; None: 0
    mask: Tensor | None  # [B, S] bool; None: no invalid positions but those before start
    row_counts: Tensor | None  # of the mask, int32 [B, Q, 2]; None: whoever needs them has to count
    valid: int | Tensor  # positions that a query sees, summed over queries and the batch
    tail: int | Tensor  # of these behind the last whole group of `GROUP` positions, which a coded index leaves to K
    valid_once: int | Tensor  # valid positions, summed over the batch: dense attention reads them once for all queries
    queries: int
    ignored_bias: Tensor | None = None  # [] bool, whether the mask had a bias or was not causal; None: surely neither
    dense_reason: str | None = None  # why the step must be dense, if it must

    def counts(
        self, index: str, kv_heads: int, itemsize: int, r: int, head_dim: int, alphas: int, *, by_token: bool = False
    ) -> tuple[int, ...] | Tensor:
        """What a `SparseStep` adds: numbers, or int64 [6]; without the positions read in full, which it knows.

        index: its kind.  itemsize: bytes of an element of K.
        by_token: count each query as a step, of which dense attention would have read everything again.
        """
        steps, once = (self.queries, self.valid) if by_token else (1, self.valid_once)
        new = 4 * self.length.shape[0] * self.queries * head_dim * itemsize
        bytes_read = kv_heads * (KINDS[index].bytes_read(self.valid, self.tail, r, itemsize) + new)
        bytes_dense = once * (kv_heads * itemsize * 2 * head_dim)
        if not isinstance(self.valid, Tensor):
            return steps, self.valid, 0, bytes_read, bytes_dense, alphas  # type: ignore[return-value]
        one = torch.ones_like(self.valid)
        numbers: Any = (one * steps if by_token else one, self.valid, 0 * one, bytes_read, bytes_dense, one * alphas)
        return torch.stack(numbers)


def make_plan(
    attention_mask: Tensor | None,
    length: int | Tensor,
    keys: Tensor,
    config: SparqConfig,
    queries: int = 1,
    later: int = 0,
) -> Plan:
    """The plan for a mask [B or 1, 1, Q >= queries + later, S] (bool, or 0 and large negative numbers), or None:
    everything before a token and itself valid.

    length: filled positions of keys [B, Hkv, S, d], `later` included: S where storage grows, int64 [] where its size is
        fixed.
    """
    if isinstance(length, Tensor) or torch.compiler.is_compiling():
        return _device_plan(attention_mask, length, keys, config, queries, later)
    if attention_mask is None:
        counts = [[length - later - newer for newer in range(queries)]] * keys.shape[0]
        return _host_plan(length - later, keys, config, counts)
    is_plain = queries == 1 and not later and attention_mask.dtype == torch.bool  # no bias, no order
    if is_plain and not can_read(keys.device):
        return _device_plan(attention_mask, length, keys, config, queries, later)
    return _read_mask(attention_mask, length, keys, config, queries, later)


def _rows_of(
    attention_mask: Tensor, queries: int, length: int, device: torch.device
) -> tuple[Tensor, Tensor | None] | None:
    """What the last `queries` of the mask allow of `length` positions, bool [B or 1, queries, length], and where they
    have a bias; None where the mask has another shape."""
    shape = attention_mask.shape
    if attention_mask.dim() != 4 or shape[1] != 1 or shape[2] < queries or shape[3] < length:
        return None
    rows = attention_mask[:, 0, -queries:, :length].to(device)
    if rows.dtype == torch.bool:
        return rows, None
    masked_out = rows <= torch.finfo(rows.dtype).min / 2
    return ~masked_out, (rows != 0) & ~masked_out


def _host_plan(
    length: int,
    keys: Tensor,
    config: SparqConfig,
    counts: list[list[int]],
    start: Tensor | None = None,
    mask: Tensor | None = None,
) -> Plan:
    """`counts`: for each row, how many positions its queries see, the last query's first."""
    seen = [count for row in counts for count in row]
    tail = sum(min(count, (length - newer) % GROUP) for row in counts for newer, count in enumerate(row))
    lengths = _lengths(length, keys)
    rows = None if mask is None else count_once(mask, lengths, len(counts[0]), config)
    once = sum(row[0] for row in counts)
    reason = reasons.COVERED if all(config.least(count) == count for count in seen) else None
    return Plan(lengths, start, mask, rows, sum(seen), tail, once, len(counts[0]), dense_reason=reason)


def _read_mask(
    attention_mask: Tensor, length: int, keys: Tensor, config: SparqConfig, queries: int, later: int
) -> Plan:
    """The plan where Python may look at the mask."""
    batch, device, length = keys.shape[0], keys.device, length - later
    found = _rows_of(attention_mask, queries + later, length, device)
    if found is None:
        return _dense(length, keys, queries, reasons.MASK_SHAPE)
    rows, biased = (None if x is None else x.expand(batch, -1, length) for x in found)
    assert rows is not None
    mask = rows[:, -1]  # what the last query sees, of which the others must see all before them and themselves
    rows = rows[:, :queries]
    seen = mask.cumsum(-1)[:, length - queries :].flip(-1)  # [B, queries], the last query first
    first = mask.to(torch.uint8).argmax(-1)  # the first valid position
    # All that Python has to know, read back at once: on a GPU every such moment waits for all work before it.
    alone = queries == 1 and not later
    strange = None if alone else rows != mask[:, None] & _causal(queries, length, device)
    doubts = [torch.zeros_like(first) if doubt is None else doubt.sum((1, 2)) for doubt in (biased, strange)]
    known = torch.cat([torch.stack([first, *doubts], 1), seen], 1).tolist()
    starts, biases, others = ([row[i] for row in known] for i in range(3))
    counts = [row[3:] for row in known]
    if any(biases):
        return _dense(length, keys, queries, reasons.MASK_BIAS)
    if any(others):
        return _dense(length, keys, queries, reasons.MASK_ORDER)
    if all(count[0] == length for count in counts):
        return _host_plan(length, keys, config, counts)
    if all(count[0] == length - start for count, start in zip(counts, starts, strict=True)):
        return _host_plan(length, keys, config, counts, start=_starts(tuple(starts), device))
    # A copy: the cache remembers it, and the caller may go on to change the mask in place.
    return _host_plan(length, keys, config, counts, mask=mask.clone(memory_format=torch.contiguous_format))


def _lengths(length: int, keys: Tensor) -> Tensor:
    return torch.full((keys.shape[0],), length, dtype=torch.int64, device=keys.device)


def _dense(length: int, keys: Tensor, queries: int, reason: str) -> Plan:
    return Plan(_lengths(length, keys), None, None, None, 0, 0, 0, queries, dense_reason=reason)


def _device_plan(
    attention_mask: Tensor | None, length: int | Tensor, keys: Tensor, config: SparqConfig, queries: int, later: int
) -> Plan:
    """The plan where nothing is read back from the device, unless that is the CPU."""
    batch, capacity, device = keys.shape[0], keys.shape[2], keys.device
    is_full = not isinstance(length, Tensor)
    if not isinstance(length, Tensor):
        # A graph must not be compiled again for every number of tokens.
        length = torch.ones(capacity, dtype=torch.int64, device=device).sum()
    length = length - later if later else length
    unseen = torch.arange(queries - 1, -1, -1, device=device)  # new tokens that a query does not see
    before = torch.arange(capacity, device=device) < length - unseen[:, None]  # [queries, S]
    valid = before[-1].expand(batch, capacity)
    ignored_bias, reason = None, None
    if config.least(capacity) == capacity:
        reason = reasons.COVERED
    elif attention_mask is not None:
        found = _rows_of(attention_mask, queries + later, capacity, device)
        if found is None:
            reason = reasons.MASK_SHAPE
        else:
            rows, biased = found
            doubts = [] if biased is None else [(reasons.MASK_BIAS, biased.any())]
            if queries > 1 or later:
                strange = (rows[:, :queries] != (rows[:, -1:] & before)).any()
                doubts.append((reasons.MASK_ORDER, strange))
            if can_read(device):
                reason = next((why for why, doubt in doubts if bool(doubt)), None)
            elif doubts:
                ignored_bias = torch.stack([doubt for _, doubt in doubts]).any()
            valid = valid & rows[:, -1]
    n = (valid[:, None] & before).sum(-1)  # [B, queries]
    tail = torch.minimum(n, (length - unseen).clamp(min=0) % GROUP).sum()
    lengths, once = length.expand(batch), n[:, -1].sum()
    mask = None if is_full and attention_mask is None else valid.contiguous()
    counts = None if mask is None else count_once(mask, lengths, queries, config)
    return Plan(lengths, None, mask, counts, n.sum(), tail, once, queries, ignored_bias, reason)


def _causal(queries: int, length: int, device: torch.device) -> Tensor:
    """bool [queries, length]: the newest tokens, each seeing what is before it and itself."""
    return torch.ones(queries, length, dtype=torch.bool, device=device).tril(length - queries)


@functools.lru_cache(maxsize=64)
def _starts(starts: tuple[int, ...], device: torch.device) -> Tensor:
    """int64 [B]. The same padding is the same tensor in every step, so that no layer has to compare two on a GPU."""
    with torch.inference_mode(False):
        return torch.tensor(starts, dtype=torch.int64, device=device)
