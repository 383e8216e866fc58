"""What a mask leaves of each row, against counting it position by position."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparq_kernels import Budget, Visible, count_valid
from sparq_kernels.reference import max_positions

from tests.kernels.cases import call_of, make_case
from tests.kernels.fuzzing import run_decode, with_counts


def counted(valid: list[bool], end: int, k: int, k_divisor: int | None, local: int | None) -> tuple[int, int]:
    """Of one query that sees what is valid before `end`: how many positions, and the first one of its window."""
    seen = [s for s in range(max(end, 0)) if valid[s]]
    budget = max_positions(len(seen), Budget(1, k, k_divisor))
    window = budget // 4 if local is None else min(local, budget)
    return len(seen), seen[len(seen) - window] if window else max(end, 0)


@settings(deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 40),
    st.integers(1, 4),
    st.integers(1, 50),
    st.none() | st.integers(1, 9),
    st.data(),
)
def test_equals_counting_one_by_one(
    batch: int, cached: int, queries: int, k: int, k_divisor: int | None, data: st.DataObject
) -> None:
    def rows(of: st.SearchStrategy[Any]) -> list[Any]:
        return data.draw(st.lists(of, min_size=batch, max_size=batch))

    local = data.draw(st.none() | st.integers(0, k))
    mask = torch.tensor(rows(st.lists(st.booleans(), min_size=cached, max_size=cached)))
    length, start = torch.tensor(rows(st.integers(0, cached))), torch.tensor(rows(st.integers(0, cached)))
    counts = count_valid(Visible(length, start, mask), Budget(1, k, k_divisor, local), queries=queries)
    assert counts.dtype == torch.int32
    valid = mask & (torch.arange(cached) >= start[:, None])
    for b in range(batch):
        for i in range(queries):
            expected = counted(valid[b].tolist(), int(length[b]) - (queries - 1 - i), k, k_divisor, local)
            assert tuple(counts[b, i].tolist()) == expected


def test_opcheck() -> None:
    mask, length = torch.rand(2, 30) < 0.5, torch.tensor([30, 20])
    for start, knobs in ((None, (1, 8, None, None)), (torch.tensor([3, 0]), (2, 8, 4, 1))):
        torch.library.opcheck(torch.ops.sparq_kernels.count_valid.default, (mask, length, start, *knobs))


def test_decode_takes_counts() -> None:
    """Where it counts by itself, as on a CPU, they change nothing."""
    call = call_of(make_case(2, 4, 2, 300, 16, lengths=[300, 211], holes=0.3, r=4, k=20))
    for a, b in zip(run_decode(with_counts(call), True), run_decode(call, True), strict=True):
        assert a is not None and b is not None and torch.equal(a, b)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"mask": torch.ones(2, 3, 4, dtype=torch.bool)}, ValueError, "mask must be \\[B, S\\], got"),
        ({"mask": torch.ones(2, 30)}, TypeError, "mask must be bool, got torch.float32"),
        ({"mask": None}, TypeError, "visible.mask must be a tensor, got None"),
        ({"length": None}, TypeError, "length must be a tensor, got None"),
        ({"length": torch.ones(3, dtype=torch.int64)}, ValueError, "length must be \\[2\\], got \\[3\\]"),
        ({"length": torch.ones(2)}, TypeError, "length must be int64, got torch.float32"),
        ({"start": torch.ones(2, dtype=torch.int32)}, TypeError, "start must be int64, got torch.int32"),
        ({"queries": 0}, ValueError, "queries must be at least 1, got 0"),
        ({"k": 0}, ValueError, "k must be at least 1, got 0"),
        ({"k_divisor": 0}, ValueError, "k_divisor must be at least 1 or None, got 0"),
        ({"local": 9}, ValueError, "local must be 0 to k \\(8\\) or None, got 9"),
    ],
)
def test_errors(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    visible, budget = Visible(torch.tensor([30, 20]), mask=torch.ones(2, 30, dtype=torch.bool)), Budget(1, 8)
    visible, budget = (
        group._replace(**{name: x for name, x in changes.items() if name in group._fields})
        for group in (visible, budget)
    )
    with pytest.raises(error, match=message):
        count_valid(visible, budget, queries=changes.get("queries", 1))


def test_what_is_no_group_is_named() -> None:
    visible, budget = Visible(torch.tensor([30]), mask=torch.ones(1, 30, dtype=torch.bool)), Budget(1, 8)
    with pytest.raises(TypeError, match=r"visible must be a sparq_kernels\.Visible, got Tensor"):
        count_valid(visible.mask, budget)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"budget must be a sparq_kernels\.Budget, got a tuple of 7"):
        count_valid(visible, tuple(budget))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("counts", "error", "message"),
    [
        (torch.zeros(2, 1, 2), TypeError, "counts must be int32"),
        (torch.zeros(1, 1, 2, dtype=torch.int32), ValueError, "counts must be \\[2, 1, 2\\], got \\[1, 1, 2\\]"),
        (torch.zeros(2, 1, 4, dtype=torch.int32)[..., ::2], ValueError, "counts must be contiguous"),
    ],
)
def test_decode_refuses_other_counts(counts: torch.Tensor, error: type[Exception], message: str) -> None:
    call = call_of(make_case(2, 4, 2, 300, 16, holes=0.3, r=4, k=20))
    with pytest.raises(error, match=message):
        run_decode(call._replace(counts=counts), True)


def test_decode_refuses_counts_of_no_mask() -> None:
    call = call_of(make_case(2, 4, 2, 300, 16, r=4, k=20))
    with pytest.raises(ValueError, match="counts must be None without a mask"):
        run_decode(call._replace(counts=torch.zeros(2, 1, 2, dtype=torch.int32)), True)
