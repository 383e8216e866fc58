"""The Triton kernels on silicon, in the sizes they are launched in, against the reference.

What does not ask for the GPU's own launches is tried on the CPU, too: there are more machines that can tell whether the
test is right. What matters most comes first, should the time on a GPU not suffice for all.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sparq_kernels
import torch
from sparq_kernels import GROUP, Budget, Cached, Visible
from sparq_kernels.arguments import Arguments
from sparq_kernels.encoding import encode_groups
from sparq_kernels.slots import append_slots_default
from sparq_kernels.value_sum import ExtendArguments

from tests.kernels.cases import (
    CASES,
    Case,
    call_of,
    check_against_equations,
    check_same,
    decode_call,
    index_of,
    make_case,
    new_token,
    reference_call,
    rows_of,
    run_operator,
    run_reference,
    small_integers,
    storage_of,
)
from tests.kernels.pages import cloned, empty_pages, paged, same_bytes, slot_call, slots_of, tokens
from tests.kernels.test_value_sum import LENGTHS
from tests.kernels.test_value_sum import arguments as extension_of
from tests.kernels.test_value_sum import check as check_extended

needs_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_a_gpu])]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
WAYS: dict[str, dict[str, Any]] = {
    "select": {"variant": "split", "distributed": False, "width": 4096},
    "distributed": {"variant": "split", "distributed": True, "width": 4096},
    "fused": {"variant": "fused", "width": 4096},
}


@pytest.fixture(autouse=True)
def kernel_is_there(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu"):
        assert sparq_kernels.backend("cuda") == "triton"


def on_gpu_only(test: Callable) -> Callable:
    return pytest.mark.gpu(needs_a_gpu(test))


@contextlib.contextmanager
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def on_device(case: Case, device: str) -> Case:
    fields = {field.name: getattr(case, field.name) for field in dataclasses.fields(case)}
    return Case(**{name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in fields.items()})


def on_gpu(case: Case, device: str = "cuda") -> Case:
    return on_device(case, device)


def call_on(call: Arguments, device: str) -> Arguments:
    return Arguments(*(x.to(device) if isinstance(x, torch.Tensor) else x for x in call))


def storage_on(cached: Cached, device: str) -> Cached:
    return Cached(*(None if x is None else x.to(device) for x in cached))  # type: ignore[arg-type]


def on_cpu(output: tuple[torch.Tensor | None, ...]) -> sparq_kernels.DecodeOutput:
    return sparq_kernels.DecodeOutput(*(None if x is None else x.cpu() for x in output))


def run_way(case: Case, way: str) -> sparq_kernels.DecodeOutput:
    from sparq_kernels.gpu import launch

    call = call_of(case)
    return sparq_kernels.DecodeOutput(*launch.run(launch.plan(call, **WAYS[way]), call))


def check_close(result: sparq_kernels.DecodeOutput, reference: sparq_kernels.DecodeOutput) -> None:
    """In rows so long that the k-th score has others within rounding, which may change places with it."""
    for ours, theirs in zip(result.positions.flatten(0, 2), reference.positions.flatten(0, 2), strict=True):
        mine, right = ({s for s in row.tolist() if s >= 0} for row in (ours, theirs))
        assert len(mine) == len(right) and len(mine & right) >= len(right) - 1 - len(right) // 1000
    torch.testing.assert_close(result.output, reference.output, rtol=2e-2, atol=2e-3)
    torch.testing.assert_close(result.alpha, reference.alpha, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", [1, 2, 4, 7, 8, 71])
def test_groups(group: int, dtype: torch.dtype, device: str) -> None:
    """Query heads to a KV head as models have them, heads of a usual size; rows of different lengths, left padding."""
    head_dim = 64 if group == 71 else 128
    shape = (2, 2 * group, 2, 5000, head_dim, dtype)
    case = make_case(*shape, lengths=[5000, 4500], starts=[77, 0], r=head_dim // 4, k=64, k_divisor=16)
    check_close(on_cpu(run_operator(on_device(case, device))), run_reference(case))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("batch", [1, 140], ids=["few rows", "many rows"])
@pytest.mark.parametrize("edge", [4096, 8192])
def test_a_row_grows_across_an_edge(edge: int, batch: int, device: str) -> None:
    """Where other kernels take over, or the same in other sizes: with few rows `select`, then the distributed
    selection, with many the fused kernel, then the distributed selection."""
    batch = batch if device == "cuda" else min(batch, 2)  # the CPU has no other way for many, and takes long for them
    case = on_device(make_case(batch, 4, 2, edge + 3, 16, torch.float16, r=4, k=64), device)
    plans = set()
    for length in (edge - 1, edge, edge + 1, edge + 3):
        key, value = case.key[:, :, :length], case.value[:, :, :length]
        value_sum = value.sum(2, dtype=torch.float32)
        lengths = torch.full_like(case.length, length)
        now = dataclasses.replace(case, key=key, value=value, value_sum=value_sum, length=lengths)
        check_close(on_cpu(run_operator(now)), on_cpu(run_reference(now)))
        if device == "cuda":
            from sparq_kernels.gpu import launch

            plans.add(launch.plan(call_of(now)).sizes)
    assert device == "cpu" or len(plans) == 2


@on_gpu_only
@pytest.mark.parametrize("cached", [5000, 20000, 300000])
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_long_rows(cached: int, group: int, dtype: torch.dtype) -> None:
    """As launched: two programs' worth of keys and more; scores within rounding of the k-th may change places."""
    shape = (1, 2 * group, 2, cached, 128, dtype)
    case = make_case(*shape, starts=[77], r=32, k=64, k_divisor=16)
    check_close(on_cpu(run_operator(on_gpu(case))), run_reference(case))


@on_gpu_only
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ties_go_to_the_lower_index(dtype: torch.dtype, way: str) -> None:
    case = make_case(2, 3, 1, 3000, 4, dtype, draw=small_integers, r=2, k=500, scale=0.25, local=3)
    check_same(case, on_cpu(run_way(on_gpu(case), way)), run_reference(case))


@on_gpu_only
@pytest.mark.parametrize("cached", [3000, 9000, 70000])
def test_all_scores_equal(cached: int) -> None:
    case = make_case(cached=cached, r=4, k=cached // 2, local=2)
    case.query.zero_()
    result = on_cpu(run_operator(on_gpu(case)))
    assert result.positions[0, 0, 0].tolist() == [*range(cached // 2 - 2), cached - 2, cached - 1]


@on_gpu_only
@pytest.mark.parametrize("cached", [3000, 20000])
def test_every_run_gives_the_same_bits(cached: int) -> None:
    case = on_gpu(make_case(4, 8, 2, cached, 64, torch.float16, r=16, k=300))
    first = run_operator(case)
    for _ in range(20):
        for a, b in zip(run_operator(case), first, strict=True):
            assert torch.equal(a, b)


@on_gpu_only
def test_offsets_beyond_two_to_the_31() -> None:
    """2^20 positions of 32 heads: the last head begins behind the 2^31st element of each tensor."""
    if torch.cuda.get_device_properties(0).total_memory < 60 << 30:
        pytest.skip("needs 60 GB of GPU memory")
    heads, cached, head_dim = 32, 1 << 20, 128
    shape = (1, heads, cached, head_dim)
    generator = torch.Generator("cuda").manual_seed(0)
    key, value = (torch.randn(shape, dtype=torch.float16, device="cuda", generator=generator) for _ in range(2))
    components = sparq_kernels.allocate_components(*shape, torch.float16, "cuda")
    sparq_kernels.write_components(components, key, 0)
    query = torch.randn(1, heads, 1, head_dim, dtype=torch.float16, device="cuda", generator=generator)
    value_sum, length = value.sum(2, dtype=torch.float32), torch.tensor([cached], device="cuda")
    cached, visible, budget = Cached(key, components, value, value_sum), Visible(length), Budget(r=16, k=2000)
    whole = sparq_kernels.decode(query, cached, visible, budget, return_positions=True)
    last_head = Cached(*(None if x is None else x[:, -1:].clone() for x in cached))  # type: ignore[arg-type]
    last = sparq_kernels.decode(query[:, -1:].clone(), last_head, visible, budget, return_positions=True)
    assert torch.equal(whole.positions[:, -1:], last.positions)
    torch.testing.assert_close(whole.output[:, -1:], last.output)


@on_gpu_only
@pytest.mark.parametrize("index", ["full", "int4"])
@pytest.mark.parametrize("cached", [3000, 20000])
def test_launching_waits_for_nothing(cached: int, index: str) -> None:
    shape = (2, 4, 2, cached, 64, torch.float16)
    case = on_gpu(make_case(*shape, starts=[3, 0], holes=0.1, index=index, r=16, k=100))
    case.options |= {"mass": 0.9} if index == "int4" else {}
    storage = storage_on(storage_of(2, 2, GROUP, 12, index=index), "cuda")
    tokens, position = [x.cuda() for x in new_token(2, 2, 12)], torch.tensor([3, GROUP - 1], device="cuda")
    extension = ExtendArguments(*(x.cuda() for x in extension_of()))
    pages = empty_pages(2, 2, GROUP, 12, torch.float16, index, "cuda")
    slots = torch.tensor([3, GROUP - 1, -1], device="cuda")
    new_rows = [x.cuda() for x in tokens(3, 2, 12, torch.float16)]
    in_pages = call_on(paged(call_of(make_case(*shape, index=index, r=16, k=100)), GROUP, index), "cuda")
    with waiting_is_an_error():
        run_operator(case)
        decode_call(in_pages)
        sparq_kernels.append_slots(pages, *new_rows, slots)
        sparq_kernels.append(storage, *tokens, position)
        sparq_kernels.extend_sum(*extension[:4], length=extension.length)
        sparq_kernels.count_valid(Visible(extension.length, mask=extension.valid), Budget(r=1, k=5))


@on_gpu_only
@pytest.mark.parametrize(("index", "mass"), [("full", None), ("int4", 0.8)], ids=["full", "int4"])
@pytest.mark.parametrize(("batch", "cached"), [(1, 3000), (1, 40000), (300, 500)])
def test_graph_replays_with_other_lengths(batch: int, cached: int, index: str, mass: float | None) -> None:
    """Captured at one length, replayed while rows grow, k following their lengths."""
    shape = (batch, 2, 1, cached, 64, torch.float16)
    case = on_gpu(make_case(*shape, index=index, r=16, k=20, k_divisor=8, mass=mass))
    case.length.fill_(cached // 2)
    run_operator(case)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run_operator(case)
    for length in (cached // 2, cached // 2 + 1, cached - 1, cached, 3):
        case.length.fill_(length)
        case.value_sum.copy_(case.value[:, :, :length].sum(2, dtype=torch.float32))
        for x in captured:
            x.fill_(-7)
        graph.replay()
        for a, b in zip(captured, run_operator(case), strict=True):
            assert torch.equal(a, b)


@on_gpu_only
@pytest.mark.parametrize("index", ["full", "int4"])
def test_graph_writes_to_pages_and_reads_them(index: str) -> None:
    """Captured once, replayed while a row grows into a page of its own."""
    page, length = 256, 600
    call = call_on(
        paged(call_of(make_case(1, 4, 2, length, 64, torch.float16, index=index, r=16, k=40)), page, index), "cuda"
    )
    assert call.block_table is not None
    used = call.block_table[0, :3].tolist()
    call.block_table[0, 3] = next(p for p in range(call.key.shape[0]) if p not in used)
    new, slots = [x.cuda() for x in tokens(1, 2, 64, torch.float16)], torch.tensor([-1], device="cuda")

    def step() -> sparq_kernels.DecodeOutput:
        sparq_kernels.append_slots(call.cached, *new, slots)
        return decode_call(call)

    step()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for s in range(length, 3 * page + 2):
        slots.copy_(slots_of(call.block_table.cpu(), 0, s, s + 1, page))
        call.length.fill_(s + 1)
        graph.replay()
        for a, b in zip(captured, step(), strict=True):
            assert torch.equal(a, b)
    result, reference = on_cpu(captured), on_cpu(reference_call(call))
    assert result.output.isfinite().all()
    if index == "full":
        check_close(result, reference)


@on_gpu_only
def test_two_graphs_and_eager_calls_share_nothing() -> None:
    cases = [on_gpu(make_case(2, 8, 2, 20000, 64, torch.float16, seed=seed, r=16, k=500)) for seed in range(3)]
    expected = [[x.clone() for x in run_operator(case)] for case in cases]
    graphs, outputs = [], []
    for case in cases[:2]:
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            outputs.append(run_operator(case))
    streams = [torch.cuda.Stream() for _ in range(3)]
    for _ in range(20):
        torch.cuda.synchronize()
        for graph, stream in zip(graphs, streams, strict=False):
            with torch.cuda.stream(stream):
                graph.replay()
        with torch.cuda.stream(streams[2]):
            eager = run_operator(cases[2])
        torch.cuda.synchronize()
        for result, right in zip([*outputs, eager], expected, strict=True):
            for a, b in zip(result, right, strict=True):
                assert torch.equal(a, b)


@on_gpu_only
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is no second GPU")
def test_the_other_device() -> None:
    case = make_case(2, 8, 2, 5000, 64, torch.float16, r=16, k=300)
    first, second = run_operator(on_gpu(case, "cuda:0")), run_operator(on_gpu(case, "cuda:1"))
    assert torch.cuda.current_device() == 0 and second.output.device.index == 1
    for a, b in zip(on_cpu(first), on_cpu(second), strict=True):
        assert torch.equal(a, b)


@on_gpu_only
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("positions", [5, [3, 19, 4], [-1, 20, 1 << 40]])
def test_append(dtype: torch.dtype, positions: int | list[int]) -> None:
    ours, theirs = storage_on(storage_of(3, 2, 20, 12, dtype), "cuda"), storage_of(3, 2, 20, 12, dtype)
    tokens = new_token(3, 2, 12, dtype)
    position = positions if isinstance(positions, int) else torch.tensor(positions, device="cuda")
    sparq_kernels.append(ours, *(x.cuda() for x in tokens), position=position)
    for b, row in enumerate([positions] * 3 if isinstance(positions, int) else positions):
        if 0 <= row < 20:
            sparq_kernels.append(rows_of(theirs, b), *(x[b : b + 1] for x in tokens), position=row)
    check_same_storage(ours, theirs)


def check_same_storage(ours: Cached, theirs: Cached) -> None:
    for a, b in zip(storage_on(ours, "cpu"), theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@on_gpu_only
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("positions", [GROUP - 1, [GROUP - 1, 3], [2 * GROUP - 1, GROUP]])
def test_append_codes_a_group_that_is_whole(dtype: torch.dtype, positions: int | list[int]) -> None:
    theirs, tokens = storage_of(2, 2, 2 * GROUP, 40, dtype, "int4"), new_token(2, 2, 40, dtype)
    theirs.key.copy_(torch.randn(theirs.key.shape, generator=torch.Generator().manual_seed(1)))
    ours = storage_on(theirs, "cuda")
    position = positions if isinstance(positions, int) else torch.tensor(positions, device="cuda")
    sparq_kernels.append(ours, *(x.cuda() for x in tokens), position=position)
    for b, row in enumerate([positions] * 2 if isinstance(positions, int) else positions):
        sparq_kernels.append(rows_of(theirs, b), *(x[b : b + 1] for x in tokens), position=row)
    check_same_storage(ours, theirs)


@on_gpu_only
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [1, 80, 128, 256])
def test_encode(dtype: torch.dtype, head_dim: int) -> None:
    """Bit for bit what PyTorch makes of keys of all sizes, some of them no numbers."""
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(2, 2, 5000, head_dim, generator=generator) * 10 ** torch.randint(
        -5, 4, (2, 2, 1, head_dim), generator=generator
    )
    key = key.to(dtype)
    key[0, 0, 300:309], key[0, 1, :600, 0], key[1, 0, 77], key[1, 1, 2560:2816] = torch.inf, 3.0, -torch.inf, torch.nan
    codes, ranges = index_of(key.cuda(), "int4")
    assert ranges is not None
    expected = codes.cpu(), ranges.cpu()
    encode_groups(key, *expected, 0, key.shape[2] // GROUP)
    torch.testing.assert_close(ranges.cpu(), expected[1], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(codes.cpu(), expected[0])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("batch", [1, 140], ids=["few rows", "many rows"])
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("page", [64, 256, 2048])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pages(dtype: torch.dtype, page: int, group: int, batch: int, device: str) -> None:
    """As launched, by `select` and, with many rows, the fused kernel; rows of different lengths, the last page of some
    just full."""
    batch = batch if device == "cuda" else 2
    lengths = [(1700, 1536, 1, 700)[b % 4] for b in range(batch)]
    case = make_case(batch, 2 * group, 2, 1700, 64, dtype, lengths=lengths, r=16, k=64, dense_below=10)
    call = paged(call_of(case), page, "full")
    check_close(on_cpu(decode_call(call_on(call, device))), reference_call(call))


@on_gpu_only
@pytest.mark.parametrize("length", [3000, 20000])
@pytest.mark.parametrize("index", ["full", "int4"])
@pytest.mark.parametrize("group", [1, 4, 40])
def test_pages_give_what_a_row_gives(group: int, index: str, length: int) -> None:
    """The mean value of many pages, which several programs have added up; scores are the same to the last bits."""
    shape = (1, 2 * group, 2, length, 128, torch.bfloat16)
    call = call_of(make_case(*shape, index=index, r=32, k=400, query_length=2))
    in_pages = on_cpu(decode_call(call_on(paged(call, 256, index), "cuda")))
    in_a_row = on_cpu(decode_call(call_on(call, "cuda")))
    check_close(in_pages._replace(positions=in_pages.positions[..., : in_a_row.positions.shape[-1]]), in_a_row)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [20, 128, 256])
@pytest.mark.parametrize("index", ["full", "int4"])
def test_append_slots(index: str, head_dim: int, dtype: torch.dtype, device: str) -> None:
    """Codes bit for bit, sums to the last bits; what writes a page need not know what is in it already."""
    theirs = empty_pages(3, 2, 512, head_dim, dtype, index)
    slots = torch.randperm(1024, generator=torch.Generator().manual_seed(0))
    new = tokens(len(slots), 2, head_dim, dtype)
    ours = storage_on(cloned(theirs), device)
    for begin, end in ((0, 7), (7, 1000), (1000, 1024)):
        part = [*(x[begin:end] for x in new), slots[begin:end]]
        append_slots_default(slot_call(theirs, *part))
        sparq_kernels.append_slots(ours, *(x.to(device) for x in part))
    ours = storage_on(ours, "cpu")
    torch.testing.assert_close(ours.value_sum, theirs.value_sum, rtol=1e-5, atol=1e-4, equal_nan=True)
    same_bytes(ours._replace(value_sum=None), theirs._replace(value_sum=None))


@on_gpu_only
@pytest.mark.parametrize("cached", [5000, 20000, 300000])
@pytest.mark.parametrize("group", [1, 4, 12, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_rows_of_codes(cached: int, group: int, dtype: torch.dtype) -> None:
    """As launched, by the reference on the same device: the weights have sixteen bits, of large groups eight."""
    shape = (1, 2 * group, 2, cached, 128, dtype)
    case = on_gpu(make_case(*shape, index="int4", r=64, k=400, mass=0.95, k_min=50, scale=0.2))
    result, reference = run_operator(case), run_reference(case)
    few = 0.02 if group <= 32 else 0.2
    assert ((result.read - reference.read).abs() <= 1 + few * reference.read).all()
    torch.testing.assert_close(result.alpha, reference.alpha, rtol=few, atol=few)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_extend_sum(lengths: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    def extend(call: ExtendArguments) -> None:
        there = ExtendArguments(*(x.to(device) for x in call))
        sparq_kernels.extend_sum(*there[:4], length=there.length)
        for own, result in zip(call[:2], there[:2], strict=True):
            own.copy_(result)

    check_extended(extension_of(lengths, dtype=dtype), extend)


@on_gpu_only
@pytest.mark.parametrize("queries", [1, 3])
def test_counts_of_a_mask(queries: int) -> None:
    mask = torch.rand(3, 9000, generator=torch.Generator().manual_seed(0)) < 0.5
    length, start = torch.tensor([9000, 2, 8191]), torch.tensor([7, 0, 8000])
    visible, budget = Visible(length, start, mask), Budget(r=1, k=500, k_divisor=4)
    expected = sparq_kernels.count_valid(visible, budget, queries=queries)
    there = Visible(length.cuda(), start.cuda(), mask.cuda())
    counts = sparq_kernels.count_valid(there, budget, queries=queries)
    assert torch.equal(counts.cpu(), expected)


@on_gpu_only
def test_float64_takes_the_reference() -> None:
    case = make_case(dtype=torch.float64, r=4, k=20)
    torch.testing.assert_close(on_cpu(run_operator(on_gpu(case))).output, run_reference(case).output)


@on_gpu_only
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_reference(name: str, dtype: torch.dtype, way: str) -> None:
    case = make_case(dtype=dtype, **CASES[name])
    result = on_cpu(run_way(on_gpu(case), way))
    if "mass" in CASES[name]:  # sums of scores that are within rounding of it may go either way
        check_against_equations(case, result)
    else:
        check_same(case, result, run_reference(case))


@on_gpu_only
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_equal_the_equations(name: str, dtype: torch.dtype, way: str) -> None:
    case = make_case(dtype=dtype, index="int4", **CASES[name])
    check_against_equations(case, on_cpu(run_way(on_gpu(case), way)), is_rounded=True)
