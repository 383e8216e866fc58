"""Stage `kernels`: the kernels that the other stages launch, compiled in parallel into the cache that they share.

Launches are recorded and specialised by Triton's own code, as compiled_kernels.py does it, for the card's architecture
and number of multiprocessors. From registers, shared memory and warps follows how many programs of a kernel a
multiprocessor holds at once; beside it stand the number that the plan launches, and what was expected.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import multiprocessing
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import compiled_kernels
import torch
import triton
from compiled_kernels import (
    Launch,
    empty_append,
    empty_call,
    empty_encoding,
    empty_extension,
    nearest_record,
    record,
    specialise,
)
from gpu_stages.cases import MEASURED, RACES, RACES_MASS
from gpu_stages.failures import reason
from gpu_stages.stage import Stage
from sparq_kernels.append import AppendArguments
from sparq_kernels.arguments import Arguments
from sparq_kernels.encoding import EncodeArguments
from sparq_kernels.gpu import launch
from sparq_kernels.value_sum import ExtendArguments
from tables import Grid
from workload import DTYPES

from sparq.index import KINDS

# Of a multiprocessor with sm_90; a block takes 1 kB of shared memory more than it asks for.
REGISTERS, SHARED, WARPS, PROGRAMS = 65536, 228 << 10, 64, 32
BLOCK_SHARED = 1 << 10
MOST_PROCESSES = 32


@dataclass(frozen=True)
class Call:
    """One call of the operator, or of append, told by what it is made from: a process of its own makes it again."""

    name: str
    options: tuple[tuple[str, Any], ...]
    kind: str = "decode"

    def launches(self, target: str) -> list[Launch]:
        return record(launch, self._arguments(), target)

    def _arguments(self) -> Arguments | AppendArguments | EncodeArguments | ExtendArguments:
        options = dict(self.options)
        options["dtype"] = DTYPES[options["dtype"]]
        if self.kind == "append":
            token = empty_append(**options)
            return token if token.position is None else token._replace(value_sum=None)  # a static cache adds by itself
        if self.kind == "encode":
            return empty_encoding(**options)
        if self.kind == "extend_sum":
            extension = empty_extension(**options)
            return extension._replace(length=of_all_rows(extension.length))
        k_divisor, is_static = options.pop("k_divisor", None), options.pop("is_static", False)
        call = empty_call(mask=is_static, **options)._replace(k_divisor=k_divisor)
        return call._replace(length=of_all_rows(call.length)) if is_static else call


def of_all_rows(length: torch.Tensor) -> torch.Tensor:
    """A static cache has one length for all rows."""
    return length[:1].expand(length.shape[0])


def call(name: str, kind: str = "decode", /, **options: Any) -> Call:
    return Call(name, tuple(options.items()), kind)


def attention_calls() -> Iterator[Call]:
    """Stages `races` and `attention`."""
    for case, dtype in MEASURED:
        shape = asdict(case.shape)
        yield call(f"{case.name} {dtype}", dtype=dtype, capacity=case.shape.cached, **shape)
        if case.shape.index == "int4":
            keys = {name: shape[name] for name in ("batch", "num_kv_heads", "cached", "head_dim")}
            yield call(f"{case.name} {dtype}", "encode", dtype=dtype, **keys)
    for case, dtype in RACES:
        if case.shape.index == "int4":
            knobs = dict(capacity=case.shape.cached, mass=RACES_MASS, **asdict(case.shape))
            yield call(f"{case.name} {dtype}, mass", dtype=dtype, **knobs)


def generation_calls() -> Iterator[Call]:
    """Stage `generation`, as the plugin's cache calls the operator; what this misses is compiled there."""
    for head_dim, cached, batch in itertools.product((64, 128), (16384, 131072), (1, 8)):
        common = dict(batch=batch, num_heads=32, num_kv_heads=8, head_dim=head_dim, dtype="bfloat16")
        knobs = dict(cached=cached, r=head_dim // 2, k=128, k_divisor=16, index="int4")
        for is_static in (False, True):
            kind = "static" if is_static else "dynamic"
            yield call(f"{kind} cache, d={head_dim}", is_static=is_static, **knobs, **common)
        shape = dict(batch=batch, num_kv_heads=8, capacity=cached, head_dim=head_dim, dtype="bfloat16")
        for position in (None, 1):
            yield call(f"append, d={head_dim}", "append", position=position, index="int4", **shape)
        # The tokens to come are room that no multiple of 16 is to be expected of.
        yield call(f"sum of V, d={head_dim}", "extend_sum", **shape | {"capacity": cached + 1})
        keys = {name: common[name] for name in ("batch", "num_kv_heads", "head_dim", "dtype")}
        yield call(f"encode, d={head_dim}", "encode", cached=cached, **keys)


def tiny_calls() -> Iterator[Call]:
    small = dict(batch=1, num_heads=4, num_kv_heads=4, cached=256, head_dim=32, r=16, k=16)
    yield call("tiny", dtype="float16", **small)


@dataclass
class Job:
    """One binary: the call and the number of its launch by which a process finds it."""

    kernel: str
    call: Call
    index: int
    cases: list[str] = field(default_factory=list)
    programs: list[int] = field(default_factory=list)  # of the grid, by case


def jobs_of(calls: Iterator[Call], target: str) -> list[Job]:
    jobs: dict[str, Job] = {}
    for one in calls:
        for index, found in enumerate(one.launches(target)):
            job = jobs.setdefault(specialise(found, target).key, Job(found.name, one, index))
            job.cases.append(one.name)
            job.programs.append(math.prod(found.grid))
    # The longest to compile first, so that no process is left alone with it at the end.
    return sorted(jobs.values(), key=lambda job: job.kernel not in ("fused", "gather", "score"))


def build(number: int, job: Job, target: str, multiprocessors: int) -> tuple[int, dict[str, Any]]:
    """In a process of its own."""
    compiled_kernels.MULTIPROCESSORS[target] = multiprocessors
    started = time.perf_counter()
    try:
        one = specialise(job.call.launches(target)[job.index], target)
        used = compiled_kernels.resources(one)
    except Exception as error:
        return number, {"failed": reason(error)}
    warps = one.options["num_warps"]
    return number, {**used._asdict(), "warps": warps, "seconds": time.perf_counter() - started}


def resident(registers: int, shared: int, warps: int) -> int:
    """Programs that one multiprocessor holds at once."""
    per_warp = -(-registers // 8) * 8 * 32
    by_registers = REGISTERS // per_warp // 4 * 4 // warps  # each of its four parts has a quarter of them
    return min(by_registers, SHARED // (shared + BLOCK_SHARED), WARPS // warps, PROGRAMS)


def build_test(name: str, dtype_name: str, target: str, multiprocessors: int) -> int:
    """The kernels of one case of tests/kernels/test_gpu.py, all ways and indices; how many. In a process of its own."""
    from tests.kernels.cases import CASES, call_of, make_case
    from tests.kernels.test_gpu import WAYS

    compiled_kernels.MULTIPROCESSORS[target] = multiprocessors
    found = {}
    for index, forced in itertools.product(KINDS, WAYS.values()):
        call = call_of(make_case(dtype=DTYPES[dtype_name], index=index, **CASES[name]))
        # As they lie when they have been copied to the card.
        there = [x.clone() if isinstance(x, torch.Tensor) else x for x in call]
        for one in record(launch, type(call)(*there), target, **forced):
            specialised = specialise(one, target)
            found[specialised.key] = compiled_kernels.compile_kernel(specialised)
    return len(found)


def cases_of_tests(stage: Stage) -> list[tuple[str, str]]:
    """Those that the tests' stage would otherwise compile by the way: the many small ones."""
    from tests.kernels.cases import CASES

    every = list(itertools.product(CASES, ("float16", "float32", "bfloat16")))
    return every[:1] if stage.is_dry else every


def target_of(stage: Stage) -> tuple[str, int]:
    """Architecture and multiprocessors: the card's, or an H100's."""
    if stage.is_dry:
        return "sm_90", compiled_kernels.MULTIPROCESSORS["sm_90"]
    current = triton.runtime.driver.active.get_current_target()
    target = current.arch if current.backend == "hip" else f"sm_{current.arch}"
    return target, torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count


def main(stage: Stage) -> None:
    target, multiprocessors = target_of(stage)
    compiled_kernels.MULTIPROCESSORS[target] = multiprocessors
    calls = tiny_calls() if stage.is_dry else itertools.chain(attention_calls(), generation_calls())
    jobs = jobs_of(calls, target)
    rows: list[dict[str, Any]] = [
        {"kernel": job.kernel, "cases": job.cases, "programs": job.programs, "registers": None} for job in jobs
    ]
    processes = min(MOST_PROCESSES, len(jobs), len(os.sched_getaffinity(0)))
    stage.save(target=target, multiprocessors=multiprocessors, processes=processes)
    # Processes that know nothing of the card: a fork of this one, which does, could not use it, nor die in peace.
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        ask = functools.partial(pool.apply_async, build)
        waiting = [ask((number, job, target, multiprocessors)) for number, job in enumerate(jobs)]
        cases = cases_of_tests(stage)
        tests = [pool.apply_async(build_test, (*case, target, multiprocessors)) for case in cases]
        for result in waiting:
            try:
                number, found = result.get(timeout=max(0.0, stage.left()))
            except multiprocessing.TimeoutError:
                continue
            rows[number].update(found)
            report(stage, rows)
        for result in tests:
            # What is not compiled here, or cannot be, the tests say.
            with contextlib.suppress(Exception):
                result.get(timeout=max(0.0, stage.left()))
                stage.content["test cases"] = stage.content.get("test cases", 0) + 1
    stage.content["of test cases"] = len(cases)
    report(stage, rows)


def report(stage: Stage, rows: list[dict[str, Any]]) -> None:
    multiprocessors = stage.content["multiprocessors"]
    built = [row for row in rows if row["registers"] is not None]
    for row in built:
        used = (row["registers"], row["shared"], row["warps"])
        row["resident"] = resident(*used) if stage.content["target"] == "sm_90" else 0  # 0: not known
        row["launched"] = [programs / multiprocessors for programs in row["programs"]]
    failed = [row for row in rows if "failed" in row]
    spilling = [row for row in built if row["spilled"]]
    seconds = sum(row["seconds"] for row in built)
    said = f"{len(built)} of {len(rows)} kernels for {stage.content['target']}, {seconds:.0f} s of compiling"
    if "of test cases" in stage.content:
        said += f"; those of {stage.content.get('test cases', 0)} of {stage.content['of test cases']} test cases"
    stage.set_tables(grid(built))
    stage.save(
        rows=rows,
        wrong=[f"{row['kernel']} of {row['cases'][0]} cannot be compiled: {row['failed']}" for row in failed],
        notes=[f"{row['kernel']} of {row['cases'][0]} spills {row['spilled']} bytes" for row in spilling],
        said=said + (f", {len(spilling)} spill" if spilling else ", none spills"),
    )


def expected_registers() -> dict[str, int]:
    """By kernel, the most that any had when they were last compiled for sm_90 with no GPU at hand."""
    found: dict[str, int] = {}
    for kernels in nearest_record()[0].values():
        for name, code in kernels.items():
            found[name] = max(found.get(name, 0), code.registers)
    return found


def grid(built: list[dict[str, Any]]) -> Grid:
    """By kernel, the worst of its binaries."""
    all_expected = expected_registers()
    lines: list[tuple[str, ...]] = []
    for name in dict.fromkeys(row["kernel"] for row in built):
        rows = [row for row in built if row["kernel"] == name]
        worst = min(rows, key=lambda row: row["resident"])
        launched = [programs for row in rows for programs in row["launched"]]
        expected = all_expected.get(name)
        holds = "" if expected is None else str(resident(expected, worst["shared"], worst["warps"]))
        lines.append(
            (
                name,
                str(len(rows)),
                str(max(row["registers"] for row in rows)),
                "" if expected is None else str(expected),
                str(max(row["spilled"] for row in rows)),
                f"{max(row['shared'] for row in rows) / 1024:.0f}",
                str(worst["resident"]),
                holds,
                f"{min(launched):.1f}–{max(launched):.1f}",
            )
        )
    columns = (
        "kernel",
        "binaries",
        "registers",
        "expected",
        "spilled bytes",
        "shared kB",
        "programs an SM holds",
        "expected",
        "launched per SM",
    )
    return Grid("Kernels as compiled, the most that any binary takes", columns, lines, left=1)
