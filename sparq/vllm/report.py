"""What SparQ has done in one process of an engine: for the log, for `/metrics`, and for who asks."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

import torch
from sparq_kernels import GROUP, Cached
from sparq_kernels.operator import DecodeOutput
from torch import Tensor

from sparq.index import KINDS
from sparq.vllm import metrics

if TYPE_CHECKING:
    from sparq.vllm.batch import Decodes

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
        self._exported: metrics.Exported | None = None

    def step(self, decoded: int, tokens: int) -> None:
        """A step of the engine with so many tokens, `decoded` of them by the operator."""
        self.decoded_tokens += decoded
        self.prompt_tokens += tokens - decoded

    def layer(self, result: DecodeOutput, cached: Cached, decodes: Decodes, index: str, r: int, least: int) -> None:
        """One layer of it: what the operator gave for rows [T, ...]. Shorter ones than `least` are dense."""
        _, heads, _, head_dim = cached.key.shape
        size, length = cached.key.element_size(), decodes.length
        # A graph that is replayed counts other lengths each time: it has to hold what its own layers share.
        recorded = length.is_cuda and torch.cuda.is_current_stream_capturing()
        shape = heads, head_dim, size, index, r, least, recorded
        known = decodes.counted.get(shape)
        if known is None:
            known = decodes.counted[shape] = _known_before(length, *shape[:-1])
        counts, per_row = known
        of_rows = torch.cat((result.alpha.mean((1, 2)).double(), result.read.sum((1, 2)).double()))
        if self.counts is None:
            with torch.inference_mode(False):  # they outlive the block that they are made in
                self.counts = torch.zeros(len(COUNTS), dtype=torch.float64, device=length.device)
        self.counts.add_(torch.addmv(counts, per_row, of_rows))

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
            self._exported = self._exported or metrics.Exported()
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


def _known_before(
    length: Tensor, heads: int, head_dim: int, size: int, index: str, r: int, least: int
) -> tuple[Tensor, Tensor]:
    """What the lengths alone say of a layer. float64 [C], in the order of COUNTS: what does not depend on its reads.
    [C, 2 T]: by what each row's mean alpha, and then the positions that each row reads, are multiplied."""
    valid = length.double()
    exists = (length > 0).double()
    sparse = exists * (length >= least)
    dense_bytes = 2 * head_dim * size * heads * valid
    of_index = heads * (KINDS[index].bytes_read(valid, valid % GROUP, r, size) + 4 * head_dim)
    none = torch.zeros_like(valid)
    index_or_all = torch.where(sparse > 0, of_index, dense_bytes)
    counts = torch.stack((exists, sparse, none, heads * valid, none, dense_bytes, index_or_all)).sum(1)
    by_alpha = torch.stack((none, none, exists, none, none, none, none))
    by_read = torch.stack((none, none, none, none, exists, none, 2 * head_dim * size * sparse))
    return counts, torch.cat((by_alpha, by_read), 1)


TOTALS = Totals()


class WorkerExtension:
    """`--worker-extension-cls sparq.vllm.report.WorkerExtension`: `llm.collective_rpc("sparq_report")`."""

    def sparq_report(self) -> dict[str, Any]:
        """What this worker has done (`COUNTS`, and tokens)."""
        return TOTALS.to_dict()
