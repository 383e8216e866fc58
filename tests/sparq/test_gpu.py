"""A patched model on a GPU does what it does on the CPU."""

from __future__ import annotations

import pytest
import torch

import sparq
from tests.sparq.tiny import build, generate, next_tokens, prompt, teacher_forced

if not torch.cuda.is_available():
    pytest.skip("there is no GPU", allow_module_level=True)

SPARSE = dict(r=4, k=12, min_length=0)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma2"])
def test_every_step_equals_the_cpu(family: str) -> None:
    inputs, tokens = prompt(padding=9), next_tokens()
    expected = teacher_forced(sparq.patch(build(family), **SPARSE), inputs, tokens)
    model = sparq.patch(build(family).to("cuda"), **SPARSE)
    actual = teacher_forced(model, {name: x.cuda() for name, x in inputs.items()}, tokens.cuda())
    torch.testing.assert_close(actual.cpu(), expected, rtol=1e-3, atol=1e-3)
    assert sparq.report(model).total.sparse_steps and sparq.report(model).backend == "triton"


def test_generate() -> None:
    inputs = prompt(length=300)
    expected = generate(sparq.patch(build(), **SPARSE), inputs)
    actual = generate(sparq.patch(build().to("cuda"), **SPARSE), {name: x.cuda() for name, x in inputs.items()})
    assert actual == expected
