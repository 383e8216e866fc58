"""What was counted, shown: the report of a patched model."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass
from typing import Any

from sparq.counters import Counters, LayerCounters
from sparq.totals import DOUBTS, SPARSE


@dataclass(frozen=True)
class LayerReport:
    """Counts of one layer, or of all together (see `LayerCounters` for what is counted)."""

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
    """Proof of activity of a patched model, since it was patched. `str()` is a table, `to_dict()` plain data."""

    config: Any  # a SparqConfig, or the dataclass of a method that is compared with SparQ
    backend: str  # what sparse steps ran on; before the first of them, what they would run on
    layers: dict[int, LayerReport]
    total: LayerReport
    cache_bytes: int  # the most one cache has held in SparQ's layers: K, V, the component copy of K, slack to grow

    @classmethod
    def of(cls, counters: Counters, config: Any, backend: str) -> Report:
        everything = LayerCounters()
        layers = {}
        for index, layer in counters.settled().items():
            layers[index] = _frozen(layer)
            everything.dense_steps += layer.dense_steps
            for name in (*SPARSE, *DOUBTS):
                setattr(everything, name, getattr(everything, name) + getattr(layer, name))
            if layer.alpha_sum is not None:
                alpha_sum = layer.alpha_sum.cpu()  # layers may lie on several devices
                everything.alpha_sum = alpha_sum if everything.alpha_sum is None else everything.alpha_sum + alpha_sum
        return cls(config, backend, layers, _frozen(everything), counters.cache_bytes)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        table = Table(title=f"SparQ: decode steps, layer by layer (operator: {self.backend})")
        for column in ("layer", "sparse", "dense", "mean α", "positions read", "MB read", "MB dense", "ratio"):
            table.add_column(column, justify="right")
        for index, layer in self.layers.items():
            table.add_row(str(index), *_cells(layer))
        table.add_section()
        table.add_row("all", *_cells(self.total))
        out = io.StringIO()
        Console(file=out, width=100).print(table)
        print(self.config, file=out)
        if self.cache_bytes:
            print(f"largest cache: {self.cache_bytes / 1e6:,.1f} MB (K, V, the component copy of K)", file=out)
        for reason, steps in sorted(self.total.dense_steps.items(), key=lambda item: -item[1]):
            print(f"dense, {steps} layer steps: {reason}", file=out)
        if self.total.other_sums:
            print(
                f"WRONG MEAN, {self.total.other_sums} layer steps: the mask has changed for positions read before, "
                "which a compiled step or one on a GPU with a static cache cannot follow",
                file=out,
            )
        if self.total.ignored_biases:
            print(
                f"WRONG SCORES, {self.total.ignored_biases} layer steps: the mask had a bias or was not causal, which "
                "a compiled step or one on a GPU with a static cache does not see",
                file=out,
            )
        return out.getvalue().rstrip()


def _frozen(layer: LayerCounters) -> LayerReport:
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
