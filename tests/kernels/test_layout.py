"""Writing keys into component storage and reading them back."""

from __future__ import annotations

import sys

import pytest
import torch
from sparq_kernels import BLOCK, allocate_components, layout, read_components, write_components

PIECES = [[1], [BLOCK], [BLOCK - 1, 1, 1], [3, BLOCK, 2 * BLOCK + 5], [2 * BLOCK, 7], [1] * 5, [10, BLOCK - 10, BLOCK]]


@pytest.mark.parametrize("pieces", PIECES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_keys_written_in_pieces_come_back(pieces: list[int], dtype: torch.dtype) -> None:
    length = sum(pieces)
    key = torch.randn(2, length, 3, 5).to(dtype).transpose(1, 2)  # [B, Hkv, n, d], not contiguous
    components = allocate_components(2, 3, length, 5, dtype, "cpu").fill_(torch.nan)
    position = 0
    for piece in pieces:
        write_components(components, key[:, :, position : position + piece], position)
        position += piece
    assert torch.equal(read_components(components, length), key)
    assert components.isnan().sum() == 2 * 3 * 5 * (components.shape[2] * BLOCK - length)  # nothing else was touched


def test_a_component_of_a_block_is_one_run() -> None:
    length = BLOCK + 44
    components = allocate_components(1, 1, length, 4, torch.float32, "cpu")
    assert components.shape == (1, 1, 2, 4, BLOCK) and components.is_contiguous()
    write_components(components, torch.arange(4.0 * length).reshape(1, 1, length, 4), 0)
    assert torch.equal(components[0, 0, 0, 3], torch.arange(BLOCK) * 4.0 + 3)


def test_rewriting_replaces() -> None:
    components = allocate_components(1, 1, BLOCK + 44, 4, torch.float32, "cpu").zero_()
    write_components(components, torch.ones(1, 1, 20, 4), BLOCK - 6)
    assert read_components(components, BLOCK + 44).sum() == 80


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: allocate_components(1, 0, 3, 4, torch.float32, "cpu"), "num_kv_heads must be at least 1, got 0"),
        (lambda c: write_components(c, torch.zeros(1, 2, 1, 5), 0), r"key must be \[1, 2, n, 4\]"),
        (lambda c: write_components(c, torch.zeros(1, 2, 4), 0), r"key must be \[1, 2, n, 4\]"),
        (
            lambda c: write_components(c, torch.zeros(1, 2, 1, 4), BLOCK),
            rf"\[{BLOCK}, {BLOCK + 1}\) do not fit",
        ),
        (lambda c: write_components(c, torch.zeros(1, 2, 1, 4), -1), r"positions \[-1, 0\) do not fit"),
        (lambda c: write_components(c, torch.zeros(1, 2, 1, 4).double(), 0), "key has dtype torch.float64"),
        (lambda c: write_components(c[0], torch.zeros(1, 2, 1, 4), 0), "components must be"),
        (lambda c: write_components(c[..., :8], torch.zeros(1, 2, 1, 4), 0), "components must be"),
        (lambda c: read_components(c, BLOCK + 1), rf"length must be in \[0, {BLOCK}\], got {BLOCK + 1}"),
    ],
)
def test_mistakes_are_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(allocate_components(1, 2, 100, 4, torch.float32, "cpu"))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("elements", [1, 1000, 1 << 19, (1 << 21) + 7, 5 << 20])
def test_large_memory_begins_with_a_large_page(elements: int, dtype: torch.dtype) -> None:
    made = layout.empty(elements, 2, dtype=dtype)
    assert made.shape == (elements, 2) and made.is_contiguous() and made.dtype == dtype and made._base is None
    made.zero_()
    if sys.platform.startswith("linux") and made.nbytes >= layout.HUGE_PAGE:
        assert made.data_ptr() % layout.HUGE_PAGE == 0
    assert made.untyped_storage().nbytes() <= made.nbytes + 1.5 * layout.HUGE_PAGE


def test_memory_that_is_no_memory_yet() -> None:
    with torch._subclasses.FakeTensorMode():
        assert layout.empty(1 << 20, 8, dtype=torch.float32).shape == (1 << 20, 8)
    assert layout.empty(1 << 20, 8, dtype=torch.float32, device="meta").is_meta
    with torch.device("meta"):  # a default, which is not for those who say what they want
        assert layout.empty(1 << 20, 8, dtype=torch.float32, device="cpu").device.type == "cpu"
    compiled = torch.compile(
        lambda n: layout.empty(n, 8, dtype=torch.float32).fill_(2), backend="eager", fullgraph=True
    )
    assert compiled(1 << 20).shape == (1 << 20, 8)
