"""The arguments that belong together: where they stand in a call, and what is none of them."""

from __future__ import annotations

from typing import Any

import pytest
import sparq_kernels
from sparq_kernels import Budget, Cached, Visible
from sparq_kernels.arguments import Arguments

from tests.kernels.cases import call_of, make_case


def test_the_groups_are_the_fields_of_a_call() -> None:
    """What is added to a group has one place in the call: where `decode` puts it."""
    options = ("scale", "softcap", "mean_from", "return_positions")
    assert Arguments._fields == ("query", *Cached._fields, *Visible._fields, *Budget._fields, *options)
    call = call_of(make_case(starts=[3], holes=0.1, r=4, k=20, local=3))
    assert (call.query, *call.cached, *call.visible, *call.budget) == call[: -len(options)]


@pytest.mark.parametrize("wrong", [(1, 2), (1, 2, 3), None, 4, "Cached"], ids=str)
def test_what_is_no_group_is_named(wrong: Any) -> None:
    call = call_of(make_case())
    groups = {"cached": call.cached, "visible": call.visible, "budget": call.budget}
    got = {None: "NoneType", 4: "int", "Cached": "str"}.get(wrong) or f"a tuple of {len(wrong)}"
    for name, group in groups.items():
        with pytest.raises(TypeError, match=rf"{name} must be a sparq_kernels\.{type(group).__name__}, got {got}"):
            sparq_kernels.decode(call.query, **{**groups, name: wrong})
    with pytest.raises(TypeError, match=r"visible must be a sparq_kernels\.Visible, got Budget"):
        sparq_kernels.decode(call.query, call.cached, call.budget, call.visible)
