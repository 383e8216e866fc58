"""What of the vLLM plugin needs no vLLM: how a page is divided, the knobs, and what happens where it is missing."""

from __future__ import annotations

import itertools
import logging
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from sparq_kernels import Visible, append_slots, decode

import sparq
import sparq_vllm
from sparq.vllm.decoding import page_sizes, reasons_against
from sparq.vllm.knobs import MIN_LENGTH, budget_of, config_of
from sparq.vllm.pages import ALIGNMENT, content_bytes, pages_of, regions

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = [
    (page, head_dim, dtype, index, interleaved)
    for index in ("int4", "full")
    for page, head_dim, dtype, interleaved in itertools.product(
        page_sizes(index), (32, 64, 80, 128, 256), DTYPES, (False, True)
    )
]


def test_regions_do_not_meet_and_are_aligned() -> None:
    for page, head_dim, dtype, index, interleaved in LAYOUTS:
        found = regions(page, head_dim, dtype, index, interleaved)
        rows = {"key": found.key, "value": found.value}
        if interleaved:  # one behind the other in every row
            assert found.value.begin == head_dim * dtype.itemsize and found.key.strides == (2 * head_dim, 1)
            rows = {"rows": found.value._replace(begin=0)}
        others = {name: x for name, x in found._asdict().items() if x is not None and name not in ("key", "value")}
        ordered = sorted((rows | others).values(), key=lambda region: region.begin)
        for before, after in itertools.pairwise(ordered):
            end = 2 * page * head_dim * dtype.itemsize if interleaved and before.begin == 0 else before.end
            assert end <= after.begin and after.begin % ALIGNMENT == 0
        each = content_bytes(page, head_dim, dtype, index)
        assert ordered[-1].end <= page * each and each % dtype.itemsize == 0 and page * each % ALIGNMENT == 0


@pytest.mark.parametrize(("index", "most"), [("int4", 1.16), ("full", 1.52)])
def test_what_a_page_takes_of_memory(index: str, most: float) -> None:
    for head_dim in (64, 128):
        stock = 2 * head_dim * torch.bfloat16.itemsize
        assert content_bytes(512, head_dim, torch.bfloat16, index) <= most * stock


@pytest.mark.parametrize("index", ["int4", "full"])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_operator_works_on_views_of_an_engines_cache(index: str, interleaved: bool, dtype: torch.dtype) -> None:
    """As vLLM allocates it: layers of a block beside each other, so that pages are far apart."""
    heads, page, head_dim, n = 2, 256, 32, 600
    content = content_bytes(page, head_dim, dtype, index) // dtype.itemsize
    everything = torch.full((5, 3, heads, page, content), torch.nan, dtype=dtype)
    kv_cache = everything[:, 1]
    pages = pages_of(kv_cache, head_dim, index, interleaved)
    table = torch.tensor([[3, 0, 4]], dtype=torch.int32)
    generator = torch.Generator().manual_seed(0)
    key, value = (torch.randn(n, heads, head_dim, generator=generator).to(dtype) for _ in range(2))
    position = torch.arange(n)
    append_slots(pages, key, value, table[0].long()[position // page] * page + position % page)
    assert everything[:, [0, 2]].isnan().all() and kv_cache[[1, 2]].isnan().all()
    if interleaved:  # what FlashAttention reads
        strides = (*kv_cache.stride()[:2], 2 * head_dim, 1)
        rows = kv_cache.as_strided((5, heads, page, 2 * head_dim), strides, kv_cache.storage_offset())
        assert torch.equal(rows[3], torch.cat([key[:page], value[:page]], -1).transpose(0, 1))
    query = torch.randn(1, 4, 1, head_dim, generator=generator).to(dtype)
    budget = sparq.SparqConfig(k=n, index=index).budget(16)
    result = decode(query, pages._replace(block_table=table), Visible(torch.tensor([n])), budget)
    k, v = (x.transpose(0, 1)[None].float().repeat_interleave(2, 1) for x in (key, value))
    expected = torch.nn.functional.scaled_dot_product_attention(query.float(), k, v)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(result.output.float(), expected, rtol=tolerance, atol=tolerance)


def test_a_cache_that_is_laid_out_otherwise_is_refused() -> None:
    content = content_bytes(256, 32, torch.float32, "int4") // 4
    with pytest.raises(ValueError, match="must have the N \\* C elements of a head contiguous"):
        pages_of(torch.zeros(2, 256, 2, content).transpose(1, 2), 32, "int4", False)
    with pytest.raises(ValueError, match=f"kv_cache must have {4 * content} bytes for each of 256 positions, got 260"):
        pages_of(torch.zeros(2, 2, 256, 65), 32, "int4", False)


def engine(**additional: Any) -> SimpleNamespace:
    return SimpleNamespace(additional_config=additional)


def test_knobs_are_those_of_the_config() -> None:
    assert config_of(engine()) == sparq.SparqConfig()
    assert config_of(engine(sparq={"ratio": 16, "mass": 0.9})) == sparq.SparqConfig(ratio=16, mass=0.9)
    assert config_of(SimpleNamespace(additional_config=None)) == sparq.SparqConfig()
    with pytest.raises(ValueError, match=r"ratio must be a multiple of 0\.5, got 8\.3"):
        config_of(engine(sparq={"ratio": 8.3}))
    with pytest.raises(TypeError, match=r"sparq.*: unknown knob 'rato'; the knobs are r, k, ratio"):
        config_of(engine(sparq={"rato": 8}))
    with pytest.raises(TypeError, match="knobs must be a dict, got 8"):
        config_of(engine(sparq=8))


def test_each_row_decides_whether_it_is_dense() -> None:
    assert budget_of(sparq.SparqConfig(), 128, "cpu").dense_below == MIN_LENGTH["cpu"]
    assert budget_of(sparq.SparqConfig(min_length=7), 128, "cuda").dense_below == 7


def test_what_is_not_served_is_named() -> None:
    selected = SimpleNamespace(kv_cache_dtype="fp8", attn_type="encoder", use_mla=True, use_dcp=True, use_pcp=True)
    assert reasons_against(selected) == [
        "multi-head latent attention",
        "context parallelism",
        "a KV cache in fp8",
        "encoder attention",
    ]
    assert reasons_against(SimpleNamespace(kv_cache_dtype="auto", attn_type="decoder")) == []


@pytest.mark.parametrize("version", [None, "0.31.2", "0.34.0"])
def test_registering_never_raises(
    version: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """vLLM calls it in every process: what it raised would end a server that may not use SparQ."""
    fake: Any = None
    if version is not None:
        fake = ModuleType("vllm")
        fake.__version__ = version
    monkeypatch.setitem(sys.modules, "vllm", fake)
    with caplog.at_level(logging.WARNING, logger="vllm.sparq"):
        sparq_vllm.register()
    assert "SparQ is not registered" in caplog.text
    if version is not None:
        assert f"it serves vLLM {sparq_vllm.SUPPORTED}, and this is {version}" in caplog.text
