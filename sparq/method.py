"""What a patched model does in its attention layers: SparQ first, and whatever it is compared with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import sparq_kernels
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from sparq import attention, reasons
from sparq.attention import Call
from sparq.cache import allocated_bytes, begin_pass, end_pass, refuse_quantized, take_remade, upgrade
from sparq.cache_argument import find_cache
from sparq.config import SparqConfig
from sparq.stats import Stats
from sparq.step import Step, holds_tokens


class Method(ABC):
    """One per `patch` or `with patched(...)`, which put it on a model; it keeps nothing of a pass.

    Attributes:
        config: the knobs that a pass reads, and the model is checked against.
        settings: what the report names as such.
    """

    config: SparqConfig
    settings: Any

    @abstractmethod
    def prepare(
        self, decoder: PreTrainedModel, cache: Cache | None, layers: int, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[Cache | None, tuple, dict[str, Any]]:
        """Before a forward pass of `decoder`, which has so many attention layers: make of the cache among its
        arguments, if there is any, what `attend` needs. Returns cache and arguments to go on with."""

    @abstractmethod
    def attend(self, call: Call) -> tuple[Tensor, Tensor | None]:
        """One layer's attention, sparse or dense, counted: output [B, Q, Hq, d], and weights where they are wanted."""

    @abstractmethod
    def finish(self, step: Step, output: Any) -> None:
        """After the pass, whose output this is."""

    @abstractmethod
    def implementation(self, stats: Stats, decoder: PreTrainedModel) -> str:
        """What computes the steps, for the report."""


@dataclass
class Sparq(Method):
    """SparQ Attention (arXiv 2312.04985)."""

    config: SparqConfig

    @property
    def settings(self) -> SparqConfig:
        return self.config

    def prepare(
        self, decoder: PreTrainedModel, cache: Cache | None, layers: int, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[Cache | None, tuple, dict[str, Any]]:
        if cache is not None:
            refuse_quantized(cache)
            upgrade(cache, self.config.index)
            begin_pass(cache, layers)
        return cache, args, kwargs

    def attend(self, call: Call) -> tuple[Tensor, Tensor | None]:
        return attention.attend(call)

    def finish(self, step: Step, output: Any) -> None:
        if step.cache is not None:
            end_pass(step.cache)
        if not torch.compiler.is_compiling():
            if step.drafting is not None:
                step.drafting.prompt_left = max(0, step.drafting.prompt_left - step.tokens)
            if step.cache is not None:
                step.stats.cache(allocated_bytes(step.cache), take_remade(step.cache))
            _count_uncached(step, output)

    def implementation(self, stats: Stats, decoder: PreTrainedModel) -> str:
        # The layers may lie on several devices, and the parameters, where accelerate offloads them, on none.
        used = stats.used() or {(decoder.device, decoder.dtype)}
        names = {"none yet" if at.type == "meta" else sparq_kernels.backend(at, dtype) for at, dtype in used}
        return ", ".join(sorted(names))


def _count_uncached(step: Step, output: Any) -> None:
    """Count a decode step that `generate` has computed without a cache, the whole text again: one more token than in
    the pass before. (A model that leaves its cache empty is fed the new token alone.)"""
    cache = step.cache
    if cache is None:  # the model may have made one, which the caller is going to use
        cache = find_cache(output.values() if isinstance(output, dict) else output if isinstance(output, tuple) else ())
    stats, before = step.stats, step.stats.uncached_tokens
    stats.uncached_tokens = 0
    if cache is not None and holds_tokens(cache):
        return
    is_step = before and step.tokens == (before + 1 if step.cache is None else 1)
    if step.is_prefill or is_step:  # of nothing else: whoever scores texts of growing length decodes nothing
        stats.uncached_tokens = step.tokens
    if is_step:
        reason = reasons.NO_CACHE if step.cache is None else reasons.EMPTY_CACHE
        for layer_idx, bytes_dense in step.prompts.items():
            stats.dense(layer_idx, reason, bytes_dense)
        stats.warn_once(f"sparq: decoding stays dense and gains nothing: {reason}")
