"""A small byte-level GPT-NeoX, built like Pythia, whose first layers start out attending fixed distances back."""

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
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb


def build(layers: int, seed: int) -> GPTNeoXForCausalLM:
    torch.manual_seed(seed)
    config = GPTNeoXConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=4 * HEAD_DIM,
        intermediate_size=512,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
        use_parallel_residual=True,
        tie_word_embeddings=False,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    model = GPTNeoXForCausalLM(config).float()
    initialise(model)
    return model


@torch.no_grad()
def initialise(model: GPTNeoXForCausalLM) -> None:
    base = model.gpt_neox
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.normal_(0, parameter.shape[1] ** -0.5)
    base.embed_in.weight.normal_(0, 1)
    model.get_output_embeddings().weight.mul_(0.3)

    gain = math.sqrt(OFFSET_LOGIT * math.sqrt(HEAD_DIM))
    for index, layer in enumerate(base.layers):
        layer.attention.dense.weight.mul_(0.7)
        layer.mlp.dense_4h_to_h.weight.mul_(0.5)
        projection = layer.attention.query_key_value
        for head, offset in enumerate(OFFSETS[index] if index < len(OFFSETS) else ()):
            components, offset_query, offset_key = offset_query_and_key(base.rotary_emb.inv_freq, offset)
            # The rows are query, key and value of head 0, then those of head 1, and so on.
            rows = slice(3 * head * HEAD_DIM, (3 * head + 2) * HEAD_DIM)
            projection.weight[rows].mul_(0.3)
            query, key = projection.bias[rows].chunk(2)
            query[components] = gain * offset_query
            key[components] = gain * offset_key


def offset_projections(model: GPTNeoXForCausalLM) -> list[nn.Linear]:
    """The projections in which the offsets are set."""
    return [layer.attention.query_key_value for layer in model.gpt_neox.layers[: len(OFFSETS)]]


def forward(model: GPTNeoXForCausalLM, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    """Logits [B, S, vocabulary] of input_ids [B, S] at freely chosen position_ids [B, S], all one causal sequence.

    The model's own forward would take a jump in the positions for the start of another packed sequence.
    """
    base, (batch, length) = model.gpt_neox, input_ids.shape
    hidden = base.embed_in(input_ids)
    cos, sin = base.rotary_emb(hidden, position_ids)
    for layer in base.layers:
        heads = layer.attention.query_key_value(layer.input_layernorm(hidden)).view(batch, length, -1, 3 * HEAD_DIM)
        query, key, value = heads.transpose(1, 2).chunk(3, dim=-1)
        query, key = apply_rotary_pos_emb(query, key, cos, sin)
        output = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        attended = layer.attention.dense(output.transpose(1, 2).reshape(batch, length, -1))
        hidden = hidden + attended + layer.mlp(layer.post_attention_layernorm(hidden))
    return model.get_output_embeddings()(base.final_layer_norm(hidden))
