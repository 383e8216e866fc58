"""The knobs: what is refused, the r and k that follow from the ratio, and how they travel."""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies
from sparq_kernels import Budget

from sparq import SparqConfig
from sparq.config import MIN_POSITIONS

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


# As plain data, and as a file.


@strategies.composite
def configs(draw: strategies.DrawFn) -> SparqConfig:
    """Any configuration that is allowed."""
    k = draw(strategies.none() | strategies.integers(1, 10_000))
    base = MIN_POSITIONS if k is None else k
    return SparqConfig(
        r=draw(strategies.none() | strategies.integers(1, 256)),
        k=k,
        ratio=draw(strategies.integers(2, 200)) / 2
        if draw(strategies.booleans())
        else draw(strategies.integers(1, 99)),
        local=draw(strategies.none() | strategies.integers(0, base)),
        index=draw(strategies.sampled_from(["int4", "full"])),
        mass=draw(strategies.none() | strategies.floats(0, 1, exclude_min=True)),
        k_min=draw(strategies.none() | strategies.integers(1, base)),
        mean_value=draw(strategies.booleans() | strategies.floats(0, 1)),
        dense_layers=draw(strategies.integers(0, 99)),
        min_length=draw(strategies.none() | strategies.integers(0, 1 << 20)),
    )


@given(configs())
def test_a_configuration_comes_back_from_plain_data_and_from_a_file(config: SparqConfig) -> None:
    assert SparqConfig.from_dict(config.to_dict()) == config
    assert list(config.to_dict()) == [field.name for field in dataclasses.fields(SparqConfig)]
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(Path(folder) / "new" / "model")
        found = SparqConfig.from_pretrained(Path(folder) / "new" / "model")
    assert found == config
    assert [type(value) for value in found.to_dict().values()] == [type(value) for value in config.to_dict().values()]


def test_knobs_left_out_have_their_defaults() -> None:
    assert SparqConfig.from_dict({}) == SparqConfig()
    assert SparqConfig.from_dict({"k": 12}) == SparqConfig(k=12)


@pytest.mark.parametrize("knobs, error, message", WRONG, ids=[str(case[0]) for case in WRONG])
def test_bad_knobs_in_plain_data_and_in_a_file(
    tmp_path: Path, knobs: dict, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        SparqConfig.from_dict(knobs)
    (tmp_path / "sparq_config.json").write_text(json.dumps({"format_version": 1} | knobs))
    with pytest.raises(error, match=f"sparq_config.json: .*{message}"):
        SparqConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "knobs, message",
    [
        ({"k": 12, "rr": 3}, "unknown knob 'rr'; the knobs are r, k, ratio, .*min_length"),
        ({3: 12}, "unknown knob 3"),
        ([("k", 12)], r"knobs must be a dict, got \[\('k', 12\)\] of type list"),
    ],
    ids=str,
)
def test_what_is_no_dict_of_knobs(knobs: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        SparqConfig.from_dict(knobs)


@pytest.mark.parametrize(
    "text, error, message",
    [
        ("{", ValueError, "sparq_config.json must be JSON: "),
        ("[8]", ValueError, r"sparq_config.json must hold an object of knobs, got \[8\]"),
        ('{"format_version": 2, "speed": 9}', ValueError, "a later SparQ: its format_version is 2, .* reads up to 1"),
        ('{"format_version": "1"}', ValueError, "format_version must be an integer of at least 1, got '1'"),
        ('{"format_version": 0}', ValueError, "format_version must be an integer of at least 1, got 0"),
        ('{"format_version": 1, "rr": 3}', TypeError, "sparq_config.json: unknown knob 'rr'"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, text: str, error: type[Exception], message: str) -> None:
    (tmp_path / "sparq_config.json").write_text(text)
    with pytest.raises(error, match=message):
        SparqConfig.from_pretrained(tmp_path)


def test_a_file_by_hand_needs_no_version(tmp_path: Path) -> None:
    (tmp_path / "sparq_config.json").write_text('{"ratio": 4}')
    assert SparqConfig.from_pretrained(tmp_path) == SparqConfig(ratio=4)


def test_a_folder_without_the_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"sparq_config.json"):
        SparqConfig.from_pretrained(tmp_path)


def test_a_name_on_the_hub_is_looked_up_by_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    SparqConfig(k=12).save_pretrained(tmp_path)
    asked = []
    monkeypatch.setattr(
        "sparq.config.cached_file",
        lambda *args, **options: (asked.append((args, options)), str(tmp_path / "sparq_config.json"))[1],
    )
    assert SparqConfig.from_pretrained("someone/model", revision="main") == SparqConfig(k=12)
    assert asked == [(("someone/model", "sparq_config.json"), {"revision": "main"})]
