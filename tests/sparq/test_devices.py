"""Models that accelerate has spread over devices, or offloaded: patched before or after, they decode as in one place.

A machine without GPUs has one device to compute on, so here only the parameters lie elsewhere. What a second device
adds, new tensors for every layer's inputs, is imitated; the real thing is tested where there are GPUs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import DynamicCache

import sparq
from tests.sparq.tiny import build, generate, next_tokens, prompt, teacher_forced

pytestmark = pytest.mark.slow

SPARSE = dict(r=4, k=12, min_length=0)
CPU = torch.device("cpu")
SPREAD = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.layers.2": "disk",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "disk",
}
ALL_ON_DISK = SPREAD | {"model.embed_tokens": "disk", "model.layers.0": "disk"}


def check(model: PreTrainedModel, inputs: dict[str, Tensor] | None = None, sparse_on: str = "cpp") -> None:
    """Greedy and beams, sparse, are those of a model in one place; so is the model after unpatching."""
    inputs = inputs or prompt()
    device = inputs["input_ids"].device
    alone = sparq.patch(build().to(device), **SPARSE)
    assert generate(model, inputs) == generate(alone, inputs)
    assert generate(model, inputs, num_beams=2) == generate(alone, inputs, num_beams=2)
    report, expected = sparq.report(model), sparq.report(alone)
    assert report.total.sparse_steps == 2 * 3 * 11 and not report.total.dense_steps
    assert report.total.bytes_read == expected.total.bytes_read
    assert report.total.mean_alpha == pytest.approx(expected.total.mean_alpha, rel=1e-3)
    assert report.backend == sparse_on
    assert generate(sparq.unpatch(model), inputs) == generate(build().to(device), inputs)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    build().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("device_map", [{"": "cpu"}, "auto", SPREAD, ALL_ON_DISK], ids=["cpu", "auto", "some", "all"])
def test_device_map(saved: Path, tmp_path: Path, device_map: Any) -> None:
    if device_map == "auto" and torch.cuda.is_available():
        pytest.skip("auto would choose the GPU")
    model = AutoModelForCausalLM.from_pretrained(saved, device_map=device_map, offload_folder=tmp_path / "weights")
    on_disk = sum(parameter.is_meta for parameter in model.parameters())
    assert (on_disk > 0) == (device_map in (SPREAD, ALL_ON_DISK))
    sparq.patch(model, **SPARSE)
    assert sparq.report(model).backend == ("none yet" if device_map is ALL_ON_DISK else "cpp")
    check(model)
    assert sum(parameter.is_meta for parameter in model.parameters()) == on_disk


def dispatch(model: PreTrainedModel) -> None:
    accelerate.dispatch_model(model, {"model": "cpu", "lm_head": "cpu"}, force_hooks=True)


def offload(model: PreTrainedModel) -> None:
    accelerate.cpu_offload(model, execution_device=CPU)


@pytest.mark.parametrize("spread", [dispatch, offload])
@pytest.mark.parametrize("patched", ["before", "after", "both"])
def test_accelerate_hooks(spread: Callable[[PreTrainedModel], None], patched: str) -> None:
    """accelerate replaces `forward` of modules, SparQ hooks are beside it: the order does not matter."""
    model = build()
    if patched != "after":
        sparq.patch(model, **SPARSE)
    spread(model)
    if patched != "before":
        sparq.patch(model, **SPARSE)
    assert any(hasattr(module, "_hf_hook") for module in model.modules())
    check(model)


def test_accelerate_hooks_taken_away_again() -> None:
    model = build()
    dispatch(model)
    sparq.patch(model, **SPARSE)
    accelerate.hooks.remove_hook_from_submodules(model)
    assert not any(hasattr(module, "_hf_hook") for module in model.modules())
    check(model)


def test_an_ordinary_cache_is_adopted(tmp_path: Path) -> None:
    """Also one that was filled before, positional or by name."""
    inputs, tokens, model = prompt(batch=1), next_tokens(1, 3), build()
    accelerate.disk_offload(model, str(tmp_path), execution_device=CPU)
    with torch.no_grad():
        cache = model(**inputs, past_key_values=DynamicCache()).past_key_values
    sparq.patch(model, **SPARSE)
    actual = []
    for step in range(3):
        with torch.no_grad():
            actual.append(model.model(tokens[:, step : step + 1], None, None, cache).last_hidden_state[:, -1])
    assert sparq.report(model).total.sparse_steps == 9
    alone = sparq.patch(build(), **SPARSE)
    expected = teacher_forced(alone, inputs, tokens)
    torch.testing.assert_close(alone.lm_head(torch.stack(actual, dim=1)), expected, rtol=1e-4, atol=1e-4)


def test_every_layer_with_its_own_copy_of_the_mask() -> None:
    """What accelerate's hooks do on the way to a layer of another device: nothing may depend on identity."""

    def copied(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return accelerate.utils.recursively_apply(Tensor.clone, (args, kwargs))  # type: ignore[return-value]

    model = sparq.patch(build(), **SPARSE)
    for layer in model.model.layers:
        layer.register_forward_pre_hook(copied, with_kwargs=True)
    check(model)


needs_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two GPUs")


@pytest.mark.gpu
@needs_a_gpu
def test_layers_offloaded_from_a_gpu(saved: Path, tmp_path: Path) -> None:
    device_map = dict.fromkeys(SPREAD, 0) | {"model.layers.1": "cpu", "model.layers.2": "disk"}
    model = AutoModelForCausalLM.from_pretrained(saved, device_map=device_map, offload_folder=tmp_path)
    sparq.patch(model, **SPARSE)
    check(model, {name: x.cuda() for name, x in prompt().items()}, "triton")


@pytest.mark.gpu
@needs_two_gpus
def test_layers_on_two_gpus(saved: Path) -> None:
    device_map = dict.fromkeys(SPREAD, 0) | {"model.layers.1": 1, "model.layers.2": 1}
    model = sparq.patch(AutoModelForCausalLM.from_pretrained(saved, device_map=device_map), **SPARSE)
    inputs = {name: x.cuda() for name, x in prompt().items()}
    with torch.no_grad():
        cache = model(**inputs).past_key_values
        model(next_tokens(2, 1).cuda(), past_key_values=cache)
    assert [layer._index.components.blocks.device.index for layer in cache.layers] == [0, 1, 1]
    sparq.patch(model, **SPARSE)
    check(model, inputs, "triton")
