"""How kernels are launched, with no GPU: a driver that launches nothing says what it was asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import sparq_kernels
import torch

triton = pytest.importorskip("triton", reason="Triton has no build for this system")

import compiled_kernels  # noqa: E402
from compiled_kernels import compile_kernel, empty_append, empty_call, empty_slots, record, specialise  # noqa: E402
from launch_cost import without_a_gpu  # noqa: E402
from sparq_kernels.gpu import launch  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

from tests.kernels.cases import (  # noqa: E402
    Case,
    append_call,
    decode_call,
    make_case,
    new_token,
    run_operator,
    storage_of,
)


class Launched(NamedTuple):
    """One launch: the kernel, what it was compiled for, and the arguments (tensors as their addresses)."""

    name: str
    compiled: str
    how: tuple[Any, ...]  # grid, stream, function, packed metadata
    arguments: list[Any]


def noting(found: list[Launched]) -> Callable[..., None]:
    def launched(source: Any, arguments: tuple[Any, ...]) -> None:
        given = [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in arguments[9:]]
        found.append(Launched(source.fn.__name__, source.hash(), arguments[:6], given))

    return launched


@pytest.fixture
def launches() -> Iterator[list[Launched]]:
    found: list[Launched] = []
    with without_a_gpu(noting(found)):
        yield found


def taken(launches: list[Launched]) -> list[Launched]:
    found = launches.copy()
    launches.clear()
    return found


def by_triton(case: Case, launches: list[Launched]) -> list[Launched]:
    """What Triton's own dispatch makes of a call that nothing is remembered for."""
    for held in (launch._plans, launch._compiled):
        held.clear()
    sparq_kernels.operator._plans.clear()
    run_operator(case)
    return taken(launches)


def ours_and_addresses(launched: Launched, case: Case) -> list[Any]:
    """The arguments, but for addresses of memory that is another one in every call."""
    own = {x.data_ptr() for x in case.tensors if x is not None}
    return [x if x in own or not isinstance(x, int) or x < 1 << 32 else "other memory" for x in launched.arguments]


def check_same_launches(ours: list[Launched], theirs: list[Launched], case: Case) -> None:
    assert ours
    for a, b in zip(ours, theirs, strict=True):
        assert (a.name, a.compiled, a.how) == (b.name, b.compiled, b.how)
        assert ours_and_addresses(a, case) == ours_and_addresses(b, case)


SHAPES = {
    "fused": dict(batch=80, num_heads=4, num_kv_heads=4, cached=300),
    "select": dict(batch=1, num_heads=4, num_kv_heads=2, cached=300),
    "distributed": dict(batch=1, num_heads=4, num_kv_heads=2, cached=8300),
    "masked": dict(batch=2, num_heads=4, num_kv_heads=2, cached=300, holes=0.2, starts=[3, 0]),
    "fused-int4": dict(batch=80, num_heads=4, num_kv_heads=4, cached=300, index="int4", mass=0.9),
    "distributed-int4": dict(batch=1, num_heads=4, num_kv_heads=2, cached=8300, index="int4", mass=0.9),
}


@pytest.mark.parametrize("name", SHAPES)
def test_what_is_held_is_what_triton_would_choose(name: str, launches: list[Launched]) -> None:
    """Of a cache that grows across a chunk's end, where a plan of its own begins."""
    shape = SHAPES[name]
    for cached in (shape["cached"], shape["cached"] + 1, 600 if shape["cached"] == 300 else 8500):
        case = make_case(**{**shape, "cached": cached}, head_dim=64, dtype=torch.float16, r=16, k=40)
        run_operator(case)  # finds the kernels, the first time
        taken(launches)
        run_operator(case)
        ours = taken(launches)
        assert ours and all(one._starters for plan in launch._plans.values() for one in plan.launches)
        check_same_launches(ours, by_triton(case, launches), case)


def test_a_cache_that_grows_finds_its_kernels(launches: list[Launched]) -> None:
    """No launch but the first asks Triton, though every length has a plan."""
    case = make_case(1, 4, 2, 9000, 64, torch.float16, r=16, k=40)
    for cached in (8500, 8501, 8800, 9000):
        grown = Case(**{**vars(case), "key": case.key[:, :, :cached], "value": case.value[:, :, :cached]})
        run_operator(grown)
        if cached == 8500:
            known = dict(launch._compiled)
    assert launch._compiled == known


def test_other_alignment_takes_another_kernel(launches: list[Launched]) -> None:
    case = make_case(1, 4, 2, 300, 64, torch.float16, r=16, k=40)
    run_operator(case)
    taken(launches)
    run_operator(case)
    aligned = taken(launches)
    memory = torch.zeros(case.query.numel() + 4, dtype=torch.float16)
    moved = memory[4:].view(case.query.shape).copy_(case.query)
    assert moved.data_ptr() % 16 == 8
    case.query = moved
    for _ in range(2):
        run_operator(case)
        ours = taken(launches)
        assert {one.name for one in ours if one.compiled not in {each.compiled for each in aligned}} == {
            "score",
            "gather",
        }
    check_same_launches(ours, by_triton(case, launches), case)


def test_beyond_2_gb_amd_takes_other_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its compiler puts offsets into 32 bits where a tensor's storage is smaller. (Memory not touched is free.)"""
    monkeypatch.setattr(torch.version, "hip", "7.0")
    found: list[Launched] = []
    names = []
    with without_a_gpu(noting(found), GPUTarget("hip", "gfx942", 64)):
        for batch in (40, 80):  # 1.2 and 2.5 GB of K
            call = empty_call(batch, 8, 8, 15000, 128)
            appended = empty_append(batch, 8, 15000, 128)

            def step(call: Any = call, appended: Any = appended) -> list[Launched]:
                decode_call(call)
                append_call(appended._replace(offset=5))
                return taken(found)

            step()
            ours = step()
            for held in (sparq_kernels.operator._plans, launch._plans, launch._appends, launch._compiled):
                held.clear()
            theirs = step()
            assert [one.compiled for one in ours] == [one.compiled for one in theirs]
            names.append({one.name: one.compiled for one in ours})
    assert {name for name in names[0] if names[0][name] != names[1][name]} >= {"score", "gather", "append"}


def test_an_unknown_triton_is_asked_every_time(launches: list[Launched], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is held needs the launcher that Triton 3.6 to 3.8 have."""
    case = make_case(1, 4, 2, 300, 64, torch.float16, r=16, k=40)
    monkeypatch.setattr(launch, "_starter", lambda compiled, grid: None)
    for _ in range(3):
        run_operator(case)
        assert [one.name for one in taken(launches)] == ["score", "select", "gather"]
    monkeypatch.undo()
    assert launch._starter(object(), (1, 1, 1)) is None  # nothing that could be started


def test_hooks_are_called(launches: list[Launched], monkeypatch: pytest.MonkeyPatch) -> None:
    """As profilers set them: what is held must not pass them by."""
    case = make_case(1, 4, 2, 300, 64, torch.float16, r=16, k=40)
    run_operator(case)
    run_operator(case)
    taken(launches)
    monkeypatch.setattr(triton.knobs.runtime, "launch_enter_hook", lambda metadata: None)
    given = []
    real = launch.triton.compiler.CompiledKernel.launch_metadata
    monkeypatch.setattr(
        launch.triton.compiler.CompiledKernel,
        "launch_metadata",
        lambda self, *arguments: given.append(self.name) or real(self, *arguments),
    )
    run_operator(case)
    assert given == ["score", "select", "gather"]
    assert [one.name for one in taken(launches)] == given


@pytest.mark.parametrize("freed", ["key", "value", "query"])
def test_freed_memory_is_refused(freed: str, launches: list[Launched]) -> None:
    """A GPU that reads address 0 is lost to the whole process."""
    case = make_case(1, 4, 2, 300, 64, torch.float16, r=16, k=40)
    run_operator(case)
    taken(launches)
    getattr(case, freed).untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=f"{freed} .* has no memory"):
        run_operator(case)
    assert not launches


@pytest.mark.parametrize("index", ["full", "int4"])
def test_append_launches_one_kernel_for_all_positions(index: str, launches: list[Launched]) -> None:
    storage, tokens = storage_of(2, 2, 300, 64, torch.float16, index), new_token(2, 2, 64, torch.float16)
    for position in (5, 255, 299):
        sparq_kernels.append(storage, *tokens, position)
    found = taken(launches)
    assert len({one.compiled for one in found}) == 1 and len(launch._compiled) == 1
    offset = launch.append_kernel.arg_names.index("offset")
    assert [one.arguments[offset] for one in found] == [5, 255, 299]
    addresses = [[x for x in one.arguments if isinstance(x, int) and x > 1 << 32] for one in found]
    assert addresses[0] == addresses[1] == addresses[2]
    assert {x.data_ptr() for x in (*storage, *tokens) if x is not None} <= set(addresses[0])


@pytest.mark.parametrize("index", ["full", "int4"])
def test_append_slots_launches_two_kernels_for_any_tokens(index: str, launches: list[Launched]) -> None:
    for count in (1, 3, 0, 1000):
        torch.ops.sparq_kernels.append_slots(*empty_slots(count, 2, 256, 64, index=index))
    found = taken(launches)
    assert [one.name for one in found] == 3 * ["write_slots", "complete_pages"]
    assert len({one.compiled for one in found}) == 2 and len(launch._compiled) == 2
    assert [one.how[0] for one in found if one.name == "complete_pages"] == [2, 6, 2000]


@pytest.mark.parametrize("index", ["full", "int4"])
def test_tables_of_any_length_have_the_same_kernels(index: str, launches: list[Launched]) -> None:
    for cached in (300, 700, 1300):
        decode_call(empty_call(2, 4, 2, cached, 64, r=16, k=40, index=index, page=256))
    found = taken(launches)
    assert [one.name for one in found] == 3 * ["score", "select", "gather"]
    assert len({one.compiled for one in found}) == 3


@pytest.mark.slow
def test_what_is_compiled_ahead_is_found_at_run_time(
    launches: list[Launched], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`make gpu` compiles in many processes at once what the next ones launch."""
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    monkeypatch.setattr(compiled_kernels, "_compiled", {})

    def binaries() -> int:
        return len(list(tmp_path.glob("*/*.cubin")))

    shape = dict(cached=7000, head_dim=48, r=20)
    call, appended = empty_call(mask=True, **shape), empty_append(capacity=7168, head_dim=48)
    for one in (call, appended):
        for recorded in record(launch, one, "sm_90"):
            compile_kernel(specialise(recorded, "sm_90"))
    compiled = binaries()
    assert compiled == 5  # count_masked, score, select, gather, append
    counts = sparq_kernels.count_valid(call.visible, call.budget)
    for given in (None, counts):
        decode_call(call._replace(counts=given))
    append_call(appended._replace(offset=5))
    assert {one.name for one in launches} == {"count_masked", "score", "select", "gather", "append"}
    assert binaries() == compiled
