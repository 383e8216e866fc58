"""What stands for `device_time` where there is no device: the same names, so that the same code runs on a CPU.

A graph is the calls themselves, made again, and every time is the wall clock's. Nothing here is a measurement."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import device_time
import torch
from device_time import Kernel, flat, poison
from torch import Tensor

T = TypeVar("T")


def properties() -> dict[str, object]:
    return {"device": "CPU (dry run)"}


def cache_bytes() -> int:
    return 1


def free_bytes() -> int:
    return 1 << 30


def synchronize() -> None:
    pass


def eager_times(call: Callable[[T], Tensor], caches: Sequence[T], walks: int, rounds: int) -> list[float]:
    return device_time.eager_times(call, caches, walks, rounds, wait=synchronize)


class Replay(Generic[T]):
    def __init__(self, call: Callable[[T], Tensor | Sequence[Tensor]], caches: Sequence[T], walks: int) -> None:
        self._calls = [(call, x) for _ in range(walks) for x in caches]
        self.results = [tensor.clone() for tensor in self._run()]

    def _run(self) -> list[Tensor]:
        return flat(call(x) for call, x in self._calls)

    def replay(self) -> None:
        for kept, new in zip(self.results, self._run(), strict=True):
            kept.copy_(new)

    def outputs(self) -> list[Tensor]:
        poison(self.results)
        self.replay()
        return self.results

    def times(self, rounds: int) -> list[float]:
        times = []
        for _ in range(rounds):
            started = time.perf_counter()
            self.replay()
            times.append(1e6 * (time.perf_counter() - started) / len(self._calls))
        return times


class Noise:
    def begin(self) -> None:
        pass


def copy_bandwidth() -> float:
    source = torch.randint(256, (1 << 24,), dtype=torch.uint8)
    started = time.perf_counter()
    source.clone()
    return 2 * source.numel() / (time.perf_counter() - started) / 1e9


def kernels(call: Callable[[T], Tensor], caches: Sequence[T], walks: int) -> list[Kernel]:
    """One "kernel", the whole call."""
    return [Kernel("decode", 1, eager_times(call, caches, walks, rounds=1)[0])]
