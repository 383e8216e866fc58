"""Prompts on one cache give the tokens that each gives on a cache of its own, and what they share is read once."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StoppingCriteria
from transformers.cache_utils import LinearAttentionLayer

import sparq
from sparq import branches
from sparq.cache_argument import generate_cache_name
from tests.sparq.tiny import VOCABULARY, build

# gemma3, gpt_oss: sliding windows of 16 in two of three layers; llama4: chunks of 16
FAMILIES = ["llama", "gpt_neox", "gemma2", "gemma3", "gpt_oss", "llama4"]
OPTIONS = dict(max_new_tokens=8, do_sample=False, pad_token_id=0)


def prompts(shared: int, rests: tuple[int, ...] = (5, 1, 20, 3)) -> list[list[int]]:
    """Prompts of random tokens that have the first `shared` in common, no more."""
    generator = torch.Generator().manual_seed(3)

    def tokens(count: int) -> list[int]:
        return torch.randint(10, VOCABULARY, (count,), generator=generator).tolist()

    beginning = tokens(shared)
    return [[*beginning, 3 + i, *tokens(rest - 1)] for i, rest in enumerate(rests)]


def alone(model: PreTrainedModel, shared: list[int], prompt: list[int]) -> list[int]:
    """The new tokens on a cache of its own, which has read what is shared before."""
    cache = DynamicCache(config=model.config)
    new = []
    for tokens, count in ((shared, 1), (prompt, OPTIONS["max_new_tokens"])):
        if tokens:
            ids = torch.tensor([tokens])
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), generate_cache_name(): cache}
            new = model.generate(**inputs, **OPTIONS | dict(max_new_tokens=count))[0, len(tokens) :].tolist()
    return new


@pytest.mark.slow
@pytest.mark.parametrize("shared", [0, 12, 50], ids=lambda shared: f"{shared} shared")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sparse", [False, True], ids=["stock", "SparQ"])
def test_the_tokens_are_those_of_caches_of_their_own(family: str, shared: int, sparse: bool) -> None:
    """Shorter than a window, and longer; the third rest is a prompt of its own, too long for decode steps."""
    model = build(family)
    if sparse:
        sparq.patch(model, r=4, k=10, min_length=0)
    questions = prompts(shared)
    found = branches.generate(model, questions, **OPTIONS)
    beginning = questions[0][: branches.shared_length(questions)]
    assert found.new_tokens == [alone(model, beginning, question) for question in questions]
    assert len({tuple(tokens) for tokens in found.new_tokens}) > 1, "the prompts matter"
    assert found.decode_tokens == len(questions) * (OPTIONS["max_new_tokens"] - 1)


def test_what_is_shared_is_read_once() -> None:
    model = build()
    lengths = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    branches.generate(model, prompts(50, rests=(5, 2)), **OPTIONS)
    assert lengths == [50, 5, *[1] * 7, 2, *[1] * 7]


def test_one_prompt_is_one_prompt() -> None:
    """Nothing of it is made a decode step."""
    model = sparq.patch(build(), r=4, k=10, min_length=0)
    (prompt,) = prompts(50, rests=(5,))
    found = branches.generate(model, [prompt], **OPTIONS)
    assert sparq.report(model).layers[0].decode_steps == 7
    assert found.new_tokens == [alone(model, [], prompt)]


def test_tokens_and_time_are_counted() -> None:
    seen = []
    found = branches.generate(build(), prompts(50), seen.append, **OPTIONS)
    assert seen == [1] * 4 * OPTIONS["max_new_tokens"]
    assert found.prompt_seconds > 0 and found.decode_seconds > 0
    assert found.tokens_per_second == found.decode_tokens / found.decode_seconds
    first = branches.generate(build(), prompts(50), **OPTIONS | dict(max_new_tokens=1))
    assert first.decode_tokens == 0 and first.tokens_per_second != first.tokens_per_second


def test_a_model_that_asks_for_another_cache_keeps_its_wish() -> None:
    model = build()
    expected = branches.generate(model, prompts(20), **OPTIONS).new_tokens
    model.generation_config.cache_implementation = "static"
    assert branches.generate(model, prompts(20), **OPTIONS).new_tokens == expected
    assert model.generation_config.cache_implementation == "static"


@pytest.mark.parametrize(
    ("rows", "shared"),
    [
        ([[1, 2, 3]], 1),
        ([[1, 2, 3, 6], [1, 2, 4, 5]], 2),
        ([[1, 2, 3], [1, 2, 3]], 1),  # two are left to generate from
        ([[1, 2], [1, 2, 3], [1, 2, 4]], 0),
        ([[1], [1, 2]], 0),
        ([[1, 2], [3, 2]], 0),
    ],
    ids=str,
)
def test_shared_length(rows: list[list[int]], shared: int) -> None:
    assert branches.shared_length(rows) == shared


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [2, 3, 9], ids=lambda size: f"{size} at a time")
@pytest.mark.parametrize("shared", [0, 12, 50], ids=lambda shared: f"{shared} shared")
@pytest.mark.parametrize("family", [*FAMILIES, "gemma4", "qwen2_vl"])
@pytest.mark.parametrize("sparse", [False, True], ids=["stock", "SparQ"])
def test_batches_give_the_tokens_of_one_at_a_time(family: str, shared: int, batch_size: int, sparse: bool) -> None:
    """Of rests of different lengths, whose difference may be longer than a window of 16, and than what is shared."""
    model = build(family)
    if sparse:
        sparq.patch(model, r=4, k=10, min_length=0)
    questions = prompts(shared)
    expected = branches.generate(model, questions, **OPTIONS)
    if sparse:
        alone = sparq.report(model).total
        sparq.patch(model, r=4, k=10, min_length=0)
    found = branches.generate(model, questions, batch_size=batch_size, **OPTIONS)
    assert found.new_tokens == expected.new_tokens and found.decode_tokens == expected.decode_tokens
    if sparse and shared == 50:  # the same positions, in fewer steps
        total = sparq.report(model).total
        assert 0 < total.sparse_steps < alone.sparse_steps
        assert (total.positions_read, total.positions_cached) == (alone.positions_read, alone.positions_cached)


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(
    family=st.sampled_from(["llama", "gemma3", "llama4"]),
    shared=st.integers(0, 40),
    rests=st.lists(st.integers(1, 24), min_size=1, max_size=5),
    batch_size=st.integers(1, 6),
    held=st.floats(0, 1),
)
def test_whatever_is_shared_and_held(family: str, shared: int, rests: list[int], batch_size: int, held: float) -> None:
    """`held`: how much of what is shared a cache holds already; where it has windows, no more than fills them."""
    model = build(family)
    questions = prompts(shared, tuple(rests))
    options = OPTIONS | dict(max_new_tokens=3)
    expected = [branches.generate(model, [question], **options).new_tokens[0] for question in questions]
    common = branches.shared_length(questions)
    tokens = questions[0][: int(held * (common if family == "llama" else min(common, 15)))]
    cache = DynamicCache(config=model.config)
    if tokens:
        branches.read(model, tokens, cache, **options)
    found = branches.generate(model, questions, cache=cache, batch_size=batch_size, **options)
    assert found.new_tokens == expected
    is_forgetful = any(cache.is_sliding) and common > 15
    again = branches.generate(model, questions, cache=cache, batch_size=1 if is_forgetful else batch_size, **options)
    assert again.new_tokens == expected, "the cache is as it should be"


def test_a_batch_is_one_pass_of_ordinary_padding() -> None:
    """Nothing is computed but tokens of the prompts, and each position has the place that it has alone."""
    model = build()
    passes = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append((kwargs["input_ids"], kwargs["position_ids"])), with_kwargs=True
    )
    questions = prompts(50, rests=(5, 2, 4))
    branches.generate(model, questions, batch_size=3, **OPTIONS)
    assert [tuple(ids.shape) for ids, _ in passes] == [(1, 50), (3, 5), *[(3, 1)] * 7]
    ids, positions = passes[1]
    assert ids.tolist() == [question[-5:] for question in questions]
    assert positions.tolist() == [list(range(len(question) - 5, len(question))) for question in questions]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_cache_is_given_back_as_it_was_read(family: str) -> None:
    model = build(family)
    expected, cache = DynamicCache(config=model.config), DynamicCache(config=model.config)
    questions = prompts(50)
    shared = branches.shared_length(questions)
    branches.read(model, questions[0][:shared], expected, **OPTIONS)
    branches.generate(model, questions, cache=cache, batch_size=3, **OPTIONS)
    for layer, other in zip(cache.layers, expected.layers, strict=True):
        assert layer.get_seq_length() == other.get_seq_length() == shared
        assert getattr(layer, "sliding_window", None) == getattr(other, "sliding_window", None)
        torch.testing.assert_close((layer.keys, layer.values), (other.keys, other.values))


def test_no_more_than_one_batch_is_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model, made = build(), []
    real = branches._side_by_side

    def listening(*args: Any) -> DynamicCache:
        assert not any(cache() for cache in made)
        cache = real(*args)
        made.append(weakref.ref(cache))
        assert [layer.keys.shape[0] for layer in cache.layers] == [2, 2, 2]
        return cache

    monkeypatch.setattr(branches, "_side_by_side", listening)
    branches.generate(model, prompts(50), batch_size=2, **OPTIONS)
    assert len(made) == 2


@pytest.mark.parametrize("batch_size", [1, 4])
def test_each_row_ends_at_its_own_end(batch_size: int) -> None:
    model, questions = build(), prompts(50)
    free = branches.generate(model, questions, **OPTIONS).new_tokens
    end = free[0][2]
    cut = [row[: row.index(end) + 1] if end in row else row for row in free]
    assert len({len(row) for row in cut}) > 1, "they end at different places"
    # Padding that a row might have generated itself.
    for pad in (0, end, free[1][-1]):
        options = OPTIONS | dict(eos_token_id=[end, 2], pad_token_id=pad)
        found = branches.generate(model, questions, batch_size=batch_size, **options)
        assert found.new_tokens == cut and found.decode_tokens == sum(len(row) - 1 for row in cut)
    model.generation_config.eos_token_id = end
    assert branches.generate(model, questions, batch_size=batch_size, **OPTIONS).new_tokens == cut


@pytest.mark.parametrize("batch_size", [1, 4])
def test_own_stopping_criteria_end_a_row(batch_size: int) -> None:
    class Ends(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            return input_ids[:, -1] == end

    model, questions = build(), prompts(50)
    free = branches.generate(model, questions, **OPTIONS).new_tokens
    end = free[0][2]
    found = branches.generate(model, questions, batch_size=batch_size, stopping_criteria=[Ends()], **OPTIONS)
    assert found.new_tokens == [row[: row.index(end) + 1] if end in row else row for row in free]


def test_batches_count_the_tokens_of_all_rows() -> None:
    tokens, read = [], []
    found = branches.generate(build(), prompts(50), tokens.append, read.append, batch_size=3, **OPTIONS)
    assert tokens == [3] * 8 + [1] * 8 and found.decode_tokens == 4 * 7
    assert read == [49, 6 + 2 + 21, 4]


def test_what_a_batch_cannot_be_made_of() -> None:
    model = build("gemma3")
    questions, cache = prompts(50), DynamicCache(config=model.config)
    branches.read(model, questions[0][:30], cache, **OPTIONS)
    with pytest.raises(ValueError, match="batch_size must be 1 with a cache that was filled before, where a sliding"):
        branches.generate(model, questions, cache=cache, batch_size=2, **OPTIONS)
    assert cache.get_seq_length() == 30
    with pytest.raises(ValueError, match="cache must hold what all prompts begin with, 10 tokens at most, got 30"):
        branches.generate(model, [questions[0], [*questions[0][:10], 5, 5]], cache=cache, **OPTIONS)
    cache = DynamicCache(config=model.config)
    cache.layers[1] = LinearAttentionLayer()
    with pytest.raises(ValueError, match="cache must have dynamic or static layers, layer 1 is a LinearAttentionLayer"):
        branches.generate(model, questions, cache=cache, **OPTIONS)


def test_no_token_of_the_beginning_is_a_decode_step() -> None:
    """One that is shared beyond what the cache holds is read with each of the rests."""
    model = sparq.patch(build(), r=4, k=10, min_length=0)
    questions, cache, read = prompts(50, rests=(5, 2)), DynamicCache(config=model.config), []
    branches.read(model, questions[0][:49], cache, **OPTIONS)
    branches.generate(model, questions, on_prompt=read.append, cache=cache, **OPTIONS)
    assert read == [6, 3] and cache.get_seq_length() == 49
    assert sparq.report(model).layers[0].decode_steps == 2 * 7
