"""What every benchmark reports beside its numbers: the machine, the versions, and how fast it reads memory at best."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
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
        "transformers": _version("transformers"),
        "sparq commit": _commit(),
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


def available_memory() -> int | None:
    """Bytes that can be taken without swapping, or None where the system does not say."""
    value = _first_value("/proc/meminfo", "MemAvailable")
    return None if value is None else int(value.split()[0]) * 1024


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Of the checkout that this file belongs to, `-dirty` when it has changes."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _first_value(path: str, name: str) -> str | None:
    """The value of the first `name : value` line of a file under /proc, or None."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), None)
