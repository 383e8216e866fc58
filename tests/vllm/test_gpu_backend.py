"""What of the backend for GPUs can be seen without one: its batches, its pages, and its attention step with the CPU's
operator in place of the GPU's and a plain one in place of FlashAttention."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sparq_kernels
import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl, FlashAttentionMetadata
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

import sparq
from sparq.vllm.batch import DecodesFirst
from sparq.vllm.gpu import SparqGPUBackend, SparqGPUImpl, SparqGPUMetadata, SparqGPUMetadataBuilder
from sparq.vllm.knobs import budget_of
from sparq.vllm.pages import content_bytes

HEADS, KV_HEADS, DIM, PAGE = 4, 2, 32, 256


def test_what_it_says_of_itself() -> None:
    assert SparqGPUBackend.get_preferred_block_size(16) == 256
    assert not SparqGPUBackend.supports_block_size(16) and SparqGPUBackend.supports_block_size(512)
    assert not SparqGPUBackend.supports_kv_cache_dtype("fp8") and not SparqGPUBackend.supports_kv_connector()
    assert not SparqGPUBackend.supports_dcp() and not SparqGPUBackend.is_mla()
    support = SparqGPUMetadataBuilder.get_cudagraph_support(SimpleNamespace(), SimpleNamespace())
    assert support == AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE


def test_pages_have_room_for_the_index_but_where_there_is_a_window() -> None:
    sizes = {"block_size": PAGE, "num_kv_heads": KV_HEADS, "head_size": 128, "dtype": torch.bfloat16}
    spec = SparqGPUBackend.customize_spec(FullAttentionSpec(**sizes))
    assert spec.state_content_bytes == content_bytes(PAGE, 128, torch.bfloat16, "int4") < 1.16 * 512
    window = SlidingWindowSpec(**sizes, sliding_window=64)
    assert SparqGPUBackend.customize_spec(window) is window


# --- Batches ----------------------------------------------------------------------------------------------------------


class Plain:
    """In place of vLLM's builder."""

    def __init__(self, spec: Any, names: list[str], vllm_config: Any, device: torch.device) -> None:
        self.kv_cache_spec, self.reorder_batch_threshold = spec, 1

    def _init_reorder_batch_threshold(self, least: int, supports_spec_as_decode: bool) -> None:
        self.reorder_batch_threshold = 4  # as with three drafted tokens


class Builder(DecodesFirst, Plain):
    pass


def make_builder() -> Builder:
    scheduler = SimpleNamespace(max_num_batched_tokens=100, max_num_seqs=8)
    parallel = SimpleNamespace(data_parallel_index=0, rank=0)
    spec = SimpleNamespace(state_content_bytes=1, block_size=PAGE)
    config = SimpleNamespace(scheduler_config=scheduler, parallel_config=parallel)
    return Builder(spec, [], config, torch.device("cpu"))


def batch(queries: list[int], lengths: list[int], prompts: list[bool] | None, table: Tensor) -> CommonAttentionMetadata:
    starts = torch.tensor([0, *queries]).cumsum(0).int()
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=torch.tensor(lengths, dtype=torch.int32),
        num_reqs=len(queries),
        num_actual_tokens=sum(queries),
        max_query_len=max(queries),
        max_seq_len=max(lengths),
        block_table_tensor=table,
        slot_mapping=torch.arange(sum(queries)),
        is_prefilling=None if prompts is None else torch.tensor(prompts),
    )


TABLE = torch.arange(15, dtype=torch.int32).view(3, 5)


def test_prompts_stay_behind() -> None:
    decodes, rest = make_builder().split(batch([1, 1, 40], [300, 700, 340], [False, False, True], TABLE))
    assert decodes is not None and decodes.length.tolist() == [300, 700]
    assert torch.equal(decodes.block_table, TABLE[:2, :3])  # what 700 positions need
    assert rest is not None and rest.query_start_loc.tolist() == [0, 40] and rest.seq_lens.tolist() == [340]
    assert rest.num_actual_tokens == 40 and torch.equal(rest.block_table_tensor, TABLE[2:])


def test_the_last_token_of_a_prompt_is_no_decode() -> None:
    decodes, rest = make_builder().split(batch([1, 1], [300, 340], [False, True], TABLE[:2]))
    assert decodes is not None and decodes.count == 1 and rest is not None and rest.num_reqs == 1
    decodes, rest = make_builder().split(batch([1], [340], [True], TABLE[:1]))
    assert decodes is None and rest is not None


def test_tokens_of_a_draft_are_rows() -> None:
    decodes, rest = make_builder().split(batch([3, 1], [300, 700], [False, False], TABLE[:2]))
    assert rest is None and decodes is not None
    assert decodes.length.tolist() == [298, 299, 300, 700]
    assert decodes.block_table.tolist() == [[0, 1, 2]] * 3 + [[5, 6, 7]]


def test_a_graph_goes_on_reading_the_same_memory() -> None:
    """Captured with the longest context, replayed with others; padded rows see nothing."""
    builder = make_builder()
    table, lengths = TABLE.clone(), torch.tensor([5 * PAGE] * 3, dtype=torch.int32)
    captured, _ = builder.split(batch([1, 1, 1], lengths.tolist(), None, table))
    assert captured is not None and captured.block_table.data_ptr() == table.data_ptr()
    later, _ = builder.split(batch([1, 1, 1], [300, 17, 0], [False] * 3, table))
    assert later is not None and captured.length.tolist() == [300, 17, 0]
    assert later.length.data_ptr() == captured.length.data_ptr()


# --- The attention step -----------------------------------------------------------------------------------------------


def plain_attention(
    self: Any,
    layer: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_cache: Tensor,
    metadata: Any,
    output: Tensor,
    *_: Any,
) -> Tensor:
    """In place of FlashAttention: dense, request by request, from rows [pages, Hkv, N, 2 d]."""
    starts = metadata.query_start_loc.tolist()
    for i, (begin, end) in enumerate(itertools.pairwise(starts)):
        n = int(metadata.seq_lens[i])
        rows = kv_cache[metadata.block_table[i, : -(-n // PAGE)].long()].transpose(0, 1).flatten(1, 2)[:, :n]
        k, v = (x.repeat_interleave(HEADS // KV_HEADS, 0) for x in rows.split(DIM, -1))
        seen = torch.arange(n) <= torch.arange(n - (end - begin), n)[:, None]
        q = query[begin:end].transpose(0, 1)
        found = torch.nn.functional.scaled_dot_product_attention(q, k, v, seen, scale=self.scale)
        output[begin:end] = found.transpose(0, 1)
    return output


@pytest.fixture
def impl(monkeypatch: pytest.MonkeyPatch) -> SparqGPUImpl:
    monkeypatch.setattr(FlashAttentionImpl, "forward", plain_attention)
    made = object.__new__(SparqGPUImpl)
    made.head_size, made.num_kv_heads, made.scale = DIM, KV_HEADS, DIM**-0.5
    made.sliding_window, made.sinks, made.logits_soft_cap, made._pages = (-1, -1), None, 0, None
    made.config = sparq.SparqConfig(k=64, r=16, min_length=0)
    made.budget = budget_of(made.config, DIM, "cuda")
    return made


def metadata_of(common: CommonAttentionMetadata, decodes: Any, rest: Any) -> SparqGPUMetadata:
    def plain(of: Any) -> dict[str, Any]:
        names = ("num_actual_tokens", "max_query_len", "query_start_loc", "max_seq_len", "seq_lens", "slot_mapping")
        return {name: getattr(of, name) for name in names} | {"block_table": of.block_table_tensor}

    dense = None if rest is None else FlashAttentionMetadata(**plain(rest))
    return SparqGPUMetadata(**plain(common), decodes=decodes, rest=dense)


@pytest.mark.parametrize("k", [64, 2048])
@pytest.mark.parametrize("dense_layers", [0, 1])
def test_a_mixed_batch(impl: SparqGPUImpl, k: int, dense_layers: int) -> None:
    """Two decodes and a part of a prompt, from pages that lie among those of other layers."""
    impl.config = sparq.SparqConfig(k=k, r=16, min_length=0, dense_layers=dense_layers)
    impl.budget = budget_of(impl.config, DIM, "cuda")
    content = content_bytes(PAGE, DIM, torch.float32, "int4") // 4
    kv_cache = torch.full((16, 3, KV_HEADS, PAGE, content), torch.nan)[:, 1]
    lengths, queries = [300, 700, 340], [1, 1, 40]
    table = torch.randperm(15, generator=torch.Generator().manual_seed(0)).int().view(3, 5)
    layer = SimpleNamespace(layer_name="model.layers.0.self_attn.attn")
    generator = torch.Generator().manual_seed(1)
    for row, n in enumerate(lengths):
        s = torch.arange(n)
        new = (torch.randn(n, KV_HEADS, DIM, generator=generator) for _ in range(2))
        impl.do_kv_cache_update(layer, *new, kv_cache, table[row].long()[s // PAGE] * PAGE + s % PAGE)
    query = torch.randn(sum(queries), HEADS, DIM, generator=generator)
    common = batch(queries, lengths, [False, False, True], table)
    metadata = metadata_of(common, *make_builder().split(common))
    output = torch.full_like(query, torch.nan)
    impl.forward(layer, query, query, query, kv_cache, metadata, output)
    expected = plain_attention(impl, layer, query, query, query, impl.rows(kv_cache), metadata, torch.empty_like(query))
    torch.testing.assert_close(output[2:], expected[2:])
    if dense_layers or k > 700:
        torch.testing.assert_close(output, expected)
        return
    assert not torch.allclose(output[:2], expected[:2], atol=1e-3)
    cached = impl.pages(kv_cache)._replace(block_table=table[:2])
    seen = sparq_kernels.Visible(torch.tensor(lengths[:2]))
    right = sparq_kernels.decode(query[:2, :, None], cached, seen, impl.budget, mean_value=0.5).output
    assert torch.equal(output[:2], right[:, :, 0])


def test_plain_pages_are_left_to_vllm(impl: SparqGPUImpl, tmp_path: Path) -> None:
    assert not impl.is_ours(torch.zeros(2, KV_HEADS, PAGE, 2 * DIM))
