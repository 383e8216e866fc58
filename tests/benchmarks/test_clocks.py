"""The parts of the device's clockwork that need no device."""

import contextlib
import itertools
from types import SimpleNamespace

import pytest
import torch
from gpu_stages import clocks
from gpu_stages.clocks import CallsAgain, Graph, Host, kernels_of
from torch.autograd import DeviceType


def event(key, count, us, device=DeviceType.CUDA):
    return SimpleNamespace(key=key, count=count, self_device_time_total=us, device_type=device)


def test_kernels_per_call_longest_first():
    averages = [
        event("gather", 20, 100.0),
        event("cudaLaunchKernel", 40, 0.0, DeviceType.CPU),
        event("score", 10, 300.0),
        event("marker", 10, 0.0),
    ]
    found = kernels_of(averages, calls=10)
    assert [(kernel.name, kernel.launches) for kernel in found] == [("score", 1), ("gather", 2)]
    assert [kernel.seconds for kernel in found] == pytest.approx([30e-6, 10e-6])


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_a_profile_without_kernels_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    with pytest.raises(RuntimeError, match="saw no kernel"):
        clocks.Device().kernels(torch.relu, [torch.ones(3)], walks=2)


def test_eager_times_walk_over_every_cache(monkeypatch):
    waits = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(1))
    seen = []

    def call(x):
        seen.append(x)
        return torch.empty(0)

    times = clocks.Device().eager_times(call, ["a", "b"], walks=3, rounds=5)
    assert len(times) == 5 and all(0 < seconds < 1e-2 for seconds in times)
    assert seen == ["a", "b"] * 3 * (5 + clocks.WARM_UP) and len(waits) == 2 * (5 + clocks.WARM_UP)


def test_a_missing_driver_tool_is_no_error(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert clocks._nvidia_driver() is None


class Device:
    """Stands for torch.cuda: a graph that remembers its replays, and a clock on which each takes 4 ms."""

    def __init__(self, monkeypatch):
        self.replays, self.pools, self.ended = 0, [], []
        stream = SimpleNamespace(wait_stream=lambda other: None)
        clock = itertools.count()
        fakes = {
            "CUDAGraph": lambda: SimpleNamespace(replay=self.replay),
            "Stream": lambda: stream,
            "current_stream": lambda: stream,
            "stream": lambda stream: contextlib.nullcontext(),
            "graph": self.graph,
            "graph_pool_handle": lambda: (0, 7),
            "current_device": lambda: 3,
            "synchronize": lambda: None,
            "Event": lambda enable_timing: Event(clock),
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        end = lambda device, pool: self.ended.append((device, pool))  # noqa: E731
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)

    @contextlib.contextmanager
    def graph(self, graph, pool, stream):
        self.pools.append(pool)
        yield

    def replay(self):
        self.replays += 1


class Event:
    def __init__(self, clock):
        self.clock = clock

    def record(self):
        self.at = 4.0 * next(self.clock)

    def elapsed_time(self, other):
        return other.at - self.at


def test_a_replay_is_poisoned_first_and_timed_per_call(monkeypatch):
    device = Device(monkeypatch)
    replay = Graph(lambda x: x + 1, [torch.zeros(2), torch.ones(2)], walks=4)
    outputs = replay.outputs()
    assert len(outputs) == 8 and all(output.isnan().all() for output in outputs), "this graph writes nothing"
    assert replay.times(5) == [4e-3 / 8] * 5
    assert device.replays == 1 + 5 + clocks.WARM_UP and device.pools == [(0, 7)] and not device.ended


def test_a_failed_capture_ends_in_the_allocator_too(monkeypatch):
    device = Device(monkeypatch)
    calls = itertools.count()

    def call(x):
        if next(calls):
            raise RuntimeError("not while capturing")
        return x

    with pytest.raises(RuntimeError, match="not while capturing"):
        Graph(call, [torch.zeros(1)], walks=1)
    assert device.ended == [(3, (0, 7))]


def test_a_call_may_give_several_tensors(monkeypatch):
    Device(monkeypatch)
    replay = Graph(lambda x: (x + 1, torch.tensor([3, 4])), [torch.zeros(2)], walks=2)
    assert len(replay.outputs()) == 4 and replay.times(2) == [4e-3 / 2] * 2, "two calls"
    assert replay.results[0].isnan().all() and (replay.results[1] < 0).all()


def test_the_stand_in_for_a_graph_calls_again():
    x = torch.zeros(2)
    replay = CallsAgain(lambda x: x + 1, [x], walks=2)
    held = replay.results
    x += 5
    assert [output.tolist() for output in replay.outputs()] == [[6, 6]] * 2
    assert all(now is before for now, before in zip(replay.results, held, strict=True)), "as a graph's are"
    assert len(replay.times(3)) == 3 and Host().copy_bandwidth() > 0
