"""Every dense way gives the attention that the benchmark compares with, the C++ kernel for any length, group, head
dimension and dtype."""

import contextlib
import sys
from types import SimpleNamespace

import pytest
import torch
from dense import TORCH_WAYS, build, dense_attention, exact
from gpu_stages.dense import PAGE, flash_attn, flashinfer, gpu_ways
from sparq_kernels import cpu
from torch.nn.functional import scaled_dot_product_attention
from workload import Shape, make_inputs, relative_error

GROUPED = Shape(2, 4, 2, 16, 3 * PAGE, 4, 8)
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 3e-3, torch.float16: 4e-4}  # of storing the output
UNGROUPED = Shape(2, 2, 2, 16, 3 * PAGE, 4, 8)


@pytest.mark.parametrize("shape", (GROUPED, UNGROUPED), ids=str)
def test_exact_is_softmax_attention(shape):
    x = make_inputs(shape, torch.float32)
    expected = scaled_dot_product_attention(x.query.double(), x.key.double(), x.value.double(), enable_gqa=True)
    assert relative_error(exact(shape, x), expected) < 1e-6


@pytest.mark.parametrize("name", TORCH_WAYS)
@pytest.mark.parametrize("shape", (GROUPED, UNGROUPED), ids=str)
def test_torch_ways_are_right(name, shape):
    x = make_inputs(shape, torch.float32)
    assert relative_error(TORCH_WAYS[name](shape, x), exact(shape, x)) < 1e-6


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


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several wait for each other on a busy machine; a row has parts all the same
    yield
    torch.set_num_threads(threads)


def inputs(group, head_dim, cached, dtype, batch=2, kv_heads=2):
    generator = torch.Generator().manual_seed(group * head_dim + cached)
    rows = (batch, kv_heads, cached, head_dim)
    query = 2 * torch.randn(batch, kv_heads * group, 1, head_dim, generator=generator)
    key, value = (torch.randn(rows, generator=generator) for _ in range(2))
    return query.to(dtype), key.to(dtype), value.to(dtype)


def in_float64(query, key, value, lengths):
    """In float64, row by row."""
    rows = []
    for q, k, v, n in zip(query.double(), key.double(), value.double(), lengths, strict=True):
        q = q.reshape(k.shape[0], -1, k.shape[2]) * k.shape[2] ** -0.5
        rows.append((torch.softmax(q @ k[:, :n].mT, -1) @ v[:, :n]).reshape(query.shape[1:]))
    return torch.stack(rows)


def check(query, key, value, lengths):
    output = dense_attention(query, key, value, torch.tensor(lengths))
    expected = in_float64(query, key, value, lengths)
    assert output.dtype == query.dtype and output.shape == query.shape
    assert float((output.double() - expected).norm() / expected.norm()) < TOLERANCE[query.dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("head_dim", (8, 64, 72, 80, 96, 128, 256))
@pytest.mark.parametrize("group", range(1, 9))
def test_exact_for_every_group_and_head_dim(group, head_dim, dtype):
    check(*inputs(group, head_dim, 75, dtype), [75, 41])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("length", (1, 2, 31, 32, 33, 255, 1023, 1025, 5000))
def test_exact_for_every_length(length, dtype):
    check(*inputs(4, 64, length + 1, dtype), [length, length + 1])


def test_what_lies_behind_the_length_is_not_read():
    query, key, value = inputs(2, 80, 600, torch.bfloat16)
    lengths = [257, 1]
    expected = dense_attention(query, key, value, torch.tensor(lengths))
    for row, length in enumerate(lengths):
        key[row, :, length:] = value[row, :, length:] = float("nan")
    assert torch.equal(dense_attention(query, key, value, torch.tensor(lengths)), expected)


def test_strides():
    query, key, value = inputs(3, 64, 300, torch.float32)
    key, value = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (key, value))  # [B, S, H, d] in memory
    check(query, key, value, [300, 299])


def test_large_logits_do_not_overflow():
    query, key, value = inputs(2, 64, 300, torch.float32)
    check(query * 300, key, value, [300, 100])


def test_many_heads_are_one_part_each():
    check(*inputs(1, 64, 600, torch.float16, batch=3, kv_heads=8), [600, 1, 300])


@pytest.mark.parametrize("threads", (2, 5))
def test_any_number_of_threads(threads):
    torch.set_num_threads(threads)
    check(*inputs(4, 128, 1500, torch.float32), [1500, 3])


@pytest.mark.parametrize(
    ("change", "message"),
    (
        (lambda q, k, v, n: (q, k, v, n + 100), "length must be 1 to 40"),
        (lambda q, k, v, n: (q, k, v, n * 0), "length must be 1 to 40"),
        (lambda q, k, v, n: (q, k, v[:, :, 1:], n), "do not belong together"),
        (lambda q, k, v, n: (q, k.half(), v, n), "do not belong together"),
        (lambda q, k, v, n: (q, k, v, n.int()), "do not belong together"),
        (lambda q, k, v, n: (q, k.mT.contiguous().mT, v, n), "do not belong together"),
    ),
)
def test_wrong_arguments_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dense_attention(*change(*inputs(2, 64, 40, torch.float32), torch.tensor([40, 40])))


def test_a_compiler_that_fails_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("SPARQ_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("SPARQ_CXXFLAGS", "--no-such-flag")
    with pytest.raises(cpu.CompilerError, match="no-such-flag"):
        build()
