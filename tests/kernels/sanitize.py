"""Runs the kernel's tests with the kernel built under AddressSanitizer and UndefinedBehaviorSanitizer.

    python tests/kernels/sanitize.py [pytest arguments]

Scratch arrays are fenced off from each other in such a build, so that a step over an array's end is found there too.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
FLAGS = "-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all"
TESTS = [f"tests/kernels/test_{name}.py" for name in ("decode", "codes", "operator", "properties")]


def runtime(name: str) -> str:
    """Path of a sanitizer's shared library, which must be loaded before Python's own allocations."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    found = subprocess.run([*compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    path = found.stdout.strip()
    if not Path(path).is_absolute():
        sys.exit(f"{shlex.join(compiler)} has no {name}: a GCC with its sanitizer libraries is needed")
    return path


def instrumented(cache: Path) -> dict[str, str]:
    """The environment for a Python with the sanitizers and a kernel built for them, which is put into `cache`."""
    environment = {
        **os.environ,
        "SPARQ_CXXFLAGS": FLAGS,
        "SPARQ_CACHE_DIR": str(cache),
        "PYTHONPATH": str(ROOT / "kernels"),
    }
    build = "import sparq_kernels.cpu as cpu; print(cpu.build())"  # the compiler itself runs without the preload
    subprocess.run([sys.executable, "-c", build], env=environment, check=True)
    # The allocator's own large pages and Python's leaks are none of our business.
    return {
        **environment,
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libubsan.so')}",
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="sparq-sanitize-") as cache:
        # -s: a sanitizer ends the process, and pytest would take its report along
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-s", "-p", "no:cacheprovider", *(sys.argv[1:] or TESTS)]
        return subprocess.run(command, env=instrumented(Path(cache)), cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
