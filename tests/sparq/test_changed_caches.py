"""Models that decode on a cache which others change between the steps, or go on using."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache

import sparq
import sparq.cache
import sparq.index
from sparq.cache import SparqLayer, upgrade
from tests.sparq.caches import assign, check, dynamic, static
from tests.sparq.slow import Slow
from tests.sparq.tiny import build, generate, next_tokens, prompt

SPARSE: dict[str, Any] = dict(r=4, k=12, min_length=0)
MODES = [torch.no_grad, torch.inference_mode]


def write(layer: Any) -> None:
    keys, values = layer.keys, layer.values
    keys[:, :, 5:9].neg_(), values[:, :, 5:9].mul_(-2)


EDITS: dict[str, Callable] = {
    "other tokens, as many": lambda layer: assign(layer, lambda t: t[:, :, torch.arange(t.shape[2]) // 2]),
    "write": write,
    "one row of two": lambda layer: assign(layer, lambda t: t[-1:]),
}
EDITS_OF_THE_LENGTH: dict[str, Callable] = {
    "a window": lambda layer: assign(layer, lambda t: t[:, :, -24:]),
    "a window, values first": lambda layer: assign(layer, lambda t: t[:, :, -24:], values_first=True),
    "sinks and the newest": lambda layer: assign(layer, lambda t: torch.cat([t[:, :, :4], t[:, :, -20:]], 2)),
    "another document behind": lambda layer: assign(layer, lambda t: torch.cat([t, t[:, :, :8]], 2)),
}
EDITS_OF_STORAGE: dict[str, Callable] = {  # what lies behind the newest token comes in front
    "rolled": lambda layer: assign(layer, lambda t: t.roll(2, 2)),
    "rolled, values first": lambda layer: assign(layer, lambda t: t.roll(2, 2), values_first=True),
}
on_every_edit = pytest.mark.parametrize(
    ("make_cache", "edit"),
    [
        *[pytest.param(dynamic, edit, id=f"dynamic-{name}") for name, edit in (EDITS | EDITS_OF_THE_LENGTH).items()],
        *[pytest.param(static, edit, id=f"static-{name}") for name, edit in (EDITS | EDITS_OF_STORAGE).items()],
    ],
)


def edited(
    model: PreTrainedModel,
    edit: Callable,
    make_cache: Callable,
    mode: Any = torch.no_grad,
    watch: Callable | None = None,
) -> Tensor:
    """Logits of six steps; the cache is edited after the prompt and after the third."""
    cache, logits, batch = make_cache(model), [], 2
    with mode():
        model(prompt(padding=0)["input_ids"], past_key_values=cache)
        for step in range(6):
            if step in (0, 3):
                for layer in cache.layers:
                    edit(layer)
                batch = cache.layers[0].keys.shape[0]
            token, position = next_tokens(2, 6)[:batch, step : step + 1], torch.full((batch, 1), 60 + step)
            before = None if watch is None else fresh(cache)
            logits.append(model(token, position_ids=position, past_key_values=cache).logits[:, -1])
            if watch is not None:
                watch(model, cache, before, token, position, logits[-1])
    return torch.stack([row[-1:] for row in logits], 1)


def fresh(cache: Cache) -> Cache:
    """A cache that has just been given the same tokens, and has no index yet."""
    if isinstance(cache, StaticCache):
        other: Cache = copy.deepcopy(cache)
        for layer in other.layers:
            layer._drop_index()
        return other
    other = DynamicCache([(layer.keys.clone(), layer.values.clone()) for layer in cache.layers])
    upgrade(other)
    return other


def as_from_a_fresh_cache(
    model: PreTrainedModel, cache: Cache, before: Cache, token: Tensor, position: Tensor, logits: Tensor
) -> None:
    """The step, and the index it has left, are those of a cache that has just been given the same tokens."""
    expected = model(token, position_ids=position, past_key_values=before).logits[:, -1]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    for layer, own in zip(cache.layers, fresh(cache).layers, strict=True):
        check(layer, own)


@on_every_edit
def test_full_budget_is_the_stock_model(make_cache: Callable, edit: Callable) -> None:
    expected = edited(build(), edit, make_cache)
    model = sparq.patch(build(), k=1000, min_length=0)
    torch.testing.assert_close(edited(model, edit, make_cache), expected, rtol=1e-4, atol=1e-4)
    if edit is not EDITS["one row of two"]:
        assert (expected - edited(build(), lambda layer: None, make_cache)).abs().max() > 0.1


@pytest.mark.parametrize("mode", MODES)
@on_every_edit
def test_sparse_steps_see_what_is_held_now(make_cache: Callable, edit: Callable, mode: Any) -> None:
    """The definition knows no index."""
    expected = edited(Slow(r=4, k=12).install(build()), edit, make_cache)
    model = sparq.patch(build(), **SPARSE)
    actual = edited(model, edit, make_cache, mode, as_from_a_fresh_cache)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert sparq.report(model).total.sparse_steps == 2 * 3 * 6


@torch.no_grad()
def test_an_edit_that_was_left_half_done_is_refused() -> None:
    model, inputs = sparq.patch(build(), **SPARSE), prompt(batch=1, padding=0)
    cache = model(**inputs).past_key_values
    for layer in cache.layers:
        layer.keys = layer.keys[:, :, -24:]
    with pytest.raises(ValueError, match="got 24 and 40: whoever has assigned one of them has to assign the other"):
        model(next_tokens(1, 1), past_key_values=cache)
    for layer in cache.layers:
        assert layer.keys.shape[2] == 24
        layer.values = layer.values[:, :, -24:]
    assert model(next_tokens(1, 1), past_key_values=cache).logits.isfinite().all()
    assert cache.get_seq_length() == 25


@torch.no_grad()
def test_continuations_of_one_prompt_on_caches_that_share_it() -> None:
    """Two caches are given the tensors of the prompt's, which is then cut back and goes on first: each is as alone."""
    model, inputs, tokens = sparq.patch(build(), **SPARSE), prompt(batch=1, padding=0), next_tokens(3, 5)

    def going_on(cache: DynamicCache, row: int, step: int) -> Tensor:
        return model(tokens[row : row + 1, step : step + 1], past_key_values=cache).logits

    def filled() -> DynamicCache:
        cache = DynamicCache(config=model.config)
        model(**inputs, past_key_values=cache)
        return cache

    def sharing(cache: DynamicCache) -> DynamicCache:
        other = DynamicCache(config=model.config)
        for own, layer in zip(other.layers, cache.layers, strict=True):
            own.lazy_initialization(layer.keys, layer.values)
            own.keys, own.values = layer.keys, layer.values
        return other

    expected = []
    for row, cut in enumerate((3, 0, 0)):
        alone = filled()
        alone.crop(-cut)
        expected.append([going_on(alone, row, step) for step in range(5)])
    cache = filled()
    branches = [cache, sharing(cache), sharing(cache)]
    cache.crop(-3)
    for step in range(5):  # in turns
        for row, branch in enumerate(branches):
            torch.testing.assert_close(going_on(branch, row, step), expected[row][step], rtol=1e-4, atol=1e-4)


def test_rejected_drafts_copy_no_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    made, grown = [], sparq.cache._grown
    monkeypatch.setattr(sparq.cache, "_grown", lambda *args: made.append(1) or grown(*args))
    inputs = prompt(batch=1, padding=0, length=60)
    inputs["input_ids"][0, 30:] = inputs["input_ids"][0, :30]
    crops, crop = [], SparqLayer.crop
    monkeypatch.setattr(SparqLayer, "crop", lambda self, tokens: crops.append(tokens) or crop(self, tokens))
    model = sparq.patch(build(), **SPARSE)
    generate(model, inputs, 40, prompt_lookup_num_tokens=4)
    assert any(crops) and len(made) == 2 * 3  # K and V of each layer, once: 256 positions are enough


def test_a_crop_in_inference_mode_between_steps_outside_of_it() -> None:
    model, tokens = sparq.patch(build(), **SPARSE), next_tokens(1, 4)
    expected_model, answers = sparq.patch(build(), **SPARSE), []
    for one, mode in ((model, torch.inference_mode), (expected_model, torch.no_grad)):
        cache = DynamicCache(config=one.config)
        with torch.no_grad():
            one(**prompt(batch=1, padding=0), past_key_values=cache)
            one(tokens[:, :1], past_key_values=cache)
        with mode():
            cache.crop(-1)
        with torch.no_grad():
            steps = [one(tokens[:, i : i + 1], past_key_values=cache).logits for i in (1, 2, 3)]
        answers.append(torch.cat(steps, 1))
    torch.testing.assert_close(*answers)


@torch.no_grad()
def test_a_pass_that_failed_behind_its_last_layer_has_left_whole_tokens() -> None:
    """On a cache that gets its layers one by one; between two layers it is an error still."""
    model = sparq.patch(build(), **SPARSE)
    for module, fits in ((model.model.norm, True), (model.model.layers[1], False)):
        cache = DynamicCache()

        def failing(*args) -> None:
            raise ZeroDivisionError

        handle = module.register_forward_pre_hook(failing)
        with pytest.raises(ZeroDivisionError):
            model(**prompt(batch=1, padding=0), past_key_values=cache)
        handle.remove()
        if fits:
            model(next_tokens(1, 1), past_key_values=cache)
            assert cache.get_seq_length() == 41
        else:
            with pytest.raises(RuntimeError, match="interrupted between layers"):
                model(next_tokens(1, 1), past_key_values=cache)


def test_the_empty_tensor_that_a_layer_begins_with_is_no_tokens() -> None:
    layer = SparqLayer()
    layer.update(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4))
    layer.keys, layer.values = torch.tensor([]), torch.tensor([])
    assert layer.get_seq_length() == 0
    layer.update(torch.ones(2, 2, 1, 4), torch.ones(2, 2, 1, 4))
    layer.batch_select_indices(slice(0, 1))
    assert layer.keys.shape == (1, 2, 1, 4)


@torch.no_grad()
def test_the_report_says_how_often_an_index_was_made_anew() -> None:
    """Eviction after every token costs more than it saves; what generate does to a cache is none."""
    model = sparq.patch(build(), **SPARSE)
    generate(model, prompt(), num_beams=2)
    assert sparq.report(model).remade == 0 and "made anew" not in str(sparq.report(model))
    cache = DynamicCache(config=model.config)
    model(**prompt(batch=1, padding=0), past_key_values=cache)
    for token in next_tokens(1, 4)[0]:
        model(token[None, None], past_key_values=cache)
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[:, :, 1:], layer.values[:, :, 1:]
    report = sparq.report(model)
    assert report.remade == 3 * 3 and "9 times a layer was changed from outside" in str(report)


@torch.no_grad()
def test_a_mask_that_changes_where_nothing_is_read_back_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: the sum is of the positions that were valid when they came, and the report says how often."""
    monkeypatch.setattr(sparq.index, "can_read", lambda tensor: False)
    model, tokens = sparq.patch(build(), **SPARSE), next_tokens(2, 5)
    cache = DynamicCache(config=model.config)
    model(**prompt(padding=0), past_key_values=cache)
    for step in range(5):
        mask = torch.ones(2, 41 + step, dtype=torch.int64)
        mask[0, 3] = 0
        mask[:, :20] *= step < 3
        model(tokens[:, step : step + 1], attention_mask=mask, past_key_values=cache)
    report = sparq.report(model)
    assert report.total.sparse_steps == 3 * 5 and report.total.other_sums == 3 * 2
