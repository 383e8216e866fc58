"""SparQ attention as a PyTorch operator.  Tensors in, tensors out: nothing here knows a model."""

from .requirements import check

check("torch")

from .append import append  # noqa: E402
from .backends import backend  # noqa: E402
from .counting import count_valid  # noqa: E402
from .encoding import encode  # noqa: E402
from .groups import Budget, Cached, Visible  # noqa: E402
from .layout import BLOCK, GROUP, allocate_codes, allocate_components, read_components, write_components  # noqa: E402
from .operator import DecodeOutput, decode  # noqa: E402
from .slots import append_slots  # noqa: E402
from .value_sum import extend_sum  # noqa: E402

__all__ = [
    "BLOCK",
    "GROUP",
    "Budget",
    "Cached",
    "DecodeOutput",
    "Visible",
    "allocate_codes",
    "allocate_components",
    "append",
    "append_slots",
    "backend",
    "count_valid",
    "decode",
    "encode",
    "extend_sum",
    "read_components",
    "write_components",
]
