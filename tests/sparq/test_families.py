"""The families of models: those that SparQ serves, and those that `patch` refuses, untouched."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import transformers

import sparq
from tests.sparq.slow import Slow
from tests.sparq.snapshot import snapshot
from tests.sparq.tiny import (
    ALTERNATING,
    COMMON,
    FAMILIES,
    GQA,
    NAMES,
    build,
    generate,
    next_tokens,
    prompt,
    teacher_forced,
)

SLIDING = dict.fromkeys(("gemma2", "gemma3", "gpt_oss", "cohere2", "llama4"), 2)  # of three layers, a window or chunk
SLIDING["gemma4"] = 1


@pytest.mark.parametrize("family", FAMILIES)
def test_full_budget_is_the_stock_model(family: str) -> None:
    inputs = prompt()
    expected = generate(build(family), inputs)
    model = sparq.patch(build(family), k=1000, min_length=0)
    assert generate(model, inputs) == expected
    dense = sparq.report(model).total.dense_steps
    sliding = SLIDING.get(family, 0)
    assert dense.get("k covers the context") == (3 - sliding) * 11
    assert dense.get("sliding-window layer", 0) == sliding * 11


@pytest.mark.parametrize("family", FAMILIES)
def test_sparse_steps_equal_the_definition(family: str) -> None:
    inputs, tokens = prompt(), next_tokens(steps=4)
    stock = teacher_forced(build(family), inputs, tokens)
    expected = teacher_forced(Slow(r=4, k=12).install(build(family)), inputs, tokens)
    model = sparq.patch(build(family), r=4, k=12, min_length=0)
    actual = teacher_forced(model, inputs, tokens)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    # the test has power only where sparsity changes something
    assert (stock - expected).abs().mean() > 1000 * (actual - expected).abs().mean()
    assert sparq.report(model).total.sparse_steps == (3 - SLIDING.get(family, 0)) * 4


def test_the_documents_list_these_families() -> None:
    text = (Path(__file__).parents[2] / "docs" / "support.md").read_text(encoding="utf-8")
    listed = re.search(r"\*\*Models\*\*, each tested: (.*?)\. Others", text, re.DOTALL)
    assert listed is not None
    assert re.split(r",\s+", listed[1]) == list(NAMES.values())
    assert list(NAMES) == list(FAMILIES)


def test_qwen2_with_windows_in_some_layers() -> None:
    changes = dict(use_sliding_window=True, sliding_window=16, layer_types=ALTERNATING)
    inputs, tokens = prompt(), next_tokens(steps=4)
    expected = teacher_forced(Slow(r=4, k=12).install(build("qwen2", **changes)), inputs, tokens)
    model = sparq.patch(build("qwen2", **changes), r=4, k=12, min_length=0)
    torch.testing.assert_close(teacher_forced(model, inputs, tokens), expected, rtol=1e-4, atol=1e-4)
    assert [sparq.report(model).layers[i].sparse_steps for i in range(3)] == [0, 4, 0]


def test_a_head_that_goes_past_its_base_model() -> None:
    """OPTForCausalLM calls the decoder inside its base model: what is put on the base model never runs."""
    torch.manual_seed(0)
    size = dict(ffn_dim=96, word_embed_proj_dim=64, init_std=0.2)
    model = transformers.OPTForCausalLM(transformers.OPTConfig(**(COMMON | size))).eval()
    before, inputs, tokens = snapshot(model), prompt(), next_tokens(steps=4)
    for part in (model, model.model, model.model.decoder):
        sparq.patch(part, r=4, k=12, min_length=0)
        actual = teacher_forced(model, inputs, tokens)
        assert sparq.report(part).total.sparse_steps == 3 * 4
    sparq.unpatch(model)
    assert snapshot(model) == before
    expected = teacher_forced(Slow(r=4, k=12).install(model), inputs, tokens)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_the_language_model_of_a_multimodal_one() -> None:
    torch.manual_seed(0)
    text = COMMON | FAMILIES["gemma3"][2]
    vision = dict(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = transformers.Gemma3Config(
        text_config=transformers.Gemma3TextConfig(**text),
        vision_config=vision,
        mm_tokens_per_image=4,
        initializer_range=0.2,
    )
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    before, inputs, tokens = snapshot(model), prompt(), next_tokens(steps=4)
    sparq.patch(model, r=4, k=12, min_length=0)
    assert model.config.vision_config._attn_implementation == "sdpa"
    actual = teacher_forced(model, inputs, tokens)
    assert [sparq.report(model).layers[i].sparse_steps for i in range(3)] == [0, 4, 0]
    assert snapshot(sparq.unpatch(model)) == before
    assert (teacher_forced(model, inputs, tokens) - actual).abs().max() > 0.01
    expected = teacher_forced(Slow(r=4, k=12).install(model), inputs, tokens)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_attention_to_other_values_than_the_cached_is_dense() -> None:
    """DiffLlama attends twice, to halves of V: the sum over the cached V is of no use to it."""
    torch.manual_seed(0)
    model = transformers.DiffLlamaForCausalLM(transformers.DiffLlamaConfig(**(COMMON | GQA))).eval()
    inputs, tokens = prompt(), next_tokens(steps=2)
    expected = teacher_forced(model, inputs, tokens)
    sparq.patch(model, r=4, k=12, min_length=0)
    with pytest.warns(UserWarning, match="other keys and values") as caught:
        actual = teacher_forced(model, inputs, tokens)
    assert sum("sparq" in str(warning.message) for warning in caught) == 1
    assert sparq.report(model).total.sparse_steps == 0
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


REFUSED = {
    "MambaForCausalLM": ("MambaConfig", dict(state_size=4), "recurrent state|no cache of keys and values"),
    "Qwen3NextForCausalLM": (
        "Qwen3NextConfig",
        GQA
        | dict(
            layer_types=["linear_attention", "full_attention", "linear_attention"],
            head_dim=16,
            num_experts=4,
            num_experts_per_tok=2,
            linear_num_key_heads=2,
            linear_num_value_heads=2,
            linear_key_head_dim=16,
            linear_value_head_dim=16,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
        ),
        "linear_attention",
    ),
    "DeepseekV3ForCausalLM": (
        "DeepseekV3Config",
        dict(
            num_key_value_heads=4,
            kv_lora_rank=16,
            q_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=16,
            v_head_dim=16,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_group=1,
            topk_group=1,
            moe_intermediate_size=16,
            first_k_dense_replace=3,
        ),
        "latent attention",
    ),
    "T5ForConditionalGeneration": ("T5Config", dict(d_model=64, d_ff=96, d_kv=16, num_layers=2), "encoder-decoder"),
    "BartForCausalLM": (
        "BartConfig",
        dict(d_model=64, decoder_layers=2, encoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=96),
        "attention interface",
    ),
    "BertModel": ("BertConfig", {}, "causal"),
    "MistralForCausalLM": ("MistralConfig", GQA | dict(sliding_window=16), "sliding window of 16"),
    "Gemma3ForCausalLM": (
        "Gemma3TextConfig",
        GQA | dict(head_dim=16, layer_types=["sliding_attention"] * 3),
        "none of its layers attends to the whole context",
    ),
    "NemotronForCausalLM": ("NemotronConfig", GQA, "NemotronDecoderLayer does not hand"),
    "BloomForCausalLM": ("BloomConfig", dict(n_layer=2, n_head=4), "attention interface"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_the_model_is_touched(name: str) -> None:
    config_class, added, reason = REFUSED[name]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**(COMMON | added))
    model = getattr(transformers, name)(config).eval()
    before = snapshot(model)
    with pytest.raises(ValueError, match=reason) as error:
        sparq.patch(model, r=4, k=12)
    assert str(error.value).startswith("sparq cannot serve ") and "\n" not in str(error.value)
    assert snapshot(model) == before
    with pytest.raises(ValueError, match="must be patched"):
        sparq.report(model)
    sparq.unpatch(model)  # nothing to undo
    assert snapshot(model) == before


def test_paged_attention_is_refused() -> None:
    model = build()
    model.config._attn_implementation_internal = "paged|sdpa"
    before = snapshot(model)
    with pytest.raises(ValueError, match="paged"):
        sparq.patch(model)
    assert snapshot(model) == before


def test_not_a_model() -> None:
    with pytest.raises(TypeError, match="PreTrainedModel, or wrap one, got Linear"):
        sparq.patch(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="PreTrainedModel, or wrap one, got str"):
        sparq.patch("meta-llama/Llama-3.2-1B")  # type: ignore[type-var]
