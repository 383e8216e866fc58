"""What a sparse step costs before the GPU has anything to do: microseconds of Python, by layer and by step.

    python benchmarks/launch_cost.py

Needs no GPU: Triton gets a driver that compiles for one and launches nothing, and the operators' GPU implementations
are given tensors of the CPU. What is timed is the operators alone, and the whole way of a patched model: `Cache.update`
and the attention function of each layer and the hooks around a forward pass, without anything that the stock model
does, too. The launches themselves (CUDA's own 2 to 3 µs each) and the conversion of their arguments are missing. Static
caches are not measured: they are for graphs, which spend no Python.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import sparq_kernels
import torch
import triton
from rich.console import Console
from sparq_kernels import Budget, Cached, Visible, allocate_components, operator
from sparq_kernels.declaration import implementations
from sparq_kernels.gpu import fused, launch, split
from tables import Grid
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import sparq
from sparq import attention, step
from sparq.cache import upgrade

H100 = GPUTarget("cuda", 90, 32)
MULTIPROCESSORS = 132
CASES = {  # cached positions, and which kernels run then
    "4k": 4000,  # score, select, gather
    "16k": 16000,  # score, histogram, candidates, choose, gather
}


class Driver:
    """As `triton.runtime.driver` wants one, for a card that is not there."""

    def __init__(self, launched: Callable[..., None] | None, target: GPUTarget) -> None:
        self.launched, self.target = launched, target
        self.utils = SimpleNamespace(
            load_binary=lambda name, binary, shared, device: (object(), object(), 0, 0, 1024),
            get_device_properties=lambda device: {"max_shared_mem": 227 << 10},
        )

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        def launch(*arguments: Any) -> None:
            if self.launched is not None:
                self.launched(source, arguments)

        return launch


@contextmanager
def without_a_gpu(launched: Callable[..., None] | None = None, target: GPUTarget = H100) -> Iterator[None]:
    """Tensors of the CPU go the way of a GPU's. launched: gets the source and the arguments of each launch."""
    library = torch.library.Library("sparq_kernels", "IMPL")
    with ExitStack() as stack:
        for kernel in [kernel for module in (launch, fused, split) for kernel in vars(module).values()]:
            if isinstance(kernel, JITFunction):
                kernel.device_caches.clear()  # made for another driver's target
                stack.callback(kernel.device_caches.clear)
        stack.callback(setattr, triton.runtime.driver, "_active", None)  # there may be no other that could be active
        stack.callback(library._destroy)
        triton.runtime.driver.set_active(Driver(launched, target))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # of what is registered twice
        for name, implementation in implementations("cuda").items():
            library.impl(name, implementation, "CPU", allow_override=True)
        stack.enter_context(mock.patch.object(launch, "multiprocessors", lambda device: MULTIPROCESSORS))
        stack.enter_context(mock.patch.object(step, "has_kernel", lambda *_: True))
        stack.enter_context(mock.patch.dict(attention.PAYS_FROM_BYTES, cpu=0))
        for held in (operator._plans, launch._plans, launch._appends, launch._compiled):
            stack.enter_context(mock.patch.dict(held, clear=True))
        yield


def keep_memory() -> None:
    """As PyTorch's allocator for GPUs does; the C library gives large pieces back at once, at the price of a step."""
    if sys.platform.startswith("linux"):
        trim_threshold, mmap_threshold = -1, -3  # malloc.h
        for parameter in (trim_threshold, mmap_threshold):
            ctypes.CDLL(None).mallopt(parameter, 1 << 30)


def model_of(layers: int) -> LlamaForCausalLM:
    """Heads as Llama-3-8B has them, and next to nothing else."""
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=1 << 20,
    )
    return LlamaForCausalLM(config).to(torch.float16).eval()


@torch.inference_mode()
def measure(cached: int, layers: int, steps: int) -> float:
    """Microseconds a layer and step, on a dynamic cache: the median of `steps` steps, after as many not counted."""
    model = sparq.patch(model_of(layers), ratio=8)
    decoder, patch = model.model, model.model._sparq_patch
    modules = [layer.self_attn for layer in decoder.layers]
    cache = DynamicCache()
    upgrade(cache)
    for index in range(layers):
        cache.update(*torch.zeros(2, 1, 8, cached, 128, dtype=torch.float16), index)
    query = torch.zeros(1, 1, 32, 128, dtype=torch.float16).transpose(1, 2)
    key, value = torch.zeros(2, 1, 1, 8, 128, dtype=torch.float16).transpose(2, 3)
    with without_a_gpu():
        times = []
        for _ in range(2 * steps):
            started = time.perf_counter()
            _, passed = patch.before(decoder, (), {"past_key_values": cache})
            for index, module in enumerate(modules):
                keys, values = cache.update(key, value, index)
                attention.sparq_attention("sdpa", module, query, keys, values, None, scaling=module.scaling, **passed)
            patch.after(decoder, (), passed, None)
            times.append(1e6 * (time.perf_counter() - started) / layers)
        assert sparq.report(model).total.sparse_steps == 2 * steps * layers, sparq.report(model)
    return statistics.median(times[steps:])


@torch.inference_mode()
def measure_operators(cached: int, layers: int, steps: int) -> float:
    """The same of `sparq_kernels.append` and `sparq_kernels.decode` alone."""
    rows = (1, 8, cached, 128)
    storage = [
        (*torch.zeros(2, *rows, dtype=torch.float16), allocate_components(*rows, torch.float16, "cpu"))
        for _ in range(layers)
    ]
    query = torch.zeros(1, 1, 32, 128, dtype=torch.float16).transpose(1, 2)
    new_key, new_value = torch.zeros(2, 1, 1, 8, 128, dtype=torch.float16).transpose(2, 3)
    value_sum, length = torch.zeros(1, 8, 128), torch.tensor([cached])
    with without_a_gpu():
        times = []
        for _ in range(2 * steps):
            started = time.perf_counter()
            visible, budget = Visible(length), Budget(r=16, k=128, k_divisor=16)
            for key, value, components in storage:
                layer = Cached(key, components, value, value_sum)
                sparq_kernels.append(layer, new_key, new_value, cached - 1)
                sparq_kernels.decode(query, layer, visible, budget)
            times.append(1e6 * (time.perf_counter() - started) / layers)
    return statistics.median(times[steps:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()
    keep_memory()
    torch.set_num_threads(1)
    rows = []
    for name, cached in CASES.items():
        for what, measured in (("operators alone", measure_operators), ("the plugin's whole part", measure)):
            rows.append((name, what, f"{measured(cached, args.layers, args.steps):.0f}"))
    columns = ("cached", "what", "µs a layer and step")
    Console(width=120).print(Grid(f"Python before a GPU starts, {args.layers} layers", columns, rows).table())


if __name__ == "__main__":
    main()
