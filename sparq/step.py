"""One forward pass of a patched model: what its layers share, worked out once."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from sparq import reasons
from sparq.cache import SparqLayer
from sparq.config import SparqConfig
from sparq.devices import count_once, has_kernel
from sparq.generating import drafting, is_prefill
from sparq.static_cache import SparqStaticLayer
from sparq.static_plan import StaticPlan
from sparq.stats import SparseStep, Stats


@dataclass(frozen=True, slots=True)
class Plan:
    """Which cached positions a decode step may see, and how many of them it reads.

    A position s of row b is valid where start[b] <= s < length[b] and mask[b, s].
    """

    length: Tensor  # [B] int64
    start: Tensor | None  # [B] int64; None: 0
    mask: Tensor | None  # [B, S] bool; None: no invalid positions but those before start
    row_counts: Tensor | None  # of the mask, int32 [B, Q, 2]; None: whoever needs them has to count
    valid: int  # positions that a query sees, summed over queries and the batch
    read: int  # positions read in full, summed likewise
    valid_once: int  # valid positions, summed over the batch: dense attention reads them once for all queries
    dense_reason: str | None  # why the step must be dense, if it must


class Step:
    """One forward pass: the cache, the knobs, and the plans that all full-attention layers share."""

    def __init__(self, cache: Cache | None, config: SparqConfig, stats: Stats) -> None:
        self.cache = cache
        self.config = config
        self.stats = stats
        self.attention_calls = 0
        self.tokens = 0  # new ones; known from the first attention layer on
        self.prompts: dict[int, int] = {}  # of each layer that has computed nothing but a prompt: its bytes of K and V
        self.is_static = cache is not None and _is_static(cache)
        self.is_prompt = cache is not None and not holds_tokens(cache)
        self.is_prefill = is_prefill()
        self.drafting = None if torch.compiler.is_compiling() else drafting(cache)
        self.sparse: list[SparseStep] = []  # counted when all layers have made theirs
        self._plans: list[tuple[Tensor | None, tuple, Any]] = []
        self._components: dict[int, int] = {}
        self._kernels: dict[tuple[str, torch.dtype], bool] = {}
        self._static_counts: tuple[StaticPlan, tuple[int, ...], Tensor] | None = None

    def begin(self, query_length: int, key_length: int) -> None:
        """The first attention layer says how many tokens are new, and how many keys there are."""
        self.tokens = query_length
        # A single token is a decode step wherever there is something to decode from: it is how anybody makes one.
        self.is_prompt = self.is_prompt or query_length == key_length or (self.is_prefill and query_length > 1)

    def prompt_length(self, query_length: int) -> int:
        """So many of a layer's new tokens are a prompt, and dense; the rest are decode steps. `query_length`: a layer
        that shares another's keys may be asked for the last of the new tokens only."""
        if self.drafting is None:
            return query_length if self.is_prompt or query_length < self.tokens else 0
        prompt = max(0, query_length - max(0, self.tokens - self.drafting.prompt_left))
        return prompt if self.is_prompt or prompt > 1 else 0

    def layer(self, layer_idx: int, key: Tensor, value: Tensor) -> Any:
        """The cache's layer of that index, or, where that holds nothing, the one that holds these keys and values
        [B, Hkv, S, d], since the model shares them; None where there is no such."""
        layers = [] if self.cache is None else self.cache.layers
        own = layers[layer_idx] if layer_idx < len(layers) else None
        if own.storage_device is None if isinstance(own, SparqLayer) else getattr(own, "keys", None) is None:
            holding = (layer for layer in layers if isinstance(layer, (SparqLayer, SparqStaticLayer)))
            return next((layer for layer in holding if layer.holds(key, value)), own)
        return own

    def components(self, head_dim: int) -> int:
        """r for heads of `head_dim` components."""
        r = self._components.get(head_dim)
        if r is None:
            r = self._components[head_dim] = self.config.components(head_dim)
        return r

    def has_kernel(self, device_type: str, dtype: torch.dtype) -> bool:
        """As `devices.has_kernel`."""
        known = self._kernels.get((device_type, dtype))
        if known is None:
            known = self._kernels[device_type, dtype] = has_kernel(device_type, dtype)
        return known

    def plan(
        self,
        attention_mask: Tensor | None,
        length: int,
        batch: int,
        device: torch.device,
        queries: int = 1,
        later: int = 0,
    ) -> Plan:
        """The plan of the newest `queries` tokens of `length`, behind which the pass has `later` more, for a mask [B or
        1, 1, Q >= queries + later, S] (bool, or 0 and large negative numbers), or None: everything before a token and
        itself valid."""
        asked = (length, device, queries, later)
        plan = self._remembered(attention_mask, asked)
        if plan is None:
            plan = self._make_plan(attention_mask, length, batch, device, queries, later)
            self._plans.append((attention_mask, asked, plan))
        return plan

    def static_plan(
        self,
        attention_mask: Tensor | None,
        length: Tensor,
        keys: Tensor,
        queries: int = 1,
        later: int = 0,
        is_full: bool = False,
    ) -> StaticPlan:
        """The same where the device alone knows: keys [B, Hkv, S, d], `length` (int64 []) of S are filled, `later`
        included."""
        asked = (keys.device, queries, later)
        plan = self._remembered(attention_mask, asked)
        if plan is None:
            batch, capacity = keys.shape[0], keys.shape[2]
            plan = StaticPlan.make(attention_mask, length, batch, capacity, self.config, queries, later, is_full)
            self._plans.append((attention_mask, asked, plan))
        return plan

    def _remembered(self, attention_mask: Tensor | None, asked: tuple) -> Any:
        """The plan of a layer before this one that has asked the same of the same mask, or None."""
        return next((plan for mask, before, plan in self._plans if mask is attention_mask and before == asked), None)

    def static_counts(self, plan: StaticPlan, *shape: int) -> Tensor:
        """`plan.counts(*shape)`, made once for all layers of a shape."""
        held = self._static_counts
        if held is None or held[0] is not plan or held[1] != shape:
            self._static_counts = held = (plan, shape, plan.counts(*shape))
        return held[2]

    def _make_plan(
        self, attention_mask: Tensor | None, length: int, batch: int, device: torch.device, queries: int, later: int
    ) -> Plan:
        lengths = torch.full((batch,), length, dtype=torch.int64, device=device)
        if attention_mask is None:
            return self._counted(lengths, None, None, [[length - later for later in range(queries)]] * batch)
        shape = attention_mask.shape
        if attention_mask.dim() != 4 or shape[1] != 1 or shape[2] < queries + later or shape[3] < length + later:
            return Plan(lengths, None, None, None, 0, 0, 0, reasons.MASK_SHAPE)
        rows = attention_mask[:, 0, -(queries + later) :, :length].to(device).expand(batch, -1, length)
        biased = None
        if rows.dtype != torch.bool:
            biased = ~((rows == 0) | (rows <= torch.finfo(rows.dtype).min / 2))
            rows = rows == 0
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
            return Plan(lengths, None, None, None, 0, 0, 0, reasons.MASK_BIAS)
        if any(others):
            return Plan(lengths, None, None, None, 0, 0, 0, reasons.MASK_ORDER)
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
        reason = reasons.COVERED if read == seen else None
        rows = None if mask is None else count_once(mask, length, len(counts[0]), self.config)
        return Plan(length, start, mask, rows, sum(seen), sum(read), sum(row[0] for row in counts), reason)


def holds_tokens(cache: Cache) -> bool:
    is_static = _is_static(cache)
    return any(_is_filled(layer, is_static) for layer in cache.layers)


def _is_static(cache: Cache) -> bool:
    return any(isinstance(layer, SparqStaticLayer) for layer in cache.layers)


def _is_filled(layer: Any, is_static: bool) -> bool:
    """Whether the layer holds tokens. A static cache may have been reset: its layers stay initialised, and only SparQ's
    know."""
    if is_static:
        return isinstance(layer, SparqStaticLayer) and layer.is_filled
    return getattr(layer, "is_initialized", True) and getattr(layer, "keys", True) is not None


def _causal(queries: int, length: int, device: torch.device) -> Tensor:
    """bool [queries, length]: the newest tokens, each seeing what is before it and itself."""
    return torch.ones(queries, length, dtype=torch.bool, device=device).tril(length - queries)


@functools.lru_cache(maxsize=64)
def _starts(starts: tuple[int, ...], device: torch.device) -> Tensor:
    """int64 [B]. The same padding is the same tensor in every step, so that no layer has to compare two on a GPU."""
    with torch.inference_mode(False):
        return torch.tensor(starts, dtype=torch.int64, device=device)
