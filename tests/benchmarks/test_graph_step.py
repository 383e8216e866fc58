"""The step that becomes a CUDA graph: right wherever it runs, and never waiting for its device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import models
import pytest
import torch
from gpu_stages import graph_step
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPTNeoXConfig, LlamaConfig, PreTrainedModel, StaticCache

import sparq
from sparq.cache import upgrade

pytestmark = pytest.mark.slow

KNOBS = dict(r=4, k=12, min_length=0)
needs_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_a_gpu])]
CONFIGS = {
    "llama": LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.2,
    ),
    "gpt_neox": GPTNeoXConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        initializer_range=0.2,
    ),
}
# A device has to be waited for where Python, or the size of a result, depends on what it has computed.
WAITING = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.repeat_interleave.Tensor,
}


class WaitingIsAnError(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in WAITING:
            raise AssertionError(f"{func} waits for the device")
        if func is torch.ops.aten.index.Tensor and any(x is not None and x.dtype == torch.bool for x in args[1]):
            raise AssertionError("the size of what a mask selects is waited for")
        tensors = [x for x in (*args, result) if isinstance(x, Tensor)]
        # A number may be handed to a kernel with its launch; more than that is copied, and waited for.
        if len({x.device.type for x in tensors if x.dim()}) > 1:
            raise AssertionError(f"{func} copies from one device to another")
        return result


@pytest.fixture
def reference_is_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are sparse on a device without a kernel, too."""
    monkeypatch.setenv("SPARQ_BACKEND", "reference")


def filled(family: str, patched: bool, device: str, length: int = 70) -> tuple[PreTrainedModel, StaticCache]:
    """A model and a static cache that holds a prompt, SparQ's index of it not made yet."""
    model = models.from_config(CONFIGS[family], torch.float32, device)
    if patched:
        sparq.patch(model, **KNOBS)
    cache = StaticCache(config=model.config, max_cache_len=128)
    if patched:
        upgrade(cache)  # later it would have to ask the device whether it holds anything
    ids = torch.randint(300, (2, length), generator=torch.Generator().manual_seed(1)).to(device)
    with torch.no_grad():
        model(ids, **{graph_step.cache_name(type(model).forward): cache})
    return model, cache


@pytest.mark.parametrize("patched", [False, True], ids=["stock", "SparQ"])
@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.usefixtures("reference_is_a_kernel")
def test_a_step_never_waits_for_its_device(family: str, patched: bool) -> None:
    """On the meta device nothing can be read back, and no branch is taken that is the CPU's."""
    model, cache = filled(family, patched, "meta")
    step = graph_step.Step(model, cache, 2)
    for _ in range(graph_step.WARM_UP):
        step()
    with WaitingIsAnError():
        for _ in range(2):
            assert step().shape == (2, 300)
    if patched:
        assert all(layer._index.unindexed == layer._index.unsummed == 0 for layer in cache.layers)


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x + torch.tensor([1.0, 2.0]).to("meta"),
        lambda x: torch.equal(x, x),
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
    ],
    ids=["nonzero", "mask", "copy", "equal", "item", "bool"],
)
def test_what_waits_is_noticed(wait: Any) -> None:
    with WaitingIsAnError(), pytest.raises((AssertionError, RuntimeError, NotImplementedError)):
        wait(torch.ones(2, device="meta"))


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    yield request.param


@pytest.mark.parametrize("patched", [False, True], ids=["stock", "SparQ"])
@pytest.mark.parametrize("family", CONFIGS)
def test_replays_are_eager_steps(family: str, patched: bool, device: str) -> None:
    """Twenty of them while the cache grows, and each counted."""
    model, cache = filled(family, patched, device)
    _, other = filled(family, patched, device)
    step, eager = graph_step.Step(model, cache, 2), graph_step.Step(model, other, 2)
    for _ in range(graph_step.WARM_UP):
        step(), eager()
    replay = graph_step.replayed(step)
    if patched:
        sparse_before = sparq.report(model).total.sparse_steps
    for number in range(20):
        right = eager().clone()
        torch.testing.assert_close(replay(), right, rtol=1e-4, atol=1e-4, msg=lambda m, n=number: f"step {n}: {m}")
        assert torch.equal(step.token, eager.token)
    assert [int(layer.get_seq_length()) for layer in cache.layers] == 3 * [70 + graph_step.WARM_UP + 20]
    if patched:
        total = sparq.report(model).total
        assert total.sparse_steps - sparse_before == 2 * 3 * 20 and not total.other_sums


@pytest.mark.parametrize("patched", [False, True], ids=["stock", "SparQ"])
def test_the_check_leaves_a_cache_that_goes_on(patched: bool, device: str) -> None:
    model, cache = filled("llama", patched, device)
    _, other = filled("llama", patched, device)
    step, eager = graph_step.Step(model, cache, 2), graph_step.Step(model, other, 2)
    for _ in range(graph_step.WARM_UP):
        step(), eager()
    replay = graph_step.replayed(step)
    assert graph_step.replay_error(step, replay, 1e-4) is None
    for _ in range(graph_step.CHECKED):
        eager()
    torch.testing.assert_close(replay(), eager(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("patched", [False, True], ids=["stock", "SparQ"])
def test_a_replay_that_stands_still_is_found(patched: bool) -> None:
    """It gives the right logits once; then the cache should have grown."""
    model, cache = filled("llama", patched, "cpu")
    step = graph_step.Step(model, cache, 2)
    for _ in range(graph_step.WARM_UP):
        step()
    logits = step().clone()
    for tensor in step.state()[1:]:
        if tensor.dim() == 0:
            tensor.sub_(1)
    why = graph_step.replay_error(step, lambda: logits, 1e-4)
    assert why is not None and "of a replay differs from the eager one" in why


def test_a_replay_of_an_index_that_lags_is_found() -> None:
    """What the first steps do must not be what is captured: each replay would do it again."""
    model, cache = filled("llama", True, "cpu")
    step = graph_step.Step(model, cache, 2)
    for _ in range(graph_step.WARM_UP):
        step()

    def replay() -> Tensor:
        for layer in cache.layers:
            layer._index.value_sum.mul_(0)
        return step()

    assert graph_step.replay_error(step, replay, 1e-4) is not None


class MadeUpCuda:
    """Stands for torch.cuda: a graph that counts its replays, and streams and a capture in which nothing is special."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.replays, self.ended = 0, 0
        for name in ("CUDAGraph", "Stream", "current_stream", "graph_pool_handle", "current_device"):
            monkeypatch.setattr(torch.cuda, name, lambda *args: self)
        for name in ("stream", "graph"):
            monkeypatch.setattr(torch.cuda, name, lambda *args, **kwargs: contextlib.nullcontext())
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self.end, raising=False)

    def wait_stream(self, other: object) -> None:
        pass

    def replay(self) -> None:
        self.replays += 1

    def end(self, device: object, pool: object) -> None:
        self.ended += 1


def test_a_graph_is_captured_once_and_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, cache = filled("llama", False, "cpu")
    cuda = MadeUpCuda(monkeypatch)
    graph = graph_step.Replay(graph_step.Step(model, cache, 2))
    assert int(cache.get_seq_length()) == 71 and not cuda.replays and not cuda.ended
    assert graph() is graph() and cuda.replays == 2 and graph().shape == (2, 300)


def test_the_allocator_is_told_of_a_failed_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or every later one would fail."""
    model, cache = filled("llama", False, "cpu")
    cuda, step = MadeUpCuda(monkeypatch), graph_step.Step(model, cache, 2)
    model.register_forward_pre_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        graph_step.Replay(step)
    assert cuda.ended == 1
