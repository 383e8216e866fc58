"""The operator as PyTorch sees it: schema, fake implementation, compilation, and every mistake answered in words."""

from __future__ import annotations

import doctest
import sys
import warnings
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import sparq_kernels
import torch
from sparq_kernels import BLOCK, Budget, Cached, Visible, backends, declaration, operator
from sparq_kernels.arguments import Arguments, check_arguments

from tests.kernels.cases import Case, call_of, decode_call, make_case

OP = torch.ops.sparq_kernels.decode


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "changes", [{}, {"k_divisor": 3, "return_positions": False}, {"k": 900, "local": 5, "softcap": 3.0, "scale": 0.2}]
)
def test_opcheck(dtype: torch.dtype, changes: dict) -> None:
    case = make_case(2, dtype=dtype, lengths=[300, 20], starts=[0, 3], holes=0.1)
    torch.library.opcheck(OP.default, call_of(case, **changes))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_into_one_graph_with_dynamic_lengths(backend: str) -> None:
    def step(case: Case, cached: int) -> torch.Tensor:
        key, value = case.key[:, :, :cached], case.value[:, :, :cached]
        value_sum = value.float().sum(2)
        cached, visible = Cached(key, case.key_components, value, value_sum), Visible(case.length)
        out = sparq_kernels.decode(case.query, cached, visible, Budget(r=4, k=20, k_divisor=8))
        return out.output * 2 + out.alpha[..., None]

    compiled = torch.compile(step, fullgraph=True, backend=backend, dynamic=True)
    case = make_case(2, cached=300)
    for cached in (300, 290, 257):
        case.length.fill_(cached)
        torch.testing.assert_close(compiled(case, cached), step(case, cached))


def test_fake_shapes() -> None:
    with torch._subclasses.FakeTensorMode() as mode:
        call = call_of(make_case(2, cached=300, dtype=torch.bfloat16), k_divisor=3)
        call = call._make(mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in call)
        output, alpha, positions, lse = OP(*call)
        assert output.shape == (2, 4, 1, 16) and output.dtype == torch.bfloat16
        assert alpha.shape == lse.shape == (2, 4, 1) and alpha.dtype == lse.dtype == torch.float32
        assert positions.shape == (2, 2, 1, 100) and positions.dtype == torch.int64
        assert OP(*call._replace(return_positions=False))[2].shape == (2, 2, 1, 0)


def test_positions_only_when_asked_for() -> None:
    case = make_case()
    call = call_of(case, return_positions=False)
    assert decode_call(call).positions is None
    positions = decode_call(call._replace(return_positions=True)).positions
    assert positions is not None and positions.shape == (1, 2, 1, 20)


SCHEMAS = {
    "decode": "(Tensor query, Tensor key, Tensor key_components, Tensor value, Tensor value_sum, Tensor length, "
    "Tensor? start, Tensor? mask, Tensor? counts, SymInt r, SymInt k, SymInt? k_divisor, SymInt? local, float? scale, "
    "float? softcap, float mean_from, bool return_positions) -> (Tensor, Tensor, Tensor, Tensor)",
    "append": "(Tensor(a!) key, Tensor(b!) value, Tensor(c!) key_components, Tensor(d!)? value_sum, Tensor new_key, "
    "Tensor new_value, Tensor? position, SymInt offset) -> ()",
    "count_valid": "(Tensor mask, Tensor length, Tensor? start, SymInt queries, SymInt k, SymInt? k_divisor, "
    "SymInt? local) -> Tensor",
    "extend_sum": "(Tensor(a!) value_sum, Tensor(b!) summed, Tensor value, Tensor valid, Tensor length) -> ()",
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_schema(name: str) -> None:
    """Exported graphs hold it: what a NamedTuple's annotations make of it must not change unnoticed."""
    operator = getattr(torch.ops.sparq_kernels, name).default
    assert str(operator._schema) == f"sparq_kernels::{name}{SCHEMAS[name]}"
    assert operator.tags == [torch.Tag.pt2_compliant_tag]


def test_the_groups_are_the_fields_of_a_call() -> None:
    """What is added to a group has one place in the call: where `decode` puts it."""
    options = ("scale", "softcap", "mean_from", "return_positions")
    assert Arguments._fields == ("query", *Cached._fields, *Visible._fields, *Budget._fields, *options)
    call = call_of(make_case(starts=[3], holes=0.1, r=4, k=20, local=3))
    assert (call.query, *call.cached, *call.visible, *call.budget) == call[: -len(options)]


@pytest.mark.parametrize("wrong", [(1, 2), (1, 2, 3, 4), None, 4, "Cached"], ids=str)
def test_what_is_no_group_is_named(wrong: Any) -> None:
    call = call_of(make_case())
    groups = {"cached": call.cached, "visible": call.visible, "budget": call.budget}
    got = {None: "NoneType", 4: "int", "Cached": "str"}.get(wrong) or f"a tuple of {len(wrong)}"
    for name, group in groups.items():
        with pytest.raises(TypeError, match=rf"{name} must be a sparq_kernels\.{type(group).__name__}, got {got}"):
            sparq_kernels.decode(call.query, **{**groups, name: wrong})
    with pytest.raises(TypeError, match=r"visible must be a sparq_kernels\.Visible, got Budget"):
        sparq_kernels.decode(call.query, call.cached, call.budget, call.visible)


class Scale(NamedTuple):
    x: torch.Tensor
    weight: torch.Tensor | None
    times: int | None
    factor: float


class OptionFirst(NamedTuple):
    factor: float
    x: torch.Tensor


def test_an_operator_from_a_named_tuple() -> None:
    assert declaration.schema_of(Scale, 0, ("weight", "x")) == (
        "(Tensor(b!) x, Tensor(a!)? weight, SymInt? times, float factor) -> ()"
    )
    tensors_of, options_of = declaration.parts_of(Scale)
    call = Scale(torch.ones(1), None, 3, 2.0)
    assert tensors_of(call) == (call.x, None) and options_of(call) == (3, 2.0)
    assert tensors_of(Scale._fields) == ("x", "weight")
    assert declaration.required_tensors(Scale) == ("x",)
    with pytest.raises(TypeError, match="OptionFirst must have its tensors before its options"):
        declaration.parts_of(OptionFirst)


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


def test_example_in_the_docstring() -> None:
    assert doctest.testmod(operator).failed == 0


def tensors(**shapes: Any) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


MISTAKES: list[tuple[dict[str, Any], type[Exception], str]] = [
    (tensors(query=(1, 4, 16)), ValueError, r"query must be \[B, Hq, Q, d\], got \[1, 4, 16\]"),
    (tensors(query=(1, 4, 0, 16)), ValueError, "query must hold 1 to 16 new tokens per row, got 0"),
    (tensors(query=(1, 4, 17, 16)), ValueError, "query must hold 1 to 16 new tokens per row, got 17; prompts"),
    (tensors(query=(1, 5, 1, 16)), ValueError, r"query heads \(5\) must be a multiple of key heads \(2\)"),
    (tensors(query=(1, 0, 1, 16)), ValueError, r"query heads \(0\)"),
    (tensors(query=(1, 4, 1, 600)), ValueError, "head_dim of 1 to 512, got 600"),
    (tensors(query=(1, 4, 1, 0)), ValueError, "head_dim of 1 to 512, got 0"),
    (tensors(query=(0, 4, 1, 16), key=(0, 2, 300, 16)), ValueError, "key must hold at least one row"),
    (tensors(query=(2, 4, 1, 16)), ValueError, r"key must be \[2, Hkv, S, 16\] to match query"),
    (tensors(key=(1, 300, 16)), ValueError, r"key must be \[B, Hkv, S, d\], got \[1, 300, 16\]"),
    (tensors(key=(1, 2, 300, 8)), ValueError, r"key must be \[1, Hkv, S, 16\]"),
    (tensors(key=(1, 2, 0, 16)), ValueError, "at least one row and one position"),
    (tensors(key=(1, 0, 300, 16)), ValueError, r"multiple of key heads \(0\)"),
    (
        tensors(value=(1, 2, 299, 16)),
        ValueError,
        r"value must have key's shape \[1, 2, 300, 16\], got \[1, 2, 299, 16\]",
    ),
    (tensors(key_components=(1, 2, 0, 16, BLOCK)), ValueError, rf"must be \[1, 2, at least 1, 16, {BLOCK}\]"),
    (tensors(key_components=(1, 1, 2, 16, BLOCK)), ValueError, "key_components must be"),
    (tensors(key_components=(1, 2, 2, 15, BLOCK)), ValueError, "key_components must be"),
    (tensors(key_components=(1, 2, 2, 16, BLOCK // 2)), ValueError, "key_components must be"),
    (tensors(key_components=(2, 2, 16, BLOCK)), ValueError, "key_components must be"),
    (tensors(value_sum=(1, 2, 15)), ValueError, r"value_sum must be \[1, 2, 16\], got \[1, 2, 15\]"),
    ({"query": torch.zeros(1, 4, 1, 16, dtype=torch.int32)}, TypeError, "query must be float32, bfloat16, float16 or"),
    (
        {"key": torch.zeros(1, 2, 300, 16).half()},
        TypeError,
        "key must have query's dtype torch.float32, got torch.float16",
    ),
    ({"value": torch.zeros(1, 2, 300, 16).double()}, TypeError, "value must have query's dtype"),
    ({"key_components": torch.zeros(1, 2, 2, 16, BLOCK).half()}, TypeError, "key_components must have query's dtype"),
    ({"value_sum": torch.zeros(1, 2, 16).double()}, TypeError, "value_sum must be float32"),
    ({"key": torch.zeros(1, 2, 16, 300).transpose(2, 3)}, ValueError, "key must be contiguous in its last axis"),
    ({"value": torch.zeros(1, 2, 16, 300).transpose(2, 3)}, ValueError, "value must be contiguous in its last axis"),
    (
        {"key_components": torch.zeros(1, 2, 2, BLOCK, 16).mT},
        ValueError,
        "key_components must be contiguous in its last",
    ),
    ({"key_components": torch.zeros(1, 2, 16, 2, BLOCK).transpose(2, 3)}, ValueError, "must have contiguous blocks"),
    ({"length": torch.tensor([300, 300])}, ValueError, r"length must be \[1\], got \[2\]"),
    ({"length": torch.tensor(300)}, ValueError, r"length must be \[1\], got \[\]"),
    ({"length": torch.tensor([300], dtype=torch.int32)}, TypeError, "length must be int64, got torch.int32"),
    ({"length": torch.tensor([301])}, ValueError, r"length must be 0 to the 300 cached positions, got \[301\]"),
    ({"length": torch.tensor([-1])}, ValueError, "length must be 0 to the 300"),
    ({"start": torch.tensor([-1])}, ValueError, r"start must not be negative, got \[-1\]"),
    ({"start": torch.tensor([[0]])}, ValueError, r"start must be \[1\]"),
    ({"start": torch.tensor([0.0])}, TypeError, "start must be int64"),
    ({"mask": torch.ones(1, 299, dtype=torch.bool)}, ValueError, r"mask must be \[1, 300\], got \[1, 299\]"),
    ({"mask": torch.ones(1, 300)}, TypeError, "mask must be bool, got torch.float32"),
    ({"r": 0}, ValueError, r"r must be 1 to head_dim \(16\), got 0"),
    ({"r": 17}, ValueError, r"r must be 1 to head_dim \(16\), got 17"),
    ({"k": 0}, ValueError, "k must be at least 1, got 0"),
    ({"k_divisor": 0}, ValueError, "k_divisor must be at least 1 or None, got 0"),
    ({"local": -1}, ValueError, r"local must be 0 to k \(20\) or None, got -1"),
    ({"local": 21}, ValueError, r"local must be 0 to k \(20\) or None, got 21"),
    ({"scale": float("nan")}, ValueError, "scale must be finite or None, got nan"),
    ({"softcap": 0.0}, ValueError, "softcap must be a positive number or None, got 0.0"),
    ({"softcap": float("inf")}, ValueError, "softcap must be a positive number"),
    ({"mean_value": -0.5}, ValueError, "mean_value must be True, False or the least alpha .* got -0.5"),
    ({"mean_value": float("nan")}, ValueError, "mean_value must be .* got nan"),
]


@pytest.mark.parametrize(("changes", "error", "message"), MISTAKES)
def test_mistakes_are_named(changes: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        OP(*call_of(make_case(), **changes))


@pytest.mark.parametrize("name", ["key", "key_components", "value", "value_sum", "length", "start", "mask"])
def test_a_tensor_on_another_device_is_named(name: str) -> None:
    """Asked of the check itself: in a machine with no second device the dispatcher would answer for `meta`."""
    case = make_case(starts=[0], holes=0.1)
    setattr(case, name, getattr(case, name).to("meta"))
    with pytest.raises(ValueError, match=f"{name} must be on query's device cpu, got meta"):
        check_arguments(call_of(case))


def test_a_mistake_after_a_right_call_is_still_found() -> None:
    """A layout that has passed is remembered: nothing but exactly that layout may profit."""
    case = make_case()
    OP(*call_of(case))
    for changes, error, message in MISTAKES:
        with pytest.raises(error, match=message):
            OP(*call_of(case, **changes))
    OP(*call_of(case))


@pytest.mark.parametrize("name", ["query", "key", "key_components", "value", "value_sum", "length"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_none_for_a_tensor(name: str, dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=f"{name} must be a tensor, got None"):
        OP(*call_of(make_case(dtype=dtype), **{name: None}))


def test_options_of_the_wrong_kind() -> None:
    for changes in ({"r": 4.5}, {"k": "20"}, {"scale": "1"}):
        with pytest.raises((TypeError, RuntimeError)):
            OP(*call_of(make_case(), **changes))
