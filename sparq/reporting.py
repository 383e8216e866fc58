"""What was counted, shown: the report of a patched model."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from html import escape
from typing import Any

from rich.console import Console
from rich.table import Table

from sparq.stats import COUNTS, DOUBTS, LayerStats, Stats

COLUMNS = ("layer", "sparse", "dense", "mean α", "positions read", "MB read", "MB dense", "ratio")


@dataclass(frozen=True)
class LayerReport:
    """Counts of one layer, or of all together (see `LayerStats` for what is counted)."""

    decode_steps: int
    sparse_steps: int
    dense_steps: dict[str, int]
    mean_alpha: float | None  # share of the approximate attention that the positions read had; None: no sparse step
    positions_cached: int
    positions_read: int
    bytes_read: int
    bytes_dense: int
    other_sums: int  # compiled steps whose mean value was over other positions than those of their mask
    ignored_biases: int  # compiled steps whose mask had a bias, which was not added, or was not causal


@dataclass(frozen=True)
class Report:
    """Proof of activity of a patched model, since it was patched.

    `str()` is a table in plain text wherever it is called, a notebook shows one in HTML, `to_dict()` is plain data.
    """

    config: Any  # a SparqConfig, or the dataclass of a method that is compared with SparQ
    backend: str  # what sparse steps ran on; before the first of them, what they would run on
    layers: dict[int, LayerReport]
    total: LayerReport
    remade: int  # times that a layer's index was made anew, because others had changed what the layer holds
    cache_bytes: int  # the most one cache has held in SparQ's layers: K, V, the index, slack to grow

    @classmethod
    def of(cls, stats: Stats, config: Any, backend: str) -> Report:
        everything = LayerStats()
        layers = {}
        for index, layer in stats.settled().items():
            layers[index] = _frozen(layer)
            everything.dense_steps += layer.dense_steps
            for name in (*COUNTS, *DOUBTS):
                setattr(everything, name, getattr(everything, name) + getattr(layer, name))
            if layer.alpha_sum is not None:
                everything.add_alpha(layer.alpha_sum.cpu())  # layers may lie on several devices
        return cls(config, backend, layers, _frozen(everything), stats.remade, stats.cache_bytes)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        table = Table(title=self._title())
        for column in COLUMNS:
            table.add_column(column, justify="right")
        *layers, total = self._rows()
        for row in layers:
            table.add_row(*row)
        table.add_section()
        table.add_row(*total)
        out = io.StringIO()
        # Told all that it would find out by itself: in a notebook it shows a table instead of writing it, and under
        # FORCE_COLOR it writes escape codes into any file.
        plain = Console(
            file=out, width=100, force_terminal=False, force_jupyter=False, color_system=None, legacy_windows=False
        )
        plain.print(table)
        print(*self._lines(), sep="\n", file=out)
        return out.getvalue().rstrip()

    def _repr_html_(self) -> str:
        """What a notebook shows: the table and the lines of `str()`."""

        def row(tag: str, cells: Iterable[str]) -> str:
            return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

        *layers, total = self._rows()
        body = "".join(row("td", cells) for cells in layers)
        lines = "<br/>".join(escape(line) for line in self._lines())
        return (
            f"<div><table><caption>{escape(self._title())}</caption><thead>{row('th', COLUMNS)}</thead>"
            f"<tbody>{body}</tbody><tfoot>{row('td', total)}</tfoot></table><p>{lines}</p></div>"
        )

    def _title(self) -> str:
        return f"SparQ: decode steps, layer by layer (operator: {self.backend})"

    def _rows(self) -> list[list[str]]:
        """The table's cells; the last row is of all layers together."""
        return [[str(index), *_cells(layer)] for index, layer in self.layers.items()] + [["all", *_cells(self.total)]]

    def _lines(self) -> list[str]:
        """What stands below the table."""
        lines = textwrap.wrap(str(self.config), 100)
        if self.cache_bytes:
            lines.append(f"largest cache: {self.cache_bytes / 1e6:,.1f} MB (K, V, the index)")
        if self.total.mean_alpha is not None:
            lines.append("mean α: the share by the approximate scores, which is too high where they miss something")
        if not self.total.decode_steps:
            lines.append("no decode step yet: nothing but prompts, if anything")
        for reason, steps in sorted(self.total.dense_steps.items(), key=lambda item: -item[1]):
            lines.append(f"dense, {steps} layer steps: {reason}")
        if self.remade:
            lines.append(
                f"{self.remade} times a layer was changed from outside and its index made anew: all of K and V was read"
            )
        if self.total.other_sums:
            lines.append(
                f"WRONG MEAN, {self.total.other_sums} layer steps: the mask has changed for positions read before, "
                "which a compiled step or one on a GPU with a static cache cannot follow"
            )
        if self.total.ignored_biases:
            lines.append(
                f"WRONG SCORES, {self.total.ignored_biases} layer steps: the mask had a bias or was not causal, which "
                "a compiled step or one on a GPU with a static cache does not see"
            )
        return lines


def _frozen(layer: LayerStats) -> LayerReport:
    return LayerReport(
        decode_steps=layer.decode_steps,
        sparse_steps=layer.sparse_steps,
        dense_steps=dict(layer.dense_steps),
        mean_alpha=None if layer.alpha_sum is None else float(layer.alpha_sum) / layer.alpha_count,
        positions_cached=layer.positions_cached,
        positions_read=layer.positions_read,
        bytes_read=layer.bytes_read,
        bytes_dense=layer.bytes_dense,
        other_sums=layer.other_sums,
        ignored_biases=layer.ignored_biases,
    )


def _cells(layer: LayerReport) -> list[str]:
    share = f" ({layer.positions_read / layer.positions_cached:.1%})" if layer.positions_cached else ""
    return [
        f"{layer.sparse_steps:,}",
        f"{sum(layer.dense_steps.values()):,}",
        "–" if layer.mean_alpha is None else f"{layer.mean_alpha:.3f}",
        f"{layer.positions_read:,}{share}",
        f"{layer.bytes_read / 1e6:,.1f}",
        f"{layer.bytes_dense / 1e6:,.1f}",
        f"{layer.bytes_dense / layer.bytes_read:.1f}x" if layer.bytes_read else "–",
    ]
