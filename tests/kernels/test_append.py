"""The new token's way into the storage: as if everything had been written anew."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sparq_kernels import BLOCK, append, write_components
from sparq_kernels.append import AppendArguments, check_append
from torch import Tensor

from tests.kernels.cases import new_token, storage_of

OP = torch.ops.sparq_kernels.append


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("position", [0, 299, BLOCK - 1, BLOCK, BLOCK + 7])
def test_one_position(dtype: torch.dtype, position: int) -> None:
    key, value, components, value_sum = storage_of(2, 3, BLOCK + 8, 12, dtype)
    expected = [x.clone() for x in (key, value, components, value_sum)]
    new_key, new_value = new_token(2, 3, 12, dtype)
    expected[0][:, :, position] = new_key[:, :, 0]
    expected[1][:, :, position] = new_value[:, :, 0]
    write_components(expected[2], new_key, position)
    expected[3] += new_value[:, :, 0]
    append(key, value, components, value_sum, new_key, new_value, position=position)
    for ours, theirs in zip((key, value, components, value_sum), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def test_a_position_for_each_row() -> None:
    together, alone = storage_of(3, 2, BLOCK + 8, 12), storage_of(3, 2, BLOCK + 8, 12)
    tokens, positions = new_token(3, 2, 12), [5, BLOCK, BLOCK + 7]
    append(*together, *tokens, position=torch.tensor(positions))
    for b, position in enumerate(positions):
        append(*(x[b : b + 1] for x in alone), *(x[b : b + 1] for x in tokens), position=position)
    for ours, theirs in zip(together, alone, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def test_without_a_sum() -> None:
    key, value, components, value_sum = storage_of(1, 2, 20, 12)
    before = value_sum.clone()
    append(key, value, components, None, *new_token(1, 2, 12), position=3)
    assert torch.equal(value_sum, before) and key[:, :, 3].isfinite().all()


def test_opcheck_and_compilation() -> None:
    for position in (None, torch.tensor([3, 4])):
        torch.library.opcheck(OP.default, (*storage_of(2, 2, 20, 12), *new_token(2, 2, 12), position, 1))

    def step(storage: tuple[Tensor, ...], tokens: tuple[Tensor, Tensor], position: int) -> Tensor:
        append(*storage, *tokens, position=position)
        return storage[0].nansum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    tokens = new_token(2, 2, 12)
    for position in (2, 3, 4):
        ours, theirs = storage_of(2, 2, 20, 12), storage_of(2, 2, 20, 12)
        torch.testing.assert_close(compiled(ours, tokens, position), step(theirs, tokens, position))
        torch.testing.assert_close(ours, theirs, equal_nan=True)


ZEROS = torch.zeros
MISTAKES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"key": None}, TypeError, "key must be a tensor, got None"),
    ({"key": ZEROS(2, 20, 12)}, ValueError, r"key must be \[B, Hkv, capacity, d\]"),
    ({"value": ZEROS(1, 2, 21, 12)}, ValueError, r"value must be \[1, 2, 20, 12\], got \[1, 2, 21, 12\]"),
    ({"key_components": ZEROS(1, 2, 0, 12, BLOCK)}, ValueError, "key_components must be"),
    ({"key_components": ZEROS(1, 2, 1, BLOCK, 12).mT}, ValueError, "key_components must have contiguous blocks"),
    ({"key": ZEROS(1, 2, 12, 20).mT}, ValueError, "key must be contiguous in its last axis"),
    ({"value_sum": ZEROS(1, 2, 11)}, ValueError, r"value_sum must be \[1, 2, 12\]"),
    ({"value_sum": ZEROS(1, 2, 12, dtype=torch.int32)}, TypeError, "value_sum must be float32"),
    ({"new_key": ZEROS(1, 2, 2, 12)}, ValueError, r"new_key must be \[1, 2, 1, 12\], got \[1, 2, 2, 12\]"),
    ({"new_value": ZEROS(1, 2, 1, 12).half()}, TypeError, "new_value must have key's dtype torch.float32"),
    ({"position": ZEROS(2, dtype=torch.int64)}, ValueError, r"position must be \[1\], got \[2\]"),
    ({"position": ZEROS(1)}, TypeError, "position must be int64"),
    ({"position": torch.tensor([20])}, ValueError, r"position must be in \[0, 20\), got \[20\]"),
    ({"position": torch.tensor([-1])}, ValueError, r"position must be in \[0, 20\), got \[-1\]"),
    ({"position": 20}, ValueError, r"position must be in \[0, 20\), got 20"),
    ({"position": -1}, ValueError, r"position must be in \[0, 20\), got -1"),
]


@pytest.mark.parametrize(("changes", "error", "message"), MISTAKES)
def test_mistakes_are_named_and_change_nothing(changes: dict, error: type[Exception], message: str) -> None:
    names = ("key", "value", "key_components", "value_sum", "new_key", "new_value")
    tensors = dict(zip(names, (*storage_of(1, 2, 20, 12), *new_token(1, 2, 12)), strict=True))
    before = {name: x.clone() for name, x in tensors.items()}
    arguments = {**tensors, "position": 3, **changes}
    append(**{name: x.clone() for name, x in tensors.items()}, position=3)  # a layout that passed is remembered
    with pytest.raises(error, match=message):
        append(**arguments)
    for name, x in tensors.items():
        torch.testing.assert_close(x, before[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", AppendArguments._fields[1:7])
def test_a_tensor_on_another_device_is_named(name: str) -> None:
    """Asked of the check itself: in a machine with no second device the dispatcher would answer for `meta`."""
    call = AppendArguments(*storage_of(1, 2, 20, 12), *new_token(1, 2, 12), torch.tensor([3]), 0)
    with pytest.raises(ValueError, match=f"{name} must be on key's device cpu, got meta"):
        check_append(call._replace(**{name: getattr(call, name).to("meta")}))
