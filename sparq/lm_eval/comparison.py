"""Puts a method that SparQ is compared with on a model, and takes it off again."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer
from transformers.masking_utils import eager_mask, sdpa_mask

from sparq.attention import causal_mask, dense_attention
from sparq.cache import SparqLayer, refuse_quantized
from sparq.cache_argument import cache_name, find_cache
from sparq.config import SparqConfig
from sparq.lm_eval.methods import H2OLayer, Method, SparqVariant
from sparq.patching import patch_of
from sparq.reporting import Report
from sparq.served import base_of, check_served, decoder_of, default_base, implementations, is_entered, unwrap
from sparq.stats import SparseStep, Stats

IMPLEMENTATIONS = {"sdpa": "sparq_comparison", "eager": "sparq_comparison_eager"}


class Pass:
    """One forward pass: the cache, and what is counted."""

    def __init__(self, cache: Cache | None, method: Method, stats: Stats) -> None:
        self.cache, self.method, self.stats = cache, method, stats
        self.attention_calls = 0
        self.sparse: list[SparseStep] = []

    def layer(self, layer_idx: int) -> Any:
        """The cache's layer, or None where there is no such."""
        if self.cache is None or layer_idx >= len(self.cache.layers):
            return None
        return self.cache.layers[layer_idx]

    def state(self, layer_idx: int, key: Tensor, queries: int) -> H2OLayer | None:
        """The layer that holds `key`, made one that remembers the attention; None without a cache: nothing follows."""
        if self.cache is None:
            return None
        layer = self.layer(layer_idx)
        if type(layer) in (DynamicLayer, SparqLayer) and queries == key.shape[2]:
            self.cache.layers[layer_idx] = layer = H2OLayer.adopt(layer)
        if not isinstance(layer, H2OLayer):
            raise ValueError(
                f"{type(self.method).__name__} has to see the whole prompt, but layer {layer_idx} of the cache "
                f"({type(layer).__name__}) was filled before: start with a new DynamicCache"
            )
        if layer.keys is None or layer.keys.shape != key.shape:
            raise _not_served("attention to other keys than the cached ones")
        return layer


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
        if patch_of(decoder) is not None or is_entered(decoder):
            raise ValueError("model must not be patched, nor share its configuration with a patched one: unpatch that")
        if _is_compared(decoder):
            raise ValueError("model has a comparison method already: remove() it first")
        check_served(served, decoder, method.config if isinstance(method, SparqVariant) else SparqConfig())
        self.method = method
        self._stats = Stats()
        self._parameters = list(inspect.signature(decoder.forward).parameters)
        self._own_implementation = implementations(decoder.config, default_base(decoder))
        decoder.set_attn_implementation(IMPLEMENTATIONS[base_of(decoder, self._own_implementation[""])])
        self._handles = [
            decoder.register_forward_pre_hook(self._before, with_kwargs=True),
            decoder.register_forward_hook(self._after, with_kwargs=True),
        ]

    def remove(self) -> None:
        """Take the method off: the model is as it was. Does nothing the second time.

        Raises:
            ValueError: the model has been patched since, and would be given back what this takes away.
        """
        if self._handles and patch_of(self._decoder) is not None:
            raise ValueError("model has been patched since the comparison began: sparq.unpatch(model) first")
        for handle in self._handles:
            handle.remove()
        if self._handles and _is_compared(self._decoder):
            self._decoder.set_attn_implementation(self._own_implementation)
        self._handles = []

    def report(self) -> Report:
        """What has been done so far. Mean α is the exact attention mass of the positions attended; positions read are
        those of one set, on average over the heads."""
        return Report.of(self._stats, self.method, f"{type(self.method).__name__} in plain PyTorch, for comparison")

    def _before(self, module: PreTrainedModel, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Hand the cache to the attention functions, which are not given it."""
        if not _is_compared(module):
            raise RuntimeError(
                f"the attention implementation has been changed to {module.config._attn_implementation!r} since "
                f"{type(self.method).__name__} was put on the model: remove() the comparison first"
            )
        cache = find_cache((*kwargs.values(), *args))
        if cache is None and self.method.observes:
            given = dict(zip(self._parameters, args, strict=False)) | kwargs
            use_cache = given.get("use_cache")
            if getattr(module.config, "use_cache", False) if use_cache is None else use_cache:
                # As the model itself would make it, too late to be seen from here.
                cache = DynamicCache(config=module.config)
                name = cache_name(type(module).forward)
                position = self._parameters.index(name)
                if position < len(args):
                    args = (*args[:position], cache, *args[position + 1 :])
                else:
                    kwargs = {**kwargs, name: cache}
        if cache is not None:
            _check_cache(cache)
        return args, {**kwargs, "sparq_comparison": Pass(cache, self.method, self._stats)}

    def _after(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        current: Pass = kwargs["sparq_comparison"]
        current.stats.sparse(current.sparse)
        if not current.attention_calls:
            raise RuntimeError(
                f"{type(module).__name__} did not hand its keyword arguments to the attention function, so "
                f"{type(self.method).__name__} was never asked"
            )


def comparison_attention(
    base: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    sparq_comparison: Pass | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention as transformers' `AttentionInterface` calls it: arguments and results as of `sparq_attention`."""
    kwargs |= dict(dropout=dropout, scaling=scaling, is_causal=is_causal, position_bias=position_bias)
    queries, length = query.shape[2], key.shape[2]
    if attention_mask is None and 1 < queries < length:  # see `attention._Call._missing_mask`; no cache here is static
        attention_mask = causal_mask(queries, length, length - queries, key.device)
    dense = partial(dense_attention, base, module, query, key, value, attention_mask, **kwargs)
    current = sparq_comparison
    if current is None:  # a model that only shares its configuration
        return dense()
    current.attention_calls += 1
    _check_call(key, value, kwargs)
    method, layer_idx = current.method, module.layer_idx
    assert isinstance(layer_idx, int)
    batch, kv_heads, _, head_dim = key.shape
    scale = head_dim**-0.5 if scaling is None else scaling

    def dense_because(reason: str) -> tuple[Tensor, Tensor | None]:
        if queries < length:  # not the prompt
            current.stats.dense(layer_idx, reason, 2 * key.numel() * key.element_size())
        return dense()

    if kwargs.get("sliding_window") is not None or getattr(current.layer(layer_idx), "is_sliding", False):
        return dense_because("sliding-window layer")
    if layer_idx < method.dense_layers:
        return dense_because("one of the first dense_layers")
    grouped = query.unflatten(1, (kv_heads, -1))  # [B, Hkv, G, Q, d]
    mask = _allowed(attention_mask, batch, queries, length)
    state = current.state(layer_idx, key, queries) if method.observes else None
    if queries > 1 or queries == length:
        if state is not None:
            method.observe(grouped, key, mask, scale, state)
        return dense_because("more than one new token at once")

    valid = torch.ones(batch, length, dtype=torch.bool, device=key.device) if mask is None else mask[:, 0]
    attended = method.attend(grouped[:, :, :, 0], key, value, valid, scale, state)
    if bool((attended.kept == valid[:, None, None]).all()):
        return dense_because("k covers the context")
    count = int(valid.sum())
    read = round(attended.kept.sum((0, 3)).double().mean().item())
    bytes_read = attended.elements * key.element_size()
    bytes_dense = 2 * count * kv_heads * head_dim * key.element_size()
    counts = (1, count, read, bytes_read, bytes_dense, attended.mass.numel())
    current.sparse.append(SparseStep(layer_idx, key.dtype, attended.mass, counts))
    return attended.output.reshape(batch, 1, -1, head_dim), None


def _is_compared(decoder: PreTrainedModel) -> bool:
    return decoder.config._attn_implementation in IMPLEMENTATIONS.values()


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


def register() -> None:
    """Make the implementations known to transformers (idempotent)."""
    for base, mask_function in (("sdpa", sdpa_mask), ("eager", eager_mask)):
        AttentionInterface.register(IMPLEMENTATIONS[base], partial(comparison_attention, base))
        AttentionMaskInterface.register(IMPLEMENTATIONS[base], mask_function)


register()
