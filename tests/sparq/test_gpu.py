"""A patched model on a GPU computes what the definition of SparQ Attention says, as it does on the CPU.

Every test runs on both, so that a machine without a GPU can tell whether it is right.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import sparq_kernels
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import Cache

import sparq
from sparq.cache import upgrade
from tests.sparq.slow import Slow
from tests.sparq.tiny import build, generate, next_tokens, prompt, teacher_forced

needs_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
KNOBS = dict(r=4, k=12)
SPARSE = KNOBS | dict(min_length=0)
SIZE = 64


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_a_gpu])])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def kernel_is_there(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu"):
        assert sparq_kernels.backend("cuda") == "triton"


def moved(inputs: dict[str, Tensor], device: str) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def patched(device: str, family: str = "llama", knobs: dict[str, Any] = KNOBS, **changes: Any) -> PreTrainedModel:
    return sparq.patch(build(family, **changes).to(device), **knobs, min_length=0)


def check(device: str, inputs: dict[str, Tensor], family: str = "llama", static: bool = False, steps: int = 12) -> None:
    """Every step's logits are those of the definition, and every step was sparse."""
    tokens = next_tokens(inputs["input_ids"].shape[0], steps)
    expected = teacher_forced(Slow(**KNOBS).install(build(family)), inputs, tokens)
    model = patched(device, family)
    cache = StaticCache(config=model.config, max_cache_len=SIZE) if static else None
    actual = teacher_forced(model, moved(inputs, device), tokens.to(device), cache)
    torch.testing.assert_close(actual.cpu(), expected, rtol=1e-3, atol=1e-3)
    total = sparq.report(model).total
    assert total.sparse_steps and not total.other_sums
    assert family == "gemma2" or total.sparse_steps == 3 * steps


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma2"])
def test_every_step_equals_the_definition(family: str, device: str) -> None:
    check(device, prompt(), family)


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("masked", ["padding", "rows of all lengths", "holes", "padding and a hole"])
def test_masks(masked: str, static: bool, device: str) -> None:
    inputs = prompt(batch=3, padding=0)
    mask = inputs["attention_mask"]
    if masked == "padding":
        mask[1:, :9] = 0
    elif masked == "rows of all lengths":
        mask[1, :7], mask[2, :25] = 0, 0
    else:
        mask[1, 17:22], mask[2, 5] = 0, 0
        if masked == "padding and a hole":
            mask[1, :9], mask[0, :2] = 0, 0
    check(device, inputs, static=static)


def test_generate(device: str) -> None:
    """Dynamic and static caches, greedy: the same tokens as the definition finds."""
    inputs = prompt(length=SIZE)
    expected = generate(Slow(**KNOBS).install(build()), inputs)
    model = patched(device)
    assert generate(model, moved(inputs, device)) == expected
    dynamic = sparq.report(model).total.sparse_steps
    static = dict(cache_implementation="static", disable_compile=True)
    assert generate(model, moved(inputs, device), **static) == expected
    assert sparq.report(model).total.sparse_steps == 2 * dynamic > 0


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("edge", [4096, 8192])
def test_a_cache_grows_across_an_edge(edge: int, static: bool, device: str) -> None:
    """Where the GPU's rows become too long for one program, and for the next larger one. (A static cache has its size
    from the start, and goes on across the edge in what it began with.)"""

    def filled(model: PreTrainedModel, static: bool) -> Cache:
        cache: Cache = DynamicCache(config=model.config)
        if static:
            cache = StaticCache(config=model.config, max_cache_len=edge + 8)
        generator = torch.Generator().manual_seed(3)
        for layer in range(model.config.num_hidden_layers):
            key, value = torch.randn(2, 1, 2, edge - 2, 16, generator=generator).to(model.device)
            cache.update(key, value, layer)
        return cache

    @torch.no_grad()
    def decoded(model: PreTrainedModel, static: bool) -> Tensor:
        cache = filled(model, static)
        tokens = next_tokens(1, 4).to(model.device)
        return torch.cat([model(token, past_key_values=cache).logits[:, -1] for token in tokens.split(1, 1)])

    knobs = dict(r=4, k=64, index="full")
    expected = decoded(Slow(**knobs).install(build(max_position_embeddings=16384)), static=False)
    model = patched(device, knobs=knobs, max_position_embeddings=16384)
    torch.testing.assert_close(decoded(model, static).cpu(), expected, rtol=1e-3, atol=1e-3)
    assert sparq.report(model).total.sparse_steps == 3 * 4


def test_two_models_on_two_streams(device: str) -> None:
    """With knobs of their own, step by step in turns, so that their kernels run side by side."""
    inputs, tokens = prompt(padding=0), next_tokens()
    all_knobs = [dict(r=4, k=12), dict(r=7, k=20, local=3, mean_value=False)]
    expected = [
        teacher_forced(Slow(**knobs).install(build(seed=seed)), inputs, tokens) for seed, knobs in enumerate(all_knobs)
    ]
    models = [patched(device, knobs=knobs, seed=seed) for seed, knobs in enumerate(all_knobs)]
    there, fed = moved(inputs, device), tokens.to(device)

    def steps(model: PreTrainedModel) -> Iterator[Tensor]:
        cache = StaticCache(config=model.config, max_cache_len=SIZE)  # of which no step waits for anything
        upgrade(cache)
        model(there["input_ids"], past_key_values=cache)
        for token in fed.split(1, 1):
            yield model(token, past_key_values=cache).logits[:, -1]

    streams = [Stream(device) for _ in models]
    walks, found = [steps(model) for model in models], [[] for _ in models]
    with torch.no_grad():
        for _ in range(tokens.shape[1]):
            for walk, stream, logits in zip(walks, streams, found, strict=True):
                with stream.current():
                    logits.append(next(walk))
    for model, stream, logits, right in zip(models, streams, found, expected, strict=True):
        stream.wait()
        torch.testing.assert_close(torch.stack(logits, 1).cpu(), right, rtol=1e-3, atol=1e-3)
        assert sparq.report(model).total.sparse_steps == 3 * 12


class Stream:
    """A stream of its own on a GPU, behind what has been queued; on the CPU everything is in order."""

    def __init__(self, device: str) -> None:
        self._stream = torch.cuda.Stream() if device == "cuda" else None
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())

    def current(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def wait(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_where_k_covers_the_context(dtype: torch.dtype, device: str) -> None:
    """One position more than k: the sparse step reads nearly all, and differs from stock's by rounding and by that."""
    inputs, tokens = moved(prompt(), device), next_tokens(steps=4).to(device)
    stock = build().to(device, dtype)
    expected = teacher_forced(stock, inputs, tokens).float()
    model = sparq.patch(build().to(device, dtype), r=16, k=39, min_length=0)
    actual = teacher_forced(model, inputs, tokens).float()
    assert sparq.report(model).total.sparse_steps == 3 * 4
    assert (actual - expected).norm() / expected.norm() < 0.05
