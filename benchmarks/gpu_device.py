"""Stage 0 of gpu.py: versions, the card, and how fast it copies."""

from __future__ import annotations

from stage import Stage

# isort: split
import importlib.metadata
import importlib.util
import sys

import attention_gpu
import torch
from common import machine

LIBRARIES = ("torch", "triton", "transformers", "accelerate", "numpy", "pytest", "pytest-xdist", "hypothesis", "rich")
OPPONENTS = ("flash_attn", "flash_attn_interface", "flashinfer")


def main() -> None:
    stage = Stage.from_arguments(__doc__)
    stage.save(machine=machine(), versions={name: version(name) for name in LIBRARIES})
    if not stage.is_dry and not torch.cuda.is_available():
        said = f"torch {torch.__version__} sees no CUDA device; --device cpu is a dry run"
        stage.save(no_device=True, wrong=[said])
        sys.exit(said)
    clock = attention_gpu.clock(stage.device)
    facts = clock.properties()
    stage.content["machine"].update(facts)
    stage.save(opponents=[name for name in OPPONENTS if importlib.util.find_spec(name)])
    copy_gbs = clock.copy_bandwidth()
    found = ", ".join(f"{name} {stage.content['versions'][name]}" for name in ("torch", "triton", "transformers"))
    stage.save(copy_gbs=copy_gbs, said=f"{facts['device']}, {found}; copies at {copy_gbs:.0f} GB/s")


def version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
