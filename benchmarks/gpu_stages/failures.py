"""Why something did not run, in one line."""

from __future__ import annotations

import traceback

import torch

OUT_OF_MEMORY, NO_TIME = "out of memory", "no time"

_printed: set[str] = set()


def reason(error: BaseException) -> str:
    """The error and, as a failed capture raises once more when it ends, the one that it began with.  The first of a
    kind is printed with where it came from: the lent device is soon gone."""
    chain = [error]
    while chain[-1].__context__ is not None:
        chain.append(chain[-1].__context__)
    if any(isinstance(one, torch.OutOfMemoryError) for one in chain):
        return OUT_OF_MEMORY
    ends = chain if len(chain) < 2 else [chain[0], chain[-1]]
    why = "; first: ".join(f"{type(one).__name__}: {told(str(one))}" for one in ends)
    if why not in _printed:
        _printed.add(why)
        traceback.print_exception(error)
    return why


def told(message: str) -> str:
    """One line, without the place in PyTorch's source."""
    lines = message.split("(Triggered internally")[0].strip().splitlines()
    return lines[0][:200] if lines else ""
