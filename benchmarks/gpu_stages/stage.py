"""The stages of gpu.py: their limits, and what each is given: a deadline, and JSON that is whole whenever it is
stopped."""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from harness import write_json
from tables import Grid

STARTED = time.monotonic()  # this module is imported first: importing PyTorch is part of a stage's time


@dataclass(frozen=True)
class Limits:
    name: str  # of a module of this folder, whose `main` takes a Stage
    about: str
    seconds: int
    margin: int = 4  # seconds before the limit by which it should have ended by itself
    needs_no_kernel: bool = False  # in a dry run


STAGES = (
    Limits("device", "versions, card, copy bandwidth", 15),
    Limits("kernels", "compiled in parallel; registers", 80),
    Limits("tests", "kernels and models against references", 118, 10),
    Limits("races", "replays compared bit for bit", 18, needs_no_kernel=True),
    Limits("attention", "one decode step, all opponents", 104, needs_no_kernel=True),
    Limits("generation", "whole models, stock and SparQ", 135, 6),
)


class Stage:
    """`content` is what the stage's JSON file holds: `said`, one line for whoever watches; `wrong`, `notes`, lines for
    the report; `tables`; and whatever else it has found out."""

    def __init__(self, device: str, seconds: float, path: Path) -> None:
        self.device = device
        self.ends = STARTED + seconds
        self.path = path
        self.content: dict[str, Any] = {}

    @property
    def is_dry(self) -> bool:
        return self.device == "cpu"

    def left(self) -> float:
        return self.ends - time.monotonic()

    def save(self, **content: Any) -> None:
        self.content.update(content)
        write_json(self.path, self.content)

    def set_tables(self, *grids: Grid, hidden: tuple[Grid, ...] = ()) -> None:
        """Those that are hidden go to the Markdown file alone."""
        printed = [(grid, True) for grid in grids] + [(grid, False) for grid in hidden]
        self.content["tables"] = [{**asdict(grid), "printed": is_printed} for grid, is_printed in printed]


def binaries() -> int:
    """Kernels in the cache of Triton that the stages share; 0 where there is none."""
    folder = os.environ.get("TRITON_CACHE_DIR")
    return sum(1 for kind in ("cubin", "hsaco") for _ in Path(folder).glob(f"*/*.{kind}")) if folder else 0
