"""Which implementation serves which device, and what is said where it cannot be had."""

from __future__ import annotations

import sys
import warnings
from importlib.util import find_spec
from types import ModuleType

import pytest
import sparq_kernels
import torch
from sparq_kernels import backends


def test_backend_names() -> None:
    assert sparq_kernels.backend("cpu") == sparq_kernels.backend(torch.device("cpu")) == "cpp"
    assert sparq_kernels.backend("cuda") == ("triton" if find_spec("triton") else "reference")
    assert sparq_kernels.backend("meta") == "reference"
    assert sparq_kernels.backend("cpu", torch.float64) == sparq_kernels.backend("cuda", torch.float64) == "reference"
    assert sparq_kernels.backend("cpu", torch.bfloat16) == "cpp"


def gpu_backend_with(monkeypatch: pytest.MonkeyPatch, triton: ModuleType | None) -> list[str]:
    """The warnings given when GPU kernels are asked for, twice, and there is this Triton."""
    for name in [name for name in sys.modules if name.startswith("sparq_kernels.gpu")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(sparq_kernels, "gpu", raising=False)
    monkeypatch.setitem(sys.modules, "triton", triton)
    backends.triton_kernels.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert sparq_kernels.backend("cuda") == sparq_kernels.backend("cuda") == "reference"
    backends.triton_kernels.cache_clear()
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize(("environment", "warned"), [({}, True), ({"SPARQ_BACKEND": "reference"}, False)])
def test_without_triton_one_warning_says_what_it_costs(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], warned: bool
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    messages = gpu_backend_with(monkeypatch, None)
    assert [message.startswith("sparq_kernels: no GPU kernels") for message in messages] == [True] * warned
    assert all("pip install 'sparq-attention[gpu]'" in message for message in messages)


@pytest.mark.parametrize("version", ["3.5.1", "2.1.0+git1234567"])
def test_too_old_a_triton_is_named(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    old = ModuleType("triton")
    old.__version__ = version  # type: ignore[attr-defined]
    (message,) = gpu_backend_with(monkeypatch, old)
    assert message.startswith("sparq_kernels: no GPU kernels")
    assert "Triton >=3.6 is needed" in message and message.endswith(f": triton {version} is installed")
