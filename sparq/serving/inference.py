"""A request on its way through the model."""

from __future__ import annotations

import json
import logging
import threading
import time
from contextvars import ContextVar
from typing import Any

import torch
from fastapi import HTTPException
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteriaList
from transformers.cli.serving.utils import GenerateManager

import sparq
from sparq.cache_argument import generate_cache_name
from sparq.config import SparqConfig
from sparq.served import causal_layers
from sparq.serving.conversations import Conversations
from sparq.serving.metrics import Metrics
from sparq.timing import DecodeClock

log = logging.getLogger(__name__)

# Set when the client of the request in whose context it is read has gone (disconnects.py).
disconnected: ContextVar[threading.Event] = ContextVar("sparq_disconnected")


class Cancelled(Exception):
    """Nobody waits for the answer any more."""


class Inference(GenerateManager):
    """transformers' queue, in which one request after the other runs on one thread, on the model with SparQ.

    Each request goes on from a conversation that is kept, if there is one, and ends when its client has gone: between
    two layers of a prompt, between two new tokens, or before it has begun.
    """

    def __init__(
        self, model: PreTrainedModel, config: SparqConfig, conversations: Conversations, metrics: Metrics
    ) -> None:
        super().__init__()
        self.model, self.config, self.conversations, self.metrics = model, config, conversations, metrics
        self.limit: int | None = getattr(
            model.config.get_text_config(decoder=True), "max_position_embeddings", None
        )  # tokens

    def generate_streaming(self, model: Any, processor: Any, inputs: Any, gen_config: Any, *args: Any, **kwargs: Any):
        request = self._admit(inputs, gen_config, is_streamed=True)
        return super().generate_streaming(request, processor, inputs, gen_config, *args, **kwargs)  # type: ignore[arg-type]

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, *args: Any, **kwargs: Any
    ):
        request = self._admit(inputs, gen_config, is_streamed=False)
        return await super().generate_non_streaming(request, processor, inputs, gen_config, *args, **kwargs)  # type: ignore[arg-type]

    def _admit(self, inputs: Any, generation_config: GenerationConfig, is_streamed: bool) -> Request:
        length = inputs["input_ids"].shape[-1]
        most = generation_config.max_new_tokens
        if not length:
            raise HTTPException(400, "the prompt must have a token at least, it has none")
        if most is not None and most < 1:
            raise HTTPException(400, f"max_tokens must be 1 or more, got {most}")
        if self.limit is not None:
            if length >= self.limit:
                raise HTTPException(
                    400, f"the prompt must be shorter than the model's {self.limit} tokens, it has {length}"
                )
            generation_config.max_new_tokens = min(most or self.limit, self.limit - length)
        self.metrics.waiting.inc()
        return Request(self, disconnected.get(), is_streamed)

    def answer(
        self, gone: threading.Event, input_ids: Tensor, generation_config: GenerationConfig, **options: Any
    ) -> Tensor:
        """`model.generate` with SparQ, from a kept conversation.

        Raises:
            Cancelled: the client has gone.
        """

        def check(*_: Any) -> None:
            if gone.is_set():
                raise Cancelled

        check()
        model: Any = self.model
        prompt = input_ids[0].tolist()
        conversation = None
        if generation_config.use_cache is not False and _is_single(generation_config):
            conversation = self.conversations.take(prompt)
            generation_config.cache_implementation = None  # `generate` takes a cache, or makes one
            options[generate_cache_name()] = conversation.cache
        cached = len(conversation.tokens) if conversation is not None else 0
        hooks = [layer.register_forward_pre_hook(check) for layer in causal_layers(model)]

        def on_token(tokens: int) -> None:
            check()
            while hooks:  # no decode step is slower for them
                hooks.pop().remove()

        seed = vars(generation_config).pop("sparq_seed", None)
        if seed is not None:
            torch.manual_seed(seed)
        clock = DecodeClock(on_token)
        begin = time.perf_counter()
        try:
            with sparq.patched(model, self.config):
                tokens = model.generate(
                    input_ids=input_ids,
                    generation_config=generation_config,
                    stopping_criteria=StoppingCriteriaList([clock]),
                    **options,
                )
                report = sparq.report(model)
        finally:
            while hooks:
                hooks.pop().remove()
        if conversation is not None:
            conversation.tokens = tokens[0, : conversation.cache.get_seq_length()].tolist()
            self.conversations.keep(conversation)

        prompt_seconds, decode_seconds = clock.times[0] - begin, clock.times[-1] - clock.times[0]
        new = len(clock.times)
        self.metrics.add(len(prompt), cached, new, prompt_seconds, decode_seconds)
        self.metrics.add_report(report)
        total = report.total
        speed = f", {(new - 1) / decode_seconds:.1f} tokens/s" if new > 1 else ""
        less = f"; {total.bytes_dense / total.bytes_read:.1f}x fewer bytes read" if total.bytes_read else ""
        alpha = "" if total.mean_alpha is None else f", mean α {total.mean_alpha:.3f}"
        log.info(
            f"prompt of {len(prompt):,} tokens, {cached:,} of them cached, in {prompt_seconds:.2f} s; {new:,} new in "
            f"{decode_seconds:.2f} s{speed}{less}{alpha}"
        )
        return tokens


class Request:
    """Stands for the model where transformers' manager, on its thread, calls `generate`."""

    def __init__(self, inference: Inference, gone: threading.Event, is_streamed: bool) -> None:
        self._inference, self._gone, self._is_streamed = inference, gone, is_streamed

    def generate(self, **inputs: Any) -> Tensor:
        metrics = self._inference.metrics
        metrics.waiting.dec()
        outcome = "failed"
        try:
            tokens = self._inference.answer(self._gone, **inputs)
            outcome = "done"
            return tokens
        except Cancelled:
            outcome = "cancelled"
            log.info("a request was cancelled: its client has gone")
            raise
        except Exception as error:
            log.warning(f"a request has failed: {error}", exc_info=not isinstance(error, (TypeError, ValueError)))
            if self._is_streamed:  # transformers sets the message between quotation marks, as it is
                raise RuntimeError(json.dumps(str(error))[1:-1]) from error
            raise
        finally:
            metrics.requests.labels(outcome).inc()


def _is_single(generation_config: GenerationConfig) -> bool:
    """Whether one sequence is generated, so that a cache of one row is enough."""
    return generation_config.num_beams in (None, 1) and generation_config.num_return_sequences in (None, 1)
