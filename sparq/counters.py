"""What a patched model has done: steps, positions and bytes, counted layer by layer."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from sparq.reasons import REASONS
from sparq.totals import DOUBTS, SPARSE, SparseStep, Totals, add_sparse


@dataclass
class LayerCounters:
    """One layer's decode steps (forward passes with one new token on a non-empty cache, or some; drafts in slices).

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
    alpha_sum: Tensor | None = None
    alpha_count: int = 0
    other_sums: int = 0  # steps that blended in the mean over other positions than their mask says
    ignored_biases: int = 0  # sparse steps under a mask with a bias, or not a causal one

    @property
    def decode_steps(self) -> int:
        return self.sparse_steps + self.dense_steps.total()

    def plus(self, totals: Totals) -> LayerCounters:
        """The sum of both; waits for the device."""
        counts = totals.to_dict()
        sums = replace(self, dense_steps=self.dense_steps.copy())
        for name in (*SPARSE, *DOUBTS):
            setattr(sums, name, getattr(sums, name) + counts[name])
        sums.dense_steps += Counter({reason: counts[reason] for reason in REASONS if counts[reason]})
        if counts["alpha_count"]:
            alpha = totals.alpha.clone()
            sums.alpha_sum = alpha if sums.alpha_sum is None else sums.alpha_sum.to(alpha.device) + alpha
        return sums


class Counters:
    """Counters of all layers of one patched model; several threads may generate with it."""

    def __init__(self) -> None:
        self.layers: dict[int, LayerCounters] = {}  # counted by Python
        self.totals: dict[int, Totals] = {}  # counted on the device, besides
        self.sparse_on: set[tuple[torch.device, torch.dtype]] = set()  # where and in what sparse steps were made
        # Left on their device: reading a sum back would wait for the step. By layers, each one's sum of α.
        self._alphas: dict[tuple[int, ...], Tensor] = {}
        self.cache_bytes = 0  # the most that one cache has held
        self.remade = 0  # indices made anew, because others had changed a layer
        self.uncached_tokens = 0  # of the pass before, if it had no cache
        self._warned: set[str] = set()
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: dict) -> Counters:
        return Counters()  # a copied model starts counting anew

    def __reduce__(self) -> tuple:
        return Counters, ()

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
        if remade:
            with self._lock:
                self.remade += remade
        if held > self.cache_bytes:
            with self._lock:
                self.cache_bytes = max(self.cache_bytes, held)

    def _layer(self, layer: int) -> LayerCounters:
        counters = self.layers.get(layer)
        if counters is None:
            counters = self.layers[layer] = LayerCounters()
        return counters

    def dense(self, layer: int, reason: str, bytes_dense: int) -> None:
        with self._lock:
            counters = self._layer(layer)
            counters.dense_steps[reason] += 1
            counters.bytes_read += bytes_dense
            counters.bytes_dense += bytes_dense

    def prepare(self, layer: int, device: torch.device, dtype: torch.dtype) -> None:
        """Make a layer's totals on `device`; a compiled graph that finds them there is not compiled twice."""
        with self._locked():
            totals = self.totals.get(layer)
            if totals is not None and totals.counts.device == device:
                return
            if totals is not None:  # the model has been moved
                self.layers[layer] = self.layers.get(layer, LayerCounters()).plus(totals)
            self.totals[layer] = Totals(device, dtype)

    def dense_on_device(self, layer: int, reason: str, bytes_dense: int) -> None:
        """As `dense`, without a number of Python's that a compiled graph would have to change."""
        with self._locked():
            self.totals[layer].dense(reason, bytes_dense)

    def sparse_on_device(self, steps: list[SparseStep]) -> None:
        """The sparse steps of one pass, with numbers that only the device knows."""
        if steps:
            with self._locked():
                add_sparse(self.totals, steps)

    def _locked(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if torch.compiler.is_compiling() else self._lock

    def used(self) -> set[tuple[torch.device, torch.dtype]]:
        """Where and in what sparse steps were made; waits for the devices."""
        with self._lock:
            totals = list(self.totals.values())
        on_device = {(t.counts.device, t.dtype) for t in totals if t.to_dict()["sparse_steps"]}
        return self.sparse_on | on_device

    def settled(self) -> dict[int, LayerCounters]:
        """Every layer that has made a decode step, with what was counted on its device."""
        with self._lock:
            layers = {index: replace(layer) for index, layer in self.layers.items()}
            for indices, sums in self._alphas.items():
                for index, alpha_sum in zip(indices, sums.cpu(), strict=True):  # layers may lie on several devices
                    layer = layers[index]
                    layer.alpha_sum = alpha_sum if layer.alpha_sum is None else layer.alpha_sum.cpu() + alpha_sum
            for index, totals in self.totals.items():
                layers[index] = layers.get(index, LayerCounters()).plus(totals)
        return {index: layer for index, layer in sorted(layers.items()) if layer.decode_steps}

    def sparse(
        self,
        layer: int,
        device: torch.device,
        dtype: torch.dtype,
        positions_cached: int,
        positions_read: int,
        bytes_read: int,
        bytes_dense: int,
    ) -> None:
        with self._lock:
            self.sparse_on.add((device, dtype))
            counters = self._layer(layer)
            counters.sparse_steps += 1
            counters.positions_cached += positions_cached
            counters.positions_read += positions_read
            counters.bytes_read += bytes_read
            counters.bytes_dense += bytes_dense

    def alphas(self, step: list[tuple[int, Tensor]]) -> None:
        """The layers' α of one step, all at once: a sum of its own for each would be two more kernels a layer."""
        alike: dict[tuple[torch.device, torch.Size], list[tuple[int, Tensor]]] = defaultdict(list)
        for layer, alpha in step:
            # with its graph, every step of a model run without no_grad would stay alive
            alike[alpha.device, alpha.shape].append((layer, alpha.detach()))
        for found in alike.values():
            layers = tuple(layer for layer, _ in found)
            sums = torch.stack([alpha for _, alpha in found]).flatten(1).sum(1)
            with self._lock:
                before = self._alphas.get(layers)
                self._alphas[layers] = sums if before is None else before.to(sums.device) + sums  # it may have moved
                for layer, alpha in found:
                    self.layers[layer].alpha_count += alpha.numel()
