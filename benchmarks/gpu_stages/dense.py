"""Dense attention of one new token on a GPU, in every way worth comparing with."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from dense import enable_gqa, matmul, packed
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from workload import Inputs, Shape

PAGE = 16  # positions, as serving engines have it: FlashInfer divides a row among programs page by page

Call = Callable[[Inputs], Tensor]


@dataclass(frozen=True)
class DenseWay:
    """One way to compute an output.  `prepare` does what a model would do once per step or seldomer, not per layer;
    it and the call it gives may raise where the way does not serve.  `context` holds around preparation and calls."""

    name: str
    prepare: Callable[[Shape, Inputs], Call]
    context: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext


def unprepared(call: Callable[[Shape, Inputs], Tensor]) -> Callable[[Shape, Inputs], Call]:
    return lambda shape, _: lambda x: call(shape, x)


def forced(backend: SDPBackend) -> Callable[[], AbstractContextManager[object]]:
    return lambda: sdpa_kernel(backend)


def flash_attn(module: str) -> Callable[[Shape, Inputs], Call]:
    """`flash_attn` is FlashAttention 2, `flash_attn_interface` 3: the same function with the same first arguments."""

    def prepare(shape: Shape, x: Inputs) -> Call:
        attend = importlib.import_module(module).flash_attn_with_kvcache

        def call(x: Inputs) -> Tensor:
            # It wants [B, S, H, d] and takes any strides but the last.
            out = attend(x.query.transpose(1, 2), x.key.transpose(1, 2), x.value.transpose(1, 2))
            return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

        return call

    return prepare


def flashinfer(use_tensor_cores: bool) -> Callable[[Shape, Inputs], Call]:
    def prepare(shape: Shape, x: Inputs) -> Call:
        wrapper_class = importlib.import_module("flashinfer").BatchDecodeWithPagedKVCacheWrapper
        if shape.cached % PAGE:
            raise ValueError(f"{shape.cached} cached positions are no multiple of a page of {PAGE}")
        device = x.query.device
        # Every KV head becomes a request of its own: the contiguous cache then already is a table of pages.
        requests, pages = shape.batch * shape.num_kv_heads, shape.cached // PAGE
        workspace = torch.zeros(256 << 20, dtype=torch.uint8, device=device)
        wrapper = wrapper_class(workspace, "HND", use_tensor_cores=use_tensor_cores)
        wrapper.plan(
            torch.arange(requests + 1, dtype=torch.int32, device=device) * pages,
            torch.arange(requests * pages, dtype=torch.int32, device=device),
            torch.full((requests,), PAGE, dtype=torch.int32, device=device),
            shape.num_heads // shape.num_kv_heads,
            1,
            shape.head_dim,
            PAGE,
            q_data_type=x.query.dtype,
        )

        def call(x: Inputs) -> Tensor:
            query = x.query.view(requests, -1, shape.head_dim)
            paged = (requests * pages, 1, PAGE, shape.head_dim)
            return wrapper.run(query, (x.key.view(paged), x.value.view(paged))).view(x.query.shape)

        return call

    return prepare


def gpu_ways(shape: Shape) -> list[DenseWay]:
    """Each backend of SDPA alone, with the group packed into the query axis and with enable_gqa (the same thing where
    every query head has its own KV head), and others' kernels, which may not be installed."""
    ways = []
    for name, backend in (
        ("flash", SDPBackend.FLASH_ATTENTION),
        ("cuDNN", SDPBackend.CUDNN_ATTENTION),
        ("efficient", SDPBackend.EFFICIENT_ATTENTION),
    ):
        ways.append(DenseWay(f"{name} packed", unprepared(packed), forced(backend)))
        if shape.num_heads != shape.num_kv_heads:
            ways.append(DenseWay(f"{name} gqa", unprepared(enable_gqa), forced(backend)))
    ways.append(DenseWay("matmul", unprepared(matmul)))
    ways.append(DenseWay("FlashAttention 2", flash_attn("flash_attn")))
    ways.append(DenseWay("FlashAttention 3", flash_attn("flash_attn_interface")))
    ways.append(DenseWay("FlashInfer", flashinfer(use_tensor_cores=False)))
    ways.append(DenseWay("FlashInfer tensor cores", flashinfer(use_tensor_cores=True)))
    return ways
