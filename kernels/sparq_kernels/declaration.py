"""Operators of PyTorch from one declaration each: a NamedTuple of the arguments says all that the schema says.

    class ScaleArguments(NamedTuple):
        x: Tensor
        weight: Tensor | None
        factor: float

    tensors_of, options_of = parts_of(ScaleArguments)  # of a call: (x, weight) and (factor,)
    _scale_op = define("scale", ScaleArguments, results=0, written=("x",), default=..., fake=...)

Implementations take the call as one value, an instance of that NamedTuple.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from typing import Any, get_type_hints

import torch
from torch import Tensor

NAMESPACE = "sparq_kernels"
SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    int: "SymInt",
    int | None: "SymInt?",
    float: "float",
    float | None: "float?",
    bool: "bool",
}

Part = Callable[[Any], tuple[Any, ...]]
Implementation = Callable[[Any], Any]  # from the call to the results
_flat: dict[tuple[str, str], Callable[..., Any]] = {}


def parts_of(arguments: type) -> tuple[Part, Part]:
    """What takes the tensors of a call, and what takes its options; of `_fields`, their names.  By slices: a call pays
    nothing for that.

    Raises TypeError where an option stands before a tensor.
    """
    are_tensors = [kind in (Tensor, Tensor | None) for kind in get_type_hints(arguments).values()]
    count = sum(are_tensors)
    if not all(are_tensors[:count]):
        raise TypeError(f"{arguments.__name__} must have its tensors before its options")
    return itemgetter(slice(0, count)), itemgetter(slice(count, None))


def required_tensors(arguments: type) -> tuple[str, ...]:
    """The tensors that may not be None; the dispatcher lets None pass for them."""
    return tuple(name for name, kind in get_type_hints(arguments).items() if kind is Tensor)


def schema_of(arguments: type, results: int, written: tuple[str, ...] = ()) -> str:
    """What `torch.library` asks for.  results: how many tensors come back.  written: the tensors changed in place."""
    described = []
    for name, kind in get_type_hints(arguments).items():
        text = SCHEMA_TYPES[kind]
        if name in written:
            text = text.replace("Tensor", f"Tensor({chr(ord('a') + written.index(name))}!)")
        described.append(f"{text} {name}")
    return f"({', '.join(described)}) -> ({', '.join(['Tensor'] * results)})"


def define(
    name: str,
    arguments: type,
    *,
    results: int,
    written: tuple[str, ...] = (),
    default: Implementation,
    fake: Implementation,
    **devices: Implementation,
) -> Any:
    """Define `sparq_kernels::name` and return its overload, which is called with the arguments in a row.

    default: the implementation for devices that have none of their own in `devices`, by PyTorch's names for them.
    fake: what to say of the results where there are only shapes.  results, written: as `schema_of` takes them.

    By hand: `custom_op` wraps every call in 20 us more of Python, and a model calls once per layer and token.
    """
    qualified = f"{NAMESPACE}::{name}"
    schema = schema_of(arguments, results, written)
    torch.library.define(qualified, schema, tags=(torch.Tag.pt2_compliant_tag,))
    for device, implementation in {"default": default, **devices}.items():
        _flat[name, device] = _taking_a_row(arguments, implementation)
        torch.library.impl(qualified, device, _flat[name, device])
    torch.library.register_fake(qualified, _taking_a_row(arguments, fake))
    # The overload itself: resolving it costs as much as the checks.
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def implementations(device: str) -> dict[str, Callable[..., Any]]:
    """What serves that device, by operator, as the dispatcher calls it."""
    return {name: implementation for (name, kind), implementation in _flat.items() if kind == device}


def _taking_a_row(arguments: type, implementation: Implementation) -> Callable[..., Any]:
    """As the dispatcher calls it: it has counted the arguments, so nothing need count them again."""
    new = tuple.__new__
    return lambda *given: implementation(new(arguments, given))
