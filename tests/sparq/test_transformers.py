"""What SparQ knows of transformers, an entry of docs/transformers.md each: a failure names what a new version has
changed."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AttentionInterface, DynamicCache, GenerationMixin, StaticCache, cache_utils
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import create_causal_mask, eager_mask, sdpa_mask

from sparq import attention, cache, cache_argument, generating, served, static_cache, step
from tests.sparq.tiny import build, prompt

DOCUMENT = Path(__file__).parents[2] / "docs" / "transformers.md"


def holds(entry: str, what: bool) -> None:
    assert what, f"docs/transformers.md, entry '{entry}': no longer so in transformers {transformers.__version__}"


def test_every_entry_has_its_test() -> None:
    rows = re.findall(r"^\| (.+?) \|.*\| `(test_\w+)(?:\.py)?` \|$", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) >= 15
    for entry, test in rows:
        assert test in globals() or (Path(__file__).parent / f"{test}.py").exists(), f"{entry}: there is no {test}"


def test_cache_argument() -> None:
    model, given = build(), []
    handle = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: given.append(cache_argument.find_cache((*kwargs.values(), *args))),
        with_kwargs=True,
    )
    model.generate(**prompt(), max_new_tokens=2, pad_token_id=0)
    handle.remove()
    holds("cache argument", len(given) == 2 and isinstance(given[0], Cache) and given[0] is given[1])
    for function in (type(model).forward, type(model.model).forward, GenerationMixin.prepare_inputs_for_generation):
        holds("cache argument", cache_argument.cache_name(function) in cache_argument.NAMES)


def test_keyword_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = build(), []
    real = sdpa_attention_forward

    def listening(*args, **kwargs):
        seen.append(kwargs.pop("sparq_step", None))
        return real(*args, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", listening)
    model.model(**prompt(), sparq_step="handed down")
    holds("keyword arguments", seen == ["handed down"] * 3)
    for layer in (type(model), type(model.model), type(model.model.layers[0])):
        holds("keyword arguments", served._hands_down(layer))


def test_attention_function() -> None:
    stock = list(inspect.signature(sdpa_attention_forward).parameters)
    own = list(inspect.signature(attention.sparq_attention).parameters)
    holds("attention function", own[1:10] == stock[:9] and stock[8] == "position_bias")
    holds("attention function", set(attention.IMPLEMENTATIONS.values()) <= set(AttentionInterface().valid_keys()))


def test_eager_attention() -> None:
    for family in ("llama", "gpt_neox", "gemma2", "gpt_oss", "mistral", "qwen3"):
        for layer in served.causal_layers(build(family)):
            function = attention._eager(layer)
            parameters = inspect.signature(function).parameters
            wanted = ["module", "query", "key", "value", "attention_mask"]
            holds("eager attention", list(parameters)[:5] == wanted and "scaling" in parameters)


def test_mask_functions() -> None:
    common = dict(batch_size=1, q_offset=0, kv_offset=0, device="cpu")
    for function in (sdpa_mask, eager_mask):
        holds("mask functions", function(q_length=3, kv_length=5, config=None, **common | dict(q_offset=2)) is not None)
    holds("mask functions", sdpa_mask(q_length=1, kv_length=5, **common | dict(q_offset=4)) is None)
    holds("mask functions", sdpa_mask(q_length=5, kv_length=5, **common) is None)
    holds("mask functions", sdpa_mask(q_length=5, kv_length=9, **common) is None)  # an empty static cache
    seen = []
    model = build()
    transformers.AttentionMaskInterface.register("asked", lambda *args, **kwargs: seen.append(kwargs.get("config")))
    AttentionInterface.register("asked", sdpa_attention_forward)
    model.set_attn_implementation("asked")
    name = next(name for name in cache_argument.NAMES if name in inspect.signature(create_causal_mask).parameters)
    create_causal_mask(
        config=model.config, inputs_embeds=torch.zeros(1, 3, 4), attention_mask=None, position_ids=None, **{name: None}
    )
    holds("mask functions", seen == [model.config])


def test_implementation_names() -> None:
    model = build("qwen2_vl")
    for name in ("_supports_sdpa", "_supports_attention_backend", "_is_stateful"):
        holds("implementation names", isinstance(getattr(type(model), name), bool))
    holds("implementation names", type(model)._can_set_attn_implementation() is True)
    parts = served.implementations(model.config, "sdpa")
    holds("implementation names", parts[""] == "sdpa" and set(parts) > {""})
    model.set_attn_implementation({"": "eager"} | {name: "sdpa" for name in parts if name})
    after = served.implementations(model.config, "sdpa")
    holds("implementation names", after[""] == "eager" and all(after[name][""] == "sdpa" for name in after if name))


# The models, and other files, that ask for a name: what each means for SparQ is in the document.
KNOWN_TESTS_FOR_A_NAME = {
    *("gemma4", "gemma4_unified"),
    *("axk2", "deepseek_v32", "dots3_note", "glm5_next", "glm_moe_dsa", "hy_v4", "hy_v4_vl", "minimax_m3_vl"),
    *("mistral_large4", "gpt2", "decision_transformer", "falcon", "timm_backbone", "timm_wrapper", "qwen2_5_omni"),
    *("configuration_utils.py", "trainer.py", "continuous_batching"),
}


def test_tests_for_a_name() -> None:
    """In the text of every file: a test in a new model may be one that our name leads past."""
    package = Path(transformers.__file__).parent
    test = re.compile(r"""(attn_implementation|attn_impl)["')\]]* *(==|!=|(not )?in) *[\["'(]""")
    found = set()
    for path in package.rglob("*.py"):
        if "modular_" in path.name or not test.search(path.read_text(encoding="utf-8")):
            continue
        parts = path.relative_to(package).parts
        found.add(parts[0] if len(parts) == 1 else parts[1])
    new = found - KNOWN_TESTS_FOR_A_NAME - {"modeling_utils.py", "masking_utils.py"}
    holds(f"tests for a name (new: {', '.join(sorted(new))})", not new)
    text = DOCUMENT.read_text(encoding="utf-8")
    assert all(name.removesuffix(".py") in text for name in KNOWN_TESTS_FOR_A_NAME)


def test_attention_layers() -> None:
    for family, count in (("llama", 3), ("gpt_neox", 3), ("gemma3", 3), ("qwen2_vl", 3)):
        layers = served.causal_layers(served.decoder_of(build(family)))
        holds("attention layers", [layer.layer_idx for layer in layers] == list(range(count)))
        sizes = [getattr(layer, "head_dim", None) or getattr(layer, "head_size", None) for layer in layers]
        holds("attention layers", all(isinstance(size, int) for size in sizes))


def test_text_configuration() -> None:
    text = build("qwen2_vl").config.get_text_config(decoder=True)
    holds("text configuration", text.num_attention_heads > 0 and text.hidden_size > 0)
    gemma = build("gemma3").config.get_text_config(decoder=True)
    holds("text configuration", set(gemma.layer_types) <= served.SUPPORTED_LAYER_TYPES)
    holds("text configuration", served.is_softcapped(build("gemma2").config))
    holds("text configuration", hasattr(transformers.DeepseekV3Config(), "kv_lora_rank"))
    holds("text configuration", hasattr(transformers.MistralConfig(), "sliding_window"))


def test_dynamic_layer() -> None:
    layer = DynamicLayer()
    holds("dynamic layer", not layer.is_initialized)
    keys, values = torch.rand(1, 2, 5, 4), torch.rand(1, 2, 5, 4)
    layer.update(keys, values)
    holds("dynamic layer", layer.is_initialized and torch.equal(layer.keys, keys) and torch.equal(layer.values, values))
    holds("dynamic layer", layer.device == keys.device and layer.get_seq_length() == 5)
    layer.crop(-2)
    holds("dynamic layer", torch.equal(layer.keys, keys[:, :, :3]))
    own = {name for name, value in vars(cache.SparqLayer).items() if inspect.isfunction(value)}
    public = {name for name in own if not name.startswith("_")} - {"index", "use_index", "holds", "sum_before"}
    holds("dynamic layer", all(hasattr(DynamicLayer, name) for name in public))
    # A method that we do not know of may change what the layer holds: it goes through `keys` and `values` then, which
    # drop the index; but look whether it is so.
    known = public | {"__init__", "__repr__", "get_mask_sizes", "get_query_offset", "get_max_cache_shape"}
    known |= {"get_max_length", "activate_past_recording"}
    new = {name for name, value in inspect.getmembers(DynamicLayer, inspect.isfunction)} - known
    holds(f"dynamic layer (new methods: {sorted(new)})", not new)
    held = DynamicCache(config=build().config)
    holds("dynamic layer", len(held.layers) == 3 and held.offloading is False)


def test_static_layer() -> None:
    config = build().config
    layer = StaticCache(config=config, max_cache_len=8).layers[0]
    before = set(vars(layer))
    layer.lazy_initialization(torch.zeros(1, 2, 1, 16), torch.zeros(1, 2, 1, 16))
    new = set(vars(layer)) - before - set(static_cache.TAKEN_OVER)
    holds(f"static layer (lazy_initialization also sets {sorted(new)})", type(layer) is StaticLayer and not new)
    length, keys = layer.cumulative_length, layer.keys
    layer.update(torch.ones(1, 2, 3, 16), torch.ones(1, 2, 3, 16))
    holds("static layer", int(length) == 3 and layer.cumulative_length is length and layer.keys is keys)
    layer.reset()
    holds("static layer", int(length) == 0 and layer.cumulative_length is length and layer.keys is keys)


def test_layers_without_tokens() -> None:
    holds("layers without tokens", not step._is_filled(DynamicLayer(), False))
    dummy = getattr(cache_utils, "DummyLayer", None)
    if dummy is not None:
        holds("layers without tokens", dummy().keys is None and not step._is_filled(dummy(), False))


def test_quantized_layers() -> None:
    holds("quantized layers", issubclass(cache.QUANTIZED_LAYER, DynamicLayer))
    holds("quantized layers", issubclass(cache_utils.QuantizedLayer, cache.QUANTIZED_LAYER))


def test_prefill() -> None:
    """In chunks of 16, the last of which is shorter; then three tokens."""
    model, seen = build(), []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(generating.is_prefill()),
        with_kwargs=True,
    )
    generating.GenerateNotes(model).install()
    ids = torch.arange(3, 43)[None]
    model.generate(ids, prefill_chunk_size=16, max_new_tokens=4, do_sample=False, pad_token_id=0)
    holds("prefill", seen == [True] * 3 + [False] * 3)


def test_assisted_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls, fed = build(), [], []
    real = getattr(GenerationMixin, generating.CANDIDATES)

    def listening(self, *args, **kwargs):
        found = cache_argument.find_cache(kwargs["model_kwargs"].values())
        calls.append((args, kwargs["input_ids"].shape[1], found is not None and found.get_seq_length() == 0))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(GenerationMixin, generating.CANDIDATES, listening)
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: fed.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    ids = torch.arange(3, 23)[None].repeat(1, 3)
    notes = generating.GenerateNotes(model)
    notes.install()
    output = model.generate(
        ids, prompt_lookup_num_tokens=4, max_new_tokens=6, do_sample=False, return_dict_in_generate=True, pad_token_id=0
    )
    holds("assisted decoding", calls == [((), 60, True)] and fed[0] == 64)
    held = cache_argument.find_cache(output.values())
    holds("assisted decoding", held is not None and hasattr(held, "_sparq_drafting"))
    holds("assisted decoding", generating.drafting(held) is None)  # the object is gone
