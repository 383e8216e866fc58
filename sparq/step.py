"""One forward pass of a patched model: what its layers share, worked out once."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from sparq.config import SparqConfig
from sparq.counters import Counters
from sparq.static_cache import SparqStaticLayer
from sparq.static_plan import StaticPlan


@dataclass(frozen=True, slots=True)
class Plan:
    """Which cached positions a decode step may see, and how many of them it reads.

    A position s of row b is valid where start[b] <= s < length[b] and mask[b, s].
    """

    length: Tensor  # [B] int64
    start: Tensor | None  # [B] int64; None: 0
    mask: Tensor | None  # [B, S] bool; None: no invalid positions but those before start
    valid: int  # positions that a query sees, summed over queries and the batch
    read: int  # positions read in full, summed likewise
    valid_once: int  # valid positions, summed over the batch: dense attention reads them once for all queries
    dense_reason: str | None  # why the step must be dense, if it must


class Step:
    """One forward pass: the cache, the knobs, and the plan that all full-attention layers share."""

    def __init__(self, cache: Cache | None, config: SparqConfig, counters: Counters, drafts: int = 0) -> None:
        """drafts: how many tokens at the end of a prompt are no prompt but a draft to be verified."""
        self.cache = cache
        self.drafts = drafts
        self.config = config
        self.counters = counters
        self.attention_calls = 0
        static = [] if cache is None else [layer for layer in cache.layers if isinstance(layer, SparqStaticLayer)]
        if static:  # a static cache may have been reset: all its layers stay initialised then
            self.is_prompt = not any(layer.is_filled for layer in static)
        else:
            self.is_prompt = cache is not None and not any(
                getattr(layer, "is_initialized", True) for layer in cache.layers
            )
        self.counts_on_device = len(static) > 0 or torch.compiler.is_compiling()
        self._plan: tuple[tuple[Tensor | None, int, torch.device, int], Plan] | None = None
        self._static_plan: tuple[Tensor | None, tuple[torch.device, int], StaticPlan] | None = None
        self._static_counts: tuple[StaticPlan, tuple[int, ...], Tensor] | None = None

    def layer(self, layer_idx: int) -> Any:
        """The cache's layer, or None where there is no such."""
        if self.cache is None or layer_idx >= len(self.cache.layers):
            return None
        return self.cache.layers[layer_idx]

    def plan(
        self, attention_mask: Tensor | None, length: int, batch: int, device: torch.device, queries: int = 1
    ) -> Plan:
        """The plan of the newest `queries` tokens, for a mask [B or 1, 1, Q >= queries, S] (bool, or 0 and large
        negative numbers), or None: everything before a token and itself valid."""
        asked = (attention_mask, length, device, queries)
        if self._plan is None or not (self._plan[0][0] is attention_mask and self._plan[0][1:] == asked[1:]):
            self._plan = (asked, self._make_plan(attention_mask, length, batch, device, queries))
        return self._plan[1]

    def static_plan(self, attention_mask: Tensor | None, length: Tensor, keys: Tensor, queries: int = 1) -> StaticPlan:
        """The plan of the newest tokens on a static cache: keys [B, Hkv, S, d], `length` (int64 []) of S are filled."""
        held = self._static_plan
        if held is None or held[0] is not attention_mask or held[1] != (keys.device, queries):
            plan = StaticPlan.make(attention_mask, length, keys.shape[0], keys.shape[2], self.config, queries)
            self._static_plan = held = (attention_mask, (keys.device, queries), plan)
        return held[2]

    def static_counts(self, plan: StaticPlan, *shape: int) -> Tensor:
        """`plan.counts(*shape)`, made once for all layers of a shape."""
        held = self._static_counts
        if held is None or held[0] is not plan or held[1] != shape:
            self._static_counts = held = (plan, shape, plan.counts(*shape))
        return held[2]

    def _make_plan(
        self, attention_mask: Tensor | None, length: int, batch: int, device: torch.device, queries: int
    ) -> Plan:
        lengths = torch.full((batch,), length, dtype=torch.int64, device=device)
        if attention_mask is None:
            return self._counted(lengths, None, None, [[length - later for later in range(queries)]] * batch)
        shape = attention_mask.shape
        if attention_mask.dim() != 4 or shape[1] != 1 or shape[2] < queries or shape[3] < length:
            why = f"attention mask that is not [batch, 1, {queries}, length]"
            return Plan(lengths, None, None, 0, 0, 0, why)
        rows = attention_mask[:, 0, -queries:, :length].to(device).expand(batch, queries, length)
        biased = None
        if rows.dtype != torch.bool:
            biased = ~((rows == 0) | (rows <= torch.finfo(rows.dtype).min / 2))
            rows = rows == 0
        mask = rows[:, -1]  # what the last query sees, of which the others must see all before them and themselves
        seen = mask.cumsum(-1)[:, length - queries :].flip(-1)  # [B, queries], the last query first
        first = mask.to(torch.uint8).argmax(-1)  # the first valid position
        # All that Python has to know, read back at once: on a GPU every such moment waits for all work before it.
        strange = None if queries == 1 else rows != mask[:, None] & _causal(queries, length, device)
        doubts = [torch.zeros_like(first) if doubt is None else doubt.sum((1, 2)) for doubt in (biased, strange)]
        known = torch.cat([torch.stack([first, *doubts], 1), seen], 1).tolist()
        starts, biases, others = ([row[i] for row in known] for i in range(3))
        counts = [row[3:] for row in known]
        if any(biases):
            return Plan(lengths, None, None, 0, 0, 0, "attention mask with a bias")
        if any(others):
            return Plan(lengths, None, None, 0, 0, 0, "attention mask that is not causal")
        if all(count[0] == length for count in counts):
            return self._counted(lengths, None, None, counts)
        if all(count[0] == length - start for count, start in zip(counts, starts, strict=True)):
            return self._counted(lengths, _starts(tuple(starts), device), None, counts)
        # A copy: the cache remembers it, and the caller may go on to change the mask in place.
        return self._counted(lengths, None, mask.clone(memory_format=torch.contiguous_format), counts)

    def _counted(self, length: Tensor, start: Tensor | None, mask: Tensor | None, counts: list[list[int]]) -> Plan:
        """`counts`: for each row, how many positions its queries see, the last query's first."""
        seen = [count for row in counts for count in row]
        read = [self.config.positions(count) for count in seen]
        reason = "k covers the context" if read == seen else None
        return Plan(length, start, mask, sum(seen), sum(read), sum(row[0] for row in counts), reason)


def _causal(queries: int, length: int, device: torch.device) -> Tensor:
    """bool [queries, length]: the newest tokens, each seeing what is before it and itself."""
    return torch.ones(queries, length, dtype=torch.bool, device=device).tril(length - queries)


@functools.lru_cache(maxsize=64)
def _starts(starts: tuple[int, ...], device: torch.device) -> Tensor:
    """int64 [B]. The same padding is the same tensor in every step, so that no layer has to compare two on a GPU."""
    with torch.inference_mode(False):
        return torch.tensor(starts, dtype=torch.int64, device=device)
