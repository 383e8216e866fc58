"""The GPU implementation, in Triton, for NVIDIA and AMD: `launch` chooses sizes and runs the kernels beside it."""

from .launch import Plan, append, count, extend_sum, plan, run

__all__ = ["Plan", "append", "count", "extend_sum", "plan", "run"]
