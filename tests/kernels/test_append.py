"""The new token's way into the storage: as if everything had been written anew."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sparq_kernels import BLOCK, Cached, append, write_components
from sparq_kernels.append import WRITTEN, AppendArguments, check_append, tensors_of
from torch import Tensor

from tests.kernels.cases import append_call, new_token, rows_of, storage_of

OP = torch.ops.sparq_kernels.append


def call_of(batch: int, position: Tensor | None, offset: int, index: str = "full") -> AppendArguments:
    storage = storage_of(batch, 2, 20, 12, index=index)._asdict()
    del storage["block_table"]
    new_key, new_value = new_token(batch, 2, 12)
    return AppendArguments(**storage, new_key=new_key, new_value=new_value, position=position, offset=offset)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("position", [0, 299, BLOCK - 1, BLOCK, BLOCK + 7])
def test_one_position(dtype: torch.dtype, position: int) -> None:
    cached = storage_of(2, 3, BLOCK + 8, 12, dtype)
    expected = Cached(*(None if x is None else x.clone() for x in cached))  # type: ignore[arg-type]
    new_key, new_value = new_token(2, 3, 12, dtype)
    expected.key[:, :, position] = new_key[:, :, 0]
    expected.value[:, :, position] = new_value[:, :, 0]
    write_components(expected.key_components, new_key, position)
    expected.value_sum.add_(new_value[:, :, 0])
    append(cached, new_key, new_value, position)
    assert_same(cached, expected)


def assert_same(ours: Cached, theirs: Cached) -> None:
    torch.testing.assert_close(ours[:4], theirs[:4], rtol=0, atol=0, equal_nan=True)
    assert ours.key_ranges is theirs.key_ranges is None


def test_a_position_for_each_row() -> None:
    together, alone = storage_of(3, 2, BLOCK + 8, 12), storage_of(3, 2, BLOCK + 8, 12)
    tokens, positions = new_token(3, 2, 12), [5, BLOCK, BLOCK + 7]
    append(together, *tokens, position=torch.tensor(positions))
    for b, position in enumerate(positions):
        append(rows_of(alone, b), *(x[b : b + 1] for x in tokens), position=position)
    assert_same(together, alone)


def test_without_a_sum() -> None:
    cached = storage_of(1, 2, 20, 12)
    before = cached.value_sum.clone()
    append(cached._replace(value_sum=None), *new_token(1, 2, 12), position=3)
    assert torch.equal(cached.value_sum, before) and cached.key[:, :, 3].isfinite().all()


@pytest.mark.slow
def test_opcheck_and_compilation() -> None:
    for position in (None, torch.tensor([3, 4])):
        torch.library.opcheck(OP.default, call_of(2, position, 1))

    def step(storage: Cached, tokens: tuple[Tensor, Tensor], position: int) -> Tensor:
        append(storage, *tokens, position=position)
        return storage.key.nansum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    tokens = new_token(2, 2, 12)
    for position in (2, 3, 4):
        ours, theirs = storage_of(2, 2, 20, 12), storage_of(2, 2, 20, 12)
        torch.testing.assert_close(compiled(ours, tokens, position), step(theirs, tokens, position))
        assert_same(ours, theirs)


ZEROS = torch.zeros
MISTAKES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"key": None}, TypeError, "key must be a tensor, got None"),
    ({"key": ZEROS(2, 20, 12)}, ValueError, r"key must be \[B, Hkv, capacity, d\]"),
    ({"value": ZEROS(1, 2, 21, 12)}, ValueError, r"value must be \[1, 2, 20, 12\], got \[1, 2, 21, 12\]"),
    ({"key_components": ZEROS(1, 2, 0, 12, BLOCK)}, ValueError, "key_components must be"),
    ({"key_components": ZEROS(1, 2, 1, BLOCK, 12).mT}, ValueError, "key_components must have contiguous blocks"),
    ({"key": ZEROS(1, 2, 12, 20).mT}, ValueError, "key must be contiguous in its last axis"),
    ({"value_sum": ZEROS(1, 2, 11)}, ValueError, r"value_sum must be \[1, 2, 12\]"),
    ({"value_sum": ZEROS(1, 2, 12, dtype=torch.int32)}, TypeError, "value_sum must be float32"),
    ({"new_key": ZEROS(1, 2, 2, 12)}, ValueError, r"new_key must be \[1, 2, 1, 12\], got \[1, 2, 2, 12\]"),
    ({"new_value": ZEROS(1, 2, 1, 12).half()}, TypeError, "new_value must have key's dtype torch.float32"),
    ({"position": ZEROS(2, dtype=torch.int64)}, ValueError, r"position must be \[1\], got \[2\]"),
    ({"position": ZEROS(1)}, TypeError, "position must be int64"),
    ({"position": torch.tensor([20])}, ValueError, r"position must be in \[0, 20\), got \[20\]"),
    ({"position": torch.tensor([-1])}, ValueError, r"position must be in \[0, 20\), got \[-1\]"),
    ({"position": 20}, ValueError, r"position must be in \[0, 20\), got 20"),
    ({"position": -1}, ValueError, r"position must be in \[0, 20\), got -1"),
]


@pytest.mark.parametrize(("changes", "error", "message"), MISTAKES)
def test_mistakes_are_named_and_change_nothing(changes: dict, error: type[Exception], message: str) -> None:
    right = call_of(1, None, 3)
    before = [x.clone() for x in tensors_of(right) if x is not None]
    if isinstance(changes.get("position"), int):
        changes = {"offset": changes["position"]}
    written = {name: getattr(right, name) for name in WRITTEN}
    copies = {name: x.clone() for name, x in written.items() if x is not None}
    append_call(right._replace(**copies))  # now that layout has passed
    with pytest.raises(error, match=message):
        append_call(right._replace(**changes))
    for x, old in zip((x for x in tensors_of(right) if x is not None), before, strict=True):
        torch.testing.assert_close(x, old, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("wrong", [(1, 2, 3), tuple(storage_of(1, 2, 20, 12)), None], ids=["3", "6", "None"])
def test_what_is_not_cached_is_named(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"cached must be a sparq_kernels\.Cached, got (a tuple of [36]|NoneType)"):
        append(wrong, *new_token(1, 2, 12), position=3)


def test_pages_are_not_appended_to() -> None:
    cached = storage_of(1, 2, 20, 12)._replace(block_table=torch.zeros(1, 1, dtype=torch.int32))
    with pytest.raises(ValueError, match="cached must have no block_table: append_slots writes into pages"):
        append(cached, *new_token(1, 2, 12), position=3)


@pytest.mark.parametrize("name", [name for name in tensors_of(AppendArguments._fields) if name != "key"])
def test_a_tensor_on_another_device_is_named(name: str) -> None:
    """Asked of the check itself: in a machine with no second device the dispatcher would answer for `meta`."""
    call = call_of(1, torch.tensor([3]), 0, "int4")
    with pytest.raises(ValueError, match=f"{name} must be on key's device cpu, got meta"):
        check_append(call._replace(**{name: getattr(call, name).to("meta")}))
