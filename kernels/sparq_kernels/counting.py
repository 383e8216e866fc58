"""What a mask leaves of each row, counted once for all layers that share it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .arguments import check_budget, check_devices, check_per_row, check_required
from .backends import triton_kernels
from .declaration import define, parts_of, required_tensors
from .groups import Budget, Visible, wrong_group
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


tensors_of, _ = parts_of(CountArguments)
REQUIRED = required_tensors(CountArguments)


def count_valid(visible: Visible, budget: Budget, *, queries: int = 1) -> Tensor:
    """How many positions each query sees, and where its local window begins: int32 [B, queries, 2].

    `decode` takes it as `Visible.counts`, and then does not go over the mask to count by itself: on a GPU that is a
    kernel of its own, which the layers of a step can share.

    visible, budget: as `decode` is going to be given them, with a mask.  `counts` and `r` are not looked at.
    queries: new tokens per row, the last ones before `visible.length`.
    Raises ValueError for a wrong shape, device or range, TypeError for a wrong dtype or where there is no mask.
    """
    if not isinstance(visible, Visible):
        raise wrong_group("visible", visible, Visible)
    if not isinstance(budget, Budget):
        raise wrong_group("budget", budget, Budget)
    if visible.mask is None:
        raise TypeError("visible.mask must be a tensor, got None: without a mask there is nothing to count")
    return _count_op(visible.mask, visible.length, visible.start, queries, budget.k, budget.k_divisor, budget.local)


def count_default(call: CountArguments) -> Tensor:
    """Plain PyTorch, for any device."""
    check_counting(call)
    mask, length, start, queries, k, k_divisor, local = call
    device, cached = mask.device, mask.shape[1]
    position, length = torch.arange(cached, device=device), length.clamp(0, cached)
    end = length[:, None] - torch.arange(queries - 1, -1, -1, device=device)  # [B, Q]
    valid = valid_positions(length, start, mask, cached)[:, None] & (position < end[:, :, None])  # [B, Q, S]
    count = valid.sum(-1)
    _, window = budget_and_window(count, Budget(1, k, k_divisor, local))
    newer = count[:, :, None] - valid.cumsum(-1)  # valid positions behind each
    in_window = valid & (newer < window[:, :, None])
    first = torch.where(in_window, position, cached).amin(-1)
    first = torch.where(window > 0, first, end.clamp(min=0))
    return torch.stack([count, first], -1).to(torch.int32)


def count_cuda(call: CountArguments) -> Tensor:
    gpu = triton_kernels()
    if gpu is None:
        return count_default(call)
    check_counting(call)
    return gpu.count(call)


def count_fake(call: CountArguments) -> Tensor:
    return call.mask.new_empty((call.mask.shape[0], call.queries, 2), dtype=torch.int32)


def check_counting(call: CountArguments) -> None:
    """Raise for what an implementation could not survive."""
    check_required(call, REQUIRED)
    mask, length, start, queries, k, k_divisor, local = call
    if mask.dim() != 2 or mask.shape[0] < 1 or mask.shape[1] < 1:
        raise ValueError(f"mask must be [B, S], got {list(mask.shape)}")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool, got {mask.dtype}")
    check_devices(call, tensors_of, "mask")
    check_per_row(mask.shape[0], length=length, start=start)
    if queries < 1:
        raise ValueError(f"queries must be at least 1, got {queries}")
    check_budget(k, k_divisor, local)


_count_op = define("count_valid", CountArguments, results=1, default=count_default, cuda=count_cuda, fake=count_fake)
