"""Where the time of a decode step goes, by timers around its parts (on a CPU, where a call is over when it returns)."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

from torch import nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from ways import Runner

PARTS = ("attention", "cache update", "linear layers", "rest of the model", "generate")


class Timers:
    """Seconds by part; a part that runs inside another one is counted as its own, and not as the other's."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._inside: list[float] = []  # of each timer that runs: what timers within it have taken

    def around(self, part: str, function: Callable) -> Callable:
        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._inside.append(0.0)
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                taken = time.perf_counter() - started
                self.seconds[part] += taken - self._inside.pop()
                if self._inside:
                    self._inside[-1] += taken

        return timed


@contextmanager
def shadowed(holder: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute of the instance in place of the method of its class."""
    setattr(holder, name, value)
    try:
        yield
    finally:
        delattr(holder, name)


@contextmanager
def registered(implementation: str, function: Callable) -> Iterator[None]:
    own = ALL_ATTENTION_FUNCTIONS[implementation]
    AttentionInterface.register(implementation, function)
    try:
        yield
    finally:
        AttentionInterface.register(implementation, own)


def profile(runner: Runner, tokens: int) -> dict[str, float]:
    """Median seconds of a decode step of `generate`, by part (`PARTS`), from `tokens` steps that nothing else counts.

    `generate` is what is neither of the model's: choosing the token, stopping criteria, preparing inputs. The rest of
    the model is norms, activations, rotary positions, masks, residual sums, hooks and Python.
    """
    steps: list[dict[str, float]] = []
    timers = Timers()
    ended = time.perf_counter()
    forward = timers.around("rest of the model", runner.model.forward)

    def step(*args: Any, **kwargs: Any) -> Any:
        nonlocal ended
        before = dict(timers.seconds)
        outside = time.perf_counter() - ended
        output = forward(*args, **kwargs)
        ended = time.perf_counter()
        taken = {part: timers.seconds[part] - before[part] for part in PARTS}
        steps.append({**taken, "generate": outside})
        return output

    # `generate` asks which arguments `forward` takes
    step = wraps(runner.model.forward)(step)
    implementation = runner.model.config.get_text_config(decoder=True)._attn_implementation
    with ExitStack() as undo:
        undo.enter_context(shadowed(runner.model, "forward", step))
        undo.enter_context(shadowed(runner.cache, "update", timers.around("cache update", runner.cache.update)))
        for module in runner.model.modules():
            if isinstance(module, nn.Linear):
                undo.enter_context(shadowed(module, "forward", timers.around("linear layers", module.forward)))
        attention = timers.around("attention", ALL_ATTENTION_FUNCTIONS[implementation])
        undo.enter_context(registered(implementation, attention))
        runner.decode(tokens)
    counted = steps[1:]  # `generate` sets itself up before the first
    return {part: statistics.median(step[part] for step in counted) for part in PARTS}
