"""Random calls of the operators, right and wrong, and what must hold of each.

A call is made from a recipe of plain values, so that one that ends the process can be named and made again. A recipe
first makes a right call, whose result must be right. Then some of its arguments are changed in ways that callers get
wrong. Whatever comes of that is a right result or an exception that names a mistake, and leaves all else as it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import sparq_kernels
import torch
from hypothesis import strategies as st
from sparq_kernels import BLOCK, GROUP
from sparq_kernels.append import WRITTEN, AppendArguments
from sparq_kernels.append import tensors_of as appended_tensors_of
from sparq_kernels.arguments import MAX_QUERY_LENGTH, Arguments, tensors_of
from sparq_kernels.layout import num_blocks
from sparq_kernels.operator import DecodeOutput
from sparq_kernels.reference import in_a_row
from sparq_kernels.slots import WRITTEN as SLOTS_WRITTEN
from sparq_kernels.slots import SlotArguments, append_slots_default
from sparq_kernels.slots import tensors_of as slots_tensors_of
from torch import Tensor

from tests.kernels.cases import (
    TOLERANCE,
    append_call,
    call_of,
    decode_call,
    make_case,
    new_token,
    reference_call,
    small_integers,
    storage_of,
)
from tests.kernels.pages import COMBINATIONS, empty_pages, paged, slot_call, tokens

REFUSALS = (ValueError, TypeError, RuntimeError, MemoryError, OverflowError)
QUERIES = range(1, MAX_QUERY_LENGTH + 1)  # new tokens per row that the operator serves
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in TOLERANCE}
OTHER_DTYPES = (*DTYPES, "int64", "int32", "uint8", "bool", "complex64", "float8_e4m3fn")
POISON = (math.nan, math.inf, -math.inf, 3e38)
DRAWS = {"normal": torch.randn, "integers": small_integers}

# --- What callers get wrong -------------------------------------------------------------------------------------------


def _axis(x: Tensor, n: int) -> int:
    return n % max(x.dim(), 1)


def _resized(x: Tensor, n: int, size: int) -> Tensor:
    shape = list(x.shape)
    shape[_axis(x, n)] = size
    new = torch.zeros(shape, dtype=x.dtype)
    common = tuple(slice(min(a, b)) for a, b in zip(shape, x.shape, strict=True))
    new[common] = x[common]
    return new


def _misaligned(x: Tensor, n: int) -> Tensor:
    """The same values, `1 + n % 7` bytes behind an address that is right for the dtype."""
    if x.dtype not in (torch.float32, torch.float64, torch.float16, torch.int64):
        return x
    raw = np.zeros(x.numel() * x.element_size() + 8, dtype=np.uint8)
    begin = 1 + n % 7
    moved = raw[begin : begin + x.numel() * x.element_size()].view(x.numpy().dtype).reshape(x.shape)
    moved[...] = x.numpy()
    return torch.from_numpy(moved)


def _overlapping(x: Tensor, n: int) -> Tensor:
    """Neighbours along an axis share memory."""
    strides = list(x.stride())
    strides[_axis(x, n)] //= 2
    return x.as_strided(x.shape, strides)


def _freed(x: Tensor, n: int) -> Tensor:
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


def _in_inference_mode(x: Tensor, n: int) -> Tensor:
    with torch.inference_mode():
        return x.clone()


# name: (tensor, n) → what is handed over in its place. The first ones keep shape, dtype and values.
TENSOR_CHANGES: dict[str, Callable[[Tensor, int], Any]] = {
    "spread": lambda x, n: x.new_zeros(*x.shape, 3)[..., 1].copy_(x),
    "transposed": lambda x, n: x.transpose(-1, n % x.dim()).contiguous().transpose(-1, n % x.dim()),
    "moved": lambda x, n: torch.cat([x.new_zeros(1 + n), x.flatten()])[1 + n :].view(x.shape),
    "misaligned": _misaligned,
    "negated": lambda x, n: torch._neg_view(x.neg()) if x.is_floating_point() else x,
    "with a gradient": lambda x, n: x.clone().requires_grad_() if x.is_floating_point() else x,
    "of inference mode": _in_inference_mode,
    "flipped": lambda x, n: x.flip(_axis(x, n)),
    "repeated": lambda x, n: x.narrow(_axis(x, n), 0, 1).expand_as(x),  # a stride of 0
    "overlapping": _overlapping,
    "zeros without memory": lambda x, n: torch._efficientzerotensor(x.shape, dtype=x.dtype),
    "extreme": lambda x, n: (
        torch.full_like(x, (-1, 2**31, -(2**63), 2**63 - 1, 1 << 40)[n % 5]) if x.dtype == torch.int64 else x
    ),
    "none": lambda x, n: None,
    "one axis more": lambda x, n: x.unsqueeze(n % (x.dim() + 1)),
    "one axis less": lambda x, n: x.select(_axis(x, n), 0),
    "flat": lambda x, n: x.flatten(),
    "scalar": lambda x, n: x.flatten()[0],
    "one less": lambda x, n: x.narrow(_axis(x, n), 0, x.shape[_axis(x, n)] - 1),
    "one more": lambda x, n: _resized(x, n, x.shape[_axis(x, n)] + 1),
    "empty": lambda x, n: _resized(x, n, 0),
    "one only": lambda x, n: x.narrow(_axis(x, n), 0, 1),
    "doubled": lambda x, n: torch.cat([x, x], _axis(x, n)),
    "huge": lambda x, n: x.narrow(_axis(x, n), 0, 1).expand(
        *(1 << 33 if i == _axis(x, n) else size for i, size in enumerate(x.shape))
    ),
    "other dtype": lambda x, n: x.to(getattr(torch, OTHER_DTYPES[n % len(OTHER_DTYPES)])),
    "meta": lambda x, n: x.to("meta"),
    "sparse": lambda x, n: x.to_sparse(),
    "mkldnn": lambda x, n: x.to_mkldnn() if x.dtype == torch.float32 else x,
    "freed": _freed,
    "something else": lambda x, n: (3, 2.5, "x", [1.0], x.shape, x.dtype, object())[n % 7],
}
NUMBERS = (-(2**63), -1, 0, 1, 2, 7, 2047, 2**31, 2**32 + 1, 2**63 - 1, 2**63, 2**200, -(2**200))
NUMBERS += (1.5, math.nan, math.inf, -math.inf, 1e308, 1e-320, -0.0, None, True, "4", (3,))


def is_freed(x: Tensor) -> bool:
    try:
        return x.device.type == "cpu" and x.untyped_storage().nbytes() == 0
    except NotImplementedError:  # sparse
        return False


@dataclass(frozen=True)
class Change:
    """Of one argument: a tensor by a name of `TENSOR_CHANGES` and its number, any other by its index in `NUMBERS`."""

    argument: str
    kind: str
    n: int

    def apply(self, value: Any) -> Any:
        if self.kind == "number":
            return NUMBERS[self.n % len(NUMBERS)]
        return TENSOR_CHANGES[self.kind](value, self.n) if isinstance(value, Tensor) and value.dim() else value


def changed(call: Any, changes: Sequence[Change]) -> Any:
    """A call [named tuple] with these changes; one that cannot be made any more (of an emptied tensor) is left out."""
    for change in changes:
        old = getattr(call, change.argument)
        if isinstance(old, Tensor) and old.numel() and is_freed(old):
            continue  # PyTorch itself cannot touch it without dying
        try:
            new = change.apply(old)
        except (RuntimeError, IndexError, TypeError, ValueError, MemoryError):
            continue  # what cannot be made cannot be handed over
        call = call._replace(**{change.argument: new})
    return call


def changes_of(
    arguments: Sequence[str], tensors: Sequence[str], kinds: Sequence[str] = (*TENSOR_CHANGES,)
) -> st.SearchStrategy[tuple[Change, ...]]:
    def change(name: str) -> st.SearchStrategy[Change]:
        kind = st.sampled_from([*kinds, "number"]) if name in tensors else st.just("number")
        return st.builds(Change, st.just(name), kind, st.integers(0, 29))

    return st.lists(st.sampled_from(arguments).flatmap(change), max_size=3).map(tuple)


# --- Decode -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Decode:
    """One right call, the changes made of it, and where poison is put."""

    batch: int
    num_kv_heads: int
    group: int
    cached: int
    head_dim: int
    dtype: str
    lengths: tuple[int, ...] | None
    starts: tuple[int, ...] | None
    holes: float
    options: tuple[tuple[str, Any], ...]
    draw: str
    index: str
    seed: int
    threads: int
    public: bool  # by `sparq_kernels.decode`, else by `torch.ops`
    changes: tuple[Change, ...]
    queries: int  # new tokens per row
    giant: int | None  # cached positions that share one piece of memory
    poison: tuple[tuple[str, int, int, float], ...]  # (tensor, row, KV head, value)
    page: int | None = None  # positions of a page, where the cache is in pages

    def check(self) -> None:
        torch.set_num_threads(self.threads)
        case = make_case(
            self.batch,
            self.num_kv_heads * self.group,
            self.num_kv_heads,
            self.cached,
            self.head_dim,
            DTYPES[self.dtype],
            query_length=self.queries if self.queries in QUERIES else 1,
            lengths=None if self.lengths is None else list(self.lengths),
            starts=None if self.starts is None else list(self.starts),
            holes=self.holes,
            seed=self.seed,
            draw=DRAWS[self.draw],
            index=self.index,
        )
        call = call_of(case, **dict(self.options))
        if call.mask is not None and self.seed % 2:
            call = with_counts(call)
        if self.page is not None:
            call = paged(call, self.page, self.index, self.seed)
        clean = run_decode(call, self.public)
        check_result(call, clean)

        wrong = changed(call, self.changes)
        shaped = isinstance(wrong.query, Tensor) and wrong.query.dim() == 4 and wrong.query.layout == torch.strided
        if self.queries not in QUERIES and shaped and not is_freed(wrong.query):
            wrong = wrong._replace(query=wrong.query[:, :, :1].expand(-1, -1, self.queries, -1))
        if self.giant is not None:
            wrong = giant(wrong, self.giant)
        try:
            result = run_decode(wrong, self.public)
        except REFUSALS:
            pass
        else:
            check_result(wrong, result)
        if self.poison:
            self.check_poison(call, clean)
        again = run_decode(call, self.public)  # nothing that it reads was written, and nothing remembered is wrong
        for name in clean._fields:
            assert same_bits(getattr(again, name), getattr(clean, name)), f"{name} differs when called again"

    def check_poison(self, call: Arguments, clean: DecodeOutput) -> None:
        """What is not a number stays in its head."""
        ill = torch.zeros(self.batch, self.num_kv_heads, dtype=torch.bool)
        tensors = {name: getattr(call, name).clone() for name in {name for name, *_ in self.poison}}
        for name, row, head, value in self.poison:
            b, h = row % self.batch, head % self.num_kv_heads
            ill[b, h] = True
            heads = slice(h * self.group, (h + 1) * self.group) if name == "query" else h
            # one element of every row of it, or all
            target = tensors[name][b, heads]
            largest = torch.finfo(target.dtype).max
            (target if head % 2 else target[..., :1]).fill_(min(value, largest) if math.isfinite(value) else value)
        poisoned = call._replace(**tensors)
        result = run_decode(poisoned, self.public)
        for name in clean._fields:
            ours, theirs = getattr(result, name), getattr(clean, name)
            if theirs is None:
                continue
            assert ours.shape == theirs.shape
            well = ~(ill if ours.shape[1] == self.num_kv_heads else ill.repeat_interleave(self.group, 1))
            assert same_bits(ours[well], theirs[well]), f"{name} of a head without poison has changed"
        for b, h in ill.nonzero().tolist():
            check_positions(call, result, b, h)


def with_counts(call: Arguments) -> Arguments:
    """The same, the mask counted beforehand."""
    assert call.mask is not None
    return call._replace(counts=sparq_kernels.count_valid(call.visible, call.budget, queries=call.query.shape[2]))


def run_decode(call: Arguments, public: bool) -> DecodeOutput:
    if public:
        return decode_call(call)
    return DecodeOutput(*torch.ops.sparq_kernels.decode(*call))


def same_bits(ours: Tensor | None, theirs: Tensor | None) -> bool:
    if ours is None or theirs is None:
        return ours is theirs
    return ours.shape == theirs.shape and ours.dtype == theirs.dtype and torch.equal(_bytes(ours), _bytes(theirs))


def _bytes(x: Tensor) -> Tensor:
    return torch.empty(x.numel(), dtype=x.dtype).copy_(x.detach().flatten()).view(torch.uint8)


def valid_of(call: Arguments) -> Tensor:
    s = torch.arange(call.capacity)
    valid = s < call.length[:, None]
    if call.start is not None:
        valid = valid & (s >= call.start[:, None])
    return valid if call.mask is None else valid & call.mask


def check_positions(call: Arguments, result: DecodeOutput, b: int, h: int) -> None:
    if not call.return_positions or result.positions is None:
        return
    for i, positions in enumerate(result.positions[b, h]):
        chosen = positions[positions >= 0]
        assert (positions[len(chosen) :] == -1).all() and (chosen.diff() > 0).all()
        later = call.query.shape[2] - 1 - i
        valid = valid_of(call._replace(length=call.length - later))[b]
        n = int(valid.sum())
        dense = n < call.dense_below
        budget = n if dense else min(n, max(call.k, n // call.k_divisor if call.k_divisor else 0))
        least = min(n, max(call.k_min, min(call.local or 0, budget))) if call.mass is not None and not dense else budget
        assert least <= len(chosen) <= budget and len(chosen) == result.read[b, h, i]
        assert valid[chosen].all()


def check_result(call: Arguments, result: DecodeOutput) -> None:
    """A call that was answered was answered rightly."""
    tensors = [x for x in tensors_of(call) if x is not None]
    assert all(isinstance(x, Tensor) for x in tensors), "answered something that is no tensor"
    assert len({x.device for x in tensors}) == 1, f"answered tensors on several devices: {[x.device for x in tensors]}"
    assert result.output.device == call.query.device and result.output.dtype == call.query.dtype
    assert result.output.shape == call.query.shape
    assert result.alpha.shape == result.lse.shape == call.query.shape[:3]
    if call.query.device.type == "meta" or call.query.shape[2] not in QUERIES:
        return
    # The reference, on plain copies: strides and the like do not matter there.
    plain = call._replace(
        return_positions=True,
        **{
            name: x.detach().resolve_neg().clone(memory_format=torch.contiguous_format)
            for name, x in zip(tensors_of(call._fields), tensors_of(call), strict=True)
            if x is not None
        },
    )
    if plain.block_table is not None:
        plain = plain._replace(**in_a_row(plain.cached, plain.length)._asdict())
    valid = valid_of(call)
    sound = [plain.query, *(x.masked_fill(~valid[:, None, :, None], 0) for x in (plain.key, plain.value))]
    if plain.key_ranges is None:
        rows_read = plain.key_components.transpose(-1, -2).flatten(2, 3)[:, :, : plain.key.shape[2]]
        sound.append(rows_read.masked_fill(~valid[:, None, :, None], 0))
    elif groups := plain.key.shape[2] // GROUP:
        is_coded = torch.arange(groups) < plain.length[:, None] // GROUP
        sound.append(plain.key_ranges[:, :, :groups].masked_fill(~is_coded[:, None, :, None, None], 0))
    sound.append(plain.value_sum.masked_fill(~valid.any(-1)[:, None, None], 0))
    # infinite or larger than what float32 holds when multiplied: results are then a matter of rounding
    if not all(x.isfinite().all() and x.abs().max() < 1e3 for x in sound) or abs(call.softmax_scale) > 1e3:
        return
    assert result.output.isfinite().all() and result.alpha.isfinite().all(), "what is not finite came out"
    for b in range(call.query.shape[0]):
        for h in range(call.key.shape[1]):
            check_positions(call, result, b, h)
    if call.key_ranges is not None or call.mass is not None:
        return  # scores come from rounded weights, or where to stop may be a matter of rounding: test_codes.py
    expected = reference_call(plain)
    tolerance = TOLERANCE[call.query.dtype]
    # Two sets of positions may be equally good up to rounding: then the group's scores sum up to the same.
    summed, right = (x.view(*plain.key.shape[:2], -1).sum(-1) for x in (result.alpha, expected.alpha))
    torch.testing.assert_close(summed, right, rtol=1e-4, atol=1e-5)
    if not call.return_positions or result.positions is None:
        return  # which positions stand behind the output is not known: ties within rounding may go either way
    group = call.query.shape[1] // call.key.shape[1]
    same = (result.positions == expected.positions).all(-1).repeat_interleave(group, 1)  # [B, Hq, Q]
    torch.testing.assert_close(result.output[same], expected.output[same], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(result.alpha[same], expected.alpha[same], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(result.lse[same], expected.lse[same], rtol=1e-4, atol=1e-4)


def giant(call: Arguments, cached: int) -> Arguments:
    """As many positions, of which all are one: more than there is memory for."""
    try:
        return call._replace(
            key=call.key[:, :, :1].expand(-1, -1, cached, -1),
            value=call.value[:, :, :1].expand(-1, -1, cached, -1),
            key_components=call.key_components[:, :, :1].expand(-1, -1, num_blocks(cached), -1, -1),
            key_ranges=None
            if call.key_ranges is None
            else call.key_ranges[:, :, :1].expand(-1, -1, num_blocks(cached) * (BLOCK // GROUP), -1, -1),
            mask=None,
        )
    except (RuntimeError, TypeError, AttributeError, IndexError):
        return call


@st.composite
def decodes(draw: st.DrawFn) -> Decode:
    batch, num_kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 6))
    head_dim = draw(st.integers(1, 20) | st.sampled_from([32, 64, 80]))
    small, near_tile = st.integers(1, 40), st.integers(250, 262)
    cached = draw(
        st.sampled_from([small, small, small, near_tile, near_tile, st.integers(500, 600), None]).flatmap(
            lambda sizes: st.integers(BLOCK - 2, BLOCK + 2) if sizes is None else sizes
        )
    )
    if cached > 600:  # dear: few heads
        num_kv_heads, group, head_dim = 1, min(group, 2), min(head_dim, 20)
    k = draw(st.integers(1, cached + 10))
    rows = st.lists(st.integers(0, cached), min_size=batch, max_size=batch).map(tuple)
    options = {
        "r": draw(st.integers(1, head_dim)),
        "k": k,
        "k_divisor": draw(st.none() | st.integers(1, 20)),
        "local": draw(st.none() | st.integers(0, k)),
        "mass": draw(st.none() | st.floats(0.01, 0.99)),
        "k_min": draw(st.integers(1, k)),
        "scale": draw(st.none() | st.floats(0.01, 2.0)),
        "softcap": draw(st.none() | st.floats(0.5, 50.0)),
        "dense_below": draw(st.sampled_from([0, 0, cached // 2, cached + 1])),
        "mean_value": draw(st.booleans() | st.floats(0, 1)),
        "return_positions": draw(st.booleans()),
    }
    page, index = draw(st.just((None, "full")) | st.just((None, "int4")) | st.sampled_from(COMBINATIONS))
    poisoned = st.tuples(
        st.sampled_from(["query", "key", "value", "key_components" if index == "full" else "key_ranges", "value_sum"]),
        st.integers(0, 2),
        st.integers(0, 5),
        st.sampled_from(POISON),
    )
    return Decode(
        batch,
        num_kv_heads,
        group,
        cached,
        head_dim,
        draw(st.sampled_from([*DTYPES])),
        draw(st.none() | rows),
        draw(st.none() | rows) if page is None else None,
        draw(st.sampled_from([0.0, 0.0, 0.2, 0.9, 1.0])) if page is None else 0.0,
        tuple(options.items()),
        draw(st.sampled_from([*DRAWS])),
        index,
        draw(st.integers(0, 1 << 30)),
        draw(st.sampled_from([1, 1, 3])),
        draw(st.booleans()),
        draw(changes_of(Arguments._fields, tensors_of(Arguments._fields))),
        draw(st.sampled_from([1, 1, 1, 0, 2, 3, 16, 17])),
        draw(st.sampled_from([None] * 19 + [1 << 31, 1 << 33, 1 << 40, 1 << 55])) if draw(st.booleans()) else None,
        draw(st.lists(poisoned, max_size=2).map(tuple)) if page is None else (),
        page,
    )


# --- Append, to rows and to pages -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Append:
    batch: int
    heads: int
    capacity: int
    head_dim: int
    dtype: str
    position: int | tuple[int, ...]
    summed: bool
    public: bool  # by `sparq_kernels.append`, else by `torch.ops`
    changes: tuple[Change, ...]

    def check(self) -> None:
        shape = (self.batch, self.heads, self.capacity, self.head_dim)
        storage, tokens = storage_of(*shape, DTYPES[self.dtype]), new_token(*shape[:2], shape[3], DTYPES[self.dtype])
        value_sum = storage.value_sum if self.summed else None
        per_row = isinstance(self.position, tuple)
        position, offset = (torch.tensor(self.position), 0) if per_row else (None, self.position)
        right = AppendArguments(
            storage.key,
            storage.value,
            storage.key_components,
            value_sum,
            storage.key_ranges,
            *tokens,
            position,
            offset,  # type: ignore[arg-type]
        )
        check_writing(right, WRITTEN, self.changes, self.write, check_appended)

    def write(self, call: AppendArguments) -> AppendArguments:
        """What was called, as the operator has it."""
        if not self.public:
            torch.ops.sparq_kernels.append(*call)
            return call
        where = call.offset if call.position is None else call.position
        append_call(call)
        if isinstance(where, int):
            return call._replace(position=None, offset=where)
        return call._replace(offset=0)


def check_writing(
    right: Any,
    written: Sequence[str],
    changes: Sequence[Change],
    write: Callable[[Any], Any],
    check: Callable[[Any, dict[str, Tensor]], None],
) -> None:
    """A right call, on copies of what it writes, and one with changes.  check: gets the call and what was before it."""
    copies = {name: x.clone() for name, x in right._asdict().items() if name in written and x is not None}
    for call in (right._replace(**copies), changed(right, changes)):
        before = contents(call)
        try:
            call = write(call)
        except REFUSALS:
            assert call is not right, "a right call was refused"
            for name, old in before.items():
                assert same_bits(getattr(call, name).resolve_neg(), old), f"refused, yet {name} has changed"
        else:
            check_kinds(call)
            if call.key.device.type != "meta":
                check(call, before)


def contents(call: Any) -> dict[str, Tensor]:
    """Copies of what can be looked at."""
    return {name: x.detach().resolve_neg().clone() for name, x in call._asdict().items() if can_be_read(x)}


def can_be_read(x: Any) -> bool:
    if not isinstance(x, Tensor) or x.device.type != "cpu" or x.layout != torch.strided or x.numel() > 1 << 26:
        return False
    return x._is_zerotensor() or not x.numel() or not is_freed(x)


def check_kinds(call: Any) -> None:
    tensors = [x for x in appended_tensors_of(call) if x is not None]  # which come first in either
    assert all(isinstance(x, Tensor) for x in tensors), "took something that is no tensor"
    assert len({x.device for x in tensors}) == 1, f"took tensors on several devices: {[x.device for x in tensors]}"


def check_appended(call: AppendArguments, before: dict[str, Tensor]) -> None:
    offsets = (
        torch.full((call.key.shape[0],), int(call.offset))
        if call.position is None
        else before["position"] + call.offset
    )
    expected = {name: before[name] for name in WRITTEN if name in before}
    for b, s in enumerate(offsets.tolist()):
        assert 0 <= s < call.key.shape[2], f"wrote to position {s}"
        expected["key"][b, :, s] = before["new_key"][b, :, 0]
        expected["value"][b, :, s] = before["new_value"][b, :, 0]
        expected["key_components"][b, :, s // BLOCK, :, s % BLOCK] = before["new_key"][b, :, 0]
        if "value_sum" in expected:
            expected["value_sum"][b] += before["new_value"][b, :, 0]
    for name, right in expected.items():
        assert same_bits(getattr(call, name).detach().resolve_neg(), right), f"{name} does not hold what was appended"


@st.composite
def appends(draw: st.DrawFn) -> Append:
    batch, heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    capacity = draw(st.integers(1, 40) | st.integers(BLOCK - 2, BLOCK + 2))
    where = st.integers(0, capacity - 1)
    return Append(
        batch,
        heads,
        capacity,
        draw(st.integers(1, 20)),
        draw(st.sampled_from([*DTYPES])),
        draw(where | st.lists(where, min_size=batch, max_size=batch).map(tuple)),
        draw(st.booleans()),
        draw(st.booleans()),
        # PyTorch's own way around a negated tensor fails after the call where an argument is None.
        draw(
            changes_of(
                AppendArguments._fields,
                appended_tensors_of(AppendArguments._fields),
                [kind for kind in TENSOR_CHANGES if kind != "negated"],
            )
        ),
    )


@dataclass(frozen=True)
class Slots:
    pages: int
    heads: int
    page: int
    head_dim: int
    dtype: str
    index: str
    slots: tuple[int, ...]
    public: bool  # by `sparq_kernels.append_slots`, else by `torch.ops`
    changes: tuple[Change, ...]

    def check(self) -> None:
        storage = empty_pages(self.pages, self.heads, self.page, self.head_dim, DTYPES[self.dtype], self.index)
        new = tokens(len(self.slots), self.heads, self.head_dim, DTYPES[self.dtype])
        right = slot_call(storage, *new, torch.tensor(self.slots, dtype=torch.int64))
        check_writing(right, SLOTS_WRITTEN, self.changes, self.write, check_slots_written)

    def write(self, call: SlotArguments) -> SlotArguments:
        if self.public:
            cached = sparq_kernels.Cached(call.key, call.key_components, call.value, call.value_sum, call.key_ranges)
            sparq_kernels.append_slots(cached, call.new_key, call.new_value, call.slots)
        else:
            torch.ops.sparq_kernels.append_slots(*call)
        return call


def check_slots_written(call: SlotArguments, before: dict[str, Tensor]) -> None:
    if len(before["slots"].unique()) < len(before["slots"]):
        return  # which of them is last, nobody says
    right = SlotArguments(**{"key_ranges": None, **before})  # type: ignore[arg-type]
    append_slots_default(right)
    for name in SLOTS_WRITTEN:
        ours, theirs = getattr(call, name), getattr(right, name)
        if name == "value_sum":  # added up in another order
            torch.testing.assert_close(ours.detach().resolve_neg(), theirs, rtol=1e-4, atol=1e-4, equal_nan=True)
        elif theirs is not None:
            assert same_bits(ours.detach().resolve_neg(), theirs), f"{name} does not hold what was appended"


@st.composite
def slots_written(draw: st.DrawFn) -> Slots:
    pages, heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    page, index = draw(st.sampled_from(COMBINATIONS))
    last = st.integers(1, pages).map(lambda p: p * page - 1)  # of a page, and so of a group
    slot = st.integers(-3, pages * page - 1) | last
    return Slots(
        pages,
        heads,
        page,
        draw(st.integers(1, 20)),
        draw(st.sampled_from([*DTYPES])),
        index,
        draw(st.lists(slot, max_size=9, unique=True).map(tuple)),
        draw(st.booleans()),
        draw(
            changes_of(
                SlotArguments._fields,
                slots_tensors_of(SlotArguments._fields),
                [kind for kind in TENSOR_CHANGES if kind != "negated"],
            )
        ),
    )


RECIPES: dict[str, st.SearchStrategy[Any]] = {"decode": decodes(), "append": appends(), "append_slots": slots_written()}
