"""The models that the whole-model benchmarks run: true layer shapes with random weights, or real ones; and the options
that choose one."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from harness import at_least_2, positive
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

import sparq

LONG_ENOUGH = 1 << 20  # positions: more than any context measured, whatever the real model was trained for
SMALL_VOCABULARY = 256
MEASURED_LAYERS = 2  # of a named shape


LLAMAS = {  # vocabulary, hidden, intermediate, layers, query heads, KV heads, head_dim, theta, tied embeddings
    "llama-3.2-1b": (128256, 2048, 8192, 16, 32, 8, 64, 500000.0, True),
    "llama-3-8b": (128256, 4096, 14336, 32, 32, 8, 128, 500000.0, False),
    "llama-2-7b": (32000, 4096, 11008, 32, 32, 32, 128, 10000.0, False),
}


def llama(name: str) -> LlamaConfig:
    vocabulary, hidden, intermediate, layers, heads, kv_heads, head_dim, theta, tied = LLAMAS[name]
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )


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
        return cls(
            query,
            getattr(text, "num_key_value_heads", None) or query,
            getattr(text, "head_dim", None) or text.hidden_size // query,
        )


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

    def __str__(self) -> str:
        said = [f"{self.name}: {self.layers} of {self.layers_of} layers"]
        if self.vocabulary < self.vocabulary_of:
            said.append(f"vocabulary of {self.vocabulary:,} instead of {self.vocabulary_of:,}")
        if self.random_weights:
            said.append("random weights")
        return ", ".join(said)

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
    if is_real(name):
        config = AutoConfig.from_pretrained(name)
        text = config.get_text_config(decoder=True)
        label = Path(name).name  # a folder's place is nobody's business
    else:
        config = text = SHAPES[name]()
        label = name
        config.max_position_embeddings = LONG_ENOUGH
    whole, vocabulary = text.num_hidden_layers, text.vocab_size
    kept = whole if layers is None else min(layers, whole)
    if kept < whole:
        text.num_hidden_layers = kept
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:kept]
        if not is_real(name):
            text.vocab_size = SMALL_VOCABULARY
    if is_real(name):
        model = AutoModelForCausalLM.from_pretrained(name, config=config, dtype=dtype, use_safetensors=True)
        model = model.to(device)
    else:
        model = from_config(config, dtype, device)
    endless(model)
    return Subject(model, label, kept, whole, text.vocab_size, vocabulary, not is_real(name))


def from_config(config: PreTrainedConfig, dtype: torch.dtype, device: str = "cpu") -> PreTrainedModel:
    """With the same random weights every time on a kind of device, where they are made."""
    config.bos_token_id = config.eos_token_id = None
    config.pad_token_id = 0
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return endless(model)


def endless(model: PreTrainedModel) -> PreTrainedModel:
    """Greedy, and without a token that ends an answer: a step must not depend on what was generated."""
    model.generation_config = GenerationConfig(pad_token_id=0, do_sample=False)
    return model.eval()


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """What the benchmarks of generation take."""
    shapes = ", ".join(SHAPES)
    parser.add_argument("--model", default="llama-3.2-1b", help=f"{shapes}, or a real model's folder or name")
    parser.add_argument("--layers", type=positive, help="keep the first of them only (default: 2; of a real model all)")
    parser.add_argument("--all-layers", action="store_true", help="of a named shape too, with its whole vocabulary")
    parser.add_argument("--rounds", type=positive, help="of several the first is not counted")
    parser.add_argument("--tokens", type=at_least_2, help="decode steps of each way in each round")
    parser.add_argument("--quick", action="store_true", help="less of everything: under a minute")


def add_knobs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--r", type=positive)
    parser.add_argument("--k", type=positive)
    parser.add_argument("--ratio", type=float, default=8)


def knobs_of(args: argparse.Namespace) -> dict[str, Any]:
    return dict(r=args.r, k=args.k, ratio=args.ratio)


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with one line about what is wrong."""
    if args.layers is not None and args.all_layers:
        parser.error("--layers and --all-layers exclude each other")
    if is_real(args.model) and "/" not in args.model and not Path(args.model).is_dir():
        parser.error(f"--model must be one of {', '.join(SHAPES)}, a folder, or owner/name, got {args.model!r}")
    try:
        sparq.SparqConfig(**knobs_of(args))
    except (TypeError, ValueError) as error:
        parser.error(str(error))


def build_subject(args: argparse.Namespace, dtype: str) -> Subject:
    layers = args.layers
    if layers is None and not args.all_layers and not is_real(args.model):
        layers = MEASURED_LAYERS
    return build(args.model, getattr(torch, dtype), layers, args.device)
