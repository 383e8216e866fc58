"""The Triton kernels in Triton's interpreter: every way through them against the reference, index for index."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import sparq_kernels
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparq_kernels import BLOCK, GROUP

triton = pytest.importorskip("triton", reason="Triton has no build for this system")

from sparq_kernels.append import AppendArguments, check_append  # noqa: E402
from sparq_kernels.arguments import Arguments  # noqa: E402
from sparq_kernels.counting import CountArguments  # noqa: E402
from sparq_kernels.encoding import EncodeArguments, encode_groups  # noqa: E402
from sparq_kernels.gpu import launch, split, topk  # noqa: E402
from sparq_kernels.slots import append_slots_default, check_slots  # noqa: E402
from sparq_kernels.value_sum import check_extending  # noqa: E402

from tests.kernels.cases import (  # noqa: E402
    CASES,
    Case,
    call_of,
    check_against_equations,
    check_same,
    empty_index,
    index_of,
    make_case,
    new_token,
    reference_call,
    rows_of,
    run_reference,
    small_integers,
    storage_of,
)
from tests.kernels.pages import (  # noqa: E402
    PAGED_CASES,
    as_rows,
    check_any_order,
    cloned,
    empty_pages,
    paged,
    same_bytes,
    shared_prefix,
    slot_call,
    tokens,
)
from tests.kernels.test_value_sum import LENGTHS, arguments, check  # noqa: E402

# Kernels divide by 0, and throw the result away, where nothing is valid; numpy has a word to say about it.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
MULTIPROCESSORS = 6  # 24 programs share the scoring of all heads
# The ways through the kernels, as changes to what shapes this small would get.
WAYS: dict[str, dict[str, Any]] = {
    "select": {"variant": "split", "distributed": False, "width": 1024},
    "distributed": {"variant": "split", "distributed": True, "width": 128},
    "fused": {"variant": "fused", "width": 1024},
}


@pytest.fixture(autouse=True)
def small_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launch.INTERPRETED
    monkeypatch.setattr(launch, "multiprocessors", lambda device: MULTIPROCESSORS)


@pytest.fixture(autouse=True)
def poisoned_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scratch memory and results begin as NaN, or as numbers that would lead outside everything."""
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = empty(*args, **kwargs)
        if tensor.dtype == torch.uint8:  # scratch memory, read as float32 or int32
            tensor.view(torch.int32).fill_(0x7FC00000)
            return tensor
        return tensor.fill_(torch.nan if tensor.is_floating_point() else 1 << 30)

    monkeypatch.setattr(launch.torch, "empty", poisoned)


def run_call(call: Arguments, way: str, **changes: Any) -> sparq_kernels.DecodeOutput:
    plan = launch.plan(call, **{**WAYS[way], **changes})
    assert way == "distributed" or call.capacity <= plan.sizes.width
    return sparq_kernels.DecodeOutput(*launch.run(plan, call))


def run_kernels(case: Case, way: str, counts: torch.Tensor | None = None, **changes: Any) -> sparq_kernels.DecodeOutput:
    return run_call(call_of(case, counts=counts), way, **changes)


def run_and_check(case: Case, way: str, **changes: Any) -> sparq_kernels.DecodeOutput:
    """Against the equations: scores from codes are off by no more than weights of eight bits would make them."""
    result = run_kernels(case, way, **changes)
    assert result.output.isfinite().all() and result.alpha.isfinite().all()
    check_against_equations(case, result, is_rounded=case.key_ranges is not None)
    return result


def fits(name: str, way: str) -> bool:
    return way == "distributed" or CASES[name].get("cached", 300) <= 1024


@pytest.mark.parametrize(("name", "way"), [(name, way) for way in WAYS for name in CASES if fits(name, way)])
def test_equals_the_reference(name: str, way: str) -> None:
    case = make_case(**CASES[name])
    result = run_kernels(case, way)
    assert result.output.isfinite().all() and result.alpha.isfinite().all()
    reference = run_reference(case)
    check_same(case, result, reference)
    assert torch.equal(result.positions, reference.positions)


# Each on one way, in turn, but for rows that only one holds.
CODED = [name for name in CASES if CASES[name].get("cached", 300) >= GROUP]
CODED_WAYS = [(name, way if fits(name, way) else "distributed") for name, way in zip(CODED, itertools.cycle(WAYS))]


@pytest.mark.parametrize(("name", "way"), CODED_WAYS)
def test_codes_equal_the_equations(name: str, way: str) -> None:
    run_and_check(make_case(index="int4", **CASES[name]), way)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("group", [1, 4, 12])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_in_dtypes_and_groups(dtype: torch.dtype, group: int, way: str) -> None:
    """Ragged, padded, across a block's end for one of two queries; r and k not powers of two."""
    shape = {"cached": 770, "lengths": [770, 512]} if way != "distributed" else {"cached": BLOCK + 257}
    options: dict[str, Any] = {"r": 21, "k": 45, "mass": 0.7, "seed": group, "query_length": 2, "index": "int4"}
    batch = len(shape.get("lengths", [0]))  # type: ignore[arg-type]
    run_and_check(make_case(batch, group, 1, head_dim=64, dtype=dtype, **shape, **options), way)


@pytest.mark.parametrize("way", WAYS)
def test_codes_give_what_the_reference_gives(way: str) -> None:
    """Closer than eight bits: the weights have sixteen."""
    case = make_case(2, 8, 2, 770, 64, torch.float16, lengths=[770, 300], index="int4", r=32, k=60)
    result, reference = run_kernels(case, way), run_reference(case)
    torch.testing.assert_close(result.alpha, reference.alpha, rtol=5e-4, atol=1e-5)
    assert (result.positions != reference.positions).float().mean() < 0.02


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("exponent", [-14, 12])
def test_codes_of_small_and_large_keys(exponent: int, way: str) -> None:
    """No weight leaves the range of what is multiplied."""
    case = make_case(1, 4, 1, 600, 16, torch.float16, index="int4", r=8, k=40, scale=2.0**-exponent / 4)
    case.key.mul_(2.0**exponent)
    case.key_components, case.key_ranges = index_of(case.key, "int4")
    run_and_check(case, way)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_codes_of_padding_do_not_matter(poison: float, way: str) -> None:
    case = make_case(1, 4, 2, 600, 16, index="int4", starts=[100], r=8, k=40)
    clean = run_kernels(case, way)
    key = case.key.clone()
    key[:, :, :100] = poison
    codes, ranges = index_of(key, "int4")
    result = run_kernels(dataclasses.replace(case, key=key, key_components=codes, key_ranges=ranges), way)
    for ours, theirs in zip(result, clean, strict=True):
        assert torch.equal(ours, theirs)


def test_codes_that_words_cannot_be_read_from_are_refused() -> None:
    case = make_case(1, 4, 2, 300, 16, index="int4", r=4, k=20)
    memory = torch.zeros(case.key_components.numel() + 64, dtype=torch.uint8)
    moved = memory[1 - memory.data_ptr() % 4 :][: case.key_components.numel()].view(case.key_components.shape)
    askew = dataclasses.replace(case, key_components=moved)
    group = 16 * GROUP // 2
    spread = dataclasses.replace(case, key_components=torch.zeros(4 * group + 3, dtype=torch.uint8))
    strides = (1, 2 * group + 1, group, GROUP // 2, 1)
    spread.key_components = spread.key_components.as_strided((1, 2, 2, 16, GROUP // 2), strides)
    for wrong in (askew, spread):
        with pytest.raises(ValueError, match="key_components must lie at multiples of 4 bytes"):
            run_kernels(wrong, "select")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mass", [0.1, 0.5, 0.9])
def test_mass_of_equal_scores(mass: float, way: str) -> None:
    """The window's share counts; the rest comes from the lower indices."""
    case = make_case(1, 3, 1, 1000, 16, r=4, k=1000, local=40, mass=mass)
    case.query.zero_()
    result = run_and_check(case, way)
    read = int(result.read)
    assert abs(read - 1000 * mass) <= 1
    assert result.positions[0, 0, 0, :read].tolist() == [*range(read - 40), *range(960, 1000)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("k_min", [1, 30, 60])
def test_mass_of_few_positions(k_min: int, way: str) -> None:
    """One position has nearly all of it, and the floor says how many are attended."""
    case = make_case(2, 2, 1, 600, 16, lengths=[600, 40], r=16, k=60, k_min=k_min, mass=0.9, local=4, scale=6.0)
    result = run_and_check(case, way)
    assert (result.read[0] >= max(4, k_min)).all() and (result.read[1] >= min(k_min, 40)).all()


@pytest.mark.parametrize("way", WAYS)
def test_mass_that_is_no_number_is_never_reached(way: str) -> None:
    case = make_case(1, 4, 2, 600, 16, r=4, k=60, mass=0.5)
    case.query[0, 0] = torch.nan
    result = run_kernels(case, way)
    assert result.read[0, 0, 0] == 60 and result.read[0, 1, 0] < 60
    assert ((result.positions >= -1) & (result.positions < 600)).all()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("group", [1, 4, 7])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_and_groups(dtype: torch.dtype, group: int, way: str) -> None:
    """Ragged, padded, one row with fewer valid positions than k, r and k not powers of two."""
    shape = (2, group, 1, 480, 64, dtype)
    case = make_case(*shape, lengths=[480, 301], starts=[37, 270], r=21, k=45, seed=group)
    result, reference = run_kernels(case, way), run_reference(case)
    check_same(case, result, reference)
    assert torch.equal(result.positions, reference.positions)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_head_dims(head_dim: int, way: str) -> None:
    case = make_case(1, 4, 1, 260, head_dim, torch.float16, r=head_dim // 4, k=30)
    result, reference = run_kernels(case, way), run_reference(case)
    check_same(case, result, reference)
    assert torch.equal(result.positions, reference.positions)


@pytest.mark.parametrize("way", WAYS)
def test_long_row(way: str) -> None:
    case = make_case(1, 4, 1, 4096, 128, torch.float16, starts=[100], r=32, k=256)
    result = run_kernels(case, way, width=1024 if way == "distributed" else 4096)
    reference = run_reference(case)
    torch.testing.assert_close(result.output, reference.output, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(result.alpha, reference.alpha, rtol=1e-4, atol=1e-5)
    assert torch.equal(result.positions, reference.positions)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ties_go_to_the_lower_index(dtype: torch.dtype, way: str) -> None:
    case = make_case(2, 3, 1, 1000, 4, dtype, draw=small_integers, r=2, k=300, scale=0.25, local=3)
    result = run_kernels(case, way)
    check_same(case, result, run_reference(case))
    for b in range(2):
        assert [s for s in result.positions[b, 0, 0].tolist() if s >= 0] == case.head(b, 0).positions(2, 300, None, 3)


@pytest.mark.parametrize("way", WAYS)
def test_all_scores_equal(way: str) -> None:
    """Every component and every score ties; in the distributed way more candidates than a program holds."""
    case = make_case(cached=700, r=4, k=400, local=2)
    case.query.zero_()
    result = run_kernels(case, way)
    check_same(case, result, run_reference(case))
    assert result.positions[0, 0, 0].tolist() == [*range(398), 698, 699]


@pytest.mark.parametrize("way", WAYS)
def test_scores_that_underflow(way: str) -> None:
    """The k-th score lies below the lowest bin, and below what float32 can hold."""
    case = make_case(2, 2, 1, 700, 16, starts=[150, 0], holes=0.1, r=4, k=500, scale=40.0, local=0)
    check_same(case, run_kernels(case, way), run_reference(case))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("k", [1, 2, 3])
def test_scores_in_the_highest_bin(k: int, way: str) -> None:
    """Of 71 queries that agree two positions get more than 32 each, a third one 4; the highest bin has no upper end."""
    case = make_case(1, 71, 1, 300, 16, r=16, k=k, local=0, scale=1.0)
    shares = torch.full((300,), 1e-6)
    shares[[20, 250, 120]] = torch.tensor([0.485, 0.455, 0.06])
    case.query.zero_()
    case.query[..., 0] = 1.0
    case.key.zero_()
    case.key[0, 0, :300, 0] = shares.log()
    sparq_kernels.write_components(case.key_components, case.key, 0)
    result = run_kernels(case, way)
    check_same(case, result, run_reference(case))
    assert result.positions[0, 0, 0].tolist() == sorted([20, 250, 120][:k])


@pytest.mark.parametrize(("way", "most"), [("select", 10), ("distributed", 6)])
def test_the_search_ends_as_soon_as_the_threshold_is_known(
    way: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """15 rounds and a last one find a key to its last bit; few bits part k keys from the others."""
    rounds = []
    reached = topk._reached.fn

    def counted(key: Any, *thresholds: Any) -> Any:
        if key.shape[0] > 64:  # not that of the components
            rounds.append(None)
        return reached(key, *thresholds)

    monkeypatch.setattr(topk, "_reached", counted)
    case = make_case(1, 4, 1, 1000, 64, r=16, k=100)
    run_kernels(case, way, width=1024)
    assert 1 <= len(rounds) <= most


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("queries", [1, 3])
def test_counts_of_a_mask(queries: int, way: str) -> None:
    """Counted once for all layers: the kernel against plain PyTorch, and a step that takes what it has counted."""
    case = make_case(3, 4, 2, 300, 16, query_length=queries, lengths=[300, 2, 77], holes=0.3, r=4, k=20, k_divisor=4)
    counts = launch.count(CountArguments(case.mask, case.length, None, queries, 20, 4, None))
    call = call_of(case)
    assert torch.equal(counts, sparq_kernels.count_valid(call.visible, call.budget, queries=queries))
    for a, b in zip(run_kernels(case, way, counts), run_kernels(case, way), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("wrong", [[0, 0], [1 << 30, 5], [-7, -7], [290, 1 << 30], [300, -(1 << 31)]])
@pytest.mark.parametrize("mass", [None, 0.6])
def test_wrong_counts_lead_nowhere_outside(wrong: list[int], mass: float | None, way: str) -> None:
    """Who counts something else gets something else, of this cache: slots never written would lead far outside it."""
    case = make_case(1, 2, 1, 300, 16, holes=0.5, r=4, k=200, mass=mass)
    result = run_kernels(case, way, torch.tensor(wrong, dtype=torch.int32).view(1, 1, 2))
    assert ((result.positions >= -1) & (result.positions < 300)).all()


@pytest.mark.parametrize("way", ["select", "distributed"])
@pytest.mark.parametrize("group", [1, 12])
def test_a_kernel_of_its_own_merges_on_amd(group: int, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(2, group, 1, 480, 32, torch.float16, query_length=2, lengths=[480, 301], r=8, k=45)
    expected = run_kernels(case, way)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    kernels = [one.kernel for one in launch.plan(call_of(case), **WAYS[way]).launches]
    assert kernels[-2:] == [split.gather, split.merge]
    for a, b in zip(run_kernels(case, way), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("way", WAYS)
def test_zero_budget_row_gives_zeros(way: str) -> None:
    case = make_case(batch=2, lengths=[0, 300], r=4, k=20)
    case.value_sum[0] = torch.nan
    result = run_kernels(case, way)
    assert torch.equal(result.output[0], torch.zeros_like(result.output[0]))
    assert torch.equal(result.alpha[0], torch.ones_like(result.alpha[0]))
    assert (result.positions[0] == -1).all() and result.output[1].isfinite().all()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("where", ["key", "value", "query", "value_sum", "key_components"])
def test_poison_stays_in_its_head(where: str, way: str) -> None:
    case = make_case(2, 4, 2, 300, 16, r=4, k=50)
    clean = run_kernels(case, way)
    tensor = getattr(case, where)
    tensor[1, 2 : 4 if where == "query" else 1] = torch.nan  # the queries of KV head 1
    if where != "query":
        tensor[1, 1, 0] = torch.nan
    result = run_kernels(case, way)
    others = torch.ones(2, 4, dtype=torch.bool)
    others[1, 2:] = False
    assert torch.equal(result.output[others], clean.output[others])
    assert torch.equal(result.alpha[others], clean.alpha[others])
    positions = result.positions[1, 1, 0]
    assert ((positions >= 0) & (positions < 300)).all() and (positions.diff() > 0).all()


@pytest.mark.parametrize("way", WAYS)
def test_lengths_out_of_range_are_clamped(way: str) -> None:
    """A GPU cannot be asked for its values without waiting for it."""
    case = make_case(3, r=4, k=20, starts=[0, 0, 0])
    expected = run_kernels(case, way)
    case.length[:2] = torch.tensor([1 << 40, -5])
    case.start[2] = -(1 << 40)
    result = run_kernels(case, way)
    for b in (0, 2):
        assert torch.equal(result.output[b], expected.output[b])
    assert not result.output[1].any()


def test_strides_do_not_matter() -> None:
    case = make_case(2, 4, 2, 300, 24, holes=0.2, starts=[5, 0], r=8, k=40)
    compact = dataclasses.replace(case, key=case.key.contiguous(), value=case.value.contiguous())

    def spread(x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(*x.shape, 3)[..., 1].copy_(x)

    scattered = dataclasses.replace(case, length=spread(case.length), start=spread(case.start))
    for other in (compact, scattered):
        for a, b in zip(run_kernels(other, "select"), run_kernels(case, "select"), strict=True):
            assert torch.equal(a, b)


def test_positions_only_when_asked_for() -> None:
    case = make_case(2, r=4, k=20)
    call = call_of(case, return_positions=False)
    output, alpha, positions, lse, read = launch.run(launch.plan(call), call)
    expected = run_reference(case)
    torch.testing.assert_close(output, expected.output)
    torch.testing.assert_close(alpha, expected.alpha)
    torch.testing.assert_close(lse, expected.lse)
    assert torch.equal(read, expected.read)
    assert positions.shape == (2, 2, 1, 0) and positions.dtype == torch.int64


def test_neither_inputs_nor_their_storage_are_written() -> None:
    case = make_case(2, 4, 2, 300, 16, holes=0.2, r=4, k=40)
    before = [x.clone() for x in case.tensors if x is not None]
    for way in WAYS:
        run_kernels(case, way)
    for old, new in zip(before, (x for x in case.tensors if x is not None), strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("position", [0, BLOCK + 7, [3, BLOCK, BLOCK + 7], [-1, 5, BLOCK + 8]])
@pytest.mark.parametrize("with_sum", [True, False])
def test_append(dtype: torch.dtype, position: int | list[int], with_sum: bool) -> None:
    ours, theirs = (storage_of(3, 2, BLOCK + 8, 20, dtype) for _ in range(2))
    tokens = new_token(3, 2, 20, dtype)
    rows = [position] * 3 if isinstance(position, int) else position
    written = theirs if with_sum else theirs._replace(value_sum=None)
    for b, row in enumerate(rows):
        if 0 <= row < BLOCK + 8:
            sparq_kernels.append(rows_of(written, b), *(x[b : b + 1] for x in tokens), position=row)
    where = (None, position) if isinstance(position, int) else (torch.tensor(position), 0)
    value_sum = ours.value_sum if with_sum else None
    stored = (ours.key, ours.value, ours.key_components, value_sum, ours.key_ranges)
    call = AppendArguments(*stored, *tokens, *where)
    launch.append(call, check_append(call))
    for a, b in zip(ours[:4], theirs[:4], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def keys_to_code(dtype: torch.dtype, head_dim: int) -> torch.Tensor:
    """[2, 2, S, head_dim], three whole groups behind a block's end, with values that are no numbers and runs of one."""
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(2, BLOCK + 3 * GROUP + 9, 2, head_dim, generator=generator).to(dtype)
    key = whole.transpose(1, 2)
    key[0, 0, :, 0] = 3.0
    key[0, 1, BLOCK : BLOCK + 9, -1], key[0, 1, BLOCK + 20 : BLOCK + 29, -1] = torch.inf, -torch.inf
    key[1, 0, BLOCK + 7], key[1, 1, -40 - GROUP :, -1] = torch.nan, torch.nan
    return key


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [1, 20, 64])
def test_encode(dtype: torch.dtype, head_dim: int) -> None:
    key = keys_to_code(dtype, head_dim)
    codes, ranges = (empty_index(tuple(key.shape), dtype, "int4") for _ in range(2))
    begin, end = BLOCK - 5, key.shape[2]
    launch.encode(EncodeArguments(key, *codes, begin, end))  # type: ignore[arg-type]
    encode_groups(key, *ranges, begin // GROUP, end // GROUP)  # type: ignore[arg-type]
    for ours, theirs in zip(codes, ranges, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "position",
    [GROUP - 2, GROUP - 1, BLOCK + GROUP - 1, [GROUP - 1, GROUP], [BLOCK + 2 * GROUP - 1, -1], [1 << 40, GROUP - 1]],
    ids=str,
)
def test_append_codes_a_group_that_is_whole(dtype: torch.dtype, position: int | list[int]) -> None:
    ours, theirs = (storage_of(2, 2, BLOCK + 2 * GROUP, 20, dtype, "int4") for _ in range(2))
    for storage in (ours, theirs):
        storage.key.copy_(keys_to_code(dtype, 20)[:, :, : BLOCK + 2 * GROUP])
    tokens = new_token(2, 2, 20, dtype)
    for b, row in enumerate([position] * 2 if isinstance(position, int) else position):
        if 0 <= row < BLOCK + 2 * GROUP:
            sparq_kernels.append(rows_of(theirs, b), *(x[b : b + 1] for x in tokens), position=row)
    where = (None, position) if isinstance(position, int) else (torch.tensor(position), 0)
    stored = (ours.key, ours.value, ours.key_components, ours.value_sum, ours.key_ranges)
    call = AppendArguments(*stored, *tokens, *where)
    launch.append(call, check_append(call))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_extend_sum(dtype: torch.dtype, lengths: tuple[int, ...]) -> None:
    check(arguments(lengths, dtype=dtype), lambda call: launch.extend_sum(call, check_extending(call)))


# --- Pages ------------------------------------------------------------------------------------------------------------


def run_pages(call: Arguments, way: str) -> sparq_kernels.DecodeOutput:
    """Pages have room for more than there is: programs hold all of it, or a quarter."""
    room = triton.next_power_of_2(call.capacity)
    return run_call(call, way, width=max(128, room // 4) if way == "distributed" else max(1024, room))


def check_pages(
    case: Case, page: int, index: str, way: str, seed: int = 0, in_a_row: sparq_kernels.DecodeOutput | None = None
) -> None:
    """Against the same cache in a row, by the same kernels if no result is given: positions and all, but that there is
    room for more."""
    call = call_of(case)
    in_pages = run_pages(paged(call, page, index, seed), way)
    in_a_row = run_pages(call, way) if in_a_row is None else in_a_row
    assert in_pages.positions is not None and in_a_row.positions is not None
    most = in_a_row.positions.shape[-1]
    assert (in_pages.positions[..., most:] == -1).all()
    check_same(case, in_pages._replace(positions=in_pages.positions[..., :most]), in_a_row)


# Ways, pages and indices take turns.
TURNS = [(64, "full"), (256, "int4"), (128, "full"), (512, "int4"), (256, "full")]
NAMES = [name for name in PAGED_CASES if name != "many heads"]  # dear
PAGED_WAYS = [(name, *turn, way) for name, turn, way in zip(NAMES, itertools.cycle(TURNS), itertools.cycle(WAYS))]


@pytest.mark.parametrize(("name", "page", "index", "way"), PAGED_WAYS)
def test_pages_give_what_a_row_gives(name: str, page: int, index: str, way: str) -> None:
    case = make_case(**PAGED_CASES[name], index=index)
    check_pages(case, page, index, way, in_a_row=run_reference(case) if index == "full" else None)


@pytest.mark.parametrize(
    ("dtype", "group", "page", "index", "way"),
    [
        (dtype, group, *turn, way)
        for (dtype, group), turn, way in zip(
            itertools.product(DTYPES, [1, 4, 12]), itertools.cycle(TURNS), itertools.cycle([*WAYS, "fused", "select"])
        )
    ],
    ids=str,
)
def test_pages_in_dtypes_and_groups(dtype: torch.dtype, group: int, page: int, index: str, way: str) -> None:
    """Across a page's end for one of two queries; a row that ends with a page."""
    options: dict[str, Any] = {"r": 21, "k": 45, "mass": 0.7, "seed": group, "query_length": 2, "index": index}
    check_pages(make_case(2, group, 1, 513, 64, dtype, lengths=[513, 256], **options), page, index, way)


@pytest.mark.parametrize("way", WAYS)
def test_pages_equal_the_reference(way: str) -> None:
    """The mean value too, to which many pages and the rows of the last one add up."""
    case = make_case(2, 4, 2, 700, 16, lengths=[700, 640], query_length=3, r=4, k=6)
    call = paged(call_of(case), 64, "full")
    check_same(case, run_pages(call, way), reference_call(call))


@pytest.mark.parametrize("way", WAYS)
def test_rows_may_share_pages(way: str) -> None:
    shared, call = shared_prefix(256)
    ours, theirs = run_pages(shared, way), run_call(call, way)
    most = theirs.positions.shape[-1]
    assert torch.equal(ours.positions[..., :most], theirs.positions)
    torch.testing.assert_close(ours.output, theirs.output)


@pytest.mark.parametrize("way", WAYS)
def test_tokens_of_a_draft_may_be_rows(way: str) -> None:
    call = paged(call_of(make_case(query_length=3, cached=514, r=6, k=30, index="int4")), 256, "int4")
    together, alone = run_pages(call, way), run_pages(as_rows(call), way)
    for ours, theirs in zip(alone, together, strict=True):
        torch.testing.assert_close(ours[:, :, 0], theirs[0].transpose(0, 1))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("index", ["full", "int4"])
def test_a_table_leads_nowhere_outside(index: str, way: str) -> None:
    """Wrong pages of a row that needs them are clamped, as wrong lengths are."""
    call = paged(call_of(make_case(2, 2, 1, 600, 16, lengths=[600, 520], r=4, k=20)), 256, index)
    assert call.block_table is not None
    call.block_table[0, :3] = torch.tensor([-(2**31), 2**31 - 1, -1])
    nearest = call._replace(block_table=call.block_table.clamp(0, call.key.shape[0] - 1))
    for name in ("key", "value", "key_components", "value_sum", "key_ranges"):
        if (tensor := getattr(call, name)) is not None and tensor.is_floating_point():
            tensor.nan_to_num_(nan=0.5)
    for ours, theirs in zip(run_pages(call, way), run_pages(nearest, way), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("way", ["select", "distributed"])
def test_a_kernel_of_its_own_merges_pages_on_amd(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call = paged(call_of(make_case(2, 4, 1, 480, 32, torch.float16, lengths=[480, 301], r=8, k=45)), 64, "full")
    expected = run_pages(call, way)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    for a, b in zip(run_pages(call, way), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("place", "mass"), [("row", 0.5), ("mask", 0.5), ("pages", None)])
def test_dense_below_decides_for_each_query(place: str, mass: float | None, way: str) -> None:
    """Of two queries of a draft one may be sparse, and the other not."""
    holes, dense_below = (0.3, 250) if place == "mask" else (0.0, 299)
    lengths = {"lengths": [500, 299, 300, 0], "query_length": 2}
    case = make_case(4, 2, 1, 500, 16, **lengths, holes=holes, r=6, k=30, mass=mass, dense_below=dense_below)
    call = call_of(case)
    if place == "pages":
        call = paged(call, 64, "full")
    result = run_pages(call, way)
    check_same(case, result, reference_call(call))
    assert (result.read[0] < 100).all() and (result.read[1, :, 0] > 150).all()


def write_with_kernels(cached: sparq_kernels.Cached, *new: torch.Tensor) -> None:
    call = slot_call(cached, *new)
    launch.append_slots(call, check_slots(call))


@pytest.mark.parametrize(("page", "index"), [(64, "full"), (256, "int4")])
def test_slots_do_not_depend_on_how_tokens_came(page: int, index: str) -> None:
    check_any_order(write_with_kernels, page, index, at_a_time=7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("index", ["full", "int4"])
def test_slots(index: str, dtype: torch.dtype) -> None:
    """As plain PyTorch writes them, in any order; those outside the storage write nothing."""
    ours = empty_pages(2, 3, 512, 20, dtype, index)
    if index == "int4":  # what is coded must be there
        sparq_kernels.append_slots(ours, *tokens(1024, 3, 20, dtype, seed=1), torch.arange(1024))
        ours.key.view(-1, 20)[:300:7, 3] = torch.inf
    theirs = cloned(ours)
    generator = torch.Generator().manual_seed(0)
    slots = torch.cat([torch.tensor([255, 511, 1023]), torch.randperm(1024, generator=generator)[:200]]).unique()
    slots = slots[torch.randperm(len(slots), generator=generator)]
    outside = torch.tensor([-1, 1024, 1279, -257, 1 << 40, -(1 << 40)])
    new = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tokens(len(slots) + len(outside), 3, 20, dtype)]
    assert new[0].stride(2) != 1
    write_with_kernels(ours, *new, torch.cat([slots, outside]))
    append_slots_default(slot_call(theirs, *(x[: len(slots)] for x in new), slots))
    torch.testing.assert_close(ours.value_sum, theirs.value_sum, rtol=1e-5, atol=1e-5, equal_nan=True)
    same_bytes(ours._replace(value_sum=None), theirs._replace(value_sum=None))


def test_slots_of_no_tokens() -> None:
    cached = empty_pages(2, 2, 256, 12, torch.float32, "int4")
    before = cloned(cached)
    write_with_kernels(cached, *tokens(0, 2, 12), torch.empty(0, dtype=torch.int64))
    same_bytes(cached, before)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(st.data())
def test_any_rows_in_any_pages(data: st.DataObject) -> None:
    page, index = data.draw(st.sampled_from([(64, "full"), (128, "full"), (256, "full"), (256, "int4")]))
    lengths = data.draw(st.lists(st.integers(0, 400), min_size=1, max_size=2))
    k = data.draw(st.integers(1, 90))
    case = make_case(
        len(lengths),
        2 * data.draw(st.integers(1, 5)),
        2,
        max(*lengths, 1),
        data.draw(st.integers(8, 40)),
        query_length=data.draw(st.sampled_from([1, 1, 3])),
        lengths=lengths,
        index=index,
        r=data.draw(st.integers(1, 8)),
        k=k,
        k_divisor=data.draw(st.none() | st.integers(2, 9)),
        local=data.draw(st.none() | st.integers(0, k)),
        mass=data.draw(st.none() | st.floats(0.1, 0.99)),
        dense_below=data.draw(st.sampled_from([0, 50, 300])),
        softcap=data.draw(st.none() | st.just(3.0)),
    )
    check_pages(case, page, index, data.draw(st.sampled_from(list(WAYS))), data.draw(st.integers(0, 9)))


@st.composite
def any_case(draw: st.DrawFn) -> Case:
    batch, kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 5))
    cached, head_dim = draw(st.integers(1, 400) | st.integers(500, 700)), draw(st.integers(1, 40))
    local = draw(st.none() | st.integers(0, 50))
    k = draw(st.integers(max(1, local or 0), 500))
    return make_case(
        batch,
        kv_heads * group,
        kv_heads,
        cached,
        head_dim,
        query_length=draw(st.sampled_from([1, 1, 2, 5])),
        lengths=draw(st.lists(st.integers(0, cached), min_size=batch, max_size=batch)),
        starts=draw(st.none() | st.lists(st.integers(0, cached), min_size=batch, max_size=batch)),
        holes=draw(st.sampled_from([0.0, 0.3, 0.95])),
        seed=draw(st.integers(0, 1000)),
        r=draw(st.integers(1, head_dim)),
        k=k,
        index=draw(st.sampled_from(["full", "int4"])),
        mass=draw(st.none() | st.floats(0.05, 0.99)),
        k_min=draw(st.integers(1, k)),
        local=local,
        k_divisor=draw(st.none() | st.integers(1, 9)),
        softcap=draw(st.none() | st.just(3.0)),
        mean_value=draw(st.booleans() | st.floats(0, 1)),
    )


@given(any_case(), st.sampled_from(list(WAYS)))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_any_case_satisfies_the_equations(case: Case, way: str) -> None:
    run_and_check(case, way)
