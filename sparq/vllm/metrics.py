"""What SparQ has done, on vLLM's `/metrics`.

Those are made in another process than a worker's. Where $PROMETHEUS_MULTIPROC_DIR names a folder, though, vLLM adds up
the files that all of its processes keep there, a worker's among them.
"""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

FOLDER = "PROMETHEUS_MULTIPROC_DIR"
LABELS = ("engine", "worker")


class Exported:
    """The counts of one process, under the names that `sparq serve` has for them."""

    def __init__(self) -> None:
        # Imported by who wants it alone: it looks for the folder when it is imported.
        from prometheus_client import Counter as Metric

        self._known: Counter[str] = Counter()
        self._metrics = {
            name: Metric(f"sparq_{name}", about, LABELS)
            for name, about in {
                "decoded_tokens": "tokens decoded; each worker of an engine counts all of them",
                "sparse_steps": "decode steps of a layer that read a part of K and V",
                "dense_steps": "decode steps of a layer that read all of K and V",
                "read_bytes": "bytes of K, V and the index that decode steps have read",
                "dense_read_bytes": "bytes that they would have read densely",
                "alpha": "share of the scores that was attended, summed over all steps",
            }.items()
        }

    def update(self, report: dict[str, Any], *labels: str) -> None:
        """report: of `report.Totals`, never less than the one before."""
        now = Counter(
            decoded_tokens=report["decoded_tokens"],
            sparse_steps=report["sparse_token_layers"],
            dense_steps=report["token_layers"] - report["sparse_token_layers"],
            read_bytes=report["bytes_read"],
            dense_read_bytes=report["bytes_dense"],
            alpha=(report["mean_alpha"] or 0.0) * report["token_layers"],
        )
        for name, metric in self._metrics.items():
            metric.labels(*labels).inc(max(0.0, now[name] - self._known[name]))  # sums of alpha are rounded
        self._known = now


def is_wanted() -> bool:
    """Whether anybody would read them."""
    return FOLDER in os.environ
