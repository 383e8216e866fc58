"""Triton decides when it is imported whether kernels are interpreted, and then compiles none: two runs of pytest.

python -m pytest
TRITON_INTERPRET=1 python -m pytest tests/kernels/test_gpu_interpreted.py     # `make test` does both
"""

from __future__ import annotations

import os
from pathlib import Path

if os.environ.get("TRITON_INTERPRET") == "1":
    collect_ignore = [path.name for path in Path(__file__).parent.glob("test_*.py")]
    collect_ignore.remove("test_gpu_interpreted.py")
else:
    collect_ignore = ["test_gpu_interpreted.py"]
