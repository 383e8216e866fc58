"""Every mistake in the arguments of a call is answered in words."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sparq_kernels import BLOCK
from sparq_kernels.arguments import check_arguments

from tests.kernels.cases import call_of, make_case

OP = torch.ops.sparq_kernels.decode


def tensors(**shapes: Any) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


MISTAKES: list[tuple[dict[str, Any], type[Exception], str]] = [
    (tensors(query=(1, 4, 16)), ValueError, r"query must be \[B, Hq, Q, d\], got \[1, 4, 16\]"),
    (tensors(query=(1, 4, 0, 16)), ValueError, "query must hold 1 to 16 new tokens per row, got 0"),
    (tensors(query=(1, 4, 17, 16)), ValueError, "query must hold 1 to 16 new tokens per row, got 17; prompts"),
    (tensors(query=(1, 5, 1, 16)), ValueError, r"query heads \(5\) must be a multiple of key heads \(2\)"),
    (tensors(query=(1, 0, 1, 16)), ValueError, r"query heads \(0\)"),
    (tensors(query=(1, 4, 1, 600)), ValueError, "head_dim of 1 to 512, got 600"),
    (tensors(query=(1, 4, 1, 0)), ValueError, "head_dim of 1 to 512, got 0"),
    (tensors(query=(0, 4, 1, 16), key=(0, 2, 300, 16)), ValueError, "key must hold at least one row"),
    (tensors(query=(2, 4, 1, 16)), ValueError, r"key must be \[2, Hkv, S, 16\] to match query"),
    (tensors(key=(1, 300, 16)), ValueError, r"key must be \[B, Hkv, S, d\], got \[1, 300, 16\]"),
    (tensors(key=(1, 2, 300, 8)), ValueError, r"key must be \[1, Hkv, S, 16\]"),
    (tensors(key=(1, 2, 0, 16)), ValueError, "at least one row and one position"),
    (tensors(key=(1, 0, 300, 16)), ValueError, r"multiple of key heads \(0\)"),
    (
        tensors(value=(1, 2, 299, 16)),
        ValueError,
        r"value must have key's shape \[1, 2, 300, 16\], got \[1, 2, 299, 16\]",
    ),
    (tensors(key_components=(1, 2, 0, 16, BLOCK)), ValueError, rf"must be \[1, 2, at least 1, 16, {BLOCK}\]"),
    (tensors(key_components=(1, 1, 2, 16, BLOCK)), ValueError, "key_components must be"),
    (tensors(key_components=(1, 2, 2, 15, BLOCK)), ValueError, "key_components must be"),
    (tensors(key_components=(1, 2, 2, 16, BLOCK // 2)), ValueError, "key_components must be"),
    (tensors(key_components=(2, 2, 16, BLOCK)), ValueError, "key_components must be"),
    (tensors(value_sum=(1, 2, 15)), ValueError, r"value_sum must be \[1, 2, 16\], got \[1, 2, 15\]"),
    ({"query": torch.zeros(1, 4, 1, 16, dtype=torch.int32)}, TypeError, "query must be float32, bfloat16, float16 or"),
    (
        {"key": torch.zeros(1, 2, 300, 16).half()},
        TypeError,
        "key must have query's dtype torch.float32, got torch.float16",
    ),
    ({"value": torch.zeros(1, 2, 300, 16).double()}, TypeError, "value must have query's dtype"),
    ({"key_components": torch.zeros(1, 2, 2, 16, BLOCK).half()}, TypeError, "key_components must have key's dtype"),
    ({"value_sum": torch.zeros(1, 2, 16).double()}, TypeError, "value_sum must be float32"),
    ({"key": torch.zeros(1, 2, 16, 300).transpose(2, 3)}, ValueError, "key must be contiguous in its last axis"),
    ({"value": torch.zeros(1, 2, 16, 300).transpose(2, 3)}, ValueError, "value must be contiguous in its last axis"),
    (
        {"key_components": torch.zeros(1, 2, 2, BLOCK, 16).mT},
        ValueError,
        "key_components must have contiguous blocks",
    ),
    ({"key_components": torch.zeros(1, 2, 16, 2, BLOCK).transpose(2, 3)}, ValueError, "must have contiguous blocks"),
    ({"length": torch.tensor([300, 300])}, ValueError, r"length must be \[1\], got \[2\]"),
    ({"length": torch.tensor(300)}, ValueError, r"length must be \[1\], got \[\]"),
    ({"length": torch.tensor([300], dtype=torch.int32)}, TypeError, "length must be int64, got torch.int32"),
    ({"length": torch.tensor([301])}, ValueError, r"length must be 0 to the 300 cached positions, got \[301\]"),
    ({"length": torch.tensor([-1])}, ValueError, "length must be 0 to the 300"),
    ({"start": torch.tensor([-1])}, ValueError, r"start must not be negative, got \[-1\]"),
    ({"start": torch.tensor([[0]])}, ValueError, r"start must be \[1\]"),
    ({"start": torch.tensor([0.0])}, TypeError, "start must be int64"),
    ({"mask": torch.ones(1, 299, dtype=torch.bool)}, ValueError, r"mask must be \[1, 300\], got \[1, 299\]"),
    ({"mask": torch.ones(1, 300)}, TypeError, "mask must be bool, got torch.float32"),
    ({"r": 0}, ValueError, r"r must be 1 to head_dim \(16\), got 0"),
    ({"r": 17}, ValueError, r"r must be 1 to head_dim \(16\), got 17"),
    ({"k": 0}, ValueError, "k must be at least 1, got 0"),
    ({"k_divisor": 0}, ValueError, "k_divisor must be at least 1 or None, got 0"),
    ({"local": -1}, ValueError, r"local must be 0 to k \(20\) or None, got -1"),
    ({"local": 21}, ValueError, r"local must be 0 to k \(20\) or None, got 21"),
    ({"scale": float("nan")}, ValueError, "scale must be finite or None, got nan"),
    ({"softcap": 0.0}, ValueError, "softcap must be a positive number or None, got 0.0"),
    ({"softcap": float("inf")}, ValueError, "softcap must be a positive number"),
    ({"mean_value": -0.5}, ValueError, "mean_value must be True, False or the least alpha .* got -0.5"),
    ({"mean_value": float("nan")}, ValueError, "mean_value must be .* got nan"),
]


@pytest.mark.parametrize(("changes", "error", "message"), MISTAKES)
def test_mistakes_are_named(changes: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        OP(*call_of(make_case(), **changes))


@pytest.mark.parametrize("name", ["key", "key_components", "value", "value_sum", "length", "start", "mask"])
def test_a_tensor_on_another_device_is_named(name: str) -> None:
    """Asked of the check itself: in a machine with no second device the dispatcher would answer for `meta`."""
    case = make_case(starts=[0], holes=0.1)
    setattr(case, name, getattr(case, name).to("meta"))
    with pytest.raises(ValueError, match=f"{name} must be on query's device cpu, got meta"):
        check_arguments(call_of(case))


def test_a_mistake_after_a_right_call_is_still_found() -> None:
    """A layout that has passed is remembered: nothing but exactly that layout may profit."""
    case = make_case()
    OP(*call_of(case))
    for changes, error, message in MISTAKES:
        with pytest.raises(error, match=message):
            OP(*call_of(case, **changes))
    OP(*call_of(case))


@pytest.mark.parametrize("name", ["query", "key", "key_components", "value", "value_sum", "length"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_none_for_a_tensor(name: str, dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=f"{name} must be a tensor, got None"):
        OP(*call_of(make_case(dtype=dtype), **{name: None}))


def test_options_of_the_wrong_kind() -> None:
    for changes in ({"r": 4.5}, {"k": "20"}, {"scale": "1"}):
        with pytest.raises((TypeError, RuntimeError)):
            OP(*call_of(make_case(), **changes))
