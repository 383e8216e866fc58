"""The opponent llama.cpp gets the same weights, and its rows hold together."""

import json
import random
import sys
from types import SimpleNamespace

import llamacpp
import numpy as np
import pytest
import torch
from models import from_config
from transformers import DynamicCache, LlamaConfig
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

SMALL = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    vocab_size=256,
    rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
)


def needs_llama_cpp():
    pytest.importorskip("gguf", reason="gguf is not installed: pip install -e .[llama-cpp]")
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: pip install -e .[llama-cpp]")


def small_model(dtype):
    return from_config(LlamaConfig(**SMALL), dtype)


@pytest.fixture
def model():
    return small_model(torch.float32)


def rotated_in_neighbouring_pairs(x, cos, sin):
    """llama.cpp's rotation: components 2 i and 2 i + 1 by angle i."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


def test_permuted_weights_give_the_scores_of_the_other_rotation(model):
    attention, heads, kv_heads = model.model.layers[0].self_attn, 4, 2
    hidden, positions = torch.randn(1, 7, 64), torch.arange(7)[None]
    cos, sin = model.model.rotary_emb(hidden, positions)

    def split(weight, count):
        return (hidden @ weight.T).view(1, 7, count, 32).transpose(1, 2)

    query, key = apply_rotary_pos_emb(
        split(attention.q_proj.weight, heads), split(attention.k_proj.weight, kv_heads), cos, sin
    )
    expected = query @ key.repeat_interleave(2, 1).transpose(-1, -2)
    half = (cos[..., :16], sin[..., :16])
    query, key = (
        rotated_in_neighbouring_pairs(split(llamacpp.permute(weight, count), count), *half)
        for weight, count in ((attention.q_proj.weight, heads), (attention.k_proj.weight, kv_heads))
    )
    torch.testing.assert_close(query @ key.repeat_interleave(2, 1).transpose(-1, -2), expected)


def test_every_parameter_is_written_once(model):
    written = dict(llamacpp.tensors(model))
    assert len(written) == len(list(model.parameters()))
    assert sum(tensor.numel() for tensor in written.values()) == model.num_parameters()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_file_holds_the_weights_and_the_shape(tmp_path, dtype):
    gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install -e .[llama-cpp]")
    model = small_model(dtype)
    llamacpp.write_gguf(model, tmp_path / "model.gguf")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    values = {name: field.contents() for name, field in reader.fields.items()}
    assert values["general.architecture"] == "llama" and values["llama.vocab_size"] == 256
    assert values["llama.attention.head_count"] == 4 and values["llama.attention.head_count_kv"] == 2
    assert values["llama.rope.freq_base"] == 500000.0
    assert values["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(model.config.rms_norm_eps)
    read = {tensor.name: tensor for tensor in reader.tensors}
    expected = dict(llamacpp.tensors(model))
    names = {torch.float32: "F32", torch.float16: "F16"}
    assert set(read) == set(expected)
    for name, tensor in expected.items():
        assert list(read[name].shape) == list(tensor.shape)[::-1]
        assert read[name].tensor_type.name == names[tensor.dtype]
        assert np.array_equal(read[name].data.view(np.uint8).ravel(), tensor.view(torch.uint8).numpy().ravel())


def test_missing_packages_are_named(monkeypatch, capsys):
    monkeypatch.setattr(llamacpp, "NEEDED", {"no_such_module": "no-such-package"})
    monkeypatch.setattr(sys, "argv", ["llamacpp.py"])
    with pytest.raises(SystemExit) as ended:
        llamacpp.main()
    assert ended.value.code == 2 and "pip install no-such-package" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_logits_agree_only_where_the_work_is_the_same(monkeypatch, dtype):
    needs_llama_cpp()
    model = small_model(getattr(torch, dtype))
    with torch.no_grad():  # the rotation must matter: sharper scores than those of freshly drawn weights
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight *= 20
            layer.self_attn.k_proj.weight *= 20
    with llamacpp.LlamaCpp(model, dtype, room=100) as llama_cpp:
        for way in llamacpp.LLAMA_CPP:
            llamacpp.disagreement(model, llama_cpp, dtype, way)
    monkeypatch.setattr(llamacpp, "permute", lambda weight, heads: weight)
    with llamacpp.LlamaCpp(model, dtype, room=100) as llama_cpp:
        for way in llamacpp.LLAMA_CPP:
            with pytest.raises(SystemExit, match="nothing is measured"):
                llamacpp.disagreement(model, llama_cpp, dtype, way)


@pytest.mark.parametrize("flash", [True, False])
def test_filled_cache_is_attended_to(tmp_path, model, flash):
    """The same steps with transformers: keys and values of the prefill, and copies with the keys moved on."""
    needs_llama_cpp()
    import llama_cpp
    import llamacpp_worker

    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight *= 20
    llamacpp.write_gguf(model, tmp_path / "model.gguf")
    loaded = llamacpp_worker.load(str(tmp_path / "model.gguf"))
    context = llamacpp_worker.Context(loaded, "float32", flash, room=300, threads=1)
    length, first = 200, llamacpp_worker.PREFILL
    context.fill(length)
    context.truncate(0)
    context.restore(context.states[length], sequence=0)
    context.length = length
    context.decode([7])
    theirs = torch.tensor(llama_cpp.llama_get_logits_ith(context.pointer, 0)[:256])

    draw = random.Random(0)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.tensor([[draw.randrange(256) for _ in range(first)]]), past_key_values=cache)
        for index, layer in enumerate(cache.layers):
            keys, values = layer.keys, layer.values
            for start in range(first, length, first):
                cos, sin = model.model.rotary_emb(keys, torch.full((1, first), start))
                moved, _ = apply_rotary_pos_emb(keys, keys, cos, sin)
                count = min(first, length - start)
                cache.update(moved[:, :, :count], values[:, :, :count], index)
        ours = model(torch.tensor([[7]]), past_key_values=cache).logits[0, -1]
    assert (theirs - ours).norm() < (1e-2 if flash else 1e-4) * ours.norm()


class Fake:
    """llama.cpp, which is not always installed; each step takes 1 ms and 1 µs for every position."""

    system = "made up"

    def __init__(self, *arguments):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def __call__(self, name, way, **arguments):
        if name == "times":
            return [0.001 + 1e-6 * arguments["length"]] * arguments["tokens"]
        return torch.zeros(llamacpp.PROMPT, 256).tolist()


def result_of(monkeypatch, out, *arguments):
    given = ["--contexts", "300", "--dtypes", "float32", "--layers", "1", "--rounds", "2", "--tokens", "3"]
    monkeypatch.setattr(sys, "argv", ["llamacpp.py", *given, *arguments, "--json", str(out)])
    llamacpp.main()
    return json.loads(out.read_text())


def test_rows_and_lines_of_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(llamacpp, "NEEDED", {})
    monkeypatch.setattr(llamacpp, "LlamaCpp", Fake)
    monkeypatch.setattr(llamacpp, "disagreement", lambda *args: 1e-3)
    monkeypatch.setattr(llamacpp, "build", lambda name, dtype, layers: SimpleNamespace(model=small_model(dtype)))
    result = result_of(monkeypatch, tmp_path / "rows.json")
    assert "times SparQ's" in capsys.readouterr().out
    check_result(result)
    theirs = result["rows"][1]["ways"]["llama.cpp, flash"]["time"]
    assert theirs["median"] == pytest.approx(0.0013) and theirs["count"] == 2 * 3
    assert result["lines"][0]["slope"] == pytest.approx(1), "ms per layer and 1,000 positions"


def check_result(result):
    ways = {"llama.cpp, flash", "llama.cpp, no flash", "SparQ"}
    assert [row["case"]["cached"] for row in result["rows"]] == [16, 300]
    for row in result["rows"]:
        assert set(row["ways"]) == ways and all(way["time"]["median"] > 0 for way in row["ways"].values())
        assert set(row["ratios"]["SparQ"]) == ways - {"SparQ"}
    assert {line["way"] for line in result["lines"]} == ways
    assert all(value < 1e-2 for value in result["logits_differ_by"]["float32"].values())


def test_disagreement_ends_the_run(model):
    with pytest.raises(SystemExit, match=r"logits are wrong by 1\.0e\+00, nothing is measured"):
        llamacpp.disagreement(model, Fake(), "float32", "llama.cpp, flash")


def test_a_run_with_llama_cpp(tmp_path, monkeypatch):
    needs_llama_cpp()
    result = result_of(monkeypatch, tmp_path / "rows.json")
    check_result(result)
    assert result["versions"]["llama-cpp-python"] and result["machine"] and result["settings"]["rounds"] == 2
