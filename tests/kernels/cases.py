"""Inputs for the operator with every byte that must not matter poisoned, and the checks that its results must pass."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import sparq_kernels
import torch
from sparq_kernels import BLOCK, GROUP, Cached
from sparq_kernels.append import AppendArguments
from sparq_kernels.arguments import Arguments, tensors_of
from sparq_kernels.operator import mean_from
from sparq_kernels.reference import decode_reference, valid_positions
from torch import Tensor

from tests.kernels.equations import Head

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
SPARE = 37  # storage behind the visible positions

CASES: dict[str, dict[str, Any]] = {
    "one position": {"cached": 1, "r": 4, "k": 1},
    "k = 1": {"r": 4, "k": 1},
    "k = 1, window": {"r": 4, "k": 1, "local": 1},
    "k = S": {"r": 4, "k": 300},
    "k > S": {"r": 4, "k": 900},
    "k = S - 1": {"r": 4, "k": 299},
    "local = k": {"r": 4, "k": 20, "local": 20},
    "local = 0": {"r": 4, "k": 20, "local": 0},
    "r = d": {"r": 16, "k": 20},
    "r = 1": {"r": 1, "k": 20},
    "one tile": {"cached": 256, "r": 4, "k": 20},
    "one past a tile": {"cached": 257, "r": 4, "k": 20},
    "one block": {"cached": BLOCK, "r": 4, "k": 20},
    "one past a block": {"cached": BLOCK + 1, "r": 4, "k": 20},
    "components in groups of 8, 4 and 1": {"cached": BLOCK + 300, "head_dim": 40, "r": 30, "k": 20},
    "head_dim 1": {"head_dim": 1, "r": 1, "k": 20},
    "head_dim 7": {"head_dim": 7, "r": 3, "k": 20},
    "head_dim 80": {"head_dim": 80, "r": 20, "k": 20},
    "head_dim 512": {"head_dim": 512, "num_heads": 2, "num_kv_heads": 1, "r": 64, "k": 20},
    "group 1": {"num_heads": 3, "num_kv_heads": 3, "r": 4, "k": 20},
    "group 3": {"num_heads": 6, "r": 4, "k": 40},
    "group 5": {"num_heads": 5, "num_kv_heads": 1, "r": 4, "k": 20},
    "group 8": {"num_heads": 8, "num_kv_heads": 1, "r": 4, "k": 20},
    "group 71": {"num_heads": 71, "num_kv_heads": 1, "r": 4, "k": 20},
    "many heads": {"batch": 2, "num_heads": 32, "num_kv_heads": 16, "r": 4, "k": 20},
    "one head": {"num_heads": 1, "num_kv_heads": 1, "cached": 3000, "r": 4, "k": 200},
    "budget from the length": {"batch": 3, "lengths": [300, 100, 9], "r": 4, "k": 6, "k_divisor": 4},
    "ragged": {"batch": 4, "lengths": [300, 1, 0, 256], "r": 4, "k": 20},
    "left padding": {"batch": 4, "starts": [0, 299, 300, 255], "r": 4, "k": 20},
    "ragged with left padding": {"batch": 3, "lengths": [300, 290, 7], "starts": [100, 255, 9], "r": 4, "k": 20},
    "holes": {"batch": 2, "holes": 0.5, "r": 4, "k": 20},
    "nearly all holes": {"batch": 4, "cached": 1500, "holes": 0.99, "r": 4, "k": 8},
    "everything at once": {
        "batch": 3,
        "cached": 900,
        "lengths": [900, 700, 513],
        "starts": [1, 512, 300],
        "holes": 0.3,
        "r": 5,
        "k": 30,
        "local": 7,
        "softcap": 4.0,
        "scale": 0.4,
        "mean_value": False,
    },
    "softcap": {"r": 4, "k": 20, "softcap": 2.0},
    "scale": {"r": 4, "k": 20, "scale": 2.5},
    "negative scale": {"r": 4, "k": 20, "scale": -0.3},
    "no mean value": {"r": 4, "k": 20, "mean_value": False},
    "mean value where enough was attended": {"r": 4, "k": 20, "mean_value": 0.3, "cached": 50},
    "most of the mass": {"cached": 700, "r": 4, "k": 700, "mass": 0.9},
    "most of the mass, of some": {"cached": 700, "r": 8, "k": 90, "mass": 0.5, "k_min": 3, "local": 2},
    "mass, no local window": {"r": 8, "k": 250, "mass": 0.3, "local": 0, "batch": 2, "lengths": [300, 9]},
    "mass of everything": {"r": 8, "k": 300, "mass": 0.9999999, "k_min": 300},
    "mass in groups and holes": {
        "batch": 2,
        "num_heads": 6,
        "cached": 600,
        "holes": 0.3,
        "query_length": 3,
        "r": 6,
        "k": 12,
        "k_divisor": 3,
        "mass": 0.8,
        "k_min": 10,
    },
    "two queries": {"query_length": 2, "r": 4, "k": 20},
    "sixteen queries": {"query_length": 16, "r": 4, "k": 20},
    "more queries than positions": {"query_length": 5, "cached": 3, "r": 4, "k": 2},
    "queries across a block": {"query_length": 5, "cached": BLOCK + 2, "r": 4, "k": 20},
    "queries of ragged rows with holes": {
        "batch": 4,
        "query_length": 4,
        "lengths": [300, 3, 258, 0],
        "starts": [299, 0, 256, 0],
        "holes": 0.3,
        "r": 4,
        "k": 12,
        "k_divisor": 9,
    },
}


@dataclass
class Case:
    """Tensors of one call.  `key` and `value` are views into larger storage, NaN wherever a position is not valid."""

    query: Tensor
    key: Tensor
    key_components: Tensor
    value: Tensor
    value_sum: Tensor
    length: Tensor
    start: Tensor | None = None
    mask: Tensor | None = None
    key_ranges: Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def tensors(self) -> tuple[Any, ...]:
        return (
            self.query,
            self.key,
            self.key_components,
            self.value,
            self.value_sum,
            self.length,
            self.start,
            self.mask,
            self.key_ranges,
        )

    @property
    def valid(self) -> Tensor:
        return valid_positions(self.length, self.start, self.mask, self.key.shape[2])

    def head(self, b: int, h: int, i: int = -1) -> Head:
        """One KV head of query i (the last one) for the equations, with the poison replaced by something a mistake
        would show in."""
        group = self.query.shape[1] // self.key.shape[1]
        scale = self.options.get("scale")
        later = (self.query.shape[2] - 1 - i) % self.query.shape[2]
        seen = valid_positions(self.length - later, self.start, self.mask, self.key.shape[2])
        return Head(
            self.query[b, h * group : (h + 1) * group, i].double().tolist(),
            self.key[b, h].double().nan_to_num(nan=1e3).tolist(),
            self.value[b, h].double().nan_to_num(nan=1e3).tolist(),
            seen[b].tolist(),
            self.query.shape[3] ** -0.5 if scale is None else scale,
            self.options.get("softcap"),
            [] if self.key_ranges is None else self.coded_keys(b, h, int(self.length[b]) - later),
        )

    def coded_keys(self, b: int, h: int, seen: int) -> list[list[float]]:
        """What the codes stand for, [S][d] in float64; the keys themselves behind the last whole group that is seen."""
        assert self.key_ranges is not None
        keys = self.key[b, h].double().nan_to_num(nan=1e3).tolist()
        for s in range(max(seen, 0) // GROUP * GROUP):
            within, ranges = s % GROUP, self.key_ranges[b, h, s // GROUP].double().tolist()
            packed = self.key_components[b, h, s // GROUP, :, within % (GROUP // 2)].tolist()
            codes = [byte >> 4 if within >= GROUP // 2 else byte & 15 for byte in packed]
            keys[s] = [low + step * code for (low, step), code in zip(ranges, codes, strict=True)]
        return keys


def make_case(
    batch: int = 1,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    cached: int = 300,
    head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
    *,
    query_length: int = 1,
    lengths: list[int] | None = None,
    starts: list[int] | None = None,
    holes: float = 0.0,
    seed: int = 0,
    draw: Callable[..., Tensor] = torch.randn,
    index: str = "full",
    **options: Any,
) -> Case:
    """Random inputs; `holes` is the share of positions that a mask takes out, `draw` what fills the tensors."""
    generator = torch.Generator().manual_seed(seed)

    def fill(*shape: int) -> Tensor:
        return draw(shape, generator=generator).to(dtype)

    length = torch.tensor([cached] * batch if lengths is None else lengths)
    start = None if starts is None else torch.tensor(starts)
    mask = torch.rand(batch, cached, generator=generator) >= holes if holes else None
    valid = valid_positions(length, start, mask, cached)

    def storage() -> tuple[Tensor, Tensor]:
        """[B, positions, Hkv, d] as a projection leaves it, seen as [B, Hkv, S, d]."""
        whole = torch.full((batch, cached + SPARE, num_kv_heads, head_dim), torch.nan, dtype=dtype)
        view = whole.transpose(1, 2)[:, :, :cached]
        view.copy_(fill(batch, num_kv_heads, cached, head_dim).masked_fill(~valid[:, None, :, None], torch.nan))
        return whole, view

    _, key = storage()
    _, value = storage()
    components, ranges = index_of(key, index)
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    value_sum = value.double().masked_fill(~valid[:, None, :, None], 0.0).sum(2).to(precise)
    query = (2 * fill(batch, query_length, num_heads, head_dim)).transpose(1, 2)
    return Case(query, key, components, value, value_sum, length, start, mask, ranges, options)


def index_of(key: Tensor, index: str) -> tuple[Tensor, Tensor | None]:
    """The index of keys, and poison behind it."""
    batch, heads, cached, head_dim = key.shape
    empty = empty_index((batch, heads, cached + SPARE, head_dim), key.dtype, index, key.device)
    if empty[1] is None:
        sparq_kernels.write_components(empty[0], key, 0)
    else:
        sparq_kernels.encode(Cached(key, empty[0], key, None, empty[1]), 0, cached)
    return empty


def empty_index(
    shape: tuple[int, int, int, int], dtype: torch.dtype, index: str, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor | None]:
    """An index of nothing but poison for keys of that shape."""
    if index == "full":
        return sparq_kernels.allocate_components(*shape, dtype, device).fill_(torch.nan), None
    codes, ranges = sparq_kernels.allocate_codes(*shape, dtype, device)
    return codes.fill_(255), ranges.fill_(torch.nan)


def storage_of(
    batch: int, heads: int, capacity: int, head_dim: int, dtype: torch.dtype = torch.float32, index: str = "full"
) -> Cached:
    """Uninitialised keys, values and index, and some sum of values: what `append` writes to."""
    shape = (batch, heads, capacity, head_dim)
    key, value = (torch.full(shape, torch.nan, dtype=dtype) for _ in range(2))
    components, ranges = empty_index(shape, dtype, index)
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    value_sum = torch.arange(batch * heads * head_dim, dtype=precise).view(batch, heads, head_dim)
    return Cached(key, components, value, value_sum, ranges)


def new_token(batch: int, heads: int, head_dim: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """A key and a value as a projection leaves them: [B, 1, Hkv, d] seen as [B, Hkv, 1, d]."""
    generator = torch.Generator().manual_seed(0)
    both = torch.randn(2, batch, 1, heads, head_dim, generator=generator).to(dtype).transpose(2, 3)
    return both[0], both[1]


def small_integers(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """For `draw`: few distinct keys, so that many scores tie exactly."""
    return torch.randint(-2, 3, shape, generator=generator)


def call_of(case: Case, **changes: Any) -> Arguments:
    """The operator's arguments, positions asked for."""
    tensors = {name: getattr(case, name, None) for name in tensors_of(Arguments._fields)}
    defaults = {"r": 4, "k": 20, "k_min": 1, "dense_below": 0, "mean_value": True, "return_positions": True}
    options = {**defaults, **case.options, **changes}
    options["mean_from"] = mean_from(options.pop("mean_value"))
    return Arguments(**{**dict.fromkeys(Arguments._fields), **tensors, **options})


def run_operator(case: Case) -> sparq_kernels.DecodeOutput:
    return decode_call(call_of(case))


def decode_call(call: Arguments) -> sparq_kernels.DecodeOutput:
    """By the public function."""
    return _called(sparq_kernels.decode, call, call.scale, mean_value=call.mean_from)


def _called(function: Callable[..., Any], call: Arguments, scale: float | None, **mean: float) -> Any:
    """The public function and the reference take the same, but for defaults that have been filled in."""
    options = {"softcap": call.softcap, "return_positions": call.return_positions, **mean}
    return function(call.query, call.cached, call.visible, call.budget, scale=scale, **options)


def append_call(call: AppendArguments) -> None:
    """By the public function."""
    cached = Cached(call.key, call.key_components, call.value, call.value_sum, call.key_ranges)
    sparq_kernels.append(cached, call.new_key, call.new_value, call.offset if call.position is None else call.position)


def rows_of(cached: Cached, b: int) -> Cached:
    """One row of a storage."""
    return Cached(*(None if x is None else x[b : b + 1] for x in cached))  # type: ignore[arg-type]


def run_reference(case: Case, **changes: Any) -> sparq_kernels.DecodeOutput:
    return reference_call(call_of(case, **changes))


def reference_call(call: Arguments) -> sparq_kernels.DecodeOutput:
    return sparq_kernels.DecodeOutput(
        *_called(decode_reference, call, call.softmax_scale, mean_from=float(call.mean_from))
    )


def check_against_equations(case: Case, result: sparq_kernels.DecodeOutput, is_rounded: bool = False) -> None:
    """Every row and head: positions allowed, sufficient and best up to rounding; output and alpha right for them.

    is_rounded: the scores of coded keys came from weights of eight bits, and are off by what `score_error` allows.
    """
    r, k = case.options["r"], case.options["k"]
    mass, k_min = case.options.get("mass"), case.options.get("k_min", 1)
    k_divisor, local = case.options.get("k_divisor"), case.options.get("local")
    tolerance, num_kv_heads = TOLERANCE[case.query.dtype], case.key.shape[1]
    group = case.query.shape[1] // num_kv_heads
    assert result.positions is not None
    assert result.output.dtype == case.query.dtype and result.alpha.dtype == torch.float32
    batch, _, query_length, _ = case.query.shape
    for b, h, i in itertools.product(range(batch), range(num_kv_heads), range(query_length)):
        head = case.head(b, h, i)
        slots = result.positions[b, h, i].tolist()
        chosen = [s for s in slots if s >= 0]
        assert slots == sorted(set(chosen)) + [-1] * (len(slots) - len(chosen))
        assert len(chosen) == result.read[b, h, i]
        assert set(chosen) <= set(head.valid_positions)
        window = set(head.window(k, k_divisor, local))
        assert window <= set(chosen)
        # A score is off by this factor: each logit by at most the error, above and below the line.
        slack = math.exp(2 * score_error(case, head, b, h, r)) if is_rounded else 1 + 1e-5
        budget = head.budget(k, k_divisor)
        if mass is None:
            assert len(chosen) == budget
        else:
            check_mass(head, r, chosen, window, mass, min(k_min, budget), budget, slack)
        check_best(head, r, set(chosen), window, slack)

        heads = slice(h * group, (h + 1) * group)
        attended = result.alpha[b, heads, i].tolist() if is_rounded else None
        output, alpha = head.output(r, chosen, case.options.get("mean_value", True), attended)
        for actual, expected, allowed in (
            (result.output, output, {"rtol": tolerance, "atol": tolerance}),
            (result.alpha, alpha, {"rtol": 2e-5 + slack - 1, "atol": 1e-6}),
            (result.lse, head.lse(chosen), {"rtol": 2e-5, "atol": 2e-5}),
        ):
            right = torch.tensor(expected, dtype=torch.float64)
            torch.testing.assert_close(actual[b, heads, i].double(), right, **allowed)


def score_error(case: Case, head: Head, b: int, h: int, r: int) -> float:
    """How much a logit of a coded key may be off where weights w = q * step are rounded to unit * n, |n| <= 127, and
    the loss at the middle of the codes is made up for: sum of |w - unit * n| * 15 / 2, each half a unit, and rounding.
    """
    assert case.key_ranges is not None
    c, largest = head.components(r), 0.0
    steps = case.key_ranges[b, h, : case.key.shape[2] // GROUP, :, 1].double()  # [groups, d]
    for query in head.queries:
        w = steps * torch.tensor(query, dtype=torch.float64) * head.scale / head.temperature(query, c)
        largest = max(largest, w[:, c].abs().amax().item() if len(w) else 0.0)
    return 15 / 4 * r * largest / 127 + 1e-5


def check_mass(
    head: Head, r: int, chosen: list[int], window: set[int], mass: float, k_min: int, budget: int, slack: float
) -> None:
    """As many as the mass asks for, and no more, up to scores that are off by the factor `slack`."""
    scores, least = head.scores(r), max(len(window), k_min)
    assert least <= len(chosen) <= budget
    if len(chosen) < budget:
        assert head.share(scores, chosen) * slack >= mass - 1e-5
    if len(chosen) > least:
        worst = min(set(chosen) - window, key=lambda s: sum(row[s] for row in scores))
        assert head.share(scores, [s for s in chosen if s != worst]) / slack <= mass + 1e-5


def check_best(head: Head, r: int, chosen: set[int], window: set[int], slack: float = 1.0) -> None:
    """No position left out scores more than one chosen on merit, beyond rounding: each off by the factor `slack`."""
    scores = head.scores(r)
    total = {s: math.fsum(row[s] for row in scores) for s in head.valid_positions}
    on_merit = [total[s] for s in chosen - window]
    left_out = [total[s] for s in set(total) - chosen]
    if on_merit and left_out:
        assert min(on_merit) >= max(left_out) * (1 - 1e-4) / slack**2 - 1e-29


def check_same(case: Case, actual: sparq_kernels.DecodeOutput, expected: sparq_kernels.DecodeOutput) -> None:
    """Kernel and reference agree, positions included: for scores that differ by more than rounding, or exactly tie."""
    tolerance = TOLERANCE[case.query.dtype]
    assert actual.positions is not None and expected.positions is not None
    assert torch.equal(actual.positions, expected.positions)
    assert torch.equal(actual.read, expected.read)
    torch.testing.assert_close(actual.output, expected.output, rtol=tolerance, atol=tolerance, equal_nan=True)
    torch.testing.assert_close(actual.alpha, expected.alpha, rtol=2e-5, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(actual.lse, expected.lse, rtol=2e-5, atol=2e-5, equal_nan=True)
