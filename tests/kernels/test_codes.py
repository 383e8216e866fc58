"""The four-bit index: how keys are coded, and that a step with it is right on every path."""

from __future__ import annotations

import math

import pytest
import sparq_kernels
import torch
from hypothesis import given
from hypothesis import strategies as st
from sparq_kernels import BLOCK, GROUP, Cached
from sparq_kernels.encoding import encode_groups
from sparq_kernels.layout import read_codes

from tests.kernels.cases import (
    CASES,
    Case,
    call_of,
    check_against_equations,
    decode_call,
    index_of,
    make_case,
    new_token,
    run_operator,
    run_reference,
    storage_of,
)
from tests.kernels.test_decode import DTYPES
from tests.kernels.test_properties import PROFILE, cases

SMALL = [name for name, case in CASES.items() if case.get("head_dim", 16) * case["k"] < 8000]


def codes_of(values: list[float], low: float, step: float) -> list[int]:
    """In Python floats: how far each value lies up its range, NaN at its beginning."""
    if step == 0:
        return [0] * len(values)
    return [0 if math.isnan(x) else round(min(max((x - low) / step, 0), 15)) for x in values]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("head_dim", [1, 7, 64, 80])
def test_codes_are_the_nearest_of_sixteen(dtype: torch.dtype, head_dim: int) -> None:
    key = torch.randn(2, 2, 3 * GROUP + 5, head_dim, generator=torch.Generator().manual_seed(0)).to(dtype)
    key[0, 0, :, 0] = 3.0  # no range at all
    key[0, 1, 7] = torch.nan
    key[1, 0, GROUP : GROUP + 9, 0] = torch.inf
    key[1, 1, GROUP : 2 * GROUP, 0] = torch.nan
    codes, ranges = index_of(key, "int4")
    assert ranges is not None and ranges.dtype == dtype and codes.dtype == torch.uint8
    epsilon = torch.finfo(dtype).eps
    for b, h, group, c in (
        (b, h, g, c) for b in range(2) for h in range(2) for g in range(3) for c in {0, head_dim - 1}
    ):
        values = key[b, h, group * GROUP : (group + 1) * GROUP, c].double().tolist()
        finite = [x for x in values if math.isfinite(x)] or [0.0]
        low, step = ranges[b, h, group, c].double().tolist()
        assert low == min(finite)
        assert step == pytest.approx((max(finite) - min(finite)) / 15, rel=epsilon, abs=1e-7)
        run = codes[b, h, group, c].tolist()
        found = [byte & 15 for byte in run] + [byte >> 4 for byte in run]
        for value, code, expected in zip(values, found, codes_of(values, low, step), strict=True):
            halfway = math.isfinite(value) and step and abs((value - low) / step % 1 - 0.5) < 1e-5
            assert code == expected or (halfway and abs(code - expected) == 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_kernel_codes_as_pytorch_does(dtype: torch.dtype) -> None:
    key = torch.randn(2, 3, BLOCK + 3 * GROUP, 72, generator=torch.Generator().manual_seed(0)).to(dtype)
    key[0, 1, 300:513, 2], key[1, 2, 17] = torch.inf, torch.nan
    codes, ranges = index_of(key, "int4")
    expected = codes.clone(), ranges.clone()
    encode_groups(key, *expected, 0, key.shape[2] // GROUP)
    torch.testing.assert_close(ranges, expected[1], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(codes, expected[0])


def test_only_whole_groups_are_coded() -> None:
    key = torch.randn(1, 1, 3 * GROUP, 4)
    codes, ranges = sparq_kernels.allocate_codes(1, 1, 3 * GROUP, 4, key.dtype, "cpu")
    codes.fill_(77)
    ranges.fill_(torch.nan)
    sparq_kernels.encode(Cached(key, codes, key, None, ranges), GROUP + 9, 3 * GROUP - 1)
    untouched = ranges.isnan().all(-1).all(-1)[0, 0].tolist()
    assert untouched == [True, False, True]
    assert (codes[:, :, [0, 2]] == 77).all()


def test_wrong_calls_of_encode() -> None:
    key = torch.randn(1, 2, 300, 4)
    codes, ranges = index_of(key, "int4")
    with pytest.raises(ValueError, match=r"begin and end must be positions of key \(0 to 300\), got 4, 301"):
        sparq_kernels.encode(Cached(key, codes, key, None, ranges), 4, 301)
    with pytest.raises(TypeError, match="key_ranges must be a tensor, got None"):
        sparq_kernels.encode(Cached(key, codes, key, None), 0, 300)
    with pytest.raises(TypeError, match="key_components must be codes"):
        sparq_kernels.encode(Cached(key, codes.float(), key, None, ranges), 0, 300)
    with pytest.raises(ValueError, match=r"key_ranges must be"):
        sparq_kernels.encode(Cached(key, codes, key, None, ranges[:, :1]), 0, 300)
    with pytest.raises(TypeError, match=r"key_ranges must have key's dtype torch\.float32, got torch\.float16"):
        sparq_kernels.encode(Cached(key, codes, key, None, ranges.half()), 0, 300)


def test_tokens_one_by_one_are_coded_like_a_prompt() -> None:
    length = 2 * GROUP + 3
    key = torch.randn(2, 2, length, 8)
    expected = index_of(key, "int4")
    storage = storage_of(2, 2, length, 8, index="int4")
    for s in range(length):
        where = s if s % 2 else torch.tensor([s, s])
        sparq_kernels.append(storage, key[:, :, s : s + 1], key[:, :, s : s + 1], where)
    assert torch.equal(storage.key, key)
    codes, ranges = storage.key_components, storage.key_ranges
    assert ranges is not None and expected[1] is not None
    assert torch.equal(read_codes(codes, ranges, 2), read_codes(*expected, 2))  # type: ignore[arg-type]
    assert ranges[:, :, 2:].isnan().all()  # the last group is not whole


def test_rows_at_positions_of_their_own() -> None:
    storage = storage_of(2, 1, 2 * GROUP, 8, index="int4")
    storage.key.copy_(torch.randn_like(storage.key))
    sparq_kernels.append(storage, *new_token(2, 1, 8), torch.tensor([GROUP - 1, GROUP]))
    assert storage.key_ranges is not None
    assert storage.key_ranges[0, 0, 0].isfinite().all() and storage.key_ranges[1].isnan().all()


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_the_reference_equals_the_equations(name: str, dtype: torch.dtype) -> None:
    case = make_case(dtype=dtype, index="int4", **CASES[name])
    check_against_equations(case, run_reference(case))


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_kernel_equals_the_equations(name: str, dtype: torch.dtype) -> None:
    case = make_case(dtype=dtype, index="int4", **CASES[name])
    result = run_operator(case)
    assert result.output.isfinite().all() and result.alpha.isfinite().all()
    check_against_equations(case, result, is_rounded=True)


@PROFILE
@given(cases(index="int4"))
def test_any_shape(case: Case) -> None:
    check_against_equations(case, run_reference(case))
    check_against_equations(case, run_operator(case), is_rounded=True)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads_gives_the_same_bits(threads: int) -> None:
    before = torch.get_num_threads()
    case = make_case(2, 8, 2, 2600, 64, torch.bfloat16, index="int4", holes=0.1, r=32, k=700, mass=0.9)
    torch.set_num_threads(3)
    expected = run_operator(case)
    torch.set_num_threads(threads)
    result = run_operator(case)
    torch.set_num_threads(before)
    for ours, theirs in zip(result, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_a_draft_is_scored_as_its_tokens_one_by_one() -> None:
    """Across the end of a group: it is whole for the later tokens only."""
    case = make_case(1, 4, 2, GROUP + 3, 16, index="int4", query_length=8, r=8, k=40, mass=0.8)
    whole = run_operator(case)
    value = case.value.masked_fill(~case.valid[:, None, :, None], 0)
    for i in range(8):
        later = 7 - i
        alone = call_of(case)._replace(
            query=case.query[:, :, i : i + 1],
            length=case.length - later,
            value_sum=value[:, :, : case.value.shape[2] - later].double().sum(2).float(),
        )
        result = decode_call(alone)
        assert torch.equal(result.positions[:, :, 0], whole.positions[:, :, i])
        torch.testing.assert_close(result.output[:, :, 0], whole.output[:, :, i], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_padding_does_not_spoil_its_group(poison: float) -> None:
    case = make_case(1, 4, 2, 600, 16, index="int4", starts=[100], r=8, k=40)
    clean = run_operator(case)
    key = case.key.clone()
    key[:, :, :100] = poison
    codes, ranges = index_of(key, "int4")
    result = run_operator(Case(**{**vars(case), "key": key, "key_components": codes, "key_ranges": ranges}))
    for ours, theirs in zip(result, clean, strict=True):
        assert torch.equal(ours, theirs)


def test_more_mass_reads_more() -> None:
    case = make_case(1, 4, 2, 2000, 32, index="int4", r=32, k=2000, local=16)
    read = [
        run_operator(Case(**{**vars(case), "options": {**case.options, "mass": mass}})).read
        for mass in (0.5, 0.9, 0.99)
    ]
    assert (read[0] < read[1]).all() and (read[1] < read[2]).all() and (read[2] < 2000).all()


@PROFILE
@given(cases(), st.floats(0.01, 0.999), st.integers(1, 20))
def test_mass_with_components(case: Case, mass: float, k_min: int) -> None:
    case.options |= {"mass": mass, "k_min": min(k_min, case.options["k"])}
    check_against_equations(case, run_operator(case))
    check_against_equations(case, run_reference(case))
