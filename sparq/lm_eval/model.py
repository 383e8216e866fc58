"""The model `sparq` of lm-evaluation-harness: whatever it scores or generates, it decodes."""

from __future__ import annotations

import dataclasses
import inspect
import json
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm import tqdm

from sparq.cache_argument import generate_cache_name
from sparq.lm_eval.decoding import Decoding
from sparq.lm_eval.prefill import Prefills, feed, prefill
from sparq.lm_eval.registry import METHODS, find_method
from sparq.lm_eval.scoring import Row, score
from sparq.reporting import LayerReport

log = logging.getLogger(__name__)

FINGERPRINT = "sparq: what has made these answers"  # a key of the harness's answer cache, whose others are hashes


@register_model("sparq")
class SparqLM(HFLM):
    """A causal Hugging Face model that decodes with SparQ Attention, or with a method to compare it with.

    The harness scores a continuation in one pass together with its context, in which attention that is sparse in
    decode steps would never run. Here a context is prefilled densely, and each token of the continuation is a step.

    Args:
        pretrained: as for `HFLM`, a name, a folder or a model.
        method: how decode steps attend: "sparq", "dense", one of `sparq.lm_eval.methods`, one that has been registered
            (`sparq.lm_eval.register_method`), or "module:Class", a subclass of `sparq.lm_eval.Method`.
        decode_context_tokens: so many tokens at the end of each context are decoded too. With 0 the first answer token
            is predicted by the dense prefill, as in `generate` and in the paper; with 1 or more no token is.
        rolling_prefill: in rolling log-likelihoods, which have no context, so many tokens at the beginning of each
            window are scored in the prefill, densely.
        prefills: where prefills are kept for other runs over the same model.
        others: the method's knobs (for "sparq" those of `SparqConfig`; min_length is 0 where it is not given, since the
            question is quality), and whatever `HFLM` takes.

    Raises:
        TypeError, ValueError: a bad knob or option; before the model is loaded, unless it takes the model to know.
    """

    def __init__(
        self,
        pretrained: Any,
        method: str = "sparq",
        decode_context_tokens: int = 0,
        rolling_prefill: int = 0,
        prefills: Prefills | None = None,
        **others: Any,
    ) -> None:
        for name, value in (("decode_context_tokens", decode_context_tokens), ("rolling_prefill", rolling_prefill)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"{name} must be an integer of at least 0, got {value!r}")
        _check_names(method)
        self.decoding = Decoding.of(method, Decoding.take_knobs(method, others))
        self.decode_context_tokens, self.rolling_prefill = decode_context_tokens, rolling_prefill
        self.prefills = prefills
        super().__init__(pretrained, **others)
        if self.backend != "causal":
            raise ValueError(f"pretrained must be a causal model, {self.pretrained} is {self.backend}")
        with self.decoding.on(self.model):
            pass  # raises now where the method cannot serve the model
        self.steps: dict[str, dict[str, Any]] = {}  # of each task: what its decode steps did; empty where all are dense

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return self._by_task(super().loglikelihood, requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        return self._by_task(super().loglikelihood_rolling, requests, disable_tqdm)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        return self._by_task(super().generate_until, requests, disable_tqdm)

    def _by_task(self, answer: Callable[..., list], requests: list[Instance], disable_tqdm: bool) -> list:
        """Let the harness's `answer` do it one task at a time, and remember what each task's steps did."""
        # Of several processes each has its share of the requests, perhaps of other tasks than the others', which wait
        # for each other in every call.
        names = [request.task_name if self.world_size == 1 else "all tasks of this process" for request in requests]
        answers: list = [None] * len(requests)
        for name in dict.fromkeys(names):
            mine = [i for i, found in enumerate(names) if found == name]
            with self.decoding.on(self.model) as report:
                for i, given in zip(mine, answer([requests[i] for i in mine], disable_tqdm), strict=True):
                    answers[i] = given
                if report is not None:
                    self._remember(name or "(no task)", report().total)
        return answers

    def _remember(self, task: str, steps: LayerReport) -> None:
        self.steps[task] = {
            "mean_alpha": steps.mean_alpha,
            "layer_steps": {"sparse": steps.sparse_steps, "dense": steps.dense_steps},
            "positions": {"cached": steps.positions_cached, "read": steps.positions_read},
            "bytes": {"read": steps.bytes_read, "dense": steps.bytes_dense},
            "compression": steps.bytes_dense / steps.bytes_read if steps.bytes_read else None,
        }
        if not steps.sparse_steps:
            log.warning(
                f"sparq: {task} had no sparse step, so its score is that of dense attention: {_why(self.steps[task])}"
            )

    @torch.no_grad()
    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        rows = [self._row(*request) for request in requests]
        # The longest first, so that memory runs out at once if it does; equal contexts together, to be read once.
        order = sorted(range(len(rows)), key=lambda i: (-len(rows[i].prefilled), rows[i].prefilled))
        size = override_bs or (self._detect_batch_size() if self.batch_size == "auto" else self.batch_size)
        results: list[tuple[float, bool]] = [(0.0, False)] * len(rows)
        with tqdm(total=len(rows), disable=disable_tqdm or self.rank != 0, desc="decoding continuations") as progress:
            for first in range(0, len(order), size):
                batch = order[first : first + size]
                with self._autocast():
                    scores = score(
                        self.model,
                        [rows[i] for i in batch],
                        self.tokenizer.pad_token_id,
                        self.softmax_dtype,
                        self.prefills,
                        self.decoding.prefill_kind,
                    )
                for i, result in zip(batch, scores, strict=True):
                    results[i] = result
                    if requests[i][0] is not None:  # not a rolling window, which is a part of a request only
                        self.cache_hook.add_partial("loglikelihood", requests[i][0], result)
                progress.update(len(batch))
        return results

    def _row(self, request: Any, context: list[int], continuation: list[int]) -> Row:
        if not context or not continuation:
            raise ValueError(f"context and continuation must have a token at least, got {context} and {continuation}")
        tokens = (context + continuation)[-(self.max_length + 1) :]  # the last one is predicted, but never read
        scored = min(len(continuation), len(tokens) - 1)
        before = len(tokens) - scored
        if request is None:
            before += self.rolling_prefill
        else:
            before -= self.decode_context_tokens
        before = min(max(before, 1), len(tokens) - 1)
        return Row(tokens[:before], tokens[before:], scored)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        mask = options["attention_mask"]
        decoded = min(self.decode_context_tokens, int(mask.sum(1).min()) - 1)
        if decoded > 0:
            for name in ("num_beams", "num_return_sequences"):
                if options.get(name, 1) != 1:
                    raise ValueError(f"{name} must be 1 where decode_context_tokens is not 0, got {options[name]}")
            with torch.no_grad(), self._autocast():
                before = context.shape[1] - decoded
                cache, _ = prefill(
                    self.model,
                    context[:, :before],
                    mask[:, :before],
                    prefills=self.prefills,
                    kind=self.decoding.prefill_kind,
                )
                for _ in feed(self.model, cache, context[:, before:-1], None if mask.all() else mask):
                    pass  # `generate` feeds the last
                options[generate_cache_name()] = cache
        return super()._model_generate(context, max_length, stop, **options)

    def _autocast(self) -> torch.autocast:
        dtype = self.mixed_precision_dtype
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """Take the harness's cache of answers (`--use_cache`), unless others than this configuration are in it.

        The harness finds an answer by the text of its request alone.

        Raises:
            ValueError: another configuration, or another model, has made the answers in the cache.
        """
        if cache_hook.dbdict is not None:
            mine = json.dumps(self._fingerprint(), sort_keys=True)
            found = cache_hook.dbdict.get(FINGERPRINT)
            if found != mine and len(cache_hook.dbdict):
                raise ValueError(
                    "use_cache must name a cache of this very configuration: it holds answers of "
                    f"{found or 'a model other than sparq'}, and these would be of {mine}"
                )
            cache_hook.dbdict[FINGERPRINT] = mine
            cache_hook.dbdict.commit()
        super().set_cache_hook(cache_hook)

    def _fingerprint(self) -> dict[str, Any]:
        named = self.pretrained if isinstance(self.pretrained, str) else self.model.config._name_or_path
        return self._configuration() | {
            "pretrained": named,
            "revision": self.revision,
            "peft": self.peft,
            "delta": self.delta,
            "dtype": str(self.model.dtype),
            "mixed_precision_dtype": str(self.mixed_precision_dtype),
            "max_length": self.max_length,
            "add_bos_token": self.add_bos_token,
        }

    def _configuration(self) -> dict[str, Any]:
        return self.decoding.to_dict() | {
            "decode_context_tokens": self.decode_context_tokens,
            "rolling_prefill": self.rolling_prefill,
        }

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes into its results, at the end of a run.

        Raises:
            RuntimeError: no step of the whole run was sparse.
        """
        if self.steps and not any(steps["layer_steps"]["sparse"] for steps in self.steps.values()):
            why = "; ".join(f"{task}: {_why(steps)}" for task, steps in self.steps.items())
            raise RuntimeError(
                f"sparq: no step of this run was sparse, so its scores are those of dense attention: {why}"
            )
        return super().get_model_info() | {"sparq": self._configuration() | {"tasks": self.steps}}


def _why(steps: dict[str, Any]) -> str:
    dense = steps["layer_steps"]["dense"]
    if not dense:
        return (
            "it made no decode step at all; a continuation of one token is predicted by the prefill, unless "
            "decode_context_tokens=1 is among the model_args"
        )
    return ", ".join(f"{count} layer steps: {reason}" for reason, count in dense.items())


def _check_names(method: str) -> None:
    """Raise where a knob, of this method or of one that is registered, is called like an argument of the harness's
    model: one of the two would never be given what is meant for it."""
    arguments = {*inspect.signature(HFLM.__init__).parameters, *inspect.signature(SparqLM.__init__).parameters}
    for name, config in {**METHODS, method: find_method(method)}.items():
        fields = [] if config is None else [field.name for field in dataclasses.fields(config)]
        for field in fields:
            if field in arguments:
                raise ValueError(
                    f"method {name!r} must not have a knob {field!r}: the harness's model has such an argument"
                )
