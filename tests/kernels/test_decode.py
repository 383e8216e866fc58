"""The CPU kernel against the reference and the equations: dtypes, groups, lengths, masks, budgets and thread splits."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import sparq_kernels
import torch

from tests.kernels.cases import (
    CASES,
    Case,
    check_against_equations,
    check_same,
    make_case,
    run_operator,
    run_reference,
    small_integers,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def kernel_is_there() -> None:
    assert sparq_kernels.backend("cpu") == "cpp"


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_reference(name: str, dtype: torch.dtype) -> None:
    case = make_case(dtype=dtype, **CASES[name])
    result = run_operator(case)
    assert result.output.isfinite().all() and result.alpha.isfinite().all()
    check_same(case, result, run_reference(case))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.get("head_dim", 16) * case["k"] < 2000])
def test_equals_the_equations(name: str) -> None:
    case = make_case(**CASES[name])
    check_against_equations(case, run_operator(case))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_realistic_shape(dtype: torch.dtype) -> None:
    case = make_case(2, 16, 4, 5000, 128, dtype, lengths=[5000, 4100], starts=[0, 77], r=32, k=256)
    result, reference = run_operator(case), run_reference(case)
    overlap = [
        len(set(a.tolist()) & set(b.tolist()) - {-1}) / 256
        for a, b in zip(result.positions.flatten(0, 2), reference.positions.flatten(0, 2), strict=True)
    ]
    assert min(overlap) >= 255 / 256  # scores within rounding of the 256th may change places
    torch.testing.assert_close(result.output, reference.output, rtol=2e-2, atol=2e-3)
    torch.testing.assert_close(result.alpha, reference.alpha, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 8, 1), (3, 8, 4), (2, 32, 32)], ids=str)
def test_any_number_of_threads_gives_the_same_bits(shape: tuple[int, int, int], threads: int) -> None:
    case = make_case(*shape, 2000, 32, holes=0.1, r=8, k=300)
    result = run_operator(case)
    torch.set_num_threads(3)
    again = run_operator(case)
    assert torch.equal(result.output, again.output)
    assert torch.equal(result.alpha, again.alpha)
    assert torch.equal(result.positions, again.positions)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_ties_go_to_the_lower_index(dtype: torch.dtype, seed: int, threads: int) -> None:
    """Few distinct keys far apart in the cache: most scores tie exactly, across blocks and across threads."""
    case = make_case(2, 3, 1, 3000, 4, dtype, seed=seed, draw=small_integers, r=2, k=500, scale=0.25, local=3)
    result = run_operator(case)
    check_same(case, result, run_reference(case))
    for b in range(2):
        assert [s for s in result.positions[b, 0, 0].tolist() if s >= 0] == case.head(b, 0).positions(2, 500, None, 3)


def test_equal_keys_are_taken_in_order(threads: int) -> None:
    """Scores underflow towards the end: equal ones must still be equal."""
    case = make_case(1, 1, 1, 2048, 8, r=4, k=100, local=0)
    pattern = torch.randn(16, 8) * 12
    case.key[0, 0] = pattern.repeat(128, 1)
    sparq_kernels.write_components(case.key_components, case.key, 0)
    positions = run_operator(case).positions.flatten()
    scores = torch.tensor([list(case.head(0, 0).scores(4)[0].values())]).float()[0]
    expected = scores.sort(descending=True, stable=True).indices[:100].sort().values
    assert torch.equal(positions, expected)


def test_zero_query() -> None:
    """Every component and every score ties: the lowest indices, uniform scores, no NaN."""
    case = make_case(cached=300, r=4, k=20, local=2)
    case.query.zero_()
    result = run_operator(case)
    check_same(case, result, run_reference(case))
    assert result.positions[0, 0, 0].tolist() == [*range(18), 298, 299]
    torch.testing.assert_close(result.alpha, torch.full_like(result.alpha, 20 / 300))


def test_one_query_of_the_group_without_the_chosen_components() -> None:
    case = make_case(num_heads=2, num_kv_heads=1, r=2, k=20)
    case.query[:, 0, :, :2], case.query[:, 0, :, 2:] = 100.0, 0.0
    case.query[:, 1, :, :2] = 0.0
    result = run_operator(case)
    assert result.output.isfinite().all()
    check_same(case, result, run_reference(case))


def test_no_valid_position_gives_zeros() -> None:
    case = make_case(batch=2, lengths=[0, 300], r=4, k=20)
    case.value_sum[0] = torch.nan
    result = run_operator(case)
    assert torch.equal(result.output[0], torch.zeros_like(result.output[0]))
    assert torch.equal(result.alpha[0], torch.ones_like(result.alpha[0]))
    assert (result.positions[0] == -1).all() and result.output[1].isfinite().all()


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["key", "value", "query", "value_sum", "key_components"])
def test_poison_stays_in_its_head(where: str, poison: float, threads: int) -> None:
    case = make_case(2, 8, 4, 700, 16, r=4, k=50)
    clean = run_operator(case)
    tensor = getattr(case, where)
    if where == "query":
        tensor[1, 4:6] = poison  # the two queries of KV head 2
    else:
        tensor[1, 2, 0] = poison
    result = run_operator(case)
    others = torch.ones(2, 8, dtype=torch.bool)
    others[1, 4:6] = False
    assert torch.equal(result.output[others], clean.output[others])
    assert torch.equal(result.alpha[others], clean.alpha[others])
    positions = result.positions[1, 2, 0]
    assert ((positions >= 0) & (positions < 700)).all() and (positions.diff() > 0).all()


def test_nan_in_a_key_shows_in_its_head() -> None:
    case = make_case(r=16, k=50)
    case.key[0, 0, 5] = torch.nan
    sparq_kernels.write_components(case.key_components, case.key, 0)
    result = run_operator(case)
    assert result.output[0, :2].isnan().all() and result.output[0, 2:].isfinite().all()
    check_same(case, result, run_reference(case))


def test_huge_logits() -> None:
    """Larger than the fast rounding serves, and all weight on one position."""
    case = make_case(num_heads=2, num_kv_heads=1, r=4, k=3, scale=1e6, local=1)
    result, reference = run_operator(case), run_reference(case)
    assert result.output.isfinite().all()
    torch.testing.assert_close(result.alpha, reference.alpha)
    case.options["scale"] = 1e30
    assert run_operator(case).output.isfinite().all()


def test_strides_do_not_matter() -> None:
    case = make_case(2, 4, 2, 600, 24, holes=0.2, starts=[5, 0], r=8, k=40)
    compact = dataclasses.replace(case, key=case.key.contiguous(), value=case.value.contiguous())

    def spread(x: torch.Tensor) -> torch.Tensor:
        """The same values with no axis contiguous."""
        return x.new_zeros(*x.shape, 3)[..., 1].copy_(x)

    scattered = dataclasses.replace(
        case,
        query=spread(case.query),
        value_sum=spread(case.value_sum),
        length=spread(case.length),
        start=spread(case.start),
        mask=spread(case.mask),
    )
    expected = run_operator(case)
    for other in (compact, scattered):
        for a, b in zip(run_operator(other), expected, strict=True):
            assert torch.equal(a, b)


def test_expanded_batch() -> None:
    """Rows that share storage: a batch stride of 0."""
    case = make_case(1, 4, 2, 400, 16, r=4, k=30)
    shared = dataclasses.replace(
        case,
        query=case.query.expand(3, -1, -1, -1),
        key=case.key.expand(3, -1, -1, -1),
        key_components=case.key_components.expand(3, -1, -1, -1, -1),
        value=case.value.expand(3, -1, -1, -1),
        value_sum=case.value_sum.expand(3, -1, -1),
        length=case.length.expand(3),
    )
    result = run_operator(shared)
    for b in range(3):
        assert torch.equal(result.output[b], run_operator(case).output[0])


def test_neither_inputs_nor_their_storage_are_written() -> None:
    case = make_case(2, 4, 2, 600, 16, holes=0.2, r=4, k=40)
    before = [x.clone() for x in case.tensors if x is not None]
    run_operator(case)
    for old, new in zip(before, (x for x in case.tensors if x is not None), strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=0, equal_nan=True)


def test_scratch_is_reused_across_sizes() -> None:
    """A large call leaves its scratch behind: a smaller one must not see it, nor another dtype or thread count."""
    small = make_case(2, 4, 2, 300, 16, holes=0.3, r=4, k=20)
    expected = run_operator(small)
    for dtype in DTYPES:
        run_operator(make_case(1, 8, 1, 9000, 64, dtype, r=64, k=2000))
        assert torch.equal(run_operator(small).output, expected.output)


def test_float64_takes_the_reference() -> None:
    case = make_case(dtype=torch.float64, r=4, k=20)
    for a, b in zip(run_operator(case), run_reference(case), strict=True):
        assert torch.equal(a, b)


def test_calls_from_two_threads_at_once() -> None:
    from concurrent.futures import ThreadPoolExecutor

    cases = [make_case(2, 8, 4, 1500, 32, seed=seed, r=8, k=100) for seed in range(4)]
    expected = [run_operator(case).output for case in cases]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(5):
            for output, right in zip(pool.map(lambda case: run_operator(case).output, cases), expected, strict=True):
                assert torch.equal(output, right)


def test_reference_agrees_on_what_the_operator_returns() -> None:
    case: Case = make_case(r=4, k=20)
    output, alpha, positions, lse, read = run_reference(case, scale=0.25, return_positions=False)
    assert output.shape == (1, 4, 1, 16) and alpha.shape == lse.shape == (1, 4, 1) and positions.shape == (1, 2, 1, 0)
    assert read.tolist() == [[[20], [20]]] and read.dtype == torch.int32
