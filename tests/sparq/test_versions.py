"""Outside of the supported versions of other libraries, importing sparq raises one clear line."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet
from sparq_kernels import requirements

import sparq
import sparq_command
from sparq import versions

TOO_OLD = (
    "sparq: transformers 4.57.1 is installed, tried is <5.25,>=5.17: pip install 'transformers<5.25,>=5.17'"
    "; SPARQ_ANY_VERSION=1 runs it untried"
)


def with_versions(monkeypatch: pytest.MonkeyPatch, **installed: str | None) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        found = installed.get(name, "") if name in installed else real(name)
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(requirements, "version", version)


def test_the_installed_versions_are_supported() -> None:
    versions.check_versions()


@pytest.mark.parametrize(
    "installed",
    [
        dict(transformers="5.17.0"),
        dict(transformers="5.24.9"),
        dict(transformers="5.24.0.dev0"),
        dict(torch="2.10.0"),
        dict(torch="2.14.1"),
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
        (dict(transformers="4.57.1"), ["transformers 4.57.1", "pip install 'transformers<5.25,>=5.17'"]),
        (dict(transformers="5.16.9"), ["transformers 5.16.9"]),
        (dict(transformers="6.0.0"), ["transformers 6.0.0"]),
        (dict(transformers="5.25.0"), ["transformers 5.25.0", "or a newer sparq-attention"]),
        (dict(transformers="5.25.0.dev0"), ["transformers 5.25.0.dev0", "SPARQ_ANY_VERSION=1"]),
        (dict(torch="2.9.1+cu128"), ["torch 2.9.1+cu128", ">=2.10"]),
        (dict(torch="2.15.0"), ["torch 2.15.0", "pip install 'torch<2.15,>=2.10'"]),
        (dict(transformers=None), ["transformers <5.25,>=5.17 is needed"]),
        (dict(torch=None), ["torch <2.15,>=2.10 is needed"]),
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


def test_an_untried_version_can_be_insisted_on(monkeypatch: pytest.MonkeyPatch) -> None:
    with_versions(monkeypatch, transformers="5.25.0")
    monkeypatch.setenv("SPARQ_ANY_VERSION", "1")
    with pytest.warns(UserWarning, match="transformers 5.25.0 is installed"):
        versions.check_versions()


def test_a_tree_that_is_not_installed_takes_any_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_installed(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(requirements, "requires", not_installed)
    with_versions(monkeypatch, torch="1.0", transformers="1.0")
    versions.check_versions()


def test_the_bounds_are_those_of_the_project_file() -> None:
    """Of the installed package, which an editable installation makes when pyproject.toml changes."""
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    for name in ("torch", "transformers", "triton"):
        (bounds,) = re.findall(rf'"{name}([<>=][^";]*)[";]', text)
        assert SpecifierSet(bounds) == requirements.supported(name)
    assert requirements.supported("nothing of ours") == SpecifierSet()


def test_the_documents_name_the_same_bounds_and_what_was_tried() -> None:
    root = Path(__file__).parents[2]
    text = " ".join((root / "docs" / "support.md").read_text(encoding="utf-8").split())
    for name in ("torch", "transformers"):
        least, beyond = (
            next(bound.version for bound in requirements.supported(name) if bound.operator == operator)
            for operator in (">=", "<")
        )
        assert f"{name} ≥ {least} and < {beyond}" in text
    tried = [
        dict(reversed(re.findall(r"^(\w+)==([\w.]+)", (root / file).read_text(encoding="utf-8"), re.MULTILINE)))
        for file in ("constraints.txt", "constraints-oldest.txt")
    ]
    newest, oldest = ([each[name] for name in ("transformers", "torch", "triton")] for each in tried)
    assert "transformers {}, torch {}, Triton {} (`make test`)".format(*newest) in text
    assert "{}, {}, {} (`make test-oldest`)".format(*oldest) in text


@pytest.mark.slow
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
    assert line == TOO_OLD
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
