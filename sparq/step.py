"""One forward pass of a patched model: what its layers share, worked out once."""

from __future__ import annotations

from typing import Any

import torch
from sparq_kernels import Budget
from torch import Tensor
from transformers.cache_utils import Cache

from sparq.cache import SparqLayer
from sparq.config import SparqConfig
from sparq.devices import has_kernel
from sparq.generating import drafting, is_prefill
from sparq.plan import Plan, make_plan
from sparq.recording import Recording
from sparq.static_cache import SparqStaticLayer
from sparq.stats import SparseStep, Stats


class Step:
    """One forward pass: the cache, the knobs, and the plans that all full-attention layers share."""

    def __init__(
        self,
        cache: Cache | None,
        config: SparqConfig,
        stats: Stats,
        method: Any = None,
        recording: Recording | None = None,
    ) -> None:
        """method: a `method.Method`, which makes the steps of this pass; None: SparQ. recording: takes down what they
        attend."""
        self.cache = cache
        self.config = config
        self.stats = stats
        self.method = method
        self.recording = recording
        self.attention_calls = 0
        self.tokens = 0  # new ones; known from the first attention layer on
        self.prompts: dict[int, int] = {}  # of each layer that has computed nothing but a prompt: its bytes of K and V
        self.is_static = cache is not None and _is_static(cache)
        self.is_prompt = cache is not None and not holds_tokens(cache)
        self.is_prefill = is_prefill()
        self.drafting = None if torch.compiler.is_compiling() else drafting(cache)
        self.sparse: list[SparseStep] = []  # counted when all layers have made theirs
        self._plans: list[tuple[Tensor | None, tuple, Plan]] = []
        self._budgets: dict[int, Budget] = {}
        self._kernels: dict[tuple[str, torch.dtype], bool] = {}
        self._counts: tuple[Plan, tuple[Any, ...], tuple[int, ...] | Tensor] | None = None

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

    def budget(self, head_dim: int) -> Budget:
        """What the operator may read for heads of `head_dim` components."""
        budget = self._budgets.get(head_dim)
        if budget is None:
            budget = self._budgets[head_dim] = self.config.budget(self.config.components(head_dim))
        return budget

    def has_kernel(self, device_type: str, dtype: torch.dtype) -> bool:
        """As `devices.has_kernel`."""
        known = self._kernels.get((device_type, dtype))
        if known is None:
            known = self._kernels[device_type, dtype] = has_kernel(device_type, dtype)
        return known

    def plan(
        self, attention_mask: Tensor | None, length: int | Tensor, keys: Tensor, queries: int = 1, later: int = 0
    ) -> Plan:
        """As `make_plan`, once for all layers that ask the same of the same mask."""
        # A tensor is the layer's own number, of which each has one; they are equal. A graph knows no number.
        is_known = not (isinstance(length, Tensor) or torch.compiler.is_compiling())
        asked = (length if is_known else None, keys.device, queries, later)
        found = next((plan for mask, before, plan in self._plans if mask is attention_mask and before == asked), None)
        if found is None:
            found = make_plan(attention_mask, length, keys, self.config, queries, later)
            self._plans.append((attention_mask, asked, found))
        return found

    def counts(self, plan: Plan, *shape: Any) -> tuple[int, ...] | Tensor:
        """`plan.counts(*shape)`, made once for all layers of a shape."""
        held = self._counts
        if held is None or held[0] is not plan or held[1] != shape:
            self._counts = held = (plan, shape, plan.counts(*shape, by_token=self.counts_tokens))
        return held[2]

    @property
    def counts_tokens(self) -> bool:
        """Whether each new token counts as a pass of its own (`generating.each_token_decides`)."""
        return self.drafting is not None and self.drafting.counts_tokens

    def count_dense(self, layer_idx: int, reason: str, queries: int, key: Tensor, later: int = 0) -> None:
        """Dense steps of `queries` tokens, with so many later ones behind them among the keys [B, Hkv, S, d]."""
        bytes_dense, steps = 2 * key.numel() * key.element_size(), 1
        if self.counts_tokens:
            batch, kv_heads, length, head_dim = key.shape
            read = sum(length - later - newer for newer in range(queries))
            bytes_dense, steps = 2 * batch * kv_heads * read * head_dim * key.element_size(), queries
        self.stats.dense(layer_idx, reason, bytes_dense, steps)


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
