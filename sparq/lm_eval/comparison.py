"""Puts a method that SparQ is compared with on a model, and takes it off again."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from sparq import method, reasons
from sparq.attention import Call, causal_mask
from sparq.cache import SparqLayer, refuse_quantized
from sparq.cache_argument import cache_name
from sparq.config import SparqConfig
from sparq.lm_eval.methods import H2OLayer, Method, SparqVariant
from sparq.patching import Patch, Use, patch_of
from sparq.reporting import Report
from sparq.served import check_served, decoder_of, is_entered, unwrap
from sparq.stats import SparseStep, Stats
from sparq.step import Step


class Compared(method.Method):
    """A method of the comparison as one that a `Patch` puts on a model."""

    def __init__(self, rule: Method) -> None:
        self.config = rule.config if isinstance(rule, SparqVariant) else SparqConfig()
        self.settings = self.rule = rule

    def prepare(
        self, decoder: PreTrainedModel, cache: Cache | None, layers: int, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[Cache | None, tuple, dict[str, Any]]:
        if cache is None and self.rule.observes:
            parameters = list(inspect.signature(decoder.forward).parameters)
            use_cache = (dict(zip(parameters, args, strict=False)) | kwargs).get("use_cache")
            if getattr(decoder.config, "use_cache", False) if use_cache is None else use_cache:
                # As the model itself would make it, too late to be seen from here.
                cache = DynamicCache(config=decoder.config)
                name = cache_name(type(decoder).forward)
                position = parameters.index(name)
                if position < len(args):
                    args = (*args[:position], cache, *args[position + 1 :])
                else:
                    kwargs = {**kwargs, name: cache}
        if cache is not None:
            _check_cache(cache)
        return cache, args, kwargs

    def attend(self, call: Call) -> tuple[Tensor, Tensor | None]:
        """A step of the method for each new token that comes to a filled cache by itself, or in a pass of which every
        token is a step; everything else is dense."""
        rule, query, key, value, kwargs = self.rule, call.query, call.key, call.value, call.kwargs
        _check_call(key, value, kwargs)
        queries, (batch, kv_heads, length, head_dim) = query.shape[2], key.shape
        if kwargs.get("sliding_window") is not None or getattr(call.layer, "is_sliding", False):
            return _dense(call, reasons.SLIDING)
        if call.layer_idx < rule.dense_layers:
            return _dense(call, reasons.FIRST_LAYERS)
        scale = head_dim**-0.5 if kwargs["scaling"] is None else kwargs["scaling"]
        grouped = query.unflatten(1, (kv_heads, -1))  # [B, Hkv, G, Q, d]
        attention_mask = call.attention_mask
        if attention_mask is None and 1 < queries < length:
            attention_mask = causal_mask(queries, length, length - queries, key.device)
        mask = _allowed(attention_mask, batch, queries, length)
        state = self._state(call) if rule.observes else None
        # What a method has observed of a draft could not be taken back.
        is_draft = call.step.drafting is not None and (state is None or call.step.counts_tokens)
        is_each_a_step = is_draft and not call.step.prompt_length(queries)
        if queries == length or (queries > 1 and not is_each_a_step):
            if state is not None:
                rule.observe(grouped, key, mask, scale, state)
            return _dense(call, "more than one new token at once")

        seen = torch.ones(batch, queries, length, dtype=torch.bool, device=key.device) if mask is None else mask
        outputs = []
        for i, attended in enumerate(rule.attend_each(grouped, key, value, seen, scale, state)):
            valid = seen[:, i, : attended.kept.shape[3]]
            if bool((attended.kept == valid[:, None, None]).all()):
                outputs.append(_dense(call.part(i, i + 1), reasons.COVERED)[0])
                continue
            count = int(valid.sum())
            read = round(attended.kept.sum((0, 3)).double().mean().item())
            bytes_read = attended.elements * key.element_size()
            bytes_dense = 2 * count * kv_heads * head_dim * key.element_size()
            counts = (1, count, read, bytes_read, bytes_dense, attended.mass.numel())
            call.step.sparse.append(SparseStep(call.layer_idx, key.dtype, attended.mass, counts))
            outputs.append(attended.output.reshape(batch, 1, -1, head_dim))
        return torch.cat(outputs, 1), None

    def _state(self, call: Call) -> H2OLayer | None:
        """The layer that holds the keys, made one that remembers the attention; None without a cache: nothing
        follows."""
        cache, layer = call.step.cache, call.layer
        if cache is None:
            return None
        if type(layer) in (DynamicLayer, SparqLayer) and call.query.shape[2] == call.key.shape[2]:
            cache.layers[call.layer_idx] = layer = H2OLayer.adopt(layer)
        if not isinstance(layer, H2OLayer):
            raise ValueError(
                f"{type(self.rule).__name__} has to see the whole prompt, but layer {call.layer_idx} of the cache "
                f"({type(layer).__name__}) was filled before: start with a new DynamicCache"
            )
        if layer.keys is None or layer.keys.shape != call.key.shape:
            raise _not_served("attention to other keys than the cached ones")
        return layer

    def finish(self, step: Step, output: Any) -> None:
        pass

    def implementation(self, stats: Stats, decoder: PreTrainedModel) -> str:
        return f"{type(self.rule).__name__} in plain PyTorch, for comparison"


class Comparison:
    """`method` on `model`, in place, until `remove()`: for quality, not for speed.

    A forward pass with one new token on a filled cache is a step of the method. Everything else is dense and, where the
    cache was filled, counted as such: prompts, several new tokens at once, sliding-window layers, the first
    `dense_layers`, and steps that keep every valid position of every row.

    Raises:
        TypeError: `model` is no model of transformers, or `method` no `Method`.
        ValueError: the model is patched, or compared already, or one that SparQ itself could not serve either. While
            the model runs: a softcap, attention sinks, dropout, a bias in the mask, attention weights asked for, or a
            cache that is not a dynamic one.
    """

    def __init__(self, model: nn.Module, method: Method) -> None:
        if not isinstance(method, Method):
            raise TypeError(f"method must be a Method, got {method!r} of type {type(method).__name__}")
        served = unwrap(model)
        self._decoder = decoder = decoder_of(served)
        current = patch_of(decoder)
        if current is not None and current.base is not None and isinstance(current.base.method, Compared):
            raise ValueError("model has a comparison method already: remove() it first")
        if current is not None or is_entered(decoder):
            raise ValueError("model must not be patched, nor share its configuration with a patched one: unpatch that")
        self.method = method
        self._use = Use(Compared(method))
        check_served(served, decoder, self._use.method.config)
        self._patch = Patch(served, decoder)
        self._patch.install()
        self._patch.base = self._use

    def remove(self) -> None:
        """Take the method off: the model is as it was. Does nothing the second time.

        Raises:
            ValueError: the model has been patched since, and would be given back what this takes away.
        """
        if self._patch.base is None:
            return
        if self._patch.base is not self._use or self._patch.blocks:
            raise ValueError("model has been patched since the comparison began: sparq.unpatch(model) first")
        self._patch.base = None
        if patch_of(self._decoder) is self._patch:
            self._patch.remove()

    def report(self) -> Report:
        """What has been done so far. Mean α is the exact attention mass of the positions attended; positions read are
        those of one set, on average over the heads."""
        return self._use.report(self._decoder)


def _dense(call: Call, reason: str) -> tuple[Tensor, Tensor | None]:
    if call.query.shape[2] < call.key.shape[2]:  # not the prompt
        call.step.count_dense(call.layer_idx, reason, call.query.shape[2], call.key, call.later)
    return call.dense()


def _check_cache(cache: Cache) -> None:
    refuse_quantized(cache)
    strange = [type(layer).__name__ for layer in cache.layers if not isinstance(layer, DynamicLayer)]
    if strange:
        raise _not_served(f"a cache with layers of type {strange[0]}: take a DynamicCache")
    if cache.offloading:
        raise _not_served("an offloaded cache")


def _check_call(key: Tensor, value: Tensor, kwargs: dict[str, Any]) -> None:
    """Raise a ValueError where the model wants of attention what the methods do not know."""
    for name, what in (
        ("softcap", "a softcap on the logits"),
        ("s_aux", "attention sinks (s_aux)"),
        ("position_bias", "attention with position_bias"),
    ):
        if kwargs.get(name) is not None:
            raise _not_served(what)
    if kwargs.get("output_attentions"):
        raise _not_served("attention weights (output_attentions)")
    if kwargs["dropout"]:
        raise _not_served(f"attention dropout of {kwargs['dropout']}: model.eval() first")
    if key.shape != value.shape:
        raise _not_served(f"keys and values that differ in shape, {tuple(key.shape)} and {tuple(value.shape)}")


def _allowed(attention_mask: Tensor | None, batch: int, queries: int, length: int) -> Tensor | None:
    """bool [B, Q, S] of a mask that holds bools, or 0 and large negative numbers; None where there is none."""
    if attention_mask is None:
        return None
    shape = tuple(attention_mask.shape)
    if len(shape) != 4 or shape[0] not in (1, batch) or shape[1:] != (1, queries, length):
        raise _not_served(f"an attention mask of shape {shape}, not [{batch}, 1, {queries}, {length}]")
    mask = attention_mask[:, 0].expand(batch, -1, -1)
    if mask.dtype == torch.bool:
        return mask
    allowed = mask == 0
    if not bool((allowed | (mask <= torch.finfo(mask.dtype).min / 2)).all()):
        raise _not_served("an attention mask with a bias")
    return allowed


def _not_served(what: str) -> ValueError:
    return ValueError(f"the comparison methods do not serve {what}")
