"""What is a prompt, and dense: whatever its length, its cache, and how many of its logits are wanted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel

import sparq
from sparq.attention import sparq_attention
from sparq.cache import SparqLayer
from sparq.config import SparqConfig
from sparq.static_cache import SparqStaticLayer
from sparq.stats import Stats
from sparq.step import Step
from tests.sparq.caches import dynamic, static
from tests.sparq.tiny import attention_module, build, generate, next_tokens, prompt, teacher_forced

SPARSE: dict[str, Any] = dict(r=4, k=12, min_length=0)


def lazy(model: PreTrainedModel) -> Cache:
    return DynamicCache()


@torch.no_grad()
def used_and_reset(model: PreTrainedModel) -> Cache:
    cache = static(model)
    model(**prompt(batch=1, padding=0, seed=7), past_key_values=cache)
    model(next_tokens(1, 1), past_key_values=cache)
    cache.reset()
    return cache


@torch.no_grad()
def used_and_emptied(model: PreTrainedModel) -> Cache:
    cache = dynamic(model)
    model(**prompt(batch=1, padding=0, seed=7), past_key_values=cache)
    cache.crop(-40)
    return cache


def shared(**changes: Any) -> PreTrainedModel:
    """Two layers of their own, and two that read the keys and values of these."""
    layers = dict(num_hidden_layers=4, layer_types=["sliding_attention", "full_attention"] * 2, num_kv_shared_layers=2)
    return build("gemma4", **layers, **changes)


MODELS: dict[str, Callable[..., PreTrainedModel]] = {"llama": build, "gemma4": shared}


CACHES = [(family, make) for family in MODELS for make in (dynamic, lazy, static, used_and_reset)]


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(("family", "make_cache"), [*CACHES, ("llama", used_and_emptied)])
def test_the_last_logits_of_a_prompt(family: str, make_cache: Callable) -> None:
    inputs, stock, model = prompt(batch=1, padding=0), MODELS[family](), sparq.patch(MODELS[family](), **SPARSE)
    for kept in (1, 2, 8, 17, 18, 40):
        given = make_cache(stock), make_cache(model)
        sparq.patch(model, **SPARSE)  # the counters start anew
        logits = [
            one(**inputs, past_key_values=cache, logits_to_keep=kept).logits
            for one, cache in zip((stock, model), given, strict=True)
        ]
        assert logits[0].shape[1] == kept
        torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
        assert sparq.report(model).total.decode_steps == 0
        model(next_tokens(1, 1), past_key_values=given[1])
        assert sparq.report(model).total.sparse_steps == {"llama": 3, "gemma4": 2}[family]


@torch.no_grad()
@pytest.mark.parametrize("make_cache", [dynamic, lazy, static, used_and_reset])
@pytest.mark.parametrize("length", [2, 8, 16])
def test_a_prompt_as_short_as_a_draft(make_cache: Callable, length: int) -> None:
    stock, model = build(), sparq.patch(build(), r=2, k=1, min_length=0)
    cache = make_cache(model)
    sparq.patch(model, r=2, k=1, min_length=0)
    ids = prompt(batch=1, padding=0, length=length)["input_ids"]
    actual = model(ids, past_key_values=cache).logits
    torch.testing.assert_close(actual, stock(ids).logits, rtol=1e-4, atol=1e-4)
    assert sparq.report(model).total.decode_steps == 0


@torch.no_grad()
@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("how", [{}, dict(use_cache=False)], ids=["its own cache", "no cache"])
def test_the_last_logits_without_a_given_cache(family: str, how: dict) -> None:
    stock, model = MODELS[family](), sparq.patch(MODELS[family](), **SPARSE)
    for inputs in (prompt(), prompt(padding=0), {"input_ids": prompt(padding=0)["input_ids"]}):
        for kept in (1, 5):
            expected, actual = (m(**inputs, logits_to_keep=kept, **how).logits for m in (stock, model))
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert sparq.report(model).total.decode_steps == 0


# --- Layers that share keys and values --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_layers_that_share_keys_are_sparse(kind: str) -> None:
    model = sparq.patch(shared(), **SPARSE)
    generate(model, prompt(), cache_implementation=kind)
    report = sparq.report(model)
    assert [report.layers[i].sparse_steps for i in range(4)] == [0, 11, 0, 11]
    assert report.total.dense_steps == {"sliding-window layer": 2 * 11}


def test_layers_that_share_keys_on_either_cache() -> None:
    inputs, tokens = prompt(), next_tokens()
    expected = teacher_forced(sparq.patch(shared(), **SPARSE), inputs, tokens)
    model = sparq.patch(shared(), **SPARSE)
    actual = teacher_forced(model, inputs, tokens, static(model))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert (teacher_forced(shared(), inputs, tokens) - actual).abs().max() > 0.1


def repeating() -> dict[str, Tensor]:
    inputs = prompt(batch=1, padding=0)
    inputs["input_ids"][0, 30:] = inputs["input_ids"][0, :10]
    return inputs


@pytest.mark.parametrize(
    "how",
    [dict(), dict(prompt_lookup_num_tokens=4), dict(cache_implementation="static", max_length=400)],
    ids=["dynamic", "prompt lookup", "static"],
)
def test_generation_with_shared_keys_is_the_stock_models_at_full_budget(how: dict) -> None:
    options = dict(do_sample=False, output_logits=True, return_dict_in_generate=True, pad_token_id=0)
    if "max_length" in how:  # a cache with much more room than is used
        options |= dict(stopping_criteria=[lambda ids, scores: torch.ones(len(ids), dtype=torch.bool)])
    else:
        options |= dict(max_new_tokens=8)
    models = shared(), sparq.patch(shared(), k=10_000, min_length=0)
    expected, actual = (model.generate(**repeating(), **options, **how) for model in models)
    assert torch.equal(actual.sequences, expected.sequences)
    torch.testing.assert_close(actual.logits, expected.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("drafted", [4, 20])
def test_drafts_with_shared_keys_give_the_tokens_of_greedy_decoding(drafted: int) -> None:
    expected = generate(sparq.patch(shared().double(), **SPARSE), repeating(), 24)
    assert expected != generate(shared().double(), repeating(), 24)
    model = sparq.patch(shared().double(), **SPARSE)
    assert generate(model, repeating(), 24, prompt_lookup_num_tokens=drafted) == expected
    assert sparq.report(model).total.dense_steps.keys() == {"sliding-window layer"}


# --- Masks that are not given -----------------------------------------------------------------------------------------


def grouped_module() -> nn.Module:
    module = attention_module()
    module.num_key_value_groups = 2
    return module


def attended(queries: int, keys: int, mask: Tensor | None, step: Step | None = None, **kwargs: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, h, n, 16, generator=generator) for h, n in ((4, queries), (2, keys), (2, keys)))
    module = kwargs.pop("module", None) or grouped_module()
    return sparq_attention("sdpa", module, query, key, value, mask, sparq_step=step, **kwargs)[0]


def by_hand(queries: int, first: int, keys: int) -> Tensor:
    """bool [1, 1, Q, S]: query i is token `first` + i, and sees that and all before it."""
    return torch.tensor([[[[s <= first + i for s in range(keys)] for i in range(queries)]]])


def later_layer(tokens: int) -> Step:
    """A pass with `tokens` new ones of which an attention layer before has seen all."""
    step = Step(None, SparqConfig(min_length=0), Stats())
    step.begin(tokens, tokens)
    step.attention_calls = 1
    return step


@pytest.mark.parametrize("queries", [1, 2, 5, 17, 39])
def test_a_missing_mask_of_the_last_tokens_is_made(queries: int) -> None:
    expected = attended(queries, 40, by_hand(queries, 40 - queries, 40), later_layer(40))
    torch.testing.assert_close(attended(queries, 40, None, later_layer(40)), expected)
    if queries > 1:
        assert (attended(queries, 40, by_hand(queries, 0, 40), later_layer(40)) - expected).abs().max() > 0.1


def test_as_many_queries_as_keys_need_no_mask_made() -> None:
    expected = attended(40, 40, by_hand(40, 0, 40), later_layer(40))
    torch.testing.assert_close(attended(40, 40, None, later_layer(40)), expected)


@pytest.mark.parametrize("by", ["argument", "module"])
def test_attention_that_is_not_causal_is_left_so(by: str) -> None:
    everything = torch.ones(1, 1, 5, 40, dtype=torch.bool)
    expected = attended(5, 40, everything, later_layer(40))
    module = grouped_module()
    if by == "module":
        module.is_causal = False
    given = dict(is_causal=False) if by == "argument" else {}
    torch.testing.assert_close(attended(5, 40, None, later_layer(40), module=module, **given), expected)


def static_step(filled: int, before: int) -> tuple[Step, Tensor, Tensor]:
    """A static cache of 40 positions, `filled` of them, those from `before` on new in this pass; its K and V."""
    layer, cache = SparqStaticLayer(40), DynamicCache()
    cache.layers.append(layer)
    keys = torch.randn(2, 2, filled, 16, generator=torch.Generator().manual_seed(3))
    if before:
        layer.update(keys[:, :, :before], keys[:, :, :before])
    step = Step(cache, SparqConfig(min_length=1000), Stats())
    held = layer.update(keys[:, :, before:], keys[:, :, before:])
    return step, *held


@pytest.mark.parametrize(("filled", "before"), [(20, 0), (20, 15), (20, 1), (21, 20), (40, 0)])
def test_a_missing_mask_on_a_static_cache(filled: int, before: int) -> None:
    """What lies behind the filled positions is not seen."""
    queries, results = filled - before, []
    query = torch.randn(2, 4, queries, 16, generator=torch.Generator().manual_seed(4))
    for mask in (by_hand(queries, before, 40), None):
        step, keys, values = static_step(filled, before)
        module = grouped_module()
        results.append(sparq_attention("sdpa", module, query, keys, values, mask, sparq_step=step)[0])
    torch.testing.assert_close(results[1], results[0])


def test_a_dynamic_cache_with_other_keys_than_queries() -> None:
    """Two to sixteen tokens on a filled cache, dense for want of length, and no mask given."""
    layer, cache = SparqLayer(), DynamicCache()
    cache.layers.append(layer)
    generator = torch.Generator().manual_seed(5)
    keys, query = torch.randn(2, 2, 40, 16, generator=generator), torch.randn(2, 4, 5, 16, generator=generator)
    layer.update(keys[:, :, :35], keys[:, :, :35])
    held = layer.update(keys[:, :, 35:], keys[:, :, 35:])
    results = []
    for mask in (None, by_hand(5, 35, 40)):
        step = Step(cache, SparqConfig(min_length=1000), Stats())
        results.append(sparq_attention("sdpa", grouped_module(), query, *held, mask, sparq_step=step)[0])
        assert step.stats.layers[0].dense_steps == {"shorter than min_length": 1}
    torch.testing.assert_close(*results)
