"""What SparQ has done in one process of an engine: for the log, for `/metrics`, and for who asks."""

from __future__ import annotations

import logging
import time
from typing import Any

import torch
from sparq_kernels import GROUP, Cached
from sparq_kernels.operator import DecodeOutput
from torch import Tensor

from sparq.index import KINDS
from sparq.vllm import metrics
from sparq.vllm.metrics import Exported

logger = logging.getLogger("vllm.sparq")

# Kept on the device, summed over tokens and layers; of positions and bytes, over KV heads too.
COUNTS = (
    "token_layers",
    "sparse_token_layers",
    "alpha",
    "positions_cached",
    "positions_read",
    "bytes_dense",
    "bytes_read",
)


class Totals:
    """Counts of this process. Decode steps add to them on their device, where nothing waits for it, a CUDA graph
    included."""

    def __init__(self) -> None:
        self.counts: Tensor | None = None  # float64 [len(COUNTS)]
        self.decoded_tokens = 0
        self.prompt_tokens = 0
        self.process = (0, 0)  # of which engine, and which of its workers
        self._logged = (0.0, 0)  # when, and how many tokens had been decoded
        self._exported: Exported | None = None

    def step(self, decoded: int, tokens: int) -> None:
        """A step of the engine with so many tokens, `decoded` of them by the operator."""
        self.decoded_tokens += decoded
        self.prompt_tokens += tokens - decoded

    def layer(self, result: DecodeOutput, cached: Cached, length: Tensor, index: str, r: int, dense_below: int) -> None:
        """One layer of it: what the operator gave for rows [T, ...] of `length`."""
        _, heads, _, head_dim = cached.key.shape
        size, valid = cached.key.element_size(), length.double()
        exists = length > 0
        whole = exists & (length < dense_below)
        read = result.read.sum((1, 2)).double()  # [T], over the KV heads
        of_index = KINDS[index].bytes_read(valid, valid % GROUP, r, size)
        sparse_bytes = 2 * head_dim * size * read + heads * (of_index + 4 * head_dim)
        dense_bytes = 2 * head_dim * size * heads * valid
        added = torch.stack(
            [
                exists.double(),
                (exists & ~whole).double(),
                result.alpha.mean((1, 2)).double() * exists,
                heads * valid,
                read,
                dense_bytes,
                torch.where(whole, dense_bytes, sparse_bytes) * exists,
            ]
        )
        if self.counts is None:
            with torch.inference_mode(False):  # they outlive the block that they are made in
                self.counts = torch.zeros(len(COUNTS), dtype=torch.float64, device=length.device)
        self.counts.add_(added.sum(1))

    def to_dict(self) -> dict[str, Any]:
        """Plain data; waits for the device."""
        counts = (
            dict.fromkeys(COUNTS, 0.0) if self.counts is None else dict(zip(COUNTS, self.counts.tolist(), strict=True))
        )
        alpha = counts.pop("alpha")
        report: dict[str, Any] = {name: int(value) for name, value in counts.items()}
        report |= {"decoded_tokens": self.decoded_tokens, "prompt_tokens": self.prompt_tokens}
        return report | {"mean_alpha": alpha / counts["token_layers"] if counts["token_layers"] else None}

    def log(self, interval: float) -> None:
        """A line in vLLM's log, and vLLM's `/metrics`, at most every `interval` seconds, where tokens have been decoded
        since the last time."""
        now = time.monotonic()
        then, tokens = self._logged
        if now - then < interval or self.decoded_tokens == tokens:
            return
        self._logged = (now, self.decoded_tokens)
        found = self.to_dict()
        if metrics.is_wanted():
            self._exported = self._exported or Exported()
            self._exported.update(found, *map(str, self.process))
        if then:
            logger.info("%s", self.sentence(found))

    @staticmethod
    def sentence(found: dict[str, Any]) -> str:
        """What `to_dict` says, in words."""
        less = found["bytes_dense"] / found["bytes_read"] if found["bytes_read"] else 1.0
        share = found["sparse_token_layers"] / max(found["token_layers"], 1)
        return (
            f"SparQ: {found['decoded_tokens']:,} tokens decoded, {share:.0%} of their layers sparse, {less:.1f}x fewer "
            f"bytes of the cache read than dense, mean alpha {found['mean_alpha'] or 1.0:.3f}"
        )


TOTALS = Totals()


class WorkerExtension:
    """`--worker-extension-cls sparq.vllm.report.WorkerExtension`: `llm.collective_rpc("sparq_report")`."""

    def sparq_report(self) -> dict[str, Any]:
        """What this worker has done (`COUNTS`, and tokens)."""
        return TOTALS.to_dict()
