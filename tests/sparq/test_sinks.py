"""Attention sinks in a sparse step, against the softmax that has one position more."""

from __future__ import annotations

import pytest
import torch

import sparq
from sparq.sinks import attenuate
from tests.sparq.slow import Slow
from tests.sparq.tiny import build, next_tokens, prompt, teacher_forced

INPUTS, TOKENS = prompt(), next_tokens(steps=4)


def gpt_oss(sink: float | None = None):
    """With sinks of 0.2 and less, as at random; or of `sink` and a little more for each head."""
    model = build("gpt_oss")
    if sink is not None:
        for layer in model.model.layers:
            layer.self_attn.sinks.data = sink + 0.5 * torch.arange(4.0)
    return model


@pytest.mark.parametrize("knobs", [dict(r=4, k=12), dict(r=3, k=9, mean_value=False)], ids=str)
@pytest.mark.parametrize("sink", [None, 3.0, -1e4])
def test_every_step_equals_the_definition(sink: float | None, knobs: dict) -> None:
    expected = teacher_forced(Slow(**knobs).install(gpt_oss(sink)), INPUTS, TOKENS)
    model = sparq.patch(gpt_oss(sink), min_length=0, **knobs)
    actual = teacher_forced(model, INPUTS, TOKENS)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert [sparq.report(model).layers[i].sparse_steps for i in range(3)] == [0, 4, 0]


def test_the_sinks_of_the_sparse_layer_count() -> None:
    actual = []
    for sink in (-10.0, 3.0):
        model = gpt_oss()
        model.model.layers[1].self_attn.sinks.data.fill_(sink)
        actual.append(teacher_forced(sparq.patch(model, r=4, k=12, min_length=0), INPUTS, TOKENS))
    assert (actual[0] - actual[1]).abs().mean() > 0.01


@pytest.mark.parametrize("sink", [None, 3.0])
def test_a_row_that_k_covers_is_the_stock_model(sink: float | None) -> None:
    """The padded row has 32 to 35 positions, the other up to 44: with k = 36 it shares the sparse step."""
    stock = teacher_forced(gpt_oss(sink), INPUTS, TOKENS)
    model = sparq.patch(gpt_oss(sink), r=4, k=36, min_length=0)
    actual = teacher_forced(model, INPUTS, TOKENS)
    assert sparq.report(model).layers[1].sparse_steps == 4
    torch.testing.assert_close(actual[1], stock[1], rtol=1e-4, atol=1e-4)
    assert (actual[0] - stock[0]).abs().max() > 1e-3


def test_equals_a_softmax_with_one_position_more() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, sinks = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((2, 4, 1, 9), (4,)))
    values = torch.randn(2, 4, 9, 8, generator=generator, dtype=torch.float64)
    without = logits.softmax(-1) @ values
    wider = torch.cat([logits, sinks[:, None, None].expand(2, -1, 1, 1)], dim=-1).softmax(-1)
    actual = attenuate(without, torch.ones(2, 4, 1), logits.logsumexp(-1), sinks)
    torch.testing.assert_close(actual, wider[..., :9] @ values)


@pytest.mark.parametrize("alpha", [0.0, 1e-45, 1.0])
@pytest.mark.parametrize("lse", [-torch.inf, -1e4, 0.0, 1e4])
@pytest.mark.parametrize("sink", [-1e4, 0.0, 1e4])
def test_never_nan(alpha: float, lse: float, sink: float) -> None:
    one = torch.ones(1, 1, 1)
    actual = attenuate(one[..., None], alpha * one, lse * one, torch.tensor([sink])).item()
    assert 0 <= actual <= 1
    if lse - sink < -1000:
        assert actual == 0
    if lse - sink > 1000 or (alpha == 0 and lse == sink == 0):
        assert actual == 1


def test_keeps_the_dtype_of_the_model() -> None:
    model = sparq.patch(gpt_oss().to(torch.bfloat16), r=4, k=12, min_length=0)
    actual = teacher_forced(model, INPUTS, TOKENS)
    assert actual.dtype == torch.bfloat16 and actual.isfinite().all()
    assert sparq.report(model).layers[1].sparse_steps == 4
