"""Differentiation: dense steps have the stock model's gradients, sparse steps none, and say so."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import sparq_kernels
import torch
from sparq_kernels import Budget, Cached, Visible
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

import sparq
from tests.sparq.caches import dynamic, static
from tests.sparq.tiny import build, next_tokens, prompt

SPARSE: dict[str, Any] = dict(r=4, k=12, min_length=0)
DENSE: dict[str, dict[str, Any]] = {
    "default knobs": {},
    "k covers": dict(k=1000, min_length=0),
    "dense layers": SPARSE | dict(dense_layers=3),
}
NO_GRADIENT = "sparq: sparse decode steps have no gradient"


def loss_of(
    model: PreTrainedModel, cache: Cache, steps: tuple[int, ...] = (1, 1, 3), prompt_grad: bool = True
) -> Tensor:
    """Of a prompt and steps of so many tokens each, all of them recorded."""
    inputs, tokens, loss = prompt(batch=1, padding=0), next_tokens(1, sum(steps)), torch.zeros((), dtype=torch.float64)
    with torch.set_grad_enabled(prompt_grad):
        model(**inputs, past_key_values=cache)
    for step in tokens.split(list(steps), dim=1):
        loss = loss + model(step, past_key_values=cache).logits.log_softmax(-1)[..., 7].sum()
    return loss


def gradients(model: PreTrainedModel) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]


@pytest.mark.parametrize("knobs", DENSE)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_dense_steps_have_the_gradients_of_the_stock_model(family: str, knobs: str) -> None:
    stock, model = build(family).double(), sparq.patch(build(family).double(), **DENSE[knobs])
    losses = [loss_of(one, dynamic(one)) for one in (stock, model)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[1], losses[0])
    for mine, own in zip(gradients(model), gradients(stock), strict=True):
        torch.testing.assert_close(mine, own, rtol=1e-9, atol=1e-11)
    attention = [p.grad for name, p in model.named_parameters() if "self_attn" in name and "norm" not in name]
    assert attention and all(grad is not None and grad.abs().max() > 0 for grad in attention)
    assert sparq.report(model).total.sparse_steps == 0


def test_a_gradient_of_what_goes_in() -> None:
    """Of the embedding of one decoded token, through the cache, into a later token's logits."""
    slopes = []
    for model in (build().double(), sparq.patch(build().double(), k=1000, min_length=0)):
        cache, embedding = dynamic(model), torch.randn(1, 1, 64, dtype=torch.float64, generator=torch.manual_seed(3))
        embedding.requires_grad_()
        with torch.no_grad():
            model(**prompt(batch=1, padding=0), past_key_values=cache)
        model(inputs_embeds=embedding, past_key_values=cache)
        model(next_tokens(1, 1), past_key_values=cache).logits[0, -1, 7].backward()
        slopes.append(embedding.grad)
    assert slopes[0].abs().max() > 1e-3
    torch.testing.assert_close(slopes[1], slopes[0], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("knobs", "sparse"), [(dict(k=1000, min_length=0), 0), (SPARSE, 3 * 4)], ids=["dense", "sparse"]
)
def test_tokens_decoded_under_no_grad_between(knobs: dict[str, Any], sparse: int) -> None:
    """They read what was recorded; a backward pass of the prompt afterwards finds it as it was."""
    inputs, results = prompt(batch=1, padding=0), []
    for model in (build().double(), sparq.patch(build().double(), **knobs)):
        cache = dynamic(model)
        loss = model(**inputs, past_key_values=cache).logits.log_softmax(-1)[..., 7].sum()
        with torch.no_grad():
            for token in next_tokens(1, 4).split(1, dim=1):
                model(token, past_key_values=cache)
        loss.backward()
        results.append(gradients(model))
    assert sparq.report(model).total.sparse_steps == sparse
    for mine, own in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(mine, own, rtol=1e-9, atol=1e-11)


def test_what_was_recorded_is_not_written_again() -> None:
    """Each token makes a tensor anew, as in transformers' own layer."""
    model = sparq.patch(build(), k=1000, min_length=0)
    cache, seen = dynamic(model), []
    model(**prompt(batch=1, padding=0), past_key_values=cache)
    for token in next_tokens(1, 4).split(1, dim=1):
        model(token, past_key_values=cache)
        seen += [(tensor, tensor._version) for layer in cache.layers for tensor in (layer.keys, layer.values)]
    assert all(tensor.requires_grad and tensor._version == version for tensor, version in seen)
    assert len({tensor.data_ptr() for tensor, _ in seen}) == len(seen)


# A static cache is written in place, in the stock model too: a recorded prompt cannot be gone back to.
@pytest.mark.parametrize(("make_cache", "prompt_grad"), [(dynamic, True), (dynamic, False), (static, False)])
def test_sparse_steps_refuse_a_backward_pass(make_cache: Callable, prompt_grad: bool) -> None:
    model = sparq.patch(build().double(), **SPARSE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as autograd's, of an operator without a formula
        warnings.simplefilter("ignore", FutureWarning)  # newer transformers call a cache's argument otherwise
        loss = loss_of(model, make_cache(model), steps=(1,), prompt_grad=prompt_grad)
        with pytest.raises(RuntimeError, match=NO_GRADIENT) as error:
            loss.backward()
    assert "\n" not in str(error.value) and "sparq.unpatch(model)" in str(error.value)
    assert all(p.grad is None for name, p in model.named_parameters() if "layers.0" in name)
    assert sparq.report(model).total.sparse_steps == 3


@pytest.mark.parametrize("steps", [(1, 1, 1), (1, 5), (4, 1)], ids=str)
@pytest.mark.parametrize("make_cache", [dynamic, static])
def test_recording_changes_no_result(make_cache: Callable, steps: tuple[int, ...]) -> None:
    tokens, results = next_tokens(1, sum(steps)), []
    for mode in (torch.no_grad, torch.enable_grad):
        model, logits = sparq.patch(build(), **SPARSE), []
        cache = make_cache(model)
        with torch.no_grad():
            model(**prompt(batch=1, padding=0), past_key_values=cache)
        with mode():
            logits = [model(step, past_key_values=cache).logits for step in tokens.split(list(steps), dim=1)]
        results.append(torch.cat(logits, 1))
        assert sparq.report(model).total.sparse_steps == 3 * len(steps)
    assert not results[0].requires_grad
    torch.testing.assert_close(results[1], results[0])


def test_a_frozen_model_records_nothing() -> None:
    model = sparq.patch(build().requires_grad_(False), **SPARSE)
    cache = dynamic(model)
    model(**prompt(batch=1, padding=0), past_key_values=cache)
    storage = cache.layers[0]._key_storage.data_ptr()
    for token in next_tokens(1, 4).split(1, dim=1):
        assert not model(token, past_key_values=cache).logits.requires_grad
    assert cache.layers[0]._key_storage.data_ptr() == storage


@pytest.mark.parametrize("differentiated", ["query", "key", "value"])
def test_the_operator_refuses_a_backward_pass(differentiated: str) -> None:
    generator = torch.Generator().manual_seed(0)
    given = {
        name: torch.randn(2, heads, length, 16, generator=generator)
        for name, heads, length in (("query", 4, 1), ("key", 2, 40), ("value", 2, 40))
    }
    components = sparq_kernels.allocate_components(2, 2, 40, 16, torch.float32, "cpu")
    sparq_kernels.write_components(components, given["key"], 0)
    value_sum = given["value"].sum(2)

    def decode() -> Any:
        query, key, value = given["query"], given["key"], given["value"]
        cached, visible = Cached(key, components, value, value_sum), Visible(torch.tensor([40, 40]))
        return sparq_kernels.decode(query, cached, visible, Budget(r=4, k=12))

    expected = decode()
    given[differentiated] = given[differentiated].requires_grad_()
    actual = decode()
    assert torch.equal(actual.output, expected.output) and torch.equal(actual.alpha, expected.alpha)
    for result in (actual.output, actual.alpha, actual.lse):
        with warnings.catch_warnings(), pytest.raises(RuntimeError, match=NO_GRADIENT):
            warnings.simplefilter("error")
            result.sum().backward(retain_graph=True)
    with torch.no_grad():
        assert not decode().output.requires_grad


def test_gradients_of_queries_alone() -> None:
    """An adapter on q_proj: the first layer's keys and values are not recorded, but saved by what is."""
    grads = []
    for model in (build(), sparq.patch(build())):
        model.requires_grad_(False)
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.requires_grad_(True)
        cache, loss = DynamicCache(config=model.config), 0.0
        for ids in (prompt(batch=1, padding=0)["input_ids"], *next_tokens(1, 3).T[:, None]):
            loss = loss + model(ids, past_key_values=cache).logits[:, -1].logsumexp(-1).sum()
        loss.backward()
        grads.append([layer.self_attn.q_proj.weight.grad for layer in model.model.layers])
    for ours, stock in zip(*grads, strict=True):
        torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-5)
