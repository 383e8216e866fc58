"""Which kernels run, in what sizes, on what scratch memory: the only place where that is decided.

Everything follows from shapes and the device's number of multiprocessors, never from a value on the device and never
from a trial run.  So nothing waits for the GPU, a step can be captured in a CUDA graph, and no token is spent on
autotuning.  What is compiled into a kernel (`tl.constexpr`) does not change while a cache grows, except where a row
outgrows `FUSED_WIDTH`, `SELECT_WIDTHS` or `LONG_ROW`.

The numbers below follow from registers, shared memory and bytes in flight, as the compiler reports them
(tests/kernels/test_gpu_compiled.py), and from one profile on an NVIDIA H200.  Tried there and no faster: programmatic
dependent launch, 64 rows at once in `gather`, two stages instead of three, rows of 16,384 in `select`.

A plan holds each kernel's arguments but for the addresses, and the compiled kernel once there is one: what a step costs
in Python is the allocation of its results and of one piece of scratch memory, and one call for each kernel
(benchmarks/launch_cost.py).  Parameters of kernels that have the same name have the same value.

Scratch memory is allocated per call, from PyTorch's caching allocator: that is a cache per device and stream, known to
CUDA graphs, and never shared by two streams.  No kernel expects it to be initialised.
"""

from __future__ import annotations

import contextlib
import functools
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
from ..layout import BLOCK
from ..reference import max_positions
from ..value_sum import ExtendArguments
from .append import append as append_kernel
from .append import extend_sum as extend_sum_kernel
from .attention import gather, merge
from .fused import fused as fused_kernel
from .rows import CHUNK, INFO, VARYING, count_masked
from .scoring import LANES, score
from .selection import BINS, candidates, choose, histogram, select
from .topk import MAX_KEYS

# On each multiprocessor. Of `score` all must fit at once, or the last ones come alone; and each chooses the components
# for itself.
SCORE_PROGRAMS, GATHER_PROGRAMS = 2, 2
MAX_SPLITS = 64
TILE_BYTES = 16384  # of components per stage
MAX_LOGITS = 4096  # of a tile, of all queries of the group
STAGES = 3  # of 16-bit loads on NVIDIA
LOAD_BYTES = 16  # of one thread
ROW_BYTES, MAX_ROWS = 8192, 32  # of K, and of V, per stage
FUSED_WIDTH = 4096  # longest row of the fused kernel: with 8192 keys one program would fill a multiprocessor
SELECT_WIDTHS = (4096, 8192)  # longest rows of `select`: with 16384 keys a program had to spill
LONG_ROW = 1 << 18  # from here on parts of the distributed selection are 8192 positions, not 4096
HISTOGRAM_PARTS = 16  # that `candidates` reads at once
COUNT_TILE = 4096
# Of `fused` in 16 bits, so that two programs fit on a multiprocessor. In float32 a limit makes ptxas put hundreds of
# bytes elsewhere.
REGISTERS = 128
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
OPTIONS = {"enable_fp_fusion": True}  # as it has always been: the default is going to change
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


ALIGNED = 16  # bytes: of all addresses that a kernel is held for; Triton compiles another one for others
SCRATCH_ALIGNMENT = 128  # bytes
MAX_HELD = 512  # of anything: compiled kernels, plans (14 kB each), layouts of `append`


class Sizes(NamedTuple):
    """Launch choices for one layout of arguments."""

    N: int  # KV heads, times new tokens, times rows
    k_max: int
    chunks: int  # of CHUNK positions, that logits and keys are stored in
    fused: bool
    select_width: int  # keys that one program of `fused` or `select` holds; 0: the distributed selection
    part_width: int  # keys that one program of the distributed selection holds
    splits: int  # programs per KV head of `score`
    parts: int  # programs per KV head of `gather`
    warps: int  # of `score` and `gather`


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

    sizes: Sizes
    launches: list[Launch]
    scratch: list[tuple[int, torch.dtype, int]]  # first byte, dtype and elements of each piece
    scratch_bytes: int
    cached: int


# A call's tensors, in the order of `run`; those of the scratch memory come behind them.
POINTERS: tuple[str, ...] = ("query", "key", "components", "value", "value_sum", "length", "start", "mask", "counts")
POINTERS += ("positions", "output", "alpha_out", "lse_out")


def plan(call: Arguments, **forced: Any) -> Plan:
    """For arguments that have been checked and are float32, bfloat16 or float16.  forced: sizes already chosen.

    Raises ValueError for more positions than the selection can count.
    """
    cached = call.key.shape[2]
    if cached > MAX_KEYS:
        raise ValueError(f"key must hold at most {MAX_KEYS} positions on a GPU, got {cached}")
    # A cache grows with every token. Its plan is that of the chunk's end, but for one number.
    end = cached if call.return_positions else triton.cdiv(cached, CHUNK.value) * CHUNK.value
    if forced:
        return _plan(call, end, forced)._replace(cached=cached)
    described = [None if x is None else (x.stride(), x.dtype) for x in tensors_of(call)]
    layout = (end, call.query.shape, call.key.shape[1], call.query.device, *described, *options_of(call))
    found = _plans.get(layout)
    if found is None:
        if len(_plans) >= MAX_HELD:
            _plans.clear()
        found = _plans[layout] = _plan(call, end, {})
    return found._replace(cached=cached)


_plans: dict[tuple[object, ...], Plan] = {}  # by all that a plan depends on, of caches that are full to a chunk's end


def _plan(call: Arguments, cached: int, forced: Mapping[str, Any]) -> Plan:
    query, key = call.query, call.key
    batch, num_heads, query_length, D = query.shape
    num_kv_heads = key.shape[1]
    G = num_heads // num_kv_heads
    sizes = _sizes(call, cached)._replace(**forced)
    # Matrix instructions want 16 rows; a single query is multiplied without them.
    GP = 1 if G == 1 else max(16, triton.next_power_of_2(G))
    DP, RP = max(16, triton.next_power_of_2(D)), max(16, triton.next_power_of_2(call.r))
    itemsize, amd = query.element_size(), torch.version.hip is not None
    width = sizes.select_width or sizes.part_width
    parts = triton.cdiv(cached, width)
    start, mask = (call.length if x is None else x for x in (call.start, call.mask))
    values = _strides(DECODED, (*call[:6], start, mask)) | {
        "Hkv": num_kv_heads,
        "Q": query_length,
        "S": cached,
        **dict(zip(("k", "k_divisor", "local"), _budget(call, cached), strict=True)),
        "k_max": sizes.k_max,
        "parts": parts,
        "logits_chunks": sizes.chunks,
        "scale": float(call.softmax_scale),
        "softcap": float(call.softcap or 0.0),
        "G": G,
        "D": D,
        "R": call.r,
        "GP": GP,
        "DP": DP,
        "RP": RP,
        "TILE": _tile(GP, RP, itemsize, _warps(width) if sizes.fused else sizes.warps),
        "ROWS": min(MAX_ROWS, max(16, ROW_BYTES // (DP * itemsize))),
        "SPLITS": sizes.splits,
        "PARTS": sizes.parts,
        "STAGES": STAGES if itemsize == 2 and not amd else 2,
        "WIDTH": width,
        "PARTS_AT_ONCE": HISTOGRAM_PARTS,
        "COUNT_TILE": COUNT_TILE,
        "DOT": tl.float32 if INTERPRETED else DTYPES[query.dtype],  # no bfloat16 product there
        "HAS_START": call.start is not None,
        "HAS_MASK": call.mask is not None,
        "HAS_SOFTCAP": call.softcap is not None,
        "MEAN_VALUE": call.mean_value,
        "LAST_MERGES": not amd,
    }

    N, f32, i32 = sizes.N, torch.float32, torch.int32
    scratch: dict[str, tuple[torch.dtype, int]] = {"logits": (f32, N * G * sizes.chunks * CHUNK.value)}
    counts_rows = call.mask is not None and call.counts is None
    if counts_rows:
        scratch["counts"] = (i32, batch * query_length * 2)
    if not call.return_positions:
        scratch["positions"] = (i32, N * sizes.k_max)
    if not sizes.fused:
        scratch["stats"] = (f32, N * 2 * G * sizes.splits)
        scratch["info"], scratch["ticket"] = (i32, N * INFO), (i32, N)
        scratch["partial"] = (f32, N * sizes.parts * G * 3)
        scratch["partial_y"] = (f32, N * sizes.parts * G * DP)
        if not sizes.select_width:
            scratch["keys"] = scratch["compact"] = (i32, N * sizes.chunks * CHUNK.value)
            scratch["bin_counts"], scratch["before"] = (i32, N * parts * BINS), (i32, N * parts * 2)
    dtypes = [query.dtype] * 4 + [call.value_sum.dtype, torch.int64, torch.int64]
    dtypes += [torch.int64 if call.mask is None else torch.uint8, torch.int64 if call.counts is None else i32, i32]
    dtypes += [query.dtype, f32, f32]
    pointers = {name: (place, dtype) for place, (name, dtype) in enumerate(zip(POINTERS, dtypes, strict=True))}
    pieces, end = [], 0
    for place, (name, (dtype, elements)) in enumerate(scratch.items(), len(POINTERS)):
        pointers[name] = (place, dtype)
        pieces.append((end, dtype, elements))
        end += triton.cdiv(elements * dtype.itemsize, SCRATCH_ALIGNMENT) * SCRATCH_ALIGNMENT

    def launch(kernel: Any, *grid: int, **options: Any) -> None:
        launches.append(Launch(kernel, grid, values, pointers, query.device, "S", **options))

    launches: list[Launch] = []
    if counts_rows:
        launch(count_masked, batch * query_length, num_warps=8)
    if sizes.fused:
        few_registers = {"maxnreg": REGISTERS} if itemsize == 2 and GP <= 32 and not amd else {}
        launch(fused_kernel, N, num_warps=_warps(width), **few_registers)
        return Plan(sizes, launches, pieces, end, cached)
    launch(score, N, sizes.splits, num_warps=sizes.warps)
    if sizes.select_width:
        launch(select, N, num_warps=_warps(width))
    else:
        launch(histogram, N, parts, num_warps=_warps(width))
        launch(candidates, N, parts, num_warps=_warps(width))
        launch(choose, N, parts, num_warps=_warps(width))
    launch(gather, N, sizes.parts, num_warps=sizes.warps)
    if not values["LAST_MERGES"]:
        launch(merge, N, num_warps=sizes.warps)
    return Plan(sizes, launches, pieces, end, cached)


def _sizes(call: Arguments, cached: int) -> Sizes:
    batch, num_heads, query_length, _ = call.query.shape
    num_kv_heads = call.key.shape[1]
    N = batch * query_length * num_kv_heads
    units = multiprocessors(call.query.device)
    splits, parts = (_power_of_2_up_to(x * units // N) for x in (SCORE_PROGRAMS, GATHER_PROGRAMS))
    fused = N >= 2 * units and cached <= FUSED_WIDTH
    fitting = [FUSED_WIDTH] if fused else [width for width in SELECT_WIDTHS if cached <= width]
    return Sizes(
        N=N,
        k_max=max_positions(cached, call.k, call.k_divisor),
        chunks=triton.cdiv(cached, CHUNK.value),
        fused=fused,
        select_width=fitting[0] if fitting else 0,
        part_width=4096 if cached < LONG_ROW else 8192,
        splits=min(MAX_SPLITS, splits),
        parts=min(MAX_SPLITS, parts),
        warps=4 if num_heads // num_kv_heads <= 32 else 8,
    )


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 16


def _power_of_2_up_to(number: int) -> int:
    return 1 << max(0, number.bit_length() - 1)


def _tile(GP: int, RP: int, itemsize: int, warps: int) -> int:
    """Positions that a program scores at once."""
    if GP == 1:  # one load for each thread and component
        return min(BLOCK, LOAD_BYTES // itemsize * 32 * warps)
    if itemsize == 4:  # multiplied without matrix instructions, from registers
        return LANES.value
    return min(CHUNK.value, max(LANES.value, min(TILE_BYTES // (RP * itemsize), MAX_LOGITS // GP)))


def _warps(width: int) -> int:
    """For kernels with a row or a part of it in registers: 16 keys a thread."""
    return max(1, width // 512)


def _is_current(device: torch.device) -> bool:
    """Triton launches on the current device."""
    return device.type != "cuda" or device.index == torch.cuda.current_device()


def _stream(device: torch.device) -> int:
    return triton.runtime.driver.active.get_current_stream(device.index) if device.type == "cuda" else 0


def run(plan: Plan, call: Arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Results as `reference.decode_reference` gives them.  Values of `length` and `start` out of range are clamped.

    Raises RuntimeError for memory that has been freed.
    """
    if _is_current(call.query.device):
        return _run(plan, call)
    with torch.cuda.device(call.query.device):
        return _run(plan, call)


def _run(plan: Plan, call: Arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    query, key, key_components, value, value_sum, length, start, mask, counts = tensors_of(call)
    batch, _, query_length, _ = shape = query.shape
    device, k_max, num_kv_heads = query.device, plan.sizes.k_max, key.shape[1]
    output = torch.empty(shape, dtype=query.dtype, device=device)
    alpha = torch.empty(shape[:3], dtype=torch.float32, device=device)
    lse = torch.empty_like(alpha)
    scratch = torch.empty(plan.scratch_bytes, dtype=torch.uint8, device=device)
    positions = length
    if call.return_positions:
        positions = torch.full((plan.sizes.N, k_max), -1, dtype=torch.int32, device=device)

    # Kernels take pointers always; those that stand for nothing are never read.
    tensors = [
        query,
        key,
        key_components,
        value,
        value_sum,
        length,
        length if start is None else start,
        length if mask is None else mask,
        length if counts is None else counts,
        positions,
        output,
        alpha,
        lse,
    ]
    addresses = [x.data_ptr() for x in tensors]
    first = scratch.data_ptr()
    kind = kind_of([*addresses, first], [*tensors, scratch])
    if kind is None or 0 in addresses:
        check_memory(call, tensors_of)
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
        return output, alpha, scratch.new_empty((batch, num_kv_heads, query_length, 0), dtype=torch.int64), lse
    by_head = positions.view(batch, query_length, num_kv_heads, k_max).transpose(1, 2)
    return output, alpha, by_head.to(torch.int64, memory_format=torch.contiguous_format), lse


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


_appends: dict[tuple[object, ...], Launch] = {}  # by layout; of `extend_sum`, too


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
        new_key,
        new_value,
        call.key if call.position is None else call.position,
    )
    launch = _appends.get(layout)
    if launch is None:
        constants = {"HAS_POSITION": call.position is not None, "HAS_SUM": call.value_sum is not None}
        launch = _held(layout, append_kernel, APPENDED, tensors, call.key, constants)
    _start(launch, call, tensors, call.offset)


def extend_sum(call: ExtendArguments, layout: tuple[object, ...]) -> None:
    """For arguments that have been checked; `layout` as `check_extending` gives it.

    Raises RuntimeError for memory that has been freed.
    """
    launch = _appends.get(layout)
    if launch is None:
        launch = _held(layout, extend_sum_kernel, EXTENDED, call, call.value, {})
    _start(launch, call, call, 0)


# What the kernels' pointers and strides are called, tensor by tensor.
DECODED = {
    "query": ("query_batch", "query_head", "query_position"),
    "key": ("key_batch", "key_head", "key_position"),
    "components": ("components_batch", "components_head", "components_block"),
    "value": ("value_batch", "value_head", "value_position"),
    "value_sum": ("sum_batch", "sum_head"),
    "length": ("length_stride",),
    "start": ("start_stride",),
    "mask": ("mask_stride",),
}
APPENDED = {
    "keys": ("keys_batch", "keys_head", "keys_position"),
    "values": ("values_batch", "values_head", "values_position"),
    "components": ("components_batch", "components_head", "components_block"),
    "value_sum": ("sum_batch", "sum_head"),
    "new_key": ("new_key_batch", "new_key_head"),
    "new_value": ("new_value_batch", "new_value_head"),
    "position": ("position_stride",),
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
        for stride, size in zip(strides, x.stride(), strict=False)
    }


def _held(
    layout: tuple[object, ...],
    kernel: Any,
    names: Mapping[str, tuple[str, ...]],
    tensors: Sequence[Tensor],
    storage: Tensor,
    constants: dict[str, bool],
) -> Launch:
    """A launch for every row and head of a storage [B, Hkv, capacity, d], kept for calls of that layout."""
    batch, heads, capacity, head_dim = storage.shape
    sizes = {"capacity": capacity, "Hkv": heads, "D": head_dim, "DP": triton.next_power_of_2(head_dim), "offset": 0}
    values = _strides(names, tensors) | sizes
    pointers = {
        name: (place, torch.uint8 if x.dtype == torch.bool else x.dtype)
        for place, (name, x) in enumerate(zip(names, tensors, strict=True))
    }
    if len(_appends) >= MAX_HELD:
        _appends.clear()
    launch = Launch(kernel, (batch * heads,), values | constants, pointers, storage.device, "offset", num_warps=1)
    _appends[layout] = launch
    return launch


def _start(launch: Launch, call: Any, tensors: Sequence[Tensor], changed: int) -> None:
    addresses = [x.data_ptr() for x in tensors]
    kind = kind_of(addresses, tensors)
    if kind is None or 0 in addresses:
        check_memory(call, itemgetter(slice(len(tensors))))

    def tensor(place: int) -> Tensor:
        return _as_bytes(tensors[place])

    device = tensors[0].device
    if _is_current(device):
        launch(addresses, kind, _stream(device), tensor, changed)
    else:
        with torch.cuda.device(device):
            launch(addresses, kind, _stream(device), tensor, changed)


def _as_bytes(x: Tensor) -> Tensor:
    """What Triton is to take for a pointer: truth values are bytes to it."""
    return x.view(torch.uint8) if x.dtype == torch.bool else x
