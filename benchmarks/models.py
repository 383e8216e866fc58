"""The models that are measured: true layer shapes with random weights, or real ones."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

LONG_ENOUGH = 1 << 20  # positions: more than any context measured, whatever the real model was trained for
SMALL_VOCABULARY = 256

LLAMA_FIELDS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
LLAMA_FIELDS += ("num_key_value_heads", "head_dim", "tie_word_embeddings")
LLAMAS = {  # these, and the base of the rotary positions
    "llama-3.2-1b": (128256, 2048, 8192, 16, 32, 8, 64, True, 500000.0),
    "llama-3-8b": (128256, 4096, 14336, 32, 32, 8, 128, False, 500000.0),
    "llama-2-7b": (32000, 4096, 11008, 32, 32, 32, 128, False, 10000.0),
}


def llama(name: str) -> LlamaConfig:
    *sizes, theta = LLAMAS[name]
    fields = dict(zip(LLAMA_FIELDS, sizes, strict=True))
    return LlamaConfig(**fields, rope_parameters={"rope_type": "default", "rope_theta": theta})


def pythia_1_4b() -> GPTNeoXConfig:
    return GPTNeoXConfig(
        vocab_size=50304,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=24,
        num_attention_heads=16,
        use_parallel_residual=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
    )


SHAPES: dict[str, Callable[[], PreTrainedConfig]] = {
    **{name: functools.partial(llama, name) for name in LLAMAS},
    "pythia-1.4b": pythia_1_4b,
}


@dataclass(frozen=True)
class Heads:
    """What one layer caches, and who asks."""

    query: int
    kv: int
    head_dim: int

    @classmethod
    def of(cls, config: PreTrainedConfig) -> Heads:
        text = config.get_text_config(decoder=True)
        query = text.num_attention_heads
        kv = getattr(text, "num_key_value_heads", None) or query
        return cls(query, kv, getattr(text, "head_dim", None) or text.hidden_size // query)


@dataclass(frozen=True)
class Subject:
    """A model to be measured, and what must be said about it beside every number."""

    model: PreTrainedModel
    name: str
    layers: int
    layers_of: int  # as many has the model that it is named after
    vocabulary: int
    vocabulary_of: int
    random_weights: bool

    def described(self) -> dict[str, object]:
        """For a JSON file."""
        return {name: value for name, value in vars(self).items() if name != "model"}


def is_real(name: str) -> bool:
    """Whether `--model` means weights to be loaded: a folder, or a name of the hub."""
    return name not in SHAPES


def build(name: str, dtype: torch.dtype, layers: int | None, device: str = "cpu") -> Subject:
    """A model of this name, ready to decode greedily without an end.

    Args:
        name: one of `SHAPES`, which gets random weights, or a real model's folder or name.
        layers: how many of its first layers to keep; None: all. A shape that is cut gets a vocabulary of 256, too: with
            the whole one the language model head would cost as much as several layers.
        device: where random weights are made, not only moved to.
    """
    config = AutoConfig.from_pretrained(name) if is_real(name) else SHAPES[name]()
    text = config.get_text_config(decoder=True)
    whole, vocabulary = text.num_hidden_layers, text.vocab_size
    if layers is not None and layers < whole:
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:layers]
        if not is_real(name):
            text.vocab_size = SMALL_VOCABULARY
    if is_real(name):
        loaded = AutoModelForCausalLM.from_pretrained(name, config=config, dtype=dtype, use_safetensors=True)
        model = endless(loaded.to(device))
    else:
        config.max_position_embeddings = LONG_ENOUGH
        model = from_config(config, dtype, device)
    label = Path(name).name  # a folder's place is nobody's business
    return Subject(model, label, text.num_hidden_layers, whole, text.vocab_size, vocabulary, not is_real(name))


def from_config(config: PreTrainedConfig, dtype: torch.dtype, device: str = "cpu") -> PreTrainedModel:
    """With the same random weights every time on a kind of device, where they are made."""
    config.bos_token_id = config.eos_token_id = None
    config.pad_token_id = 0
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return endless(model)


def quantize(model: PreTrainedModel) -> None:
    """The weights of all linear layers in 8 bits, in place, as docs/cpu.md has it. The model must be in bfloat16: in
    other dtypes PyTorch compiles such a layer to something slower than plain weights."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())
    compile_linear(model)


def compile_linear(model: nn.Module) -> nn.Module:
    """Compile each linear layer, in place, when it is first called."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.compile()
    return model


def endless(model: PreTrainedModel) -> PreTrainedModel:
    """Greedy, and without a token that ends an answer: a step must not depend on what was generated."""
    model.generation_config = GenerationConfig(pad_token_id=0, do_sample=False)
    return model.eval()
