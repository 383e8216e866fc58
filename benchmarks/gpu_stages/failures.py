"""Why something did not run, in one line."""

from __future__ import annotations

import traceback

import torch

OUT_OF_MEMORY, NO_TIME = "out of memory", "no time"

_printed: set[str] = set()


def reason(error: BaseException) -> str:
    """The error and, as a failed capture raises once more when it ends, the one that it began with.  The first of a
    kind is printed with where it came from: the lent device is soon gone."""
    first = error
    while first.__context__ is not None:
        first = first.__context__
    if any(isinstance(one, torch.OutOfMemoryError) for one in (error, first)):
        return OUT_OF_MEMORY
    chain = [error] if first is error else [error, first]
    why = "; first: ".join(f"{type(one).__name__}: {told(str(one))}" for one in chain)
    if why not in _printed:
        _printed.add(why)
        traceback.print_exception(error)
    return why


def told(message: str) -> str:
    """One line, without the place in PyTorch's source."""
    lines = message.split("(Triggered internally")[0].strip().splitlines()
    return lines[0][:200] if lines else ""
