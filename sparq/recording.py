"""What sparse steps have attended, as `sparq.record` gives it: positions, by layer and KV head, step by step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Recording:
    """What the sparse steps of a model have read; dense ones are not in it (`sparq.report` says why they were dense).

    Attributes:
        positions: of each layer that had a sparse step, one int64 tensor [B, Hkv, Q, k] on the CPU for each of these
            steps: the positions of the cache that the Q new tokens attended, padding in front counted, in ascending
            order. Where fewer than k were attended, -1 fills the rest.
        cached: of each such layer and step, how many positions the cache held with the new tokens; a static cache's
            size.
    """

    positions: dict[int, list[Tensor]] = field(default_factory=dict)
    cached: dict[int, list[int]] = field(default_factory=dict)

    def add(self, layer: int, positions: Tensor, cached: int) -> None:
        """positions: as the operator gives them, [B, Hkv, Q, k_max], of which the last slots may all be unused."""
        used = int((positions >= 0).sum(-1).max()) if positions.numel() else 0
        self.positions.setdefault(layer, []).append(positions[..., :used].cpu())
        self.cached.setdefault(layer, []).append(cached)

    def counts(self, layer: int) -> Tensor:
        """How many new tokens have attended each position in that layer: int64 [B, Hkv, S], of the largest cache of its
        steps.

        Raises:
            KeyError: that layer had no sparse step.
            ValueError: its steps were of batches of different sizes.
        """
        steps = self._steps(layer)
        shapes = sorted({tuple(step.shape[:2]) for step in steps})
        if len(shapes) > 1:
            raise ValueError(f"layer {layer} must have had steps of one batch, got [batch, KV heads] of {shapes}")
        return sum(_attended(step, max(self.cached[layer])).sum(2) for step in steps)  # type: ignore[return-value]

    def plot(self, row: int = 0) -> Any:
        """A matplotlib figure: of each layer the positions that one row of the batch has attended, one line for each
        new token, downwards; the darker, the more KV heads have attended it.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: there was no sparse step.
        """
        from matplotlib.figure import Figure

        if not self.positions:
            raise ValueError("there must be a sparse step to plot, and there was none: sparq.report(model) says why")
        layers = sorted(self.positions)
        figure = Figure(figsize=(9, 1 + 1.2 * len(layers)), layout="constrained")
        for axes, layer in zip(figure.subplots(len(layers), sharex=True, squeeze=False)[:, 0], layers, strict=True):
            size = max(self.cached[layer])
            lines = [_attended(step[row : row + 1], size)[0].float().mean(0) for step in self._steps(layer)]
            axes.imshow(torch.cat(lines).numpy(), aspect="auto", cmap="Greys", vmin=0, vmax=1, interpolation="nearest")
            axes.set_ylabel(f"layer {layer}")
        axes.set_xlabel("cached position")
        return figure

    def _steps(self, layer: int) -> list[Tensor]:
        if layer not in self.positions:
            raise KeyError(f"layer {layer} had no sparse step; those that had are {sorted(self.positions)}")
        return self.positions[layer]


def _attended(positions: Tensor, size: int) -> Tensor:
    """int64 [B, Hkv, Q, size], 1 at each of these positions, for [B, Hkv, Q, k] of them."""
    counts = torch.zeros(*positions.shape[:3], size + 1, dtype=torch.int64)
    return counts.scatter_(3, torch.where(positions < 0, size, positions), 1)[..., :-1]
