"""What a patched model has done, counted layer by layer: by Python, or on the device where only that can know."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparq.reasons import OTHER_REASON, REASONS

# What a sparse step adds, in this order; then come the doubts about a step, then a count for each reason.
COUNTS = ("sparse_steps", "positions_cached", "positions_read", "bytes_read", "bytes_dense", "alpha_count")
DOUBTS = ("other_sums", "ignored_biases")
SLOTS = (*COUNTS, *DOUBTS, *REASONS)


class SparseStep(NamedTuple):
    """What one layer's sparse step adds."""

    layer: int
    dtype: torch.dtype  # of the layer's keys
    alpha: Tensor  # its score mass, of every row, head and query
    counts: tuple[int, ...] | Tensor  # of COUNTS; int64 [len(COUNTS)] where the device alone knows them
    read: Tensor | None = (
        None  # int32 [B, Hkv, Q], the positions read in full; None: `counts` has them, and their bytes
    )
    bytes_each: int = 0  # of such a position in one KV head
    mean_is_stale: Tensor | None = None  # the doubts, which the device alone knows: bool [], None where there is none
    ignored_bias: Tensor | None = None


@dataclass
class LayerStats:
    """One layer's decode steps (forward passes with one new token on a non-empty cache, or some; drafts in slices).

    Positions and bytes are summed over batch rows and steps. Bytes are those of K and V, counted by the formula of the
    paper: dense 2·S·d, SparQ S·r + 2·k·d + 4·d elements per KV head. S is the number of valid positions in a sparse
    step, of all cached ones in a dense step, which reads the padding too; k is what the operator says that it has read,
    on average over the KV heads. Of a four-bit index half a byte is read in place of an element, and two elements for
    each group of positions.
    """

    sparse_steps: int = 0
    dense_steps: Counter[str] = field(default_factory=Counter)  # by reason
    positions_cached: int = 0  # in sparse steps
    positions_read: int = 0  # in sparse steps, in full
    bytes_read: int = 0
    bytes_dense: int = 0
    alpha_sum: Tensor | None = None
    alpha_count: int = 0
    other_sums: int = 0  # steps that blended in the mean over other positions than their mask says
    ignored_biases: int = 0  # sparse steps under a mask with a bias, or not a causal one

    @property
    def decode_steps(self) -> int:
        return self.sparse_steps + self.dense_steps.total()

    def add(self, counts: tuple[int, ...]) -> None:
        """counts: of COUNTS."""
        steps, cached, read, bytes_read, bytes_dense, alphas = counts
        self.sparse_steps += steps
        self.positions_cached += cached
        self.positions_read += read
        self.bytes_read += bytes_read
        self.bytes_dense += bytes_dense
        self.alpha_count += alphas

    def add_alpha(self, alpha_sum: Tensor) -> None:
        self.alpha_sum = alpha_sum if self.alpha_sum is None else self.alpha_sum.to(alpha_sum.device) + alpha_sum

    def plus(self, device: DeviceStats) -> LayerStats:
        """The sum of both; waits for the device."""
        counts = device.to_dict()
        sums = replace(self, dense_steps=self.dense_steps.copy())
        for name in (*COUNTS, *DOUBTS):
            setattr(sums, name, getattr(sums, name) + counts[name])
        sums.dense_steps += Counter({reason: counts[reason] for reason in REASONS if counts[reason]})
        if counts["alpha_count"]:
            sums.add_alpha(device.alpha.clone())
        return sums


class DeviceStats:
    """Counts of one layer that are kept on its device: a compiled graph can add to them, and no step waits for them.

    counts: int64 [len(SLOTS)].  alpha: float64 [] (float32 on MPS, which has no other), the sum of all α.  Both are
    added to in place, never replaced."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.dtype = dtype  # of the layer's keys
        with torch.inference_mode(False):  # they outlive the block that they are made in
            self.counts = torch.zeros(len(SLOTS), dtype=torch.int64, device=device)
            precise = torch.float32 if device.type == "mps" else torch.float64
            self.alpha = torch.zeros((), dtype=precise, device=device)
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(self.counts)
            torch._dynamo.mark_static_address(self.alpha)

    def dense(self, reason: str, bytes_dense: int, steps: int = 1) -> None:
        # add_, not +=, which would copy what it has added to onto itself
        self.counts[SLOTS.index(reason if reason in REASONS else OTHER_REASON)].add_(steps)
        self.counts[SLOTS.index("bytes_read") : SLOTS.index("bytes_dense") + 1].add_(bytes_dense)

    def to_dict(self) -> dict[str, int]:
        """The counts, read back from the device, by slot."""
        return dict(zip(SLOTS, self.counts.tolist(), strict=True))


class Stats:
    """Of all layers of one patched model; several threads may generate with it."""

    def __init__(self) -> None:
        self.layers: dict[int, LayerStats] = {}  # counted by Python
        self.on_device: dict[int, DeviceStats] = {}  # counted on the device, besides
        # Of steps that Python has counted, by layers: each one's sum of α, left on its device, for which nobody waits.
        self.alphas: dict[tuple[int, ...], Tensor] = {}
        # Likewise: the positions that each layer has read, summed over its KV heads, whose number and whose bytes for
        # such a position stand beside the layers.
        self.reads: dict[tuple[tuple[int, ...], int, int], Tensor] = {}
        self.sparse_on: set[tuple[torch.device, torch.dtype]] = set()  # where and in what sparse steps were made
        self.cache_bytes = 0  # the most that one cache has held
        self.remade = 0  # indices made anew, because others had changed a layer
        self.uncached_tokens = 0  # of the pass before, if it had no cache
        self._warned: set[str] = set()
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: dict) -> Stats:
        return Stats()  # a copied model starts counting anew

    def __reduce__(self) -> tuple:
        return Stats, ()

    def warn_once(self, message: str, about: str | None = None) -> None:
        """about: what one warning is enough of, where its words depend on more."""
        about = message if about is None else about
        if torch.compiler.is_compiling():
            return  # a graph cannot warn; the report says it
        with self._lock:
            if about in self._warned:
                return
            self._warned.add(about)
        warnings.warn(message, stacklevel=2)

    def cache(self, held: int, remade: int) -> None:
        """held: bytes that a cache holds; remade: how often an index of it was made anew in this pass."""
        if remade or held > self.cache_bytes:
            with self._lock:
                self.remade += remade
                self.cache_bytes = max(self.cache_bytes, held)

    def prepare(self, layer: int, device: torch.device, dtype: torch.dtype) -> None:
        """Make what counts a layer on `device`; a compiled graph that finds it there is not compiled twice."""
        with self._locked():
            found = self.on_device.get(layer)
            if found is not None and found.counts.device == device:
                return
            if found is not None:  # the model has been moved
                self.layers[layer] = self.layers.get(layer, LayerStats()).plus(found)
            self.on_device[layer] = DeviceStats(device, dtype)

    def dense(self, layer: int, reason: str, bytes_dense: int, steps: int = 1) -> None:
        """bytes_dense: of all `steps` together."""
        if torch.compiler.is_compiling():  # a number of Python's would have to be changed by the graph
            self.on_device[layer].dense(reason, bytes_dense, steps)
            return
        with self._lock:
            stats = self._layer(layer)
            stats.dense_steps[reason] += steps
            stats.bytes_read += bytes_dense
            stats.bytes_dense += bytes_dense

    def sparse(self, steps: list[SparseStep]) -> None:
        """The sparse steps of one pass, when all layers have made theirs: a few kernels for all, not for each."""
        known = [step for step in steps if not isinstance(step.counts, Tensor)]
        unknown = [step for step in steps if isinstance(step.counts, Tensor)]
        with self._locked():
            for alike in _alike(known):
                self._add(alike)
            for alike in _alike(unknown):
                self._add_on_device(alike)

    def _add(self, steps: list[SparseStep]) -> None:
        for step in steps:
            self.sparse_on.add((step.alpha.device, step.dtype))
            assert isinstance(step.counts, tuple)
            self._layer(step.layer).add(step.counts)
            if step.mean_is_stale is not None:
                _add_doubts([self.on_device[step.layer]], [step.mean_is_stale], SLOTS.index("other_sums"))
        layers = tuple([step.layer for step in steps])
        # detached: with its graph, every step of a model run without no_grad would stay alive
        sums = torch.stack([step.alpha.detach() for step in steps]).flatten(1).sum(1)
        _add_to(self.alphas, layers, sums)
        read = _sum_of_reads(steps)
        if read is not None:
            _add_to(self.reads, (layers, steps[0].read.shape[1], steps[0].bytes_each), read)  # type: ignore[union-attr]

    def _add_on_device(self, steps: list[SparseStep]) -> None:
        own = [self.on_device[step.layer] for step in steps]
        counts = [step.counts for step in steps if isinstance(step.counts, Tensor)]  # of all of them
        torch._foreach_add_([each.counts[: len(COUNTS)] for each in own], counts)
        sums = torch.stack([step.alpha.detach() for step in steps]).flatten(1).sum(1, dtype=own[0].alpha.dtype)
        torch._foreach_add_([each.alpha for each in own], list(sums.unbind()))
        read = _sum_of_reads(steps)
        if read is not None:
            heads, bytes_each = steps[0].read.shape[1], steps[0].bytes_each  # type: ignore[union-attr]
            for slot, added in (("positions_read", read // heads), ("bytes_read", read * bytes_each)):
                at = SLOTS.index(slot)
                torch._foreach_add_([each.counts[at] for each in own], list(added.unbind()))
        _add_doubts(own, [step.mean_is_stale for step in steps], SLOTS.index("other_sums"))
        _add_doubts(own, [step.ignored_bias for step in steps], SLOTS.index("ignored_biases"))

    def _layer(self, layer: int) -> LayerStats:
        stats = self.layers.get(layer)
        if stats is None:
            stats = self.layers[layer] = LayerStats()
        return stats

    def _locked(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if torch.compiler.is_compiling() else self._lock

    def used(self) -> set[tuple[torch.device, torch.dtype]]:
        """Where and in what sparse steps were made; waits for the devices."""
        with self._lock:
            on_device = list(self.on_device.values())
        return self.sparse_on | {(d.counts.device, d.dtype) for d in on_device if d.to_dict()["sparse_steps"]}

    def settled(self) -> dict[int, LayerStats]:
        """Every layer that has made a decode step, with what was counted on its device."""
        with self._lock:
            layers = {index: replace(layer) for index, layer in self.layers.items()}
            for indices, sums in self.alphas.items():
                for index, alpha_sum in zip(indices, sums.cpu(), strict=True):  # layers may lie on several devices
                    layers[index].add_alpha(alpha_sum)
            for (indices, heads, bytes_each), sums in self.reads.items():
                for index, read in zip(indices, sums.tolist(), strict=True):
                    layers[index].positions_read += read // heads
                    layers[index].bytes_read += read * bytes_each
            for index, device in self.on_device.items():
                layers[index] = layers.get(index, LayerStats()).plus(device)
        return {index: layer for index, layer in sorted(layers.items()) if layer.decode_steps}


def _add_to(sums: dict[Any, Tensor], key: Any, added: Tensor) -> None:
    before = sums.get(key)
    sums[key] = added if before is None else before.to(added.device) + added  # the model may have moved


def _sum_of_reads(steps: list[SparseStep]) -> Tensor | None:
    """int64 [steps]; None where the counts have them already."""
    read = [step.read for step in steps if step.read is not None]
    return torch.stack(read).flatten(1).sum(1) if read else None


def _alike(steps: list[SparseStep]) -> list[list[SparseStep]]:
    """Steps that can be added together: of different layers, their α of one shape on one device. Others are alone."""
    if len(steps) < 2:
        return [[step] for step in steps]
    layers = [step.layer for step in steps]
    kinds = [
        (step.alpha.shape, step.alpha.device, None if step.read is None else step.read.shape, step.bytes_each)
        for step in steps
    ]
    if len(set(layers)) == len(layers) and kinds.count(kinds[0]) == len(kinds):
        return [steps]
    return [[step] for step in steps]


def _add_doubts(stats: list[DeviceStats], doubts: list[Tensor | None], slot: int) -> None:
    slots, added = [], []
    for each, doubt in zip(stats, doubts, strict=True):
        if doubt is not None:
            slots.append(each.counts[slot])
            added.append(doubt)
    if added:
        torch._foreach_add_(slots, list(torch.stack(added).to(torch.int64).unbind()))
