"""Prompts that begin alike, a text with several questions, answered from one cache: what they share is read once."""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, EosTokenCriteria, StoppingCriteria, StoppingCriteriaList, StopStringCriteria
from transformers.cache_utils import DynamicSlidingWindowLayer

from sparq.cache_argument import generate_cache_name
from sparq.held import Held, fill_rows, held_by, is_empty_by_nature
from sparq.timing import DecodeClock


@dataclass(frozen=True)
class Branches:
    """What came of the prompts, and how long it took."""

    new_tokens: list[list[int]]  # of each prompt
    prompt_seconds: float  # the shared beginning, and of each prompt the rest, to its first new token
    decode_seconds: float  # all new tokens but the first of each prompt
    decode_tokens: int

    @property
    def tokens_per_second(self) -> float:
        return self.decode_tokens / self.decode_seconds if self.decode_tokens else float("nan")


def shared_length(prompts: Sequence[Sequence[int]]) -> int:
    """The number of tokens that all prompts begin with, and that leave each of them two more to generate from: one
    alone would be a decode step, and sparse."""
    return max(0, min(common_length(prompts), *(len(prompt) - 2 for prompt in prompts)))


def common_length(sequences: Sequence[Sequence[int]]) -> int:
    """How many tokens all of them begin with."""
    same = 0
    for tokens in zip(*sequences, strict=False):
        if len(set(tokens)) > 1:
            break
        same += 1
    return same


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    on_token: Callable[[int], None] = lambda tokens: None,
    on_prompt: Callable[[int], None] = lambda tokens: None,
    cache: DynamicCache | None = None,
    batch_size: int = 1,
    **options: Any,
) -> Branches:
    """Generate from each prompt as `model.generate` does, one after another on one dynamic cache, or in batches.

    A batch has a cache of its own, into which the shared beginning is copied for each prompt: with the one that is
    copied, `batch_size` + 1 times its K and V are in memory. It is an ordinary batch with padding on the left: instead
    of padding behind what is shared, shorter prompts read the last tokens of that again.

    Args:
        model: patched or not. The shared beginning is one forward pass, the rest of each batch another, dense both.
        prompts: token ids, each at least one.
        on_token: called after each step with the number of new tokens, one for each prompt of the batch.
        on_prompt: called before the shared beginning is read, and before the rest of each batch, with its length, that
            of all its prompts together.
        cache: holds tokens that all prompts begin with and go on from, and are not read again. It is given back with
            the shared beginning, and nothing else, in it. None: a new one.
        batch_size: how many prompts at a time.
        options: for `model.generate`, which must give one answer to a prompt, and no beams.

    Raises:
        ValueError: `cache` holds more than `shared_length`, or what batches cannot be made of (`check_cache`).
    """
    cache = DynamicCache(config=model.config) if cache is None else cache
    held, shared = cache.get_seq_length(), shared_length(prompts)
    if held > shared:
        raise ValueError(f"cache must hold what all prompts begin with, {shared} tokens at most, got {held}")
    if len(prompts) > 1:
        check_cache(cache, batch_size)
    if len(prompts) == 1 or shared - held == 1:
        shared = held  # the one prompt is read as a whole, and a token by itself would be a decode step
    batches = [prompts[begin : begin + batch_size] for begin in range(0, len(prompts), batch_size)]
    new_tokens, prompt_seconds, decode_seconds, decode_tokens = [], 0.0, 0.0, 0
    history: dict[int, Held] = {}
    if shared > held:
        on_prompt(shared - held)
        begin = time.perf_counter()
        padding = max(len(max(batch, key=len)) - len(min(batch, key=len)) for batch in batches)
        history = _read_with_history(model, prompts[0][:shared], cache, padding, options)
        prompt_seconds = time.perf_counter() - begin
    # A window forgets what it has slid past, so that it cannot be cut back; but it is small enough to be kept.
    windows = {i: copy.deepcopy(cache.layers[i]) for i, sliding in enumerate(cache.is_sliding) if sliding}
    for batch in batches:
        clock = DecodeClock(functools.partial(_tell, on_token, len(batch)))
        on_prompt(sum(map(len, batch)) - len(batch) * shared)
        begin = time.perf_counter()
        used = cache if len(batch) == 1 else _side_by_side(model, cache, batch, shared, history)
        rows = _answers(model, batch, used, clock, options)
        new_tokens += rows
        prompt_seconds += clock.times[0] - begin
        decode_seconds += clock.times[-1] - clock.times[0]
        decode_tokens += sum(len(row) - 1 for row in rows)
        if used is cache:
            _cut_back(cache, shared, windows)
        del used  # before the next batch gets its own
    return Branches(new_tokens, prompt_seconds, decode_seconds, decode_tokens)


def check_cache(cache: DynamicCache, batch_size: int) -> None:
    """Raise a ValueError if prompts cannot be answered from `cache`, or not so many at a time."""
    for i, layer in enumerate(cache.layers):
        if not is_empty_by_nature(layer):
            held = held_by(i, layer)
            if held.length and held.keys.shape[0] != 1:
                raise ValueError(f"cache must hold a batch of one, got {held.keys.shape[0]}")
            if batch_size > 1 and held.first:
                raise ValueError(
                    f"batch_size must be 1 with a cache that was filled before, where a sliding window has forgotten "
                    f"its first tokens (layer {i}), got {batch_size}"
                )


def read(model: Any, tokens: Sequence[int], cache: DynamicCache, **options: Any) -> None:
    """Compute a prompt, all but what `cache` holds of it, without generating from it. options: for `model.generate`."""
    # `generate` rather than a forward pass, because it knows how to call each model; its token is not kept.
    _generate(model, [tokens], cache, **options | dict(max_new_tokens=1))


def _read_with_history(
    model: Any, tokens: Sequence[int], cache: DynamicCache, padding: int, options: dict[str, Any]
) -> dict[int, Held]:
    """`read`; returns what the layers with a sliding window held when they were `padding` tokens wider: a shorter
    prompt of a batch reads so many of the tokens again, and looks back from there."""
    sliding = {i: layer for i, layer in enumerate(cache.layers) if isinstance(layer, DynamicSlidingWindowLayer)}
    for layer in sliding.values():
        layer.sliding_window += padding
    try:
        read(model, tokens, cache, **options)
        history = {i: held_by(i, layer) for i, layer in sliding.items()}
    finally:
        for layer in sliding.values():
            layer.sliding_window -= padding
            if layer.is_initialized and layer.keys is not None and layer.values is not None:
                layer.keys = layer.keys[:, :, -layer.sliding_window + 1 :]
                layer.values = layer.values[:, :, -layer.sliding_window + 1 :]
    return history


def _side_by_side(
    model: Any, cache: DynamicCache, batch: Sequence[Sequence[int]], shared: int, history: dict[int, Held]
) -> DynamicCache:
    """A new cache of `shared` positions for a batch with padding on the left: of each row the tokens that stand there,
    of which `cache` holds the first `shared`, and `history` what its windows have forgotten."""
    rows = DynamicCache(config=model.config)
    if shared:
        longest = max(map(len, batch))
        keep = [max(0, shared - (longest - len(prompt))) for prompt in batch]
        for i, layer in enumerate(rows.layers):
            if not is_empty_by_nature(layer):
                fill_rows(layer, history[i] if i in history else held_by(i, cache.layers[i]), keep, shared)
    return rows


def _generate(model: Any, batch: Sequence[Sequence[int]], cache: DynamicCache, **options: Any) -> Tensor:
    """int64 [B, n]: the prompts, with padding on the left, and the new tokens."""
    longest = max(map(len, batch))
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in batch], device=model.device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in batch], device=model.device)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, generate_cache_name(): cache}
    # A model may ask for a kind of cache of its own, which cannot be cut back; `generate` refuses it beside this one.
    implementation, model.generation_config.cache_implementation = model.generation_config.cache_implementation, None
    try:
        return model.generate(**inputs, **options)
    finally:
        model.generation_config.cache_implementation = implementation


def _answers(
    model: Any, batch: Sequence[Sequence[int]], cache: DynamicCache, clock: DecodeClock, options: dict[str, Any]
) -> list[list[int]]:
    """The new tokens of each prompt."""
    criteria = StoppingCriteriaList(options.get("stopping_criteria") or [])
    ends = None
    if len(batch) > 1:
        ends = _Ends(model, criteria, options)
        criteria, options = StoppingCriteriaList([ends]), options | dict(stop_strings=None)
    options = options | dict(stopping_criteria=StoppingCriteriaList([*criteria, clock]))
    output = _generate(model, batch, cache, **options)
    begin = max(map(len, batch))
    lengths = [output.shape[1]] * len(batch) if ends is None else ends.lengths(output.shape[1])
    return [row[begin:end] for row, end in zip(output.tolist(), lengths, strict=True)]


class _Ends(StoppingCriteria):
    """Notes where each row of a batch ends: `generate` fills it up, with whatever, until all have ended."""

    def __init__(self, model: Any, criteria: StoppingCriteriaList, options: dict[str, Any]) -> None:
        """criteria: those of `options`. Their `stop_strings` are taken over; `generate` must not have them too."""
        end = options.get("eos_token_id")
        end = model.generation_config.eos_token_id if end is None else end
        self._criteria = StoppingCriteriaList(criteria)
        if end is not None:
            self._criteria.append(EosTokenCriteria(end))
        if options.get("stop_strings") is not None:
            self._criteria.append(StopStringCriteria(options["tokenizer"], options["stop_strings"]))
        self._ends: Tensor | None = None  # [B] int64, the row's length with which it ended; 0: not yet

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        has_ended = self._criteria(input_ids, scores, **kwargs)
        before = torch.zeros_like(has_ended, dtype=torch.int64) if self._ends is None else self._ends
        self._ends = torch.where((before == 0) & has_ended, input_ids.shape[1], before)
        return has_ended

    def lengths(self, longest: int) -> list[int]:
        """Of each row; `longest`: of those that have not ended."""
        return [] if self._ends is None else [length or longest for length in self._ends.tolist()]


def _tell(on_token: Callable[[int], None], rows: int, tokens: int) -> None:
    on_token(rows)


def _cut_back(cache: DynamicCache, length: int, windows: dict[int, Any]) -> None:
    """To its first `length` tokens; windows: the layers that cannot be cut, as they were then."""
    surplus = cache.get_seq_length() - length
    layers: list[Any] = cache.layers
    for i, layer in enumerate(layers):
        if i in windows:
            layers[i] = copy.deepcopy(windows[i])
        else:
            layer.crop(-surplus)  # negative in all versions: that many tokens less
