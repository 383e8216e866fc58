"""`sparq.patch`: how SparQ enters a model, and leaves it."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import sparq_kernels
import torch
from torch import nn
from transformers import PreTrainedModel

from sparq import attention
from sparq.cache_argument import find_cache
from sparq.config import SparqConfig, settled
from sparq.generating import GenerateNotes
from sparq.method import Method, Sparq
from sparq.recording import Recording
from sparq.reporting import Report
from sparq.served import (
    NAME,
    base_of,
    causal_layers,
    check_served,
    decoder_of,
    default_base,
    implementation_names,
    implementations,
    is_entered,
    unwrap,
)
from sparq.stats import Stats
from sparq.step import Step

Model = TypeVar("Model", bound=nn.Module)

attention.register()  # here, not in `patch`: a patched model may come out of a pickle

_lock = threading.RLock()  # of all changes of what is patched


@dataclasses.dataclass(eq=False)
class Use:
    """Method and stats: of `patch`, or of one `with patched(...)` block."""

    method: Method
    stats: Stats = dataclasses.field(default_factory=Stats)

    def report(self, decoder: PreTrainedModel) -> Report:
        return Report.of(self.stats, self.method.settings, self.method.implementation(self.stats, decoder))


_blocks: ContextVar[tuple[Use, ...]] = ContextVar("sparq_blocks", default=())  # that this thread or task is inside of


class Patch:
    """What patching puts on a model: a hook before and after each forward pass of its decoder.

    Attributes:
        base: what `patch` has set; None where the model is patched by blocks alone.
        blocks: the open `with patched(...)` blocks of all threads, the last opened last.
        recording: what `with sparq.record(model)` gives, while that lasts.
    """

    def __init__(self, model: PreTrainedModel, decoder: PreTrainedModel) -> None:
        self.base: Use | None = None
        self.blocks: tuple[Use, ...] = ()
        self.recording: Recording | None = None
        self._decoder = decoder
        self._notes = [GenerateNotes(model)]
        self._handles: list[Any] = []
        self._are_layers_known = False
        self._layer_count = 0

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the model has no blocks that could end: the knobs in force become its own. Nobody records it."""
        held = {"base": self.current(), "blocks": (), "recording": None, "_are_layers_known": False}
        return self.__dict__ | held

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
        attention.patched_layers.difference_update(causal_layers(decoder))
        if is_entered(decoder):
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
        self._own_implementation = implementations(decoder.config, default_base(decoder))
        decoder.set_attn_implementation(attention.IMPLEMENTATIONS[base_of(decoder, self._own_implementation[""])])

    def before(
        self, module: PreTrainedModel, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        """Make the cache readable for SparQ and hand it to the attention functions, which are not given it."""
        use = self.current()
        if use is None:
            return None  # the last block has just ended in another thread
        if not is_entered(module):
            # The user has chosen an implementation anew, or has unpatched a model that shares the configuration.
            with _lock:
                if patch_of(module) is not self:
                    return None  # another thread has just unpatched it
                self._enter(module)
        if not self._are_layers_known:
            self._are_layers_known = True
            layers = causal_layers(module)
            self._layer_count = len(layers)
            attention.patched_layers.update(layers)
        cache = find_cache((*kwargs.values(), *args))
        cache, args, kwargs = use.method.prepare(module, cache, self._layer_count, args, kwargs)
        step = Step(cache, use.method.config, use.stats, use.method, self.recording)
        return args, {**kwargs, "sparq_step": step}

    def after(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        step: Step | None = kwargs.get("sparq_step")
        if step is None:
            return
        if not step.attention_calls:
            raise RuntimeError(
                f"sparq: {type(module).__name__} did not hand its keyword arguments to the attention function, so no "
                "step was sparse; sparq.unpatch(model) undoes the patch. Please report this model."
            )
        step.stats.sparse(step.sparse)
        step.method.finish(step, output)


def patch(model: Model, config: SparqConfig | Mapping[str, Any] | None = None, **knobs: Any) -> Model:
    """Make `model` decode with SparQ Attention (arXiv 2312.04985), in place.

    The prompt is computed as before; each later single token reads r components of every cached key, and only k
    positions in full. A model that is patched already gets the new knobs, and its counters start anew; inside a
    `with patched(...)` block they are the block's. The CPU kernel is compiled now, if this machine has not got it yet.

    Args:
        model: a causal language model of transformers, or what wraps one, as a `PeftModel` does.
        config: the knobs, or a dict of them. None: those in `model.config.sparq`, a dict that is saved with the model;
            the defaults where there is none.
        knobs: single fields of `SparqConfig` in place of these: ratio, r, k, index, mass, k_min, local, mean_value,
            dense_layers, min_length.

    Returns:
        The same model.

    Raises:
        TypeError, ValueError: a bad knob, or a model that SparQ cannot serve, with the reason; the model is unchanged.
    """
    use, candidate = _prepared(model, config, knobs)
    with _lock:
        current = patch_of(candidate._decoder)
        block = None if current is None else current.own_block()
        if block is not None:
            block.method, block.stats = use.method, use.stats
            return model
        _installed(candidate).base = use
    return model


def unpatch(model: Model) -> Model:
    """Take SparQ out of `model` again, which is then as it was; does nothing to a model that is not patched.

    Caches made meanwhile go on working, dense. Open `with patched(...)` blocks, of other threads too, go on dense.
    """
    with _lock:
        current = patch_of(decoder_of(model))
        if current is not None:
            current.base, current.blocks = None, ()
            current.remove()
        served = unwrap(model)
        if NAME in implementation_names(served.config):  # or what is left would patch it again
            served.set_attn_implementation(implementations(served.config, default_base(decoder_of(model))))
    return model


@contextmanager
def patched(model: Model, config: SparqConfig | Mapping[str, Any] | None = None, **knobs: Any) -> Iterator[Model]:
    """`patch` for the length of a `with` block, whose knobs and counters are its own; those from before come back.

    Several threads, or tasks of asyncio, may each be inside such a block on one model: each has its knobs and its
    report, and the model is as it was when the last of them has left. Compiled steps cannot ask whose they are: they
    are those of the block opened last, like those of two generators that a thread runs in turns.
    """
    use, candidate = _prepared(model, config, knobs)
    with _lock:
        patches_itself = NAME in implementation_names(candidate._decoder.config)
        current = _installed(candidate)
        if patches_itself and current.base is None:
            current.base = Use(Sparq(configured(unwrap(model))))
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
    decoder = decoder_of(model)
    current = patch_of(decoder)
    use = None if current is None else current.current()
    if use is None:
        yet = " yet: it has not run" if decoder.config._attn_implementation == NAME else ""
        raise ValueError(f"model must be patched to have a report, this {type(model).__name__} is not{yet}")
    return use.report(decoder)


@contextmanager
def record(model: nn.Module) -> Iterator[Recording]:
    """In a `with` block, note which positions the sparse steps of `model` attend, whoever makes them.

    Each step waits for the device, and the positions stay in memory: 8 bytes for each of k in every layer, KV head and
    token. A compiled step cannot be recorded, and raises. Unpatching ends it.

    Args:
        model: a model that is patched, or inside a `with patched(...)` block.

    Raises:
        ValueError: the model is not patched, is being recorded already, or decodes by another method than SparQ.
    """
    decoder = decoder_of(model)
    current = patch_of(decoder)
    use = None if current is None else current.current()
    if current is None or use is None:
        raise ValueError(f"model must be patched to be recorded, this {type(model).__name__} is not")
    if not isinstance(use.method, Sparq):
        raise ValueError(f"model must decode with SparQ to be recorded, not with {type(use.method.settings).__name__}")
    with _lock:
        if current.recording is not None:
            raise ValueError("model must not be recorded already: leave the other `with sparq.record(model)` first")
        current.recording = found = Recording()
    try:
        yield found
    finally:
        current.recording = None


def _prepared(
    model: nn.Module, config: SparqConfig | Mapping[str, Any] | None, knobs: dict[str, Any]
) -> tuple[Use, Patch]:
    """What would be put on the model, all of it checked, nothing changed."""
    served = unwrap(model)
    settings = settled(configured(served) if config is None else config, knobs)
    decoder = decoder_of(served)
    check_served(served, decoder, settings)
    if decoder.device.type != "meta":  # where accelerate offloads the parameters, nobody knows yet
        sparq_kernels.backend(decoder.device)  # compiles the CPU kernel: not inside the first `generate`
    return Use(Sparq(settings)), Patch(served, decoder)


def _installed(candidate: Patch) -> Patch:
    """The patch that the model has, or `candidate`, put on it."""
    current = patch_of(candidate._decoder)
    if current is None:
        candidate.install()
        return candidate
    current.join(candidate)
    return current


def patch_of(decoder: PreTrainedModel) -> Patch | None:
    return vars(decoder).get("_sparq_patch")


def is_patched(model: nn.Module) -> bool:
    """Whether `model`, one of transformers or what wraps one, decodes with SparQ: since `patch`, inside a
    `with patched(...)` block of any thread, or, with attn_implementation="sparq", since it first ran.

    Raises:
        TypeError: it is no such model.
    """
    return patch_of(decoder_of(model)) is not None


def configured(model: PreTrainedModel) -> SparqConfig:
    """The knobs that lie in the model's own configuration, `model.config.sparq`; the defaults where there are none.

    Raises:
        TypeError, ValueError: naming the knob, its value and what would be right.
    """
    knobs = getattr(model.config, NAME, None)
    if knobs is None:
        return SparqConfig()
    if not isinstance(knobs, dict):
        raise ValueError(f"model.config.{NAME} must be a dict of knobs of SparqConfig, got {knobs!r}")
    return SparqConfig.from_dict(knobs)
