"""What gpu.py says of its stages: lines for whoever watches, tables, Markdown."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from rich import box
from rich.console import Console
from tables import Grid

OK, FAILED, OUT_OF_TIME = "ok", "FAILED", "OUT OF TIME"
LINES = 100  # at most, of everything printed
WIDTH = 160
MOST_TOLD = 10  # lines of one kind
LENGTH = 2 * WIDTH  # of a line of somebody else's
# The last is what whoever runs it looks for.
SHOWN = ("kernels", "generation", "attention")
VENDORS = {"nvidia", "geforce", "tesla", "quadro", "amd", "instinct", "radeon"}
FACTS = ("driver", "cuda", "torch", "triton", "transformers", "python", "processor", "sparq commit", "date")
Content = dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """How a stage ended, and what its JSON file held by then."""

    name: str
    status: str
    seconds: float
    limit: int
    content: Content
    said: str = ""

    def summary(self) -> str:
        parts = [self.content.get("said"), self.said]
        if compiled := self.content.get("compiled_here"):
            parts.append(f"{compiled} kernels compiled that the second stage had not")
        return "; ".join(filter(None, parts)) or "no results"

    def wrong(self) -> list[str]:
        """All that makes the exit status 1."""
        lines = list(self.content.get("wrong", []))
        return [f"{self.name}: {self.said}"] if self.status == FAILED and not lines else lines


def stage_line(outcome: Outcome) -> str:
    head = f"{outcome.name:<11}{outcome.status:<12}{outcome.seconds:4.0f} of {outcome.limit:>3} s  "
    return head + short(outcome.summary(), WIDTH - len(head))


def report(found: Content, room: int) -> list[str]:
    """At most so many lines: what is wrong, what else is to be known, and as many tables, the last first, as fit."""
    notes = [note for name in found["stages"] for note in found[name].get("notes", [])]
    lines = [short(line, LENGTH) for line in found["wrong"][:MOST_TOLD]]
    if len(found["wrong"]) > MOST_TOLD:
        lines.append(f"and {len(found['wrong']) - MOST_TOLD} more that are wrong: gpu.json has them")
    lines += [short(note, WIDTH) for note in notes[:MOST_TOLD]]
    if len(notes) > MOST_TOLD:
        lines.append(f"and {len(notes) - MOST_TOLD} more remarks: gpu.md has them")
    if unfinished := [name for name, stage in found["stages"].items() if stage["status"] == OUT_OF_TIME]:
        lines.append(f"NOT WHOLE: out of time: {', '.join(unfinished)}")
    lines.append(f"{len(found['wrong'])} wrong" if found["wrong"] else "nothing wrong")
    if is_dry(found):
        lines.append("A dry run on a CPU: no time below is a measurement.")
    # A line longer than the screen is several.
    room -= sum(-(-len(line) // WIDTH) for line in lines)
    tables: list[list[str]] = []
    left_out = 0
    for grid in reversed(list(printed_grids(found))):
        drawn = draw(grid)
        if left_out or len(drawn) > room - 1:  # one line to say so
            left_out += 1
            continue
        room -= len(drawn)
        tables.insert(0, drawn)
    if left_out:
        lines.append(f"{left_out} tables are in gpu.md alone")
    return lines + [line for table in tables for line in table]


def is_dry(found: Content) -> bool:
    return found["machine"].get("device", "").startswith("CPU")


def printed_grids(found: Content) -> Iterator[Grid]:
    for name in SHOWN:
        tables = [table for table in found.get(name, {}).get("tables", []) if table["printed"]]
        for table in reversed(tables):  # the first one is the stage's most important
            yield Grid.of(table)


def draw(grid: Grid) -> list[str]:
    """Heads are broken so that numbers alone make columns wide."""
    heads = []
    for index, name in enumerate(grid.columns):
        width = max([len(row[index]) for row in grid.rows] + [len(word) for word in name.split()])
        heads.append(textwrap.fill(name, width))
    table = replace(grid, columns=tuple(heads)).table()
    table.box, table.title_justify, table.padding, table.pad_edge = box.SIMPLE_HEAD, "left", (0, 0), False
    console = Console(width=WIDTH, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return [line.rstrip() for line in capture.get().splitlines() if line.strip()]


def markdown(found: Content) -> str:
    """All tables and remarks: what benchmarks/results keeps of a card."""
    machine, stages = found["machine"], found["stages"]
    grids = [
        Grid(
            "Stages",
            ("stage", "status", "seconds", "limit"),
            [(name, one["status"], f"{one['seconds']:.0f}", str(one["limit"])) for name, one in stages.items()],
        )
    ]
    remarks = list(found["wrong"])
    for name in stages:
        grids += map(Grid.of, found[name].get("tables", []))
        remarks += found[name].get("notes", [])
    parts = [
        f"# {machine.get('device', 'no device')}" + (": no time here is a measurement" if is_dry(found) else ""),
        ", ".join(f"{name} {machine[name]}" for name in FACTS if machine.get(name)),
        "Made by `make gpu` (benchmarks/README.md says how to read it). What is called predicted or expected was "
        "reckoned for an H100 before anything had run.",
        *(grid.titled_markdown() for grid in grids),
    ]
    if remarks:
        parts.append("\n".join(f"- {short(remark, LENGTH)}" for remark in remarks))
    return "\n\n".join(parts) + "\n"


def slug(device: str) -> str:
    """`NVIDIA H100 80GB HBM3` is h100, `AMD Instinct MI300X` mi300x."""
    words = re.split(r"[^a-z0-9]+", device.lower())
    kept = [word for word in words if word and word not in VENDORS and not re.fullmatch(r"\d+gb|hbm\d\w*", word)]
    return "-".join(kept)


def short(line: str, length: int) -> str:
    line = " ".join(line.split())
    return line if len(line) <= length else line[: length - 1] + "…"
