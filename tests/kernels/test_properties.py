"""Whatever the shape and the options: the kernel agrees with the equations, and poison stays out."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kernels.cases import (
    Case,
    check_against_equations,
    make_case,
    run_operator,
    run_reference,
    small_integers,
)

PROFILE = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@st.composite
def cases(draw: st.DrawFn, index: str = "full") -> Case:
    batch, num_kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 6))
    head_dim = draw(st.integers(1, 20))
    cached = draw(st.one_of(st.integers(1, 40), st.integers(250, 262), st.integers(500, 600)))
    k = draw(st.integers(1, cached + 10))
    options: dict[str, Any] = {
        "r": draw(st.integers(1, head_dim)),
        "k": k,
        "k_divisor": draw(st.none() | st.integers(1, 20)),
        "local": draw(st.none() | st.integers(0, k)),
        "scale": draw(st.none() | st.floats(0.01, 2.0)),
        "softcap": draw(st.none() | st.floats(0.5, 50.0)),
        "mean_value": draw(st.booleans() | st.floats(0, 1)),
    }
    return make_case(
        batch,
        num_kv_heads * group,
        num_kv_heads,
        cached,
        head_dim,
        draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        query_length=draw(st.sampled_from([1, 1, 2, 3, 16])),
        lengths=draw(st.none() | st.lists(st.integers(0, cached), min_size=batch, max_size=batch)),
        starts=draw(st.none() | st.lists(st.integers(0, cached), min_size=batch, max_size=batch)),
        holes=draw(st.sampled_from([0.0, 0.0, 0.2, 0.9])),
        seed=draw(st.integers(0, 1 << 30)),
        draw=draw(st.sampled_from([torch.randn, small_integers])),
        index=index,
        **options,
    )


@PROFILE
@given(cases())
def test_kernel_equals_the_equations(case: Case) -> None:
    check_against_equations(case, run_operator(case))


@PROFILE
@given(cases())
def test_reference_equals_the_equations(case: Case) -> None:
    check_against_equations(case, run_reference(case))


@PROFILE
@given(cases(), st.randoms(use_true_random=False))
def test_storage_of_invalid_positions_never_matters(case: Case, random: Any) -> None:
    before = run_operator(case)
    invalid = ~case.valid
    for tensor in (case.key, case.value):
        tensor.masked_fill_(invalid[:, None, :, None], random.choice([0.0, 7.0, -torch.inf]))
    after = run_operator(case)
    assert torch.equal(before.output, after.output)
    assert torch.equal(before.alpha, after.alpha)
    assert torch.equal(before.positions, after.positions)


@PROFILE
@given(cases())
def test_rows_of_a_batch_do_not_mix(case: Case) -> None:
    whole = run_operator(case)
    for b in range(case.query.shape[0]):
        rows = [x if x is None else x[b : b + 1] for x in case.tensors]
        alone = run_operator(Case(*rows, options=case.options))
        assert torch.equal(alone.output[0], whole.output[b])
        assert torch.equal(alone.positions[0], whole.positions[b])
