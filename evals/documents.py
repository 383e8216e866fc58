"""Real texts of several kinds that lie on every machine with Python and SparQ's dependencies; none is committed."""

from __future__ import annotations

import importlib.metadata
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics

STANDARD = Path(sysconfig.get_paths()["stdlib"])
PACKAGES = Path(sysconfig.get_paths()["purelib"])


def documents() -> dict[str, str]:
    """By kind; each has some 30,000 characters or more."""
    return {
        "language reference": topics["compound"],
        "data model": topics["specialnames"],
        "debugger, strings": topics["debugger"] + "\n\n" + topics["string-methods"],
        "Python": (STANDARD / "argparse.py").read_text(encoding="utf-8"),
        "C++ header": (PACKAGES / "torch/include/ATen/core/TensorBase.h").read_text(encoding="utf-8"),
        "API reference": (PACKAGES / "torch/_torch_docs.py").read_text(encoding="utf-8"),
        "README": _metadata("lm_eval"),
        "licences": _licence("numpy"),
    }


def hide(plain: str, facts: list[str], depths: Sequence[int], reach: int) -> str:
    """The text with each fact at its depth, in percent: after the end of a line where there is one within `reach`."""
    places = []
    for depth in depths:
        place = len(plain) * depth // 100
        line_end = plain.find("\n", place, place + reach)
        places.append(place if line_end < 0 else line_end + 1)
    parts = [plain[a:b] + fact for a, b, fact in zip([0, *places], places, facts, strict=False)]
    return "".join(parts) + plain[places[-1] :]


def _metadata(package: str) -> str:
    text = importlib.metadata.distribution(package).read_text("METADATA")
    assert text is not None
    return text


def _licence(package: str) -> str:
    files = importlib.metadata.files(package) or []
    longest = max((file for file in files if "LICENSE" in file.name), key=lambda file: file.locate().stat().st_size)
    return longest.read_text(encoding="utf-8")
