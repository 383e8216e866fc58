"""Times on a CUDA (or ROCm) device: eager calls, replays of a CUDA graph, a plain copy, each kernel of a call."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

WARM_UP = 2  # rounds that are not counted
AMD_CACHE = 256 << 20  # its last-level cache, which L2_cache_size leaves out

T = TypeVar("T")
R = TypeVar("R")


def properties() -> dict[str, object]:
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


def cache_bytes() -> int:
    """What the device may keep from one call to the next."""
    l2 = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return max(l2, AMD_CACHE) if torch.version.hip else l2


def free_bytes() -> int:
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def synchronize() -> None:
    torch.cuda.synchronize()


def eager_times(
    call: Callable[[T], Tensor],
    caches: Sequence[T],
    walks: int,
    rounds: int,
    wait: Callable[[], None] = synchronize,
) -> list[float]:
    """Microseconds per call, by the wall clock, Python included: each value from `walks` walks over the caches, the
    calls one after the other, the device waited for at both ends."""
    times = []
    for _ in range(WARM_UP + rounds):
        wait()
        started = time.perf_counter()
        for _ in range(walks):
            for x in caches:
                call(x)
        wait()
        times.append(1e6 * (time.perf_counter() - started) / (walks * len(caches)))
    return times[WARM_UP:]


def flat(results: Iterable[Tensor | Sequence[Tensor]]) -> list[Tensor]:
    """Of calls that give a tensor or several."""
    return [tensor for result in results for tensor in ((result,) if isinstance(result, Tensor) else result)]


def poison(tensors: Iterable[Tensor]) -> None:
    """With what no call gives, so that one which writes nothing is noticed."""
    for tensor in tensors:
        tensor.fill_(float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).min)


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


class Replay(Generic[T]):
    """A CUDA graph of `walks` walks over the caches; `results` are what its calls write."""

    def __init__(self, call: Callable[[T], Tensor | Sequence[Tensor]], caches: Sequence[T], walks: int) -> None:
        self._graph, self.results = captured(
            lambda: flat(call(x) for _ in range(walks) for x in caches), before=lambda: call(caches[0])
        )
        self._calls = walks * len(caches)

    def replay(self) -> None:
        self._graph.replay()

    def outputs(self) -> list[Tensor]:
        """Of one replay, of every call; poisoned before it."""
        poison(self.results)
        self._graph.replay()
        torch.cuda.synchronize()
        return self.results

    def times(self, rounds: int) -> list[float]:
        """Microseconds per call.  Replays are queued back to back with an event between any two, so that neither
        Python nor the start of the first is in the times."""
        events = [torch.cuda.Event(enable_timing=True) for _ in range(WARM_UP + rounds + 1)]
        for event in events[:-1]:
            event.record()
            self._graph.replay()
        events[-1].record()
        torch.cuda.synchronize()
        pairs = itertools.pairwise(events[WARM_UP:])
        return [1e3 * before.elapsed_time(after) / self._calls for before, after in pairs]


class Noise:
    """Copies on a stream of their own, beside which a kernel's programs start and end in another order."""

    def __init__(self, megabytes: int = 128) -> None:
        self._stream = torch.cuda.Stream()
        self._source, self._target = torch.empty((2, megabytes << 20), dtype=torch.uint8, device="cuda")

    def begin(self) -> None:
        with torch.cuda.stream(self._stream):
            self._target.copy_(self._source)


def copy_bandwidth(gigabytes: int = 4, repeats: int = 10) -> float:
    """GB/s of a large copy on the device, bytes read and bytes written counted: the best of several."""
    room = free_bytes() // 4
    # Random bytes: a device may move a constant faster than what anybody computes with.
    source = torch.randint(256, (min(gigabytes << 30, room),), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(WARM_UP + repeats + 1)]
    for event in events[:-1]:
        event.record()
        target.copy_(source)
    events[-1].record()
    torch.cuda.synchronize()
    fastest = min(before.elapsed_time(after) for before, after in itertools.pairwise(events[WARM_UP:]))
    return 2 * source.numel() / fastest / 1e6


@dataclass(frozen=True)
class Kernel:
    """Launches and microseconds per call of the operator."""

    name: str
    launches: float
    us: float


def kernels(call: Callable[[T], Tensor], caches: Sequence[T], walks: int) -> list[Kernel]:
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


def kernels_of(averages: Iterable[Any], calls: int) -> list[Kernel]:
    """From the profiler's averages over so many calls."""
    found = [
        Kernel(event.key, event.count / calls, event.self_device_time_total / calls)
        for event in averages
        if event.device_type == DeviceType.CUDA and event.self_device_time_total > 0
    ]
    return sorted(found, key=lambda kernel: -kernel.us)


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
