"""The GPU kernels as compiled code, with no GPU: that they compile, keep to registers, read wide, and stay compiled."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted in this process and cannot be compiled", allow_module_level=True)
pytest.importorskip("triton")

import compiled_kernels as compiled
from compiled_kernels import (
    Specialised,
    empty_append,
    empty_call,
    empty_encoding,
    empty_extension,
    empty_slots,
    pointer_conversions,
    record,
    specialise,
)
from sparq_kernels.gpu import fused, launch, split

pytestmark = pytest.mark.slow

WAYS = {
    "fused": {"fused"},
    "select": {"score", "select", "gather"},
    "distributed": {"score", "histogram", "candidates", "choose", "gather"},
}
# Most shared memory that one program can have; consumer cards of an architecture have less.
SHARED_LIMIT = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
SHARED_LIMIT_CONSUMER = 99 << 10
# Bytes. Where it is not 0 an assembler, mostly an older one, keeps a few values elsewhere though registers are left.
SPILL_LIMIT = {"sm_80": 64, "sm_90": 24, "sm_100": 64, "gfx942": 0}


class Combination(NamedTuple):
    name: str
    target: str
    way: str
    options: dict[str, Any]

    @property
    def group(self) -> int:
        return self.options["num_heads"] // self.options["num_kv_heads"]

    @property
    def shared_limit(self) -> int:
        if not self.target.startswith("gfx") and self.group <= 8 and "dtype" not in self.options:
            return SHARED_LIMIT_CONSUMER
        return SHARED_LIMIT[self.target]

    def launches(self) -> list[Specialised]:
        return specialised_launches(self.target, **self.options)


def specialised_launches(target: str, module: ModuleType = launch, **options: Any) -> list[Specialised]:
    return [specialise(one, target) for one in record(module, empty_call(**options), target)]


def heads(batch: int, num_heads: int, num_kv_heads: int) -> dict[str, int]:
    return {"batch": batch, "num_heads": num_heads, "num_kv_heads": num_kv_heads}


FUSED, FUSED_GROUPS = {**heads(64, 32, 32), "cached": 4096}, {**heads(128, 32, 8), "cached": 4096}
SELECT, SELECT_GROUPS = {**heads(1, 8, 8), "cached": 8000}, {**heads(1, 32, 8), "cached": 8000}
LONG, LONG_GROUPS = {**SELECT, "cached": 131072, "k": 1024}, {**SELECT_GROUPS, "cached": 131072, "k": 1024}
INT4 = {"index": "int4", "mass": 0.9}
EVERYWHERE = {
    "fused": ("fused", FUSED),
    "fused-groups": ("fused", FUSED_GROUPS),
    "select": ("select", SELECT),
    "select-groups": ("select", SELECT_GROUPS),
    "distributed-groups": ("distributed", LONG_GROUPS),
    "everything": ("select", {**SELECT_GROUPS, "start": True, "mask": True, "softcap": 30.0}),
    "select-int4": ("select", {**SELECT, **INT4}),
    "select-groups-int4": ("select", {**SELECT_GROUPS, **INT4}),
    "distributed-groups-int4": ("distributed", {**LONG_GROUPS, **INT4}),
    "everything-int4": ("select", {**SELECT_GROUPS, **INT4, "start": True, "mask": True, "softcap": 30.0}),
}
# In pages as engines have them, of a dtype as theirs.
PAGES = {"page": 256, "dtype": torch.bfloat16}
PAGED = {
    "fused-pages": ("fused", {**FUSED, **PAGES}),
    "fused-groups-pages": ("fused", {**FUSED_GROUPS, **PAGES}),
    "select-pages": ("select", {**SELECT, **PAGES}),
    "select-groups-pages": ("select", {**SELECT_GROUPS, **PAGES}),
    "distributed-groups-pages": ("distributed", {**LONG_GROUPS, **PAGES}),
    "select-groups-pages-int4": ("select", {**SELECT_GROUPS, **PAGES, **INT4}),
    "distributed-groups-pages-int4": ("distributed", {**LONG_GROUPS, **PAGES, **INT4}),
}
# Not on AMD, where a tile of codes is less than 16 bytes for each thread of so large a program.
FUSED_INT4 = {
    "fused-int4": ("fused", {**FUSED, **INT4}),
    "fused-groups-int4": ("fused", {**FUSED_GROUPS, **INT4}),
}
SM_90 = {
    **FUSED_INT4,
    **PAGED,
    "fused-pages-int4": ("fused", {**FUSED, **PAGES, **INT4}),
    "fused-groups-pages-int4": ("fused", {**FUSED_GROUPS, **PAGES, **INT4}),
    "select-small-pages": ("select", {**SELECT, **PAGES, "page": 64}),
    "select-groups-small-pages": ("select", {**SELECT_GROUPS, **PAGES, "page": 64}),
    "select-groups-large-pages-int4": ("select", {**SELECT_GROUPS, **PAGES, **INT4, "page": 2048}),
    "select-groups-pages-float32-80": (
        "select",
        {**SELECT_GROUPS, "page": 256, "dtype": torch.float32, "head_dim": 80},
    ),
    "fused-everything-int4": ("fused", {**FUSED_GROUPS, **INT4, "start": True, "mask": True, "softcap": 30.0}),
    "fused-group-of-7-int4": ("fused", {**heads(80, 28, 4), **INT4, "cached": 4096}),
    "distributed-int4": ("distributed", {**LONG, **INT4}),
    "distributed-longest-int4": ("distributed", {**LONG_GROUPS, **INT4, "cached": 1 << 20}),
    "select-several-tokens-int4": ("select", {**SELECT_GROUPS, **INT4, "query_length": 5}),
    "select-group-of-16-int4": ("select", {**heads(1, 16, 1), **INT4, "cached": 8000}),
    "select-r24-int4": ("select", {**SELECT, **INT4, "r": 24}),
    "select-groups-r64-int4": ("select", {**SELECT_GROUPS, **INT4, "r": 64}),
    **{
        f"{name}-{str(dtype)[6:]}-{head_dim}-int4": (
            name.split("-")[0],
            {**options, **INT4, "dtype": dtype, "head_dim": head_dim},
        )
        for name, options in {"fused-groups": FUSED_GROUPS, "select": SELECT, "select-groups": SELECT_GROUPS}.items()
        for dtype, head_dim in [(torch.bfloat16, 80), (torch.bfloat16, 256), (torch.float32, 128)]
    },
    "select-mass": ("select", {**SELECT, "mass": 0.9}),
    "fused-mass": ("fused", {**FUSED, "mass": 0.9}),
    "select-4096": ("select", {**SELECT, "cached": 4000}),
    "distributed": ("distributed", LONG),
    "select-many-heads": ("select", {**FUSED, "cached": 8192}),
    "select-many-groups": ("select", {**FUSED_GROUPS, "cached": 8192}),
    "fused-everything": ("fused", {**FUSED_GROUPS, "start": True, "mask": True, "softcap": 30.0}),
    "fused-no-mean": ("fused", {**FUSED, "mean_value": False}),
    "distributed-everything": ("distributed", {**LONG_GROUPS, "start": True, "mask": True, "softcap": 30.0}),
    "distributed-longest": ("distributed", {**LONG_GROUPS, "cached": 1 << 20}),
    "select-several-tokens": ("select", {**SELECT_GROUPS, "query_length": 5}),
    "select-start": ("select", {**SELECT, "start": True}),
    "select-mask": ("select", {**SELECT, "mask": True}),
    "select-softcap": ("select", {**SELECT, "softcap": 30.0}),
    "select-r24": ("select", {**SELECT, "r": 24}),
    "select-groups-r24": ("select", {**SELECT_GROUPS, "r": 24}),
    "fused-groups-r24": ("fused", {**FUSED_GROUPS, "r": 24}),
    "fused-group-of-7": ("fused", {**heads(80, 28, 4), "cached": 4096}),
    "select-group-of-7": ("select", {**heads(1, 28, 4), "cached": 8000}),
    "distributed-group-of-7": ("distributed", {**heads(1, 28, 4), "cached": 131072, "k": 1024}),
    "fused-group-of-71": ("fused", {**heads(264, 71, 1), "cached": 2048, "head_dim": 64}),
    "select-group-of-71": ("select", {**heads(1, 71, 1), "cached": 8000, "head_dim": 64}),
    "distributed-group-of-71": ("distributed", {**heads(1, 71, 1), "cached": 131072, "head_dim": 64}),
    **{
        f"{name}-{head_dim}": (name.split("-")[0], {**options, "head_dim": head_dim})
        for name, options in {"fused": FUSED, "select": SELECT, "select-groups": SELECT_GROUPS}.items()
        for head_dim in (64, 80, 96, 256)
    },
    **{
        f"{name}-{str(dtype)[6:]}": (name.split("-")[0], {**options, "dtype": dtype})
        for name, options in {"fused": FUSED, "fused-groups": FUSED_GROUPS, "select": SELECT}.items()
        for dtype in (torch.bfloat16, torch.float32)
    },
    **{
        f"select-groups-{str(dtype)[6:]}-{head_dim}": (
            "select",
            {**SELECT_GROUPS, "dtype": dtype, "head_dim": head_dim},
        )
        for dtype in (torch.bfloat16, torch.float32)
        for head_dim in (64, 80, 96, 128, 256)
    },
}
GFX942 = {
    **PAGED,
    "distributed": ("distributed", LONG),
    "fused-float32": ("fused", {**FUSED, "dtype": torch.float32}),
    "fused-groups-float32": ("fused", {**FUSED_GROUPS, "dtype": torch.float32}),
    "select-float32": ("select", {**SELECT, "dtype": torch.float32}),
    "select-groups-float32": ("select", {**SELECT_GROUPS, "dtype": torch.float32}),
    "select-groups-80": ("select", {**SELECT_GROUPS, "head_dim": 80}),
    "fused-256": ("fused", {**FUSED, "head_dim": 256}),
    "distributed-longest": ("distributed", {**LONG_GROUPS, "cached": 1 << 20}),
}
COMBINATIONS = [
    Combination(name, target, way, options)
    for target, more in {"sm_80": FUSED_INT4, "sm_90": SM_90, "sm_100": FUSED_INT4, "gfx942": GFX942}.items()
    for name, (way, options) in {**EVERYWHERE, **more}.items()
]
every_combination = pytest.mark.parametrize(
    "combination", COMBINATIONS, ids=[f"{one.target}-{one.name}" for one in COMBINATIONS]
)


@every_combination
def test_compiles_into_registers_and_shared_memory(combination: Combination) -> None:
    launches = combination.launches()
    masked = {"count_masked"} if combination.options.get("mask") else set()
    trimmed = {"trim"} if combination.options.get("mass") and combination.way == "distributed" else set()
    merged = {"merge"} if combination.target.startswith("gfx") and combination.way != "fused" else set()
    assert {one.kernel.__name__ for one in launches} == WAYS[combination.way] | masked | trimmed | merged
    used = {one.kernel.__name__: compiled.resources(one) for one in launches}
    spilling = {name: one for name, one in used.items() if one.spilled > SPILL_LIMIT[combination.target]}
    assert not spilling
    assert not {name: one for name, one in used.items() if one.shared > combination.shared_limit}
    if "score" in used and combination.group <= 32 and not combination.target.startswith("gfx"):
        # As many programs of four warps as are launched fit on a multiprocessor together.
        assert split.SCORE_PROGRAMS * 4 * 32 * used["score"].registers <= 1 << 16
        assert split.SCORE_PROGRAMS * (used["score"].shared + 1024) <= SHARED_LIMIT[combination.target]


@every_combination
def test_components_and_rows_are_read_16_bytes_at_a_time(combination: Combination) -> None:
    for one in combination.launches():
        loads = compiled.stream_loads(one)
        assert {load.stream for load in loads} == compiled.streams_of(one)
        assert not Counter((load.stream, load.width) for load in compiled.narrow_loads(one)), one.kernel.__name__


@every_combination
def test_no_loop_rearranges_addresses(combination: Combination) -> None:
    assert not {one.kernel.__name__: found for one in combination.launches() if (found := pointer_conversions(one))}


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("options", [SELECT_GROUPS, {**SELECT_GROUPS, **INT4}], ids=["full", "int4"])
def test_a_table_leaves_as_many_tiles_on_their_way(options: dict[str, Any], target: str) -> None:
    """Looking up a page must not cost `score` its stages: tiles that are loaded ahead lie in shared memory."""
    in_a_row, in_pages = (
        compiled.resources(
            next(one for one in specialised_launches(target, **options, **more) if is_named(one, "score"))
        )
        for more in ({}, {"page": 256})
    )
    assert in_pages.shared >= in_a_row.shared


def changed_kernels(directory: Path, name: str, file: str, old: str, new: str) -> ModuleType:
    """The launch module of a copy of sparq_kernels.gpu, with one piece of its source replaced."""
    copy = directory / name
    shutil.copytree(Path(launch.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    source = (copy / file).read_text()
    assert source.count(old) == 1
    (copy / file).write_text(source.replace(old, new))
    package = f"sparq_kernels.{name}"  # beside the original, whose relative imports it repeats
    spec = importlib.util.spec_from_file_location(package, copy / "__init__.py", submodule_search_locations=[str(copy)])
    assert spec is not None and spec.loader is not None
    sys.modules[package] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[package])
    return importlib.import_module(f"{package}.launch")


@pytest.fixture
def unchanged_modules() -> Iterator[None]:
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


PLACE = "(stored + within // 4)"


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize(
    ("stream", "file", "load", "mask"),
    [
        ("codes", "coded.py", f"tl.load(runs + {PLACE})", "(piece * T + tl.arange(0, T // 4) < end)[None, :]"),
        ("components", "scoring.py", "tl.load(runs + offset)", "(position + o < end)[None, :]"),
        ("keys", "attention.py", "tl.load(key + k_row[:, None] + d[None, :])", "d[None, :] < last"),
        ("values", "attention.py", "tl.load(value + v_row[:, None] + d[None, :])", "d[None, :] < last"),
    ],
    ids=["codes", "components", "keys", "values"],
)
@pytest.mark.usefixtures("unchanged_modules")
def test_a_mask_that_narrows_the_loads_is_noticed(
    stream: str, file: str, load: str, mask: str, target: str, tmp_path: Path
) -> None:
    name = f"masked_{stream}_{target}"
    broken = changed_kernels(tmp_path, name, file, load, f"{load[:-1]}, mask={mask}, other=0)")
    options: dict[str, Any] = INT4 if stream == "codes" else {}
    launches = specialised_launches(target, broken, **SELECT_GROUPS, **options)
    narrow = [load for one in launches for load in compiled.narrow_loads(one)]
    assert {load.stream for load in narrow} == {stream}


@pytest.mark.usefixtures("unchanged_modules")
def test_rearranged_addresses_are_noticed(tmp_path: Path) -> None:
    line = "\n        component = tl.gather(component, j, 0)\n"
    without = changed_kernels(tmp_path, "without_gather", "scoring.py", line, "\n")
    score = next(one for one in specialised_launches("sm_90", without, **SELECT_GROUPS) if is_named(one, "score"))
    if compiled.TRITON < (3, 9):  # newer ones do without the line
        assert pointer_conversions(score)


def is_named(one: Specialised, name: str) -> bool:
    return one.kernel.__name__ == name


@pytest.mark.parametrize("options", [SELECT, LONG_GROUPS], ids=["select", "distributed-groups"])
def test_the_last_part_merges_after_all_stores(options: dict[str, Any]) -> None:
    """On NVIDIA: stores, a barrier of all warps, the release, a barrier again, loads past the first-level cache."""
    gather = next(one for one in specialised_launches("sm_90", **options) if is_named(one, "gather"))
    code = compiled.compile_kernel(gather).asm["ptx"]
    release = code.index("atom.global.gpu.acq_rel")
    assert code.count("atom.") == 1
    last_store, barrier = code.rindex("st.global", 0, release), code.rindex("bar.sync", 0, release)
    assert last_store < barrier < release < code.index("bar.sync", release) < code.index("ld.global.cg", release)
    assert "ld.global.cg" not in code[:release]


@pytest.mark.parametrize("options", [SELECT, SELECT_GROUPS, LONG_GROUPS], ids=["select", "groups", "distributed"])
def test_on_amd_another_kernel_merges(options: dict[str, Any]) -> None:
    """There a barrier does not wait for other waves' stores, so nothing may depend on what an atomic says of them."""
    launches = specialised_launches("gfx942", **options)
    assert [one.kernel.__name__ for one in launches][-2:] == ["gather", "merge"]
    for one in launches:
        code = compiled.compile_kernel(one).asm["amdgcn"]
        assert "atomic" not in code or one.kernel.__name__ == "histogram", one.kernel.__name__


@pytest.mark.parametrize("case", compiled.RECORDED_CASES)
def test_no_more_code_than_recorded(case: str) -> None:
    """Registers, instructions and barriers of the loops, as they were when the kernels were last looked at."""
    recorded, known = compiled.nearest_record()
    tolerance = 1.1 if known else 1.25  # a Triton that nobody has looked at may be a little worse
    for name, code in compiled.codes_of(case).items():
        then = recorded[case][name]
        assert code.spilled <= SPILL_LIMIT["sm_90"], name
        assert code.registers <= max(tolerance * then.registers, fused.REGISTERS), name
        assert sum(loop.barriers for loop in code.loops) <= tolerance * sum(loop.barriers for loop in then.loops), name
        assert len(code.loops) <= len(then.loops) or not known, name
        longest, longest_then = (max(one.loops, default=None) for one in (code, then))
        assert longest_then is None or longest.instructions <= tolerance * longest_then.instructions, name
        assert code.instructions <= tolerance * then.instructions, name


def test_spills_are_noticed() -> None:
    score = next(one for one in record(launch, empty_call(**SELECT), "sm_90") if one.name == "score")
    starved = score._replace(options={**score.options, "maxnreg": 32})
    assert compiled.resources(specialise(starved, "sm_90")).spilled > 0


APPENDS = [
    ("sm_80", torch.float16, 128),
    ("sm_90", torch.float16, 128),
    ("sm_90", torch.bfloat16, 80),
    ("sm_90", torch.float32, 256),
    ("sm_100", torch.float16, 128),
    ("gfx942", torch.float16, 128),
]


@pytest.mark.parametrize(("target", "dtype", "head_dim"), APPENDS)
@pytest.mark.parametrize("position", [7, None], ids=["position", "positions"])
@pytest.mark.parametrize("index", ["full", "int4"])
def test_append_compiles(target: str, dtype: torch.dtype, head_dim: int, position: int | None, index: str) -> None:
    call = empty_append(batch=2, head_dim=head_dim, dtype=dtype, position=position, index=index)
    (appended,) = (specialise(one, target) for one in record(launch, call, target))
    used = compiled.resources(appended)
    assert used.spilled == 0
    assert used.shared <= SHARED_LIMIT_CONSUMER


@pytest.mark.parametrize(("target", "dtype", "head_dim"), APPENDS)
@pytest.mark.parametrize("index", ["full", "int4"])
def test_append_slots_compiles(target: str, dtype: torch.dtype, head_dim: int, index: str) -> None:
    """Rows and sums by the same two kernels for a token and for a prompt; whole pages are read 16 bytes at a time."""
    launches = [
        specialise(each, target)
        for count in (1, 1000)
        for each in record(launch, empty_slots(count, head_dim=head_dim, dtype=dtype, index=index), target)
    ]
    assert [each.kernel.__name__ for each in launches] == 2 * ["write_slots", "complete_pages"]
    assert responsible_for_recompiling(launches) == {}
    for each in launches[:2]:
        used = compiled.resources(each)
        assert used.spilled == 0
        assert used.shared <= SHARED_LIMIT_CONSUMER
        assert {load.stream for load in compiled.stream_loads(each)} == compiled.streams_of(each)
        assert not compiled.narrow_loads(each)


@pytest.mark.parametrize(("target", "dtype", "head_dim"), APPENDS)
def test_encode_compiles(target: str, dtype: torch.dtype, head_dim: int) -> None:
    """Keys are read 16 bytes at a time; and the bits are PyTorch's: no product fused with a sum, division rounded."""
    call = empty_encoding(batch=2, head_dim=head_dim, dtype=dtype)
    (encoded,) = (specialise(one, target) for one in record(launch, call, target))
    used = compiled.resources(encoded)
    assert used.spilled == 0
    assert used.shared <= SHARED_LIMIT_CONSUMER
    loads = compiled.stream_loads(encoded)
    assert {load.stream for load in loads} == {"rows"} and not compiled.narrow_loads(encoded)
    if not target.startswith("gfx"):
        code = compiled.compile_kernel(encoded).asm["ptx"]
        assert "fma." not in code and "div.rn.f32" in code and "div.full" not in code


@pytest.mark.parametrize(("target", "dtype", "head_dim"), APPENDS)
def test_extend_sum_compiles(target: str, dtype: torch.dtype, head_dim: int) -> None:
    call = empty_extension(batch=2, head_dim=head_dim, dtype=dtype)
    (extended,) = (specialise(one, target) for one in record(launch, call, target))
    assert compiled.resources(extended).spilled == 0


def responsible_for_recompiling(launches: list[Specialised]) -> dict[str, set[str]]:
    """Kernel -> arguments that make it need more than one binary."""
    return {
        name: {argument for other in found[1:] for argument in found[0].differing(other)}
        for name, found in compiled.distinct(launches).items()
        if len(found) > 1
    }


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize(
    "options",
    [{}, {"mask": True, "start": True}, INT4, {"page": 256}],
    ids=["plain", "masked", "int4", "pages"],
)
@pytest.mark.parametrize(
    ("first", "shape"),
    [(3000, heads(80, 32, 32)), (5000, heads(1, 32, 8)), (20000, heads(1, 32, 8))],
    ids=["fused", "select", "distributed"],
)
def test_nothing_is_compiled_again_while_the_cache_grows(
    first: int, shape: dict[str, int], options: dict[str, Any], target: str
) -> None:
    launches = [
        one
        for cached in range(first, first + 41)
        for one in specialised_launches(target, cached=cached, k=cached // 16, **shape, **options)
    ]
    assert responsible_for_recompiling(launches) == {}


def test_append_is_compiled_once_for_a_growing_cache() -> None:
    calls = [empty_append(capacity=4096 + 256 * (s // 20), position=s) for s in range(41)]
    assert responsible_for_recompiling([specialise(record(launch, call, "sm_90")[0], "sm_90") for call in calls]) == {}
