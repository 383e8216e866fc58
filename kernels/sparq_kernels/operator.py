"""The public operator: a SparQ decode step, one node to the dispatcher and to torch.compile."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import cpu
from .arguments import Arguments, check_arguments, check_memory, check_rows, check_tensors, tensors_of
from .backends import triton_kernels
from .declaration import define
from .groups import Budget, Cached, Visible, wrong_group
from .reference import Results, decode_reference

MAX_PLANS = 4096  # a growing cache brings a new layout with every token


class DecodeOutput(NamedTuple):
    """output: [B, Hq, Q, d] in the query's dtype.  alpha: [B, Hq, Q] float32, the approximate score mass that was
    attended.  positions: [B, Hkv, Q, k_max] int64, ascending, unused slots -1; None unless asked for.  lse: [B, Hq, Q]
    float32, the logarithm of the summed exponentials of the attended positions' logits; -inf where there are none.
    read: [B, Hkv, Q] int32, how many positions were attended."""

    output: Tensor
    alpha: Tensor
    positions: Tensor | None
    lse: Tensor
    read: Tensor


def decode(
    query: Tensor,
    cached: Cached,
    visible: Visible,
    budget: Budget,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    mean_value: bool | float = True,
    return_positions: bool = False,
) -> DecodeOutput:
    """SparQ attention of new tokens (arXiv 2312.04985, algorithm 1; the group sums the scores, not the logits).

    query: [B, Hq, Q, d], after RoPE, in the dtype of the cached keys.  Hq = G * Hkv; heads of a group are neighbours.
        The Q new tokens, 1 to 16, are the last ones before `visible.length`; each sees itself and what is before it,
        and chooses for itself.
    cached: the keys and values, and what is kept beside them.
    visible: which rows and positions are valid.
    budget: how much is read for each query.
    scale: multiplies q.K; None means d ** -0.5.
    softcap: logits x become softcap * tanh(x / softcap), approximate ones too; None means no cap.
    mean_value: whether to blend in the mean of V by the score mass left out (step 5). A number: only for query heads
        whose alpha is at least that; where less of the mass was attended, the mean says little of the rest.
    return_positions: also give the chosen positions.

    Ties, of components and of positions, go to the lower index.  A query that sees nothing gives zeros and alpha 1.
    There is no gradient: a backward pass through the results raises a RuntimeError.
    Raises ValueError for a wrong shape, stride, device or range, TypeError for a wrong dtype or group of arguments.

    >>> from sparq_kernels import Budget, Cached, Visible, allocate_components, decode, write_components
    >>> query, key = torch.ones(1, 2, 1, 4), torch.eye(4).expand(1, 1, 4, 4)
    >>> components = allocate_components(1, 1, 4, 4, torch.float32, "cpu")
    >>> write_components(components, key, 0)
    >>> cached = Cached(key, components, value=key, value_sum=key.sum(2))
    >>> decode(query, cached, Visible(length=torch.tensor([4])), Budget(r=2, k=1)).output.shape
    torch.Size([1, 2, 1, 4])
    """
    if not isinstance(cached, Cached):
        raise wrong_group("cached", cached, Cached)
    if not isinstance(visible, Visible):
        raise wrong_group("visible", visible, Visible)
    if not isinstance(budget, Budget):
        raise wrong_group("budget", budget, Budget)
    arguments = (query, *cached, *visible, *budget, scale, softcap, mean_from(mean_value), return_positions)
    key, value = cached.key, cached.value
    if torch.is_grad_enabled() and any(getattr(x, "requires_grad", False) for x in (query, key, value)):
        with torch.no_grad():
            output, alpha, positions, lse, read = _decode_op(*arguments)
        output, alpha, lse = _NoGradient.apply(output, alpha, lse, query, key, value)
    else:
        output, alpha, positions, lse, read = _decode_op(*arguments)
    return DecodeOutput(output, alpha, positions if return_positions else None, lse, read)


def mean_from(mean_value: bool | float) -> float:
    """The least alpha with which the mean value is blended in; infinity: never."""
    if isinstance(mean_value, bool):
        return 0.0 if mean_value else math.inf
    return float(mean_value)


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


def decode_default(call: Arguments) -> Results:
    """What the dispatcher calls on a device without a kernel of its own; on a CPU until csrc/operator.cpp is there,
    which then calls it for layouts that it does not know yet."""
    if call.query is not None and call.query.device.type == "cpu":
        return decode_cpu(call)
    return _run_reference(call)


def _run_reference(call: Arguments) -> Results:
    check_arguments(call)
    if call.query.device.type == "cpu":
        check_memory(call, tensors_of)
        check_rows(call)
    return decode_reference(
        call.query,
        call.cached,
        call.visible,
        call.budget,
        scale=call.softmax_scale,
        softcap=call.softcap,
        mean_from=call.mean_from,
        return_positions=call.return_positions,
    )


def decode_cpu(call: Arguments) -> Results:
    """The C++ kernel, or the reference where it does not serve: float64, or no compiler."""
    if call.query.dtype == torch.float64 or cpu.kernel() is None:
        return _run_reference(call)
    plan, ours = _planned(call, cpu.plan)
    result = cpu.run(plan, ours, check_memory(ours, tensors_of), as_given=ours is call)
    if result is None:
        check_rows(call)
        raise RuntimeError("length, start or block_table changed while the operator ran")
    return result


def decode_cuda(call: Arguments) -> Results:
    """The Triton kernels (NVIDIA and AMD), or the reference where they do not serve: float64, or no Triton."""
    gpu = triton_kernels()
    if call.query is None or call.query.dtype == torch.float64 or gpu is None:
        return _run_reference(call)
    return gpu.run(*_planned(call, gpu.plan))


_plans: dict[tuple[object, ...], Any] = {}


def _planned(call: Arguments, make_plan: Any) -> tuple[Any, Arguments]:
    """What an implementation works out once for a layout, and the call as kernels read it.  Every layer, and every
    token of a static cache, repeats a layout."""
    plan = _plans.get(call.layout())
    if plan is None:  # as is every call whose rows must be copied first
        call = _with_contiguous_rows(call)
        layout = call.layout()
        plan = _plans.get(layout)
        if plan is None:
            check_arguments(call)
            plan = make_plan(call)
            if len(_plans) >= MAX_PLANS:
                _plans.clear()
            _plans[layout] = plan
    return plan, call


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


def decode_fake(call: Arguments) -> Results:
    check_tensors(call)
    query, key = call.query, call.key
    k_max = call.k_max if call.return_positions else 0
    return (
        torch.empty(query.shape, dtype=query.dtype, device=query.device),
        query.new_empty(query.shape[:3], dtype=torch.float32),
        query.new_empty((query.shape[0], key.shape[1], query.shape[2], k_max), dtype=torch.int64),
        query.new_empty(query.shape[:3], dtype=torch.float32),
        query.new_empty((query.shape[0], key.shape[1], query.shape[2]), dtype=torch.int32),
    )


_decode_op = define("decode", Arguments, results=5, default=decode_default, cuda=decode_cuda, fake=decode_fake)
