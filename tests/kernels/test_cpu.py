"""Compiling, caching and loading the CPU kernel, each in processes of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CALL = """
import sys, warnings
import torch, sparq_kernels
query, key = torch.randn(1, 2, 1, 8), torch.randn(1, 1, 40, 8)
components = sparq_kernels.allocate_components(1, 1, 40, 8, torch.float32, "cpu")
sparq_kernels.write_components(components, key, 0)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        out = sparq_kernels.decode(query, key, components, key, key.sum(2), length=torch.tensor([40]), r=4, k=10)
assert out.output.isfinite().all()
print(sparq_kernels.backend("cpu"), [str(w.message) for w in caught])
"""


def environment(cache: Path, **changes: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SPARQ_") and name != "CXX"}
    kernels = Path(__file__).parents[2] / "kernels"
    return {**kept, "PYTHONPATH": str(kernels), "SPARQ_CACHE_DIR": str(cache), **changes}


def start(env: dict[str, str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CALL]
    return subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out, err


def test_two_processes_compile_once(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    results = [finish(process) for process in [start(environment(cache)), start(environment(cache))]]
    assert [out for out, _ in results] == ["cpp []\n"] * 2
    assert sum(err.count("compiling the CPU kernel") for _, err in results) == 1
    assert [path.name for path in cache.iterdir() if path.is_dir()] == []
    assert len(list(cache.glob("*.so"))) == 1
    out, err = finish(start(environment(cache)))
    assert out == "cpp []\n" and "compiling" not in err


@pytest.mark.parametrize("changes", [{"PATH": ""}, {"CXX": "no-such-compiler"}], ids=str)
def test_without_a_compiler_the_reference_runs_and_one_warning_says_so(tmp_path: Path, changes: dict) -> None:
    out, _ = finish(start(environment(tmp_path, **changes)))
    assert out.startswith("reference [") and out.count("no CPU kernel, the PyTorch reference runs instead") == 1
    assert "Install one" in out


def test_a_compiler_that_fails_is_quoted(tmp_path: Path) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho disk is full >&2\nexit 1\n")
    compiler.chmod(0o755)
    out, _ = finish(start(environment(tmp_path, CXX=str(compiler))))
    assert out.startswith("reference [") and "disk is full" in out


def test_a_compiler_without_openmp_or_native_still_serves(tmp_path: Path) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text(
        '#!/bin/sh\nfor a in "$@"; do case $a in -fopenmp|-m*=native) exit 1;; esac; done\nexec c++ "$@"\n'
    )
    compiler.chmod(0o755)
    out, _ = finish(start(environment(tmp_path / "cache", CXX=str(compiler))))
    assert out.startswith("cpp [") and out.count("the CPU kernel runs on one thread") == 1


def test_a_runtime_that_lacks_what_the_compiler_calls_is_not_linked(tmp_path: Path) -> None:
    """Clang's OpenMP beside a torch that brings GCC's: the compiler's own is taken then."""
    compiler = tmp_path / "c++"
    compiler.write_text(
        "#!/bin/sh\n"
        'for a in "$@"; do case $a in *libgomp*|*libomp*|*libiomp*) echo undefined >&2; exit 1;; esac; done\n'
        'exec c++ "$@"\n'
    )
    compiler.chmod(0o755)
    out, _ = finish(start(environment(tmp_path / "cache", CXX=str(compiler))))
    assert out == "cpp []\n"


@pytest.mark.skipif(shutil.which("clang++") is None, reason="there is no Clang on this machine")
def test_clang_serves_with_threads(tmp_path: Path) -> None:
    out, _ = finish(start(environment(tmp_path, CXX="clang++")))
    assert out == "cpp []\n"


def test_the_reference_can_be_chosen(tmp_path: Path) -> None:
    out, err = finish(start(environment(tmp_path, SPARQ_BACKEND="reference")))
    assert out == "reference []\n" and "compiling" not in err
