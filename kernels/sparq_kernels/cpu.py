"""The CPU kernel: compiled for the machine it runs on at first use, cached, and called through a plain C interface.

Not `torch.utils.cpp_extension`: this kernel needs pointers and sizes only.  Without torch's headers it compiles in
about 6 seconds instead of 40, needs neither ninja nor Python's headers, and survives a change of torch's ABI.  Its
threads are OpenMP's, linked against the runtime that torch has already loaded, so both share one pool, which is also
what `at::parallel_for` uses.  Only where that runtime is not the compiler's kind (Clang beside a torch that brought
GCC's) there are two pools.

What the dispatcher calls in Python's place (csrc/operator.cpp) needs torch's headers, of which a few are enough, and is
a library of its own: where it cannot be had, everything goes on through Python.

Environment: CXX chooses the compiler, SPARQ_CXXFLAGS adds flags, SPARQ_CACHE_DIR moves the cache (default
~/.cache/sparq_kernels, or where that cannot be written a folder in the temporary directory), SPARQ_BACKEND=reference
leaves the kernel unused.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import struct
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .arguments import Arguments, tensors_of
from .layout import BLOCK, GROUP
from .reference import Results

log = logging.getLogger("sparq.kernels")

SOURCES = Path(__file__).parent / "csrc"
SOURCE, FILES = SOURCES / "decode.cpp", sorted(SOURCES.iterdir())
OPERATOR = SOURCES / "operator.cpp"
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# csrc/arguments.h in two parts: what changes with every call, and what does not.
POINTERS = struct.Struct("@15Pq")
POINTERS_READ = 10  # of them; those of `Arguments`, in its order, `counts` apart
LAYOUT = struct.Struct("@37q4d")
ENCODING = struct.Struct("@3P14q")
SLOTS = struct.Struct("@8P27q")


class CompilerError(Exception):
    """The kernel could not be built; the text says why."""


def backend() -> str:
    """ "cpp" or "reference"; compiles the kernel if that has not happened yet."""
    return "reference" if kernel() is None else "cpp"


@functools.cache
def kernel() -> ctypes.CDLL | None:
    """The compiled functions, or None (with one warning) when they cannot be had."""
    if os.environ.get("SPARQ_BACKEND") == "reference":
        return None
    try:
        library = load(build())
    except (CompilerError, OSError) as error:
        warnings.warn(
            f"sparq_kernels: no CPU kernel. The operator runs the PyTorch reference, slower than dense attention, so "
            f"that patched models stay dense. {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    if not library.sparq_has_threads():
        warnings.warn(
            "sparq_kernels: the C++ compiler has no OpenMP, so the CPU kernel runs on one thread however many "
            "PyTorch uses. Install one that has, for example: apt install g++, and delete "
            f"{cache_directory()}",
            RuntimeWarning,
            stacklevel=2,
        )
    serve(library)
    return library


def serve(library: ctypes.CDLL | None) -> None:
    """From now on the dispatcher calls that kernel without Python, where it has been called so before; None: never."""
    operator = operator_library()
    if operator is not None:
        operator.sparq_serve(None if library is None else ctypes.cast(library.sparq_decode, ctypes.c_void_p))


@functools.cache
def operator_library() -> ctypes.CDLL | None:
    """What the dispatcher calls in Python's place, or None (with one warning) when it cannot be had."""
    home = Path(torch.__file__).parent
    headers, suffix = home / "include", ".dylib" if sys.platform == "darwin" else ".so"
    options = (
        "-std=c++20",
        f"-I{headers}",
        f"-I{headers / 'torch/csrc/api/include'}",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
    )
    libraries = [str(home / "lib" / f"lib{name}{suffix}") for name in ("torch_cpu", "c10")]
    try:
        library = ctypes.CDLL(str(build_library("operator of the CPU", OPERATOR, FILES, options, libraries)))
        counts = (ctypes.c_int64 * 3)()
        library.sparq_operator_counts(counts)
        if tuple(counts) != (len(Arguments._fields), len(tensors_of(Arguments._fields)), POINTERS_READ):
            raise CompilerError("the operator does not have the arguments that cpu.py expects")
    except (CompilerError, OSError) as error:
        warnings.warn(
            "sparq_kernels: every call of the CPU kernel goes through Python, which costs about 50 us a layer and "
            f"token. {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    library.sparq_serve.argtypes, library.sparq_serve.restype = [ctypes.c_void_p], None
    library.sparq_approve.argtypes, library.sparq_approve.restype = [ctypes.c_char_p], None
    return library


def load(path: Path) -> ctypes.CDLL:
    """The functions of a compiled kernel.  Raises CompilerError, OSError."""
    library = ctypes.CDLL(str(path))
    library.sparq_arguments_size.restype = ctypes.c_int64
    library.sparq_encode_arguments_size.restype = ctypes.c_int64
    library.sparq_slot_arguments_size.restype = ctypes.c_int64
    sizes = (
        library.sparq_arguments_size(),
        library.sparq_encode_arguments_size(),
        library.sparq_slot_arguments_size(),
    )
    if sizes != (POINTERS.size + LAYOUT.size, ENCODING.size, SLOTS.size):
        raise CompilerError("the kernel's arguments do not have the size cpu.py expects")
    for function in (library.sparq_decode, library.sparq_encode, library.sparq_append_slots):
        function.argtypes = [ctypes.c_char_p]
        function.restype = ctypes.c_int64
    return library


class Plan(NamedTuple):
    """What one layout of arguments needs at every call."""

    layout: bytes  # csrc/arguments.h behind its pointers
    output_shape: tuple[int, int, int, int]
    positions_shape: tuple[int, int, int, int]


def plan(call: Arguments) -> Plan:
    """For arguments that have been checked and are float32, bfloat16 or float16."""
    batch, num_heads, query_length, head_dim = call.query.shape
    num_kv_heads = call.key.shape[1]
    layout = LAYOUT.pack(
        batch,
        num_kv_heads,
        num_heads // num_kv_heads,
        query_length,
        head_dim,
        call.capacity,
        BLOCK if call.block_table is None else call.key.shape[2],
        call.key.shape[0],
        *call.query.stride()[:3],
        *call.key.stride()[:3],
        *call.key_components.stride()[:4],
        *call.value.stride()[:3],
        *call.value_sum.stride()[:2],
        *((0, 0) if call.key_ranges is None else call.key_ranges.stride()[:2]),
        0 if call.block_table is None else call.block_table.stride(0),
        call.length.stride(0),
        0 if call.start is None else call.start.stride(0),
        0 if call.mask is None else call.mask.stride(0),
        DTYPE_CODES[call.query.dtype],
        call.r,
        call.k,
        call.k_divisor or 0,
        -1 if call.local is None else call.local,
        call.k_max,
        call.k_min,
        call.dense_below,
        call.softmax_scale,
        call.softcap or 0.0,
        call.mean_from,
        call.mass or 0.0,
    )
    positions_shape = (batch, num_kv_heads, query_length, call.k_max if call.return_positions else 0)
    return Plan(layout, (batch, num_heads, query_length, head_dim), positions_shape)


def run(plan: Plan, call: Arguments, addresses: list[int], as_given: bool) -> Results | None:
    """Results as `reference.decode_reference` gives them; None when a value of `length`, `start` or `block_table` is
    out of range.  addresses: of the call's tensors, as `check_memory` gives them.  as_given: that no tensor was copied
    for the kernel, so that the next call of this layout may go straight to it."""
    library = kernel()
    assert library is not None, "callers ask kernel() first"
    output = torch.empty(plan.output_shape, dtype=call.query.dtype)
    alpha = torch.empty(plan.output_shape[:3], dtype=torch.float32)
    lse = torch.empty(plan.output_shape[:3], dtype=torch.float32)
    positions = torch.empty(plan.positions_shape, dtype=torch.int64)
    read = torch.empty(plan.positions_shape[:3], dtype=torch.int32)
    pointers = POINTERS.pack(
        *addresses[:POINTERS_READ],
        output.data_ptr(),
        alpha.data_ptr(),
        positions.data_ptr(),  # null when empty
        lse.data_ptr(),
        read.data_ptr(),
        torch.get_num_threads(),
    )
    status = library.sparq_decode(pointers + plan.layout)
    if status == 0:
        operator = operator_library()
        if as_given and operator is not None:
            operator.sparq_approve(pointers + plan.layout)
        return output, alpha, positions, lse, read
    if status == 2:
        raise MemoryError("sparq_kernels: not enough memory for the CPU kernel's scratch")
    if status == 3:
        return None
    raise RuntimeError(f"sparq_kernels: the CPU kernel refused its arguments (status {status})")


def encode(call: Any) -> None:
    """Codes for `call`, an `encoding.EncodeArguments` that has been checked."""
    library = kernel()
    assert library is not None, "callers ask kernel() first"
    key, codes, ranges, begin, end = call
    batch, num_kv_heads, _, head_dim = key.shape
    arguments = ENCODING.pack(
        key.data_ptr(),
        codes.data_ptr(),
        ranges.data_ptr(),
        torch.get_num_threads(),
        batch,
        num_kv_heads,
        head_dim,
        *key.stride()[:3],
        *codes.stride()[:2],
        *ranges.stride()[:2],
        begin // GROUP,
        end // GROUP,
        DTYPE_CODES[key.dtype],
    )
    status = library.sparq_encode(arguments)
    if status:
        raise RuntimeError(f"sparq_kernels: the CPU kernel refused to encode (status {status})")


def append_slots(call: Any) -> None:
    """Write `call`, a `slots.SlotArguments` that has been checked."""
    library = kernel()
    assert library is not None, "callers ask kernel() first"
    key, value, components, value_sum, ranges, new_key, new_value, slots = call
    pages, num_kv_heads, page, head_dim = key.shape
    status = library.sparq_append_slots(
        SLOTS.pack(
            key.data_ptr(),
            value.data_ptr(),
            components.data_ptr(),
            value_sum.data_ptr(),
            0 if ranges is None else ranges.data_ptr(),
            new_key.data_ptr(),
            new_value.data_ptr(),
            slots.data_ptr(),
            torch.get_num_threads(),
            slots.shape[0],
            pages,
            num_kv_heads,
            page,
            head_dim,
            *key.stride()[:3],
            *value.stride()[:3],
            *components.stride()[:2],
            components.stride(3),
            *value_sum.stride()[:2],
            *((0, 0) if ranges is None else ranges.stride()[:2]),
            *new_key.stride(),
            *new_value.stride(),
            slots.stride(0),
            DTYPE_CODES[key.dtype],
        )
    )
    if status == 3:
        raise ValueError(f"slots must be below {pages * page}, which the pages have, got {slots.tolist()}")
    if status:
        raise RuntimeError(f"sparq_kernels: the CPU kernel refused to append (status {status})")


def library() -> Path:
    """Where `build` leaves the kernel's shared library, or finds it.  Raises CompilerError if there is no compiler."""
    return library_path(SOURCE, FILES)


def build() -> Path:
    """Path of the kernel's shared library; compiled if need be.  Raises CompilerError."""
    return build_library("CPU", SOURCE, FILES)


def library_path(source: Path, files: list[Path], options: Iterable[str] = ()) -> Path:
    """Where `build_library` leaves its result: a name of its own for these files, options, this compiler and this
    processor.  Raises CompilerError if there is no compiler."""
    key = hashlib.sha256()
    described = map(str.encode, [*find_compiler(), *compiler_options(options), *host()])
    for part in (*(file.read_bytes() for file in files), *described):
        key.update(part + b"\0")
    return cache_directory() / f"{source.stem}-{key.hexdigest()[:20]}.so"


def build_library(
    name: str, source: Path, files: list[Path], options: Iterable[str] = (), libraries: Iterable[str] = ()
) -> Path:
    """Path of the shared library for these files, options, this compiler and this processor; compiled if need be.

    name: what the kernel is called where its compiling is announced.  source: what is compiled.  files: all that it is
    made of.  options: for the compiler, besides $SPARQ_CXXFLAGS.  libraries: what it is linked to; what needs others
    computes nothing itself, and is compiled in the plainest way.  Raises CompilerError.
    """
    library = library_path(source, files, options)
    if library.exists():
        return library
    with locked(library.parent / "lock"):
        if not library.exists():  # another process may have built it meanwhile
            # Nothing for the program to mend, but half a minute that whoever waits should know of: logged as a warning.
            log.warning(f"sparq: compiling the {name} kernel, once for this machine: about 5 to 30 s ...")
            started = time.perf_counter()
            compile_library(find_compiler(), source, compiler_options(options), library, libraries)
            log.info(f"sparq: compiled in {time.perf_counter() - started:.1f} s: {library}")
    return library


def compiler_options(options: Iterable[str]) -> list[str]:
    """`options` and those of $SPARQ_CXXFLAGS."""
    return [*options, *shlex.split(os.environ.get("SPARQ_CXXFLAGS", ""))]


def find_compiler() -> list[str]:
    """The C++ compiler's command: $CXX, or the first of the usual names."""
    chosen = shlex.split(os.environ.get("CXX", ""))
    for command in [chosen] if chosen else [["c++"], ["g++"], ["clang++"]]:
        path = shutil.which(command[0])
        if path:
            return [path, *command[1:]]
    wanted = f"CXX={shlex.join(chosen)} does not exist" if chosen else "there is no C++ compiler (c++, g++ or clang++)"
    raise CompilerError(f"{wanted}. Install one, for example: apt install g++")


def host() -> list[str]:
    """What a library compiled with -march=native depends on besides its source."""
    description = [platform.machine(), platform.system(), torch.__version__]
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        wanted = ("model name", "flags", "Features", "CPU part")
        description += sorted({line for line in lines if line.startswith(wanted)})
    return description


def cache_directory() -> Path:
    """Where compiled kernels are kept: $SPARQ_CACHE_DIR, or the user's cache; where that cannot be written, a folder of
    the user's in the temporary directory."""
    chosen = os.environ.get("SPARQ_CACHE_DIR")
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
        directory = (Path(chosen) if chosen else home / "sparq_kernels").expanduser()
        directory.mkdir(parents=True, exist_ok=True)
        if os.access(directory, os.W_OK):
            return directory
    except (OSError, RuntimeError):  # a RuntimeError where nobody knows the user's home
        pass
    temporary = temporary_directory()
    if chosen:
        warnings.warn(
            f"sparq_kernels: SPARQ_CACHE_DIR={chosen} cannot be written, compiled kernels go to {temporary}",
            RuntimeWarning,
            stacklevel=2,
        )
    return temporary


@functools.cache
def temporary_directory() -> Path:
    """A folder in the temporary directory that nobody but this user can write to: what is loaded from it is code.

    One for all processes of the user, or else, with a warning, a new one for this process.
    """
    parent = Path(tempfile.gettempdir())
    if not hasattr(os, "getuid"):  # Windows
        reason = f"this system does not tell which folder in {parent} is of which user"
    else:
        directory = parent / f"sparq_kernels-{os.getuid()}"
        with contextlib.suppress(FileExistsError):
            directory.mkdir(mode=0o700)
        status = directory.lstat()  # of a symbolic link itself, which may be anybody's
        if not stat.S_ISDIR(status.st_mode):
            reason = f"{directory} is not a folder"
        elif status.st_uid != os.getuid():
            reason = f"{directory} is another user's"
        elif status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            reason = f"others may write to {directory}"
        else:
            return directory
    private = Path(tempfile.mkdtemp(prefix="sparq_kernels-"))
    warnings.warn(
        f"sparq_kernels: there is no safe place to keep compiled kernels: {reason}. Every process compiles its own, "
        f"this one in {private}. Set SPARQ_CACHE_DIR to a folder that only you can write to",
        RuntimeWarning,
        stacklevel=2,
    )
    return private


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a file lock: one process compiles, the others wait for its result."""
    with path.open("w") as file:
        with contextlib.suppress(ImportError):  # Windows: both compile, and the last replaces the first
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def compile_library(compiler: list[str], source: Path, extra: list[str], library: Path, linked: Iterable[str]) -> None:
    """Compile and move into place at once, so that no process ever loads half a file.

    Tried in this order, until one compiles and links: for this processor before any of its kind, with OpenMP before
    one thread.  Raises CompilerError with the first error.
    """
    native = ["-mcpu=native"] if platform.machine() in ("aarch64", "arm64") else ["-march=native"]
    common = ["-std=c++17", "-O3", "-fPIC", "-Wno-psabi"]
    openmp = [["-fopenmp"], ["-Xclang", "-fopenmp"]]  # Apple's compiler has OpenMP behind the second one only
    attempts = [
        *([*common, *processor, *threads] for processor in (native, []) for threads in openmp),
        [*common, *native],
        common,
    ]
    if linked:
        attempts = [common]
    # A symbol that the runtime lacks has to be an error here, not when the library is loaded.
    complete = ["-Wl,-z,defs"] if sys.platform.startswith("linux") else []
    errors = []

    def runs(*command: str) -> bool:
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            errors.append(result.stderr.strip())
        return result.returncode == 0

    with tempfile.TemporaryDirectory(dir=library.parent) as directory:
        built, unit = str(Path(directory) / library.name), str(Path(directory) / "unit.o")
        for flags in attempts:
            if not runs(*compiler, *flags, *extra, "-c", str(source), "-o", unit):
                continue
            for runtime in openmp_runtimes() if "-fopenmp" in flags else [[]]:
                if runs(*compiler, *extra, "-shared", unit, *linked, *runtime, *complete, "-o", built):
                    os.replace(built, library)
                    return
    raise CompilerError(f"{shlex.join(compiler)} could not compile it: {errors[0][-2000:]}")


def openmp_runtimes() -> list[list[str]]:
    """How to link OpenMP: with the very library torch brought along, so that both share one pool of threads, or with
    the compiler's own, which is what Clang needs beside a torch that brought GCC's."""
    bundled = Path(torch.__file__).parent / "lib"
    found = sorted(path for pattern in ("libgomp*", "libomp*", "libiomp5*") for path in bundled.glob(pattern))
    return [*([str(path)] for path in found[:1]), ["-fopenmp"]]
