"""The GPU implementation, in Triton, for NVIDIA and AMD: `launch` chooses sizes and runs the kernels beside it."""

from .launch import Plan, append, count, plan, run

__all__ = ["Plan", "append", "count", "plan", "run"]
