"""`sparq.patch`: how SparQ enters a model, and leaves it."""

from __future__ import annotations

import dataclasses
import inspect
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import sparq_kernels
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from sparq import attention, reasons
from sparq.cache import allocated_bytes, begin_pass, end_pass, refuse_quantized, take_remade, upgrade
from sparq.cache_argument import find_cache
from sparq.config import SparqConfig
from sparq.generating import GenerateNotes
from sparq.reporting import Report
from sparq.stats import Stats
from sparq.step import Step, holds_tokens

Model = TypeVar("Model", bound=nn.Module)

attention.register()  # here, not in `patch`: a patched model may come out of a pickle

NAME = "sparq"  # the attention implementation by which a model patches itself (implementation.py)
SUPPORTED_LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention"}

_lock = threading.RLock()  # of all changes of what is patched


@dataclasses.dataclass(eq=False)
class Use:
    """Knobs and stats: of `patch`, or of one `with patched(...)` block."""

    config: SparqConfig
    stats: Stats = dataclasses.field(default_factory=Stats)


_blocks: ContextVar[tuple[Use, ...]] = ContextVar("sparq_blocks", default=())  # that this thread or task is inside of


class Patch:
    """What patching puts on a model: a hook before and after each forward pass of its decoder.

    Attributes:
        base: what `patch` has set; None where the model is patched by blocks alone.
        blocks: the open `with patched(...)` blocks of all threads, the last opened last.
    """

    def __init__(self, model: PreTrainedModel, decoder: PreTrainedModel) -> None:
        self.base: Use | None = None
        self.blocks: tuple[Use, ...] = ()
        self._decoder = decoder
        self._notes = [GenerateNotes(model)]
        self._handles: list[Any] = []
        self._are_layers_known = False
        self._layer_count = 0

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the model has no blocks that could end: the knobs in force become its own."""
        return self.__dict__ | {"base": self.current(), "blocks": (), "_are_layers_known": False}

    def install(self) -> None:
        decoder = self._decoder
        self._handles = [
            decoder.register_forward_pre_hook(self.before, with_kwargs=True),
            decoder.register_forward_hook(self.after, with_kwargs=True),
        ]
        for notes in self._notes:
            notes.install()
        try:
            self._enter(decoder)
        except BaseException:
            self.remove()
            raise
        decoder._sparq_patch = self  # type: ignore[assignment]

    def remove(self) -> None:
        decoder = self._decoder
        for handle in self._handles:
            handle.remove()
        for notes in self._notes:
            notes.remove()
        attention.patched_layers.difference_update(_causal_layers(decoder))
        if _is_entered(decoder):
            decoder.set_attn_implementation(self._own_implementation)
        vars(decoder).pop("_sparq_patch", None)

    def join(self, other: Patch) -> None:
        """Listen to the model, too, that `other`, which is not installed, was made for: one around ours, perhaps."""
        (notes,) = other._notes
        if all(notes.model is not ours.model for ours in self._notes):
            notes.install()
            self._notes.append(notes)

    def current(self) -> Use | None:
        """What holds for this thread or task: the innermost block that it is inside of; else, since a block may start a
        thread to generate in, the block opened last; else what `patch` has set."""
        if torch.compiler.is_compiling():
            return self.blocks[-1] if self.blocks else self.base
        return self.own_block() or (self.blocks[-1] if self.blocks else self.base)

    def own_block(self) -> Use | None:
        """The innermost block on this model that this thread or task is inside of."""
        return next((use for use in reversed(_blocks.get()) if use in self.blocks), None)

    def _enter(self, decoder: PreTrainedModel) -> None:
        """Select SparQ's form of the attention implementation that the model has."""
        self._own_implementation = _implementations(decoder.config, _default_base(decoder))
        decoder.set_attn_implementation(attention.IMPLEMENTATIONS[_base(decoder, self._own_implementation[""])])

    def before(
        self, module: PreTrainedModel, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        """Make the cache readable for SparQ and hand it to the attention functions, which are not given it."""
        use = self.current()
        if use is None:
            return None  # the last block has just ended in another thread
        if not _is_entered(module):
            # The user has chosen an implementation anew, or has unpatched a model that shares the configuration.
            with _lock:
                if _patch_of(module) is not self:
                    return None  # another thread has just unpatched it
                self._enter(module)
        if not self._are_layers_known:
            self._are_layers_known = True
            layers = _causal_layers(module)
            self._layer_count = len(layers)
            attention.patched_layers.update(layers)
        cache = find_cache((*kwargs.values(), *args))
        if cache is not None:
            refuse_quantized(cache)
            upgrade(cache)
            begin_pass(cache, self._layer_count)
        return args, {**kwargs, "sparq_step": Step(cache, use.config, use.stats)}

    def after(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        step: Step | None = kwargs.get("sparq_step")
        if step is None:
            return
        if not step.attention_calls:
            raise RuntimeError(
                f"sparq: {type(module).__name__} did not hand its keyword arguments to the attention function, so no "
                "step was sparse; sparq.unpatch(model) undoes the patch. Please report this model."
            )
        if step.cache is not None:
            end_pass(step.cache)
        step.stats.sparse(step.sparse)
        if not torch.compiler.is_compiling():
            if step.drafting is not None:
                step.drafting.prompt_left = max(0, step.drafting.prompt_left - step.tokens)
            if step.cache is not None:
                step.stats.cache(allocated_bytes(step.cache), take_remade(step.cache))
            _count_uncached(step, output)


def patch(model: Model, config: SparqConfig | None = None, **knobs: Any) -> Model:
    """Make `model` decode with SparQ Attention (arXiv 2312.04985), in place.

    The prompt is computed as before; each later single token reads r components of every cached key, and only k
    positions in full. A model that is patched already gets the new knobs, and its counters start anew; inside a
    `with patched(...)` block they are the block's. The CPU kernel is compiled now, if this machine has not got it yet.

    Args:
        model: a causal language model of transformers, or what wraps one, as a `PeftModel` does.
        config: the knobs; `knobs` replace single fields of it.
        knobs: fields of `SparqConfig`: r, k, ratio, local, mean_value, dense_layers, min_length.

    Returns:
        The same model.

    Raises:
        TypeError, ValueError: a bad knob, or a model that SparQ cannot serve, with the reason; the model is unchanged.
    """
    use, candidate = _prepared(model, config, knobs)
    with _lock:
        current = _patch_of(candidate._decoder)
        block = None if current is None else current.own_block()
        if block is not None:
            block.config, block.stats = use.config, use.stats
            return model
        _installed(candidate).base = use
    return model


def unpatch(model: Model) -> Model:
    """Take SparQ out of `model` again, which is then as it was; does nothing to a model that is not patched.

    Caches made meanwhile go on working, dense. Open `with patched(...)` blocks, of other threads too, go on dense.
    """
    with _lock:
        current = _patch_of(_decoder(model))
        if current is not None:
            current.base, current.blocks = None, ()
            current.remove()
        served = _unwrap(model)
        if NAME in _names(served.config):  # or what is left would patch it again
            served.set_attn_implementation(_implementations(served.config, _default_base(_decoder(model))))
    return model


@contextmanager
def patched(model: Model, config: SparqConfig | None = None, **knobs: Any) -> Iterator[Model]:
    """`patch` for the length of a `with` block, whose knobs and counters are its own; those from before come back.

    Several threads, or tasks of asyncio, may each be inside such a block on one model: each has its knobs and its
    report, and the model is as it was when the last of them has left. Compiled steps cannot ask whose they are: they
    are those of the block opened last, like those of two generators that a thread runs in turns.
    """
    use, candidate = _prepared(model, config, knobs)
    with _lock:
        patches_itself = NAME in _names(candidate._decoder.config)
        current = _installed(candidate)
        if patches_itself and current.base is None:
            current.base = Use(configured(_unwrap(model)))
        current.blocks += (use,)
    _blocks.set((*_blocks.get(), use))
    try:
        yield model
    finally:
        with _lock:
            if use in current.blocks:  # it is not where the model was unpatched meanwhile
                current.blocks = tuple(other for other in current.blocks if other is not use)
                if current.base is None and not current.blocks:
                    current.remove()
        # Not by a token: a generator may be ended in another context than it was begun in, and blocks in any order.
        _blocks.set(tuple(other for other in _blocks.get() if other is not use))


def report(model: nn.Module) -> Report:
    """What `model` has done since it was patched: print it, or take its `to_dict()`. Inside a `with patched(...)` block
    it is about that block alone.

    Of several processes each counts its own: tensor parallel its share of the heads in every step (bytes and α are
    those heads'), data parallel its share of the prompts.

    Raises:
        ValueError: the model is not patched.
    """
    decoder = _decoder(model)
    current = _patch_of(decoder)
    use = None if current is None else current.current()
    if use is None:
        yet = " yet: it has not run" if decoder.config._attn_implementation == NAME else ""
        raise ValueError(f"model must be patched to have a report, this {type(model).__name__} is not{yet}")
    # The layers may lie on several devices, and the parameters, where accelerate offloads them, on none.
    used = use.stats.used() or {(decoder.device, decoder.dtype)}
    names = {"none yet" if device.type == "meta" else sparq_kernels.backend(device, dtype) for device, dtype in used}
    return Report.of(use.stats, use.config, ", ".join(sorted(names)))


def _prepared(model: nn.Module, config: SparqConfig | None, knobs: dict[str, Any]) -> tuple[Use, Patch]:
    """What would be put on the model, all of it checked, nothing changed."""
    if config is not None and not isinstance(config, SparqConfig):
        raise TypeError(f"config must be a SparqConfig or None, got {config!r} of type {type(config).__name__}")
    config = _with_knobs(config, knobs)
    served = _unwrap(model)
    decoder = _decoder(served)
    _check_served(served, decoder, config)
    if decoder.device.type != "meta":  # where accelerate offloads the parameters, nobody knows yet
        sparq_kernels.backend(decoder.device)  # compiles the CPU kernel: not inside the first `generate`
    return Use(config), Patch(served, decoder)


def _installed(candidate: Patch) -> Patch:
    """The patch that the model has, or `candidate`, put on it."""
    current = _patch_of(candidate._decoder)
    if current is None:
        candidate.install()
        return candidate
    current.join(candidate)
    return current


def _count_uncached(step: Step, output: Any) -> None:
    """Count a decode step that `generate` has computed without a cache, the whole text again: one more token than in
    the pass before. (A model that leaves its cache empty is fed the new token alone.)"""
    cache = step.cache
    if cache is None:  # the model may have made one, which the caller is going to use
        cache = find_cache(output.values() if isinstance(output, dict) else output if isinstance(output, tuple) else ())
    stats, before = step.stats, step.stats.uncached_tokens
    stats.uncached_tokens = 0
    if cache is not None and holds_tokens(cache):
        return
    is_step = before and step.tokens == (before + 1 if step.cache is None else 1)
    if step.is_prefill or is_step:  # of nothing else: whoever scores texts of growing length decodes nothing
        stats.uncached_tokens = step.tokens
    if is_step:
        reason = reasons.NO_CACHE if step.cache is None else reasons.EMPTY_CACHE
        for layer_idx, bytes_dense in step.prompts.items():
            stats.dense(layer_idx, reason, bytes_dense)
        stats.warn_once(f"sparq: decoding stays dense and gains nothing: {reason}")


def _unwrap(model: nn.Module) -> PreTrainedModel:
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


def _decoder(model: nn.Module) -> PreTrainedModel:
    decoder: PreTrainedModel = _unwrap(model).base_model  # type: ignore[assignment]
    # The innermost model that holds all attention layers: a language model head may call it past its base model (OPT).
    layers = set(_causal_layers(decoder))
    if layers:
        for module in decoder.modules():
            if isinstance(module, PreTrainedModel) and layers.issubset(module.modules()):
                decoder = module
    return decoder


def _causal_layers(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.modules() if hasattr(m, "layer_idx") and getattr(m, "is_causal", False)]


def _patch_of(decoder: PreTrainedModel) -> Patch | None:
    return vars(decoder).get("_sparq_patch")


def _is_entered(decoder: PreTrainedModel) -> bool:
    return decoder.config._attn_implementation in attention.IMPLEMENTATIONS.values()


def _base(decoder: PreTrainedModel, own: str) -> str:
    """The implementation for what is not sparse, in a model that has chosen `own`."""
    # FlashAttention and others know sinks and softcaps; of the two here, eager alone does.
    return own if own in attention.IMPLEMENTATIONS else _default_base(decoder)


def _default_base(decoder: PreTrainedModel) -> str:
    return "sdpa" if decoder._supports_sdpa and not is_softcapped(decoder.config) else "eager"


def is_softcapped(config: PreTrainedConfig) -> bool:
    return getattr(config.get_text_config(decoder=True), "attn_logit_softcapping", None) is not None


def is_patched(model: nn.Module) -> bool:
    return _patch_of(_decoder(model)) is not None


def _implementations(config: PreTrainedConfig, default: str) -> dict[str, Any]:
    """The attention implementations of a configuration and its parts, in the form `set_attn_implementation` takes.

    SparQ's own stand for what they are based on: another patched model may share the configuration. The name by which a
    model patches itself stands for `default`.
    """
    bases = {patched: base for base, patched in attention.IMPLEMENTATIONS.items()} | {NAME: default}
    own: dict[str, Any] = {"": bases.get(config._attn_implementation, config._attn_implementation)}
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if part is not None:
            own[name] = _implementations(part, default)
    return own


def _names(config: PreTrainedConfig) -> set[str]:
    """The attention implementations of a configuration and its parts."""
    parts = (getattr(config, name, None) for name in config.sub_configs)
    return {config._attn_implementation}.union(*(_names(part) for part in parts if part is not None))


def configured(model: PreTrainedModel) -> SparqConfig:
    """The knobs that lie in the configuration of a model that patches itself.

    Raises:
        TypeError, ValueError: naming the knob, its value and what would be right.
    """
    knobs = getattr(model.config, NAME, None) or {}
    if not isinstance(knobs, dict):
        raise ValueError(f"model.config.{NAME} must be a dict of knobs of SparqConfig, got {knobs!r}")
    return _with_knobs(None, knobs)


def _with_knobs(config: SparqConfig | None, knobs: dict[str, Any]) -> SparqConfig:
    unknown = sorted(set(knobs) - {field.name for field in dataclasses.fields(SparqConfig)})
    if unknown:
        names = ", ".join(field.name for field in dataclasses.fields(SparqConfig))
        raise TypeError(f"unknown knob {unknown[0]!r}; the knobs are {names}")
    return SparqConfig(**knobs) if config is None else dataclasses.replace(config, **knobs)


def _check_served(model: PreTrainedModel, decoder: PreTrainedModel, config: SparqConfig) -> None:
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
    layers = _causal_layers(decoder)
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
        with _lock:  # of a class `inspect` parses the file, which Python 3.11 cannot do in two threads at once
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
