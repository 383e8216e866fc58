"""Decode steps of a patched model, against the stock model and against a slow implementation of the definition."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import sparq_kernels
import torch
from transformers import Cache, DynamicCache, StaticCache
from transformers.cache_utils import StaticLayer

import sparq
from sparq.attention import sparq_attention
from sparq.cache import SparqLayer, upgrade
from sparq.config import SparqConfig
from sparq.stats import Stats
from sparq.step import Step
from tests.sparq.caches import SIZE, dynamic, on_either_cache, same_report, static
from tests.sparq.slow import Slow
from tests.sparq.tiny import attention_module, build, check_beams, generate, next_tokens, prompt, teacher_forced

SPARSE = dict(r=4, k=12, min_length=0)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma2"])
@pytest.mark.parametrize(
    "knobs",
    [
        dict(r=4, k=12),
        dict(r=3, k=9, mean_value=False),
        dict(r=5, k=12, local=0),
        dict(r=2, k=10, local=10, dense_layers=1),
        dict(r=16, k=1),
    ],
    ids=str,
)
def test_every_step_equals_the_definition(family: str, knobs: dict) -> None:
    """On a cache that the model makes, and on a static one, for which the report says the same."""
    inputs, tokens = prompt(), next_tokens()
    expected = teacher_forced(Slow(**knobs).install(build(family)), inputs, tokens)
    stock = teacher_forced(build(family), inputs, tokens)

    reports = []
    for make_cache in (lambda model: None, static):
        model = sparq.patch(build(family), min_length=0, **knobs)
        actual = teacher_forced(model, inputs, tokens, make_cache(model))
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
        # the test has power only where sparsity changes something
        assert (stock - expected).abs().mean() > 100 * (actual - expected).abs().mean()
        reports.append(sparq.report(model))
    sparse_layers = [i for i in ([1] if family == "gemma2" else range(3)) if i >= knobs.get("dense_layers", 0)]
    assert reports[0].total.sparse_steps == len(sparse_layers) * tokens.shape[1]
    same_report(reports[1], reports[0])


@on_either_cache
@pytest.mark.parametrize(
    "knobs",
    [dict(index="int4"), dict(index="int4", mass=0.7, k_min=6), dict(index="full", mass=0.5, k_min=2, local=1)],
    ids=str,
)
def test_codes_and_mass_equal_the_definition(make_cache: Callable, knobs: dict) -> None:
    """In float64, where no score is within rounding of another; a group becomes whole in the middle."""
    knobs = dict(r=6, k=30) | knobs
    inputs, tokens, room = prompt(length=250, padding=40), next_tokens(), dict(max_position_embeddings=4096)
    slow = Slow(**knobs)
    expected = teacher_forced(slow.install(build(**room).double()), inputs, tokens)
    model = sparq.patch(build(**room).double(), min_length=0, **knobs)
    actual = teacher_forced(model, inputs, tokens, make_cache(model, 300))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)  # the sum of V is float32
    stock = teacher_forced(build(**room).double(), inputs, tokens)
    assert (stock - expected).abs().mean() > 100 * (actual - expected).abs().mean()
    report = sparq.report(model)
    for layer, read in slow.read.items():  # of the first KV head; the report has the mean
        assert report.layers[layer].positions_cached == slow.cached[layer]
        assert "mass" in knobs or report.layers[layer].positions_read == read
    if "mass" in knobs:
        assert 0 < report.total.positions_read < 3 * 2 * 12 * 30


@on_either_cache
def test_codes_and_mass_in_the_kernel(make_cache: Callable) -> None:
    """Near the float64 model's answers, by far nearer than the stock model's: scores within rounding of each other may
    change what is chosen."""
    knobs = dict(r=16, k=100, index="int4", mass=0.9, k_min=30, min_length=0)
    inputs, tokens, room = prompt(length=530, padding=40), next_tokens(), dict(max_position_embeddings=4096)
    model = sparq.patch(build(**room).double(), **knobs)
    expected = teacher_forced(model, inputs, tokens)
    fast = sparq.patch(build(**room), **knobs)
    actual = teacher_forced(fast, inputs, tokens, make_cache(fast, 600))
    stock = teacher_forced(build(**room).double(), inputs, tokens)
    error, effect = (actual - expected).abs().mean(), (stock - expected).abs().mean()
    assert error < 0.1 * effect, (error, effect)
    ours, theirs = sparq.report(fast).total, sparq.report(model).total
    assert ours.positions_read == pytest.approx(theirs.positions_read, rel=0.02)
    assert ours.mean_alpha == pytest.approx(theirs.mean_alpha, abs=5e-3)


@on_either_cache
def test_k_follows_the_context_of_each_row(make_cache: Callable) -> None:
    """300 positions give k = 150 and more; the padded row of 200 has the least, 128. The static cache has room for ten
    times as many."""
    inputs, tokens = prompt(length=300, padding=100), next_tokens()
    slow, room, paper = Slow(r=4, ratio=1), dict(max_position_embeddings=4096), dict(index="full", mass=1.0)
    expected = teacher_forced(slow.install(build(**room)), inputs, tokens)
    model = sparq.patch(build(**room), r=4, ratio=1, min_length=0, **paper)
    actual = teacher_forced(model, inputs, tokens, make_cache(model, 3000))

    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    growing = sum((300 + step) // 2 for step in range(1, 13))
    assert sparq.report(model).layers[0].positions_read == growing + 12 * 128 == slow.read[0]


def test_ratio_gives_both_r_and_k() -> None:
    """ratio 2 with a head_dim of 32: r = 16, and k = 150 of the 600 positions."""
    inputs, tokens = prompt(batch=1, length=599), next_tokens(batch=1, steps=3)
    shape = dict(head_dim=32, num_hidden_layers=2)
    expected = teacher_forced(Slow(r=16, k=150).install(build(**shape)), inputs, tokens)
    model = sparq.patch(build(**shape), sparq.SparqConfig.paper(2, min_length=0, mean_value=0.5))
    actual = teacher_forced(model, inputs, tokens)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_softcap_and_sliding_layers() -> None:
    inputs, tokens = prompt(), next_tokens()
    expected = teacher_forced(Slow(r=4, k=12).install(build("gemma2")), inputs, tokens)
    model = sparq.patch(build("gemma2"), r=4, k=12, min_length=0)
    actual = teacher_forced(model, inputs, tokens)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)

    uncapped = sparq.patch(build("gemma2", attn_logit_softcapping=None), r=4, k=12, min_length=0)
    assert (teacher_forced(uncapped, inputs, tokens) - expected).abs().mean() > 0.01
    layers = sparq.report(model).layers
    assert [layers[i].sparse_steps for i in range(3)] == [0, 12, 0]


def test_a_softcap_that_sdpa_does_not_know() -> None:
    """Some versions of transformers ignore it under SDPA, others refuse it: sparse steps do as the model does."""
    inputs, tokens = prompt(), next_tokens()
    try:
        model = build("gemma2", attn_implementation="sdpa")
    except ValueError:
        assert sparq.patch(build("gemma2")).config._attn_implementation == "sparq_eager"
        return
    sparq.patch(model, r=4, k=12, min_length=0)
    uncapped = Slow(r=4, k=12).install(build("gemma2", attn_logit_softcapping=None))
    expected = teacher_forced(uncapped, inputs, tokens)
    torch.testing.assert_close(teacher_forced(model, inputs, tokens), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_full_budget_generates_what_the_stock_model_does(family: str) -> None:
    inputs = prompt()
    expected = generate(build(family), inputs, tokens=24)
    for k in (64, 10_000):  # 40 + 24 positions at the end
        assert generate(sparq.patch(build(family), r=16, k=k, min_length=0), inputs, tokens=24) == expected


def test_all_components_with_few_positions_is_not_dense() -> None:
    inputs, tokens = prompt(), next_tokens()
    patched = teacher_forced(sparq.patch(build(), r=16, k=12, min_length=0), inputs, tokens)
    assert (patched - teacher_forced(build(), inputs, tokens)).abs().max() > 0.01


def test_generate_and_bare_calls_agree() -> None:
    inputs, model = prompt(), sparq.patch(build(), **SPARSE)
    tokens = torch.tensor(generate(model, inputs))
    bare = sparq.patch(build(), **SPARSE)
    # generate gives padded rows their own positions; bare calls count them from the left unless they are told
    mask = inputs["attention_mask"]
    output = bare(**inputs, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
    for step in range(tokens.shape[1]):
        assert output.logits[:, -1].argmax(-1).tolist() == tokens[:, step].tolist()
        mask = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
        output = bare(
            input_ids=tokens[:, step : step + 1],
            attention_mask=mask,
            position_ids=mask.sum(-1, keepdim=True) - 1,
            past_key_values=output.past_key_values,
        )


def test_a_given_cache_serves_as_one_made_by_the_model() -> None:
    inputs, tokens, model = prompt(), next_tokens(), sparq.patch(build(), **SPARSE)
    expected = teacher_forced(model, inputs, tokens)
    for cache in (DynamicCache(), DynamicCache(config=model.config)):
        assert torch.equal(teacher_forced(model, inputs, tokens, cache), expected)
        assert all(isinstance(layer, SparqLayer) for layer in cache.layers)


def test_positional_cache_argument() -> None:
    model, inputs = sparq.patch(build(), **SPARSE).model, prompt(batch=1)
    cache = model(inputs["input_ids"]).past_key_values
    model(next_tokens(1, 1), None, None, cache)
    assert sparq.report(model).total.sparse_steps == 3


@torch.no_grad()
@on_either_cache
def test_takes_over_a_cache_that_an_unpatched_model_has_filled(make_cache: Callable) -> None:
    inputs, tokens, model = prompt(), next_tokens(), sparq.patch(build(), **SPARSE)
    expected = teacher_forced(model, inputs, tokens, make_cache(model))
    model = build()
    cache = make_cache(model)
    model(**inputs, past_key_values=cache)
    given = [(layer.keys, layer.keys.clone()) for layer in cache.layers]
    sparq.patch(model, **SPARSE)
    mask, logits = inputs["attention_mask"], []
    for step in range(tokens.shape[1]):
        mask = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
        logits.append(model(tokens[:, step : step + 1], attention_mask=mask, past_key_values=cache).logits[:, -1])
    torch.testing.assert_close(torch.stack(logits, 1), expected)
    assert sparq.report(model).total.sparse_steps == 3 * 12
    if make_cache is dynamic:  # a static cache is written in place
        assert all(torch.equal(tensor, before) for tensor, before in given)


def causal_mask(valid: torch.Tensor, new: int) -> torch.Tensor:
    """[B, 1, new, S] bool, for the `new` last of S positions of which `valid` [B, S] may be seen."""
    length = valid.shape[1]
    seen = torch.arange(length) <= torch.arange(length - new, length)[:, None]
    return (seen & valid.bool()[:, None])[:, None]


@torch.no_grad()
def decode_with_masks(model, inputs, tokens, make_mask, cache=None) -> torch.Tensor:
    ids, valid = inputs["input_ids"], inputs["attention_mask"]
    output = model(ids, attention_mask=make_mask(valid, ids.shape[1]), past_key_values=cache)
    logits = []
    for step in range(tokens.shape[1]):
        valid = torch.cat([valid, valid.new_ones(valid.shape[0], 1)], dim=1)
        output = model(
            tokens[:, step : step + 1],
            attention_mask=make_mask(valid, 1),
            past_key_values=output.past_key_values,
        )
        logits.append(output.logits[:, -1])
    return torch.stack(logits, 1)


def forgetful(valid: torch.Tensor, new: int) -> torch.Tensor:
    """With each step one more of the old positions is forgotten."""
    valid = valid.clone()
    valid[0, 3 : valid.shape[1] - 38] = 0
    return causal_mask(valid, new)


def as_wide_as(cache: Cache | None, mask: torch.Tensor) -> torch.Tensor:
    """A static cache has masks of its size; what lies behind the newest token may not be seen."""
    return torch.nn.functional.pad(mask, (0, SIZE - mask.shape[3])) if isinstance(cache, StaticCache) else mask


@on_either_cache
@pytest.mark.parametrize(
    "form", ["bool", "float", "infinite", "holes", "batch of one", "forgetful", "beyond the length"]
)
def test_masks_of_four_dimensions(form: str, make_cache: Callable) -> None:
    inputs, tokens = prompt(), next_tokens()
    if form in ("holes", "forgetful", "beyond the length"):
        inputs["attention_mask"][0, 5:9] = 0
        inputs["attention_mask"][1, 30] = 0
    if form == "batch of one":
        inputs["attention_mask"][0] = inputs["attention_mask"][1]
    what_is_seen = forgetful if form == "forgetful" else causal_mask
    model = sparq.patch(build(), **SPARSE)
    cache = make_cache(model)

    def make_mask(valid: torch.Tensor, new: int) -> torch.Tensor:
        mask = as_wide_as(cache, what_is_seen(valid, new))
        if form == "beyond the length" and new == 1:
            mask = torch.nn.functional.pad(mask, (0, SIZE - mask.shape[3]))
            mask[..., valid.shape[1] :] = True
        if form in ("float", "infinite"):
            # a padded query that sees nothing at all is NaN under -inf, in the stock model too
            masked_out = torch.finfo(torch.float32).min if form == "float" or new > 1 else -torch.inf
            return torch.where(mask, 0.0, masked_out)
        return mask[:1] if form == "batch of one" else mask

    expected = decode_with_masks(Slow(r=4, k=12).install(build()), inputs, tokens, what_is_seen)
    actual = decode_with_masks(model, inputs, tokens, make_mask, cache)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    total = sparq.report(model).total
    assert total.dense_steps == {} and total.sparse_steps == 3 * 12


def test_a_mask_that_the_caller_changes_in_place() -> None:
    inputs, tokens = prompt(), next_tokens()
    buffer = torch.zeros(2, 1, 1, 64, dtype=torch.bool)

    def in_place(valid: torch.Tensor, new: int) -> torch.Tensor:
        mask = forgetful(valid, new)
        if new > 1:
            return mask
        buffer[..., : mask.shape[3]] = mask
        return buffer[..., : mask.shape[3]]

    expected = decode_with_masks(sparq.patch(build(), **SPARSE), inputs, tokens, forgetful)
    torch.testing.assert_close(decode_with_masks(sparq.patch(build(), **SPARSE), inputs, tokens, in_place), expected)
    slow = decode_with_masks(Slow(r=4, k=12).install(build()), inputs, tokens, forgetful)
    torch.testing.assert_close(expected, slow, rtol=1e-4, atol=1e-4)


@on_either_cache
@pytest.mark.parametrize(
    ("shape", "reason"), [("heads", "attention mask that is not"), ("bias", "attention mask with a bias")]
)
def test_masks_that_sparq_cannot_read_are_dense(shape: str, reason: str, make_cache: Callable) -> None:
    inputs, tokens, logits = prompt(), next_tokens(steps=2), []
    model = sparq.patch(build(), **SPARSE)
    for either in (model, build()):
        cache = make_cache(either)

        def make_mask(valid: torch.Tensor, new: int, cache: Cache = cache) -> torch.Tensor:
            mask = as_wide_as(cache, causal_mask(valid, new))
            if shape == "heads":
                return mask.expand(-1, 4, -1, -1)
            return torch.where(mask, -0.1 * torch.arange(mask.shape[3]), torch.finfo(torch.float32).min)

        logits.append(decode_with_masks(either, inputs, tokens, make_mask, cache))
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
    total = sparq.report(model).total
    assert total.sparse_steps == 0 and sum(total.dense_steps.values()) == 6
    assert all(text.startswith(reason) for text in total.dense_steps)


def test_no_mask_is_a_mask_of_ones() -> None:
    inputs, tokens, model = prompt(padding=0), next_tokens(), sparq.patch(build(), **SPARSE)
    expected = teacher_forced(model, inputs, tokens)
    actual = decode_with_masks(model, inputs, tokens, lambda valid, new: None)
    torch.testing.assert_close(actual, expected)


def test_batch_rows_are_independent() -> None:
    inputs, tokens = prompt(batch=3), next_tokens(batch=3)
    together = teacher_forced(sparq.patch(build(), **SPARSE), inputs, tokens)
    for row in range(3):
        alone = teacher_forced(
            sparq.patch(build(), **SPARSE),
            {name: tensor[row : row + 1] for name, tensor in inputs.items()},
            tokens[row : row + 1],
        )
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-4)


def test_poisoned_operator_makes_generate_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    def poisoned(*args, **kwargs):
        raise ZeroDivisionError("the operator ran")

    monkeypatch.setattr(sparq_kernels, "decode", poisoned)
    with pytest.raises(ZeroDivisionError, match="the operator ran"):
        generate(sparq.patch(build(), **SPARSE), prompt())
    generate(sparq.patch(build(), r=4, k=100, min_length=0), prompt())  # dense: the operator is not asked


def test_what_the_operator_gives_is_what_the_model_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    real = sparq_kernels.decode

    def poisoned(*args, **kwargs):
        result = real(*args, **kwargs)
        return result._replace(output=result.output * torch.nan)

    monkeypatch.setattr(sparq_kernels, "decode", poisoned)
    logits = teacher_forced(sparq.patch(build(), **SPARSE), prompt(), next_tokens(steps=1))
    assert logits.isnan().all()


@pytest.mark.parametrize("min_length, sparse", [(0, 12), (46, 7), (52, 1), (53, 0)])
def test_min_length_counts_cached_positions(min_length: int, sparse: int) -> None:
    """40 of the prompt, then 41 to 52 with the current token."""
    model = sparq.patch(build(), r=4, k=12, min_length=min_length)
    teacher_forced(model, prompt(), next_tokens())
    layer = sparq.report(model).layers[0]
    assert layer.sparse_steps == sparse
    assert layer.dense_steps == ({"shorter than min_length": 12 - sparse} if sparse < 12 else {})


def test_min_length_none_is_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    # B=2, Hkv=2, d=16, float32: K and V take 512 bytes a position
    monkeypatch.setitem(sparq.attention.PAYS_FROM_BYTES, "cpu", 512 * 46)
    model = sparq.patch(build(), r=4, k=12)
    teacher_forced(model, prompt(), next_tokens())
    assert sparq.report(model).layers[0].sparse_steps == 7


@pytest.mark.parametrize(("device", "positions"), [("cpu", 1024), ("cuda", 16384), ("mps", 0)])
def test_where_it_pays_depends_on_the_device(device: str, positions: int) -> None:
    """Llama-3-8B's heads in 16 bits take 4,096 bytes a position: 4 MiB on a CPU, 64 MiB on a GPU."""
    step = Step(None, sparq.SparqConfig(), Stats())
    key = SimpleNamespace(shape=(1, 8, 5000, 128), element_size=lambda: 2, device=torch.device(device))
    assert sparq.attention._min_length(step, key) == positions


def test_a_row_becomes_sparse_when_it_has_more_than_k_positions() -> None:
    """Row 0 has 41 positions and more, row 1 has 9 fewer: with k = 45 the first is sparse from step 6 on."""
    model = sparq.patch(build(), r=4, k=45, min_length=0)
    inputs, tokens = prompt(), next_tokens()
    teacher_forced(model, inputs, tokens)
    layer = sparq.report(model).layers[0]
    assert (layer.sparse_steps, layer.dense_steps) == (7, {"k covers the context": 5})


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_dense_steps_equal_the_stock_model(implementation: str) -> None:
    inputs, tokens = prompt(), next_tokens()
    stock = build()
    stock.set_attn_implementation(implementation)
    expected = teacher_forced(stock, inputs, tokens)
    model = sparq.patch(stock, r=4, k=12, min_length=1000)
    torch.testing.assert_close(teacher_forced(model, inputs, tokens), expected, rtol=1e-4, atol=1e-4)
    assert sparq.report(model).total.sparse_steps == 0


def test_attention_weights_can_be_asked_for() -> None:
    inputs, model = prompt(batch=1), build()
    model.set_attn_implementation("eager")
    sparq.patch(model, **SPARSE)
    with torch.no_grad():
        cache = model(**inputs).past_key_values
        output = model(next_tokens(1, 1), past_key_values=cache, output_attentions=True)
    assert [weights.shape for weights in output.attentions] == [(1, 4, 1, 41)] * 3
    assert sparq.report(model).total.dense_steps == {"attention weights were asked for": 3}


def test_autocast_is_dense_and_works() -> None:
    inputs, tokens, model = prompt(), next_tokens(steps=3), build()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = teacher_forced(model, inputs, tokens)
        sparq.patch(model, **SPARSE)
        actual = teacher_forced(model, inputs, tokens)
    torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.3)
    assert sparq.report(model).total.dense_steps == {"query, key and value differ in dtype": 9}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    inputs, tokens = prompt(), next_tokens(steps=4)
    model = sparq.patch(build().to(dtype), **SPARSE)
    actual = teacher_forced(model, inputs, tokens)
    assert actual.dtype == dtype and sparq.report(model).total.sparse_steps == 12
    if dtype == torch.float64:
        expected = teacher_forced(Slow(r=4, k=12).install(build().to(dtype)), inputs, tokens)
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    assert actual.isfinite().all()


def test_attention_dropout_of_a_model_in_training_is_dense() -> None:
    model = sparq.patch(build(attention_dropout=0.5), **SPARSE).train()
    teacher_forced(model, prompt(), next_tokens(steps=1))
    assert sparq.report(model).total.dense_steps == {"attention dropout": 3}


def test_training_on_a_prompt() -> None:
    inputs, model = prompt(), build()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    sparq.patch(model, **SPARSE)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    for parameter, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-3, atol=1e-5)


@on_either_cache
@pytest.mark.parametrize("prompt_grad", [True, False])
def test_steps_outside_of_no_grad_leave_no_graph_behind(make_cache: Callable, prompt_grad: bool) -> None:
    inputs, token, model = prompt(batch=1, padding=0), next_tokens(1, 1), sparq.patch(build(), **SPARSE)
    expected = teacher_forced(model, inputs, token, make_cache(model))
    sparq.patch(model, **SPARSE)
    cache = make_cache(model)
    with torch.set_grad_enabled(prompt_grad):
        model(**inputs, past_key_values=cache)
    output = model(token, past_key_values=cache)
    assert output.logits.requires_grad
    torch.testing.assert_close(output.logits[:, -1], expected[:, 0])
    stats = model.base_model._sparq_patch.current().stats
    held = [one.alpha for one in stats.on_device.values()] if make_cache is static else [*stats.alphas.values()]
    held += [layer._index.value_sum for layer in cache.layers]
    assert len(held) == (6 if make_cache is static else 4) and not any(tensor.requires_grad for tensor in held)


def test_inference_mode_can_be_left_and_entered() -> None:
    inputs, tokens = prompt(batch=1), next_tokens(1, 4)
    expected = teacher_forced(sparq.patch(build(), **SPARSE), inputs, tokens)
    model = sparq.patch(build(), **SPARSE)
    with torch.inference_mode():
        cache = model(**inputs).past_key_values
    for step, mode in enumerate((torch.inference_mode, torch.no_grad, torch.inference_mode, torch.no_grad)):
        with mode():
            logits = model(tokens[:, step : step + 1], past_key_values=cache).logits[:, -1]
        torch.testing.assert_close(logits, expected[:, step])


def offloaded_dynamic() -> tuple[Cache, torch.Tensor]:
    layer, cache = SparqLayer(), DynamicCache()
    layer.update(torch.zeros(1, 2, 41, 16), torch.zeros(1, 2, 41, 16))
    cache.layers.append(layer)
    return cache, torch.empty(1, 2, 41, 16, device="meta")  # the layer's own have been moved away


def offloaded_static() -> tuple[Cache, torch.Tensor]:
    cache, keys = static(build()), torch.zeros(1, 2, SIZE, 16)
    cache.update(keys, keys, 0)
    cache.offloading = True  # what makes one needs a GPU
    upgrade(cache)
    assert all(type(layer) is StaticLayer for layer in cache.layers)
    return cache, keys


@pytest.mark.parametrize("offloaded", [offloaded_dynamic, offloaded_static])
def test_an_offloaded_cache_is_dense_with_one_warning(offloaded: Callable) -> None:
    """The keys are where the model is."""
    (cache, keys), stats = offloaded(), Stats()
    with pytest.warns(UserWarning, match="offloaded") as caught:
        for _ in range(2):
            step = Step(cache, SparqConfig(min_length=0, k=12), stats)
            sparq_attention("sdpa", attention_module(), keys[:, :, :1], keys, keys, None, sparq_step=step)
    assert len(caught) == 1
    assert stats.layers[0].dense_steps == {"an offloaded cache cannot be read sparsely": 2}


@pytest.mark.parametrize(("family", "how"), [("llama", {}), ("gemma2", dict(cache_implementation="static"))])
def test_normal_use_is_silent(family: str, how: dict, capfd: pytest.CaptureFixture[str]) -> None:
    inputs = prompt()
    generate(sparq.patch(build(family), **SPARSE), inputs, **how)  # the first use may compile
    capfd.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = sparq.patch(build(family), **SPARSE)
        generate(model, inputs, **how)
        sparq.report(model)
        sparq.unpatch(model)
    assert capfd.readouterr() == ("", "")


def test_beams_read_their_own_cache() -> None:
    check_beams(sparq.patch(build(), **SPARSE))


def test_one_prompt_cache_for_several_continuations() -> None:
    inputs, tokens, model = prompt(batch=1, padding=0), next_tokens(1, 3), sparq.patch(build(), **SPARSE)
    longer = {"input_ids": torch.cat([inputs["input_ids"], tokens], dim=1)}
    with torch.no_grad():
        cache = model(**inputs).past_key_values
        model(tokens[:, :1], past_key_values=cache)
        model(tokens[:, 1:2], past_key_values=cache)
    copies = [copy.deepcopy(cache) for _ in range(2)]
    first = generate(model, longer, past_key_values=copies[0])
    assert generate(model, longer, past_key_values=copies[1]) == first
    assert generate(model, longer, past_key_values=cache) == first


def test_padding_is_read_back_once_in_a_step_and_compared_in_no_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU each of these would wait for everything before it."""
    inputs, model, waits = prompt(), sparq.patch(build(), **SPARSE), []
    tolist, equal = torch.Tensor.tolist, torch.equal
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: waits.append("tolist") or tolist(self))
    monkeypatch.setattr(torch, "equal", lambda a, b: waits.append("equal") or equal(a, b))
    teacher_forced(model, inputs, next_tokens(steps=5))
    assert waits == ["tolist"] * 5


@pytest.mark.parametrize("hole", [None, slice(20, 23)], ids=["padding", "hole"])
def test_a_mask_is_not_read_back_while_decoding_on_a_gpu(hole: slice | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tried on the CPU, where the same code is told that it may not look."""
    inputs, tokens = prompt(), next_tokens()
    if hole is not None:
        inputs["attention_mask"][0, hole] = 0
    readable = sparq.patch(build(), **SPARSE)
    expected = teacher_forced(readable, inputs, tokens)
    for module in (sparq.plan, sparq.index):
        monkeypatch.setattr(module, "can_read", lambda device: False)
    model = sparq.patch(build(), **SPARSE)
    torch.testing.assert_close(teacher_forced(model, inputs, tokens), expected, rtol=1e-4, atol=1e-5)
    ours, theirs = sparq.report(model).total, sparq.report(readable).total
    assert (ours.sparse_steps, ours.bytes_read, ours.bytes_dense) == (
        theirs.sparse_steps,
        theirs.bytes_read,
        theirs.bytes_dense,
    )
    assert ours.other_sums == 0 and ours.mean_alpha == pytest.approx(theirs.mean_alpha)
