"""What Triton makes of the GPU kernels, with no GPU: launches are recorded and compiled ahead of time.

    python benchmarks/compiled_kernels.py       # after a change that was meant: writes results/compiled-sm_90.json

A launch is specialised by Triton's own code, so what is compiled here is what would be compiled at run time. The file
holds registers, instructions and loops of some kernels by Triton's version; tests/kernels/test_gpu_compiled.py bounds
them, and `make gpu` shows them beside what a card reports.
"""

from __future__ import annotations

import argparse
import ast
import functools
import importlib
import json
import math
import re
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from gpu_stages.cases import S1, S2, S3
from sparq_kernels.append import AppendArguments, check_append
from sparq_kernels.arguments import Arguments
from sparq_kernels.encoding import EncodeArguments
from sparq_kernels.layout import GROUP, allocate_codes, allocate_components
from sparq_kernels.slots import SlotArguments, check_slots
from sparq_kernels.value_sum import ExtendArguments, check_extending
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

TRITON = tuple(int(number) for number in triton.__version__.split(".")[:2])
CAPACITY_STEP = 256  # of the plugin's cache
MULTIPROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304}
# Where the bulk of the bytes is read: module, function, and the pointer that the load begins with.
RECORD = Path(__file__).parent / "results" / "compiled-sm_90.json"
# What the record holds: the shapes that the attention benchmark begins with, as arguments of `empty_call`.
RECORDED_CASES: dict[str, dict[str, Any]] = {
    **{case.name: asdict(case.shape) for case in (S1, S2, S3)},
    **{f"{case.name}, four bits": {**asdict(case.shape), "index": "int4", "mass": 0.95} for case in (S1, S2, S3)},
    "one row, 8k": {"batch": 1, "cached": 8192, "r": 32, "k": 256},
    "one row, 64k, r = 16": {"batch": 1, "cached": 65536, "r": 16, "k": 4096},
}
STREAMS = {
    "components": ("scoring", "score_tiles", "runs"),
    "codes": ("coded", "score_coded", "runs"),
    "keys": ("attention", "attend", "key"),
    "values": ("attention", "attend", "value"),
    "sums of pages": ("attention", "sum_of_pages", "value_sum"),
    "a page's values": ("attention", "add_rows", "rows"),
    "rows": ("encoding", "encode_group", "rows"),
}


class Launch(NamedTuple):
    """One kernel launch as the host code asked for it."""

    kernel: JITFunction
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.__name__


class Specialised(NamedTuple):
    """What a launch is compiled for; `key` is equal for launches that share a binary."""

    kernel: JITFunction
    target: str
    key: str
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]

    def differing(self, other: Specialised) -> list[str]:
        """Parameters and options by which two specialisations of one kernel differ."""
        names = self.kernel.arg_names
        mine, others = self._described(), other._described()
        differing = sorted(place for place in mine.keys() | others.keys() if mine.get(place) != others.get(place))
        return [names[place[1]] if isinstance(place[1], int) else place[1] for place in differing]

    def _described(self) -> dict[tuple[str, Any], Any]:
        described: dict[tuple[str, Any], Any] = {("option", name): value for name, value in self.options.items()}
        for position, name in enumerate(self.kernel.arg_names):
            place = (position,)
            described["parameter", position] = (
                self.signature[name],
                str(self.constants.get(place)),
                str(self.attributes.get(place)),
            )
        return described


class Resources(NamedTuple):
    registers: int
    spilled: int  # bytes on NVIDIA, registers on AMD
    shared: int  # bytes


class Load(NamedTuple):
    stream: str  # of STREAMS
    instruction: str
    width: int  # bytes a thread reads


def empty_call(
    batch: int = 1,
    num_heads: int = 32,
    num_kv_heads: int = 8,
    cached: int = 4096,
    head_dim: int = 128,
    dtype: torch.dtype = torch.float16,
    *,
    query_length: int = 1,
    r: int = 32,
    k: int = 128,
    start: bool = False,
    mask: bool = False,
    softcap: float | None = None,
    mean_value: bool = True,
    capacity: int | None = None,
    index: str = "full",
    mass: float | None = None,
    page: int | None = None,
) -> Arguments:
    """Arguments as the plugin's cache passes them, over memory that nothing ever touches; page: as an engine does."""
    capacity = -(-cached // CAPACITY_STEP) * CAPACITY_STEP if capacity is None else capacity

    def rows() -> torch.Tensor:
        return torch.empty((batch, num_kv_heads, capacity, head_dim), dtype=dtype)[:, :, :cached]

    stored = (batch, num_kv_heads, capacity, head_dim, dtype, "cpu")
    components, ranges = (allocate_components(*stored), None) if index == "full" else allocate_codes(*stored)
    call = Arguments(
        query=torch.empty((batch, query_length, num_heads, head_dim), dtype=dtype).transpose(1, 2),
        key=rows(),
        key_components=components,
        value=rows(),
        value_sum=torch.empty((batch, num_kv_heads, head_dim)),
        key_ranges=ranges,
        block_table=None,
        length=torch.empty(batch, dtype=torch.int64),
        start=torch.empty(batch, dtype=torch.int64) if start else None,
        mask=torch.empty((batch, cached), dtype=torch.bool) if mask else None,
        counts=None,
        r=r,
        k=k,
        k_divisor=None,
        local=None,
        mass=mass,
        k_min=1,
        dense_below=0,
        scale=None,
        softcap=softcap,
        mean_from=0.0 if mean_value else math.inf,
        return_positions=False,
    )
    return call if page is None else in_pages(call, page)


def in_pages(call: Arguments, page: int) -> Arguments:
    """The same with as many pages as its rows need."""
    batch, heads, cached, head_dim = call.key.shape
    each = -(-cached // page)

    def pages(*shape: int, dtype: torch.dtype = call.key.dtype) -> torch.Tensor:
        return torch.empty((batch * each, heads, *shape), dtype=dtype)

    coded = call.key_ranges is not None
    return call._replace(
        key=pages(page, head_dim),
        key_components=(
            pages(page // GROUP, head_dim, GROUP // 2, dtype=torch.uint8) if coded else pages(1, head_dim, page)
        ),
        value=pages(page, head_dim),
        value_sum=pages(head_dim, dtype=torch.float32),
        key_ranges=pages(page // GROUP, head_dim, 2) if coded else None,
        block_table=torch.empty((batch, each), dtype=torch.int32),
    )


def empty_append(
    batch: int = 1,
    num_kv_heads: int = 8,
    capacity: int = 4096,
    head_dim: int = 128,
    dtype: torch.dtype = torch.float16,
    *,
    position: int | None = 0,
    index: str = "full",
) -> AppendArguments:
    """A token for the end of a cache, or at a position of the device's own; untouched memory like the above."""
    call = empty_call(batch, num_kv_heads, num_kv_heads, capacity, head_dim, dtype, index=index)
    per_row = None if position is not None else call.length
    storage = (call.key, call.value, call.key_components, call.value_sum, call.key_ranges)
    return AppendArguments(*storage, call.query, call.query, per_row, position or 0)


def empty_slots(
    tokens: int = 1,
    num_kv_heads: int = 8,
    page: int = 256,
    head_dim: int = 128,
    dtype: torch.dtype = torch.float16,
    *,
    index: str = "full",
) -> SlotArguments:
    """Tokens for pages, slices of one projection as an engine has them; untouched memory like the above."""
    call = empty_call(1, num_kv_heads, num_kv_heads, 16 * page, head_dim, dtype, index=index, page=page)
    storage = (call.key, call.value, call.key_components, call.value_sum, call.key_ranges)
    new_key, new_value = torch.empty((tokens, 2 * num_kv_heads, head_dim), dtype=dtype).chunk(2, 1)
    return SlotArguments(*storage, new_key, new_value, torch.empty(tokens, dtype=torch.int64))


class _Recorder:
    def __init__(self, kernel: JITFunction, launches: list[Launch]) -> None:
        self.kernel = kernel
        self.launches = launches

    @property
    def arg_names(self) -> list[str]:
        return self.kernel.arg_names

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments, **options: self.launches.append(Launch(self.kernel, grid, arguments, options))


def empty_extension(
    batch: int = 1, num_kv_heads: int = 8, capacity: int = 4096, head_dim: int = 128, dtype: torch.dtype = torch.float16
) -> ExtendArguments:
    """A token to be added to a static cache's sum of V; untouched memory like the above."""
    call = empty_call(batch, num_kv_heads, num_kv_heads, capacity, head_dim, dtype, mask=True)
    assert call.mask is not None
    return ExtendArguments(call.value_sum, call.mask.clone(), call.value, call.mask, call.length)


def empty_encoding(
    batch: int = 1, num_kv_heads: int = 8, cached: int = 4096, head_dim: int = 128, dtype: torch.dtype = torch.float16
) -> EncodeArguments:
    """A prompt's keys to be coded; untouched memory like the above."""
    call = empty_call(batch, num_kv_heads, num_kv_heads, cached, head_dim, dtype, index="int4")
    assert call.key_ranges is not None
    return EncodeArguments(call.key, call.key_components, call.key_ranges, 0, cached)


def record(
    module: ModuleType,
    call: Arguments | AppendArguments | SlotArguments | EncodeArguments | ExtendArguments,
    target: str,
    **forced: Any,
) -> list[Launch]:
    """The launches of `module` (`sparq_kernels.gpu.launch` or a copy of it) for one call on that device.

    forced: the variant and the sizes of `decode`'s plan."""
    launches: list[Launch] = []
    with ExitStack() as stack:
        real = module.Launch

        def recorded(kernel: JITFunction, *arguments: Any, **options: Any) -> Any:
            return real(_Recorder(kernel, launches), *arguments, **options)

        stack.enter_context(mock.patch.object(module, "Launch", recorded))
        stack.enter_context(mock.patch.object(module, "multiprocessors", lambda device: MULTIPROCESSORS[target]))
        stack.enter_context(mock.patch.dict(module._plans, clear=True))
        stack.enter_context(mock.patch.dict(module._appends, clear=True))
        stack.enter_context(mock.patch.object(module, "encode_kernel", _Recorder(module.encode_kernel, launches)))
        hip = "7.0" if target.startswith("gfx") else None
        stack.enter_context(mock.patch.object(torch.version, "hip", hip))
        if isinstance(call, Arguments):
            module.run(module.plan(call, **forced), call)
        elif isinstance(call, AppendArguments):
            module.append(call, check_append(call))
        elif isinstance(call, SlotArguments):
            module.append_slots(call, check_slots(call))
        elif isinstance(call, EncodeArguments):
            module.encode(call)
        else:
            module.extend_sum(call, check_extending(call))
    return launches


@functools.cache
def _target(name: str) -> GPUTarget:
    return GPUTarget("hip", name, 64) if name.startswith("gfx") else GPUTarget("cuda", int(name[3:]), 32)


@functools.cache
def _backend(target: str) -> Any:
    return make_backend(_target(target))


@functools.cache
def _binder(kernel: JITFunction, target: str) -> Any:
    return create_function_from_signature(kernel.signature, kernel.params, _backend(target))


def specialise(launch: Launch, target: str) -> Specialised:
    """As JITFunction.run does it."""
    kernel = launch.kernel
    bound, specialisation, options = _binder(kernel, target)(*launch.arguments, **launch.options)
    constexprs = [bound[parameter.name] for parameter in kernel.params if parameter.is_constexpr]
    runtime = [item for item in specialisation if item[0] != "constexpr"]
    key = f"{kernel.cache_key} {target} {constexprs} {runtime} {sorted(options.items())}"
    backend = _backend(target)
    parsed, *packed = kernel._pack_args(backend, dict(launch.options), bound, specialisation, options)
    return Specialised(kernel, target, key, *packed, parsed.__dict__)


_compiled: dict[str, Any] = {}


def compile_kernel(specialised: Specialised) -> Any:
    """Triton's CompiledKernel, built once a session."""
    if specialised.key not in _compiled:
        source = ASTSource(specialised.kernel, specialised.signature, specialised.constants, specialised.attributes)
        _compiled[specialised.key] = triton.compile(
            source, target=_target(specialised.target), options=specialised.options
        )
    return _compiled[specialised.key]


_resources: dict[str, Resources] = {}


def resources(specialised: Specialised) -> Resources:
    if specialised.key not in _resources:
        compiled = compile_kernel(specialised)
        measure = _amd_resources if specialised.target.startswith("gfx") else _nvidia_resources
        registers, spilled = measure(compiled, specialised.target)
        _resources[specialised.key] = Resources(registers, spilled, compiled.metadata.shared)
    return _resources[specialised.key]


def _nvidia_resources(compiled: Any, target: str) -> tuple[int, int]:
    ptx = compiled.asm["ptx"]
    architecture = _first(r"^\.target (\w+)", ptx)
    with tempfile.TemporaryDirectory(prefix="sparq-ptx-") as directory:
        source = Path(directory, "kernel.ptx")
        source.write_text(ptx)
        ptxas = get_ptxas(int(target[3:])).path
        command = [ptxas, "-v", f"--gpu-name={architecture}", str(source), "-o", str(source.with_suffix(".cubin"))]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilled = int(_first(r"(\d+) bytes spill stores", report)) + int(_first(r"(\d+) bytes spill loads", report))
    return int(_first(r"Used (\d+) registers", report)), spilled


def _amd_resources(compiled: Any, target: str) -> tuple[int, int]:
    assembly = compiled.asm["amdgcn"]
    return int(_first(r"\.vgpr_count:\s+(\d+)", assembly)), int(_first(r"\.vgpr_spill_count:\s+(\d+)", assembly))


def _first(pattern: str, text: str) -> str:
    found = re.search(pattern, text, re.MULTILINE)
    assert found, f"no {pattern!r} in {text[-500:]!r}"
    return found.group(1)


def stream_loads(specialised: Specialised) -> list[Load]:
    """Every instruction that reads K components, key rows or value rows, told by the source line it comes from."""
    lines = stream_lines(specialised.kernel.fn.__module__.rpartition(".")[0])
    compiled = compile_kernel(specialised)
    amd = specialised.target.startswith("gfx")
    assembly = compiled.asm["amdgcn" if amd else "ptx"]
    return [
        Load(lines[place], instruction, (_amd_width if amd else _nvidia_width)(instruction))
        for place, instruction in _global_loads(assembly)
        if place in lines
    ]


@functools.cache
def stream_lines(package: str) -> dict[tuple[str, int], str]:
    """(file name, line) -> stream, for the lines of the loads in STREAMS."""
    lines = {}
    for stream, (module, name, pointer) in STREAMS.items():
        function = getattr(importlib.import_module(f"{package}.{module}"), name)
        tree = ast.parse("".join(function.raw_src))
        found = [node for node in ast.walk(tree) if _is_load_of(node, pointer)]
        assert found, f"{name} has no tl.load({pointer}...)"
        for node in found:
            for line in range(node.lineno, (node.end_lineno or node.lineno) + 1):
                lines[f"{module}.py", function.starting_line_number - 1 + line] = stream
    return lines


def _is_load_of(node: ast.AST, pointer: str) -> bool:
    if not isinstance(node, ast.Call) or ast.unparse(node.func) != "tl.load":
        return False
    expression = node.args[0]
    while isinstance(expression, (ast.BinOp, ast.Subscript)):
        expression = expression.left if isinstance(expression, ast.BinOp) else expression.value
    return isinstance(expression, ast.Name) and expression.id == pointer


_LOAD = re.compile(r"(ld\.global\S*|cp\.async\.c[ag]\S*|(?:global|buffer)_load_\w+)\s[^;]*")


def _global_loads(assembly: str) -> Iterator[tuple[tuple[str, int], str]]:
    """((file name, line), instruction) of each load; inlined code carries the line of the function it came from."""
    # A binary from Triton's cache may name another checkout's path: the file's own name is what counts.
    files = {
        number: Path(name).name
        for number, name in re.findall(r'^\s*\.file\s+(\d+)\s.*?"([^"]+)"\s*(?:$|md5)', assembly, re.M)
    }
    place = ("", 0)
    for line in assembly.splitlines():
        if moved := re.match(r"\s*\.loc\s+(\d+)\s+(\d+)", line):
            place = (files.get(moved.group(1), ""), int(moved.group(2)))
        elif load := _LOAD.search(line):
            yield place, load.group(0).strip()


def _nvidia_width(instruction: str) -> int:
    if instruction.startswith("cp.async"):
        return int(_first(r"\],\s*(0x[0-9a-f]+|\d+)", instruction.split("],", 1)[1] + " "), 0)
    vector, bits = re.findall(r"\.(?:v(\d+)\.)?[bfus](\d+)\s", instruction)[0]
    return int(vector or 1) * int(bits) // 8


def _amd_width(instruction: str) -> int:
    opcode = instruction.split()[0]
    kind = re.sub(r"^(global|buffer)_load_(lds_)?", "", opcode)
    if wide := re.match(r"dwordx(\d+)$", kind):
        return 4 * int(wide.group(1))
    return {"dword": 4, "ushort": 2, "sshort": 2, "short": 2, "ubyte": 1, "sbyte": 1}[kind.split("_")[0]]


def narrow_loads(specialised: Specialised) -> list[Load]:
    return [load for load in stream_loads(specialised) if load.width < 16]


def streams_of(specialised: Specialised) -> set[str]:
    """What a kernel has to read in bulk."""
    names = specialised.kernel.arg_names
    coded, is_paged = (name in names and specialised.constants[names.index(name),] for name in ("CODED", "PAGED"))
    index, rows = {"codes" if coded else "components"}, {"keys", "values"}
    if is_paged:
        rows |= {"sums of pages", "a page's values"}
    completed = {"a page's values", "rows"} if coded else {"a page's values"}
    read = {"score": index, "gather": rows, "fused": index | rows, "complete_pages": completed}
    return read.get(specialised.kernel.__name__, set())


def distinct(launches: list[Specialised]) -> dict[str, list[Specialised]]:
    """By kernel name, one of each specialisation."""
    found: dict[str, dict[str, Specialised]] = defaultdict(dict)
    for specialised in launches:
        found[specialised.kernel.__name__].setdefault(specialised.key, specialised)
    return {name: list(of_name.values()) for name, of_name in found.items()}


def pointer_conversions(specialised: Specialised) -> list[str]:
    """Lines of Triton's GPU code that rearrange addresses inside a loop: through shared memory, in every turn."""
    found, loops = [], []  # loops: how far each one that is open is indented
    for line in compile_kernel(specialised).asm["ttgir"].splitlines():
        indent = len(line) - len(line.lstrip())
        while loops and indent <= loops[-1] and line.lstrip().startswith("}"):
            loops.pop()
        if re.search(r"\bscf\.(for|while)\b", line):
            loops.append(indent)
        elif loops and "convert_layout" in line and "!tt.ptr" in line:
            found.append(line.strip())
    return found


class Loop(NamedTuple):
    """An innermost loop of machine code."""

    instructions: int
    barriers: int


class Code(NamedTuple):
    """What an assembler has made of a kernel."""

    registers: int
    spilled: int
    instructions: int
    loops: list[Loop]  # in order

    @classmethod
    def of(cls, plain: dict[str, Any]) -> Code:
        """From what a JSON file holds."""
        return cls(**{**plain, "loops": [Loop(**loop) for loop in plain["loops"]]})

    def plain(self) -> dict[str, Any]:
        return {**self._asdict(), "loops": [loop._asdict() for loop in self.loops]}


def machine_code(specialised: Specialised) -> Code:
    """Of a kernel for NVIDIA."""
    with tempfile.TemporaryDirectory(prefix="sparq-cubin-") as directory:
        binary = Path(directory, "kernel.cubin")
        binary.write_bytes(compile_kernel(specialised).asm["cubin"])
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", str(binary)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label.group(1)] = len(instructions)
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(instruction.group(1))
    spans = []
    for end, instruction in enumerate(instructions):
        jump = re.search(r"\bBRA\b.*?`\((\.L_x_\d+)\)", instruction)
        begin = labels.get(jump.group(1), end) if jump else end
        # What is rarely needed stands behind the end and jumps back from there, which makes no loop.
        if begin < end and not any("EXIT" in each for each in instructions[begin:end]):
            spans.append((begin, end + 1))
    innermost = [(begin, end) for begin, end in sorted(set(spans)) if not any(begin <= b and e < end for b, e in spans)]
    loops = [
        Loop(end - begin, sum(bool(re.search(r"\bBAR\b", each)) for each in instructions[begin:end]))
        for begin, end in innermost
    ]
    used = resources(specialised)
    return Code(used.registers, used.spilled, len(instructions), loops)


def codes_of(case: str) -> dict[str, Code]:
    """By kernel name, for one of `RECORDED_CASES` on sm_90."""
    from sparq_kernels.gpu import launch

    launches = record(launch, empty_call(**RECORDED_CASES[case]), "sm_90")
    return {one.name: machine_code(specialise(one, "sm_90")) for one in launches}


def recorded() -> dict[str, Any]:
    """Triton's version (major.minor) -> case -> kernel -> `Code.plain`."""
    return json.loads(RECORD.read_text()) if RECORD.exists() else {}


def nearest_record() -> tuple[dict[str, dict[str, Code]], bool]:
    """Case -> kernel -> code, of the recorded version that is nearest to this Triton, and whether it is this one."""

    def distance(version: str) -> list[int]:
        return [abs(int(number) - own) for number, own in zip(version.split("."), TRITON, strict=True)]

    versions = recorded()
    nearest = min(versions, key=distance)
    cases = versions[nearest].items()
    codes = {case: {name: Code.of(code) for name, code in kernels.items()} for case, kernels in cases}
    return codes, not any(distance(nearest))


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    version = ".".join(map(str, TRITON))
    codes = {case: {name: code.plain() for name, code in codes_of(case).items()} for case in RECORDED_CASES}
    RECORD.write_text(json.dumps(recorded() | {version: codes}, indent=1) + "\n")
    for case, kernels in codes.items():
        for name, code in kernels.items():
            print(f"{case}: {name}: {code['registers']} registers, {code['instructions']} instructions")


if __name__ == "__main__":
    main()
