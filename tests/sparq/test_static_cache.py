"""What is true of static caches alone: tensors that stay where they are, sizes that are given, lengths that the device
knows."""

from __future__ import annotations

import copy

import pytest
import torch
from sparq_kernels import BLOCK
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import StaticLayer

import sparq
from sparq.cache import upgrade
from sparq.static_cache import SparqStaticLayer
from tests.sparq.caches import SIZE, filled, index, states, static
from tests.sparq.tiny import build, generate, next_tokens, prompt, teacher_forced

SPARSE = dict(r=4, k=12, min_length=0)
needs_crop = pytest.mark.skipif(not hasattr(StaticLayer, "crop"), reason="this transformers cannot crop a static layer")


@torch.no_grad()
@needs_crop
def test_cropped_to_nothing_it_begins_with_a_prompt_again() -> None:
    model = sparq.patch(build(), r=2, k=1, min_length=0)
    cache, ids = static(model), prompt(batch=1, padding=0, length=10)["input_ids"]
    model(**prompt(batch=1, padding=0), past_key_values=cache)
    cache.crop(-40)
    torch.testing.assert_close(model(ids, past_key_values=cache).logits, build()(ids).logits, rtol=1e-4, atol=1e-4)
    assert sparq.report(model).total.decode_steps == 0


def test_memory() -> None:
    layer = SparqStaticLayer(SIZE)
    assert layer.allocated_bytes == 0 and layer.get_seq_length() == 0
    layer.update(*states(3))
    heads, head_dim = layer.keys.shape[1], layer.keys.shape[3]
    rows, components = 2 * SIZE * head_dim * 4, BLOCK * head_dim * 4
    assert layer.allocated_bytes == 2 * heads * (rows + components + head_dim * 4) + 2 * SIZE
    assert not layer._index.components.blocks.any()  # what was never written is no NaN


def test_a_full_cache_says_so() -> None:
    layer = filled(SIZE, cls=SparqStaticLayer, size=SIZE)
    index(layer)
    with pytest.raises((ValueError, IndexError, RuntimeError), match=r"position|range|bounds"):
        layer.update(*states(1))


@pytest.mark.parametrize("is_filled", [False, True], ids=["early initialised", "filled"])
def test_upgrade_takes_over_the_tensors(is_filled: bool) -> None:
    model = build()
    cache = static(model)
    cache.early_initialization(2, 2, 16, torch.float32, torch.device("cpu"))
    if is_filled:
        teacher_forced(model, prompt(), next_tokens(steps=1), cache)
    plain = list(cache.layers)
    upgrade(cache)
    for layer, other in zip(cache.layers, plain, strict=True):
        assert type(layer) is SparqStaticLayer and layer.keys is other.keys and layer.values is other.values
        assert layer.cumulative_length is other.cumulative_length and layer.is_filled == is_filled
        assert (layer.device, layer.max_cache_len) == (other.device, SIZE)
        assert layer.has_index and vars(other).keys() <= vars(layer).keys()


# Models


PROMPTS = {"padded": prompt(), "unpadded": prompt(padding=0), "one row": prompt(batch=1), "one token": prompt(2, 1, 0)}


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "phi3", "gemma2", "gemma3"])
def test_generate_gives_the_same_tokens(family: str) -> None:
    model = build(family)
    for inputs in PROMPTS.values():
        sparq.patch(model, **SPARSE)
        expected, dynamic = generate(model, inputs), sparq.report(model).total
        sparq.patch(model, **SPARSE)
        for _ in range(2):
            assert generate(model, inputs, cache_implementation="static") == expected
        total = sparq.report(model).total
        if inputs is not PROMPTS["one token"]:  # k covers its first steps, which a static cache does not know
            assert total.sparse_steps == 2 * dynamic.sparse_steps > 0
        assert total.decode_steps == 2 * dynamic.decode_steps
        sparq.unpatch(model)


def test_a_cache_that_is_reset_and_used_again() -> None:
    tokens, model = next_tokens(), sparq.patch(build(), **SPARSE)
    cache = static(model)
    for padding, length in ((9, 40), (20, 30), (0, 50), (9, 40)):
        inputs = prompt(length=length, padding=padding, seed=padding)
        expected = teacher_forced(model, inputs, tokens, static(model))
        sparq.patch(model, **SPARSE)
        assert torch.equal(teacher_forced(model, inputs, tokens, cache), expected)
        assert sparq.report(model).total.dense_steps == {}  # the prompt of a cache that was reset is a prompt
        cache.reset()


def test_several_turns_on_one_cache() -> None:
    model = sparq.patch(build(), **SPARSE)

    def talk(cache) -> list[Tensor]:
        replies, mask = [], torch.ones(1, 0, dtype=torch.int64)
        for turn in range(3):
            ids = prompt(batch=1, length=10 + turn, padding=0, seed=turn)["input_ids"]
            for part in (ids, *next_tokens(1, 3, seed=turn).split(1, dim=1)):
                mask = torch.ones(1, mask.shape[1] + part.shape[1], dtype=torch.int64)
                with torch.no_grad():
                    replies.append(model(part, attention_mask=mask, past_key_values=cache).logits[:, -1])
        return replies

    expected = talk(DynamicCache(config=model.config))
    torch.testing.assert_close(talk(static(model)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens_between", [1, 2])
def test_a_cache_that_an_unpatched_model_goes_on_with(tokens_between: int) -> None:
    """What it writes is not in the index, which the next sparse step makes up for."""

    def run(cache) -> Tensor:
        model, logits = sparq.patch(build(), **SPARSE), []
        inputs, tokens = prompt(batch=1, padding=0), next_tokens(1, 8)
        with torch.no_grad():
            model(**inputs, past_key_values=cache)
            model(tokens[:, :1], past_key_values=cache)
            sparq.unpatch(model)
            for step in range(1, 1 + tokens_between):
                model(tokens[:, step : step + 1], past_key_values=cache)
            sparq.patch(model, **SPARSE)
            for step in range(1 + tokens_between, 8):
                logits.append(model(tokens[:, step : step + 1], past_key_values=cache).logits)
        return torch.cat(logits)

    model = build()
    torch.testing.assert_close(run(static(model)), run(DynamicCache(config=model.config)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("min_length, sparse", [(0, 5), (SIZE, 5), (SIZE + 1, 0)])
def test_min_length_is_compared_with_the_size(min_length: int, sparse: int) -> None:
    """A dense step reads all of a static cache, filled or not."""
    model = sparq.patch(build(), r=4, k=12, min_length=min_length)
    teacher_forced(model, prompt(), next_tokens(steps=5), static(model))
    layer = sparq.report(model).layers[0]
    assert layer.sparse_steps == sparse
    assert layer.dense_steps == ({} if sparse else {"shorter than min_length": 5})


@pytest.mark.parametrize("k, sparse", [(SIZE, 0), (SIZE - 1, 5)])
def test_k_that_covers_everything_is_the_stock_model(k: int, sparse: int) -> None:
    inputs, tokens, model = prompt(), next_tokens(steps=5), build()
    expected = teacher_forced(model, inputs, tokens, static(model))
    sparq.patch(model, k=k, min_length=0)
    actual = teacher_forced(model, inputs, tokens, static(model))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    layer = sparq.report(model).layers[0]
    assert (layer.sparse_steps, layer.mean_alpha) == ((sparse, 1.0) if sparse else (0, None))
    assert layer.dense_steps == ({} if sparse else {"k covers the context": 5})


def test_early_initialisation() -> None:
    inputs, tokens, model = prompt(), next_tokens(), sparq.patch(build(), **SPARSE)
    expected = teacher_forced(model, inputs, tokens, static(model))
    sparq.patch(model, **SPARSE)
    cache = static(model)
    cache.early_initialization(2, 2, 16, torch.float32, torch.device("cpu"))
    assert torch.equal(teacher_forced(model, inputs, tokens, cache), expected)
    assert sparq.report(model).total.dense_steps == {}


def test_inference_mode_may_be_left_between_calls() -> None:
    """The cache is of the mode that it was made in, as stock; the counters outlive it."""
    inputs, model = prompt(), sparq.patch(build(), **SPARSE)
    with torch.inference_mode():
        expected = generate(model, inputs, cache_implementation="static")
    assert generate(model, inputs, cache_implementation="static") == expected
    assert sparq.report(model).total.sparse_steps == 2 * 3 * 11


def test_initialised_early_and_first_used_in_inference_mode() -> None:
    model, tokens = sparq.patch(build(), **SPARSE), next_tokens(1, 2)
    cache = static(model)
    cache.early_initialization(1, 2, 16, torch.float32, torch.device("cpu"))
    with torch.inference_mode():
        model(**prompt(batch=1, padding=0), past_key_values=cache)
    with torch.no_grad():
        actual = [model(tokens[:, i : i + 1], past_key_values=cache).logits[:, -1] for i in range(2)]
    expected = teacher_forced(model, prompt(batch=1, padding=0), tokens, static(model))
    torch.testing.assert_close(torch.stack(actual, 1), expected)


@torch.inference_mode()
def test_a_cache_that_stock_has_filled_in_inference_mode_is_followed() -> None:
    """Of the tensors that it was given PyTorch counts no writes."""
    stock, token = build(), next_tokens(1, 1)
    cache = static(stock)
    stock(**prompt(batch=1, padding=0), past_key_values=cache)
    model = sparq.patch(stock, **SPARSE)
    model(token, past_key_values=cache)
    for layer in cache.layers:
        layer.keys[:, :, 3:20] = layer.keys[:, :, 4:21].clone()
    fresh = copy.deepcopy(cache)
    for layer in fresh.layers:
        layer._drop_index()
    torch.testing.assert_close(model(token, past_key_values=cache).logits, model(token, past_key_values=fresh).logits)


@torch.no_grad()
def test_reset_after_a_batch_of_another_size_was_assigned() -> None:
    model = sparq.patch(build(), **SPARSE)
    cache = static(model)
    expected = teacher_forced(model, prompt(), next_tokens(), cache)
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:1].clone(), layer.values[:1].clone()
    cache.reset()
    one = {name: tensor[:1] for name, tensor in prompt().items()}
    actual = teacher_forced(model, one, next_tokens()[:1], cache)
    torch.testing.assert_close(actual, expected[:1], rtol=1e-4, atol=1e-4)
