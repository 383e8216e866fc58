"""Each compared method against its definition in plain Python, and what holds for all of them."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies
from torch import Tensor

from sparq.lm_eval.methods import H2O, H2OLayer, Method, Oracle, Pages, Quest, Rocket, SparqVariant, Window
from sparq.lm_eval.methods import h2o as h2o_module
from sparq.lm_eval.methods.method import best, by_mass
from sparq.lm_eval.methods.sparq_variant import coded
from tests.sparq.lm_eval import slow_methods as slow
from tests.sparq.slow import slow_head

SCALE = 0.5


@dataclass
class Case:
    """Decode steps of one layer: `prompt` positions are there before the first of them."""

    queries: Tensor  # [B, Hkv, G, S, d]: of every position
    key: Tensor  # [B, Hkv, S, d]
    value: Tensor
    valid: Tensor  # [B, S]
    prompt: int

    @property
    def mask(self) -> Tensor:
        """bool [B, prompt, prompt] as transformers makes it."""
        valid = self.valid[:, : self.prompt]
        return torch.ones(self.prompt, self.prompt, dtype=torch.bool).tril() & valid[:, None]

    def layer(self, method: Method) -> H2OLayer | None:
        if not method.observes:
            return None
        layer, n = H2OLayer(), self.prompt
        layer.update(self.key[:, :, :n], self.value[:, :, :n])
        mask = None if bool(self.valid.all()) else self.mask
        method.observe(self.queries[:, :, :, :n], self.key[:, :, :n], mask, SCALE, layer)
        return layer

    def steps(self, method: Method):
        """(position, what `attend` gave, the state) of each decode step."""
        layer = self.layer(method)
        for s in range(self.prompt, self.key.shape[2]):
            if layer is not None:
                layer.update(self.key[:, :, s : s + 1], self.value[:, :, s : s + 1])
            n = s + 1
            key, value, valid = self.key[:, :, :n], self.value[:, :, :n], self.valid[:, :n]
            yield s, method.attend(self.queries[:, :, :, s], key, value, valid, SCALE, layer), layer


def case(padding: str = "left", *, length: int = 23, prompt: int = 17, group: int = 2, seed: int = 0) -> Case:
    """Three rows, two KV heads of size 8, float64; what is padding is NaN or, with holes, large."""
    generator = torch.Generator().manual_seed(seed)
    queries = 2 * torch.randn(3, 2, group, length, 8, generator=generator, dtype=torch.float64)
    key, value = torch.randn(2, 3, 2, length, 8, generator=generator, dtype=torch.float64)
    valid = torch.ones(3, length, dtype=torch.bool)
    if padding != "none":
        valid[1, :5] = valid[2, :12] = False
    if padding == "holes":
        valid[0, 7] = valid[1, 8:11] = False
    filling = 1e3 if padding == "holes" else torch.nan
    key[~valid[:, None].expand(-1, 2, -1)] = filling
    value[~valid[:, None].expand(-1, 2, -1)] = filling
    return Case(queries, key, value, valid, prompt)


Slow = Callable[[int, int, list, list, list, list], tuple[list, list]]  # b, h, queries, keys, values, valid


def compare(of: Case, method: Method, definition: Slow, elements: Callable[[list[list[int]], list[int]], int]) -> None:
    """`definition` gives the outputs and the kept positions of each query head of row b and KV head h."""
    changed = 0.0
    for s, attended, _ in of.steps(method):
        batch, kv_heads, group, _, d = of.queries.shape
        kept = attended.kept.expand(-1, -1, group, -1)
        all_kept, counts = [], []
        for b in range(batch):
            valid = of.valid[b, : s + 1].nonzero()[:, 0].tolist()
            counts.append(len(valid))
            for h in range(kv_heads):
                q, keys, values = of.queries[b, h, :, s].tolist(), of.key[b, h].tolist(), of.value[b, h].tolist()
                outputs, positions = definition(b, h, q, keys, values, valid)
                for g in range(group):
                    assert kept[b, h, g].nonzero()[:, 0].tolist() == positions[g]
                    expected = torch.tensor(outputs[g], dtype=torch.float64)
                    torch.testing.assert_close(attended.output[b, h, g], expected, rtol=1e-9, atol=1e-9)
                    share = slow.mass(q[g], keys, valid, positions[g], SCALE)
                    assert float(attended.mass[b, h, g]) == pytest.approx(share, abs=1e-9)
                    full = torch.tensor(slow.attend(q[g], keys, values, valid, SCALE), dtype=torch.float64)
                    changed = max(changed, float((full - expected).abs().max()))
                all_kept += positions[: attended.kept.shape[2]]
        assert attended.elements == elements(all_kept, counts)
        assert attended.output.shape == (batch, kv_heads, group, d)
    assert changed > 0.1  # the test has power only where sparsity changes something


def exact(choose: Callable[..., list[int]]) -> Slow:
    """Exact attention over the positions that `choose` gives for a group."""

    def definition(b, h, queries, keys, values, valid):
        kept = choose(b, h, queries, keys, valid)
        return [slow.attend(q, keys, values, kept, SCALE) for q in queries], [kept] * len(queries)

    return definition


def attended_only(kept: list[list[int]], counts: list[int]) -> int:
    return 2 * 8 * sum(map(len, kept))


PADDINGS = pytest.mark.parametrize("padding", ["none", "left", "holes"])


@PADDINGS
@pytest.mark.parametrize("knobs, budget", [(dict(k=5), lambda n: 5), (dict(ratio=3.5), lambda n: int(n / 3.5))])
def test_oracle(padding: str, knobs: dict, budget: Callable[[int], int]) -> None:
    def choose(b, h, queries, keys, valid):
        return slow.oracle(queries, keys, valid, SCALE, budget(len(valid)))

    compare(case(padding), Oracle(**knobs), exact(choose), attended_only)


@PADDINGS
@pytest.mark.parametrize("knobs", [dict(mass=0.6), dict(mass=0.8, k=4), dict(mass=0.5, ratio=23)], ids=str)
def test_oracle_by_mass(padding: str, knobs: dict) -> None:
    sizes = set()

    def choose(b, h, queries, keys, valid):
        kept = slow.oracle_by_mass(queries, keys, valid, SCALE, knobs["mass"], knobs.get("k", len(valid)))
        sizes.add(len(kept))
        return kept

    compare(case(padding), Oracle(**knobs), exact(choose), attended_only)
    assert len(sizes) > 2 and max(sizes) <= knobs.get("k", 23)


@PADDINGS
@pytest.mark.parametrize(
    "knobs, budget",
    [(dict(k=6, sinks=2), lambda n: (6, 2)), (dict(ratio=3, sinks=3), lambda n: (n // 3, min(3, n // 6)))],
)
def test_window(padding: str, knobs: dict, budget: Callable[[int], tuple[int, int]]) -> None:
    compare(
        case(padding),
        Window(**knobs),
        exact(lambda b, h, queries, keys, valid: slow.window(valid, *budget(len(valid)))),
        attended_only,
    )


@PADDINGS
@pytest.mark.parametrize(
    "knobs, page, budget",
    [
        (dict(k=9, page=4), 4, lambda n: 2 if n > 9 else 3),  # k covers 9
        (dict(k=4, page=4), 4, lambda n: 1),
        (dict(ratio=1.5, page=3), 3, lambda n: max(1, int(n * (1 / 1.5 - 1 / 3) / 3 + 1e-9))),
    ],
)
def test_quest(padding: str, knobs: dict, page: int, budget: Callable[[int], int]) -> None:
    def choose(b, h, queries, keys, valid):
        return slow.quest(queries, keys, valid, SCALE, page, budget(len(valid)))

    def elements(kept: list[list[int]], counts: list[int]) -> int:
        pages = sum(-(-n // page) for n in counts)
        return attended_only(kept, counts) + 2 * 8 * 2 * pages  # two KV heads

    compare(case(padding), Quest(**knobs), exact(choose), elements)


@PADDINGS
@pytest.mark.parametrize(
    "knobs, page, summary, budget",
    [
        (dict(k=9, page=4), 4, 9, lambda n: 2 if n > 9 else 3),
        (dict(k=9, page=3, spread="dimension"), 3, 16, lambda n: 3),
        (dict(k=9, page=3, first_pages=1), 3, 9, lambda n: 3),
        (dict(k=9, page=2, first_pages=9), 2, 9, lambda n: 4 if n > 9 else -(-n // 2)),
        (dict(k=4, page=3, first_pages=2), 3, 9, lambda n: 1),  # no room for any but the newest
        (dict(ratio=2), 8, 9, lambda n: max(1, int(n * (1 / 2 - 9 / 16 / 8) / 8))),
        (dict(ratio=1.5, page=2), 2, 9, lambda n: max(1, int(n * (1 / 1.5 - 9 / 16 / 2) / 2 + 1e-9))),
        (dict(ratio=1.5, page=3, spread="dimension"), 3, 16, lambda n: int(n * (1 / 1.5 - 1 / 3) / 3 + 1e-9) or 1),
    ],
)
def test_pages(padding: str, knobs: dict, page: int, summary: int, budget: Callable[[int], int]) -> None:
    others = knobs.get("spread", "norm"), knobs.get("first_pages", 0)

    def choose(b, h, queries, keys, valid):
        return slow.pages_by_moments(queries, keys, valid, SCALE, page, budget(len(valid)), *others)

    def elements(kept: list[list[int]], counts: list[int]) -> int:
        return attended_only(kept, counts) + 2 * summary * sum(-(-n // page) for n in counts)  # two KV heads

    compare(case(padding), Pages(**knobs), exact(choose), elements)


@PADDINGS
@pytest.mark.parametrize(
    "knobs, page, r, budget",
    [
        (dict(k=9, page=4, r=3), 4, 3, lambda n: 2 if n > 9 else 3),
        (dict(k=7, page=1, r=8), 1, 8, lambda n: 7 if n > 7 else n),
        (dict(ratio=4), 2, 4, lambda n: max(1, int(n * (1 / 4 - 1 / 8) / 2))),
        (dict(ratio=2, r=5, page=3), 3, 5, lambda n: max(1, int(n * (1 / 2 - 5 / 16 / 3) / 3))),
    ],
)
def test_rocket(padding: str, knobs: dict, page: int, r: int, budget: Callable[[int], int]) -> None:
    def choose(b, h, queries, keys, valid):
        return slow.rocket(queries, keys, valid, SCALE, page, budget(len(valid)), r)

    def elements(kept: list[list[int]], counts: list[int]) -> int:
        return attended_only(kept, counts) + 2 * r * sum(-(-n // page) for n in counts)  # two KV heads

    compare(case(padding), Rocket(**knobs), exact(choose), elements)


def test_rockets_bounds_of_one_position_are_sparqs_scores() -> None:
    rocket, variant = Rocket(k=6, page=1, r=3), SparqVariant(k=6, r=3, local=1, mean_value=False)
    for (_, actual, _), (_, expected, _) in zip(case().steps(rocket), case().steps(variant), strict=True):
        assert torch.equal(actual.kept, expected.kept) and torch.equal(actual.output, expected.output)


@pytest.mark.parametrize("method", [Rocket(page=2, r=4), Pages(page=5, spread="norm", ratio=9)], ids=str)
def test_a_ratio_that_the_summaries_alone_use_up(method: Method) -> None:
    with pytest.raises(
        ValueError, match=r"page must be so large that .* got page=[25], ratio=[89] and a head_dim of 8"
    ):
        next(iter(case().steps(method)))


def test_rocket_wants_no_more_components_than_there_are() -> None:
    with pytest.raises(ValueError, match="r must not be larger than the model's head_dim=8, got r=9"):
        next(iter(case().steps(Rocket(k=6, r=9))))


@PADDINGS
@pytest.mark.parametrize("chunk", [1, h2o_module.OBSERVED_AT_ONCE], ids=["one query", "all at once"])
@pytest.mark.parametrize(
    "knobs, budget",
    [
        (dict(k=6), lambda n: (6, 3)),
        (dict(k=6, local=1), lambda n: (6, 1)),
        (dict(k=7, local=7), lambda n: (7, 7)),
        (dict(ratio=3), lambda n: (int(n * 8 / 27), int(n * 8 / 27) // 2)),
        (dict(ratio=2, local=2), lambda n: (int(n * 8 / 18), 2)),
    ],
    ids=lambda value: None if callable(value) else str(value),  # a function's name is its address
)
def test_h2o(
    padding: str,
    chunk: int,
    knobs: dict,
    budget: Callable[[int], tuple[int, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(h2o_module, "OBSERVED_AT_ONCE", chunk)
    of = case(padding)
    heads: dict[tuple[int, int], slow.H2O] = {}

    def choose(b, h, queries, keys, valid):
        if (b, h) not in heads:
            heads[b, h] = slow.H2O()
            before = [s for s in valid if s < of.prompt]
            heads[b, h].prompt(of.queries[b, h].transpose(0, 1).tolist(), keys, before, SCALE)
        k, local = budget(len(valid))
        return heads[b, h].step(queries, keys, valid, SCALE, k, max(1, local))

    compare(of, H2O(**knobs), exact(choose), lambda kept, counts: (2 * 8 + 2) * sum(map(len, kept)))
    assert any(head.evicted for head in heads.values())


@pytest.mark.parametrize("padding", ["none", "left"])
def test_a_prompts_attention_is_never_all_in_memory(padding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made, softmax = [], h2o_module.masked_softmax

    def spying(logits: Tensor, allowed: Tensor) -> Tensor:
        made.append(logits.numel())
        return softmax(logits, allowed)

    monkeypatch.setattr(h2o_module, "masked_softmax", spying)
    monkeypatch.setattr(h2o_module, "OBSERVED_AT_ONCE", 3 * 2 * 2 * 100 * 7)  # seven queries
    case(padding, length=101, prompt=100).layer(H2O(k=6))
    assert len(made) == 15 and max(made) <= 3 * 2 * 2 * 100 * 7


def test_h2o_observes_several_new_tokens_in_the_middle() -> None:
    """5 tokens after a prompt of 12, then one: as a prompt of 17."""
    for padding in ("none", "left"):
        of = case(padding)
        whole, method = of.layer(H2O(k=6)), H2O(k=6)
        of.prompt = 12
        layer = of.layer(method)
        assert whole is not None and layer is not None
        layer.update(of.key[:, :, 12:17], of.value[:, :, 12:17])
        of.prompt = 17
        mask = None if padding == "none" else of.mask[:, 12:]
        method.observe(of.queries[:, :, :, 12:17], of.key[:, :, :17], mask, SCALE, layer)
        torch.testing.assert_close(layer.scores, whole.scores)


def sparq_of_group(
    queries: list, keys: list, values: list, valid: list[int], score_temperature: bool, **knobs: Any
) -> tuple[list, list[list[int]]]:
    """The definition's outputs for a group that shares its positions, and these for each of its queries."""
    q, k, v = (torch.tensor(x, dtype=torch.float64) for x in (queries, keys, values))
    outputs, _, read = slow_head(
        q, k[valid], v[valid], scale=SCALE, softcap=None, temperature=score_temperature, **knobs
    )
    return outputs.tolist(), [[valid[i] for i in read]] * len(queries)


@PADDINGS
@pytest.mark.parametrize("mean_value", [True, False, 0.6])
@pytest.mark.parametrize("score_temperature", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_sparq_variant(padding: str, mean_value: bool | float, score_temperature: bool, shared: bool) -> None:
    knobs: dict[str, Any] = dict(r=3, k=6, local=2, mean_value=mean_value, score_temperature=score_temperature)

    def definition(b, h, queries, keys, values, valid):
        groups = [queries] if shared else [[q] for q in queries]
        parts = [sparq_of_group(group, keys, values, valid, **knobs) for group in groups]
        return [y for ys, _ in parts for y in ys], [p for _, ps in parts for p in ps]

    def elements(kept: list[list[int]], counts: list[int]) -> int:
        sets = 1 if shared else 2
        return attended_only(kept, counts) + 2 * sets * 3 * sum(counts) + 4 * 8 * 2 * 3

    compare(case(padding), SparqVariant(**knobs, shared=shared), definition, elements)


def test_sparq_variants_local_window_is_a_quarter() -> None:
    def definition(b, h, queries, keys, values, valid):
        return sparq_of_group(queries, keys, values, valid, r=1, k=8, local=2, mean_value=0.5, score_temperature=True)

    of = case("left")
    compare(of, SparqVariant(r=1, k=8), definition, lambda kept, n: attended_only(kept, n) + 2 * sum(n) + 4 * 8 * 6)


def variant_elements(knobs: dict[str, Any], counts: list[int], padded: list[int]) -> int:
    """Elements of the index of rows of `counts` valid positions, the first of which come after `padded` others."""
    r, group, bits = knobs["r"], knobs["group"], {"full": 16, "int8": 8, "int4": 4, "int2": 2}[knobs["index"]]
    sets = 2 * (1 if knobs.get("shared", True) else 2)  # two KV heads
    codes = others = 0
    for count, before in zip(counts, padded, strict=True):
        whole = 0 if bits == 16 else (before + count) // group
        in_groups = max(0, whole * group - before)
        codes += in_groups * r * sets
        others += (count - in_groups) * r * sets + 2 * r * sets * max(0, whole - before // group)
    return math.ceil(codes * bits / 16) + others


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(
    "knobs",
    [
        dict(index="int4", group=4),
        dict(index="int8", group=5, mean_value=False),
        dict(index="int2", group=1, alpha="exact"),
        dict(index="int2", group=21, mean_value=True),  # complete in the middle of the steps
        dict(index="int4", group=64),  # none is complete
        dict(mass=0.7, floor=4),
        dict(mass=0.7, floor=4, local=3, alpha="exact", mean_value=0.8),
        dict(mass=0.8, floor=6, mean_value=True),
        dict(mass=0.99, floor=1, alpha="exact"),  # which k cuts short
        dict(index="int4", group=6, mass=0.8, floor=4, alpha="exact", mean_value=True),
        dict(index="int2", group=7, mass=0.6, floor=4),
        dict(alpha="exact", mean_value=True),
    ],
    ids=str,
)
def test_sparq_variants_index_and_budget(padding: str, shared: bool, knobs: dict[str, Any]) -> None:
    knobs = dict(r=5, k=9, mean_value=0.5, index="full", group=256) | knobs
    local = knobs.get("local", (knobs["floor"] if "mass" in knobs else knobs["k"]) // 4)
    slowly = {name: value for name, value in knobs.items() if name not in ("index", "local")}
    bits = {"full": None, "int8": 8, "int4": 4, "int2": 2}[knobs["index"]]
    sizes = set()

    def definition(b, h, queries, keys, values, valid):
        groups = [queries] if shared else [[q] for q in queries]
        parts = [slow.sparq(group, keys, values, valid, SCALE, local=local, bits=bits, **slowly) for group in groups]
        sizes.update(len(p[0]) for _, p in parts)
        return [y for ys, _ in parts for y in ys], [p for _, ps in parts for p in ps]

    def elements(kept: list[list[int]], counts: list[int]) -> int:
        padded = [0, 5, 12] if padding == "left" else [0, 0, 0]
        index = variant_elements(knobs | dict(shared=shared), counts, padded)
        return attended_only(kept, counts) + index + 4 * 8 * 2 * 3

    compare(case(padding), SparqVariant(**knobs, shared=shared), definition, elements)
    assert "mass" not in knobs or len(sizes) > 2  # it is the mass that decides, mostly


def test_a_budget_by_nearly_all_of_the_mass_is_all_of_it() -> None:
    nearly = 1 - 1e-12
    for method in (Oracle(mass=nearly), SparqVariant(k=64, r=8, index="int4", group=4, mass=nearly, floor=1)):
        covering = case("left").steps(Oracle(k=64))
        for (_, attended, _), (_, dense, _) in zip(case("left").steps(method), covering, strict=True):
            assert torch.equal(attended.kept, dense.kept)
            torch.testing.assert_close(attended.output, dense.output)


def test_by_mass_breaks_ties_by_the_lower_index() -> None:
    share = torch.tensor([[[[0.25, 0, 0.25, 0.25, 0, 0.25, 9]]]])
    allowed = torch.tensor([True] * 6 + [False])
    one, six = torch.tensor([1]), torch.tensor([6])

    def chosen(mass: float, least: Tensor = one, most: Tensor = six, forced: Tensor | None = None) -> list[int]:
        return by_mass(share, allowed, mass, least, most, forced)[0, 0, 0].nonzero()[:, 0].tolist()

    assert chosen(0.25) == [0] and chosen(0.5) == [0, 2] and chosen(0.51) == [0, 2, 3]
    assert chosen(0.1, least=six) == [0, 1, 2, 3, 4, 5] and chosen(0.1, least=one + 4) == [0, 1, 2, 3, 5]
    assert chosen(0.9, most=one + 1) == [0, 2]
    assert chosen(0.25, forced=torch.arange(7) == 4) == [0, 4]
    assert chosen(0.25, forced=torch.arange(7) > 3) == [4, 5]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_coded_keys(bits: int, dtype: torch.dtype) -> None:
    """lo and step are rounded to K's dtype before anything is coded with them."""
    key = torch.randn(2, 2, 21, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    key[0, 0, 3, 0], key[0, 0, 4, 0], key[0, 1, 1, 2] = torch.nan, torch.inf, -torch.inf
    key[1, 0, :, 1] = 2.5  # a constant run
    key[1, 1, 5:10, 2] = torch.nan
    key[1, 1, :5, 0] = torch.tensor([0, 1.5, 3, 2.5, 0.5]) * (2**bits - 1) / 3 / 64  # halves go to the even code
    actual = coded(key, 5, bits)
    assert actual.shape == (2, 2, 20, 3) and actual.dtype == torch.float32 and actual.isfinite().all()
    for b, h in itertools.product(range(2), range(2)):
        expected = slow.coded(key[b, h].tolist(), 20, 5, bits, lambda x: torch.tensor(x).to(dtype).item())
        torch.testing.assert_close(actual[b, h], torch.tensor(expected), rtol=1e-6, atol=1e-6)
    error = (actual - key[:, :, :20].float())[key[:, :, :20].isfinite()].abs().max()
    assert float(error) < 0.6 * 6 / (2**bits - 1)


def test_an_index_depends_on_the_keys_alone() -> None:
    """On all of them, padding too, but not on what is not finite there."""
    key = torch.randn(1, 1, 8, 4, dtype=torch.float64)
    more = torch.cat([key, torch.randn(1, 1, 5, 4, dtype=torch.float64)], dim=2)
    assert torch.equal(coded(key, 4, 4), coded(more, 4, 4)[:, :, :8])
    padded = key.clone()
    padded[:, :, 0] = torch.nan
    same = key.clone()
    same[:, :, 0] = same[:, :, 1]  # no part of the range
    assert torch.equal(coded(padded, 4, 4)[:, :, 1:], coded(same, 4, 4)[:, :, 1:])


@pytest.mark.parametrize("padding", ["none", "left", "holes"])
@pytest.mark.parametrize("at_once", [1, 2 * 2 * 3 * 23 * 2, 1 << 19])
def test_several_queries_in_a_pass_decide_one_by_one(
    padding: str, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparq.lm_eval.methods.method.LOGITS_AT_ONCE", at_once)
    of = case(padding, prompt=12)
    new = 23 - of.prompt
    seen = torch.ones(new, 23, dtype=torch.bool).tril(of.prompt) & of.valid[:, None]
    # Beside the large values that fill holes all else in a group gets the same code: such scores tie but for rounding,
    # which differs from one shape of product to another.
    for make in METHODS + BY_MASS + ([] if padding == "holes" else CODED):
        method = small(make, 6)
        if method.observes:
            continue
        together = list(method.attend_each(of.queries[:, :, :, of.prompt :], of.key, of.value, seen, SCALE))
        assert len(together) == new
        for (s, expected, _), actual in zip(of.steps(method), together, strict=True):
            assert torch.equal(actual.kept[..., : s + 1], expected.kept) and not actual.kept[..., s + 1 :].any()
            assert actual.elements == expected.elements
            torch.testing.assert_close(actual.output, expected.output)
            torch.testing.assert_close(actual.mass, expected.mass)


def test_ties_go_to_the_lower_index() -> None:
    score = torch.tensor([[[[1.0, 2, 1, 2, 0, 1, 5]]]])
    allowed = torch.tensor([True, True, True, True, True, True, False])
    for count, expected in (
        (1, [1]),
        (3, [0, 1, 3]),
        (4, [0, 1, 2, 3]),
        (6, [0, 1, 2, 3, 4, 5]),
        (7, [0, 1, 2, 3, 4, 5]),
    ):
        kept = best(score, allowed, torch.tensor([count]))
        assert kept[0, 0, 0].nonzero()[:, 0].tolist() == expected
    forced = torch.tensor([False] * 4 + [True] * 3)
    assert best(score, allowed, torch.tensor([3]), forced)[0, 0, 0].nonzero()[:, 0].tolist() == [1, 4, 5]


@pytest.mark.parametrize(
    "method, expected",
    [
        (Oracle(k=4), [[0, 1, 2, 3], [5, 6, 7, 8], [12, 13, 14, 15]]),
        (Quest(k=4, page=2), [[0, 1, 22], [5, 6, 21, 22], [12, 13, 22]]),
        (SparqVariant(k=4, r=2), [[0, 1, 2, 22], [5, 6, 7, 22], [12, 13, 14, 22]]),
        (Pages(k=4, page=2), [[0, 1, 22], [5, 6, 21, 22], [12, 13, 22]]),
        (Rocket(k=4, page=2), [[0, 1, 22], [5, 6, 21, 22], [12, 13, 22]]),
        (H2O(k=4), [[0, 1, 21, 22], [5, 6, 21, 22], [12, 13, 21, 22]]),  # earlier positions were seen more often
    ],
    ids=lambda value: type(value).__name__,
)
def test_queries_of_zeros_choose_the_first_positions(method: Method, expected: list[list[int]]) -> None:
    of = case("left", prompt=22)
    of.queries.zero_()
    (_, attended, _), *_ = of.steps(method)
    for b in range(3):
        for h in range(2):
            assert attended.kept[b, h, 0].nonzero()[:, 0].tolist() == expected[b]
    assert attended.output.isfinite().all() and attended.mass.isfinite().all()


METHODS: list[Callable[..., Method]] = [
    Oracle,
    Window,
    H2O,
    Quest,
    Pages,
    Rocket,
    SparqVariant,
    lambda **knobs: SparqVariant(**knobs, shared=False, score_temperature=False),
]
BY_MASS: list[Callable[..., Method]] = [  # which read less than k
    lambda **knobs: Oracle(**knobs, mass=0.7),
    lambda **knobs: SparqVariant(**knobs, mass=0.7, floor=min(3, knobs["k"]), alpha="exact"),
]
CODED: list[Callable[..., Method]] = [  # whose groups are counted from the first position, padding or not
    lambda **knobs: SparqVariant(**knobs, r=6, index="int4", group=4, mass=0.7, floor=1, shared=False),
    lambda **knobs: SparqVariant(**knobs, r=6, index="int2", group=5),
]


def small(make: Callable[..., Method], k: int) -> Method:
    extra = {
        Window: dict(sinks=k // 3),
        Quest: dict(page=min(k, 3)),
        Pages: dict(page=min(k, 3)),
        SparqVariant: dict(r=3),
    }.get(make, {})  # type: ignore[call-overload]
    return make(k=k, **extra)


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(data=strategies.data())
def test_what_is_kept(data: strategies.DataObject) -> None:
    make = data.draw(strategies.sampled_from(METHODS + BY_MASS + CODED))
    length = data.draw(strategies.integers(2, 30))
    group = data.draw(strategies.integers(1, 3))
    method = small(make, data.draw(strategies.integers(1, 32)))
    of = case("none", length=length, prompt=data.draw(strategies.integers(1, length - 1)), group=group)
    for b in range(3):
        hidden = data.draw(strategies.sets(strategies.integers(0, length - 2)))
        of.valid[b, list(hidden)] = False
    of.valid[:, of.prompt :] = True
    of.key[~of.valid[:, None].expand(-1, 2, -1)] = torch.nan
    of.value[~of.valid[:, None].expand(-1, 2, -1)] = torch.nan
    evicted = torch.zeros(3, 2, 1, 0, dtype=torch.bool)
    for s, attended, _ in of.steps(method):
        valid = of.valid[:, None, None, : s + 1]
        kept, counts = attended.kept, of.valid[:, : s + 1].sum(-1).tolist()
        assert not (kept & ~valid).any()
        budget = torch.tensor([method.positions(n, 8) for n in counts])[:, None, None]
        if getattr(method, "mass", None) is None:
            assert (kept.sum(-1) == budget).all()
        else:
            assert ((kept.sum(-1) >= 1) & (kept.sum(-1) <= budget)).all()
        assert all(1 <= method.positions(n, 8) <= min(n, method.k or n) for n in counts)
        if isinstance(method, (Window, Quest, Pages, Rocket, H2O)):
            assert kept[..., -1].all()
        if isinstance(method, H2O):
            assert not (kept[..., : evicted.shape[3]] & evicted).any()
            evicted = valid & ~kept
        assert attended.output.isfinite().all()
        assert ((attended.mass > 0) & (attended.mass < 1 + 1e-9)).all()
        covered = (kept == valid).all(-1)
        torch.testing.assert_close(attended.mass[covered.expand_as(attended.mass)].mean().nan_to_num(1.0).item(), 1.0)


@pytest.mark.parametrize("make", METHODS)
def test_all_positions_are_dense_attention(make: Callable[..., Method]) -> None:
    of = case("holes")
    for s, attended, _ in of.steps(make(k=23)):
        n = s + 1
        valid = of.valid[:, None, None, :n]
        q, key = of.queries[:, :, :, s], of.key[:, :, :n].nan_to_num()
        logits = (q @ key.transpose(-1, -2) * SCALE).masked_fill(~valid, -torch.inf)
        expected = logits.softmax(-1) @ of.value[:, :, :n].nan_to_num()
        torch.testing.assert_close(attended.output, expected, rtol=0, atol=1e-14)
        assert (attended.kept == valid).all()
        torch.testing.assert_close(attended.mass, torch.ones_like(attended.mass))


def test_a_variant_with_all_positions_does_not_blend_at_all() -> None:
    blended, plain = (case("holes").steps(SparqVariant(r=3, k=23, mean_value=mean)) for mean in (True, False))
    for (_, actual, _), (_, expected, _) in zip(blended, plain, strict=True):
        assert torch.equal(actual.output, expected.output)


@pytest.mark.parametrize("make", METHODS + BY_MASS)
def test_rows_are_independent_of_their_padding(make: Callable[..., Method]) -> None:
    of = case("left")
    together = list(of.steps(small(make, 6)))
    for b, start in enumerate((0, 5, 12)):
        cut = [x[b : b + 1, ..., start:, :] for x in (of.queries, of.key, of.value)]
        alone = Case(*cut, of.valid[b : b + 1, start:], of.prompt - start)
        for (_, expected, _), (_, actual, _) in zip(alone.steps(small(make, 6)), together, strict=True):
            assert torch.equal(actual.kept[b : b + 1, ..., start:], expected.kept)
            torch.testing.assert_close(actual.output[b : b + 1], expected.output)


@pytest.mark.parametrize("make", METHODS + BY_MASS)
def test_dtypes(make: Callable[..., Method]) -> None:
    of = case("left")
    narrow = Case(of.queries.bfloat16(), of.key.bfloat16(), of.value.bfloat16(), of.valid, of.prompt)
    wide = Case(narrow.queries.double(), narrow.key.double(), narrow.value.double(), of.valid, of.prompt)
    for (_, actual, layer), (_, expected, _) in zip(
        narrow.steps(small(make, 9)), wide.steps(small(make, 9)), strict=True
    ):
        assert actual.output.dtype == torch.bfloat16 and actual.mass.dtype == torch.float32
        assert expected.output.dtype == expected.mass.dtype == torch.float64
        if torch.equal(actual.kept, expected.kept):  # accumulated in float32, rounded once
            torch.testing.assert_close(actual.output.double(), expected.output, rtol=2**-8, atol=1e-5)
        assert layer is None or layer.scores is None or layer.scores.dtype == torch.float32


def test_budgets_of_a_ratio() -> None:
    """4096 positions at ratio 8, d = 128; bytes as shares of the dense 2·S·d."""
    assert Oracle().positions(4096, 128) == Window().positions(4096, 128) == 512
    assert H2O().positions(4096, 128) == 508  # 508 * (2 * 128 + 2) of 2 * 4096 * 128 / 8 elements
    assert Quest().page_size == 16 and Quest().pages(4096, 128) == 16 and Quest().positions(4096, 128) == 256
    assert Quest(ratio=16).page_size == 32 and Quest(ratio=16).positions(4096, 128) == 128
    assert Quest(ratio=2).page_size == 16 and Quest(ratio=2).positions(4096, 128) == 4096 * 7 // 16
    assert Quest(k=100).page_size == 16 and Quest(k=100).positions(1000, 128) == 5 * 16 + 8
    assert Pages().page_size == 8 and Pages(ratio=12).page_size == 12 and Pages(spread="dimension").page_size == 16
    assert Pages().positions(4096, 128) == 248  # 8 * int(4096 * (1 / 8 - 129 / 256 / 8) / 8)
    assert Pages(page=16).positions(4096, 128) == 368 and Pages(spread="dimension").positions(4096, 128) == 256
    assert Pages(k=100).page_size == 8 and Pages(k=100).positions(1000, 128) == 96
    assert Rocket().page_size == 3 and Rocket().summary_elements(128) == 48 and Rocket().positions(4096, 128) == 255 - 2
    assert Rocket(ratio=16).page_size == 4 and Rocket(ratio=16).summary_elements(128) == 32
    assert Rocket(ratio=16).positions(4096, 128) == 128 and Rocket(page=16).summary_elements(128) == 128
    assert SparqVariant().positions(4096, 128) == 256 and SparqVariant().positions(1000, 128) == 128
    assert [m.positions(3, 128) for m in (Oracle(), Window(), H2O())] == [1, 1, 1]
    assert Quest().positions(40, 128) == 8  # the current page alone


def test_h2o_layer_follows_the_cache() -> None:
    of = case("none")
    method = H2O(k=6)
    *_, (_, _, layer) = of.steps(method)
    assert layer is not None and layer.scores is not None and layer.kept is not None
    scores, kept = layer.scores.clone(), layer.kept.clone()
    assert not kept.all() and not torch.equal(scores[0], scores[1])

    def check(changed: H2OLayer, expected_scores: Tensor, expected_kept: Tensor) -> None:
        assert changed.keys is not None and changed.keys.shape[:3] == expected_kept.shape
        assert torch.equal(changed.scores, expected_scores) and torch.equal(changed.kept, expected_kept)
        before = copy.deepcopy(changed)
        new = of.key[:1, :, :1].expand(expected_kept.shape[0], -1, -1, -1)
        changed.update(new, new)  # and goes on
        assert torch.equal(changed.scores[..., :-1], expected_scores) and not changed.scores[..., -1].any()
        assert torch.equal(changed.kept[..., :-1], expected_kept) and changed.kept[..., -1].all()
        assert torch.equal(before.scores, expected_scores)  # a copy stays behind

    for act, pick in (
        (lambda c: c.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda c: c.batch_select_indices(torch.tensor([1])), [1]),
        (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda c: None, [0, 1, 2]),
    ):
        changed = copy.deepcopy(layer)
        act(changed)
        check(changed, scores[pick], kept[pick])
    changed = copy.deepcopy(layer)
    changed.crop(-4)
    check(changed, scores[..., :-4], kept[..., :-4])
    changed = copy.deepcopy(layer)
    changed.reset()
    assert changed.get_seq_length() == 0 and changed.scores is None and changed.kept is None
    changed.update(of.key, of.value)
    assert changed.kept.all() and not changed.scores.any()
    assert torch.equal(layer.scores, scores) and torch.equal(layer.kept, kept)


def test_h2o_adopts_a_layer() -> None:
    from transformers.cache_utils import DynamicLayer

    plain, of = DynamicLayer(), case("none")
    assert H2OLayer.adopt(plain).get_seq_length() == 0
    plain.update(of.key, of.value)
    layer = H2OLayer.adopt(plain)
    assert torch.equal(layer.keys, plain.keys) and layer.kept is not None and layer.kept.shape == (3, 2, 23)


BAD = [
    (Oracle, dict(k=0), ValueError, "k must be at least 1, got 0"),
    (Oracle, dict(k=1.5), TypeError, "k must be an integer or None, got 1.5"),
    (Oracle, dict(ratio=0.5), ValueError, "ratio must be a finite number of at least 1, got 0.5"),
    (Oracle, dict(ratio="8"), TypeError, "ratio must be a number, got '8'"),
    (Oracle, dict(dense_layers=-1), ValueError, "dense_layers must be at least 0, got -1"),
    (Oracle, dict(mass=0), ValueError, "mass must be larger than 0 and smaller than 1, or None, got 0"),
    (Oracle, dict(mass="0.9"), TypeError, "mass must be a number or None, got '0.9' of type str"),
    (Window, dict(k=16), ValueError, "sinks must be smaller than k.*sinks=16 and k=16"),
    (Window, dict(sinks=-1), ValueError, "sinks must be at least 0, got -1"),
    (H2O, dict(k=4, local=5), ValueError, "local must not be larger than k.*local=5 and k=4"),
    (H2O, dict(local=0), ValueError, "local must be at least 1, got 0"),
    (Quest, dict(page=0), ValueError, "page must be at least 1, got 0"),
    (Quest, dict(ratio=8, page=8), ValueError, "page must be larger than ratio.*page=8 and ratio=8"),
    (Quest, dict(k=12), ValueError, "page must not be larger than k, got page=16 and k=12"),
    (Pages, dict(spread="both"), ValueError, "spread must be one of norm, dimension, got 'both'"),
    (Pages, dict(page=4), ValueError, "page must be larger than ratio times 0.5.*page=4 and ratio=8"),
    (Pages, dict(page=8, spread="dimension"), ValueError, "page must be larger than ratio times 1,.*page=8 and"),
    (Pages, dict(first_pages=-1), ValueError, "first_pages must be at least 0, got -1"),
    (Pages, dict(k=7), ValueError, "page must not be larger than k, got page=8 and k=7"),
    (Rocket, dict(r=0), ValueError, "r must be at least 1, got 0"),
    (Rocket, dict(k=3, page=4), ValueError, "page must not be larger than k, got page=4 and k=3"),
    (SparqVariant, dict(r=0), ValueError, "r must be at least 1, got 0"),
    (SparqVariant, dict(ratio=1.3), ValueError, "ratio must be a multiple of 0.5, got 1.3"),
    (SparqVariant, dict(shared=1), TypeError, "shared must be True or False, got 1"),
    (SparqVariant, dict(score_temperature=None), TypeError, "score_temperature must be True or False, got None"),
    (SparqVariant, dict(index="int3"), ValueError, "index must be one of full, int8, int4, int2, got 'int3'"),
    (SparqVariant, dict(index=4), ValueError, "index must be one of full, int8, int4, int2, got 4"),
    (SparqVariant, dict(alpha=True), ValueError, "alpha must be one of paper, exact, got True"),
    (SparqVariant, dict(group=0), ValueError, "group must be at least 1, got 0"),
    (SparqVariant, dict(floor=0), ValueError, "floor must be at least 1, got 0"),
    (SparqVariant, dict(mass=1.0), ValueError, "mass must be larger than 0 and smaller than 1, or None, got 1.0"),
    (SparqVariant, dict(mass=True), TypeError, "mass must be a number or None, got True of type bool"),
    (SparqVariant, dict(mass=0.9, k=32), ValueError, "floor must not be larger than k.*floor=64 and k=32"),
    (SparqVariant, dict(mass=0.9, floor=129), ValueError, "floor must not be.*floor=129 and k=128 .the least that"),
    (SparqVariant, dict(mass=0.9, local=65), ValueError, "local must not be larger than floor.*local=65 and floor=64"),
]


@pytest.mark.parametrize("make, knobs, error, message", BAD, ids=[f"{c[0].__name__} {c[1]}" for c in BAD])
def test_bad_knobs(make: Callable[..., Method], knobs: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(**knobs)


def test_h2o_wants_its_layer() -> None:
    of = case("none")
    with pytest.raises(TypeError, match="state must be the H2OLayer"):
        H2O(k=4).attend(of.queries[:, :, :, -1], of.key, of.value, of.valid, SCALE)
