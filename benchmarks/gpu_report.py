"""What gpu.py says of its stages: lines for whoever watches, tables, Markdown."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from report import Grid
from rich import box
from rich.console import Console

OK, FAILED, OUT_OF_TIME, MISSING = "ok", "FAILED", "OUT OF TIME", "MISSING"
LINES = 100  # at most, of everything printed
WIDTH = 160
MOST_TOLD = 10  # lines of one kind
LENGTH = 2 * WIDTH  # of a line of somebody else's
# The last is what whoever runs it looks for.
SHOWN = ("kernels", "generation", "attention")
VENDORS = {"nvidia", "geforce", "tesla", "quadro", "amd", "instinct", "radeon"}
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
        content = self.content
        said = content.get("said")
        if said is None and "passed" in content:
            failed, skipped = content.get("failed") or [], content.get("skipped") or 0
            count = len(skipped) if isinstance(skipped, list) else skipped
            said = f"{content['passed']} passed, {len(failed)} failed, {count} skipped"
        if said is None and "rows" in content:
            said = f"{len(content['rows'])} rows"
        parts = [str(said)] if said else [] if self.said else ["no results"]
        if content.get("compiled_here"):
            parts.append(f"{content['compiled_here']} kernels compiled that the second stage had not")
        return "; ".join([*parts, *filter(None, [self.said])])

    def wrong(self) -> list[str]:
        """All that makes the exit status 1. Files of other programs are read as they may be."""
        lines = [str(line) for line in self.content.get("wrong") or []]
        for test in self.content.get("failed") or []:
            said = f"{test.get('name')}: {test.get('message')}" if isinstance(test, dict) else str(test)
            lines.append(f"failed: {said}")
        if not lines:
            wrong_rows = [row for row in self.content.get("rows") or [] if isinstance(row, dict) and row.get("wrong")]
            lines += [f"WRONG: {row['wrong']}" for row in wrong_rows]
        if self.status in (FAILED, MISSING) and not lines:
            lines.append(f"{self.name}: {self.said}")
        return lines


def stage_line(outcome: Outcome) -> str:
    head = f"{outcome.name:<11}{outcome.status:<12}{outcome.seconds:4.0f} of {outcome.limit:>3} s  "
    return head + short(outcome.summary(), WIDTH - len(head))


def report(found: Content, room: int) -> list[str]:
    """At most so many lines: what is wrong, what else is to be known, and as many tables, the last first, as fit."""
    lines = []
    for line in found["wrong"][:MOST_TOLD]:
        lines.append(short(line, LENGTH))
    if len(found["wrong"]) > MOST_TOLD:
        lines.append(f"and {len(found['wrong']) - MOST_TOLD} more that are wrong: gpu.json has them")
    notes = [note for name in found["stages"] for note in found[name].get("notes") or []]
    lines += [short(str(note), WIDTH) for note in notes[:MOST_TOLD]]
    if len(notes) > MOST_TOLD:
        lines.append(f"and {len(notes) - MOST_TOLD} more remarks: gpu.md has them")
    unfinished = [name for name, stage in found["stages"].items() if stage["status"] == OUT_OF_TIME]
    if unfinished:
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
    return str(found["machine"].get("device", "")).startswith("CPU")


def printed_grids(found: Content) -> Iterator[Grid]:
    for name in SHOWN:
        tables = [table for table in found.get(name, {}).get("tables") or [] if table.get("printed", True)]
        for table in reversed(tables):  # the first one is the stage's most important
            yield grid_of(table)


def grid_of(table: Content) -> Grid:
    rows = [tuple(str(cell) for cell in row) for row in table["rows"]]
    return Grid(table["title"], tuple(table["columns"]), rows, table.get("left", 2))


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
    machine = found["machine"]
    facts = {
        name: machine.get(name)
        for name in ("driver", "cuda", "torch", "triton", "transformers", "python", "processor", "sparq commit", "date")
    }
    parts = [
        f"# {machine.get('device', 'no device')}" + (": no time here is a measurement" if is_dry(found) else ""),
        ", ".join(f"{name} {value}" for name, value in facts.items() if value),
        "Made by `make gpu` (benchmarks/README.md says how to read it). What is called predicted or expected was "
        "reckoned for an H100 before anything had run.",
    ]
    stages: list[tuple[str, ...]] = [
        (name, stage["status"], f"{stage['seconds']:.0f}", str(stage["limit"]))
        for name, stage in found["stages"].items()
    ]
    grids = [Grid("Stages", ("stage", "status", "seconds", "limit"), stages)]
    remarks = list(found["wrong"])
    for name in found["stages"]:
        grids += [grid_of(table) for table in found[name].get("tables") or []]
        remarks += map(str, found[name].get("notes") or [])
    parts += [f"**{grid.title}**\n\n{grid.markdown()}" for grid in grids]
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
