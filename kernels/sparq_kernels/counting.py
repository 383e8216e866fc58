"""What a mask leaves of each row, counted once for all layers that share it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .arguments import check_budget, check_per_row
from .backends import triton_kernels
from .reference import budget_and_window, valid_positions


class CountArguments(NamedTuple):
    """One call, in the order of the operator's schema."""

    mask: Tensor
    length: Tensor
    start: Tensor | None
    queries: int
    k: int
    k_divisor: int | None
    local: int | None


def count_valid(
    mask: Tensor,
    *,
    length: Tensor,
    start: Tensor | None = None,
    queries: int = 1,
    k: int,
    k_divisor: int | None = None,
    local: int | None = None,
) -> Tensor:
    """How many positions each query sees, and where its local window begins: int32 [B, queries, 2].

    `decode` takes it as `counts`, and then does not go over the mask to count by itself: on a GPU that is a kernel of
    its own, which the layers of a step can share.

    mask: bool [B, S].  length, start, k, k_divisor and local: as `decode` is going to be given them.
    queries: new tokens per row, the last ones before `length`.
    Raises ValueError for a wrong shape, device or range, TypeError for a wrong dtype.
    """
    return _count_op(mask, length, start, queries, k, k_divisor, local)


def count_default(*arguments: object) -> Tensor:
    """Plain PyTorch, for any device."""
    call = CountArguments(*arguments)  # type: ignore[arg-type]
    check_counting(call)
    mask, length, start, queries, k, k_divisor, local = call
    device, cached = mask.device, mask.shape[1]
    position, length = torch.arange(cached, device=device), length.clamp(0, cached)
    end = length[:, None] - torch.arange(queries - 1, -1, -1, device=device)  # [B, Q]
    valid = valid_positions(length, start, mask, cached)[:, None] & (position < end[:, :, None])  # [B, Q, S]
    count = valid.sum(-1)
    _, window = budget_and_window(count, k, k_divisor, local)
    newer = count[:, :, None] - valid.cumsum(-1)  # valid positions behind each
    in_window = valid & (newer < window[:, :, None])
    first = torch.where(in_window, position, cached).amin(-1)
    first = torch.where(window > 0, first, end.clamp(min=0))
    return torch.stack([count, first], -1).to(torch.int32)


def count_cuda(*arguments: object) -> Tensor:
    gpu = triton_kernels()
    if gpu is None:
        return count_default(*arguments)
    call = CountArguments(*arguments)  # type: ignore[arg-type]
    check_counting(call)
    return gpu.count(call)


def count_fake(*arguments: object) -> Tensor:
    call = CountArguments(*arguments)  # type: ignore[arg-type]
    return call.mask.new_empty((call.mask.shape[0], call.queries, 2), dtype=torch.int32)


def check_counting(call: CountArguments) -> None:
    """Raise for what an implementation could not survive."""
    mask, length, start, queries, k, k_divisor, local = call
    if mask.dim() != 2 or mask.shape[0] < 1 or mask.shape[1] < 1:
        raise ValueError(f"mask must be [B, S], got {list(mask.shape)}")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool, got {mask.dtype}")
    for name, per_row in (("length", length), ("start", start)):
        if per_row is not None and per_row.device != mask.device:
            raise ValueError(f"{name} must be on mask's device {mask.device}, got {per_row.device}")
    check_per_row(mask.shape[0], length=length, start=start)
    if queries < 1:
        raise ValueError(f"queries must be at least 1, got {queries}")
    check_budget(k, k_divisor, local)


torch.library.define(
    "sparq_kernels::count_valid",
    "(Tensor mask, Tensor length, Tensor? start, SymInt queries, SymInt k, SymInt? k_divisor, SymInt? local) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.impl("sparq_kernels::count_valid", "default", count_default)
torch.library.impl("sparq_kernels::count_valid", "cuda", count_cuda)
torch.library.register_fake("sparq_kernels::count_valid", count_fake)
_count_op = torch.ops.sparq_kernels.count_valid.default
