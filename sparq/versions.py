"""Checks, when sparq is imported, the versions of the libraries that it is made for.

Triton's is checked by sparq_kernels where GPU kernels are asked for: on a CPU it does not matter which one is there.
"""

from sparq_kernels.requirements import check


def check_versions() -> None:
    """Raise an ImportError of one line if an installed library is outside the supported range (see `check`)."""
    check("torch", "transformers")
