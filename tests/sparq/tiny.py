"""Small random models of the families that SparQ serves, and how the tests drive them."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

VOCABULARY = 97

# initializer_range is ten times the usual one: with the usual one random attention is nearly uniform, and whatever
# positions were chosen, the logits would look right.
COMMON = dict(
    vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=1024,
    initializer_range=0.2,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
)
GQA = dict(num_key_value_heads=2)
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
ROPE = dict(rope_type="default", rope_theta=10_000.0)
WINDOWS = dict(sliding_window=16, layer_types=ALTERNATING)
# family: configuration class, model class, what is added to COMMON; a `vision_config` makes the rest the text's
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", GQA),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {}),
    "mistral": ("MistralConfig", "MistralForCausalLM", GQA | dict(sliding_window=None)),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", GQA),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", GQA | dict(head_dim=32)),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", GQA),
    "gemma2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        GQA
        | dict(
            head_dim=16,
            sliding_window=16,
            layer_types=ALTERNATING,
            attn_implementation="eager",  # the one that knows a softcap; older transformers choose another by default
            attn_logit_softcapping=2.0,
            query_pre_attn_scalar=16,
        ),
    ),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        GQA | WINDOWS | dict(head_dim=16, query_pre_attn_scalar=16),
    ),
    "gemma4": (  # its last layer reads the keys and values of the one before
        "Gemma4TextConfig",
        "Gemma4ForCausalLM",
        GQA
        | dict(
            vocab_size_per_layer_input=VOCABULARY,
            head_dim=16,
            global_head_dim=32,
            sliding_window=16,
            layer_types=["sliding_attention", "full_attention", "full_attention"],
            num_kv_shared_layers=1,
            hidden_size_per_layer_input=8,
        ),
    ),
    "gpt_oss": (
        "GptOssConfig",
        "GptOssForCausalLM",
        GQA | WINDOWS | dict(head_dim=16, num_local_experts=4, num_experts_per_tok=2, rope_parameters=ROPE),
    ),
    "granite": ("GraniteConfig", "GraniteForCausalLM", GQA | dict(attention_multiplier=0.3)),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", GQA),
    # its logits are scaled by 1/16 by default, which would hide in the tests' tolerance what attention does
    "cohere2": ("Cohere2Config", "Cohere2ForCausalLM", GQA | WINDOWS | dict(logit_scale=1.0)),
    "starcoder2": ("Starcoder2Config", "Starcoder2ForCausalLM", GQA),
    "smollm3": ("SmolLM3Config", "SmolLM3ForCausalLM", GQA),
    "glm4": ("Glm4Config", "Glm4ForCausalLM", GQA | dict(head_dim=16)),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", GQA | dict(num_local_experts=4, num_experts_per_tok=2)),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        GQA | dict(head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32),
    ),
    "llama4": (
        "Llama4TextConfig",
        "Llama4ForCausalLM",
        GQA
        | dict(
            head_dim=16,
            num_local_experts=2,
            intermediate_size_mlp=96,
            attention_chunk_size=16,
            layer_types=["chunked_attention", "full_attention", "chunked_attention"],
        ),
    ),
    "qwen2_vl": (
        "Qwen2VLConfig",
        "Qwen2VLForConditionalGeneration",
        GQA
        | dict(
            rope_parameters=dict(rope_type="default", rope_theta=10_000.0, mrope_section=[2, 3, 3]),
            vision_config=dict(depth=1, embed_dim=32, hidden_size=64, num_heads=2, patch_size=14),
        ),
    ),
}
NAMES = {
    "llama": "Llama",
    "gpt_neox": "GPT-NeoX (Pythia)",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "phi3": "Phi-3",
    "gemma2": "Gemma 2",
    "gemma3": "Gemma 3",
    "gemma4": "Gemma 4",
    "gpt_oss": "gpt-oss",
    "granite": "Granite",
    "olmo2": "OLMo 2",
    "cohere2": "Cohere 2 (Command R7B)",
    "starcoder2": "StarCoder 2",
    "smollm3": "SmolLM 3",
    "glm4": "GLM 4",
    "mixtral": "Mixtral",
    "qwen3_moe": "Qwen3-MoE",
    "llama4": "Llama 4",
    "qwen2_vl": "Qwen2-VL",
}


def build(family: str = "llama", *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A seeded random model: the same call gives the same weights."""
    config_class, model_class, added = FAMILIES[family]
    torch.manual_seed(seed)
    parts = COMMON | added | changes
    if vision := parts.pop("vision_config", None):
        parts = dict(text_config=parts, vision_config=vision)
    config = getattr(transformers, config_class)(**parts)
    return getattr(transformers, model_class)(config).eval()


def prompt(batch: int = 2, length: int = 40, padding: int = 9, seed: int = 1) -> dict[str, Tensor]:
    """Random token ids and their mask; all rows but the first are padded on the left."""
    ids = torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[1:, :padding] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def generate(model: PreTrainedModel, inputs: dict[str, Tensor], tokens: int = 12, **kwargs: Any) -> list[list[int]]:
    """The new tokens, greedy unless told otherwise."""
    kwargs = {"do_sample": False, "pad_token_id": 0} | kwargs
    output = model.generate(**inputs, max_new_tokens=tokens, **kwargs)
    return output[:, inputs["input_ids"].shape[1] :].tolist()


@torch.no_grad()
def teacher_forced(
    model: PreTrainedModel, inputs: dict[str, Tensor], tokens: Tensor, cache: Cache | None = None
) -> Tensor:
    """Logits [B, steps, vocabulary] of decode steps that are fed the columns of `tokens` [B, steps], by bare calls."""
    mask = inputs["attention_mask"]
    output = model(**inputs, past_key_values=cache, use_cache=True)
    logits = []
    for step in range(tokens.shape[1]):
        mask = torch.cat([mask, mask.new_ones(mask.shape[0], 1)], dim=1)
        output = model(
            input_ids=tokens[:, step : step + 1], attention_mask=mask, past_key_values=output.past_key_values
        )
        logits.append(output.logits[:, -1])
    return torch.stack(logits, dim=1)


def attention_module() -> nn.Module:
    """All that the attention function looks at of the first attention layer of a model."""
    module = nn.Module()
    module.layer_idx, module.is_causal = 0, True
    return module


def next_tokens(batch: int = 2, steps: int = 12, seed: int = 2) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, steps), generator=torch.Generator().manual_seed(seed))


def check_beams(model: PreTrainedModel) -> None:
    """The tokens that a beam search has found, fed again one by one, are as likely as the search said."""
    inputs = prompt(batch=1, padding=0)
    found = model.generate(
        **inputs,
        max_new_tokens=8,
        num_beams=4,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
        length_penalty=0.0,
        pad_token_id=0,
    )
    tokens = found.sequences[:, 40:]
    with torch.no_grad():
        first = model(**inputs).logits[:, -1:]
    logits = torch.cat([first, teacher_forced(model, inputs, tokens[:, :-1])], dim=1)
    likelihood = logits.log_softmax(-1).gather(-1, tokens[..., None]).sum()
    torch.testing.assert_close(likelihood, found.sequences_scores[0], rtol=1e-4, atol=1e-4)
