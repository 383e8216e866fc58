"""The knobs: what is refused, and the r and k that follow from the ratio."""

from __future__ import annotations

import dataclasses
import math

import pytest
from sparq_kernels import Budget

from sparq import SparqConfig

WRONG = [
    (dict(r=0), ValueError, "r must be at least 1"),
    (dict(r=-1), ValueError, "r must"),
    (dict(r=4.0), TypeError, "r must be an integer or None"),
    (dict(r=True), TypeError, "r must"),
    (dict(k=0), ValueError, "k must be at least 1"),
    (dict(k="128"), TypeError, "k must be an integer or None"),
    (dict(ratio=0.5), ValueError, "ratio must be"),
    (dict(ratio=float("nan")), ValueError, "ratio must be"),
    (dict(ratio=6.4), ValueError, "ratio must be a multiple of 0.5, got 6.4"),
    (dict(ratio=float("inf")), ValueError, "ratio must be"),
    (dict(ratio=None), TypeError, "ratio must be a number"),
    (dict(ratio=True), TypeError, "ratio must be a number"),
    (dict(ratio="8"), TypeError, "ratio must be a number"),
    (dict(k=10, local=11), ValueError, "local=11 and k=10"),
    (dict(local=129), ValueError, "local=129 and k=128"),
    (dict(local=-1), ValueError, "local must be at least 0"),
    (dict(mean_value=1), TypeError, "mean_value must be True, False or a float of 0 to 1, got 1"),
    (dict(mean_value=1.5), ValueError, "mean_value must be True, False or a float of 0 to 1, got 1.5"),
    (dict(mean_value=math.nan), ValueError, "mean_value must be True, False or a float of 0 to 1, got nan"),
    (dict(mean_value=None), TypeError, "mean_value"),
    (dict(dense_layers=-1), ValueError, "dense_layers must be at least 0"),
    (dict(dense_layers=None), TypeError, "dense_layers must be an integer,"),
    (dict(min_length=-1), ValueError, "min_length must be at least 0"),
    (dict(min_length=1.5), TypeError, "min_length must be an integer or None"),
]


@pytest.mark.parametrize("knobs, error, message", WRONG, ids=[str(case[0]) for case in WRONG])
def test_bad_knobs(knobs: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SparqConfig(**knobs)


def test_the_edges_are_allowed() -> None:
    SparqConfig(r=1, k=1, ratio=1, local=1, dense_layers=0, min_length=0)
    SparqConfig(k=10, local=10)
    SparqConfig(local=128)
    SparqConfig(local=0)


def test_cannot_be_changed_past_its_checks() -> None:
    config = SparqConfig(k=12)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.k = 0  # type: ignore[misc]
    with pytest.raises(ValueError, match="k must"):
        dataclasses.replace(config, k=0)


@pytest.mark.parametrize("head_dim, ratio, r", [(128, 8, 16), (128, 4, 32), (64, 8, 8), (64, 16, 8), (4, 8, 4)])
def test_r_follows_from_the_ratio(head_dim: int, ratio: int, r: int) -> None:
    assert SparqConfig(ratio=ratio, index="full").components(head_dim) == r
    assert SparqConfig(ratio=ratio).components(head_dim) == min(head_dim, 4 * r)


def test_r_beside_the_head_dim() -> None:
    assert SparqConfig(r=64).components(64) == 64
    with pytest.raises(ValueError, match="head_dim=64, got r=65"):
        SparqConfig(r=65).components(64)


@pytest.mark.parametrize(
    "ratio, valid, k",
    [
        (8.0, 4096, 256),
        (2.5, 1003, 200),
        (8, 100, 100),
        (8, 128, 128),
        (8, 2048, 128),
        (8, 2064, 129),
        (8, 32768, 2048),
        (1, 1000, 500),
    ],
)
def test_k_follows_from_the_ratio(ratio: float, valid: int, k: int) -> None:
    assert SparqConfig(ratio=ratio, mass=1.0).positions(valid) == k


@pytest.mark.parametrize("ratio, valid, k", [(8, 4096, 512), (2.5, 1003, 501), (8, 1000, 128), (8, 100, 100)])
def test_with_a_mass_that_is_the_most(ratio: float, valid: int, k: int) -> None:
    config = SparqConfig(ratio=ratio)
    assert config.positions(valid) == k and config.least(valid) == min(128, valid)
    assert config.budget(16) == Budget(16, 128, int(ratio), 32, 0.95, 128)


def test_who_gives_k_gets_k() -> None:
    assert SparqConfig(k=40).budget(8) == Budget(8, 40, None, None, None, 1)
    assert SparqConfig(k=40, mass=0.9).budget(8) == Budget(8, 40, None, 10, 0.9, 40)
    assert SparqConfig(k=40, mass=0.9, k_min=4, local=3).budget(8) == Budget(8, 40, None, 3, 0.9, 4)
    assert SparqConfig(mass=1.0).budget(8) == Budget(8, 128, 16, None, None, 1)


def test_the_paper_in_a_word() -> None:
    paper = SparqConfig.paper()
    assert (paper.index, paper.stop_at, paper.mean_value, paper.ratio) == ("full", None, True, 8)
    assert (paper.components(128), paper.positions(4096)) == (16, 256)
    assert SparqConfig.paper(16, dense_layers=1) == SparqConfig(
        index="full", mass=1.0, mean_value=True, ratio=16, dense_layers=1
    )


def test_a_given_k_does_not_grow() -> None:
    config = SparqConfig(k=12)
    assert [config.positions(valid) for valid in (0, 1, 12, 13, 100_000)] == [0, 1, 12, 12, 12]
