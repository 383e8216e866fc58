"""Outside of the supported versions of other libraries, importing sparq raises one clear line."""

from __future__ import annotations

import importlib
import importlib.metadata
import subprocess
import sys

import pytest

import sparq
import sparq_command
from sparq import versions


def with_versions(monkeypatch: pytest.MonkeyPatch, **installed: str | None) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        found = installed.get(name, "") if name in installed else real(name)
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(versions, "version", version)


def test_the_installed_versions_are_supported() -> None:
    versions.check_versions()


@pytest.mark.parametrize(
    "installed",
    [
        dict(transformers="5.17.0"),
        dict(transformers="5.99.9"),
        dict(transformers="5.24.0.dev0"),
        dict(torch="2.10.0"),
        dict(torch="2.13.0+cpu"),
        dict(torch="2.12.0+cu130"),
        dict(torch="2.11.0a0+git1234567"),
        dict(triton="3.5.0"),  # matters to GPU kernels only: tests/kernels/test_operator.py
        dict(triton=None),
    ],
    ids=str,
)
def test_supported(monkeypatch: pytest.MonkeyPatch, installed: dict) -> None:
    with_versions(monkeypatch, **installed)
    versions.check_versions()


@pytest.mark.parametrize(
    "installed, words",
    [
        (dict(transformers="4.57.1"), ["transformers 4.57.1", ">=5.17,<6"]),
        (dict(transformers="5.16.9"), ["transformers 5.16.9"]),
        (dict(transformers="6.0.0"), ["transformers 6.0.0"]),
        (dict(transformers="6.0.0.dev0"), ["transformers 6.0.0.dev0"]),
        (dict(torch="2.9.1+cu128"), ["torch 2.9.1+cu128", ">=2.10"]),
        (dict(transformers=None), ["transformers >=5.17,<6 is needed"]),
        (dict(torch=None), ["torch >=2.10 is needed"]),
        (dict(torch="2.9.0", transformers="4.0.0"), ["torch 2.9.0", "transformers 4.0.0"]),
    ],
    ids=str,
)
def test_unsupported(monkeypatch: pytest.MonkeyPatch, installed: dict, words: list[str]) -> None:
    with_versions(monkeypatch, **installed)
    with pytest.raises(ImportError) as error:
        versions.check_versions()
    message = str(error.value)
    assert message.startswith("sparq: ") and "\n" not in message
    assert all(word in message for word in words)


def test_import_fails_before_it_needs_what_is_missing() -> None:
    """In a fresh process, and without importing the library that is wrong."""
    code = (
        "import importlib.metadata as metadata, sys\n"
        "real = metadata.version\n"
        "metadata.version = lambda name: '4.57.1' if name == 'transformers' else real(name)\n"
        "try:\n"
        "    import sparq\n"
        "except ImportError as error:\n"
        "    print(error)\n"
        "print('transformers' in sys.modules)\n"
    )
    paths = f"import sys; sys.path[:0] = {[path for path in sys.path if path]!r}\n"
    done = subprocess.run([sys.executable, "-c", paths + code], capture_output=True, text=True, check=True)
    line, imported = done.stdout.splitlines()
    assert line == "sparq: transformers 4.57.1 is installed, supported is >=5.17,<6"
    assert imported == "False"


def test_own_version() -> None:
    assert sparq.__version__ == importlib.metadata.version("sparq-attention")


def test_a_tree_that_is_not_installed_has_a_version_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_installed(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(sparq_command, "installed_version", not_installed)
    assert sparq_command.version() == "unknown"
    assert importlib.reload(sparq).__version__ == "unknown"
    monkeypatch.undo()
    importlib.reload(sparq)
