"""What a patched model has done: steps, positions and bytes, counted layer by layer, and the report made from it."""

from __future__ import annotations

import io
import threading
import warnings
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from sparq.config import SparqConfig


@dataclass
class LayerCounters:
    """One layer's decode steps (forward passes with one new token on a non-empty cache, or several: always dense).

    Positions and bytes are summed over batch rows and steps. Bytes are those of K and V, counted by the formula of the
    paper: dense 2·S·d, SparQ S·r + 2·k·d + 4·d elements per KV head. S is the number of valid positions in a sparse
    step, of all cached ones in a dense step, which reads the padding too.
    """

    sparse_steps: int = 0
    dense_steps: Counter[str] = field(default_factory=Counter)  # by reason
    positions_cached: int = 0  # in sparse steps
    positions_read: int = 0  # in sparse steps, in full
    bytes_read: int = 0
    bytes_dense: int = 0
    alpha_sum: Tensor | None = None  # left on its device: reading it back would wait for the step
    alpha_count: int = 0


class Counters:
    """Counters of all layers of one patched model; several threads may generate with it."""

    def __init__(self) -> None:
        self.layers: dict[int, LayerCounters] = {}
        self.cache_bytes = 0  # the most that one cache has held
        self._warned: set[str] = set()
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: dict) -> Counters:
        return Counters()  # a copied model starts counting anew

    def __reduce__(self) -> tuple:
        return Counters, ()

    def warn_once(self, message: str) -> None:
        with self._lock:
            if message in self._warned:
                return
            self._warned.add(message)
        warnings.warn(message, stacklevel=2)

    def cache(self, held: int) -> None:
        if held > self.cache_bytes:
            with self._lock:
                self.cache_bytes = max(self.cache_bytes, held)

    def dense(self, layer: int, reason: str, bytes_dense: int) -> None:
        with self._lock:
            counters = self.layers.setdefault(layer, LayerCounters())
            counters.dense_steps[reason] += 1
            counters.bytes_read += bytes_dense
            counters.bytes_dense += bytes_dense

    def sparse(
        self, layer: int, alpha: Tensor, positions_cached: int, positions_read: int, bytes_read: int, bytes_dense: int
    ) -> None:
        with self._lock:
            counters = self.layers.setdefault(layer, LayerCounters())
            counters.sparse_steps += 1
            counters.positions_cached += positions_cached
            counters.positions_read += positions_read
            counters.bytes_read += bytes_read
            counters.bytes_dense += bytes_dense
            total = alpha.detach().sum()  # with its graph, every step of a model run without no_grad would stay alive
            counters.alpha_sum = total if counters.alpha_sum is None else counters.alpha_sum + total
            counters.alpha_count += alpha.numel()


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


@dataclass(frozen=True)
class Report:
    """Proof of activity of a patched model, since it was patched. `str()` is a table, `to_dict()` plain data."""

    config: SparqConfig
    backend: str
    layers: dict[int, LayerReport]
    total: LayerReport
    cache_bytes: int  # the most one cache has held in SparQ's layers: K, V, the component copy of K, slack to grow

    @classmethod
    def of(cls, counters: Counters, config: SparqConfig, backend: str) -> Report:
        everything = LayerCounters()
        layers = {}
        for index, layer in sorted(counters.layers.items()):
            layers[index] = _frozen(layer)
            everything.dense_steps += layer.dense_steps
            for name in ("sparse_steps", "positions_cached", "positions_read", "bytes_read", "bytes_dense"):
                setattr(everything, name, getattr(everything, name) + getattr(layer, name))
            if layer.alpha_sum is not None:
                alpha_sum = layer.alpha_sum.cpu()  # layers may lie on several devices
                everything.alpha_sum = alpha_sum if everything.alpha_sum is None else everything.alpha_sum + alpha_sum
                everything.alpha_count += layer.alpha_count
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
        return out.getvalue().rstrip()


def _frozen(layer: LayerCounters) -> LayerReport:
    return LayerReport(
        decode_steps=layer.sparse_steps + sum(layer.dense_steps.values()),
        sparse_steps=layer.sparse_steps,
        dense_steps=dict(layer.dense_steps),
        mean_alpha=None if layer.alpha_sum is None else float(layer.alpha_sum) / layer.alpha_count,
        positions_cached=layer.positions_cached,
        positions_read=layer.positions_read,
        bytes_read=layer.bytes_read,
        bytes_dense=layer.bytes_dense,
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
