"""A new token's value into the sum of V, against doing it row by row."""

from __future__ import annotations

from typing import Any

import pytest
import sparq_kernels
import torch
from sparq_kernels.value_sum import ExtendArguments

OP = torch.ops.sparq_kernels.extend_sum.default


def arguments(
    lengths: tuple[int, ...] = (20, 7, 1), heads: int = 2, capacity: int = 20, head_dim: int = 12, dtype=torch.float32
) -> ExtendArguments:
    """Rows of which some newest positions are valid; what is not valid is NaN."""
    generator = torch.Generator().manual_seed(0)
    batch = len(lengths)
    valid = torch.rand(batch, capacity, generator=generator) < 0.5
    value = torch.randn(batch, heads, capacity, head_dim, generator=generator).to(dtype)
    value.masked_fill_(~valid[:, None, :, None], torch.nan)
    value_sum = torch.randn(batch, heads, head_dim, generator=generator)
    return ExtendArguments(value_sum, torch.zeros_like(valid), value, valid, torch.tensor(lengths))


def row_by_row(call: ExtendArguments) -> tuple[torch.Tensor, torch.Tensor]:
    value_sum, summed = call.value_sum.clone(), call.summed.clone()
    for b, length in enumerate(call.length.tolist()):
        s = length - 1
        if 0 <= s < call.value.shape[2]:
            summed[b, s] = call.valid[b, s]
            if call.valid[b, s]:
                value_sum[b] += call.value[b, :, s].float()
    return value_sum, summed


def check(call: ExtendArguments, extend: Any) -> None:
    expected = row_by_row(call)
    extend(call)
    for ours, theirs in zip(call[:2], expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


LENGTHS = [(20, 7, 1), (20, 20, 20), (0, 21, 5), (-3, 1 << 40, 20)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_equals_doing_it_row_by_row(lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    check(arguments(lengths, dtype=dtype), lambda call: sparq_kernels.extend_sum(*call[:4], length=call.length))


def test_opcheck() -> None:
    torch.library.opcheck(OP, tuple(arguments()))
    one = arguments((20,))
    torch.library.opcheck(OP, (*one[:4], torch.tensor(20).expand(1)))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"value": torch.zeros(3, 2, 20)}, ValueError, "value must be \\[B, Hkv, capacity, d\\], got \\[3, 2, 20\\]"),
        ({"value_sum": torch.zeros(3, 2, 11)}, ValueError, "value_sum must be \\[3, 2, 12\\], got \\[3, 2, 11\\]"),
        (
            {"value_sum": torch.zeros(3, 2, 12).double()},
            TypeError,
            "value_sum must be torch.float32, got torch.float64",
        ),
        ({"summed": torch.zeros(3, 20)}, TypeError, "summed must be torch.bool"),
        ({"valid": torch.zeros(3, 19, dtype=torch.bool)}, ValueError, "valid must be \\[3, 20\\], got \\[3, 19\\]"),
        ({"valid": torch.zeros(20, 3, dtype=torch.bool).T}, ValueError, "valid must be contiguous in its last axis"),
        ({"length": torch.zeros(3)}, TypeError, "length must be torch.int64, got torch.float32"),
        ({"length": torch.tensor(3)}, ValueError, "length must be \\[3\\], got \\[\\]"),
    ],
)
def test_errors(changes: dict[str, torch.Tensor], error: type[Exception], message: str) -> None:
    call = arguments()
    before = [x.clone() for x in call[:2]]
    wrong = call._replace(**changes)
    with pytest.raises(error, match=message):
        sparq_kernels.extend_sum(*wrong[:4], length=wrong.length)
    assert all(torch.equal(a, b) for a, b in zip(call[:2], before, strict=True))
