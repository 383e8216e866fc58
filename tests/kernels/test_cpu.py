"""Compiling, caching and loading the CPU kernel, each in processes of their own."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sparq_kernels import cpu

CALL = """
import sys, warnings
import torch, sparq_kernels
from sparq_kernels import Budget, Cached, Visible
query, key = torch.randn(1, 2, 1, 8), torch.randn(1, 1, 40, 8)
components = sparq_kernels.allocate_components(1, 1, 40, 8, torch.float32, "cpu")
sparq_kernels.write_components(components, key, 0)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        cached, visible = Cached(key, components, key, key.sum(2)), Visible(torch.tensor([40]))
        out = sparq_kernels.decode(query, cached, visible, Budget(r=4, k=10))
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


@pytest.mark.slow
def test_two_processes_compile_once(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    results = [finish(process) for process in [start(environment(cache)), start(environment(cache))]]
    assert [out for out, _ in results] == ["cpp []\n"] * 2
    assert sum(err.count("compiling the CPU kernel") for _, err in results) == 1
    assert [path.name for path in cache.iterdir() if path.is_dir()] == []
    assert len(list(cache.glob("*.so"))) == 2  # the kernel, and what the dispatcher calls
    out, err = finish(start(environment(cache)))
    assert out == "cpp []\n" and "compiling" not in err


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"PATH": ""}, {"CXX": "no-such-compiler"}], ids=str)
def test_without_a_compiler_the_reference_runs_and_one_warning_says_so(tmp_path: Path, changes: dict) -> None:
    out, _ = finish(start(environment(tmp_path, **changes)))
    assert out.startswith("reference [") and out.count("no CPU kernel. The operator runs the PyTorch reference") == 1
    assert "Install one" in out


@pytest.mark.slow
def test_a_compiler_that_fails_is_quoted(tmp_path: Path) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho disk is full >&2\nexit 1\n")
    compiler.chmod(0o755)
    out, _ = finish(start(environment(tmp_path, CXX=str(compiler))))
    assert out.startswith("reference [") and "disk is full" in out


@pytest.mark.slow
def test_a_compiler_without_openmp_or_native_still_serves(tmp_path: Path) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text(
        '#!/bin/sh\nfor a in "$@"; do case $a in -fopenmp|-m*=native) exit 1;; esac; done\nexec c++ "$@"\n'
    )
    compiler.chmod(0o755)
    out, _ = finish(start(environment(tmp_path / "cache", CXX=str(compiler))))
    assert out.startswith("cpp [") and out.count("the CPU kernel runs on one thread") == 1


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_reference_can_be_chosen(tmp_path: Path) -> None:
    out, err = finish(start(environment(tmp_path, SPARQ_BACKEND="reference")))
    assert out == "reference []\n" and "compiling" not in err


@pytest.mark.slow
def test_without_a_home_that_can_be_written_processes_share_a_folder(tmp_path: Path) -> None:
    (tmp_path / "home").touch()  # not a folder: root, too, cannot write into it
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    env = environment(tmp_path, XDG_CACHE_HOME=str(tmp_path / "home"), TMPDIR=str(temporary))
    del env["SPARQ_CACHE_DIR"]
    (out, err), (again, err_again) = finish(start(env)), finish(start(env))
    assert out == again == "cpp []\n"
    assert "compiling" in err and "compiling" not in err_again
    (folder,) = temporary.glob("sparq_kernels-*")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700 and len(list(folder.glob("*.so"))) == 2


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder that would be shared, not made yet, on a machine without a cache that can be written."""
    (tmp_path / "home").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("SPARQ_CACHE_DIR", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    cpu.temporary_directory.cache_clear()
    yield tmp_path / f"sparq_kernels-{os.getuid()}"
    cpu.temporary_directory.cache_clear()


def test_the_shared_folder_is_used_again(temporary: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cpu.cache_directory() == temporary
        cpu.temporary_directory.cache_clear()
        assert cpu.cache_directory() == temporary


def link(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder.parent / "elsewhere").mkdir(mode=0o700)
    folder.symlink_to(folder.parent / "elsewhere")


def file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.touch(mode=0o600)


def writable_for_the_group(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir()
    folder.chmod(0o770)


def writable_for_all(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir()
    folder.chmod(0o702)


def another_users(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = os.getuid() + 1
    monkeypatch.setattr(os, "getuid", lambda: other)
    (folder.parent / f"sparq_kernels-{other}").mkdir(mode=0o700)


def windows(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "getuid")


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        (link, "is not a folder"),
        (file, "is not a folder"),
        (writable_for_the_group, "others may write to"),
        (writable_for_all, "others may write to"),
        (another_users, "is another user's"),
        (windows, "does not tell which folder"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_folder_that_others_may_have_written_is_not_used(
    prepare: Callable, reason: str, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = set(temporary.parent.iterdir())
    prepare(temporary, monkeypatch)
    with pytest.warns(RuntimeWarning, match=f"no safe place.*{reason}.*SPARQ_CACHE_DIR"):
        used = cpu.cache_directory()
    assert used.parent == temporary.parent and used not in before and used.name != temporary.name
    assert used.is_dir() and not used.is_symlink() and stat.S_IMODE(used.stat().st_mode) == 0o700
    assert used == cpu.cache_directory(), "one for the process"


def test_a_chosen_folder_that_cannot_be_written_is_named(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = temporary.parent / "home" / "kernels"  # below a file
    monkeypatch.setenv("SPARQ_CACHE_DIR", str(chosen))
    with pytest.warns(RuntimeWarning, match=f"SPARQ_CACHE_DIR={chosen} cannot be written") as caught:
        assert cpu.cache_directory() == temporary
    assert len(caught) == 1


def test_without_a_known_home_the_shared_folder_serves(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(self: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "expanduser", unknown)
    assert cpu.cache_directory() == temporary
