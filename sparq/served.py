"""Which models SparQ can serve, where their attention layers are, and which implementation these have chosen."""

from __future__ import annotations

import inspect
import re
import threading
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from sparq.attention import IMPLEMENTATIONS
from sparq.config import SparqConfig

NAME = "sparq"  # the attention implementation by which a model patches itself (implementation.py)
SUPPORTED_LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention"}

_parsing = threading.Lock()


def unwrap(model: nn.Module) -> PreTrainedModel:
    """`model`, or the one model of transformers that it wraps: PEFT's models are not `PreTrainedModel`s."""
    inside = [m for m in model.modules() if isinstance(m, PreTrainedModel)] if isinstance(model, nn.Module) else []
    if not inside:
        raise TypeError(f"model must be a transformers PreTrainedModel, or wrap one, got {type(model).__name__}")
    outermost = inside[0]  # modules() gives what holds others before them
    others = set(inside).difference(outermost.modules())
    if others:
        names = ", ".join(sorted(type(m).__name__ for m in (outermost, *others)))
        raise TypeError(
            f"model must wrap one transformers PreTrainedModel, {type(model).__name__} has several: {names}"
        )
    return outermost


def decoder_of(model: nn.Module) -> PreTrainedModel:
    decoder: PreTrainedModel = unwrap(model).base_model  # type: ignore[assignment]
    # The innermost model that holds all attention layers: a language model head may call it past its base model (OPT).
    layers = set(causal_layers(decoder))
    if layers:
        for module in decoder.modules():
            if isinstance(module, PreTrainedModel) and layers.issubset(module.modules()):
                decoder = module
    return decoder


def causal_layers(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.modules() if hasattr(m, "layer_idx") and getattr(m, "is_causal", False)]


def is_entered(decoder: PreTrainedModel) -> bool:
    return decoder.config._attn_implementation in IMPLEMENTATIONS.values()


def base_of(decoder: PreTrainedModel, own: str) -> str:
    """The implementation for what is not sparse, in a model that has chosen `own`."""
    # FlashAttention and others know sinks and softcaps; of the two here, eager alone does.
    return own if own in IMPLEMENTATIONS else default_base(decoder)


def default_base(decoder: PreTrainedModel) -> str:
    return "sdpa" if decoder._supports_sdpa and not is_softcapped(decoder.config) else "eager"


def is_softcapped(config: PreTrainedConfig) -> bool:
    return getattr(config.get_text_config(decoder=True), "attn_logit_softcapping", None) is not None


def implementations(config: PreTrainedConfig, default: str) -> dict[str, Any]:
    """The attention implementations of a configuration and its parts, in the form `set_attn_implementation` takes.

    SparQ's own stand for what they are based on: another patched model may share the configuration. The name by which a
    model patches itself stands for `default`.
    """
    bases = {patched: base for base, patched in IMPLEMENTATIONS.items()} | {NAME: default}
    own: dict[str, Any] = {"": bases.get(config._attn_implementation, config._attn_implementation)}
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if part is not None:
            own[name] = implementations(part, default)
    return own


def implementation_names(config: PreTrainedConfig) -> set[str]:
    """The attention implementations of a configuration and its parts."""
    parts = (getattr(config, name, None) for name in config.sub_configs)
    return {config._attn_implementation}.union(*(implementation_names(part) for part in parts if part is not None))


def check_served(model: PreTrainedModel, decoder: PreTrainedModel, config: SparqConfig) -> None:
    """Raise a ValueError that says why SparQ cannot serve this model, if it cannot."""
    name, text = type(model).__name__, decoder.config.get_text_config(decoder=True)

    def refuse(why: str) -> ValueError:
        return ValueError(f"sparq cannot serve {name}: {why}")

    if model.config.is_encoder_decoder:
        raise refuse("it is an encoder-decoder model, and SparQ serves decoder-only models")
    if getattr(text, "kv_lora_rank", None) is not None:
        raise refuse("its attention is multi-head latent attention (MLA), which caches no keys to take components of")
    layer_types = getattr(text, "layer_types", None) or []
    strange = sorted(set(layer_types) - SUPPORTED_LAYER_TYPES)
    if strange or decoder._is_stateful:
        raise refuse(f"it has layers with no cache of keys and values ({', '.join(strange) or 'recurrent state'})")
    if not decoder._supports_attention_backend or not decoder._can_set_attn_implementation():
        raise refuse("its code does not use transformers' attention interface")
    layers = causal_layers(decoder)
    if not layers:
        raise refuse("it has no causal attention layer")
    way_down = {type(module) for module in decoder.modules() if not set(layers).isdisjoint(module.modules())}
    for cls in way_down - {nn.ModuleList}:
        if not _hands_down(cls):
            raise refuse(f"{cls.__name__} does not hand its keyword arguments down to the attention function")
    parts = {type(part) for layer in layers for part in layer.modules()}
    if any(_asks_for_the_name(part) for part in parts):
        raise refuse("its attention chooses positions itself, by the name of the attention implementation")
    if layer_types and "full_attention" not in layer_types:
        raise refuse(
            f"none of its layers attends to the whole context (they are {', '.join(sorted(set(layer_types)))})"
        )
    if not layer_types and getattr(text, "sliding_window", None) is not None:
        raise refuse(f"all its layers have a sliding window of {text.sliding_window}")
    if decoder.config._attn_implementation.startswith("paged"):
        raise refuse("it uses paged attention (continuous batching), whose cache SparQ does not read yet")
    for layer in layers:
        head_dim = getattr(layer, "head_dim", None) or getattr(layer, "head_size", None)
        config.components(head_dim or text.hidden_size // text.num_attention_heads)


def _asks_for_the_name(cls: type[nn.Module]) -> bool:
    """Whether an attention layer, or a part of it, is another one where it is called "sdpa": there the model chooses
    positions itself, and under any other name leaves that to the implementation."""
    try:
        with _parsing:  # of a class `inspect` parses the file, which Python 3.11 cannot do in two threads at once
            source = inspect.getsource(cls)
        return re.search(r"_attn_implementation (==|!=|in|not in) [^\n]*\"sdpa\"", source) is not None
    except (OSError, TypeError):
        return False


def _hands_down(cls: type[nn.Module]) -> bool:
    """Whether `forward` takes any keyword arguments and, as far as its source tells, passes them on."""
    names = [p.name for p in inspect.signature(cls.forward).parameters.values() if p.kind is p.VAR_KEYWORD]
    try:
        return bool(names) and inspect.getsource(cls.forward).count(f"**{names[0]}") > 1
    except (OSError, TypeError):
        return bool(names)
