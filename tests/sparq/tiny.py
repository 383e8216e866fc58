"""Small random models of the families that SparQ serves, and how the tests drive them."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor
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
# family: configuration class, model class, what is added to COMMON
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
        GQA | dict(head_dim=16, sliding_window=16, layer_types=ALTERNATING, query_pre_attn_scalar=16),
    ),
}


def build(family: str = "llama", *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A seeded random model: the same call gives the same weights."""
    config_class, model_class, added = FAMILIES[family]
    torch.manual_seed(seed)
    config = getattr(transformers, config_class)(**(COMMON | added | changes))
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


def next_tokens(batch: int = 2, steps: int = 12, seed: int = 2) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, steps), generator=torch.Generator().manual_seed(seed))
