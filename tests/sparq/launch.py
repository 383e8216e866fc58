"""Programs that run in several processes, started as a user starts them, with an end to waiting."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SECONDS = 240  # most of what such a run takes is importing torch and transformers, on as many processes as there are


def launch(*command: str) -> None:
    """`python -m command...` on the CPU; a failure shows the end of what the processes said, a hang is one."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in [str(Path.cwd()), *sys.path] if path),
        "CUDA_VISIBLE_DEVICES": "",
        "HIP_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        said, _ = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its workers, which are in groups of their own
        try:
            said, _ = process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            said, _ = process.communicate()
        raise AssertionError(f"{' '.join(command)} was not done after {SECONDS} s:\n{said[-4000:]}") from None
    assert process.returncode == 0, f"{' '.join(command)}:\n{said[-4000:]}"
