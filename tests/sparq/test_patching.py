"""`patch`, `unpatch`, `patched`: how SparQ enters a model and leaves it as it was."""

from __future__ import annotations

import copy
import gc
import io
import json
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

import sparq
from sparq import SparqConfig
from sparq.cache import SparqLayer
from tests.sparq.snapshot import snapshot
from tests.sparq.tiny import build, generate, next_tokens, prompt, teacher_forced

SPARSE = dict(r=4, k=12, min_length=0)
OTHER = dict(r=2, k=6, min_length=0)


def logits(model: PreTrainedModel) -> torch.Tensor:
    return teacher_forced(model, prompt(), next_tokens(steps=3))


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma2"])
def test_unpatch_leaves_the_model_as_it_was(family: str) -> None:
    model = build(family)
    before, expected = snapshot(model), logits(model)
    assert sparq.unpatch(model) is model and snapshot(model) == before  # not patched: nothing to do
    assert sparq.patch(model, **SPARSE) is model
    assert snapshot(model) != before
    sparse = logits(model)
    for _ in range(2):
        assert sparq.unpatch(model) is model
        assert snapshot(model) == before
    assert torch.equal(logits(model), expected) and not torch.equal(sparse, expected)
    with pytest.raises(ValueError, match="must be patched"):
        sparq.report(model)


def test_patching_again_holds_the_new_knobs_only() -> None:
    model = sparq.patch(build(), **OTHER)
    logits(model)
    sparq.patch(model, **SPARSE)
    assert sparq.report(model).total.decode_steps == 0
    assert torch.equal(logits(model), logits(sparq.patch(build(), **SPARSE)))
    assert sparq.report(model).config == SparqConfig(**SPARSE)
    assert sparq.report(model).layers[0].sparse_steps == 3  # one hook, not two
    assert snapshot(sparq.unpatch(model)) == snapshot(build())


def test_knobs_replace_fields_of_the_configuration() -> None:
    model = sparq.patch(build(), SparqConfig(**OTHER, dense_layers=1), k=12, r=4)
    assert sparq.report(model).config == SparqConfig(**SPARSE, dense_layers=1)


def test_a_dict_does_for_a_configuration() -> None:
    model = sparq.patch(build(), OTHER | dict(dense_layers=1), k=12)
    assert sparq.report(model).config == SparqConfig(**OTHER | dict(dense_layers=1, k=12))
    with sparq.patched(model, SparqConfig(**SPARSE).to_dict()):
        assert sparq.report(model).config == SparqConfig(**SPARSE)


def test_knobs_saved_with_the_model_are_found_again(tmp_path: Path) -> None:
    model = build()
    model.config.sparq = SparqConfig(**SPARSE).to_dict()
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert not sparq.is_patched(loaded)  # they are settings, and patch nothing
    assert sparq.report(sparq.patch(loaded)).config == SparqConfig(**SPARSE)
    with sparq.patched(loaded, k=6, r=2):
        assert sparq.report(loaded).config == SparqConfig(**OTHER)
    assert sparq.report(sparq.patch(loaded, SparqConfig(r=3))).config == SparqConfig(r=3)  # given whole
    assert sparq.report(sparq.patch(loaded, {})).config == SparqConfig()


@pytest.mark.parametrize(
    "saved, error, message",
    [
        (dict(ratio=0.5), ValueError, "ratio must be"),
        (dict(kk=3), TypeError, "unknown knob 'kk'"),
        ([], ValueError, r"model.config.sparq must be a dict of knobs of SparqConfig, got \[\]"),
    ],
    ids=str,
)
def test_bad_knobs_saved_with_the_model_change_nothing(saved: object, error: type[Exception], message: str) -> None:
    model = build()
    model.config.sparq = saved
    before = snapshot(model)
    with pytest.raises(error, match=message):
        sparq.patch(model, k=12)
    assert snapshot(model) == before
    sparq.patch(model, SparqConfig(**SPARSE))  # which does not ask for them


def test_is_patched() -> None:
    model = build()
    assert not sparq.is_patched(model)
    with sparq.patched(model, **SPARSE):
        assert sparq.is_patched(model) and sparq.is_patched(model.model)
    assert not sparq.is_patched(model)
    wrapper = torch.nn.Sequential(sparq.patch(model, **SPARSE))
    assert sparq.is_patched(wrapper)
    assert not sparq.is_patched(sparq.unpatch(wrapper))
    with pytest.raises(TypeError, match="must be a transformers PreTrainedModel, or wrap one, got Linear"):
        sparq.is_patched(torch.nn.Linear(2, 2))


def test_is_patched_where_the_model_patches_itself() -> None:
    model = build()
    model.set_attn_implementation("sparq")
    assert not sparq.is_patched(model)
    logits(model)
    assert sparq.is_patched(model)


BAD = [
    (dict(r=17), ValueError, "head_dim=16, got r=17"),
    (dict(k=10, local=11), ValueError, "local"),
    (dict(ratio=0.5), ValueError, "ratio"),
    (dict(k=1.5), TypeError, "k must be an integer"),
    (dict(kk=3), TypeError, "unknown knob 'kk'"),
    (
        dict(config="fast"),
        TypeError,
        "config must be a SparqConfig, a dict of its knobs or None, got 'fast'",
    ),
    (dict(config=dict(kk=3)), TypeError, "unknown knob 'kk'"),
    (dict(config=dict(k=10), local=11), ValueError, "local=11 and k=10"),
]


@pytest.mark.parametrize("patched", [False, True], ids=["stock", "patched"])
@pytest.mark.parametrize("knobs, error, message", BAD, ids=[str(case[0]) for case in BAD])
def test_bad_knobs_change_nothing(knobs: dict, error: type[Exception], message: str, patched: bool) -> None:
    model = sparq.patch(build(), **SPARSE) if patched else build()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        sparq.patch(model, **knobs)
    assert snapshot(model) == before
    if patched:
        assert sparq.report(model).config == SparqConfig(**SPARSE)
        logits(model)
        assert sparq.report(model).layers[0].sparse_steps == 3


@pytest.mark.parametrize("partly", [False, True])
def test_a_patch_that_fails_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch, partly: bool) -> None:
    model = build()
    before, real, calls = snapshot(model), PreTrainedModel.set_attn_implementation, []

    def failing(self, implementation, *args, **kwargs):
        calls.append(implementation)
        if len(calls) > 1:
            return real(self, implementation, *args, **kwargs)
        if partly:
            real(self, implementation, *args, **kwargs)
        raise OSError("no")

    monkeypatch.setattr(PreTrainedModel, "set_attn_implementation", failing)
    with pytest.raises(OSError, match="no"):
        sparq.patch(model, **SPARSE)
    assert snapshot(model) == before


def test_head_and_decoder_are_one_model() -> None:
    model = build()
    sparq.patch(model.model, **SPARSE)
    sparse = logits(model)
    assert sparq.report(model).to_dict() == sparq.report(model.model).to_dict()
    assert torch.equal(sparse, logits(sparq.patch(build(), **SPARSE)))
    sparq.patch(model, **OTHER)
    assert sparq.report(model.model).config == SparqConfig(**OTHER)
    sparq.unpatch(model.model)
    assert snapshot(model) == snapshot(build())


def test_two_models_with_their_own_knobs() -> None:
    expected = [logits(sparq.patch(build(), **knobs)) for knobs in (SPARSE, OTHER)]
    one, two = sparq.patch(build(), **SPARSE), sparq.patch(build(), **OTHER)
    for _ in range(2):
        for model, own in zip((one, two), expected, strict=True):
            assert torch.equal(logits(model), own)
    sparq.unpatch(one)
    assert torch.equal(logits(two), expected[1])
    assert sparq.report(two).layers[0].sparse_steps == 9


def test_one_cache_passed_from_model_to_model() -> None:
    """The knobs are the model's, not the cache's: each step is that of the model that makes it."""
    inputs, tokens = prompt(batch=1), next_tokens(1, 2)
    one, two, stock = sparq.patch(build(), **SPARSE), sparq.patch(build(), **OTHER), build()
    with torch.no_grad():
        first = one(**inputs)
        second = two(tokens[:, :1], past_key_values=first.past_key_values).logits
        third = stock(tokens[:, 1:], past_key_values=first.past_key_values).logits
        assert first.past_key_values.get_seq_length() == 42

        cache = stock(**inputs).past_key_values
        torch.testing.assert_close(two(tokens[:, :1], past_key_values=cache).logits, second)
        torch.testing.assert_close(stock(tokens[:, 1:], past_key_values=cache).logits, third)
    assert sparq.report(one).total.decode_steps == 0 and sparq.report(two).layers[0].sparse_steps == 2


@pytest.mark.parametrize("base", ["sdpa", "eager"])
@pytest.mark.parametrize("first", [0, 1])
def test_models_that_share_a_configuration(base: str, first: int) -> None:
    one = build()
    one.set_attn_implementation(base)
    two = LlamaForCausalLM(one.config).eval()
    two.load_state_dict(one.state_dict())
    assert two.config is one.config
    models = (one, two)
    before, stock = [snapshot(model) for model in models], logits(one)

    for model, knobs in zip(models, (SPARSE, OTHER), strict=True):
        sparq.patch(model, **knobs)
    expected = [logits(model) for model in models]
    sparq.unpatch(models[first])
    torch.testing.assert_close(logits(models[first]), stock, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(models[1 - first]), expected[1 - first])
    torch.testing.assert_close(logits(models[first]), stock, rtol=1e-4, atol=1e-4)
    sparq.unpatch(models[1 - first])
    assert [snapshot(model) for model in models] == before


def test_the_implementation_may_be_chosen_while_patched() -> None:
    model = sparq.patch(build(), **SPARSE)
    expected = logits(model)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    assert sparq.report(model).layers[0].sparse_steps == 6
    sparq.unpatch(model)
    assert model.config._attn_implementation == "eager"

    sparq.patch(model, **SPARSE).set_attn_implementation("sdpa")
    sparq.unpatch(model)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    "family, base", [("llama", "sparq_sdpa"), ("gemma2", "sparq_eager"), ("gpt_oss", "sparq_eager")]
)
def test_what_is_dense_goes_to_an_implementation_that_knows_softcaps_and_sinks(family: str, base: str) -> None:
    """FlashAttention knows both, and SDPA neither; it cannot be had here, only chosen."""
    model = build(family)
    model.config._attn_implementation_internal = "flash_attention_2"
    assert sparq.patch(model, **SPARSE).config._attn_implementation == base
    expected = logits(sparq.patch(build(family), **SPARSE))
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


def test_context_manager() -> None:
    model = build()
    before, stock = snapshot(model), logits(model)
    with sparq.patched(model, **SPARSE) as inside:
        assert inside is model
        assert not torch.equal(logits(model), stock)
        report = sparq.report(model)
    assert report.layers[0].sparse_steps == 3
    assert snapshot(model) == before

    with pytest.raises(KeyError, match="mine"), sparq.patched(model, **SPARSE):
        raise KeyError("mine")
    assert snapshot(model) == before

    with pytest.raises(ValueError, match="r=17"), sparq.patched(model, r=17):
        pytest.fail("the body must not run")
    assert snapshot(model) == before


def test_nested_contexts_give_back_knobs_and_counters() -> None:
    model = sparq.patch(build(), **SPARSE)
    expected = logits(model)
    with sparq.patched(model, **OTHER):
        assert sparq.report(model).total.decode_steps == 0
        with sparq.patched(model, SparqConfig(**SPARSE)):
            assert torch.equal(logits(model), expected)
        assert sparq.report(model).config == SparqConfig(**OTHER)
        assert sparq.report(model).total.decode_steps == 0
    assert sparq.report(model).config == SparqConfig(**SPARSE)
    assert sparq.report(model).layers[0].sparse_steps == 3
    assert torch.equal(logits(model), expected)
    assert snapshot(sparq.unpatch(model)) == snapshot(build())


def test_a_cache_outlives_the_patch() -> None:
    inputs, tokens, model = prompt(batch=1), next_tokens(1, 3), build()
    expected = teacher_forced(model, inputs, tokens)
    sparq.patch(model, **SPARSE)
    with torch.no_grad():
        cache = model(**inputs).past_key_values
    sparq.unpatch(model)
    for step in range(3):
        with torch.no_grad():
            actual = model(tokens[:, step : step + 1], past_key_values=cache).logits[:, -1]
        torch.testing.assert_close(actual, expected[:, step], rtol=1e-4, atol=1e-4)


def test_deepcopy_of_a_patched_model_stands_alone() -> None:
    model = sparq.patch(build(), **SPARSE)
    expected = logits(model)
    other = copy.deepcopy(model)
    assert sparq.report(other).total.decode_steps == 0
    assert torch.equal(logits(other), expected)
    sparq.patch(other, **OTHER)
    assert torch.equal(logits(model), expected) and not torch.equal(logits(other), expected)
    assert sparq.report(model).layers[0].sparse_steps == 6
    assert snapshot(sparq.unpatch(other)) == snapshot(build())
    assert torch.equal(logits(model), expected)


@pytest.mark.slow
def test_pickle_of_a_patched_model_in_a_fresh_process(tmp_path: Path) -> None:
    model = sparq.patch(build(), **SPARSE)
    torch.save(model, tmp_path / "model.pt")
    expected = generate(model, prompt(), tokens=4)
    code = (
        f"import sys; sys.path[:0] = {[path for path in sys.path if path]!r}\n"
        "import json, torch\n"
        f"model = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)\n"
        "from tests.sparq.tiny import generate, prompt\n"
        "import sparq\n"
        "tokens = generate(model, prompt(), tokens=4)\n"
        "steps = sparq.report(model).total.sparse_steps\n"
        "hooks = len(sparq.unpatch(model).model._forward_pre_hooks)\n"
        "print(json.dumps([tokens, steps, hooks, model.config._attn_implementation]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path.cwd())
    assert json.loads(done.stdout.splitlines()[-1]) == [expected, 9, 0, "sdpa"]


def test_save_pretrained_writes_an_ordinary_model(tmp_path: Path) -> None:
    build().save_pretrained(tmp_path / "stock")
    model = sparq.patch(build(), **SPARSE)
    logits(model)
    model.save_pretrained(tmp_path / "patched")
    files = sorted(path.name for path in (tmp_path / "stock").iterdir())
    assert sorted(path.name for path in (tmp_path / "patched").iterdir()) == files
    for name in files:
        assert (tmp_path / "patched" / name).read_bytes() == (tmp_path / "stock" / name).read_bytes()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "patched").eval()
    assert loaded.config._attn_implementation == "sdpa" and not loaded.model._forward_pre_hooks
    assert torch.equal(logits(loaded), logits(build()))


def test_state_dict_goes_in_and_out() -> None:
    model = sparq.patch(build(), **SPARSE)
    assert list(model.state_dict()) == list(build().state_dict())
    model.load_state_dict(build(seed=5).state_dict())
    assert torch.equal(logits(model), logits(sparq.patch(build(seed=5), **SPARSE)))


def test_a_patched_model_can_be_forgotten() -> None:
    model = sparq.patch(build(), **SPARSE)
    logits(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_other_hooks_stay() -> None:
    model, seen = build(), []
    mine = model.model.register_forward_hook(lambda *args: seen.append("mine"))
    sparq.patch(model, **SPARSE)
    sparq.unpatch(model)
    logits(model)
    assert seen == ["mine"] * 4
    mine.remove()
    assert snapshot(model) == snapshot(build())


def test_a_forward_pass_that_fails_does_no_harm() -> None:
    model = sparq.patch(build(), **SPARSE)
    expected = logits(model)
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.tensor([[10_000]]))
    assert torch.equal(logits(model), expected)


def test_a_model_that_does_not_hand_the_step_down_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then every step would be dense, and nothing would tell."""
    model = sparq.patch(build(), **SPARSE)
    for layer in model.model.layers:
        real = layer.forward
        monkeypatch.setattr(layer, "forward", lambda *args, real=real, sparq_step=None, **kwargs: real(*args, **kwargs))
    with pytest.raises(RuntimeError, match="LlamaModel did not hand"):
        logits(model)


def test_several_threads_on_one_model() -> None:
    model = sparq.patch(build(), **SPARSE)
    expected = logits(model)
    sparq.patch(model, **SPARSE)
    results: list[torch.Tensor] = []
    threads = [threading.Thread(target=lambda: results.append(logits(model))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and all(torch.equal(result, expected) for result in results)
    assert sparq.report(model).total.sparse_steps == 4 * 9


def test_the_caches_of_a_patched_model_are_sparq_caches() -> None:
    model = sparq.patch(build(), **SPARSE)
    output = model.generate(**prompt(), max_new_tokens=3, do_sample=False, pad_token_id=0, return_dict_in_generate=True)
    assert all(isinstance(layer, SparqLayer) for layer in output.past_key_values.layers)
    buffer = io.BytesIO()
    torch.save(output.past_key_values, buffer)
