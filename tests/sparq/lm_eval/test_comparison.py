"""Methods on whole models: what they decode, what is counted, and that they leave no trace."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, T5Config, T5ForConditionalGeneration
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import sparq
from sparq.generating import each_token_decides
from sparq.lm_eval.comparison import Comparison
from sparq.lm_eval.methods import H2O, H2OLayer, Method, Oracle, Pages, Quest, Rocket, SparqVariant, Window
from tests.sparq.snapshot import snapshot
from tests.sparq.tiny import build, check_beams, generate, next_tokens, prompt, teacher_forced

SPARSE: list[Method] = [
    Oracle(k=12),
    Window(k=12, sinks=4),
    H2O(k=12),
    Quest(k=12, page=4),
    Pages(k=12, page=4),
    Rocket(k=12, page=4, r=8),
    SparqVariant(r=4, k=12),
    SparqVariant(r=4, k=12, shared=False),
    SparqVariant(r=8, k=12, index="int4", group=64, mass=0.7, floor=8, alpha="exact"),
]
RATIOS: list[Method] = [Oracle(), Window(), H2O(), Quest(ratio=4)]  # of 52 positions: 6, 6, 6, and a page of 16
named = pytest.mark.parametrize("method", SPARSE, ids=str)


def compared(method: Method, family: str = "llama", **changes: Any) -> tuple[PreTrainedModel, Comparison]:
    model = build(family, **changes)
    return model, Comparison(model, method)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "granite"])
@pytest.mark.parametrize(
    "knobs",
    [
        dict(r=4, k=12),
        dict(r=3, k=9, mean_value=False),
        dict(r=2, k=10, local=10, dense_layers=1),
        dict(ratio=2),
    ],
    ids=str,
)
def test_the_variant_without_ablations_is_sparq(family: str, knobs: dict) -> None:
    """With ratio=2 the least k, 128, is less than the context of the first row only."""
    length = 40 if "k" in knobs else 130
    inputs, tokens = prompt(length=length), next_tokens()
    patched = sparq.patch(build(family), min_length=0, index="full", mass=1.0, **knobs)
    expected = teacher_forced(patched, inputs, tokens)
    model, comparison = compared(SparqVariant(**knobs), family)
    actual = teacher_forced(model, inputs, tokens)

    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    stock = teacher_forced(build(family), inputs, tokens)
    assert (stock - expected).abs().mean() > 30 * (actual - expected).abs().mean()
    ours, theirs = comparison.report().total, sparq.report(patched).total
    assert ours.sparse_steps == theirs.sparse_steps > 0 and ours.dense_steps == theirs.dense_steps
    assert (ours.bytes_read, ours.bytes_dense) == (theirs.bytes_read, theirs.bytes_dense)
    assert (ours.positions_read, ours.positions_cached) == (theirs.positions_read, theirs.positions_cached)


@torch.no_grad()
@pytest.mark.parametrize(
    "method",
    [
        Oracle(k=12, dense_layers=1),
        Window(k=12, sinks=4),
        Quest(k=12, page=4),
        Oracle(mass=0.7),
        Pages(k=12, page=4, spread="dimension"),
        Rocket(k=12, page=4, r=8),
        SparqVariant(r=4, k=12),
        SparqVariant(r=8, k=12, index="int4", group=21, mass=0.7, floor=8),
    ],
    ids=str,
)
@pytest.mark.parametrize("padding", [0, 9])
def test_each_token_decides_as_if_it_came_alone(method: Method, padding: int) -> None:
    inputs, tokens = prompt(padding=padding), next_tokens()
    one_by_one, alone = compared(method)
    expected = teacher_forced(one_by_one, inputs, tokens)
    model, together = compared(method)
    cache = DynamicCache()
    model(**inputs, past_key_values=cache, use_cache=True)
    mask = inputs["attention_mask"]
    mask = torch.cat([mask, mask.new_ones(tokens.shape)], dim=1)
    with each_token_decides(cache):
        actual = model(input_ids=tokens, attention_mask=mask, past_key_values=cache).logits
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    ours, theirs = (comparison.report().layers[1] for comparison in (together, alone))
    assert ours.mean_alpha == pytest.approx(theirs.mean_alpha)
    assert dataclasses.replace(ours, mean_alpha=None) == dataclasses.replace(theirs, mean_alpha=None)


@torch.no_grad()
def test_positions_are_those_of_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[Tensor] = []
    attend, decode = SparqVariant.attend, sparq.attention.sparq_kernels.decode

    def spying_attend(self, *args, **kwargs):
        attended = attend(self, *args, **kwargs)
        chosen.append(attended.kept[:, :, 0])
        return attended

    monkeypatch.setattr(SparqVariant, "attend", spying_attend)
    model, _ = compared(SparqVariant(r=4, k=12))
    teacher_forced(model, prompt(), next_tokens())
    ours, chosen[:] = list(chosen), []

    def spying(*args, **kwargs):
        result = decode(*args, **kwargs | {"return_positions": True})
        kept = torch.zeros(*args[1].key.shape[:3], dtype=torch.bool)
        assert (result.positions >= 0).all()
        chosen.append(kept.scatter(-1, result.positions[:, :, 0], True))
        return result

    monkeypatch.setattr(sparq.attention.sparq_kernels, "decode", spying)
    teacher_forced(sparq.patch(build(), r=4, k=12, min_length=0), prompt(), next_tokens())
    assert len(ours) == len(chosen) == 36
    assert all(torch.equal(a, b) for a, b in zip(ours, chosen, strict=True))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_arguments_by_position(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that wraps attention functions may hand on dropout and what follows as SDPA's function takes them."""
    model, comparison = compared(Oracle(k=12), attn_implementation=implementation)
    expected, name = teacher_forced(model, prompt(), next_tokens()), model.config._attn_implementation
    function, called = ALL_ATTENTION_FUNCTIONS[name], []

    def wrapper(module, query, key, value, mask, dropout=0.0, scaling=None, is_causal=None, bias=None, **kwargs):
        called.append(name)
        return function(module, query, key, value, mask, dropout, scaling, is_causal, bias, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, name, wrapper)
    assert torch.equal(teacher_forced(model, prompt(), next_tokens()), expected)
    assert len(called) == 3 * 13 and comparison.report().total.sparse_steps == 2 * 3 * 12


@torch.no_grad()
def test_a_window_is_a_mask() -> None:
    """The stock model under a mask of four dimensions gives the same."""
    inputs, tokens = prompt(), next_tokens()
    stock, mask = build(), inputs["attention_mask"]
    output, expected = stock(**inputs), []
    for step in range(tokens.shape[1]):
        mask = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
        order = mask.cumsum(-1) * mask  # 1 at the first valid position
        seen = (mask == 1) & ((order <= 4) | (order > order[:, -1:] - 8))
        assert seen.sum(-1).tolist() == [12, 12]
        output = stock(
            tokens[:, step : step + 1], attention_mask=seen[:, None, None], past_key_values=output.past_key_values
        )
        expected.append(output.logits[:, -1])
    model, _ = compared(Window(k=12, sinks=4))
    torch.testing.assert_close(teacher_forced(model, inputs, tokens), torch.stack(expected, 1), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "granite"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("padding", [0, 9])
def test_h2o_scores_are_the_models_attention(family: str, implementation: str, padding: int) -> None:
    inputs, tokens = prompt(padding=padding), next_tokens(steps=3)
    stock = build(family, attn_implementation="eager")
    mask, total = inputs["attention_mask"], [torch.zeros(2, 4, 43) for _ in range(3)]
    output = stock(**inputs, output_attentions=True)
    for step in range(4):
        for layer, weights in zip(total, output.attentions, strict=True):  # [B, Hq, Q, S]
            real = mask[:, -weights.shape[2] :, None].bool()  # queries that are no padding
            layer[:, :, : weights.shape[3]] += weights.masked_fill(~real[:, None], 0).sum(2)
        if step < 3:
            mask = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
            output = stock(
                tokens[:, step : step + 1],
                attention_mask=mask,
                past_key_values=output.past_key_values,
                output_attentions=True,
            )
    model, _ = compared(H2O(k=50), family, attn_implementation=implementation)
    cache = DynamicCache(config=model.config)
    teacher_forced(model, inputs, tokens, cache)
    for layer, expected in zip(cache.layers, total, strict=True):
        assert isinstance(layer, H2OLayer)
        kv_heads = layer.keys.shape[1]
        torch.testing.assert_close(layer.scores, expected.unflatten(1, (kv_heads, -1)).sum(2), rtol=1e-4, atol=1e-4)
        assert layer.kept.all()


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@pytest.mark.parametrize(
    "make", [Oracle, Window, H2O, Quest, Pages, Rocket, SparqVariant], ids=lambda make: make.__name__
)
def test_full_budget_generates_what_the_stock_model_does(family: str, make: type[Method]) -> None:
    inputs = prompt()
    model, comparison = compared(make(k=64), family)  # 40 + 24 positions at the end
    assert generate(model, inputs, tokens=24) == generate(build(family), inputs, tokens=24)
    total = comparison.report().total
    assert (total.sparse_steps, total.dense_steps) == (0, {"k covers the context": 3 * 23})
    assert total.bytes_read == total.bytes_dense


def generated_logits(model: PreTrainedModel, inputs: dict[str, Tensor], tokens: int = 10) -> tuple[Tensor, Tensor]:
    output = model.generate(
        **inputs,
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return output.sequences[:, -tokens:], torch.stack(output.logits, 1)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@pytest.mark.parametrize("method", SPARSE + RATIOS, ids=str)
def test_a_padded_batch_is_its_rows(family: str, method: Method) -> None:
    """And a method changes what the model says."""
    inputs = prompt(batch=3)
    inputs["attention_mask"][2, :20] = 0
    model, comparison = compared(method, family)
    tokens, logits = generated_logits(model, inputs)
    assert comparison.report().total.sparse_steps == 3 * 9
    for row, start in enumerate((0, 9, 20)):
        alone = {name: tensor[row : row + 1, start:] for name, tensor in inputs.items()}
        own_tokens, own_logits = generated_logits(model, alone)
        assert torch.equal(own_tokens, tokens[row : row + 1])
        torch.testing.assert_close(own_logits, logits[row : row + 1], rtol=1e-4, atol=1e-4)
    assert (generated_logits(build(family), inputs)[1] - logits).abs().max() > 0.1


@named
def test_removal_leaves_the_model_as_it_was(method: Method) -> None:
    model, inputs, tokens = build(), prompt(), next_tokens(steps=3)
    before, expected = snapshot(model), teacher_forced(model, inputs, tokens)
    comparison = Comparison(model, method)
    assert snapshot(model) != before
    other = teacher_forced(model, inputs, tokens)
    for _ in range(2):
        comparison.remove()
        assert snapshot(model) == before
    assert torch.equal(teacher_forced(model, inputs, tokens), expected) and not torch.equal(other, expected)
    assert comparison.report().total.sparse_steps == 9  # still there to be read


@torch.no_grad()
def test_caches_go_on_without_the_method() -> None:
    inputs, tokens = prompt(), next_tokens()
    model, comparison = compared(H2O(k=12))
    cache = model(**inputs).past_key_values
    comparison.remove()
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.int64)], 1)
    actual = model(tokens[:, :1], attention_mask=mask, past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(actual, teacher_forced(build(), inputs, tokens[:, :1])[:, 0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("form", ["none", "lazy", "config", "positional"])
def test_h2o_sees_the_prompt_whatever_the_cache(form: str) -> None:
    inputs, tokens = prompt(batch=1, padding=0), next_tokens(batch=1)
    model, _ = compared(H2O(k=12))
    expected = teacher_forced(model, inputs, tokens, DynamicCache(config=model.config))
    given = {"lazy": DynamicCache(), "config": DynamicCache(config=model.config)}.get(form)
    if form == "positional":
        cache = DynamicCache()
        model.model(inputs["input_ids"], None, None, cache)
        actual = [model(tokens[:, step : step + 1], past_key_values=cache).logits[:, -1] for step in range(12)]
        torch.testing.assert_close(torch.stack(actual, 1), expected)
    else:
        torch.testing.assert_close(teacher_forced(model, inputs, tokens, given), expected)
    assert model(**inputs, use_cache=False).past_key_values is None


@torch.no_grad()
def continued(model: PreTrainedModel, cache: DynamicCache, mask: Tensor, tokens: Tensor) -> Tensor:
    logits = []
    for step in range(tokens.shape[1]):
        mask = torch.cat([mask, mask.new_ones(mask.shape[0], 1)], dim=1)
        output = model(tokens[:, step : step + 1], attention_mask=mask, past_key_values=cache)
        logits.append(output.logits[:, -1])
    return torch.stack(logits, 1)


@torch.no_grad()
@pytest.mark.parametrize("k", [12, 30])
def test_h2o_lives_in_the_cache(k: int) -> None:
    """Copies, rows and beams of a cache in use continue as it does itself."""
    inputs, tokens = prompt(batch=3), next_tokens(batch=3)
    model, _ = compared(H2O(k=k))
    cache, mask = DynamicCache(config=model.config), inputs["attention_mask"]
    model(**inputs, past_key_values=cache)
    continued(model, cache, mask, tokens[:, :4])
    mask = torch.cat([mask, mask.new_ones(3, 4)], 1)
    copies = [copy.deepcopy(cache) for _ in range(4)]
    expected = continued(model, cache, mask, tokens[:, 4:])

    torch.testing.assert_close(continued(model, copies[0], mask, tokens[:, 4:]), expected, rtol=0, atol=0)
    pick = torch.tensor([2, 0])
    copies[1].batch_select_indices(pick)
    torch.testing.assert_close(continued(model, copies[1], mask[pick], tokens[pick, 4:]), expected[pick])
    pick = torch.tensor([1, 1, 0])
    copies[2].reorder_cache(pick)
    torch.testing.assert_close(continued(model, copies[2], mask[pick], tokens[pick, 4:]), expected[pick])
    copies[3].batch_repeat_interleave(2)
    pick = torch.tensor([0, 0, 1, 1, 2, 2])
    # products of six rows are rounded in another order than those of three
    repeated = continued(model, copies[3], mask[pick], tokens[pick, 4:])
    torch.testing.assert_close(repeated, expected[pick], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_h2o_after_a_crop() -> None:
    """What was evicted stays evicted, so that a step may be sparse although k covers the context."""
    inputs, tokens = prompt(batch=1, padding=0), next_tokens(batch=1)
    model, comparison = compared(H2O(k=30))
    cache = DynamicCache(config=model.config)
    model(**inputs, past_key_values=cache)
    continued(model, cache, inputs["attention_mask"], tokens[:, :2])
    evicted = ~cache.layers[0].kept[..., :20]
    assert evicted.any()
    cache.crop(-22)
    assert cache.get_seq_length() == 20
    continued(model, cache, inputs["attention_mask"][:, :20], tokens[:, :1])
    assert not cache.layers[0].kept[..., :20][evicted].any() and cache.layers[0].kept.shape[2] == 21
    assert comparison.report().layers[0].sparse_steps == 3


@pytest.mark.parametrize("method", [SPARSE[0], SPARSE[2]], ids=["Oracle", "H2O"])
def test_beams(method: Method) -> None:
    model, _ = compared(method)
    check_beams(model)


@pytest.mark.parametrize(
    "method, elements, read",
    [
        (Oracle(k=12), 2 * 12 * 16, 12),
        (Window(k=12, sinks=4), 2 * 12 * 16, 12),
        (H2O(k=12), 2 * 12 * 16 + 2 * 12, 12),
        # 41 positions are 11 pages of 4, 32 are 8: the newest holds 1, or 4
        (Quest(k=12, page=4), 2 * 16 * (11 + 9), 9),
        (Pages(k=12, page=4), 17 * 11 + 2 * 16 * 9, 9),
        (Pages(k=12, page=4, spread="dimension"), 2 * 16 * (11 + 9), 9),
        (Rocket(k=12, page=4, r=5), 5 * 11 + 2 * 16 * 9, 9),
        (SparqVariant(r=4, k=12), 41 * 4 + 2 * 12 * 16 + 4 * 16, 12),
        (SparqVariant(r=4, k=12, shared=False), 2 * (41 * 4 + 2 * 12 * 16) + 4 * 16, 12),
        # five groups of 8, each with lo and step; four codes are an element
        (SparqVariant(r=4, k=12, index="int4", group=8), 40 + 2 * 5 * 4 + 4 + 2 * 12 * 16 + 4 * 16, 12),
        (SparqVariant(r=4, k=12, index="int8", group=41), 82 + 2 * 4 + 2 * 12 * 16 + 4 * 16, 12),
    ],
    ids=lambda value: str(value),
)
def test_counts_by_hand(method: Method, elements: int, read: int) -> None:
    """One step with 41 cached positions in each of two rows: two KV heads of size 16, float32."""
    inputs, tokens = prompt(padding=0), next_tokens(steps=1)
    model, comparison = compared(method)
    teacher_forced(model, inputs, tokens)
    report = comparison.report()
    assert report.config is method
    for layer in report.layers.values():
        assert (layer.sparse_steps, layer.dense_steps) == (1, {})
        assert (layer.positions_cached, layer.positions_read) == (2 * 41, 2 * read)
        assert layer.bytes_read == 2 * 2 * 4 * elements
        assert layer.bytes_dense == 2 * 2 * 4 * 2 * 41 * 16
        assert 0 < layer.mean_alpha < 1
    assert report.total.bytes_read == 3 * report.layers[0].bytes_read
    assert type(method).__name__ in str(report) and report.to_dict()["config"]["k"] == 12


def test_padding_is_not_counted() -> None:
    """32 of row 1's 41 positions are valid: 8 pages, of which 3 are read in full."""
    model, comparison = compared(Quest(k=12, page=4))
    teacher_forced(model, prompt(), next_tokens(steps=1))
    layer = comparison.report().layers[0]
    assert (layer.positions_cached, layer.positions_read) == (41 + 32, 9 + 12)
    assert layer.bytes_read == 2 * 4 * 2 * 16 * (11 + 9 + 8 + 12)
    assert layer.bytes_dense == 2 * 4 * 2 * 16 * (41 + 32)


@torch.no_grad()
def test_mean_alpha_is_the_exact_attention() -> None:
    inputs, tokens = prompt(batch=1, padding=0), next_tokens(batch=1, steps=1)
    stock = build(attn_implementation="eager")
    weights = stock(tokens, past_key_values=stock(**inputs).past_key_values, output_attentions=True).attentions[0]
    best = weights[0, :, 0].unflatten(0, (2, 2)).sum(1).topk(12, -1).indices  # [Hkv, 12]
    expected = weights[0, :, 0].unflatten(0, (2, 2)).gather(-1, best[:, None].expand(-1, 2, -1)).sum(-1).mean()
    masses = {}
    for method in SPARSE:
        model, comparison = compared(method)
        teacher_forced(model, inputs, tokens)
        masses[str(method)] = comparison.report().layers[0].mean_alpha
    assert masses[str(SPARSE[0])] == pytest.approx(float(expected), abs=1e-5)
    own = masses.pop(str(SPARSE[-1]))  # which chooses for each head, and may have more
    assert max(masses.values()) == masses[str(SPARSE[0])] and own > 0


@named
def test_what_the_method_gives_is_what_the_model_uses(method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    attend = type(method).attend

    def poisoned(self, *args, **kwargs):
        attended = attend(self, *args, **kwargs)
        return attended._replace(output=attended.output * torch.nan)

    monkeypatch.setattr(type(method), "attend", poisoned)
    model, _ = compared(method)
    assert teacher_forced(model, prompt(), next_tokens(steps=1)).isnan().all()


@torch.no_grad()
def test_what_stays_dense() -> None:
    inputs, tokens = prompt(batch=1, padding=0), next_tokens(batch=1)
    model, comparison = compared(Oracle(k=12, dense_layers=1))
    cache = model(**inputs).past_key_values
    model(tokens[:, :3], past_key_values=cache)
    model(tokens[:, 3:4], past_key_values=cache)
    first, second, _ = comparison.report().layers.values()
    assert (first.sparse_steps, first.dense_steps) == (0, {"one of the first dense_layers": 2})
    assert (second.sparse_steps, second.dense_steps) == (1, {"more than one new token at once": 1})
    assert second.bytes_dense == 2 * 4 * 2 * 16 * (43 + 44)
    model, comparison = compared(H2O(k=12), "gemma3")
    teacher_forced(model, inputs, tokens)
    sliding, full, _ = comparison.report().layers.values()
    assert (sliding.sparse_steps, sliding.dense_steps) == (0, {"sliding-window layer": 12})
    assert (full.sparse_steps, full.dense_steps) == (12, {})


@torch.no_grad()
def test_several_tokens_are_dense_and_observed() -> None:
    inputs, tokens = prompt(batch=1, padding=0), next_tokens(batch=1)
    model, _ = compared(H2O(k=12))
    whole, parts = DynamicCache(config=model.config), DynamicCache(config=model.config)
    model(torch.cat([inputs["input_ids"], tokens], 1), past_key_values=whole)
    model(inputs["input_ids"], past_key_values=parts)
    model(tokens, past_key_values=parts)
    for a, b in zip(whole.layers, parts.layers, strict=True):
        torch.testing.assert_close(a.scores, b.scores, rtol=1e-4, atol=1e-4)


def bias_mask(length: int) -> Tensor:
    return -0.01 * torch.arange(length).float().expand(1, 1, 1, length)


@torch.no_grad()
@pytest.mark.parametrize(
    "mask, message",
    [
        (bias_mask(41), "mask with a bias"),
        (torch.ones(1, 4, 1, 41, dtype=torch.bool), r"mask of shape \(1, 4, 1, 41\)"),
    ],
    ids=["bias", "heads"],
)
def test_masks_that_are_not_served(mask: Tensor, message: str) -> None:
    model, _ = compared(Oracle(k=12))
    cache = model(**prompt(batch=1, padding=0)).past_key_values
    with pytest.raises(ValueError, match=message):
        model(next_tokens(1, 1), attention_mask=mask, past_key_values=cache)


def test_float_masks_are_read() -> None:
    inputs, tokens = prompt(), next_tokens()
    expected = teacher_forced(compared(Quest(k=12, page=4))[0], inputs, tokens)
    eager = compared(Quest(k=12, page=4), attn_implementation="eager")[0]
    assert eager.config._attn_implementation == "sparq_eager"
    torch.testing.assert_close(teacher_forced(eager, inputs, tokens), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_models_and_calls_that_are_not_served() -> None:
    inputs = prompt(batch=1, padding=0)
    with pytest.raises(ValueError, match="do not serve a softcap"):
        compared(Oracle(k=12), "gemma2")[0](**inputs)
    with pytest.raises(ValueError, match="do not serve attention sinks"):
        compared(Oracle(k=12), "gpt_oss")[0](**inputs)
    with pytest.raises(ValueError, match=r"do not serve attention dropout of 0\.5"):
        compared(Oracle(k=12), attention_dropout=0.5)[0].train()(**inputs)
    model, _ = compared(Oracle(k=12), attn_implementation="eager")
    with pytest.raises(ValueError, match="do not serve attention weights"):
        model(**inputs, output_attentions=True)
    with pytest.raises(ValueError, match="StaticLayer: take a DynamicCache"):
        generate(model, inputs, cache_implementation="static")
    offloaded = DynamicCache(config=model.config)
    offloaded.offloading = True  # to make one takes a device
    with pytest.raises(ValueError, match="an offloaded cache"):
        model(**inputs, past_key_values=offloaded)
    with pytest.raises(ValueError, match=r"sparq cannot serve T5.*encoder-decoder"):
        config = T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
        Comparison(T5ForConditionalGeneration(config), Oracle())
    with pytest.raises(ValueError, match="head_dim=16, got r=17"):
        compared(SparqVariant(r=17))
    with pytest.raises(TypeError, match="method must be a Method, got 'h2o'"):
        Comparison(build(), "h2o")  # type: ignore[arg-type]


def test_one_at_a_time() -> None:
    model = sparq.patch(build())
    with pytest.raises(ValueError, match="must not be patched"):
        Comparison(model, Oracle())
    sparq.unpatch(model)
    comparison = Comparison(model, Oracle(k=12))
    with pytest.raises(ValueError, match=r"comparison method already: remove\(\) it first"):
        Comparison(model, Window())
    with sparq.patched(model, min_length=0, k=12):  # SparQ inside the block alone
        teacher_forced(model, prompt(), next_tokens(2, 1))
        assert sparq.report(model).layers[0].sparse_steps == 1
    teacher_forced(model, prompt(), next_tokens(2, 1))
    assert comparison.report().layers[0].sparse_steps == 1 and "Oracle" in str(sparq.report(model))
    sparq.patch(model)
    with pytest.raises(ValueError, match="patched since the comparison began"):
        comparison.remove()
    sparq.unpatch(model)
    comparison.remove()
    assert snapshot(model) == snapshot(build())
    Comparison(model, Window()).remove()


@torch.no_grad()
def test_h2o_refuses_a_cache_that_others_have_filled() -> None:
    model = build()
    cache = model(**prompt(batch=1, padding=0)).past_key_values
    Comparison(model, H2O(k=12))
    with pytest.raises(ValueError, match="H2O has to see the whole prompt"):
        model(next_tokens(1, 1), past_key_values=cache)


@torch.no_grad()
def test_the_last_queries_of_a_prompt_without_a_mask() -> None:
    """Gemma 4 computes no more of it in the layers that share keys and values."""
    inputs = prompt(batch=1, padding=0)
    expected = build("gemma4")(**inputs, logits_to_keep=5).logits
    model = build("gemma4")
    Comparison(model, Oracle(k=10_000))
    actual = model(inputs["input_ids"], use_cache=False, logits_to_keep=5).logits
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
