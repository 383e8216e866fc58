"""Caches in files: what is loaded goes on as what was saved, and what does not belong to a model is refused."""

from __future__ import annotations

import copy
import logging
import os
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import DynamicCache, LlamaForCausalLM, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

import sparq
from sparq import prompt_cache
from sparq.cache_argument import generate_cache_name
from sparq.prompt_cache import fingerprint
from tests.sparq.caches import on_either_cache
from tests.sparq.test_untrusted import Bomb
from tests.sparq.test_weights import needs_peft, needs_torchao
from tests.sparq.tiny import build, generate, prompt

SPARSE = dict(r=4, k=12, min_length=0)
# Windows of 16 (gemma3), chunks of 16 (llama4), a layer that reads another's K and V (gemma4).
FAMILIES = ["llama", "gpt_neox", "gemma2", "gemma3", "gemma4", "gpt_oss", "llama4", "qwen2_vl"]


def read(model: PreTrainedModel, inputs: dict[str, Tensor], cache: Cache | None = None) -> Cache:
    """The cache that the model has filled."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
    return cache


def asked(inputs: dict[str, Tensor], length: int = 5, seed: int = 8) -> dict[str, Tensor]:
    """The same prompts with random tokens behind them."""
    more = prompt(inputs["input_ids"].shape[0], length, padding=0, seed=seed)
    return {name: torch.cat([inputs[name], more[name]], 1) for name in inputs}


def go_on(model: PreTrainedModel, cache: Cache, inputs: dict[str, Tensor]) -> list[list[int]]:
    return generate(model, inputs, **{generate_cache_name(): cache})


@pytest.mark.parametrize("reader", ["stock", "SparQ"])
@pytest.mark.parametrize("writer", ["stock", "SparQ"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_loaded_cache_goes_on_as_the_one_in_memory(family: str, writer: str, reader: str, tmp_path: Path) -> None:
    model, inputs = build(family), prompt()
    if writer == "SparQ":
        sparq.patch(model, **SPARSE)
    cache = read(model, inputs)
    sparq.save_cache(cache, inputs["input_ids"], tmp_path / "cache", model)
    other = build(family)  # another process would have it anew
    if reader == "SparQ":
        sparq.patch(other, **SPARSE)
    loaded, tokens = sparq.load_cache(tmp_path / "cache", other)
    assert torch.equal(tokens, inputs["input_ids"])
    assert all(type(layer).__module__ == "transformers.cache_utils" for layer in loaded.layers)
    for one, two in zip(loaded.layers, cache.layers, strict=True):
        assert (one.keys is None) == (two.keys is None)
        if one.keys is not None and two.keys is not None:
            assert torch.equal(one.keys, two.keys) and torch.equal(one.values, two.values)
            assert one.get_seq_length() == two.get_seq_length() == 40
    question = asked(inputs)
    found = go_on(other, loaded, question)
    assert found == go_on(other, cache, question)
    assert found != go_on(other, DynamicCache(config=other.config), asked(inputs, seed=9))
    if reader == "SparQ":
        assert sparq.report(other).total.sparse_steps


@on_either_cache
def test_a_static_cache_is_saved_as_far_as_it_is_filled(make_cache: Callable, tmp_path: Path) -> None:
    model, inputs = sparq.patch(build(), **SPARSE), prompt(batch=1)
    cache = read(model, inputs, make_cache(model))
    sparq.save_cache(cache, inputs["input_ids"], tmp_path / "cache", model)
    loaded, _ = sparq.load_cache(tmp_path / "cache", model)
    plain = read(build(), inputs)
    assert [layer.keys.shape for layer in loaded.layers] == [layer.keys.shape for layer in plain.layers]
    question = asked(inputs)
    assert go_on(model, loaded, question) == go_on(model, plain, question)


def test_a_token_that_the_cache_does_not_hold_is_left_out(tmp_path: Path) -> None:
    """What `generate` gives has one more than it has fed."""
    model, inputs = sparq.patch(build(), **SPARSE), prompt(batch=1)
    cache = DynamicCache(config=model.config)
    output = model.generate(
        **inputs, max_new_tokens=7, do_sample=False, pad_token_id=0, **{generate_cache_name(): cache}
    )
    sparq.save_cache(cache, output, tmp_path / "cache", model)
    loaded, tokens = sparq.load_cache(tmp_path / "cache", model, output[0].tolist())
    assert torch.equal(tokens, output[:, :-1]) and loaded.get_seq_length() == 46


@given(
    held=strategies.lists(strategies.integers(3, 6), min_size=1, max_size=30),
    wanted=strategies.lists(strategies.integers(3, 6), max_size=30),
    same=strategies.integers(0, 30),
)
@settings(max_examples=40, deadline=None)
def test_it_is_cut_back_to_what_both_begin_with(held: list[int], wanted: list[int], same: int) -> None:
    wanted = held[:same] + wanted
    common = len(os.path.commonprefix([held, wanted]))  # noqa: RUF071  of any lists
    cache = read(MODEL, {"input_ids": torch.tensor([held])})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cache"
        sparq.save_cache(cache, held, path, MODEL)
        loaded, tokens = sparq.load_cache(path, MODEL, wanted)
        assert tokens.tolist() == [held[:common]] and tokens.dtype == torch.int64
        assert loaded.get_seq_length() == common
        for layer, whole in zip(loaded.layers, cache.layers, strict=True):
            if common:
                assert torch.equal(layer.keys, whole.keys[:, :, :common])
                assert torch.equal(layer.values, whole.values[:, :, :common])
        inputs = asked({"input_ids": torch.tensor([held[:common]], dtype=torch.long)})
        expected = MODEL(**inputs).logits[:, common:]
        torch.testing.assert_close(
            MODEL(**{"input_ids": inputs["input_ids"][:, common:]}, past_key_values=loaded).logits, expected
        )


MODEL = build(num_hidden_layers=2)


@pytest.mark.parametrize(
    "length, keep, kept", [(40, 40, 40), (40, 39, 0), (40, 12, 0), (15, 9, 9), (16, 9, 0), (40, 0, 0)]
)
def test_windows_are_cut_back_only_where_they_have_forgotten_nothing(
    length: int, keep: int, kept: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, inputs = build("gemma3"), prompt(1, length, padding=0)  # windows of 16
    sparq.save_cache(read(model, inputs), inputs["input_ids"], tmp_path / "cache", model)
    wanted = inputs["input_ids"].clone()
    wanted[:, keep:] = 1
    with caplog.at_level(logging.WARNING, "sparq"):
        loaded, tokens = sparq.load_cache(tmp_path / "cache", model, wanted)
    assert tokens.shape == (1, kept) and loaded.get_seq_length() == kept
    said = f"cannot be cut back to {keep} of its {length} tokens, since a layer with a sliding window"
    assert (said in caplog.text) == (kept < keep)
    question = asked({name: tensor[:, :kept] for name, tensor in inputs.items()})
    assert go_on(model, loaded, question) == go_on(model, DynamicCache(config=model.config), question)


def test_a_cache_without_windows_is_cut_for_a_model_that_has_them(tmp_path: Path) -> None:
    """Made without the configuration it has kept everything, and can be cut anywhere."""
    model, inputs = build("gemma3"), prompt(batch=1)
    sparq.save_cache(read(model, inputs, DynamicCache()), inputs["input_ids"], tmp_path / "cache", model)
    loaded, tokens = sparq.load_cache(tmp_path / "cache", model, inputs["input_ids"][:, :30])
    assert tokens.shape == (1, 30)
    assert [layer.keys.shape[2] for layer in loaded.layers] == [15, 30, 15]
    assert [type(layer) for layer in loaded.layers] == [
        DynamicSlidingWindowLayer,
        DynamicLayer,
        DynamicSlidingWindowLayer,
    ]
    question = asked({name: tensor[:, :30] for name, tensor in inputs.items()})
    assert go_on(model, loaded, question) == go_on(model, DynamicCache(config=model.config), question)


# What is refused.


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A file of the model that `build()` gives."""
    model, inputs = build(), prompt(batch=1)
    sparq.save_cache(read(model, inputs), inputs["input_ids"], tmp_path / "cache", model)
    return tmp_path / "cache"


@pytest.mark.parametrize(
    "model, message",
    [
        (lambda: build(seed=1), r"cache was made by another model: its weights, .* LlamaForCausalLM \(a llama under"),
        (lambda: build(rope_parameters=dict(rope_type="default", rope_theta=9.0)), "made by another model"),
        (lambda: build("qwen2"), r"made by another model.* Qwen2ForCausalLM \(a llama under .* this is a qwen2 under"),
        (lambda: build().to(torch.bfloat16), "cache was made in float32, and the model is in bfloat16"),
    ],
    ids=["weights", "rope", "family", "dtype"],
)
def test_another_model_is_refused(saved: Path, model: Callable[[], PreTrainedModel], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sparq.load_cache(saved, model())


@given(share=strategies.floats(0, 1, exclude_max=True))
@settings(max_examples=40, deadline=None)
def test_a_truncated_file_is_refused(share: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cache"
        sparq.save_cache(read(MODEL, prompt(1, 9, 0)), prompt(1, 9, 0)["input_ids"], path, MODEL)
        content = path.read_bytes()
        path.write_bytes(content[: int(share * len(content))])
        with pytest.raises(ValueError, match="cache must be a whole safetensors file: "):
            sparq.load_cache(path, MODEL)


def test_a_pickle_is_not_unpickled(tmp_path: Path) -> None:
    for name, write in (("torch", torch.save), ("plain", lambda what, path: path.write_bytes(pickle.dumps(what)))):
        write(Bomb(tmp_path / "gone-off"), tmp_path / name)
        with pytest.raises(ValueError, match=f"{name} must be a whole safetensors file"):
            sparq.load_cache(tmp_path / name, build())
    assert not (tmp_path / "gone-off").exists()


def test_safetensors_of_others_are_refused(tmp_path: Path) -> None:
    build().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model.safetensors must be a prompt cache, written by sparq.save_cache"):
        sparq.load_cache(tmp_path / "model.safetensors", build())
    for name in ("nothing", "."):
        with pytest.raises(OSError):
            sparq.load_cache(tmp_path / name, build())


def rewritten(path: Path, change: Callable[[dict[str, Tensor], dict[str, str]], Any]) -> None:
    with safe_open(path, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name).clone() for name in file.keys()}, file.metadata()  # noqa: SIM118
    change(tensors, metadata)
    save_file(tensors, path, metadata)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda t, m: m.update(format_version="2"),
            "a later SparQ: its format_version is 2, and this one reads up to 1",
        ),
        (lambda t, m: t.pop("layers.2.keys"), "is damaged: it must hold tokens, and K and V of 3 layers"),
        (lambda t, m: t.pop("tokens"), "is damaged: it must hold tokens, and K and V of 3 layers"),
        (lambda t, m: t.update(extra=torch.zeros(1)), "is damaged: it must hold tokens, and K and V of 3 layers"),
        (
            lambda t, m: t.update(tokens=t["tokens"].float()),
            r"tokens must be int64 \[batch, n\], and are torch.float32",
        ),
        (lambda t, m: t.update({"layers.1.keys": t["layers.1.keys"][0].clone()}), "damaged: layer 1 has keys"),
        (
            lambda t, m: t.update({"layers.1.values": t["layers.1.values"][:, :, 1:].clone()}),
            r"layer 1 has keys \[1, 2, 40, 16\] and values \[1, 2, 39, 16\]",
        ),
    ],
)
def test_damage_is_named(saved: Path, change: Callable, message: str) -> None:
    rewritten(saved, lambda tensors, metadata: None)
    sparq.load_cache(saved, build())
    rewritten(saved, change)
    with pytest.raises(ValueError, match=message):
        sparq.load_cache(saved, build())


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (dict(cache=None), TypeError, "cache must be a cache of transformers, got NoneType"),
        (dict(cache=DynamicCache()), ValueError, "cache must hold the same tokens in all its layers, and some, got no"),
        (dict(tokens=[1, 2, 3]), ValueError, "tokens must be all 40 that the cache holds, got 3"),
        (dict(tokens=[[1] * 40] * 2), ValueError, r"tokens must be of the cache's batch of 1, got \(2, 40\)"),
        (dict(tokens=torch.zeros(1, 40)), ValueError, r"tokens must be integers .*, got torch.float32 \[1, 40\]"),
        (dict(tokens=torch.zeros(1, 1, 40).long()), ValueError, r"got torch.int64 \[1, 1, 40\]"),
        (dict(path="no/such/folder/cache"), FileNotFoundError, "path must be in a folder that exists, got no/such"),
        (dict(model=nn.Linear(2, 2)), TypeError, "model must be a transformers PreTrainedModel"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_wrong_arguments_leave_the_file_as_it_was(
    saved: Path, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    before = saved.read_bytes()
    model, inputs = build(), prompt(batch=1)
    right = dict(cache=read(model, inputs), tokens=inputs["input_ids"], path=saved, model=model)
    with pytest.raises(error, match=message):
        sparq.save_cache(**right | arguments)
    assert [path.name for path in saved.parent.iterdir()] == ["cache"] and saved.read_bytes() == before
    with pytest.raises(ValueError, match="tokens must be of the file's batch of 1, got"):
        sparq.load_cache(saved, model, [[3, 4], [3, 4]])


def test_layers_that_are_no_plain_storage_are_refused(saved: Path) -> None:
    class Evicting(DynamicLayer):
        """As somebody's eviction code has it."""

    model, inputs = build(), prompt(batch=1)
    cache = read(model, inputs)
    layer = Evicting()
    layer.update(cache.layers[1].keys, cache.layers[1].values)
    cache.layers[1] = layer
    with pytest.raises(ValueError, match="cache must have dynamic or static layers, layer 1 is a Evicting"):
        sparq.save_cache(cache, inputs["input_ids"], saved, model)
    cache = read(model, inputs)
    cache.layers[1].crop(-1)
    with pytest.raises(ValueError, match=r"the same tokens in all its layers, and some, got \[39, 40\] tokens"):
        sparq.save_cache(cache, inputs["input_ids"], saved, model)


def test_tokens_that_stand_for_an_image_are_refused(tmp_path: Path) -> None:
    model, inputs = build("qwen2_vl"), prompt(batch=1)
    cache = read(model, inputs)
    model.config.image_token_id = int(inputs["input_ids"][0, 7])
    with pytest.raises(ValueError, match=r"tokens must be text, got .*, the model's image_token_id"):
        sparq.save_cache(cache, inputs["input_ids"], tmp_path / "cache", model)


@pytest.mark.parametrize("fails", ["writing", "renaming"])
def test_a_failure_in_the_middle_leaves_the_old_file(saved: Path, fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half of it")
        raise SafetensorError("no space left on device")

    def rename(source: Path, target: Path) -> None:
        raise OSError("no space left on device")

    if fails == "writing":
        monkeypatch.setattr(prompt_cache, "save_file", write)
    else:
        monkeypatch.setattr(os, "replace", rename)
    before, model, inputs = saved.read_bytes(), build(), prompt(batch=1, length=50)
    cache = read(model, inputs)
    for path in (saved, saved.parent / "new"):
        with pytest.raises(OSError, match="no space left"):
            sparq.save_cache(cache, inputs["input_ids"], path, model)
    assert [path.name for path in saved.parent.iterdir()] == ["cache"] and saved.read_bytes() == before


def test_a_file_that_is_in_use_may_be_replaced(saved: Path) -> None:
    """As `sparq generate` does when a prompt goes on: what was loaded lies in the file until it grows."""
    model, inputs = build(), prompt(batch=1)
    loaded, _ = sparq.load_cache(saved, model)
    expected = [layer.keys.clone() for layer in copy.deepcopy(loaded).layers]
    longer = asked(inputs)
    read(model, {"input_ids": longer["input_ids"][:, 40:]}, again := sparq.load_cache(saved, model)[0])
    sparq.save_cache(again, longer["input_ids"], saved, model)
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(loaded.layers, expected, strict=True))
    assert sparq.load_cache(saved, model)[1].shape == (1, 45)


# What tells models apart.


def test_the_fingerprint_is_of_the_model_not_of_its_circumstances(tmp_path: Path) -> None:
    model = build()
    mark = fingerprint(model)
    assert fingerprint(model.model) == mark == fingerprint(build())
    assert fingerprint(sparq.patch(model, **SPARSE)) == mark
    model.config.sparq = SPARSE
    model.save_pretrained(tmp_path)
    assert fingerprint(LlamaForCausalLM.from_pretrained(tmp_path)) == mark
    assert fingerprint(nn.Sequential(model)) == mark


def test_the_fingerprint_is_of_every_weight() -> None:
    model = build()
    marks = {fingerprint(model)}
    for weight in model.model.parameters():
        with torch.no_grad():
            weight.add_(1e-3)
        marks.add(fingerprint(model))
    assert len(marks) == 1 + len(list(model.model.parameters()))


def test_a_weight_that_is_not_contiguous_has_the_same_elements() -> None:
    model, mark = build(), fingerprint(build())
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.data = weight.data.t().contiguous().t()
    assert not weight.is_contiguous() and fingerprint(model) == mark


def test_quantised_weights_have_a_fingerprint() -> None:
    def quantised(seed: int) -> nn.Module:
        return torch.ao.quantization.quantize_dynamic(build(seed=seed), {nn.Linear}, dtype=torch.qint8)

    assert fingerprint(quantised(0)) == fingerprint(quantised(0)) != fingerprint(build())
    assert fingerprint(quantised(0)) != fingerprint(quantised(1))


@needs_torchao
def test_torchao_weights_have_a_fingerprint_and_so_has_what_is_done_to_activations() -> None:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

    def quantised(seed: int, config: Any = Int8WeightOnlyConfig) -> nn.Module:
        model = build(seed=seed)
        quantize_(model, config())
        return model

    assert fingerprint(quantised(0)) == fingerprint(quantised(0)) != fingerprint(build())
    assert fingerprint(quantised(0)) != fingerprint(quantised(1))
    assert fingerprint(quantised(0)) != fingerprint(quantised(0, Int8DynamicActivationInt8WeightConfig))


def test_weights_that_are_offloaded_are_refused() -> None:
    model = build()
    model.model.layers[1].mlp.to("meta")
    with pytest.raises(
        ValueError, match=r"model must have its weights in memory, layers.1.mlp.* is on the device meta"
    ):
        fingerprint(model)


@needs_peft
def test_an_adapter_makes_another_model_while_it_is_in_use() -> None:
    import peft

    model = build()
    torch.manual_seed(1)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False)
    )
    marks = {fingerprint(build()), fingerprint(adapted)}
    with adapted.disable_adapter():
        marks.add(fingerprint(adapted))
    assert len(marks) == 3 and fingerprint(adapted) in marks
