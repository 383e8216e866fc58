"""How a benchmark shows its rows: one grid of text, on a terminal or as Markdown, and a JSON file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from rich.markup import escape
from rich.table import Table


@dataclass(frozen=True)
class Grid:
    """The first `left` columns hold words and stand left, the others numbers."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    left: int = 2

    def table(self) -> Table:
        table = Table(title=self.title)
        for index, name in enumerate(self.columns):
            table.add_column(name, justify="left" if index < self.left else "right")
        for row in self.rows:
            table.add_row(*map(escape, row))
        return table

    def markdown(self) -> str:
        rule = ["---" if index < self.left else "---:" for index in range(len(self.columns))]
        lines = [list(self.columns), rule, *(list(row) for row in self.rows)]
        return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def write_markdown(path: Path, grids: list[Grid]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(f"**{grid.title}**\n\n{grid.markdown()}" for grid in grids) + "\n")


def write_json(path: Path, result: dict[str, object]) -> None:
    """Whole or not at all: whoever writes after every row may be stopped while writing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(json.dumps(result, indent=1) + "\n")
    unfinished.replace(path)
