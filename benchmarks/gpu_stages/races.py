"""Stage `races`: the operator captured in a CUDA graph and replayed again and again, compared bit for bit.

Its programs hand each other partial results through memory; where one reads too early, replays of the same graph
differ. Results are compared with those of an eager call, on the device, and counted there. Every tenth replay begins
on poisoned outputs, and every second one runs beside a large copy, which makes programs start and end in another order.
With codes a query stops by mass, as it does by default.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from gpu_stages.cases import RACES, RACES_MASS, TINY
from gpu_stages.clocks import clock_of, poison
from gpu_stages.failures import reason
from gpu_stages.stage import Stage, binaries
from tables import UNKNOWN, Grid
from torch import Tensor
from workload import DTYPES, Case, Inputs, Shape, decode, make_inputs

REPLAYS = 500
AT_ONCE = 50  # replays between looks at the clock
ENOUGH = 1.0  # seconds: with less left none is begun
NAMES = ("output", "alpha", "lse", "positions")
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def results(shape: Shape, x: Inputs, return_positions: bool) -> list[Tensor]:
    knobs = {"mass": RACES_MASS} if shape.index == "int4" else {}
    found = decode(shape, x, return_positions, **knobs)
    return [tensor for name in NAMES if (tensor := getattr(found, name)) is not None]


def bits(tensor: Tensor) -> Tensor:
    """NaN is not equal to itself, and 0 is to -0."""
    return tensor.contiguous().view(BITS[tensor.element_size()])


@torch.no_grad()
def replayed(
    case: Case, dtype_name: str, return_positions: bool, replays: int, stage: Stage
) -> tuple[dict[str, int], int]:
    """Elements of each result that differed from the eager call's, over all replays; and how many these were."""
    clock = clock_of(stage.device)
    x = make_inputs(case.shape, DTYPES[dtype_name], stage.device)
    expected = [bits(tensor.clone()) for tensor in results(case.shape, x, return_positions)]
    replay = clock.graph(lambda x: results(case.shape, x, return_positions), [x], 1)
    make_noise = clock.noise()
    counts = torch.zeros(len(expected), dtype=torch.int64, device=stage.device)
    done = 0
    while done < replays and (not done or stage.left() > ENOUGH):
        for turn in range(done, min(replays, done + AT_ONCE)):
            if turn % 10 == 0:
                poison(replay.results)
            if turn % 2:
                make_noise()
            replay.replay()
            for index, (result, right) in enumerate(zip(replay.results, expected, strict=True)):
                counts[index] += (bits(result) != right).sum()
            done += 1
        clock.synchronize()
    return dict(zip(NAMES, counts.tolist(), strict=False)), done


def main(stage: Stage) -> None:
    compiled, rows = binaries(), []
    chosen = [(case, "float32") for case in TINY] if stage.is_dry else RACES
    replays = 20 if stage.is_dry else REPLAYS
    for (case, dtype_name), positions in itertools.product(chosen, (False, True)):
        described = {"name": case.name, "shape": str(case.shape), "dtype": dtype_name, "positions": positions}
        row: dict[str, Any] = {"case": described}
        rows.append(row)
        if stage.left() < ENOUGH:
            row["replays"] = 0
        else:
            try:
                row["differing"], row["replays"] = replayed(case, dtype_name, positions, replays, stage)
            except Exception as error:
                row["failed"] = reason(error)
        report(stage, rows)
    stage.save(compiled_here=binaries() - compiled)


def report(stage: Stage, rows: list[dict[str, Any]]) -> None:
    wrong = []
    for row in rows:
        case = row["case"]
        what = f"{case['name']} {case['dtype']}" + ", with positions" * case["positions"]
        if row.get("failed"):
            wrong.append(f"no replay of {what}: {row['failed']}")
        elif any(row.get("differing", {}).values()):
            found = ", ".join(f"{count} of {name}" for name, count in row["differing"].items() if count)
            wrong.append(f"RACE: {what}: elements that differed in {row['replays']} replays: {found}")
    replays = sum(row.get("replays", 0) for row in rows)
    untried = sum(row.get("replays") == 0 for row in rows)
    said = f"{replays} replays of {len(rows) - untried} graphs, {len(wrong)} of them wrong"
    lines = []
    for row in rows:
        differing = (str(row.get("differing", {}).get(name, UNKNOWN)) for name in NAMES)
        lines.append((row["case"]["name"], row["case"]["dtype"], str(row.get("replays", "failed")), *differing))
    title = "Replays of a graph that differed from the eager call, bit for bit: elements over all replays"
    stage.set_tables(hidden=(Grid(title, ("case", "dtype", "replays", *NAMES), lines),))
    stage.save(rows=rows, wrong=wrong, said=said + (f"; no time for {untried}" if untried else ""))
