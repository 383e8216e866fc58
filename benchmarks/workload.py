"""One decode step over one layer's cache: its shape, its inputs, the call of the operator, and when that is right.

Nothing else but launch_cost.py and compiled_kernels.py knows which arguments the operator takes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import sparq_kernels
import torch
from sparq_kernels import Budget, Cached, Visible
from sparq_kernels.layout import prefer_huge_pages
from sparq_kernels.reference import decode_reference
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Shape:
    batch: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    cached: int
    r: int
    k: int

    def __str__(self) -> str:
        return f"B={self.batch} {self.num_heads}/{self.num_kv_heads} S={self.cached} r={self.r} k={self.k}"

    @property
    def dense_elements(self) -> int:
        return self.batch * self.num_kv_heads * 2 * self.cached * self.head_dim

    @property
    def sparse_elements(self) -> int:
        return self.batch * self.num_kv_heads * (self.cached * self.r + 2 * self.k * self.head_dim)


@dataclass(frozen=True)
class Case:
    """A shape of which `goal` says how much faster than dense it should be on a GPU, by graph replays, or None.

    `predicted`: microseconds of SparQ and of dense on an H100, reckoned from bytes and instructions, ± 30 %."""

    name: str
    shape: Shape
    goal: float | None = None
    predicted: tuple[float, float] | None = None

    def __str__(self) -> str:
        return f"{self.name} {self.shape}"

    def described(self, dtype_name: str) -> dict[str, object]:
        """Of a row."""
        return {"name": self.name, "shape": str(self.shape), **asdict(self.shape), "dtype": dtype_name}


@dataclass
class Inputs:
    """One layer's cache and query."""

    query: Tensor
    key: Tensor
    components: Tensor
    value: Tensor
    value_sum: Tensor
    length: Tensor

    @classmethod
    def of(cls, query: Tensor, key: Tensor, value: Tensor) -> Inputs:
        """All positions are visible."""
        components = sparq_kernels.allocate_components(*key.shape, key.dtype, key.device)
        sparq_kernels.write_components(components, key, 0)
        length = torch.full(key.shape[:1], key.shape[2], device=key.device)
        return cls(query, key, components, value, value.sum(2, dtype=torch.float32), length)

    def groups(self, shape: Shape, **knobs: Any) -> tuple[Cached, Visible, Budget]:
        """As the operator and its reference take them; knobs: of the budget, which a shape does not have."""
        cached = Cached(self.key, self.components, self.value, self.value_sum)
        return cached, Visible(self.length), Budget(shape.r, shape.k, **knobs)

    def row(self, index: int, dtype: torch.dtype) -> Inputs:
        """One row of the batch, widened but for its length."""
        rows = [x[index : index + 1] for x in vars(self).values()]
        return Inputs(*(x.to(dtype) if x.is_floating_point() else x for x in rows))

    def copy(self) -> Inputs:
        """On pages as large as the plugin's cache asks for, dense and sparse alike."""
        copies = [torch.empty_like(x) for x in vars(self).values()]
        for new, old in zip(copies, vars(self).values(), strict=True):
            prefer_huge_pages(new)
            new.copy_(old)
        return Inputs(*copies)


def make_inputs(shape: Shape, dtype: torch.dtype, device: str = "cpu") -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    rows = (shape.batch, shape.num_kv_heads, shape.cached, shape.head_dim)
    query = 2 * torch.randn(shape.batch, shape.num_heads, 1, shape.head_dim, generator=generator, device=device)
    key, value = (torch.randn(rows, generator=generator, device=device).to(dtype) for _ in range(2))
    return Inputs.of(query.to(dtype), key, value)


def decode(shape: Shape, x: Inputs, return_positions: bool = False, **knobs: Any) -> sparq_kernels.DecodeOutput:
    """knobs: of the budget, which a shape does not have."""
    return sparq_kernels.decode(x.query, *x.groups(shape, **knobs), return_positions=return_positions)


def sparq(shape: Shape, x: Inputs) -> Tensor:
    return decode(shape, x).output


def reference(shape: Shape, x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Output, alpha and positions of the plain PyTorch reference."""
    how = dict(scale=shape.head_dim**-0.5, softcap=None, mean_from=0.0, return_positions=True)
    output, alpha, positions, _ = decode_reference(x.query, *x.groups(shape), **how)
    return output, alpha, positions


def relative_error(output: Tensor, expected: Tensor) -> float:
    """Of the whole tensor, by its norm; NaN, which is never below a limit, when the output holds one."""
    return float((output.reshape(expected.shape).float() - expected.float()).norm() / expected.float().norm())


def rounding(dtype: torch.dtype) -> float:
    """The relative error below which two computations of the same output agree."""
    return 1e-3 if dtype == torch.float32 else 1e-2


def shared_positions(ours: Tensor, theirs: Tensor) -> Tensor:
    """How many of the last axis's values are in both, each counted once."""
    ours, theirs = ours.sort(-1).values, theirs.sort(-1).values
    place = torch.searchsorted(theirs, ours).clamp(max=theirs.shape[-1] - 1)
    both = theirs.gather(-1, place) == ours
    both[..., 1:] &= ours[..., 1:] != ours[..., :-1]
    return both.sum(-1)


def disagreement(shape: Shape, x: Inputs) -> str | None:
    """How the operator differs from the reference, or None: output and alpha must be equal up to the dtype's rounding,
    and so must nearly all positions: scores within rounding of the k-th may change places."""
    ours = decode(shape, x, return_positions=True)
    output, alpha, positions = reference(shape, x)
    # A kernel may take another path when nobody asks for positions, and that is the one measured.
    for what, mine in (("output", ours.output), ("output without positions", sparq(shape, x))):
        error = relative_error(mine, output)
        if not error < rounding(x.query.dtype):
            return f"{what} differs from the reference by {error:.1e}"
    alpha_error = float((ours.alpha - alpha).abs().max())
    if not alpha_error < 1e-4:
        return f"alpha differs from the reference by {alpha_error:.1e}"
    assert ours.positions is not None
    shared = float(shared_positions(ours.positions, positions).min()) / shape.k
    if not shared > 0.98:
        return f"a head shares only {shared:.1%} of the reference's positions"
    return None
