"""The public operator: a SparQ decode step, one node to the dispatcher and to torch.compile."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import cpu
from .arguments import Arguments, check_arguments, check_memory, check_rows, check_tensors
from .backends import triton_kernels
from .reference import decode_reference

MAX_PLANS = 4096  # a growing cache brings a new layout with every token


class DecodeOutput(NamedTuple):
    """output: [B, Hq, Q, d] in the query's dtype.  alpha: [B, Hq, Q] float32, the approximate score mass that was
    attended.  positions: [B, Hkv, Q, k_max] int64, ascending, unused slots -1; None unless asked for.  lse: [B, Hq, Q]
    float32, the logarithm of the summed exponentials of the attended positions' logits; -inf where there are none."""

    output: Tensor
    alpha: Tensor
    positions: Tensor | None
    lse: Tensor


def decode(
    query: Tensor,
    key: Tensor,
    key_components: Tensor,
    value: Tensor,
    value_sum: Tensor,
    *,
    length: Tensor,
    start: Tensor | None = None,
    mask: Tensor | None = None,
    counts: Tensor | None = None,
    r: int,
    k: int,
    k_divisor: int | None = None,
    local: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    mean_value: bool = True,
    return_positions: bool = False,
) -> DecodeOutput:
    """SparQ attention of new tokens (arXiv 2312.04985, algorithm 1; the group sums the scores, not the logits).

    query: [B, Hq, Q, d], after RoPE.  Hq = G * Hkv; heads of a group are neighbours.  The Q new tokens, 1 to 16, are
        the last ones before `length`; each sees itself and what is before it, and chooses for itself.
    key, value: [B, Hkv, S, d], S the cached positions including the new; last axis contiguous, other strides free.
    key_components: [B, Hkv, blocks, d, BLOCK], the same keys as written by `layout.write_components`.
    value_sum: [B, Hkv, d] float32 (float64 allowed with float64 inputs), the sum of V over exactly the valid positions.
    length: int64 [B], one past each row's last cached position, at most S.
    start: int64 [B], each row's first valid position; None means 0.
    mask: bool [B, S], False excludes a position; None allows all.
    counts: int32 [B, Q, 2], what `count_valid` gives for these rows, so that layers share it; None: counted here.
    r: components of the query used to score, 1 <= r <= d.
    k: positions attended in full, the local window included.  A query that sees n valid positions attends
        min(n, max(k, n // k_divisor)); without k_divisor min(n, k).
    local: newest valid positions that are always attended, at most k; None means a quarter of the query's budget.
    scale: multiplies q.K; None means d ** -0.5.
    softcap: logits x become softcap * tanh(x / softcap), approximate ones too; None means no cap.
    mean_value: blend in the mean of V by the score mass left out (step 5).
    return_positions: also give the chosen positions.

    query, key, key_components and value share a dtype: float32, bfloat16, float16 (float32 arithmetic) or float64.
    Ties, of components and of positions, go to the lower index.  A query that sees nothing gives zeros and alpha 1.
    There is no gradient: a backward pass through the results raises a RuntimeError.
    Raises ValueError for a wrong shape, stride, device or range, TypeError for a wrong dtype.

    >>> from sparq_kernels import allocate_components, decode, write_components
    >>> query, key = torch.ones(1, 2, 1, 4), torch.eye(4).expand(1, 1, 4, 4)
    >>> components = allocate_components(1, 1, 4, 4, torch.float32, "cpu")
    >>> write_components(components, key, 0)
    >>> length = torch.tensor([4])
    >>> decode(query, key, components, key, key.sum(2), length=length, r=2, k=1).output.shape
    torch.Size([1, 2, 1, 4])
    """
    arguments = (
        query,
        key,
        key_components,
        value,
        value_sum,
        length,
        start,
        mask,
        counts,
        r,
        k,
        k_divisor,
        local,
        scale,
        softcap,
        mean_value,
        return_positions,
    )
    if torch.is_grad_enabled() and any(getattr(x, "requires_grad", False) for x in (query, key, value)):
        with torch.no_grad():
            output, alpha, positions, lse = _decode_op(*arguments)
        output, alpha, lse = _NoGradient.apply(output, alpha, lse, query, key, value)
    else:
        output, alpha, positions, lse = _decode_op(*arguments)
    return DecodeOutput(output, alpha, positions if return_positions else None, lse)


class _NoGradient(torch.autograd.Function):
    """Results that have come from query, key and value, on a way that cannot be gone back."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, alpha: Tensor, lse: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        return output.view_as(output), alpha.view_as(alpha), lse.view_as(lse)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            "sparq: sparse decode steps have no gradient. Compute what is to be differentiated with the stock model "
            "(sparq.unpatch(model)), or without a cache; decode under torch.no_grad()"
        )


def decode_default(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the dispatcher calls on a device without a kernel of its own: the reference."""
    call = Arguments(*arguments)
    check_arguments(call)
    if call.query.device.type == "cpu":
        check_memory(call._fields, call[:9])
        check_rows(call.length, call.start, call.key)
    return decode_reference(
        *call[:8],
        r=call.r,
        k=call.k,
        k_divisor=call.k_divisor,
        local=call.local,
        scale=call.softmax_scale,
        softcap=call.softcap,
        mean_value=call.mean_value,
        return_positions=call.return_positions,
    )


def decode_cpu(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The C++ kernel, or the reference where it does not serve: float64, or no compiler."""
    call = Arguments(*arguments)
    if call.query is None or call.query.dtype == torch.float64 or cpu.kernel() is None:
        return decode_default(*arguments)
    call = _with_contiguous_rows(call)
    plan = _planned(call, cpu.plan)
    check_memory(call._fields, call[:9])
    result = cpu.run(plan, call)
    if result is None:
        check_rows(call.length, call.start, call.key)
        raise RuntimeError("length or start changed while the operator ran")
    return result


def decode_cuda(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The Triton kernels (NVIDIA and AMD), or the reference where they do not serve: float64, or no Triton."""
    call = Arguments(*arguments)
    gpu = triton_kernels()
    if call.query is None or call.query.dtype == torch.float64 or gpu is None:
        return decode_default(*arguments)
    call = _with_contiguous_rows(call)
    return gpu.run(_planned(call, gpu.plan), call)


_plans: dict[tuple[object, ...], Any] = {}


def _planned(call: Arguments, make_plan: Any) -> Any:
    """What an implementation works out once for a layout.  Every layer, and every token of a static cache, repeats
    one."""
    layout = call.layout()
    plan = _plans.get(layout)
    if plan is None:
        check_arguments(call)
        plan = make_plan(call)
        if len(_plans) >= MAX_PLANS:
            _plans.clear()
        _plans[layout] = plan
    return plan


def _with_contiguous_rows(call: Arguments) -> Arguments:
    """Kernels read rows of these three; elsewhere any strides will do."""
    query, value_sum, mask = call.query, call.value_sum, call.mask
    if query.dim() == 4 and query.stride(3) != 1:
        call = call._replace(query=query.contiguous())
    if value_sum is not None and value_sum.dim() == 3 and value_sum.stride(2) != 1:
        call = call._replace(value_sum=value_sum.contiguous())
    if mask is not None and mask.dim() == 2 and mask.stride(1) != 1:
        call = call._replace(mask=mask.contiguous())
    return call


def decode_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call = Arguments(*arguments)
    check_tensors(call)
    query, key = call.query, call.key
    k_max = call.k_max if call.return_positions else 0
    return (
        torch.empty(query.shape, dtype=query.dtype, device=query.device),
        query.new_empty(query.shape[:3], dtype=torch.float32),
        query.new_empty((query.shape[0], key.shape[1], query.shape[2], k_max), dtype=torch.int64),
        query.new_empty(query.shape[:3], dtype=torch.float32),
    )


# Registered by hand: `custom_op` wraps every call in 20 us more of Python, and a model calls once per layer and token.
torch.library.define(
    "sparq_kernels::decode",
    "(Tensor query, Tensor key, Tensor key_components, Tensor value, Tensor value_sum, Tensor length, Tensor? start, "
    "Tensor? mask, Tensor? counts, SymInt r, SymInt k, SymInt? k_divisor, SymInt? local, float? scale, float? softcap, "
    "bool mean_value, bool return_positions) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.impl("sparq_kernels::decode", "default", decode_default)
torch.library.impl("sparq_kernels::decode", "cpu", decode_cpu)
torch.library.impl("sparq_kernels::decode", "cuda", decode_cuda)
torch.library.register_fake("sparq_kernels::decode", decode_fake)
_decode_op = torch.ops.sparq_kernels.decode.default  # the overload itself: resolving it costs as much as the checks
