"""Stage `device`: versions, the card, and how fast it copies."""

from __future__ import annotations

import importlib.util
import sys

import torch
from gpu_stages.clocks import clock_of
from gpu_stages.stage import Stage
from harness import machine, version

LIBRARIES = ("torch", "triton", "transformers", "accelerate", "numpy", "pytest", "pytest-xdist", "hypothesis", "rich")
OPPONENTS = ("flash_attn", "flash_attn_interface", "flashinfer")


def main(stage: Stage) -> None:
    versions = {name: version(name) for name in LIBRARIES}
    stage.save(machine=machine(), versions=versions)
    if not stage.is_dry and not torch.cuda.is_available():
        said = f"torch {torch.__version__} sees no CUDA device; --device cpu is a dry run"
        stage.save(no_device=True, wrong=[said])
        sys.exit(said)
    clock = clock_of(stage.device)
    facts = clock.properties()
    stage.content["machine"].update(facts)
    stage.save(opponents=[name for name in OPPONENTS if importlib.util.find_spec(name)])
    copy_gbs = clock.copy_bandwidth()
    found = ", ".join(f"{name} {versions[name]}" for name in ("torch", "triton", "transformers"))
    stage.save(copy_gbs=copy_gbs, said=f"{facts['device']}, {found}; copies at {copy_gbs:.0f} GB/s")
