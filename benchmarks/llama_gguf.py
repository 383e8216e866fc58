"""A transformers Llama written as a GGUF file that llama.cpp loads: the same weights, for the same work.

llama.cpp's own converter reads a folder with a tokenizer, which a model of random weights has none of: this writes the
tensors and the least metadata, and declares that there is no vocabulary (tokens go in as numbers).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

NAMES = {  # transformers' name within a layer: GGUF's
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def permute(weight: Tensor, heads: int) -> Tensor:
    """The rows of a projection to queries or keys, [heads * head_dim, hidden], in the order of llama.cpp's rotation.

    transformers rotates component i together with i + head_dim / 2, llama.cpp 2 i with 2 i + 1 (LlamaModel.permute in
    its converter). `heads` are the KV heads where the weight makes keys.
    """
    rows, hidden = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, hidden).transpose(1, 2).reshape(rows, hidden)


def tensors(model: LlamaForCausalLM) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under GGUF's name, in the model's dtype but for the norms: llama.cpp wants those in float32."""
    config, state = model.config, model.state_dict()
    yield "token_embd.weight", state["model.embed_tokens.weight"]
    for layer in range(config.num_hidden_layers):
        for name, gguf_name in NAMES.items():
            weight = state[f"model.layers.{layer}.{name}.weight"]
            if gguf_name == "attn_q":
                weight = permute(weight, config.num_attention_heads)
            elif gguf_name == "attn_k":
                weight = permute(weight, config.num_key_value_heads)
            yield f"blk.{layer}.{gguf_name}.weight", weight.float() if weight.dim() == 1 else weight
    yield "output_norm.weight", state["model.norm.weight"].float()
    yield "output.weight", state["lm_head.weight"]


def write_gguf(model: LlamaForCausalLM, path: Path) -> None:
    """Write a model of float32 or float16, with default rotary embeddings and no biases, to `path`.

    Raises:
        ValueError: where the model has what this does not write.
    """
    import gguf

    config: LlamaConfig = model.config
    rope = config.rope_parameters
    if rope["rope_type"] != "default" or config.attention_bias or config.mlp_bias:
        raise ValueError("only default rotary embeddings and layers without biases can be written")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    for name, tensor in tensors(model):
        writer.add_tensor(name, tensor.detach().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
