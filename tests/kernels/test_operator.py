"""The operator as PyTorch sees it: fake implementation, compilation, what it gives, and its example."""

from __future__ import annotations

import doctest

import pytest
import sparq_kernels
import torch
from sparq_kernels import Budget, Cached, Visible, operator

from tests.kernels.cases import Case, call_of, decode_call, make_case

OP = torch.ops.sparq_kernels.decode


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "changes", [{}, {"k_divisor": 3, "return_positions": False}, {"k": 900, "local": 5, "softcap": 3.0, "scale": 0.2}]
)
def test_opcheck(dtype: torch.dtype, changes: dict) -> None:
    case = make_case(2, dtype=dtype, lengths=[300, 20], starts=[0, 3], holes=0.1)
    torch.library.opcheck(OP.default, call_of(case, **changes))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_into_one_graph_with_dynamic_lengths(backend: str) -> None:
    def step(case: Case, cached: int) -> torch.Tensor:
        key, value = case.key[:, :, :cached], case.value[:, :, :cached]
        value_sum = value.float().sum(2)
        cached, visible = Cached(key, case.key_components, value, value_sum), Visible(case.length)
        out = sparq_kernels.decode(case.query, cached, visible, Budget(r=4, k=20, k_divisor=8))
        return out.output * 2 + out.alpha[..., None]

    compiled = torch.compile(step, fullgraph=True, backend=backend, dynamic=True)
    case = make_case(2, cached=300)
    for cached in (300, 290, 257):
        case.length.fill_(cached)
        torch.testing.assert_close(compiled(case, cached), step(case, cached))


def test_fake_shapes() -> None:
    with torch._subclasses.FakeTensorMode() as mode:
        call = call_of(make_case(2, cached=300, dtype=torch.bfloat16), k_divisor=3)
        call = call._make(mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in call)
        output, alpha, positions, lse, read = OP(*call)
        assert output.shape == (2, 4, 1, 16) and output.dtype == torch.bfloat16
        assert alpha.shape == lse.shape == (2, 4, 1) and alpha.dtype == lse.dtype == torch.float32
        assert read.shape == (2, 2, 1) and read.dtype == torch.int32
        assert positions.shape == (2, 2, 1, 100) and positions.dtype == torch.int64
        assert OP(*call._replace(return_positions=False))[2].shape == (2, 2, 1, 0)


def test_positions_only_when_asked_for() -> None:
    case = make_case()
    call = call_of(case, return_positions=False)
    assert decode_call(call).positions is None
    positions = decode_call(call._replace(return_positions=True)).positions
    assert positions is not None and positions.shape == (1, 2, 1, 20)


def test_example_in_the_docstring() -> None:
    assert doctest.testmod(operator).failed == 0
