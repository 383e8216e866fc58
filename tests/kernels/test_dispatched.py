"""Calls that the dispatcher gives to the CPU kernel without Python: which they are, and that nothing else differs."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import pytest
import torch
from sparq_kernels import cpu, operator
from sparq_kernels.arguments import Arguments

from tests.kernels.cases import CASES, call_of, make_case
from tests.kernels.pages import paged

OP = torch.ops.sparq_kernels.decode.default

pytestmark = pytest.mark.skipif(cpu.backend() != "cpp", reason="there is no CPU kernel")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> mock.Mock:
    """Counts the calls that Python is asked for."""
    counted = mock.Mock(wraps=operator.decode_cpu)
    monkeypatch.setattr(operator, "decode_cpu", counted)
    return counted


def same(ours: tuple[torch.Tensor, ...], theirs: tuple[torch.Tensor, ...]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype and a.stride() == b.stride() and a.device == b.device
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("index", ["full", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_the_second_call_of_a_layout_needs_no_python(
    name: str, dtype: torch.dtype, index: str, asked: mock.Mock
) -> None:
    call = call_of(make_case(dtype=dtype, index=index, **CASES[name]))
    expected = OP(*call)
    asked.reset_mock()
    same(OP(*call), expected)
    if call.query.is_contiguous():
        same(OP(*call._replace(query=call.query.clone())), expected)
    assert not asked.called


def test_pages_need_no_python(asked: mock.Mock) -> None:
    call = paged(call_of(make_case(2, lengths=[700, 300], cached=700, r=6, k=30, index="int4")), 256, "int4")
    expected = OP(*call)
    asked.reset_mock()
    same(OP(*call), expected)
    assert not asked.called


def other_seed(call: Arguments) -> Arguments:
    other = call_of(make_case(seed=1))
    return call._replace(query=other.query, key=other.key, value=other.value, value_sum=other.value_sum)


def test_other_values_of_a_layout_are_read(asked: mock.Mock) -> None:
    call = call_of(make_case())
    OP(*call)
    other = other_seed(call)
    expected = cpu.run(cpu.plan(other), other, [0 if x is None else x.data_ptr() for x in other[:11]], as_given=False)
    assert expected is not None
    asked.reset_mock()
    same(OP(*other), expected)
    assert not asked.called


CHANGES: dict[str, Callable[[Arguments], Arguments]] = {
    "k": lambda call: call._replace(k=call.k + 1),
    "no k_divisor": lambda call: call._replace(k_divisor=1000),
    "mass": lambda call: call._replace(mass=0.25),
    "scale": lambda call: call._replace(scale=0.5),
    "mean": lambda call: call._replace(mean_from=0.5),
    "positions": lambda call: call._replace(return_positions=not call.return_positions),
    "start": lambda call: call._replace(start=torch.zeros(1, dtype=torch.int64)),
    "mask": lambda call: call._replace(mask=torch.ones(1, 300, dtype=torch.bool)),
    "fewer positions": lambda call: call._replace(
        key=call.key[:, :, :299], value=call.value[:, :, :299], length=call.length - 1
    ),
    "strides": lambda call: call._replace(key=call.key.contiguous(), value=call.value.contiguous()),
    "dtype": lambda call: call_of(make_case(dtype=torch.bfloat16)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_another_layout_is_checked_first(change: Callable[[Arguments], Arguments], asked: mock.Mock) -> None:
    call = call_of(make_case())
    OP(*call)
    changed = change(call)
    asked.reset_mock()
    with mock.patch.object(operator, "_plans", {}):
        same(OP(*changed), OP(*changed))
    assert asked.call_count <= 1  # none where another test has made that call


def test_rows_that_are_copied_come_through_python_every_time(asked: mock.Mock) -> None:
    call = call_of(make_case())
    spread = torch.empty(*call.query.shape, 2)[..., 0].copy_(call.query)
    assert spread.stride(3) == 2
    for _ in range(3):
        same(OP(*call._replace(query=spread)), OP(*call))
    assert asked.call_count >= 3


def freed(call: Arguments) -> Arguments:
    key = call.key.clone()
    key.untyped_storage().resize_(0)
    return call._replace(key=key)


def askew(call: Arguments) -> Arguments:
    memory = torch.zeros(call.value_sum.numel() * 4 + 1, dtype=torch.uint8)
    value_sum = torch.frombuffer(memory.numpy(), dtype=torch.float32, offset=1).view(call.value_sum.shape)
    return call._replace(value_sum=value_sum)


WRONG = {
    "length": (lambda call: call._replace(length=call.length + 1), ValueError, "length must be 0 to the 300"),
    "negative": (lambda call: call._replace(length=-call.length), ValueError, "length must be 0 to the 300"),
    "freed": (freed, RuntimeError, r"key \[1, 2, 300, 16\] has no memory"),
    "askew": (askew, ValueError, "value_sum must lie at a multiple of its element's 4 bytes"),
    "r": (lambda call: call._replace(r=17), ValueError, "r must be 1 to head_dim"),
    "a number": (lambda call: call._replace(scale=float("nan")), ValueError, "scale must be finite"),
}


@pytest.mark.parametrize(("change", "error", "message"), WRONG.values(), ids=WRONG)
def test_mistakes_after_right_calls_are_named(
    change: Callable[[Arguments], Arguments], error: type[Exception], message: str
) -> None:
    call = call_of(make_case())
    call = call._replace(key=call.key.clone(), value=call.value.clone())
    for _ in range(2):
        OP(*call)
    for _ in range(2):
        with pytest.raises(error, match=message):
            OP(*change(call))
    OP(*call)


def test_what_is_no_plain_tensor_comes_through_python(asked: mock.Mock) -> None:
    call = call_of(make_case())
    expected = OP(*call)
    asked.reset_mock()
    negated = call._replace(query=torch._neg_view(-call.query))
    assert negated.query.is_neg()
    same(OP(*negated), expected)


def test_inference_mode_makes_no_difference(asked: mock.Mock) -> None:
    call = call_of(make_case())
    expected = OP(*call)
    asked.reset_mock()
    with torch.inference_mode():
        inside = OP(*call)
    assert all(x.is_inference() for x in inside)
    same(tuple(x.clone() for x in inside), expected)
    assert not asked.called


def test_without_it_everything_goes_through_python(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    broken = tmp_path / "operator.cpp"
    broken.write_text("#error headers are missing\n")
    monkeypatch.setattr(cpu, "OPERATOR", broken)
    monkeypatch.setenv("SPARQ_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.warns(RuntimeWarning, match="goes through Python.*headers are missing") as caught:
        assert cpu.operator_library.__wrapped__() is None
    assert len(caught) == 1


def test_a_kernel_that_serves_no_more_is_not_called(asked: mock.Mock) -> None:
    call, serving = call_of(make_case()), cpu.kernel()
    expected = OP(*call)
    cpu.serve(None)
    try:
        asked.reset_mock()
        same(OP(*call), expected)
        assert asked.call_count == 1
    finally:
        cpu.serve(serving)
