"""A cache in pages, for the tests: poison wherever nothing was written, and the same calls as of one in a row."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import sparq_kernels
import torch
from sparq_kernels import GROUP, Cached, append_slots
from sparq_kernels.arguments import Arguments
from sparq_kernels.slots import SlotArguments
from torch import Tensor

from tests.kernels.cases import CASES, call_of, make_case

PAGES = [64, 128, 256, 512, 1024, 2048]
PAGED_CASES = {name: case for name, case in CASES.items() if not {"starts", "holes"} & set(case)}


def served(page: int, index: str) -> bool:
    return index == "full" or page >= GROUP


COMBINATIONS = [(page, index) for page, index in itertools.product(PAGES, ("full", "int4")) if served(page, index)]


def empty_pages(
    count: int, heads: int, page: int, head_dim: int, dtype: torch.dtype, index: str, device: str = "cpu"
) -> Cached:
    """Pages of nothing but poison, all of one page in a row, as an engine allocates them."""
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    key, value = (torch.full((count, heads, page, head_dim), torch.nan, dtype=dtype, device=device) for _ in range(2))
    sums = torch.full((count, heads, head_dim), torch.nan, dtype=precise, device=device)
    if index == "full":
        components = torch.full((count, heads, 1, head_dim, page), torch.nan, dtype=dtype, device=device)
        return Cached(key, components, value, sums)
    codes = torch.full((count, heads, page // GROUP, head_dim, GROUP // 2), 255, dtype=torch.uint8, device=device)
    ranges = torch.full((count, heads, page // GROUP, head_dim, 2), torch.nan, dtype=dtype, device=device)
    return Cached(key, codes, value, sums, ranges)


def new_table(lengths: list[int], page: int, seed: int) -> tuple[Tensor, int]:
    """A page for every part of every row, in any order, and entries behind them that must not be looked up; and how
    many pages there are."""
    generator = torch.Generator().manual_seed(seed)
    needed = [-(-n // page) for n in lengths]
    count = sum(needed) + 3
    free = torch.randperm(count, generator=generator).tolist()
    table = torch.full((len(lengths), max(needed) + 2), -(2**31), dtype=torch.int32)
    table[:, -1] = 2**31 - 1
    for row, n in enumerate(needed):
        table[row, :n] = torch.tensor([free.pop() for _ in range(n)], dtype=torch.int32)
    return table, count


def slots_of(table: Tensor, row: int, begin: int, end: int, page: int) -> Tensor:
    """Where positions [begin, end) of a row lie."""
    s = torch.arange(begin, end)
    return table[row].long()[s // page] * page + s % page


def paged(call: Arguments, page: int, index: str, seed: int = 0) -> Arguments:
    """The same call with its cache in pages, filled in parts as an engine does."""
    lengths, heads, head_dim = call.length.tolist(), call.key.shape[1], call.key.shape[3]
    table, count = new_table(lengths, page, seed)
    cached = empty_pages(count, heads, page, head_dim, call.key.dtype, index)
    for row, n in enumerate(lengths):
        parts = [0, *sorted({n // 3, n // 2, max(n - 1, 0)}), n]
        for begin, end in itertools.pairwise(parts):
            new = (x[row, :, begin:end].transpose(0, 1) for x in (call.key, call.value))
            append_slots(cached, *new, slots_of(table, row, begin, end, page))
    return call._replace(**cached._replace(block_table=table)._asdict())


def summed_by_pages(call: Arguments, page: int) -> Arguments:
    """The call with its sum of V added up in the order that pages are: whole ones, and the rows behind them."""
    sums = torch.zeros_like(call.value_sum)
    for row, n in enumerate(call.length.tolist()):
        for begin in range(0, n, page):
            part = torch.zeros_like(sums[row])
            for s in range(begin, min(begin + page, n)):
                part += call.value[row, :, s].to(part.dtype)
            sums[row] += part
    return call._replace(value_sum=sums)


def shared_prefix(page: int) -> tuple[Arguments, Arguments]:
    """Two rows with the same first two pages, in a row each and in pages that are stored once, as engines do with a
    system prompt."""
    first = 2 * page
    case = make_case(2, lengths=[first + 188, first + 88], cached=first + 188, r=6, k=30, index="int4")
    case.key[1, :, :first], case.value[1, :, :first] = case.key[0, :, :first], case.value[0, :, :first]
    codes = Cached(case.key, case.key_components, case.value, None, case.key_ranges)
    sparq_kernels.encode(codes, 0, case.key.shape[2])
    call = summed_by_pages(call_of(case), page)
    in_pages = paged(call, page, "int4")
    assert in_pages.block_table is not None
    in_pages.block_table[1, :2] = in_pages.block_table[0, :2]
    return in_pages, call


def as_rows(call: Arguments) -> Arguments:
    """The tokens of one row's draft as rows, each with its own length and the same pages."""
    queries = call.query.shape[2]
    assert call.block_table is not None and len(call.length) == 1
    return call._replace(
        query=call.query.transpose(0, 2),
        block_table=call.block_table.expand(queries, -1),
        length=call.length - torch.arange(queries - 1, -1, -1),
    )


def tokens(count: int, heads: int, head_dim: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    """Keys and values [T, Hkv, d] as an engine hands them over: slices of one projection."""
    generator = torch.Generator().manual_seed(seed)
    both = torch.randn(count, 2 * heads * head_dim, generator=generator).to(dtype)
    return [x.unflatten(1, (heads, head_dim)) for x in both.chunk(2, 1)]


def same_bytes(ours: Cached, theirs: Cached) -> None:
    for name, a, b in zip(Cached._fields, ours, theirs, strict=True):
        if a is not None:
            assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)), name


def cloned(cached: Cached) -> Cached:
    return Cached(*(None if x is None else x.clone() for x in cached))  # type: ignore[arg-type]


Append = Callable[[Cached, Tensor, Tensor, Tensor], None]


def check_any_order(append: Append, page: int, index: str, at_a_time: int = 1) -> None:
    """Pages do not depend on how tokens came: at once, a few at a time, or again after some were rejected."""
    count = page + page // 2 + 3
    new = tokens(count, 2, 12)
    slots = slots_of(torch.tensor([[2, 0]]), 0, 0, count, page)
    at_once, in_parts, again = (empty_pages(3, 2, page, 12, torch.float32, index) for _ in range(3))
    append(at_once, *new, slots)
    assert at_once.key[1].isnan().all() and at_once.value_sum[0].isnan().all()  # type: ignore[index]
    for t in range(0, count, at_a_time):
        append(in_parts, *(x[t : t + at_a_time] for x in new), slots[t : t + at_a_time])
    same_bytes(at_once, in_parts)
    append(again, *tokens(count, 2, 12, seed=1), slots)  # rejected, and written once more
    append(again, *(x[:5] for x in new), slots[:5])
    append(again, *(x[5:] for x in new), slots[5:])
    same_bytes(at_once, again)


def slot_call(cached: Cached, new_key: Tensor, new_value: Tensor, slots: Tensor) -> SlotArguments:
    return SlotArguments(*ours_in_order(cached), new_key, new_value, slots)


def ours_in_order(cached: Cached) -> tuple[Any, ...]:
    return cached.key, cached.value, cached.key_components, cached.value_sum, cached.key_ranges
