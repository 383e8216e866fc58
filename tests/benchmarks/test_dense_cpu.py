"""The benchmark's dense C++ kernel gives exact attention, for any length, group, head dimension and dtype."""

import dense_cpu
import pytest
import torch
from dense_cpu import dense_attention
from sparq_kernels import cpu

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 3e-3, torch.float16: 4e-4}  # of storing the output


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


def exact(query, key, value, lengths, scale=None):
    """In float64, row by row."""
    rows = []
    for q, k, v, n in zip(query.double(), key.double(), value.double(), lengths, strict=True):
        q = q.reshape(k.shape[0], -1, k.shape[2]) * (scale or k.shape[2] ** -0.5)
        rows.append((torch.softmax(q @ k[:, :n].mT, -1) @ v[:, :n]).reshape(query.shape[1:]))
    return torch.stack(rows)


def check(query, key, value, lengths, **knobs):
    output = dense_attention(query, key, value, torch.tensor(lengths), **knobs)
    expected = exact(query, key, value, lengths, **knobs)
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


def test_strides_and_scale():
    query, key, value = inputs(3, 64, 300, torch.float32)
    key, value = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (key, value))  # [B, S, H, d] in memory
    check(query, key, value, [300, 299], scale=0.3)


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
        (lambda q, k, v, n: (q, k.half(), v, n), "must share"),
        (lambda q, k, v, n: (q, k, v, n.int()), "must be int64"),
        (lambda q, k, v, n: (q, k.mT.contiguous().mT, v, n), "must be contiguous"),
    ),
)
def test_wrong_arguments_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dense_attention(*change(*inputs(2, 64, 40, torch.float32), torch.tensor([40, 40])))


def test_a_compiler_that_fails_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("SPARQ_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("SPARQ_CXXFLAGS", "--no-such-flag")
    with pytest.raises(cpu.CompilerError, match="no-such-flag"):
        dense_cpu.build()
