"""A small byte-level Llama whose first layers start out attending fixed distances back."""

import math

import torch
import torch.nn.functional as F
from recall_model import (
    BOS,
    EOS,
    HEAD_DIM,
    MAX_POSITIONS,
    OFFSET_LOGIT,
    OFFSETS,
    PAD,
    VOCAB_SIZE,
    offset_query_and_key,
)
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb


def build(layers: int, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=HEAD_DIM,
        max_position_embeddings=MAX_POSITIONS,
        # A large base leaves half of each head's components almost unrotated over 8192 bytes: these match content.
        rope_parameters={"rope_type": "default", "rope_theta": 1e8},
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    model = LlamaForCausalLM(config).float()
    initialise(model)
    return model


@torch.no_grad()
def initialise(model: LlamaForCausalLM) -> None:
    config, base = model.config, model.model
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.normal_(0, parameter.shape[1] ** -0.5)
    base.embed_tokens.weight.normal_(0, 1)
    model.lm_head.weight.mul_(0.3)
    # A constant in every embedding plays the bias of the offset heads' queries and keys.
    constant = math.sqrt(config.hidden_size / 8)
    base.embed_tokens.weight[:, 0] = constant
    constant /= math.sqrt(1 + 1 / 8)  # what RMSNorm leaves of it

    groups = config.num_attention_heads // config.num_key_value_heads
    for index, layer in enumerate(base.layers):
        layer.self_attn.o_proj.weight.mul_(0.7)
        layer.mlp.down_proj.weight.mul_(0.5)
        # Deeper layers see the constant diluted by what earlier layers added.
        gain = math.sqrt(OFFSET_LOGIT * math.sqrt(HEAD_DIM)) / constant * (1 if index == 0 else 1.5)
        for head, offset in enumerate(OFFSETS[index] if index < len(OFFSETS) else ()):
            query = layer.self_attn.q_proj.weight[head * HEAD_DIM :][:HEAD_DIM]
            key = layer.self_attn.k_proj.weight[head // groups * HEAD_DIM :][:HEAD_DIM]
            query.mul_(0.3)
            key.mul_(0.3)
            components, offset_query, offset_key = offset_query_and_key(base.rotary_emb.inv_freq, offset)
            query[components, 0] = gain * offset_query
            key[components, 0] = gain * offset_key


def offset_projections(model: LlamaForCausalLM) -> list[nn.Linear]:
    """The projections in which the offsets are set."""
    attentions = [layer.self_attn for layer in model.model.layers[: len(OFFSETS)]]
    return [projection for attention in attentions for projection in (attention.q_proj, attention.k_proj)]


def forward(model: LlamaForCausalLM, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    """Logits [B, S, vocabulary] of input_ids [B, S] at freely chosen position_ids [B, S], all one causal sequence.

    The model's own forward would take a jump in the positions for the start of another packed sequence.
    """
    base, (batch, length) = model.model, input_ids.shape
    hidden = base.embed_tokens(input_ids)
    cos, sin = base.rotary_emb(hidden, position_ids)
    for layer in base.layers:
        attention, normed = layer.self_attn, layer.input_layernorm(hidden)
        query, key, value = (
            projection(normed).view(batch, length, -1, HEAD_DIM).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, cos, sin)
        output = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        hidden = hidden + attention.o_proj(output.transpose(1, 2).reshape(batch, length, -1))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return model.lm_head(base.norm(hidden))
