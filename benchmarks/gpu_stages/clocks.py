"""Times on a CUDA (or ROCm) device: eager calls, replays of a CUDA graph, a plain copy, each kernel of a call.

`Host` stands for the device in a dry run on a CPU: a graph is the calls themselves, made again, and every time is the
wall clock's, so that the same code runs there. Nothing of it is a measurement. All times are seconds.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

WARM_UP = 2  # rounds that are not counted
AMD_CACHE = 256 << 20  # its last-level cache, which L2_cache_size leaves out

R = TypeVar("R")
Call = Callable[[Any], Any]  # gives a tensor or several


@dataclass(frozen=True)
class Kernel:
    """Launches and seconds per call of the operator."""

    name: str
    launches: float
    seconds: float


class Device:
    def properties(self) -> dict[str, object]:
        """Device, driver and versions, as plain values for a JSON file."""
        device = torch.cuda.get_device_properties(torch.cuda.current_device())
        return {
            "device": device.name,
            "multiprocessors": device.multi_processor_count,
            "L2 bytes": device.L2_cache_size,
            "memory bytes": device.total_memory,
            "driver": _nvidia_driver(),
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
            "triton": _triton_version(),
        }

    def cache_bytes(self) -> int:
        """What the device may keep from one call to the next."""
        l2 = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        return max(l2, AMD_CACHE) if torch.version.hip else l2

    def free_bytes(self) -> int:
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def eager_times(self, call: Call, caches: Sequence[Any], walks: int, rounds: int) -> list[float]:
        """Of a call, by the wall clock, Python included: each value from `walks` walks over the caches, the calls one
        after the other, the device waited for at both ends."""
        times = []
        for _ in range(WARM_UP + rounds):
            self.synchronize()
            started = time.perf_counter()
            for _ in range(walks):
                for x in caches:
                    call(x)
            self.synchronize()
            times.append((time.perf_counter() - started) / (walks * len(caches)))
        return times[WARM_UP:]

    def graph(self, call: Call, caches: Sequence[Any], walks: int) -> Graph:
        return Graph(call, caches, walks)

    def noise(self) -> Callable[[], None]:
        """Begins a copy on a stream of its own, beside which a kernel's programs start and end in another order."""
        stream = torch.cuda.Stream()
        source, target = torch.empty((2, 128 << 20), dtype=torch.uint8, device="cuda")

        def begin() -> None:
            with torch.cuda.stream(stream):
                target.copy_(source)

        return begin

    def copy_bandwidth(self) -> float:
        """GB/s of a large copy on the device, bytes read and bytes written counted: the best of several."""
        # Random bytes: a device may move a constant faster than what anybody computes with.
        source = torch.randint(256, (min(4 << 30, self.free_bytes() // 4),), dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        return 2 * source.numel() / min(between_events(lambda: target.copy_(source), 10)) / 1e9

    def kernels(self, call: Call, caches: Sequence[Any], walks: int) -> list[Kernel]:
        """What a call runs on the device, the longest first."""
        for _ in range(2):  # starting the profiler can swallow the first kernels
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
                for _ in range(walks):
                    for x in caches:
                        call(x)
                torch.cuda.synchronize()
        found = kernels_of(profiler.key_averages(), walks * len(caches))
        if not found:
            raise RuntimeError("the profiler saw no kernel")
        return found


class Host(Device):
    def properties(self) -> dict[str, object]:
        return {"device": "CPU (dry run)"}

    def cache_bytes(self) -> int:
        return 1

    def free_bytes(self) -> int:
        return 1 << 30

    def synchronize(self) -> None:
        pass

    def graph(self, call: Call, caches: Sequence[Any], walks: int) -> Graph:
        return CallsAgain(call, caches, walks)

    def noise(self) -> Callable[[], None]:
        return lambda: None

    def copy_bandwidth(self) -> float:
        source = torch.randint(256, (1 << 24,), dtype=torch.uint8)
        started = time.perf_counter()
        source.clone()
        return 2 * source.numel() / (time.perf_counter() - started) / 1e9

    def kernels(self, call: Call, caches: Sequence[Any], walks: int) -> list[Kernel]:
        """One "kernel", the whole call."""
        return [Kernel("decode", 1, self.eager_times(call, caches, walks, rounds=1)[0])]


def clock_of(device: str) -> Device:
    return Device() if device == "cuda" else Host()


class Graph:
    """A CUDA graph of `walks` walks over the caches; `results` are what its calls write."""

    def __init__(self, call: Call, caches: Sequence[Any], walks: int) -> None:
        self._calls = walks * len(caches)
        self._graph, self.results = captured(
            lambda: flat(call(x) for _ in range(walks) for x in caches), before=lambda: call(caches[0])
        )

    def replay(self) -> None:
        self._graph.replay()

    def outputs(self) -> list[Tensor]:
        """Of one replay, of every call; poisoned before it."""
        poison(self.results)
        self.replay()
        torch.cuda.synchronize()
        return self.results

    def times(self, rounds: int) -> list[float]:
        """Of a call.  Replays are queued back to back, so that neither Python nor the start of the first counts."""
        return [seconds / self._calls for seconds in between_events(self.replay, rounds)]


class CallsAgain(Graph):
    """On the CPU."""

    def __init__(self, call: Call, caches: Sequence[Any], walks: int) -> None:
        self._run = lambda: flat(call(x) for _ in range(walks) for x in caches)
        self._calls = walks * len(caches)
        self.results = [tensor.clone() for tensor in self._run()]

    def replay(self) -> None:
        for kept, new in zip(self.results, self._run(), strict=True):
            kept.copy_(new)

    def outputs(self) -> list[Tensor]:
        poison(self.results)
        self.replay()
        return self.results

    def times(self, rounds: int) -> list[float]:
        replays = Host().eager_times(lambda _: self.replay(), [None], 1, rounds)
        return [seconds / self._calls for seconds in replays]


def between_events(work: Callable[[], object], rounds: int) -> list[float]:
    """Seconds that the device takes for each piece of work, all of them queued back to back."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(WARM_UP + rounds + 1)]
    for event in events[:-1]:
        event.record()
        work()
    events[-1].record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) / 1e3 for before, after in itertools.pairwise(events[WARM_UP:])]


def captured(call: Callable[[], R], before: Callable[[], object] = lambda: None) -> tuple[torch.cuda.CUDAGraph, R]:
    """A CUDA graph of a call, and the call's result, which every replay writes anew.  before: is done first, on the
    stream of the capture."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    pool = torch.cuda.graph_pool_handle()
    try:
        # This context also puts the current stream back after a failed capture, which torch.cuda.graph does not.
        with torch.cuda.stream(stream):
            before()
            with torch.cuda.graph(graph, pool=pool, stream=stream):
                result = call()
    except Exception:
        # Nor does it tell the allocator that the capture is over, and every later one would fail too.
        with contextlib.suppress(Exception):
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
        raise
    torch.cuda.current_stream().wait_stream(stream)
    return graph, result


def flat(results: Iterable[Tensor | Sequence[Tensor]]) -> list[Tensor]:
    """Of calls that give a tensor or several."""
    return [tensor for result in results for tensor in ((result,) if isinstance(result, Tensor) else result)]


def poison(tensors: Iterable[Tensor]) -> None:
    """With what no call gives, so that one which writes nothing is noticed."""
    for tensor in tensors:
        tensor.fill_(float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).min)


def kernels_of(averages: Iterable[Any], calls: int) -> list[Kernel]:
    """From the profiler's averages over so many calls."""
    found = [
        Kernel(event.key, event.count / calls, event.self_device_time_total / calls / 1e6)
        for event in averages
        if event.device_type == DeviceType.CUDA and event.self_device_time_total > 0
    ]
    return sorted(found, key=lambda kernel: -kernel.seconds)


def _nvidia_driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return output.split("\n")[0].strip() or None


def _triton_version() -> str | None:
    try:
        return str(importlib.import_module("triton").__version__)
    except ImportError:
        return None
