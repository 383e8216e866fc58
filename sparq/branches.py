"""Prompts that begin alike, a text with several questions, answered from one cache: what they share is read once."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StoppingCriteriaList

from sparq.cache_argument import generate_cache_name
from sparq.timing import DecodeClock


@dataclass(frozen=True)
class Branches:
    """What came of the prompts, and how long it took."""

    new_tokens: list[list[int]]  # of each prompt
    prompt_seconds: float  # the shared beginning, and of each prompt the rest, to its first new token
    decode_seconds: float  # all new tokens but the first of each prompt
    decode_steps: int

    @property
    def tokens_per_second(self) -> float:
        return self.decode_steps / self.decode_seconds if self.decode_steps else float("nan")


def shared_length(prompts: Sequence[Sequence[int]]) -> int:
    """The number of tokens that all prompts begin with, and that leave each of them at least one more to generate from.

    0 for a single prompt, which shares with nobody.
    """
    if len(prompts) == 1:
        return 0
    same = 0
    for tokens in zip(*prompts, strict=False):
        if len(set(tokens)) > 1:
            break
        same += 1
    return min(same, *(len(prompt) - 1 for prompt in prompts))


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    on_token: Callable[[], None] = lambda: None,
    on_prompt: Callable[[int], None] = lambda tokens: None,
    cache: DynamicCache | None = None,
    **options: Any,
) -> Branches:
    """Generate from each prompt as `model.generate` does, one after another on one dynamic cache.

    Args:
        model: patched or not. The shared beginning is one forward pass, the rest of each prompt another, dense both.
        prompts: token ids, each at least one.
        on_token: called after each new token.
        on_prompt: called before the shared beginning is read, and before the rest of each prompt, with its length.
        cache: holds tokens that all prompts begin with and go on from, and are not read again. It is given back with
            the shared beginning, and nothing else, in it. None: a new one.
        options: for `model.generate`.
    """
    cache = DynamicCache(config=model.config) if cache is None else cache
    held = cache.get_seq_length()
    new_tokens, prompt_seconds, decode_seconds, decode_steps = [], 0.0, 0.0, 0
    shared = max(held, shared_length(prompts))
    if shared > held:
        on_prompt(shared - held)
        begin = time.perf_counter()
        read(model, prompts[0][:shared], cache, **options)
        prompt_seconds = time.perf_counter() - begin
    # A window forgets what it has slid past, so that it cannot be cut back; but it is small enough to be kept.
    layers: list[Any] = cache.layers
    windows = {i: copy.deepcopy(layers[i]) for i, sliding in enumerate(cache.is_sliding) if sliding}
    for prompt in prompts:
        clock = DecodeClock(lambda tokens: on_token())
        on_prompt(len(prompt) - shared)
        begin = time.perf_counter()
        output = _generate(model, prompt, cache, **options, stopping_criteria=StoppingCriteriaList([clock]))
        new_tokens.append(output[0, len(prompt) :].tolist())
        prompt_seconds += clock.times[0] - begin
        decode_seconds += clock.times[-1] - clock.times[0]
        decode_steps += len(clock.times) - 1
        surplus = cache.get_seq_length() - shared
        for i, layer in enumerate(layers):
            if i in windows:
                layers[i] = copy.deepcopy(windows[i])
            else:
                layer.crop(-surplus)  # negative in all versions: that many tokens less
    return Branches(new_tokens, prompt_seconds, decode_seconds, decode_steps)


def read(model: Any, tokens: Sequence[int], cache: DynamicCache, **options: Any) -> None:
    """Compute a prompt, all but what `cache` holds of it, without generating from it. options: for `model.generate`."""
    # `generate` rather than a forward pass, because it knows how to call each model; its token is not kept.
    _generate(model, tokens, cache, **options | dict(max_new_tokens=1))


def _generate(model: Any, tokens: Sequence[int], cache: DynamicCache, **options: Any) -> Tensor:
    ids = torch.tensor([tokens], device=model.device)
    inputs: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        generate_cache_name(): cache,
    }
    # A model may ask for a kind of cache of its own, which cannot be cut back; `generate` refuses it beside this one.
    implementation, model.generation_config.cache_implementation = model.generation_config.cache_implementation, None
    try:
        return model.generate(**inputs, **options)
    finally:
        model.generation_config.cache_implementation = implementation
