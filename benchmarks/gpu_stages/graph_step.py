"""A decode step that always reads and writes the same memory, replayed as a CUDA graph.

transformers compiles its static cache to get such a graph, which takes minutes; here the model's own code is captured,
stock and patched alike. On a CPU the step is called again instead: the same code on the same buffers, so that all but
the capture is tried where there is no GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from gpu_stages.clocks import captured
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from workload import relative_error

from sparq.cache_argument import cache_name
from sparq.static_cache import SparqStaticLayer

WARM_UP = 3  # eager steps: the first makes SparQ's index, the second is the first that only extends it
CHECKED = 2  # steps that are compared


class Step:
    """One token more for every row of a filled static cache, greedy: each call's token is the next one's input.

    How many tokens are cached is known to the cache's own tensors alone, and so is where the next one belongs; nothing
    is read back from the device.
    """

    def __init__(self, model: PreTrainedModel, cache: Cache, batch: int) -> None:
        self.model, self.cache = model, cache
        self.token = torch.ones(batch, 1, dtype=torch.long, device=model.device)
        self._arguments = {"input_ids": self.token, cache_name(type(model).forward): cache}

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """The logits [B, vocabulary] that the next token was chosen by."""
        logits = self.model(**self._arguments).logits[:, -1]
        self.token.copy_(logits.argmax(-1, keepdim=True))
        return logits

    def state(self) -> list[Tensor]:
        """What a step changes and does not write anew when it is made again."""
        held = [self.token]
        layers: list[Any] = self.cache.layers
        for layer in layers:
            held.append(layer.cumulative_length)
            if isinstance(layer, SparqStaticLayer) and layer.has_index:
                held += [layer._index.value_sum, layer._index.mask]
        return held


class Replay:
    """What a step does when it is captured, done again by each call."""

    def __init__(self, step: Step) -> None:
        self._step = step  # held: replays read and write its tensors, which the allocator would else give to others
        self._graph, self._logits = captured(step)

    def __call__(self) -> Tensor:
        self._graph.replay()
        return self._logits


def replayed(step: Step) -> Callable[[], Tensor]:
    """`step` as a graph, where there are such. It must be in its steady state, after `WARM_UP` eager calls: what the
    first ones do besides would be done by every replay."""
    return Replay(step) if step.token.device.type == "cuda" else step


def replay_error(step: Step, replay: Callable[[], Tensor], limit: float) -> str | None:
    """How replays differ from eager steps from the same state, or None. The cache is `CHECKED` tokens longer then."""
    before = [tensor.clone() for tensor in step.state()]
    tokens, expected = [], []
    for _ in range(CHECKED):
        tokens.append(step.token.clone())
        expected.append(step().clone())
    for tensor, held in zip(step.state(), before, strict=True):
        tensor.copy_(held)
    for number, (token, right) in enumerate(zip(tokens, expected, strict=True), 1):
        step.token.copy_(token)  # a tie may have been broken the other way
        error = relative_error(replay(), right)
        if not error < limit:
            return f"step {number} of a replay differs from the eager one by {error:.1e}"
    return None
