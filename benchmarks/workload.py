"""One decode step over one layer's cache: its shape, its inputs, the call of the operator, and when that is right.

Nothing else but launch_cost.py and compiled_kernels.py knows which arguments the operator takes.
"""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass
from typing import Any

import sparq_kernels
import torch
from sparq_kernels import GROUP, Budget, Cached, Visible
from sparq_kernels.layout import empty
from sparq_kernels.reference import decode_reference
from torch import Tensor

from sparq.index import KINDS

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
    index: str = "full"  # its kind, as `SparqConfig` has it

    def __str__(self) -> str:
        text = f"B={self.batch} {self.num_heads}/{self.num_kv_heads} S={self.cached} r={self.r} k={self.k}"
        return text if self.index == "full" else f"{text} {self.index}"

    @property
    def dense_elements(self) -> int:
        return self.batch * self.num_kv_heads * 2 * self.cached * self.head_dim

    def sparse_bytes(self, itemsize: int) -> int:
        """Of the index and of the rows attended; itemsize: bytes of an element of K."""
        tail = self.cached % GROUP
        index = KINDS[self.index].bytes_read(self.cached, tail, self.r, itemsize)
        return self.batch * self.num_kv_heads * (index + 2 * self.k * self.head_dim * itemsize)


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


budget = functools.cache(Budget)  # made once, as in a model, whose layers share one


@dataclass
class Inputs:
    """One layer's cache and query."""

    query: Tensor
    key: Tensor
    components: Tensor
    value: Tensor
    value_sum: Tensor
    ranges: Tensor | None  # of the components, where they are codes
    length: Tensor

    @classmethod
    def of(cls, query: Tensor, key: Tensor, value: Tensor, index: str = "full") -> Inputs:
        """All positions are visible."""
        kept = KINDS[index]()
        components = kept.allocate(key)
        kept.write(key, 0, key.shape[2])
        length = torch.full(key.shape[:1], key.shape[2], device=key.device)
        return cls(query, key, components, value, value.sum(2, dtype=torch.float32), kept.ranges, length)

    def groups(self, shape: Shape, **knobs: Any) -> tuple[Cached, Visible, Budget]:
        """As the operator and its reference take them; knobs: of the budget, which a shape does not have."""
        cached = Cached(self.key, self.components, self.value, self.value_sum, self.ranges)
        return cached, Visible(self.length), budget(shape.r, shape.k, **knobs)

    def row(self, index: int, dtype: torch.dtype) -> Inputs:
        """One row of the batch, widened but for its length."""
        rows = [None if x is None else x[index : index + 1] for x in vars(self).values()]
        return Inputs(*(x if x is None or not x.is_floating_point() else x.to(dtype) for x in rows))  # type: ignore

    def copy(self) -> Inputs:
        """On pages as large as the plugin's cache asks for, dense and sparse alike."""
        copies = [None if x is None else empty(*x.shape, dtype=x.dtype) for x in vars(self).values()]
        for new, old in zip(copies, vars(self).values(), strict=True):
            if new is not None:
                new.copy_(old)
        return Inputs(*copies)  # type: ignore[arg-type]


def make_inputs(shape: Shape, dtype: torch.dtype, device: str = "cpu") -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    rows = (shape.batch, shape.num_kv_heads, shape.cached, shape.head_dim)
    query = 2 * torch.randn(shape.batch, shape.num_heads, 1, shape.head_dim, generator=generator, device=device)
    key, value = (torch.randn(rows, generator=generator, device=device).to(dtype) for _ in range(2))
    return Inputs.of(query.to(dtype), key, value, shape.index)


def decode(shape: Shape, x: Inputs, return_positions: bool = False, **knobs: Any) -> sparq_kernels.DecodeOutput:
    """knobs: of the budget, which a shape does not have."""
    return sparq_kernels.decode(x.query, *x.groups(shape, **knobs), return_positions=return_positions)


def sparq(shape: Shape, x: Inputs) -> Tensor:
    return decode(shape, x).output


def reference(shape: Shape, x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Output, alpha and positions of the plain PyTorch reference."""
    how = dict(scale=shape.head_dim**-0.5, softcap=None, mean_from=0.0, return_positions=True)
    return decode_reference(x.query, *x.groups(shape), **how)[:3]


def attended(shape: Shape, x: Inputs, found: sparq_kernels.DecodeOutput) -> Tensor:
    """The output that belongs to the positions and the alpha of a result."""
    assert found.positions is not None
    chosen = found.positions[:, :, 0]
    rows = chosen.clamp(min=0)[..., None].expand(-1, -1, -1, shape.head_dim)
    keys, values = (held.gather(2, rows).float() for held in (x.key, x.value))
    query = x.query.float().reshape(shape.batch, shape.num_kv_heads, -1, shape.head_dim)
    logits = query @ keys.transpose(-1, -2) * shape.head_dim**-0.5
    y = logits.masked_fill(chosen[:, :, None] < 0, -torch.inf).softmax(-1) @ values
    alpha = found.alpha.reshape(*query.shape[:3], 1)
    mean = x.value_sum[:, :, None] / shape.cached
    return (alpha * y + (1 - alpha) * mean).reshape(x.query.shape)


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
    and so must nearly all positions: scores within rounding of the k-th may change places.

    The scores of codes are themselves rounded, so that more of them do: there the output must be right for the
    positions that were chosen, of which nine in ten must be the reference's.
    """
    ours = decode(shape, x, return_positions=True)
    output, alpha, positions = reference(shape, x)
    coded = x.ranges is not None
    if coded:
        output = attended(shape, x, ours)
    # A kernel may take another path when nobody asks for positions, and that is the one measured.
    for what, mine in (("output", ours.output), ("output without positions", sparq(shape, x))):
        error = relative_error(mine, output)
        if not error < rounding(x.query.dtype):
            return f"{what} differs from the reference by {error:.1e}"
    alpha_error = float((ours.alpha - alpha).abs().max())
    if not alpha_error < (0.05 if coded else 1e-4):
        return f"alpha differs from the reference by {alpha_error:.1e}"
    assert ours.positions is not None
    shared = float(shared_positions(ours.positions, positions).min()) / shape.k
    if not shared > (0.9 if coded else 0.98):
        return f"a head shares only {shared:.1%} of the reference's positions"
    return None
