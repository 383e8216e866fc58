"""The attention function of a patched model: prompts dense, as before; a few new tokens at a time sparse."""

from __future__ import annotations

import sys
import warnings
import weakref
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

from sparq import reasons, sinks
from sparq.cache import SparqLayer
from sparq.plan import Plan
from sparq.static_cache import SparqStaticLayer
from sparq.stats import SparseStep
from sparq.step import Step

# Where sparsity begins to pay: bytes of K and V that a dense step of one layer reads, by device. Below it the fixed
# cost of a sparse step may be larger than what it saves (on CPUs measured with benchmarks/crossover.py).
PAYS_FROM_BYTES = {
    "cpu": 4 << 20,
    "cuda": 64 << 20,  # the least that was measured, on an H200, where it pays twice
}
patched_layers: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # attention layers of patched models


def sparq_attention(
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
    sparq_step: Step | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention as transformers' `AttentionInterface` calls it; the arguments stand in the order of its SDPA function.

    Args:
        base: the model's own implementation, "sdpa" or "eager", used for everything that is not sparse.
        query: [B, Hq, Q, d]; key, value: [B, Hkv, S, d], the new tokens included; with a static cache S is its size.
        attention_mask: what the mask function of `base` made: [B, 1, Q, S], or None where everything is valid.
        sparq_step: the forward pass this belongs to, from the hook on the model. Without it (a model that only shares
            its configuration with a patched one) the step is dense.

    Returns:
        The output [B, Q, Hq, d], and the attention weights where `base` gives them.
    """
    step = sparq_step
    kwargs |= dict(dropout=dropout, scaling=scaling, is_causal=is_causal, position_bias=position_bias)
    if step is None:
        _warn_if_bypassed(module)
        return dense_attention(base, module, query, key, value, attention_mask, **kwargs)
    if not step.attention_calls:
        step.begin(query.shape[2], key.shape[2])
    step.attention_calls += 1
    layer_idx: int = module.layer_idx  # type: ignore[assignment]
    layer = step.layer(layer_idx, key, value)
    is_fixed = isinstance(layer, SparqStaticLayer)
    call = Call(base, module, step, layer_idx, layer, query, key, value, attention_mask, kwargs, is_fixed=is_fixed)
    return attend(call) if step.method is None else step.method.attend(call)


class Call(NamedTuple):
    """One call of the attention function, or the part of it that is about some of its queries."""

    base: str
    module: nn.Module
    step: Step
    layer_idx: int
    layer: Any  # of the cache, as `Step.layer` gives it
    query: Tensor  # [B, Hq, Q, d]
    key: Tensor  # [B, Hkv, S, d]
    value: Tensor
    attention_mask: Tensor | None  # of the whole call
    kwargs: dict[str, Any]
    later: int = 0  # new tokens that come after these queries, and are among the keys
    is_fixed: bool = False  # storage of a fixed size, of which the device knows how much is filled

    def part(self, begin: int, end: int) -> Call:
        """The same for the queries [begin, end)."""
        return self._replace(query=self.query[:, :, begin:end], later=self.query.shape[2] - end)

    def dense(self) -> tuple[Tensor, Tensor | None]:
        query, key, value, mask, later = self.query, self.key, self.value, self.attention_mask, self.later
        queries = query.shape[2]
        if mask is not None and mask.dim() == 4 and mask.shape[2] > queries:
            mask = mask[:, :, mask.shape[2] - later - queries : mask.shape[2] - later]
        if later and not self.is_fixed:
            key, value = (x[:, :, : x.shape[2] - later] for x in (key, value))
            mask = None if mask is None else mask[..., : key.shape[2]]
        if mask is None:
            mask = self._missing_mask(key)
        return dense_attention(self.base, self.module, query, key, value, mask, **self.kwargs)

    def _missing_mask(self, key: Tensor) -> Tensor | None:
        """The causal mask of fewer queries than keys, bool [1, 1, Q, S], or None where `base` makes the right one.

        SDPA takes the queries for the first of the tokens, as it is in a static cache with nothing but this prompt.
        Here they are the last: Gemma 4 leaves most of them out in the layers that share keys, and transformers looks at
        the name of the implementation to see that it must not.
        """
        queries, keys = self.query.shape[2], key.shape[2]
        causal = self.kwargs["is_causal"]
        if queries == keys or not (getattr(self.module, "is_causal", True) if causal is None else causal):
            return None
        if self.is_fixed:
            if queries > 1 and self.step.is_prompt and queries + self.later == self.step.tokens:
                return None
            first: Any = self.layer.cumulative_length - self.later - queries
        elif queries == 1:
            return None
        else:
            first = keys - queries
        return causal_mask(queries, keys, first, key.device)


def causal_mask(queries: int, keys: int, first: int | Tensor, device: torch.device) -> Tensor:
    """bool [1, 1, Q, S] of queries at positions `first`, `first` + 1, ...: each sees what is before it and itself."""
    own = torch.arange(queries, device=device)[:, None] + first
    return (torch.arange(keys, device=device) <= own)[None, None]


def attend(call: Call) -> tuple[Tensor, Tensor | None]:
    """SparQ's steps where there are any to be made, and dense attention elsewhere, counted."""
    step, layer_idx, key, query_length = call.step, call.layer_idx, call.key, call.query.shape[2]
    if not query_length:
        return call.dense()
    if step.is_static or torch.compiler.is_compiling():
        step.stats.prepare(layer_idx, key.device, key.dtype)
    prompt = step.prompt_length(query_length)
    if call.is_fixed and (prompt or query_length > MAX_QUERY_LENGTH):
        # Looked at as if it were its last token: what is valid is known now, and the next step, which goes on from the
        # index, may be a compiled one.
        _prepare(call.part(query_length - 1, query_length))
    if prompt == query_length:
        step.prompts[layer_idx] = 2 * key.numel() * key.element_size()
        return call.dense()
    is_one_step = prompt == 0 and (step.drafting is None or query_length <= MAX_QUERY_LENGTH)
    if is_one_step or call.kwargs.get("output_attentions"):  # whoever wants weights wants those of all queries together
        return _decode_or_dense(call)
    # A draft, perhaps with the prompt before it. Each of its tokens is a step, as many at once as the kernel takes.
    outputs = [call.part(0, prompt).dense()[0]] if prompt else []
    for begin in range(prompt, query_length, MAX_QUERY_LENGTH):
        outputs.append(_decode_or_dense(call.part(begin, min(begin + MAX_QUERY_LENGTH, query_length)))[0])
    return torch.cat(outputs, 1), None


class _Ready(NamedTuple):
    """What a sparse step reads besides K and V."""

    plan: Plan
    components: Tensor
    ranges: Tensor | None  # of the components' codes
    value_sum: Tensor
    mean_is_stale: Tensor | None  # whether the sum is of other positions, which the device alone knows


def _decode_or_dense(call: Call) -> tuple[Tensor, Tensor | None]:
    """A decode step of one to `MAX_QUERY_LENGTH` tokens, counted."""
    ready = _prepare(call)
    if not isinstance(ready, str):
        return _decode(call, ready).transpose(1, 2), None
    step = call.step
    step.count_dense(call.layer_idx, ready, call.query.shape[2], call.key, call.later)
    if not torch.compiler.is_compiling():
        if ready == reasons.TOO_SHORT:
            least = f"fewer than {_min_length(step, call.key):,} tokens are cached (min_length): nothing to gain yet"
            step.stats.warn_once(f"sparq: decode steps are dense while {least}", about=ready)
        elif ready == reasons.COVERED:
            step.stats.warn_once(f"sparq: decode steps are dense while {ready}")
        elif ready not in reasons.EXPECTED:
            step.stats.warn_once(f"sparq: decoding stays dense and gains nothing: {ready}")
    return call.dense()


def _prepare(call: Call) -> _Ready | str:
    """The plan of the step and the layer's index, brought up to date; or why the step must be dense."""
    reason = _dense_reason(call)
    if reason is not None:
        return reason
    step, layer, key, mask, later = call.step, call.layer, call.key, call.attention_mask, call.later
    length = layer.cumulative_length if call.is_fixed else key.shape[2]
    plan = step.plan(mask, length, key, call.query.shape[2], later)
    if plan.dense_reason is not None:
        return plan.dense_reason
    newest = step.plan(mask, length, key) if later else plan
    indexed = layer.index(newest.start, newest.mask)
    if later:
        indexed = indexed._replace(value_sum=layer.sum_before(later))
    if not call.is_fixed and (isinstance(plan.valid, Tensor) or indexed.mean_is_stale is not None):
        step.stats.prepare(call.layer_idx, key.device, key.dtype)
    return _Ready(plan, *indexed)


def _decode(call: Call, ready: _Ready) -> Tensor:
    """The sparse step itself, counted: [B, Hq, Q, d]."""
    step, plan, key, value = call.step, ready.plan, call.key, call.value
    config = step.config
    if call.later and not call.is_fixed:
        key, value = (x[:, :, : x.shape[2] - call.later] for x in (key, value))
    if step.recording is not None and torch.compiler.is_compiling():
        raise RuntimeError("sparq: a compiled step cannot be recorded; leave sparq.record(model), or run it uncompiled")
    _, kv_heads, _, head_dim = key.shape
    budget = step.budget(head_dim)
    output, alpha, positions, lse, read = sparq_kernels.decode(
        call.query,
        sparq_kernels.Cached(key, ready.components, value, ready.value_sum, ready.ranges),
        sparq_kernels.Visible(plan.length, plan.start, plan.mask, plan.row_counts),
        budget,
        scale=call.kwargs["scaling"],
        # Under SDPA the model's dense steps know no cap: older versions of transformers allow that, newer refuse it.
        softcap=call.kwargs.get("softcap") if call.base == "eager" else None,
        mean_value=config.mean_value,
        return_positions=step.recording is not None,
    )
    if step.recording is not None and positions is not None:
        step.recording.add(call.layer_idx, positions, key.shape[2])
    if call.kwargs.get("s_aux") is not None:  # attention sinks, [Hq]
        output = sinks.attenuate(output, alpha, lse, call.kwargs["s_aux"])
    itemsize = key.element_size()
    counts = step.counts(plan, config.index, kv_heads, itemsize, budget.r, head_dim, alpha.numel())
    read_bytes = 2 * head_dim * itemsize
    doubts = ready.mean_is_stale, plan.ignored_bias
    step.sparse.append(SparseStep(call.layer_idx, key.dtype, alpha, counts, read, read_bytes, *doubts))
    return output


def _dense_reason(call: Call) -> str | None:
    """Why this layer's step has to be dense, as far as its mask does not decide it; None: it can be sparse."""
    step, layer, query, key, value, kwargs = call.step, call.layer, call.query, call.key, call.value, call.kwargs
    if kwargs.get("sliding_window") is not None or getattr(layer, "is_sliding", False):
        return reasons.SLIDING
    if query.shape[2] > MAX_QUERY_LENGTH:
        return reasons.TOO_MANY
    if call.layer_idx < step.config.dense_layers:
        return reasons.FIRST_LAYERS
    if not isinstance(layer, (SparqLayer, SparqStaticLayer)):
        if step.cache is not None and step.cache.offloading:
            return reasons.OFFLOADED
        if type(layer) is DynamicLayer:
            return reasons.UNSEEN
        if layer is None:
            return reasons.FOREIGN_CACHE
        return f"a cache layer of type {type(layer).__name__} cannot be read sparsely"
    if layer.storage_device != key.device:
        return reasons.OFFLOADED
    if not layer.holds(key, value):
        return reasons.OTHER_KEYS
    if not query.dtype == key.dtype == value.dtype:
        return reasons.DTYPES_DIFFER  # autocast
    if key.shape != value.shape:
        return reasons.SHAPES_DIFFER
    if not step.has_kernel(key.device.type, key.dtype):
        return reasons.NO_KERNEL
    if isinstance(layer, SparqStaticLayer) and not layer.has_index:
        return reasons.MADE_IN_GRAPH
    if kwargs["dropout"]:
        return reasons.DROPOUT
    if kwargs["position_bias"] is not None:
        return reasons.POSITION_BIAS
    if kwargs.get("output_attentions"):
        return reasons.WEIGHTS_WANTED
    return reasons.TOO_SHORT if key.shape[2] < _min_length(step, key) else None


def _min_length(step: Step, key: Tensor) -> int:
    """Cached positions from which a step may be sparse."""
    if step.config.min_length is not None:
        return step.config.min_length
    batch, heads, _, head_dim = key.shape
    return PAYS_FROM_BYTES.get(key.device.type, 0) // (2 * batch * heads * head_dim * key.element_size())


def _warn_if_bypassed(module: nn.Module) -> None:
    if not torch.compiler.is_compiling() and module in patched_layers:
        warnings.warn(
            "sparq: a patched model's forward was called past its hooks (model.forward(...) instead of model(...)); "
            "these steps are dense and not counted",
            stacklevel=2,
        )


def dense_attention(
    base: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Attention by transformers' own function; `kwargs` as `sparq_attention` has them."""
    if base == "eager":
        given = {
            name: value
            for name, value in kwargs.items()
            if name not in ("is_causal", "position_bias") or value is not None
        }
        return _eager(module)(module, query, key, value, mask, **given)
    plain = kwargs["position_bias"] is None and kwargs.get("softcap") is None
    if query.shape[2] == 1 and query.device.type == "cpu" and plain:
        # On the CPU SDPA is several times faster with the group packed into the query axis than with enable_gqa.
        batch, heads, _, head_dim = query.shape
        if mask is not None and mask.shape[1] > 1:  # one for each query head
            mask = mask.reshape(mask.shape[0], key.shape[1], -1, mask.shape[3])
        output = nn.functional.scaled_dot_product_attention(
            query.reshape(batch, key.shape[1], -1, head_dim),
            key,
            value,
            mask,
            kwargs["dropout"],
            scale=kwargs["scaling"],
        )
        return output.reshape(batch, 1, heads, -1), None
    return sdpa_attention_forward(module, query, key, value, mask, **kwargs)


def _eager(module: nn.Module) -> Callable:
    """The `eager_attention_forward` beside the attention class of `module`, or beside the class that it extends."""
    for cls in type(module).__mro__:
        function = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if function is not None:
            return function
    raise RuntimeError(f"{type(module).__name__} has no eager attention function")


IMPLEMENTATIONS = {"sdpa": "sparq_sdpa", "eager": "sparq_eager"}  # the model's own implementation → its patched one


def register() -> None:
    """Make the implementations known to transformers (idempotent)."""
    for base, mask_function in (("sdpa", sdpa_mask), ("eager", eager_mask)):
        AttentionInterface.register(IMPLEMENTATIONS[base], partial(sparq_attention, base))
        AttentionMaskInterface.register(IMPLEMENTATIONS[base], mask_function)
