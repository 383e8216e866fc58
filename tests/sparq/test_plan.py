"""The plan of a forward pass: what a mask says about lengths, padding and k."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparq.config import SparqConfig
from sparq.plan import Plan
from sparq.stats import Stats
from sparq.step import Step


def plan(mask: Tensor | None, length: int = 6, batch: int = 2, **knobs) -> Plan:
    return Step(None, SparqConfig(**({"k": 2} | knobs)), Stats()).plan(mask, length, keys(length, batch))


def keys(length: int, batch: int = 2) -> Tensor:
    return torch.empty(batch, 1, length, 4)


def rows(*texts: str) -> Tensor:
    """[B, 1, 1, S] from texts of 1 (valid) and 0."""
    return torch.tensor([[int(c) for c in text] for text in texts], dtype=torch.bool)[:, None, None]


def as_bias(mask: Tensor, masked_out: float) -> Tensor:
    return torch.where(mask, 0.0, masked_out)


def test_no_mask() -> None:
    result = plan(None)
    assert result.length.tolist() == [6, 6] and result.start is None and result.mask is None
    assert (result.valid, result.tail, result.dense_reason) == (12, 12, None)


def test_a_mask_of_ones_is_no_mask() -> None:
    result = plan(rows("111111", "111111"))
    assert result.start is None and result.mask is None


@pytest.mark.parametrize("masked_out", [None, -torch.inf, torch.finfo(torch.float32).min])
def test_left_padding_is_a_start(masked_out: float | None) -> None:
    mask = rows("111111", "000111")
    result = plan(mask if masked_out is None else as_bias(mask, masked_out))
    assert result.start is not None and result.start.tolist() == [0, 3] and result.mask is None
    assert (result.valid, result.tail, result.dense_reason) == (9, 9, None)


@pytest.mark.parametrize("masked_out", [None, -torch.inf, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("second", ["001011", "111110", "000000"])
def test_holes_are_a_mask(second: str, masked_out: float | None) -> None:
    mask = rows("111111", second)
    result = plan(mask if masked_out is None else as_bias(mask, masked_out))
    assert result.start is None and result.mask is not None
    assert result.mask.tolist() == mask[:, 0, 0].tolist() and result.mask.dtype == torch.bool
    assert result.valid == result.tail == 6 + second.count("1")


def test_one_mask_for_all_rows() -> None:
    result = plan(rows("000111"))
    assert result.start is not None and result.start.tolist() == [3, 3] and result.valid == 6
    result = plan(rows("010111"))
    assert result.mask is not None and result.mask.shape == (2, 6)


def test_what_lies_beyond_the_length_does_not_count() -> None:
    assert plan(rows("11111100", "00011100")).valid == 9


def test_k_covers_the_context_only_if_it_does_in_all_rows() -> None:
    mask = rows("111111", "000111")
    assert plan(mask, k=6).dense_reason == "k covers the context"
    assert plan(mask, k=5).dense_reason is None
    assert plan(mask, k=6, mass=0.9, k_min=5).dense_reason is None
    assert plan(mask, k=6, mass=0.9, k_min=6).dense_reason == "k covers the context"


def test_the_tail_is_what_lies_behind_whole_groups() -> None:
    mask = torch.ones(2, 1, 1, 600, dtype=torch.bool)
    mask[1, ..., :530] = False
    result = plan(mask, length=600, mass=0.9, k_min=1)
    assert (result.valid, result.tail) == (670, 88 + 70)
    assert Step(None, SparqConfig(k=2), Stats()).plan(None, 515, keys(515), 4).tail == 2 * (3 + 2 + 1 + 0)


@pytest.mark.parametrize(
    "mask",
    [
        rows("111111", "000111").expand(-1, 4, -1, -1),  # a row for each head
        rows("11111", "00011"),  # too short
        rows("111111", "000111")[:, 0],
        as_bias(rows("111111", "000111"), -1.0),
        torch.linspace(-1, 0, 6).expand(2, 1, 1, 6),
    ],
    ids=["heads", "short", "three dimensions", "bias", "slope"],
)
def test_other_masks_are_dense(mask: Tensor) -> None:
    reason = plan(mask).dense_reason
    assert reason is not None and reason.startswith("attention mask")


def test_does_not_hold_on_to_the_mask_of_the_caller() -> None:
    mask = rows("111111", "010111")
    result = plan(mask)
    mask[:] = False
    assert result.mask is not None and result.mask.tolist() == rows("111111", "010111")[:, 0, 0].tolist()


@pytest.mark.parametrize("texts", [("111111", "000111"), ("111111", "111111"), ("110111", "011101")])
def test_a_mask_on_a_gpu_is_not_read_back(texts: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = plan(rows(*texts))
    monkeypatch.setattr("sparq.plan.can_read", lambda device: False)
    for name in ("__bool__", "__int__", "item", "tolist"):
        monkeypatch.setattr(Tensor, name, lambda *args: pytest.fail("read back"))
    found = plan(rows(*texts))
    monkeypatch.undo()
    assert found.start is None and found.mask is not None and found.ignored_bias is None
    for name in ("valid", "tail", "valid_once"):
        assert int(getattr(found, name)) == getattr(expected, name)
    position = torch.arange(6)
    start = 0 if expected.start is None else expected.start[:, None]
    valid = (position >= start) & (True if expected.mask is None else expected.mask)
    assert torch.equal(found.mask, valid & (position < expected.length[:, None]))


def test_what_could_be_strange_is_read_back_on_a_gpu_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparq.plan.can_read", lambda device: False)
    mask = as_bias(rows("111111", "000111"), -torch.inf)
    assert isinstance(plan(mask).valid, int)
    mask[0, 0, 0, 2] = -1.0
    assert plan(mask).dense_reason is not None
