"""Prompts on one cache give the tokens that each gives on a cache of its own, and what they share is read once."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

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
    beginning = questions[0][:shared]
    assert found.new_tokens == [alone(model, beginning, question) for question in questions]
    assert len({tuple(tokens) for tokens in found.new_tokens}) > 1, "the prompts matter"
    assert found.decode_steps == len(questions) * (OPTIONS["max_new_tokens"] - 1)


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
    found = branches.generate(build(), prompts(50), lambda: seen.append(1), **OPTIONS)
    assert len(seen) == 4 * OPTIONS["max_new_tokens"]
    assert found.prompt_seconds > 0 and found.decode_seconds > 0
    assert found.tokens_per_second == found.decode_steps / found.decode_seconds
    first = branches.generate(build(), prompts(50), **OPTIONS | dict(max_new_tokens=1))
    assert first.decode_steps == 0 and first.tokens_per_second != first.tokens_per_second


def test_a_model_that_asks_for_another_cache_keeps_its_wish() -> None:
    model = build()
    expected = branches.generate(model, prompts(20), **OPTIONS).new_tokens
    model.generation_config.cache_implementation = "static"
    assert branches.generate(model, prompts(20), **OPTIONS).new_tokens == expected
    assert model.generation_config.cache_implementation == "static"


@pytest.mark.parametrize(
    ("rows", "shared"),
    [
        ([[1, 2, 3]], 0),
        ([[1, 2, 3], [1, 2, 4, 5]], 2),
        ([[1, 2, 3], [1, 2, 3]], 2),  # one is left to generate from
        ([[1, 2], [1, 2, 3], [1, 2, 4]], 1),
        ([[1], [1, 2]], 0),
        ([[1, 2], [3, 2]], 0),
    ],
    ids=str,
)
def test_shared_length(rows: list[list[int]], shared: int) -> None:
    assert branches.shared_length(rows) == shared
