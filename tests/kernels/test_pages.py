"""A cache in pages: the same results as one in a row, bit for bit, and pages that depend on what is in them alone."""

from __future__ import annotations

from typing import Any

import pytest
import sparq_kernels
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparq_kernels import BLOCK, Budget, Cached, Visible, append_slots
from sparq_kernels.slots import append_slots_default
from torch import Tensor

from tests.kernels.cases import TOLERANCE, call_of, check_same, decode_call, make_case, reference_call
from tests.kernels.pages import (
    COMBINATIONS,
    PAGED_CASES,
    as_rows,
    check_any_order,
    cloned,
    empty_pages,
    paged,
    same_bytes,
    shared_prefix,
    slot_call,
    summed_by_pages,
    tokens,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def assert_equal(actual: sparq_kernels.DecodeOutput, expected: sparq_kernels.DecodeOutput) -> None:
    assert actual.positions is not None and expected.positions is not None
    k_max = min(actual.positions.shape[-1], expected.positions.shape[-1])  # pages have room for more
    assert (actual.positions[..., k_max:] == -1).all() and (expected.positions[..., k_max:] == -1).all()
    assert torch.equal(actual.positions[..., :k_max], expected.positions[..., :k_max])
    for ours, theirs in zip((*actual[:2], *actual[3:]), (*expected[:2], *expected[3:]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", PAGED_CASES)
@pytest.mark.parametrize(("page", "index"), COMBINATIONS)
def test_a_cache_in_pages_gives_what_one_in_a_row_gives(page: int, index: str, name: str) -> None:
    case = make_case(**PAGED_CASES[name], index=index)
    call = summed_by_pages(call_of(case), page)
    ours, theirs = decode_call(paged(call, page, index)), decode_call(call)
    if call.query.shape[2] == 1:
        assert_equal(ours, theirs)
    else:  # of a row, what later queries see is taken from the sum; of pages, it is never added
        cut = ours._replace(positions=ours.positions[..., : theirs.positions.shape[-1]])  # type: ignore[index]
        check_same(case, cut, theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("page", "index"), [(64, "full"), (256, "int4"), (512, "full"), (512, "int4")])
def test_every_dtype_and_the_reference(page: int, index: str, dtype: torch.dtype) -> None:
    sizes = {"batch": 3, "lengths": [1500, 513, 90], "cached": 1500, "head_dim": 24, "dtype": dtype}
    case = make_case(**sizes, index=index, r=6, k=30, k_divisor=20)
    call = summed_by_pages(call_of(case), page)
    in_pages = paged(call, page, index)
    if dtype != torch.float64:  # which is the reference's, and adds up in another order
        assert_equal(decode_call(in_pages), decode_call(call))
    ours, theirs = reference_call(in_pages), reference_call(call)
    assert torch.equal(ours.positions[..., :75], theirs.positions)  # type: ignore[index]
    torch.testing.assert_close(ours.output, theirs.output, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_any_rows_in_any_pages(data: st.DataObject) -> None:
    page, index = data.draw(st.sampled_from(COMBINATIONS))
    lengths = data.draw(st.lists(st.integers(0, 3 * page // 2 + 300), min_size=1, max_size=3))
    heads, group = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 5))
    mass = data.draw(st.none() | st.floats(0.1, 0.99))
    k = data.draw(st.integers(1, 90))
    options = {
        "r": data.draw(st.integers(1, 8)),
        "k": k,
        "k_divisor": data.draw(st.none() | st.integers(2, 9)),
        "local": data.draw(st.none() | st.integers(0, k)),
        "mass": mass,
        "dense_below": data.draw(st.sampled_from([0, 50, 1000])),
        "softcap": data.draw(st.none() | st.floats(1, 9)),
    }
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    case = make_case(
        len(lengths), heads * group, heads, max(*lengths, 1), 8, dtype, lengths=lengths, index=index, **options
    )
    call = summed_by_pages(call_of(case), page)
    assert_equal(decode_call(paged(call, page, index, data.draw(st.integers(0, 9)))), decode_call(call))


def test_rows_that_share_pages() -> None:
    in_pages, call = shared_prefix(256)
    assert_equal(decode_call(in_pages), decode_call(call))


def test_tokens_of_a_draft_may_be_rows() -> None:
    """Three tokens of one row, each with its own length and the same pages, choose as three queries of it do."""
    case = make_case(query_length=3, cached=700, r=6, k=30, index="int4")
    in_pages = paged(call_of(case), 256, "int4")
    together, result = decode_call(in_pages), decode_call(as_rows(in_pages))
    assert torch.equal(result.positions[:, :, 0], together.positions[0].transpose(0, 1))  # type: ignore[index]
    assert torch.equal(result.output[:, :, 0], together.output[0].transpose(0, 1))


@pytest.mark.parametrize("index", ["full", "int4"])
@pytest.mark.parametrize("mass", [None, 0.5])
def test_dense_below_decides_for_each_query(index: str, mass: float | None) -> None:
    lengths = [700, 299, 300, 0]
    sizes = {"batch": 4, "lengths": lengths, "cached": 700, "index": index}
    case = make_case(**sizes, r=6, k=30, mass=mass)
    mixed = decode_call(call_of(case, dense_below=300))
    dense, sparse = decode_call(call_of(case, k=700, mass=None)), decode_call(call_of(case))
    for row, expected in enumerate((sparse, dense, sparse, dense)):
        assert torch.equal(mixed.output[row], expected.output[row])
        assert torch.equal(mixed.read[row], expected.read[row])
    reference = reference_call(call_of(case, dense_below=300))
    assert torch.equal(reference.read[1], dense.read[1]) and torch.equal(reference.read[3], dense.read[3])
    torch.testing.assert_close(reference.output[1], dense.output[1])


# --- Writing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("page", "index"), COMBINATIONS)
def test_pages_do_not_depend_on_how_tokens_came(page: int, index: str) -> None:
    check_any_order(append_slots, page, index)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("index", ["full", "int4"])
def test_kernel_and_plain_pytorch_write_the_same(index: str, dtype: torch.dtype) -> None:
    new = tokens(900, 3, 40, dtype)
    slots = torch.randperm(1024, generator=torch.Generator().manual_seed(0))[:900]
    slots[::7] = -1
    ours = empty_pages(2, 3, 512, 40, dtype, index)
    if index == "int4":  # what is coded must be there
        append_slots(ours, *tokens(1024, 3, 40, dtype, seed=1), torch.arange(1024))
    theirs = cloned(ours)
    append_slots(ours, *new, slots)
    append_slots_default(slot_call(theirs, *new, slots))
    torch.testing.assert_close(ours.value_sum, theirs.value_sum, rtol=1e-5, atol=1e-5, equal_nan=True)
    same_bytes(ours._replace(value_sum=None), theirs._replace(value_sum=None))


def test_nothing_but_negative_slots_writes_nothing() -> None:
    cached = empty_pages(2, 2, 256, 12, torch.float32, "int4")
    before = cloned(cached)
    append_slots(cached, *tokens(4, 2, 12), torch.tensor([-1, -(2**62), -5, -1]))
    append_slots(cached, *tokens(0, 2, 12), torch.empty(0, dtype=torch.int64))
    same_bytes(cached, before)


@pytest.mark.slow
def test_opcheck_and_compilation() -> None:
    call = slot_call(empty_pages(2, 2, 256, 12, torch.float32, "int4"), *tokens(3, 2, 12), torch.tensor([5, 255, -1]))
    for x in (call.key, call.value, call.value_sum, call.key_ranges):
        x.zero_()  # type: ignore[union-attr]
    torch.library.opcheck(torch.ops.sparq_kernels.append_slots.default, call)
    case = make_case(2, lengths=[700, 90], cached=700, r=6, k=30, index="int4")
    in_pages = paged(call_of(case, dense_below=100), 256, "int4")
    torch.library.opcheck(torch.ops.sparq_kernels.decode.default, in_pages)

    def step(query: Tensor, cached: Cached, length: Tensor) -> Tensor:
        return sparq_kernels.decode(query, cached, Visible(length), Budget(6, 30)).output

    given = (in_pages.query, in_pages.cached, in_pages.length)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    torch.testing.assert_close(compiled(*given), step(*given))


# --- Mistakes ---------------------------------------------------------------------------------------------------------

ZEROS = torch.zeros
DECODE_MISTAKES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"block_table": ZEROS(4, dtype=torch.int32)}, ValueError, r"block_table must be \[B, pages\], got \[4\]"),
    ({"block_table": ZEROS(2, 4, dtype=torch.int32)}, ValueError, r"block_table must be \[1, pages\], got \[2, 4\]"),
    ({"block_table": ZEROS(1, 4, dtype=torch.int64)}, TypeError, "block_table must be int32, got torch.int64"),
    ({"block_table": ZEROS(1, 8, dtype=torch.int32)[:, ::2]}, ValueError, "block_table must be contiguous"),
    ({"block_table": torch.full((1, 4), 9, dtype=torch.int32)}, ValueError, r"block_table must name pages of 0 to 5"),
    ({"block_table": torch.full((1, 4), -1, dtype=torch.int32)}, ValueError, r"got \[-1, -1, -1\] in row 0"),
    ({"key": ZEROS(0, 2, 256, 16)}, ValueError, "key must hold at least one row and one position"),
    ({"length": torch.tensor([1281])}, ValueError, r"length must be 0 to the 1280 cached positions, got \[1281\]"),
    ({"start": torch.tensor([0])}, ValueError, "start must be None with a block_table"),
    ({"mask": torch.ones(1, 1280, dtype=torch.bool)}, ValueError, "mask must be None with a block_table"),
    ({"value_sum": ZEROS(1, 2, 16)}, ValueError, r"value_sum must be \[6, 2, 16\]"),
    ({"dense_below": -1}, ValueError, "dense_below must not be negative, got -1"),
]


@pytest.mark.parametrize(("changes", "error", "message"), DECODE_MISTAKES, ids=lambda x: str(x)[:40])
def test_mistakes_in_a_call_are_named(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    call = paged(call_of(make_case(cached=700, r=6, k=30, index="int4")), 256, "int4")
    with pytest.raises(error, match=message):
        decode_call(call._replace(**changes))


@pytest.mark.parametrize(
    ("page", "index", "message"),
    [
        (32, "full", "pages of 64 to 2048 positions, a power of two, got pages of 32"),
        (96, "full", "pages of 64 to 2048 positions, a power of two, got pages of 96"),
        (2 * BLOCK, "full", "got pages of 4096"),
        (128, "int4", "pages of 256 to 2048 positions with a coded index, a power of two, got pages of 128"),
    ],
)
def test_sizes_of_pages_that_are_not_served(page: int, index: str, message: str) -> None:
    cached = empty_pages(2, 2, page, 12, torch.float32, index)
    with pytest.raises(ValueError, match=message):
        append_slots(cached, *tokens(1, 2, 12), torch.tensor([0]))


SLOT_MISTAKES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"new_key": None}, TypeError, "new_key must be a tensor, got None"),
    ({"key": ZEROS(2, 256, 12)}, ValueError, r"key must be \[P, Hkv, N, d\]"),
    ({"slots": ZEROS(1, 3, dtype=torch.int64)}, ValueError, r"slots must be \[T\], got \[1, 3\]"),
    ({"slots": ZEROS(3, dtype=torch.int32)}, TypeError, "slots must be int64, got torch.int32"),
    (
        {"slots": torch.tensor([0, 1, 512])},
        ValueError,
        r"slots must be below 512, which the pages have, got \[0, 1, 512\]",
    ),
    ({"slots": ZEROS(2, dtype=torch.int64)}, ValueError, r"new_key must be \[2, 2, 12\], got \[3, 2, 12\]"),
    ({"new_value": ZEROS(3, 2, 11)}, ValueError, r"new_value must be \[3, 2, 12\]"),
    ({"new_value": ZEROS(3, 2, 12).half()}, TypeError, "new_value must have key's dtype torch.float32"),
    ({"value_sum": ZEROS(2, 2, 12).half()}, TypeError, "value_sum must be float32"),
    ({"value": ZEROS(1, 2, 256, 12).expand(2, -1, -1, -1)}, ValueError, "value is written, so its elements must not"),
    ({"value_sum": ZEROS(2, 2, 12).requires_grad_()}, RuntimeError, "value_sum is a leaf that requires a gradient"),
    ({"key_ranges": None}, ValueError, r"key_components must be \[2, 2, at least 1, 12, 256\]"),
]


@pytest.mark.parametrize(("changes", "error", "message"), SLOT_MISTAKES, ids=lambda x: str(x)[:40])
def test_mistakes_in_writing_are_named_before_anything_is_written(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    cached = empty_pages(2, 2, 256, 12, torch.float32, "int4")
    before = cloned(cached)
    call = slot_call(cached, *tokens(3, 2, 12), torch.tensor([0, 1, 2]))._replace(**changes)
    pages = Cached(call.key, call.key_components, call.value, call.value_sum, call.key_ranges)
    with pytest.raises(error, match=message):
        append_slots(pages, call.new_key, call.new_value, call.slots)
    same_bytes(cached, before)
