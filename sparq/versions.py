"""The versions of other libraries that SparQ works with, checked once, when it is imported.

Triton's is checked by sparq_kernels where GPU kernels are asked for: on a CPU it does not matter which one is there.
"""

from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet

SUPPORTED = {"torch": ">=2.10", "transformers": ">=5.17,<6"}


def check_versions() -> None:
    """Raise an ImportError of one line if an installed library is outside the supported range."""
    wrong = []
    for name, supported in SUPPORTED.items():
        try:
            installed = version(name)
        except PackageNotFoundError:
            wrong.append(f"{name} {supported} is needed and not installed")
            continue
        if not SpecifierSet(supported).contains(installed, prereleases=True):
            wrong.append(f"{name} {installed} is installed, supported is {supported}")
    if wrong:
        raise ImportError("sparq: " + "; ".join(wrong))
