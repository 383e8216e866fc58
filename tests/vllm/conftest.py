"""Tests against a real vLLM (`make test-vllm`): in its virtual environment alone, and in this process, so that what was
counted can be read."""

from __future__ import annotations

import importlib.util
import os

HAS_VLLM = importlib.util.find_spec("vllm") is not None
# vLLM wants versions of its own, and has no official build for CPUs: `make test` goes without it.
collect_ignore_glob = [] if HAS_VLLM else ["test_*.py"]

if HAS_VLLM:  # which reads them when it is imported
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_LOGGING_LEVEL=os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
        VLLM_NO_USAGE_STATS="1",
        VLLM_CPU_OMP_THREADS_BIND="nobind",
        HF_HUB_OFFLINE="1",
        TQDM_DISABLE="1",
    )
