"""A few hundred cases of the fuzzer (`make fuzz` runs many more), and the fuzzer itself: it sees what it should."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from sparq_kernels import operator

from tests.kernels.fuzz import batch_command, run_batch
from tests.kernels.fuzzing import RECIPES, Append, Change, Decode, Slots

pytestmark = pytest.mark.slow

CASES = int(os.environ.get("SPARQ_FUZZ_CASES", "250"))  # of each operator

RIGHT = Decode(
    batch=2,
    num_kv_heads=2,
    group=2,
    cached=40,
    head_dim=8,
    dtype="float32",
    lengths=None,
    starts=None,
    holes=0.0,
    options=(("r", 4), ("k", 10)),
    draw="normal",
    index="full",
    seed=0,
    threads=1,
    public=True,
    changes=(),
    queries=1,
    giant=None,
    poison=(),
)


@pytest.mark.parametrize("target", RECIPES)
def test_every_call_ends_in_a_right_result_or_a_refusal(target: str, tmp_path: Path) -> None:
    note = tmp_path / "recipe"
    failure = run_batch(batch_command(target, CASES, 0, note), note, {**os.environ, "OMP_WAIT_POLICY": "passive"})
    assert failure is None, failure


@pytest.mark.parametrize(
    ("ending", "told"),
    [
        ("os.abort()", "died of SIGABRT"),
        ("ctypes.string_at(0)", "died of SIGSEGV"),
        ("sys.exit(3)", "exit status 3"),
        ("print('ok')", None),
    ],
)
def test_a_process_that_dies_is_told_with_its_recipe(ending: str, told: str | None, tmp_path: Path) -> None:
    note = tmp_path / "recipe"
    code = f"import ctypes, os, sys; open({str(note)!r}, 'w').write('Append(batch=7)'); {ending}"
    failure = run_batch([sys.executable, "-c", code], note)
    if told is None:
        assert failure is None
    else:
        assert failure is not None and told in failure and '--recipe "Append(batch=7)"' in failure


def spoiled(monkeypatch: pytest.MonkeyPatch, spoil: Any) -> None:
    """The operator's result, seen through `spoil`."""
    real = operator._decode_op
    monkeypatch.setattr(operator, "_decode_op", lambda *arguments: spoil(*real(*arguments)))


@pytest.mark.parametrize("page", [None, 64])
def test_a_wrong_output_is_seen(page: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = dataclasses.replace(RIGHT, options=(*RIGHT.options, ("return_positions", True)), page=page)
    recipe.check()
    spoiled(monkeypatch, lambda output, *others: (output + 0.01, *others))
    with pytest.raises(AssertionError):
        recipe.check()


def test_poison_that_spreads_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = dataclasses.replace(RIGHT, poison=(("key_components", 0, 0, float("nan")), ("value", 0, 0, float("nan"))))
    recipe.check()

    def spread(output: torch.Tensor, *others: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (output + 0 * output[:1, :1].sum(), *others)

    spoiled(monkeypatch, spread)
    with pytest.raises(AssertionError, match="output of a head without poison"):
        recipe.check()


def test_an_answer_to_a_call_that_makes_no_sense_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = dataclasses.replace(RIGHT, changes=(Change("value", "meta", 0),))
    recipe.check()
    real = operator._decode_op
    clean: list[Any] = []

    def careless(*arguments: Any) -> Any:
        if arguments[3].device.type == "meta":
            return clean[0]
        clean.append(real(*arguments))
        return clean[0]

    monkeypatch.setattr(operator, "_decode_op", careless)
    with pytest.raises(AssertionError, match="several devices"):
        recipe.check()


def test_an_append_that_is_refused_halfway_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Append(1, 2, 20, 8, "float32", 3, True, True, (Change("new_value", "one more", 1),))
    recipe.check()
    real = sys.modules["sparq_kernels.append"]._append_op

    def halfway(key: torch.Tensor, *others: Any) -> None:
        try:
            real(key, *others)
        except ValueError:
            key[:, :, 3] = 0
            raise

    monkeypatch.setattr(sys.modules["sparq_kernels.append"], "_append_op", halfway)
    with pytest.raises(AssertionError, match="refused, yet key has changed"):
        recipe.check()


def test_a_row_that_is_not_written_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Slots(2, 2, 256, 8, "float32", "int4", (3, 255, -1), True, ())
    recipe.check()
    real = sys.modules["sparq_kernels.slots"]._append_slots_op
    monkeypatch.setattr(
        sys.modules["sparq_kernels.slots"], "_append_slots_op", lambda *call: real(*call[:-1], call[-1] - 1)
    )
    with pytest.raises(AssertionError, match="key does not hold what was appended"):
        recipe.check()
