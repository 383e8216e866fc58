"""Every dense way that can run on a CPU gives the attention that the benchmark compares with."""

import contextlib
import sys
from types import SimpleNamespace

import pytest
import torch
from dense import CPU_WAYS, PAGE, exact, flash_attn, flashinfer, gpu_ways
from torch.nn.functional import scaled_dot_product_attention
from workload import Shape, make_inputs, relative_error

GROUPED = Shape(2, 4, 2, 16, 3 * PAGE, 4, 8)
UNGROUPED = Shape(2, 2, 2, 16, 3 * PAGE, 4, 8)


@pytest.mark.parametrize("shape", (GROUPED, UNGROUPED), ids=str)
def test_exact_is_softmax_attention(shape):
    x = make_inputs(shape, torch.float32)
    expected = scaled_dot_product_attention(x.query.double(), x.key.double(), x.value.double(), enable_gqa=True)
    assert relative_error(exact(shape, x), expected) < 1e-6


@pytest.mark.parametrize("name", CPU_WAYS)
@pytest.mark.parametrize("shape", (GROUPED, UNGROUPED), ids=str)
def test_torch_ways_are_right(name, shape):
    x = make_inputs(shape, torch.float32)
    assert relative_error(CPU_WAYS[name](shape, x), exact(shape, x)) < 1e-6


def test_gpu_ways_force_one_backend_each():
    names = [way.name for way in gpu_ways(GROUPED)]
    assert len(set(names)) == len(names)
    assert {f"{backend} {how}" for backend in ("flash", "cuDNN", "efficient") for how in ("packed", "gqa")} < {*names}
    ways = {way.name: way for way in gpu_ways(UNGROUPED)}
    assert not any("gqa" in name for name in ways)

    x = make_inputs(UNGROUPED, torch.float32)
    for name, runs_here in (("flash packed", True), ("cuDNN packed", False), ("efficient packed", False)):
        with ways[name].context(), contextlib.nullcontext() if runs_here else pytest.raises(RuntimeError):
            out = ways[name].prepare(UNGROUPED, x)(x)
            assert relative_error(out, exact(UNGROUPED, x)) < 1e-6
    assert torch.backends.cuda.math_sdp_enabled(), "the backends are put back"


@pytest.mark.parametrize("as_tuple", (False, True))
@pytest.mark.parametrize("shape", (GROUPED, UNGROUPED), ids=str)
def test_flash_attn_gets_its_own_layout(monkeypatch, shape, as_tuple):
    def flash_attn_with_kvcache(q, k_cache, v_cache):
        assert q.shape == (shape.batch, 1, shape.num_heads, shape.head_dim)
        assert k_cache.shape == v_cache.shape == (shape.batch, shape.cached, shape.num_kv_heads, shape.head_dim)
        assert q.stride(-1) == k_cache.stride(-1) == v_cache.stride(-1) == 1
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k_cache, v_cache))
        out = scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)
        return (out, None) if as_tuple else out

    fake = SimpleNamespace(flash_attn_with_kvcache=flash_attn_with_kvcache)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", fake)
    x = make_inputs(shape, torch.float32)
    assert relative_error(flash_attn("flash_attn_interface")(shape, x)(x), exact(shape, x)) < 1e-6


class PagedDecode:
    """What flashinfer.BatchDecodeWithPagedKVCacheWrapper computes."""

    def __init__(self, float_workspace_buffer, kv_layout, use_tensor_cores):
        assert kv_layout == "HND" and float_workspace_buffer.dtype == torch.uint8

    def plan(self, indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size, q_data_type):
        assert {t.dtype for t in (indptr, indices, last_page_len)} == {torch.int32}
        self.indptr, self.indices, self.last = indptr.tolist(), indices, last_page_len.tolist()
        self.heads, self.kv_heads, self.head_dim, self.page_size = num_qo_heads, num_kv_heads, head_dim, page_size
        assert len(self.last) == len(self.indptr) - 1 and q_data_type == torch.float32

    def run(self, query, paged):
        assert query.shape == (len(self.last), self.heads, self.head_dim)
        assert all(cache.shape[1:] == (self.kv_heads, self.page_size, self.head_dim) for cache in paged)
        rows = []
        for row, (begin, end) in enumerate(zip(self.indptr, self.indptr[1:], strict=False)):
            length = (end - begin - 1) * self.page_size + self.last[row]
            pages = self.indices[begin:end]
            key, value = (cache[pages].transpose(0, 1).flatten(1, 2)[:, :length] for cache in paged)
            rows.append(scaled_dot_product_attention(query[row][:, None], key, value, enable_gqa=True)[:, 0])
        return torch.stack(rows)


@pytest.mark.parametrize("shape", (GROUPED, UNGROUPED), ids=str)
def test_flashinfer_reads_the_cache_as_pages(monkeypatch, shape):
    monkeypatch.setitem(sys.modules, "flashinfer", SimpleNamespace(BatchDecodeWithPagedKVCacheWrapper=PagedDecode))
    x = make_inputs(shape, torch.float32)
    call = flashinfer(use_tensor_cores=False)(shape, x)
    assert relative_error(call(x), exact(shape, x)) < 1e-6
    other = x.copy()
    other.key.neg_()
    assert relative_error(call(other), exact(shape, other)) < 1e-6, "one plan serves every cache"


def test_flashinfer_refuses_a_broken_page(monkeypatch):
    monkeypatch.setitem(sys.modules, "flashinfer", SimpleNamespace(BatchDecodeWithPagedKVCacheWrapper=PagedDecode))
    shape = Shape(1, 2, 2, 16, PAGE + 1, 4, 8)
    with pytest.raises(ValueError, match="no multiple of a page"):
        flashinfer(use_tensor_cores=True)(shape, make_inputs(shape, torch.float32))
