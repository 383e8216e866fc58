"""What PyTorch is told of an operator: made of a NamedTuple's annotations."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from sparq_kernels import declaration

SCHEMAS = {
    "decode": "(Tensor query, Tensor key, Tensor key_components, Tensor value, Tensor value_sum, Tensor? key_ranges, "
    "Tensor? block_table, Tensor length, Tensor? start, Tensor? mask, Tensor? counts, SymInt r, SymInt k, "
    "SymInt? k_divisor, SymInt? local, float? mass, SymInt k_min, SymInt dense_below, float? scale, float? softcap, "
    "float mean_from, bool return_positions) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "append": "(Tensor(a!) key, Tensor(b!) value, Tensor(c!) key_components, Tensor(d!)? value_sum, "
    "Tensor(e!)? key_ranges, Tensor new_key, Tensor new_value, Tensor? position, SymInt offset) -> ()",
    "append_slots": "(Tensor(a!) key, Tensor(b!) value, Tensor(c!) key_components, Tensor(d!) value_sum, "
    "Tensor(e!)? key_ranges, Tensor new_key, Tensor new_value, Tensor slots) -> ()",
    "count_valid": "(Tensor mask, Tensor length, Tensor? start, SymInt queries, SymInt k, SymInt? k_divisor, "
    "SymInt? local) -> Tensor",
    "encode": "(Tensor key, Tensor(a!) key_components, Tensor(b!) key_ranges, SymInt begin, SymInt end) -> ()",
    "extend_sum": "(Tensor(a!) value_sum, Tensor(b!) summed, Tensor value, Tensor valid, Tensor length) -> ()",
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_schema(name: str) -> None:
    """Exported graphs hold it: what a NamedTuple's annotations make of it must not change unnoticed."""
    operator = getattr(torch.ops.sparq_kernels, name).default
    assert str(operator._schema) == f"sparq_kernels::{name}{SCHEMAS[name]}"
    assert operator.tags == [torch.Tag.pt2_compliant_tag]


class Scale(NamedTuple):
    x: torch.Tensor
    weight: torch.Tensor | None
    times: int | None
    factor: float


class OptionFirst(NamedTuple):
    factor: float
    x: torch.Tensor


def test_an_operator_from_a_named_tuple() -> None:
    assert declaration.schema_of(Scale, 0, ("weight", "x")) == (
        "(Tensor(b!) x, Tensor(a!)? weight, SymInt? times, float factor) -> ()"
    )
    tensors_of, options_of = declaration.parts_of(Scale)
    call = Scale(torch.ones(1), None, 3, 2.0)
    assert tensors_of(call) == (call.x, None) and options_of(call) == (3, 2.0)
    assert tensors_of(Scale._fields) == ("x", "weight")
    assert declaration.required_tensors(Scale) == ("x",)
    with pytest.raises(TypeError, match="OptionFirst must have its tensors before its options"):
        declaration.parts_of(OptionFirst)
