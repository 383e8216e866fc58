"""SparQ's knobs, by vLLM's own way: `--additional-config '{"sparq": {...}}'` with the fields of `SparqConfig`."""

from __future__ import annotations

from typing import Any

from sparq_kernels import Budget

from sparq.config import SparqConfig

# Below this many positions a token attends all of them, where `min_length` is not given. On the CPU that is where a
# sparse step begins to pay (docs/vllm.md); on a GPU it has not been measured.
MIN_LENGTH = {"cpu": 1024, "cuda": 4096}


def config_of(vllm_config: Any) -> SparqConfig:
    """The knobs of an engine.

    Raises:
        TypeError, ValueError: naming the knob, its value and what would be right.
    """
    additional = vllm_config.additional_config
    given = additional.get("sparq", {}) if isinstance(additional, dict) else {}
    try:
        return SparqConfig.from_dict(given)
    except (TypeError, ValueError) as error:
        raise type(error)(f'additional_config["sparq"]: {error}') from None


def budget_of(config: SparqConfig, head_dim: int, device: str) -> Budget:
    """What the operator is told. Each token decides for itself whether it is sparse, so that what it gives does not
    depend on the requests beside it."""
    least = MIN_LENGTH[device] if config.min_length is None else config.min_length
    return config.budget(config.components(head_dim))._replace(dense_below=least)
