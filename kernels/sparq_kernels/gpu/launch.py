"""Which kernels run, on what memory and how they are started.

A step is made by the first of `VARIANTS` that serves its shape; each is a module that says which launches it makes and
what scratch memory they need. What is compiled into a kernel (`tl.constexpr`) does not change while a cache grows,
except where a row outgrows `fused.WIDTH`, `split.SELECT_WIDTHS` or `split.LONG_ROW`.

The numbers there and in `shape` follow from registers, shared memory and bytes in flight, as the compiler reports them
(tests/kernels/test_gpu_compiled.py), and from one profile on an NVIDIA H200.  Tried there and no faster: programmatic
dependent launch, 64 rows at once in `gather`, two stages instead of three, rows of 16,384 in `select`.

A plan holds each kernel's arguments but for the addresses, and the compiled kernel once there is one: what a step costs
in Python is the allocation of its results and of one piece of scratch memory, and one call for each kernel
(benchmarks/launch_cost.py).  Parameters of kernels that have the same name have the same value.  They are long flat
lists, not groups, because a launch fills them by place: with addresses, and one number that changes.

Scratch memory is allocated per call, from PyTorch's caching allocator: that is a cache per device and stream, known to
CUDA graphs, and never shared by two streams.  No kernel expects it to be initialised.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..append import AppendArguments
from ..arguments import Arguments, check_memory, options_of, tensors_of
from ..counting import CountArguments
from ..encoding import EncodeArguments
from ..layout import GROUP
from ..reference import Results
from ..slots import SlotArguments
from ..value_sum import ExtendArguments
from . import fused, split
from .append import append as append_kernel
from .append import extend_sum as extend_sum_kernel
from .encoding import ENCODE_BYTES, ENCODE_WARPS
from .encoding import encode as encode_kernel
from .rows import CHUNK, VARYING, count_masked
from .shape import Scratch, Shape, rows_at_once, shape_of, stages_of
from .slots import complete_pages, write_slots
from .topk import MAX_KEYS

VARIANTS = {"fused": fused, "split": split}  # the first that serves
COUNT_TILE = 4096
WRITE_WARPS = 4
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
OPTIONS = {"enable_fp_fusion": True}  # as it has always been: the default is going to change
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

ALIGNED = 16  # bytes: of all addresses that a kernel is held for; Triton compiles another one for others
SCRATCH_ALIGNMENT = 128  # bytes
MAX_HELD = 512  # of anything: compiled kernels, plans (14 kB each), layouts of `append`


class Launch:
    """One kernel with its arguments in order, None where an address belongs."""

    def __init__(
        self,
        kernel: Any,
        grid: Sequence[int],
        values: Mapping[str, Any],
        pointers: Mapping[str, tuple[int, torch.dtype]],
        device: torch.device,
        changing: str,
        **options: Any,
    ) -> None:
        """Both by the names of parameters.  pointers: which of a call's tensors they point at, and its dtype.
        changing: the one argument besides that a call may change."""
        names = kernel.arg_names
        self.kernel = kernel
        self.grid: tuple[int, ...] = (*grid, 1, 1)[:3]
        self.options = options | OPTIONS
        self.arguments = [None if name in pointers else values[name] for name in names]
        self.places = [(place, pointers[name][0]) for place, name in enumerate(names) if name in pointers]
        self.changing = names.index(changing) if changing in names else None
        what = [pointers[name][1] if name in pointers else _compiled_for(name, values[name]) for name in names]
        self._key = (kernel, device, *what, *sorted(self.options.items()))
        self._starters: dict[tuple[bool, ...], Callable[[int, list[Any]], None] | None] = {}

    def __call__(
        self,
        addresses: Sequence[int],
        kind: tuple[bool, ...] | None,
        stream: int,
        tensor: Callable[[int], Tensor],
        changed: int,
    ) -> None:
        """addresses: of the call's tensors.  kind: what `kind_of` says of them.  tensor: gives one of them.
        changed: the argument that may change."""
        arguments = self.arguments.copy()
        if self.changing is not None:
            arguments[self.changing] = changed
        start = None if kind is None else self._starters.get(kind) or self._find(kind)
        if start is not None:
            for place, which in self.places:
                arguments[place] = addresses[which]
            start(stream, arguments)
            return
        for place, which in self.places:
            arguments[place] = tensor(which)
        compiled = self.kernel[self.grid](*arguments, **self.options)
        if kind is not None and compiled is not None:  # None: interpreted
            if len(_compiled) >= MAX_HELD:
                _compiled.clear()
            _compiled[self._key, kind] = compiled
            self._starters[kind] = _starter(compiled, self.grid)

    def _find(self, kind: tuple[bool, ...]) -> Callable[[int, list[Any]], None] | None:
        """What another plan has compiled."""
        compiled = _compiled.get((self._key, kind))
        if compiled is None:
            return None
        start = self._starters[kind] = _starter(compiled, self.grid)
        return start


_compiled: dict[tuple[Any, tuple[bool, ...]], Any] = {}  # plans of different lengths have the same kernels


def kind_of(addresses: Sequence[int], tensors: Iterable[Tensor]) -> tuple[bool, ...] | None:
    """What Triton looks at of pointers when it chooses among a kernel's binaries: equal for calls that may share them.
    None where an address is less aligned than is usual: then Triton itself has to choose."""
    together = 0
    for address in addresses:
        together |= address
    if together % ALIGNED:
        return None
    if torch.version.hip is None:
        return ()
    # For AMD it compiles 32-bit offsets into what lies in less than 2 GB.
    return tuple([x.untyped_storage().nbytes() < 1 << 31 for x in tensors])


def _starter(compiled: Any, grid: tuple[int, ...]) -> Callable[[int, list[Any]], None] | None:
    """Starts a compiled kernel as `compiled[grid]` does, which spends most of its time on what hooks want to know; None
    where this Triton is built differently.  Debugging knobs that are set later are not seen any more."""
    try:
        hooks, hooked = triton.knobs.runtime, compiled[grid]
        launcher, function, packed = compiled.run, compiled.function, compiled.packed_metadata
    except (AttributeError, TypeError):
        return None

    def start(stream: int, arguments: list[Any]) -> None:
        # Each is a chain of hooks, or one set in its place.
        if not getattr(hooks.launch_enter_hook, "calls", True) and not getattr(hooks.launch_exit_hook, "calls", True):
            launcher(*grid, stream, function, packed, None, None, None, *arguments)
        else:
            hooked(*arguments, stream=stream)

    return start


def _compiled_for(name: str, value: Any) -> Any:
    """What Triton looks at of an argument when it chooses among a kernel's binaries, or more."""
    if isinstance(value, float):
        return float
    return -(1 << 31) <= value < 1 << 31 if name in VARYING else value


class Plan(NamedTuple):
    """A step but for the addresses, which `run` fills in."""

    shape: Shape
    sizes: fused.Sizes | split.Sizes
    launches: list[Launch]
    scratch: list[tuple[int, torch.dtype, int]]  # first byte, dtype and elements of each piece
    scratch_bytes: int
    cached: int


def plan(call: Arguments, variant: str | None = None, **forced: Any) -> Plan:
    """For arguments that have been checked and are float32, bfloat16 or float16.

    variant: of `VARIANTS`, and forced: its `Sizes`, where they are chosen already.
    Raises ValueError for more positions than the selection can count, or for codes that cannot be read as words.
    """
    cached = call.capacity
    if cached > MAX_KEYS:
        raise ValueError(f"key must hold at most {MAX_KEYS} positions on a GPU, got {cached}")
    # A cache grows with every token. Its plan is that of the chunk's end, but for one number.
    end = cached if call.return_positions else triton.cdiv(cached, CHUNK.value) * CHUNK.value
    if variant is not None:
        return _plan(call, end, variant, forced)._replace(cached=cached)
    described = [None if x is None else (x.stride(), x.dtype) for x in tensors_of(call)]
    storage = call.key.shape[:2] if call.block_table is None else call.key.shape[:3]
    layout = (end, call.query.shape, storage, call.query.device, *described, *options_of(call))
    found = _plans.get(layout)
    if found is None:
        if len(_plans) >= MAX_HELD:
            _plans.clear()
        found = _plans[layout] = _plan(call, end, None, {})
    return found._replace(cached=cached)


_plans: dict[tuple[object, ...], Plan] = {}  # by all that a plan depends on, of caches that are full to a chunk's end


def _plan(call: Arguments, cached: int, variant: str | None, forced: Mapping[str, Any]) -> Plan:
    query = call.query
    shape = shape_of(call, cached, multiprocessors(query.device))
    if shape.coded:
        _check_words(call)
    kind = next(kind for kind in VARIANTS.values() if kind.serves(shape)) if variant is None else VARIANTS[variant]
    sizes = kind.sizes(shape)._replace(**forced)
    tensors = _given(call)
    values = _strides(DECODED, tensors) | {
        "Hkv": shape.num_kv_heads,
        "S": cached,
        "pages": call.key.shape[0],
        **dict(zip(("k", "k_divisor", "local"), _budget(call, cached), strict=True)),
        "logits_chunks": shape.chunks,
        "scale": float(call.softmax_scale),
        "softcap": float(call.softcap or 0.0),
        "mean_from": float(call.mean_from),
        "mass": float(call.mass or 0.0),
        "k_min": min(call.k_min, cached),
        "dense_below": min(call.dense_below, cached + 1),
        **{name: getattr(shape, name) for name in ("Q", "k_max", "G", "D", "R", "GP", "DP", "RP", "BLOCK", "PAGED")},
        "ROWS": shape.rows,
        "STAGES": shape.stages,
        "COUNT_TILE": COUNT_TILE,
        "DOT": tl.float32 if INTERPRETED else DTYPES[query.dtype],  # no bfloat16 product there
        "CODED": shape.coded,
        "CODE_DOT": tl.float32 if INTERPRETED else tl.bfloat16,
        "HAS_START": call.start is not None,
        "HAS_MASK": call.mask is not None,
        "HAS_SOFTCAP": call.softcap is not None,
        "HAS_MASS": call.mass is not None,
        "MEAN_VALUE": call.mean_from < math.inf,
        **kind.arguments(shape, sizes),
    }

    f32, i32 = torch.float32, torch.int32
    scratch: Scratch = {"logits": (f32, shape.N * shape.G * shape.chunks * CHUNK.value)}
    counts_rows = call.mask is not None and call.counts is None
    if counts_rows:
        scratch["counts"] = (i32, shape.batch * shape.Q * 2)
    if not call.return_positions:
        scratch["positions"] = (i32, shape.N * shape.k_max)
    scratch |= kind.scratch(shape, sizes)
    dtypes = [*map(_pointed_at, tensors), i32, query.dtype, f32, f32, i32]
    names = (*DECODED, *RESULTS)
    pointers = {name: (place, dtype) for place, (name, dtype) in enumerate(zip(names, dtypes, strict=True))}
    pieces, end = [], 0
    for place, (name, (dtype, elements)) in enumerate(scratch.items(), len(names)):
        pointers[name] = (place, dtype)
        pieces.append((end, dtype, elements))
        end += triton.cdiv(elements * dtype.itemsize, SCRATCH_ALIGNMENT) * SCRATCH_ALIGNMENT

    started = [(count_masked, (shape.batch * shape.Q,), {"num_warps": 8})] if counts_rows else []
    launches = [
        Launch(kernel, grid, values, pointers, query.device, "S", **options)
        for kernel, grid, options in (*started, *kind.launches(shape, sizes))
    ]
    return Plan(shape, sizes, launches, pieces, end, cached)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 16


def _is_current(device: torch.device) -> bool:
    """Triton launches on the current device."""
    return device.type != "cuda" or device.index == torch.cuda.current_device()


def _stream(device: torch.device) -> int:
    return triton.runtime.driver.active.get_current_stream(device.index) if device.type == "cuda" else 0


def run(plan: Plan, call: Arguments) -> Results:
    """Results as `reference.decode_reference` gives them.  Values of `length`, `start` and `block_table` out of
    range are clamped.

    Raises RuntimeError for memory that has been freed, ValueError for codes that cannot be read as words.
    """
    if _is_current(call.query.device):
        return _run(plan, call)
    with torch.cuda.device(call.query.device):
        return _run(plan, call)


def _run(plan: Plan, call: Arguments) -> Results:
    batch, _, query_length, _ = shape = call.query.shape
    device, num_kv_heads = call.query.device, call.key.shape[1]
    output = torch.empty(shape, dtype=call.query.dtype, device=device)
    alpha = torch.empty(shape[:3], dtype=torch.float32, device=device)
    lse = torch.empty_like(alpha)
    read = torch.empty((batch, num_kv_heads, query_length), dtype=torch.int32, device=device)
    scratch = torch.empty(plan.scratch_bytes, dtype=torch.uint8, device=device)
    positions = call.length
    if call.return_positions:
        positions = torch.full((plan.shape.N, plan.shape.k_max), -1, dtype=torch.int32, device=device)
    tensors = [*_given(call), positions, output, alpha, lse, read]
    addresses = [x.data_ptr() for x in tensors]
    first = scratch.data_ptr()
    kind = kind_of([*addresses, first], [*tensors, scratch])
    if kind is None or 0 in addresses:
        check_memory(call, tensors_of)
        if plan.shape.coded:
            _check_words(call)
    addresses += [first + offset for offset, _, _ in plan.scratch]

    def tensor(place: int) -> Tensor:
        if place >= len(tensors):
            offset, dtype, elements = plan.scratch[place - len(tensors)]
            return scratch[offset : offset + elements * dtype.itemsize].view(dtype)
        return _as_bytes(tensors[place])

    stream = _stream(device)
    for launch in plan.launches:
        launch(addresses, kind, stream, tensor, plan.cached)
    if not call.return_positions:
        return output, alpha, scratch.new_empty((*read.shape, 0), dtype=torch.int64), lse, read
    by_head = positions.view(batch, query_length, num_kv_heads, plan.shape.k_max).transpose(1, 2)
    return output, alpha, by_head.to(torch.int64, memory_format=torch.contiguous_format), lse, read


def _check_words(call: Arguments) -> None:
    """Raise where codes cannot be read as words of 32 bits."""
    codes = call.key_components
    if codes.data_ptr() % 4 or any(stride % 4 for stride in codes.stride()[:2]):
        raise ValueError("key_components must lie at multiples of 4 bytes on a GPU")


def _given(call: Arguments) -> list[Tensor]:
    """The call's tensors.  Kernels take pointers always; those that stand for nothing are never read."""
    length = call.length
    return [length if x is None else x for x in tensors_of(call)]


def count(call: CountArguments) -> Tensor:
    """int32 [B, Q, 2].  For arguments that have been checked."""
    mask = call.mask if call.mask.stride(1) == 1 else call.mask.contiguous()
    (batch, cached), device = mask.shape, mask.device
    counts = torch.empty((batch, call.queries, 2), dtype=torch.int32, device=device)
    start = call.length if call.start is None else call.start
    with contextlib.nullcontext() if _is_current(device) else torch.cuda.device(device):
        count_masked[(batch * call.queries,)](
            counts,
            call.length,
            call.length.stride(0),
            start,
            start.stride(0),
            mask.view(torch.uint8),
            mask.stride(0),
            call.queries,
            cached,
            *_budget(call, cached),
            HAS_START=call.start is not None,
            COUNT_TILE=COUNT_TILE,
            num_warps=8,
            **OPTIONS,
        )
    return counts


def _budget(call: Arguments | CountArguments, cached: int) -> tuple[int, int, int]:
    """k, k_divisor and local as kernels take them, in 32 bits."""
    local = -1 if call.local is None else min(call.local, cached)
    return min(call.k, cached), min(call.k_divisor or 0, cached + 1), local


_appends: dict[tuple[object, ...], list[Launch]] = {}  # by layout, of all that writes to a cache


def append(call: AppendArguments, layout: tuple[object, ...]) -> None:
    """For arguments that have been checked; `layout` as `check_append` gives it.

    Raises RuntimeError for memory that has been freed.
    """
    new_key = call.new_key if call.new_key.stride(3) == 1 else call.new_key.contiguous()
    new_value = call.new_value if call.new_value.stride(3) == 1 else call.new_value.contiguous()
    tensors = (
        call.key,
        call.value,
        call.key_components,
        call.key if call.value_sum is None else call.value_sum,
        call.key if call.key_ranges is None else call.key_ranges,
        new_key,
        new_value,
        call.key if call.position is None else call.position,
    )
    launches = _appends.get(layout)
    if launches is None:
        coded = call.key_ranges is not None
        constants = {
            "HAS_POSITION": call.position is not None,
            "HAS_SUM": call.value_sum is not None,
            "CODED": coded,
            "AT_ONCE": _encoded_at_once(call.key),
        }
        rows = call.key.shape[0] * call.key.shape[1]
        kernel = (append_kernel, rows, ENCODE_WARPS if coded else 1)
        launches = _held(layout, APPENDED, tensors, call.key, constants, kernel)
    _start(launches, call, tensors, call.offset)


def encode(call: EncodeArguments) -> None:
    """For arguments that have been checked.

    Raises RuntimeError for memory that has been freed.
    """
    key, codes, ranges = call.key, call.key_components, call.key_ranges
    batch, heads, _, head_dim = key.shape
    first, last = call.begin // GROUP, call.end // GROUP
    if first == last:
        return
    check_memory(call, itemgetter(slice(3)))
    with contextlib.nullcontext() if _is_current(key.device) else torch.cuda.device(key.device):
        encode_kernel[(batch * heads * (last - first),)](
            key,
            *key.stride()[:3],
            codes,
            *codes.stride()[:2],
            ranges,
            *ranges.stride()[:2],
            first,
            last - first,
            heads,
            D=head_dim,
            AT_ONCE=_encoded_at_once(key),
            num_warps=ENCODE_WARPS,
            **OPTIONS,
        )


def _encoded_at_once(key: Tensor) -> int:
    """Components that a program codes at once."""
    return min(triton.next_power_of_2(key.shape[3]), ENCODE_BYTES // key.element_size())


def extend_sum(call: ExtendArguments, layout: tuple[object, ...]) -> None:
    """For arguments that have been checked; `layout` as `check_extending` gives it.

    Raises RuntimeError for memory that has been freed.
    """
    launches = _appends.get(layout)
    if launches is None:
        rows = call.value.shape[0] * call.value.shape[1]
        launches = _held(layout, EXTENDED, call, call.value, {}, (extend_sum_kernel, rows, 1))
    _start(launches, call, call, 0)


def append_slots(call: SlotArguments, layout: tuple[object, ...]) -> None:
    """For arguments that have been checked; `layout` as `check_slots` gives it.

    Raises RuntimeError for memory that has been freed.
    """
    tokens, heads, head_dim = call.new_key.shape
    if not tokens:
        return
    new_key = call.new_key if call.new_key.stride(2) == 1 else call.new_key.contiguous()
    new_value = call.new_value if call.new_value.stride(2) == 1 else call.new_value.contiguous()
    ranges = call.key if call.key_ranges is None else call.key_ranges
    tensors = (call.key, call.value, call.key_components, call.value_sum, ranges, new_key, new_value, call.slots)
    launches = _appends.get(layout)
    if launches is None:
        itemsize = call.key.element_size()
        rows = rows_at_once(triton.next_power_of_2(head_dim), itemsize)
        constants = {
            "pages": call.key.shape[0],
            "tokens": tokens,
            "ROWS": rows,
            "STAGES": stages_of(itemsize, torch.version.hip is not None),
            "BLOCK": call.key.shape[2],
            "CODED": call.key_ranges is not None,
            "AT_ONCE": _encoded_at_once(call.key),
        }
        write = (write_slots, triton.cdiv(tokens, rows) * heads, WRITE_WARPS)
        complete = (complete_pages, tokens * heads, ENCODE_WARPS)
        launches = _held(layout, SLOTS, tensors, call.key, constants, write, complete)
    _start(launches, call, tensors, 0)


# What the kernels' pointers and strides are called, tensor by tensor of a call.
DECODED = {
    "query": ("query_batch", "query_head", "query_position"),
    "key": ("key_batch", "key_head", "key_position"),
    "components": ("components_batch", "components_head", "components_block"),
    "value": ("value_batch", "value_head", "value_position"),
    "value_sum": ("sum_batch", "sum_head"),
    "ranges": ("ranges_batch", "ranges_head"),
    "table": ("table_stride",),
    "length": ("length_stride",),
    "start": ("start_stride",),
    "mask": ("mask_stride",),
    "counts": (),
}
RESULTS = ("positions", "output", "alpha_out", "lse_out", "read")  # behind them, and behind these the scratch memory
APPENDED = {
    "keys": ("keys_batch", "keys_head", "keys_position"),
    "values": ("values_batch", "values_head", "values_position"),
    "components": ("components_batch", "components_head", "components_block"),
    "value_sum": ("sum_batch", "sum_head"),
    "ranges": ("ranges_batch", "ranges_head"),
    "new_key": ("new_key_batch", "new_key_head"),
    "new_value": ("new_value_batch", "new_value_head"),
    "position": ("position_stride",),
}
SLOTS = {
    "keys": ("keys_page", "keys_head", "keys_position"),
    "values": ("values_page", "values_head", "values_position"),
    "components": ("components_page", "components_head"),
    "value_sum": ("sum_page", "sum_head"),
    "ranges": ("ranges_page", "ranges_head"),
    "new_key": ("new_key_token", "new_key_head"),
    "new_value": ("new_value_token", "new_value_head"),
    "slots": ("slots_stride",),
}
EXTENDED = {
    "value_sum": ("sum_batch", "sum_head"),
    "summed": ("summed_batch",),
    "values": ("values_batch", "values_head", "values_position"),
    "valid": ("valid_batch",),
    "length": ("length_stride",),
}


def _strides(names: Mapping[str, tuple[str, ...]], tensors: Sequence[Tensor]) -> dict[str, Any]:
    return {
        stride: size
        for strides, x in zip(names.values(), tensors, strict=True)
        for stride, size in zip(strides, (*x.stride(), 0), strict=False)  # one may stand in for what has another
    }


def _held(
    layout: tuple[object, ...],
    names: Mapping[str, tuple[str, ...]],
    tensors: Sequence[Tensor],
    storage: Tensor,
    constants: dict[str, int],
    *kernels: tuple[Any, int, int],
) -> list[Launch]:
    """Launches that write to a storage [B, Hkv, capacity, d], kept for calls of that layout; kernels: with programs and
    warps."""
    _, heads, capacity, head_dim = storage.shape
    sizes = {"capacity": capacity, "Hkv": heads, "D": head_dim, "DP": triton.next_power_of_2(head_dim), "offset": 0}
    values = _strides(names, tensors) | sizes
    pointers = {name: (place, _pointed_at(x)) for place, (name, x) in enumerate(zip(names, tensors, strict=True))}
    if len(_appends) >= MAX_HELD:
        _appends.clear()
    values |= constants
    launches = [
        Launch(kernel, (programs,), values, pointers, storage.device, "offset", num_warps=warps)
        for kernel, programs, warps in kernels
    ]
    _appends[layout] = launches
    return launches


def _start(launches: list[Launch], call: Any, tensors: Sequence[Tensor], changed: int) -> None:
    addresses = [x.data_ptr() for x in tensors]
    kind = kind_of(addresses, tensors)
    if kind is None or 0 in addresses:
        check_memory(call, itemgetter(slice(len(tensors))))

    def tensor(place: int) -> Tensor:
        return _as_bytes(tensors[place])

    device = tensors[0].device
    with contextlib.nullcontext() if _is_current(device) else torch.cuda.device(device):
        for launch in launches:
            launch(addresses, kind, _stream(device), tensor, changed)


def _as_bytes(x: Tensor) -> Tensor:
    """What Triton is to take for a pointer: truth values are bytes to it."""
    return x.view(torch.uint8) if x.dtype == torch.bool else x


def _pointed_at(x: Tensor) -> torch.dtype:
    return torch.uint8 if x.dtype == torch.bool else x.dtype
