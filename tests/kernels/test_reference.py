"""The reference against the equations, in float64 where the two must agree to rounding."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.cases import Case, check_against_equations, make_case, run_reference

SHAPES = [
    {"r": 4, "k": 12},
    {"batch": 2, "r": 16, "k": 12},
    {"num_heads": 2, "r": 1, "k": 1},
    {"num_heads": 6, "r": 5, "k": 40, "local": 40},
    {"r": 4, "k": 12, "local": 0},
    {"r": 4, "k": 60, "mean_value": False},
    {"r": 4, "k": 20, "mean_value": 0.6},
    {"r": 4, "k": 3, "k_divisor": 5},
    {"r": 4, "k": 12, "softcap": 3.0, "scale": 0.7},
    {"cached": 1, "r": 4, "k": 1},
    {"cached": 60, "r": 4, "k": 500},
    {"batch": 3, "lengths": [60, 17, 0], "r": 4, "k": 20},
    {"batch": 3, "lengths": [60, 50, 40], "starts": [0, 45, 40], "r": 4, "k": 20},
    {"batch": 2, "lengths": [60, 33], "starts": [5, 0], "holes": 0.4, "r": 4, "k": 10, "local": 5},
    {"query_length": 3, "r": 4, "k": 12},
    {"query_length": 4, "batch": 2, "lengths": [60, 33], "starts": [58, 0], "holes": 0.4, "r": 4, "k": 10},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_equals_the_equations(shape: dict, dtype: torch.dtype) -> None:
    case = make_case(**{"cached": 60, "dtype": dtype, **shape})
    result = run_reference(case)
    check_against_equations(case, result)
    if dtype == torch.float64:
        options = [case.options.get(name) for name in ("r", "k", "k_divisor", "local")]
        for b in range(case.query.shape[0]):
            for h in range(case.key.shape[1]):
                for i in range(case.query.shape[2]):
                    chosen = [s for s in result.positions[b, h, i].tolist() if s >= 0]
                    assert chosen == case.head(b, h, i).positions(*options)


def dense(case: Case) -> torch.Tensor:
    key, value = (x.masked_fill(~case.valid[:, None, :, None], 0.0) for x in (case.key, case.value))
    return torch.nn.functional.scaled_dot_product_attention(
        case.query, key, value, attn_mask=case.valid[:, None, None], enable_gqa=True
    )


@pytest.mark.parametrize("r", [1, 16])
def test_every_position_is_dense_attention(r: int) -> None:
    case = make_case(batch=2, dtype=torch.float64, lengths=[300, 190], starts=[3, 0], holes=0.2, r=r, k=300)
    result = run_reference(case)
    assert torch.equal(result.alpha, torch.ones_like(result.alpha))
    torch.testing.assert_close(result.output, dense(case))


def test_all_components_and_few_positions_stays_approximate() -> None:
    case = make_case(dtype=torch.float64, r=16, k=8)
    assert (run_reference(case).output - dense(case)).abs().max() > 1e-3
