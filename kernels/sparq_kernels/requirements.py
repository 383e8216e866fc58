"""The versions of other libraries that SparQ works with: as pyproject.toml has them, and nowhere else.

They are read from the installed package's metadata. A bare tree of files has none, and takes any version.
"""

from __future__ import annotations

import os
import warnings
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

DISTRIBUTION = "sparq-attention"


def supported(name: str) -> SpecifierSet:
    """The versions of `name` that pyproject.toml asks for, as a dependency or in an extra."""
    try:
        required = [Requirement(line) for line in requires(DISTRIBUTION) or ()]
    except PackageNotFoundError:
        return SpecifierSet()
    return next((each.specifier for each in required if each.name == name), SpecifierSet())


def check(*names: str) -> None:
    """Look at what is installed of these libraries.

    Raises:
        ImportError: one is missing, too old, or newer than any that was tried, in one line that says what to do. With
            SPARQ_ANY_VERSION=1 in the environment it is a warning.
    """
    wrong = []
    for name in names:
        wanted = supported(name)
        try:
            installed = version(name)
        except PackageNotFoundError:
            wrong.append(f"{name} {wanted} is needed and not installed")
            continue
        if wanted.contains(installed, prereleases=True):
            continue
        line = f"{name} {installed} is installed, tried is {wanted}: pip install '{name}{wanted}'"
        if any(bound.operator == "<" and not bound.contains(installed, prereleases=True) for bound in wanted):
            line += ", or a newer sparq-attention"
        wrong.append(f"{line}; SPARQ_ANY_VERSION=1 runs it untried")
    if not wrong:
        return
    message = f"sparq: {'; '.join(wrong)}"
    if os.environ.get("SPARQ_ANY_VERSION") != "1":
        raise ImportError(message)
    warnings.warn(message, stacklevel=2)
