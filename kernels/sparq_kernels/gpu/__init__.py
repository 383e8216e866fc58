"""The GPU implementation, in Triton, for NVIDIA and AMD: `launch` chooses among the variants of a step, `fused` and
`split`, and runs their kernels."""

from .launch import Plan, append, append_slots, count, encode, extend_sum, plan, run

__all__ = ["Plan", "append", "append_slots", "count", "encode", "extend_sum", "plan", "run"]
