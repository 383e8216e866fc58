"""What the measures have in common when they are summed up: a mean with its error, the bytes read, and a table."""

from __future__ import annotations

import math
from typing import Any

from sparq_kernels import GROUP


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """And the standard error of the mean, nan for a single value."""
    mean = sum(values) / len(values) if values else math.nan
    if len(values) < 2:
        return mean, math.nan
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def less_at_16_bits(
    bytes_read: int,
    bytes_dense: int,
    positions_cached: int,
    positions_read: int,
    sparse_steps: int,
    dense_steps: int,
    config: Any,
    model_config: Any,
) -> float:
    """Times fewer bytes than dense attention in a cache of 16 bits, of what was counted in one of 32.

    Everything is half as large there but the codes of a four-bit index. How many positions those are of follows from
    the bytes; what is written of the new tokens is left out, less than 1 % of them.
    sparse_steps, dense_steps: of the layers.  config: the `SparqConfig`, or another method's, which counts in elements.
    """
    if getattr(config, "index", "full") != "int4" or not hasattr(config, "base_k"):
        return bytes_dense / bytes_read
    heads = model_config.num_attention_heads
    kv_heads = getattr(model_config, "num_key_value_heads", None) or heads
    head_dim = getattr(model_config, "head_dim", None) or model_config.hidden_size // heads
    r, coded = config.components(head_dim), 1 / 2 + 2 * 4 / GROUP  # bytes of a coded component
    sparse = (bytes_read - bytes_dense * dense_steps / (sparse_steps + dense_steps)) / kv_heads
    tail = (sparse - positions_read * 2 * head_dim * 4 - positions_cached * r * coded) / (r * (4 - coded))
    codes = kv_heads * (positions_cached - tail) * r / 2
    return bytes_dense / (bytes_read + codes)  # half of either, but for the codes


def markdown(rows: list[list[str]]) -> str:
    """A table; the first row is its head."""
    head, *body = rows
    align = ["---", *("---:" for _ in head[1:])]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, align, *body])
