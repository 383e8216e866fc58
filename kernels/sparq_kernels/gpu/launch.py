"""Which kernels run, in what sizes, on what scratch memory: the only place where that is decided.

Everything follows from shapes and the device's number of multiprocessors, never from a value on the device and never
from a trial run.  So nothing waits for the GPU, a step can be captured in a CUDA graph, and no token is spent on
autotuning.  What is compiled into a kernel (`tl.constexpr`) does not change while a cache grows, except where a row
outgrows `FUSED_WIDTHS`, `SELECT_WIDTHS` or `LONG_ROW`.

The numbers below follow from registers, shared memory and bytes in flight, as the compiler reports them
(tests/kernels/test_gpu_compiled.py).  None of them has been measured on a GPU yet.

Scratch memory is allocated per call, from PyTorch's caching allocator: that is a cache per device and stream, known to
CUDA graphs, and never shared by two streams.  No kernel expects it to be initialised.
"""

from __future__ import annotations

import contextlib
import functools
import os
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..append import AppendArguments
from ..arguments import Arguments
from .append import append as append_kernel
from .attention import gather
from .fused import fused as fused_kernel
from .rows import CHUNK, INFO, count_masked
from .scoring import score
from .selection import BINS, candidates, choose, histogram, select
from .topk import MAX_KEYS

PROGRAMS_PER_MULTIPROCESSOR = 4  # of `score`: enough loads in flight; `gather` has half, its merge reads all parts
MAX_SPLITS = 64
TILE_BYTES = 16384  # of components per stage
MAX_LOGITS = 8192  # of a tile, of all queries of the group
ROW_BYTES = 8192  # of K, and of V, per stage
FUSED_WIDTHS = (4096, 8192)  # longest rows of the fused kernel
SELECT_WIDTHS = (4096, 8192)  # longest rows of `select`: with 16384 keys a program had to spill
LONG_ROW = 1 << 18  # from here on parts of the distributed selection are 8192 positions, not 4096
HISTOGRAM_ROWS = 16
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
OPTIONS = {"enable_fp_fusion": True}  # as it has always been: the default is going to change
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class Plan(NamedTuple):
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
    common: dict[str, Any]  # compile-time constants of `fused`, `score` and `gather`
    scoring: dict[str, Any]  # of `fused` and `score`
    attending: dict[str, Any]  # of `fused` and `gather`


def plan(call: Arguments) -> Plan:
    """For arguments that have been checked and are float32, bfloat16 or float16.

    Raises ValueError for more positions than the selection can count.
    """
    batch, num_heads, query_length, D = call.query.shape
    _, num_kv_heads, cached, _ = call.key.shape
    if cached > MAX_KEYS:
        raise ValueError(f"key must hold at most {MAX_KEYS} positions on a GPU, got {cached}")
    N, G = batch * query_length * num_kv_heads, num_heads // num_kv_heads
    # Matrix instructions want 16 rows; a single query is multiplied without them.
    GP = 1 if G == 1 else max(16, triton.next_power_of_2(G))
    DP, RP = max(16, triton.next_power_of_2(D)), max(16, triton.next_power_of_2(call.r))
    itemsize, amd = call.query.element_size(), torch.version.hip is not None
    units = multiprocessors(call.query.device)
    programs = _power_of_2_up_to(PROGRAMS_PER_MULTIPROCESSOR * units // N)

    widths = FUSED_WIDTHS[:1] if amd else FUSED_WIDTHS  # 64 kB of shared memory are too few for the wider one
    fused = N >= 2 * units and cached <= widths[-1]
    fitting = [width for width in (widths if fused else SELECT_WIDTHS) if cached <= width]
    return Plan(
        N=N,
        k_max=call.k_max,
        chunks=triton.cdiv(cached, CHUNK.value),
        fused=fused,
        select_width=fitting[0] if fitting else 0,
        part_width=4096 if cached < LONG_ROW else 8192,
        splits=min(MAX_SPLITS, programs),
        parts=min(MAX_SPLITS, max(1, programs // 2)),
        warps=4 if GP <= 32 else 8,
        common={
            "G": G,
            "D": D,
            "GP": GP,
            "DP": DP,
            **OPTIONS,
            "STAGES": 3 if itemsize == 2 and not amd else 2,
            "DOT": tl.float32 if INTERPRETED else DTYPES[call.query.dtype],  # no bfloat16 product there
            "HAS_SOFTCAP": call.softcap is not None,
        },
        scoring={
            "R": call.r,
            "RP": RP,
            "TILE": min(CHUNK.value, max(16, min(TILE_BYTES // (RP * itemsize), MAX_LOGITS // GP))),
            "HAS_START": call.start is not None,
            "HAS_MASK": call.mask is not None,
        },
        attending={"ROWS": min(32, max(16, ROW_BYTES // (DP * itemsize))), "MEAN_VALUE": call.mean_value},
    )


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 16


def _power_of_2_up_to(number: int) -> int:
    return 1 << max(0, number.bit_length() - 1)


def _warps(width: int) -> int:
    """For kernels with a row or a part of it in registers: 16 keys a thread."""
    return max(1, width // 512)


def run(plan: Plan, call: Arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Results as `reference.decode_reference` gives them.  Values of `length` and `start` out of range are clamped."""
    with _current(call.query.device):
        return _run(plan, call)


def append(call: AppendArguments) -> None:
    """For arguments that have been checked."""
    batch, heads, capacity, head_dim = call.key.shape
    new_key = call.new_key if call.new_key.stride(3) == 1 else call.new_key.contiguous()
    new_value = call.new_value if call.new_value.stride(3) == 1 else call.new_value.contiguous()
    value_sum = call.key if call.value_sum is None else call.value_sum
    position = call.key if call.position is None else call.position
    with _current(call.key.device):
        append_kernel[(batch * heads,)](
            new_key,
            *new_key.stride()[:2],
            new_value,
            *new_value.stride()[:2],
            call.key,
            *call.key.stride()[:3],
            call.value,
            *call.value.stride()[:3],
            call.key_components,
            *call.key_components.stride()[:3],
            value_sum,
            *value_sum.stride()[:2],
            position,
            position.stride(0),
            call.offset,
            capacity,
            heads,
            D=head_dim,
            DP=triton.next_power_of_2(head_dim),
            HAS_POSITION=call.position is not None,
            HAS_SUM=call.value_sum is not None,
            num_warps=1,
            **OPTIONS,
        )


def _current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def _run(plan: Plan, call: Arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    query, key, value, length = call.query, call.key, call.value, call.length
    batch, _, query_length, _ = query.shape
    N, G, chunks = plan.N, plan.common["G"], plan.chunks
    num_kv_heads, cached = key.shape[1], key.shape[2]

    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    alpha = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    if call.return_positions:
        positions = torch.full((N, plan.k_max), -1, dtype=torch.int32, device=query.device)
    else:
        positions = torch.empty((N, plan.k_max), dtype=torch.int32, device=query.device)
    logits = torch.empty(N * G * chunks * CHUNK.value, dtype=torch.float32, device=query.device)

    # Kernels take pointers always; those that stand for nothing are never read.
    start = length if call.start is None else call.start
    mask = length if call.mask is None else call.mask.view(torch.uint8)
    counts = length
    local = -1 if call.local is None else call.local
    budget = (min(call.k, cached), min(call.k_divisor or 0, cached + 1), min(local, cached))
    rows = (length, length.stride(0), start, start.stride(0), mask, mask.stride(0))
    if call.mask is not None:
        counts = torch.empty((batch * query_length, 2), dtype=torch.int32, device=query.device)
        count_masked[(batch * query_length,)](
            counts,
            *rows,
            query_length,
            cached,
            *budget,
            HAS_START=plan.scoring["HAS_START"],
            TILE=4096,
            num_warps=8,
            **OPTIONS,
        )
    scalars = (call.softmax_scale, call.softcap or 0.0)
    query_arguments = (query, *query.stride()[:3])
    components_arguments = (call.key_components, *call.key_components.stride()[:3])
    value_arguments = (value, *value.stride()[:3], call.value_sum, *call.value_sum.stride()[:2])

    if plan.fused:
        fused_kernel[(N,)](
            *query_arguments,
            key,
            *key.stride()[:3],
            *components_arguments,
            *value_arguments,
            *rows,
            counts,
            logits,
            positions,
            output,
            alpha,
            lse,
            num_kv_heads,
            query_length,
            cached,
            *budget,
            plan.k_max,
            chunks,
            *scalars,
            WIDTH=plan.select_width,
            **plan.common,
            **plan.scoring,
            **plan.attending,
            num_warps=_warps(plan.select_width),
        )
    else:
        stats = torch.empty(N * 2 * G * plan.splits, dtype=torch.float32, device=query.device)
        info = torch.empty(N * (INFO + 1), dtype=torch.int32, device=query.device)
        ticket = info[N * INFO :]
        score[(N, plan.splits)](
            *query_arguments,
            *components_arguments,
            *rows,
            counts,
            logits,
            stats,
            info,
            ticket,
            num_kv_heads,
            query_length,
            cached,
            *budget,
            chunks,
            *scalars,
            SPLITS=plan.splits,
            **plan.common,
            **plan.scoring,
            num_warps=plan.warps,
        )
        _select(plan, call, logits, stats, info, mask, positions, num_kv_heads)
        partial = torch.empty(N * plan.parts * G * (3 + plan.common["DP"]), dtype=torch.float32, device=query.device)
        gather[(N, plan.parts)](
            *query_arguments,
            key,
            *key.stride()[:3],
            *value_arguments,
            mask,
            mask.stride(0),
            logits,
            stats,
            info,
            ticket,
            positions,
            partial[N * plan.parts * G * plan.common["DP"] :],
            partial,
            output,
            alpha,
            lse,
            num_kv_heads,
            query_length,
            plan.k_max,
            chunks,
            *scalars,
            SPLITS=plan.splits,
            PARTS=plan.parts,
            HAS_MASK=call.mask is not None,
            **plan.common,
            **plan.attending,
            num_warps=plan.warps,
        )
    if not call.return_positions:
        return output, alpha, positions.new_empty((batch, num_kv_heads, query_length, 0), dtype=torch.int64), lse
    by_head = positions.view(batch, query_length, num_kv_heads, plan.k_max).transpose(1, 2)
    return output, alpha, by_head.to(torch.int64, memory_format=torch.contiguous_format), lse


def _select(
    plan: Plan,
    call: Arguments,
    logits: Tensor,
    stats: Tensor,
    info: Tensor,
    mask: Tensor,
    positions: Tensor,
    num_kv_heads: int,
) -> None:
    N, query_length = plan.N, call.query.shape[2]
    keys_arguments = (logits, stats, info, mask, mask.stride(0))
    constants = {
        "G": plan.common["G"],
        "GP": plan.common["GP"],
        "SPLITS": plan.splits,
        "HAS_MASK": plan.scoring["HAS_MASK"],
    }
    if plan.select_width:
        select[(N,)](
            *keys_arguments,
            positions,
            num_kv_heads,
            query_length,
            plan.k_max,
            plan.chunks,
            WIDTH=plan.select_width,
            **constants,
            num_warps=_warps(plan.select_width),
            **OPTIONS,
        )
        return
    width = plan.part_width
    parts = triton.cdiv(call.key.shape[2], width)
    keys = torch.empty((2, N * plan.chunks * CHUNK.value), dtype=torch.int32, device=positions.device)
    counts = torch.empty(N * parts * (BINS + 2), dtype=torch.int32, device=positions.device)
    before = counts[N * parts * BINS :]
    shape = {"WIDTH": width, "num_warps": _warps(width), **OPTIONS}
    histogram[(N, parts)](
        *keys_arguments, keys[0], counts, num_kv_heads, query_length, plan.chunks, **constants, **shape
    )
    candidates[(N, parts)](info, keys[0], counts, keys[1], before, parts, plan.chunks, ROWS=HISTOGRAM_ROWS, **shape)
    choose[(N, parts)](info, keys[0], keys[1], before, positions, parts, plan.k_max, plan.chunks, **shape)
