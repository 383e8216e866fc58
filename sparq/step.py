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
    valid: int  # valid positions, summed over the batch
    read: int  # positions read in full, summed over the batch
    dense_reason: str | None  # why the step must be dense, if it must


class Step:
    """One forward pass: the cache, the knobs, and the plan that all full-attention layers share."""

    def __init__(self, cache: Cache | None, config: SparqConfig, counters: Counters) -> None:
        self.cache = cache
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
        self.counts_on_device = bool(static) or torch.compiler.is_compiling()
        self._plan: tuple[Tensor | None, int, torch.device, Plan] | None = None
        self._static_plan: tuple[Tensor | None, torch.device, StaticPlan] | None = None
        self._static_counts: tuple[StaticPlan, tuple[int, ...], Tensor] | None = None

    def layer(self, layer_idx: int) -> Any:
        """The cache's layer, or None where there is no such."""
        if self.cache is None or layer_idx >= len(self.cache.layers):
            return None
        return self.cache.layers[layer_idx]

    def plan(self, attention_mask: Tensor | None, length: int, batch: int, device: torch.device) -> Plan:
        """The plan for a mask [B or 1, 1, 1, S] (bool, or 0 and large negative numbers), or None: everything valid."""
        if self._plan is None or not (
            self._plan[0] is attention_mask and self._plan[1] == length and self._plan[2] == device
        ):
            self._plan = (attention_mask, length, device, self._make_plan(attention_mask, length, batch, device))
        return self._plan[3]

    def static_plan(self, attention_mask: Tensor | None, length: Tensor, keys: Tensor) -> StaticPlan:
        """The plan of the newest token on a static cache: keys [B, Hkv, S, d], `length` (int64 []) of S are filled."""
        held = self._static_plan
        if held is None or held[0] is not attention_mask or held[1] != keys.device:
            plan = StaticPlan.make(attention_mask, length, keys.shape[0], keys.shape[2], self.config)
            self._static_plan = held = (attention_mask, keys.device, plan)
        return held[2]

    def static_counts(self, plan: StaticPlan, *shape: int) -> Tensor:
        """`plan.counts(*shape)`, made once for all layers of a shape."""
        held = self._static_counts
        if held is None or held[0] is not plan or held[1] != shape:
            self._static_counts = held = (plan, shape, plan.counts(*shape))
        return held[2]

    def _make_plan(self, attention_mask: Tensor | None, length: int, batch: int, device: torch.device) -> Plan:
        lengths = torch.full((batch,), length, dtype=torch.int64, device=device)
        if attention_mask is None:
            return self._counted(lengths, None, None, [length] * batch)
        if attention_mask.dim() != 4 or attention_mask.shape[1:3] != (1, 1) or attention_mask.shape[3] < length:
            why = "attention mask that is not [batch, 1, 1, length]"
            return Plan(lengths, None, None, 0, 0, why)
        mask = attention_mask[:, 0, 0, :length].to(device).expand(batch, length)
        biased = None
        if mask.dtype != torch.bool:
            biased = ~((mask == 0) | (mask <= torch.finfo(mask.dtype).min / 2))
            mask = mask == 0
        valid = mask.sum(-1)
        first = mask.to(torch.uint8).argmax(-1)  # the first valid position
        # All that Python has to know, read back at once: on a GPU every such moment waits for all work before it.
        known = torch.stack((valid, first, torch.zeros_like(valid) if biased is None else biased.sum(-1)))
        counts, starts, biases = known.tolist()
        if any(biases):
            return Plan(lengths, None, None, 0, 0, "attention mask with a bias")
        if all(count == length for count in counts):
            return self._counted(lengths, None, None, counts)
        if all(count == length - start for count, start in zip(counts, starts, strict=True)):
            return self._counted(lengths, _starts(tuple(starts), device), None, counts)
        # A copy: the cache remembers it, and the caller may go on to change the mask in place.
        return self._counted(lengths, None, mask.clone(memory_format=torch.contiguous_format), counts)

    def _counted(self, length: Tensor, start: Tensor | None, mask: Tensor | None, counts: list[int]) -> Plan:
        read = [self.config.positions(count) for count in counts]
        reason = "k covers the context" if read == counts else None
        return Plan(length, start, mask, sum(counts), sum(read), reason)


@functools.lru_cache(maxsize=64)
def _starts(starts: tuple[int, ...], device: torch.device) -> Tensor:
    """int64 [B]. The same padding is the same tensor in every step, so that no layer has to compare two on a GPU."""
    with torch.inference_mode(False):
        return torch.tensor(starts, dtype=torch.int64, device=device)
