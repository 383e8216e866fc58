"""Several new tokens in one forward pass: drafts that are verified, short turns; each chooses for itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sparq_kernels.arguments import MAX_QUERY_LENGTH
from transformers import DynamicCache, PreTrainedModel

import sparq
from sparq.generating import each_token_decides
from tests.sparq.caches import SIZE, on_either_cache, static
from tests.sparq.tiny import build, generate, next_tokens, prompt, teacher_forced

SPARSE: dict[str, Any] = dict(r=4, k=12, min_length=0)


CODED = dict(r=8, k=60, index="int4", mass=0.8, k_min=10, min_length=0)


def precise(family: str) -> PreTrainedModel:
    """In float64: matrix products round otherwise for several tokens than for one, and in float32 that changes, now and
    then, which of two positions that score almost the same is chosen."""
    return build(family).double()


@torch.no_grad()
def in_chunks(model: PreTrainedModel, inputs: dict[str, torch.Tensor], tokens: torch.Tensor, size: int) -> torch.Tensor:
    """As `teacher_forced`, `size` tokens at a time."""
    mask, cache, logits = inputs["attention_mask"], DynamicCache(), []
    model(**inputs, past_key_values=cache, use_cache=True)
    for chunk in tokens.split(size, dim=1):
        mask = torch.cat([mask, mask.new_ones(chunk.shape)], dim=1)
        logits.append(model(input_ids=chunk, attention_mask=mask, past_key_values=cache).logits)
    return torch.cat(logits, dim=1)


# Not GPT-NeoX: it rotates a quarter of the components, so a token that comes twice has two keys that tie in all others,
# and rounding alone tells them apart.
@pytest.mark.parametrize(("family", "padding"), [("llama", 0), ("llama", 9), ("qwen3", 9), ("gemma2", 0)])
@pytest.mark.parametrize("size", [2, 5, MAX_QUERY_LENGTH])
def test_a_chunk_is_as_good_as_its_tokens_one_by_one(family: str, padding: int, size: int) -> None:
    inputs, tokens = prompt(padding=padding), next_tokens(steps=2 * MAX_QUERY_LENGTH)
    one_by_one, chunked = (sparq.patch(precise(family), **SPARSE) for _ in range(2))
    expected = teacher_forced(one_by_one, inputs, tokens)
    actual = in_chunks(chunked, inputs, tokens, size)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)  # α and Σ V are float32 all the same
    stock = in_chunks(precise(family), inputs, tokens, size)
    assert (stock - expected).abs().mean() > 100 * (actual - expected).abs().mean()
    singly, together = sparq.report(one_by_one).total, sparq.report(chunked).total
    assert together.positions_read == singly.positions_read and together.positions_cached == singly.positions_cached
    if family != "gemma2":  # its sliding-window layers are dense, and read once for a chunk
        assert together.bytes_read == singly.bytes_read and together.bytes_dense < singly.bytes_dense


@pytest.mark.parametrize("tokens_at_once", [MAX_QUERY_LENGTH + 1, 3 * MAX_QUERY_LENGTH])
@pytest.mark.parametrize("padding", [0, 9])
@pytest.mark.parametrize("length, knobs", [(40, SPARSE), (235, CODED)], ids=["components", "codes"])
def test_each_token_decides_as_if_it_came_alone(length: int, knobs: dict, tokens_at_once: int, padding: int) -> None:
    """More of them than are decode steps otherwise; behind the block a pass of so many is dense again. The longer ones
    go on from a group of positions that has no codes yet to one that has."""
    inputs, tokens = prompt(length=length, padding=padding), next_tokens(steps=3 * MAX_QUERY_LENGTH)
    expected = teacher_forced(sparq.patch(precise("llama"), **knobs), inputs, tokens)
    model, cache = sparq.patch(precise("llama"), **knobs), DynamicCache()
    with torch.no_grad():
        model(**inputs, past_key_values=cache, use_cache=True)
        mask = inputs["attention_mask"]
        mask = torch.cat([mask, mask.new_ones(len(mask), tokens_at_once)], dim=1)
        now: dict[str, Any] = dict(input_ids=tokens[:, :tokens_at_once], attention_mask=mask, past_key_values=cache)
        with each_token_decides(cache):
            actual = model(**now).logits
        torch.testing.assert_close(actual, expected[:, :tokens_at_once], rtol=1e-4, atol=1e-5)
        cache.crop(-tokens_at_once)
        dense = model(**now).logits
    assert (dense - actual).abs().mean() > 100 * (actual - expected[:, :tokens_at_once]).abs().mean()


def test_bytes_of_a_chunk() -> None:
    """Dense attention reads the cache once for all tokens of a chunk, SparQ for each."""
    inputs, tokens = prompt(batch=1, padding=0), next_tokens(batch=1, steps=3)
    model = sparq.patch(build(), **SPARSE)
    in_chunks(model, inputs, tokens, 3)
    layer = sparq.report(model).layers[0]
    heads, head_dim, size = 2, 16, 4
    assert layer.bytes_dense == heads * size * 2 * 43 * head_dim
    assert layer.bytes_read == heads * size * ((41 + 42 + 43) * 4 + 3 * 2 * 12 * head_dim + 3 * 4 * head_dim)
    assert (layer.sparse_steps, layer.positions_cached, layer.positions_read) == (1, 41 + 42 + 43, 36)


def test_where_each_token_decides_each_is_counted() -> None:
    """Dense layers, too: as if they had come one by one."""
    inputs, tokens = prompt(padding=9), next_tokens(steps=2 * MAX_QUERY_LENGTH + 1)
    one_by_one, together = (sparq.patch(build(), **SPARSE, dense_layers=1) for _ in range(2))
    teacher_forced(one_by_one, inputs, tokens)
    cache = DynamicCache()
    with torch.no_grad():
        together(**inputs, past_key_values=cache, use_cache=True)
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(tokens)], dim=1)
        with each_token_decides(cache):
            together(input_ids=tokens, attention_mask=mask, past_key_values=cache)
    for index, expected in sparq.report(one_by_one).layers.items():
        actual = sparq.report(together).layers[index]
        for name in ("decode_steps", "sparse_steps", "dense_steps", "positions_cached", "bytes_read", "bytes_dense"):
            assert getattr(actual, name) == getattr(expected, name)


def test_longer_chunks_are_dense() -> None:
    inputs, tokens = prompt(), next_tokens(steps=MAX_QUERY_LENGTH + 1)
    model = sparq.patch(build(), **SPARSE)
    actual = in_chunks(model, inputs, tokens, MAX_QUERY_LENGTH + 1)
    torch.testing.assert_close(actual, in_chunks(build(), inputs, tokens, MAX_QUERY_LENGTH + 1))
    assert sparq.report(model).total.dense_steps == {"more than 16 new tokens at once": 3}


def test_the_kernel_serves_chunks_too() -> None:
    inputs, tokens = prompt(), next_tokens(steps=MAX_QUERY_LENGTH)
    expected = teacher_forced(sparq.patch(build(), **SPARSE), inputs, tokens)
    model = sparq.patch(build(), **SPARSE)
    torch.testing.assert_close(in_chunks(model, inputs, tokens, 4), expected, rtol=1e-4, atol=1e-4)
    assert sparq.report(model).backend == "cpp" and sparq.report(model).total.sparse_steps == 3 * 4


@torch.no_grad()
@on_either_cache
@pytest.mark.parametrize("visible", [True, False])
def test_a_mask_that_is_not_causal_is_dense(make_cache: Callable, visible: bool) -> None:
    """A later token that an earlier one sees, or two drafts side by side, which must not see each other."""
    inputs, model = prompt(batch=1, padding=0), sparq.patch(build(), **SPARSE)
    mask = torch.zeros(1, 1, 2, SIZE if make_cache is static else 42, dtype=torch.bool)
    mask[..., 0, :41] = mask[..., 1, :42] = True
    mask[(0, 0, 0, 41) if visible else (0, 0, 1, 40)] = visible
    outputs = []
    for either in (model, build()):
        cache = make_cache(either)
        either(**inputs, past_key_values=cache)
        outputs.append(either(next_tokens(1, 2), attention_mask=mask, past_key_values=cache).logits)
    torch.testing.assert_close(*outputs)
    assert sparq.report(model).total.dense_steps == {"attention mask that is not causal": 3}


def test_assisted_decoding_with_a_patched_assistant() -> None:
    inputs, model = prompt(batch=1, padding=0), build()
    expected = generate(model, inputs, 24)
    assistant = sparq.patch(build(num_hidden_layers=1), r=2, k=4, min_length=0)
    assert generate(sparq.patch(model, k=1000, min_length=0), inputs, 24, assistant_model=assistant) == expected
    assert sparq.report(assistant).total.sparse_steps > 0


DRAFTS: dict[str, dict[str, Any]] = {
    "prompt lookup": dict(prompt_lookup_num_tokens=4),
    "assistant": dict(assistant_model=None, num_assistant_tokens=5, num_assistant_tokens_schedule="constant"),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
@pytest.mark.parametrize("name", DRAFTS)
def test_assisted_decoding_gives_the_tokens_of_greedy_decoding(family: str, name: str) -> None:
    """The first draft is verified together with the prompt, all others after it; a good many are rejected."""
    inputs = prompt(batch=1, padding=0, length=60)
    inputs["input_ids"][0, 30:] = inputs["input_ids"][0, :30]  # something to look up
    expected = generate(sparq.patch(precise(family), **SPARSE), inputs, 40)
    assert expected != generate(precise(family), inputs, 40)
    options = dict(DRAFTS[name])
    if "assistant_model" in options:
        assistant = precise(family)
        for parameter in assistant.parameters():  # right now and then
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
        assistant.generation_config.num_assistant_tokens = 5
        assistant.generation_config.num_assistant_tokens_schedule = "constant"
        options = dict(assistant_model=assistant)
    model = sparq.patch(precise(family), **SPARSE)
    forward_passes = []
    model.register_forward_hook(lambda *_: forward_passes.append(1))
    assert generate(model, inputs, 40, **options) == expected
    total = sparq.report(model).total
    assert total.sparse_steps and total.bytes_read < total.bytes_dense
    assert len(forward_passes) < 41  # some drafts were accepted


def test_a_prompt_whose_last_logits_are_wanted_without_a_cache_is_dense() -> None:
    inputs = prompt(batch=1, padding=0)
    model, stock = sparq.patch(build(), **SPARSE), build()
    with torch.no_grad():
        actual, expected = (m(**inputs, logits_to_keep=5, use_cache=False).logits for m in (model, stock))
    torch.testing.assert_close(actual, expected)
