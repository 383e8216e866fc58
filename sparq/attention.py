"""The attention function of a patched model: prompts dense, as before; a few new tokens at a time sparse."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import sparq_kernels
import torch
from sparq_kernels.arguments import MAX_QUERY_LENGTH
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from sparq import sinks
from sparq.cache import SparqLayer
from sparq.static_cache import SparqStaticLayer
from sparq.static_plan import StaticPlan
from sparq.step import Plan, Step

# Where sparsity begins to pay: bytes of K and V that a dense step of one layer reads, by device. Below it the fixed
# cost of a sparse step is larger than what it saves (measured with benchmarks/crossover.py).
PAYS_FROM_BYTES = {"cpu": 4 << 20}


def sparq_attention(
    base: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sparq_step: Step | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention as transformers' `AttentionInterface` calls it.

    Args:
        base: the model's own implementation, "sdpa" or "eager", used for everything that is not sparse.
        query: [B, Hq, Q, d]; key, value: [B, Hkv, S, d], the new tokens included; with a static cache S is its size.
        attention_mask: what the mask function of `base` made: [B, 1, Q, S], or None where everything is valid.
        sparq_step: the forward pass this belongs to, from the hook on the model. Without it (a model that only shares
            its configuration with a patched one) the step is dense.

    Returns:
        The output [B, Q, Hq, d], and the attention weights where `base` gives them.
    """
    dense = partial(_dense, base, module, query, key, value, attention_mask, scaling, dropout, **kwargs)
    step = sparq_step
    if step is None:
        return dense()
    step.attention_calls += 1
    query_length = query.shape[2]
    if not query_length:
        return dense()
    layer_idx: int = module.layer_idx  # type: ignore[assignment]
    layer = step.layer(layer_idx)
    is_static = isinstance(layer, SparqStaticLayer)
    if step.counts_on_device:
        step.counters.prepare(layer_idx, key.device, key.dtype)
    prompt = 0  # so many tokens of this pass are dense, the rest are decode steps
    if step.is_prompt or query_length == key.shape[2]:
        prompt = query_length
        if 0 < step.drafts < query_length == key.shape[2] and not is_static:
            prompt -= step.drafts
    steps = query[:, :, prompt:]
    if is_static and not 0 < steps.shape[2] <= MAX_QUERY_LENGTH:
        # Looked at as if it were its last token: what is valid is known now, and the next step, which goes on from the
        # index, may be a compiled one.
        _prepare(step, layer_idx, query[:, :, -1:], key, value, attention_mask, dropout, kwargs)
    if not steps.shape[2]:
        return dense()
    ready = _prepare(step, layer_idx, steps, key, value, attention_mask, dropout, kwargs)
    if isinstance(ready, str):
        bytes_dense = 2 * key.numel() * key.element_size()
        if step.counts_on_device:
            step.counters.dense_on_device(layer_idx, ready, bytes_dense)
        else:
            step.counters.dense(layer_idx, ready, bytes_dense)
        return dense()
    # Under SDPA the model's dense steps know no cap: older versions of transformers allow that, newer refuse it.
    softcap = kwargs.get("softcap") if base == "eager" else None
    output = _decode(step, layer_idx, steps, key, value, ready, scaling, softcap, kwargs.get("s_aux")).transpose(1, 2)
    if prompt:
        query, key, value = (x[:, :, :prompt] for x in (query, key, value))
        mask = None if attention_mask is None else attention_mask[:, :, :prompt, :prompt]
        before, _ = _dense(base, module, query, key, value, mask, scaling, dropout, **kwargs)
        output = torch.cat([before, output], 1)
    return output, None


class _Ready(NamedTuple):
    """What a sparse step reads besides K and V."""

    plan: Plan | StaticPlan
    components: Tensor
    value_sum: Tensor
    other_sum: Tensor | None  # of a static layer: whether the sum is of other positions


def _prepare(
    step: Step,
    layer_idx: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float,
    kwargs: dict[str, Any],
) -> _Ready | str:
    """The plan of the step and the layer's index, brought up to date; or why the step must be dense."""
    reason = _dense_reason(step, layer_idx, query, key, value, dropout, kwargs)
    if reason is not None:
        return reason
    layer = step.layer(layer_idx)
    if isinstance(layer, SparqStaticLayer):
        static = step.static_plan(attention_mask, layer.cumulative_length, key, query.shape[2])
        if static.dense_reason is not None:
            return static.dense_reason
        components, value_sum, other_sum = layer.index(static.mask)
        return _Ready(static, components, value_sum, other_sum)
    plan = step.plan(attention_mask, key.shape[2], key.shape[0], key.device, query.shape[2])
    if plan.dense_reason is not None:
        return plan.dense_reason
    components, value_sum = layer.index(plan.start, plan.mask)
    return _Ready(plan, components, value_sum, None)


def _decode(
    step: Step,
    layer_idx: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ready: _Ready,
    scaling: float | None,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    """The sparse step itself, counted: [B, Hq, Q, d]; s_aux: [Hq], attention sinks."""
    config, plan = step.config, ready.plan
    batch, kv_heads, _, head_dim = key.shape
    queries, r = query.shape[2], config.components(head_dim)
    output, alpha, _, lse = sparq_kernels.decode(
        query,
        key,
        ready.components,
        value,
        ready.value_sum,
        length=plan.length,
        start=plan.start,
        mask=plan.mask,
        r=r,
        k=config.min_k,
        k_divisor=config.k_divisor,
        local=config.local,
        scale=scaling,
        softcap=softcap,
        mean_value=config.mean_value,
    )
    if s_aux is not None:
        output = sinks.attenuate(output, alpha, lse, s_aux)
    per_position = kv_heads * key.element_size()
    if isinstance(plan, StaticPlan):
        counts = step.static_counts(plan, per_position, r, head_dim, alpha.numel())
        step.counters.sparse_on_device(layer_idx, alpha, counts, ready.other_sum, plan.ignored_bias)
    else:
        step.counters.sparse(
            layer_idx,
            alpha,
            key.dtype,
            positions_cached=plan.valid,
            positions_read=plan.read,
            bytes_read=per_position * (plan.valid * r + 2 * plan.read * head_dim + 4 * batch * queries * head_dim),
            bytes_dense=per_position * 2 * plan.valid_once * head_dim,
        )
    return output


def _dense_reason(
    step: Step, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, dropout: float, kwargs: dict[str, Any]
) -> str | None:
    """Why this layer's step has to be dense, as far as its mask does not decide it; None: it can be sparse."""
    layer = step.layer(layer_idx)
    if kwargs.get("sliding_window") is not None or getattr(layer, "is_sliding", False):
        return "sliding-window layer"
    if query.shape[2] > MAX_QUERY_LENGTH:
        return f"more than {MAX_QUERY_LENGTH} new tokens at once"
    if layer_idx < step.config.dense_layers:
        return "one of the first dense_layers"
    if not isinstance(layer, (SparqLayer, SparqStaticLayer)):
        if step.cache is not None and step.cache.offloading:
            return _unreadable(step, "an offloaded cache")
        if type(layer) is DynamicLayer:
            return "the cache was not seen before this step"
        kind = "no cache" if layer is None else f"a cache layer of type {type(layer).__name__}"
        return _unreadable(step, kind)
    if layer.keys is None or layer.keys.device != key.device:
        return _unreadable(step, "an offloaded cache")
    for given, cached in ((key, layer.keys), (value, layer.values)):
        if isinstance(layer, SparqStaticLayer):
            if given is not cached:
                return _unreadable(step, "attention to other keys and values than the cached ones")
        elif cached is None or (given.shape, given.data_ptr()) != (cached.shape, cached.data_ptr()):
            return _unreadable(step, "attention to other keys and values than the cached ones")
    if not query.dtype == key.dtype == value.dtype:
        return "query, key and value differ in dtype"  # autocast
    if key.shape != value.shape:
        return "keys and values differ in shape"
    if isinstance(layer, SparqStaticLayer) and layer.components is None:
        return "the cache was first used in a compiled graph"
    if dropout:
        return "attention dropout"
    if kwargs.get("position_bias") is not None:
        return "attention with position_bias"
    if kwargs.get("output_attentions"):
        return "attention weights were asked for"
    min_length = step.config.min_length
    if min_length is None:
        bytes_per_position = 2 * key.numel() // key.shape[2] * key.element_size()
        min_length = PAYS_FROM_BYTES.get(key.device.type, 0) // bytes_per_position
    if key.shape[2] < min_length:
        return "shorter than min_length"
    return None


def _dense(
    base: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    if base == "eager":
        return _eager(module)(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    plain = kwargs.get("position_bias") is None and kwargs.get("softcap") is None
    if query.shape[2] == 1 and query.device.type == "cpu" and plain:
        # On the CPU SDPA is several times faster with the group packed into the query axis than with enable_gqa.
        batch, heads, _, head_dim = query.shape
        mask = attention_mask
        if mask is not None and mask.shape[1] > 1:  # one for each query head
            mask = mask.reshape(mask.shape[0], key.shape[1], -1, mask.shape[3])
        output = nn.functional.scaled_dot_product_attention(
            query.reshape(batch, key.shape[1], -1, head_dim), key, value, mask, dropout, scale=scaling
        )
        return output.reshape(batch, 1, heads, -1), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)


def _eager(module: nn.Module) -> Callable:
    """The `eager_attention_forward` beside the attention class of `module`, or beside the class that it extends."""
    for cls in type(module).__mro__:
        function = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if function is not None:
            return function
    raise RuntimeError(f"{type(module).__name__} has no eager attention function")


def _unreadable(step: Step, kind: str) -> str:
    step.counters.warn_once(f"sparq: {kind} cannot be read sparsely; decoding stays dense and gains nothing")
    return f"{kind} cannot be read sparsely"


IMPLEMENTATIONS = {"sdpa": "sparq", "eager": "sparq_eager"}  # the model's own implementation → its patched one


def register() -> None:
    """Make the implementations known to transformers (idempotent)."""
    for base, mask_function in (("sdpa", sdpa_mask), ("eager", eager_mask)):
        AttentionInterface.register(IMPLEMENTATIONS[base], partial(sparq_attention, base))
        AttentionMaskInterface.register(IMPLEMENTATIONS[base], mask_function)
