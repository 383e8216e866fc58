"""What every benchmark reports beside its numbers: the machine, and how fast it reads memory at best."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path

import torch


def machine() -> dict[str, object]:
    """Processor, memory, threads and versions, as plain values for a JSON file."""
    return {
        "processor": _first_value("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory": _first_value("/proc/meminfo", "MemTotal"),
        "vector instructions": torch.backends.cpu.get_cpu_capability(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d %H:%M"),
    }


def streaming_read(megabytes: int = 512, repeats: int = 7) -> float:
    """GB/s at which PyTorch sums a large contiguous tensor with all its threads: the best of several passes."""
    buffer = torch.ones(megabytes << 18)  # float32
    buffer.sum()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        buffer.sum()
        seconds.append(time.perf_counter() - started)
    return buffer.numel() * buffer.element_size() / min(seconds) / 1e9


def _first_value(path: str, name: str) -> str | None:
    """The value of the first `name : value` line of a file under /proc, or None."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), None)
