"""Times the decode steps inside `generate`."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria


class DecodeClock(StoppingCriteria):
    """Give this to `generate` as a stopping criterion that never stops: it notes the time after every token.

    Args:
        on_token: called after every token with the number of tokens so far (for a progress bar).
    """

    def __init__(self, on_token: Callable[[int], None] | None = None) -> None:
        self.times: list[float] = []
        self._on_token = on_token

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if input_ids.device.type == "cuda":
            torch.cuda.synchronize(input_ids.device)
        self.times.append(time.perf_counter())
        if self._on_token is not None:
            self._on_token(len(self.times))
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    def decode_seconds(self) -> list[float]:
        """Seconds of each decode step: the time between one token and the next (the first comes from the prompt)."""
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)]
