"""What the stages of gpu.py share: arguments, a deadline, and JSON that is whole whenever the stage is stopped."""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from report import Grid, write_json

STARTED = time.monotonic()  # a stage imports this module first: importing PyTorch is part of its time


class Stage:
    """One program that gpu.py starts.

    `content` is what its JSON file holds: `said`, one line for whoever watches; `wrong`, `notes`, lines for the report;
    `tables`; and whatever else the stage has found out."""

    def __init__(self, device: str, seconds: float, path: Path | None) -> None:
        self.device = device
        self.ends = STARTED + seconds
        self.path = path
        self.content: dict[str, Any] = {}

    @classmethod
    def from_arguments(cls, description: str | None, arguments: list[str] | None = None) -> Stage:
        parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run of tiny sizes")
        parser.add_argument("--seconds", type=float, default=600, help="it ends by itself before these have passed")
        parser.add_argument("--json", type=Path, help="written after every row")
        args = parser.parse_args(arguments)
        return cls(args.device, args.seconds, args.json)

    @property
    def is_dry(self) -> bool:
        return self.device == "cpu"

    def left(self) -> float:
        return self.ends - time.monotonic()

    def save(self, **content: Any) -> None:
        self.content.update(content)
        if self.path:
            write_json(self.path, self.content)

    def add_tables(self, *grids: Grid, printed: bool = True) -> None:
        """Tables that are not `printed` go to the Markdown file alone."""
        tables = self.content.setdefault("tables", [])
        tables += [{**asdict(grid), "printed": printed} for grid in grids]


def binaries() -> int:
    """Kernels in the cache of Triton that the stages share; 0 where there is none."""
    folder = os.environ.get("TRITON_CACHE_DIR")
    return sum(1 for kind in ("cubin", "hsaco") for _ in Path(folder).glob(f"*/*.{kind}")) if folder else 0
