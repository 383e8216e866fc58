"""Static caches: the layer against transformers' own and an index made from scratch, and models that decode with it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from sparq_kernels import BLOCK, read_components
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

import sparq
import sparq.index
from sparq.attention import sparq_attention
from sparq.cache import upgrade
from sparq.config import SparqConfig
from sparq.static_cache import SparqStaticLayer
from sparq.stats import Stats
from sparq.step import Step
from tests.sparq.slow import Slow
from tests.sparq.test_attention import causal_mask, decode_with_masks
from tests.sparq.test_cache import Placed, assign, held_by, states
from tests.sparq.tiny import attention_module, build, generate, next_tokens, prompt, teacher_forced

SPARSE = dict(r=4, k=12, min_length=0)
SIZE = 64


def static(model, size: int = SIZE) -> StaticCache:
    return StaticCache(config=model.config, max_cache_len=size)


def pair(length: int = 20, size: int = SIZE) -> tuple[SparqStaticLayer, StaticLayer]:
    layers = SparqStaticLayer(size), StaticLayer(size)
    for layer in layers:
        layer.update(*states(length))
    return layers


def seen(length: int, start: Tensor | None = None, size: int = SIZE) -> Tensor:
    """[2, size] bool: the positions from `start` [2] up to `length`."""
    positions = torch.arange(size)
    return (positions < length) & (
        positions >= (torch.zeros(2, dtype=torch.int64) if start is None else start)[:, None]
    )


def check(layer: SparqStaticLayer, plain: StaticLayer, valid: Tensor) -> None:
    length = int(plain.get_seq_length())
    assert int(layer.get_seq_length()) == length and layer.get_mask_sizes(1) == plain.get_mask_sizes(1)
    torch.testing.assert_close(layer.keys, plain.keys, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(layer.values, plain.values, rtol=0, atol=0, equal_nan=True)
    components, value_sum, doubt = layer.index(None, valid)
    torch.testing.assert_close(
        read_components(components, length), plain.keys[:, :, :length], rtol=0, atol=0, equal_nan=True
    )
    assert value_sum.dtype == torch.float32 and doubt is None
    expected = plain.values.double().where(valid[:, None, :, None], 0.0).sum(2)
    torch.testing.assert_close(value_sum.double(), expected, rtol=1e-5, atol=1e-5)


OPERATIONS: dict[str, Callable] = {
    "one": lambda layer: layer.update(*states(1, seed=1)),
    "many": lambda layer: layer.update(*states(7, seed=1)),
    "one, one": lambda layer: (layer.update(*states(1, seed=1)), layer.update(*states(1, seed=2))),
    "reorder": lambda layer: layer.reorder_cache(torch.tensor([1, 1])),
    "offload": lambda layer: layer.offload(),
    "offload and prefetch": lambda layer: (layer.offload(), layer.prefetch()),
    "reset": lambda layer: layer.reset(),
    "reset and one": lambda layer: (layer.reset(), layer.update(*states(1, seed=1))),
    "reset and many": lambda layer: (layer.reset(), layer.update(*states(9, seed=1))),
    "nothing": lambda layer: None,
    "assignment": lambda layer: assign(layer, lambda t: t.roll(1, 2)),
    "assignment, values first": lambda layer: assign(layer, lambda t: t.roll(1, 2), values_first=True),
    "assignment of keys alone": lambda layer: setattr(layer, "keys", layer.keys.neg()),
    "write into keys": lambda layer: layer.keys[:, :, 9:12].fill_(3.0),
    "write into values": lambda layer: layer.values[:, :, :20].mul_(2),
    "write in inference mode": lambda layer: torch.inference_mode()(layer.values[:, :, :20].neg_)(),
    "write, one, write": lambda layer: (layer.keys.neg_(), layer.update(*states(1)), layer.values[:, :, 20].zero_()),
    "reset and write": lambda layer: (layer.reset(), layer.values[:, :, :1].zero_(), layer.update(*states(3, seed=1))),
}
needs_crop = pytest.mark.skipif(not hasattr(StaticLayer, "crop"), reason="this transformers cannot crop a static layer")


@pytest.mark.parametrize("indexed", [False, True], ids=["no index yet", "indexed"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_operation(operation: str, indexed: bool) -> None:
    layer, plain = pair()
    start = torch.tensor([0, 5])
    if indexed:
        layer.index(None, seen(20, start))
    for one in (layer, plain):
        OPERATIONS[operation](one)
    start = torch.tensor([5, 5]) if operation == "reorder" else start
    check(layer, plain, seen(int(plain.get_seq_length()), start))
    for seed in range(3):
        new = states(1, seed=20 + seed)
        keys, values = layer.update(*new)
        plain.update(*new)
        assert keys is layer.keys and values is layer.values
        check(layer, plain, seen(int(plain.get_seq_length()), start))


def test_single_tokens_extend_the_index_and_many_make_it_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, _ = pair()
    layer.index(None, seen(20))
    anew, real = [], sparq.index._sum
    monkeypatch.setattr(sparq.index, "_sum", lambda *args: anew.append(1) or real(*args))

    def tensors() -> list[Tensor]:
        return [layer.cumulative_length, *(getattr(owner, name) for owner, name in held_by(layer))]

    held = tensors()
    for length in range(21, 30):
        layer.update(*states(1, seed=length))
        layer.index(None, seen(length))
    assert not anew
    layer.update(*states(2))
    layer.index(None, seen(31))
    assert anew == [1]
    layer.reset()
    # a captured graph knows these by their address
    assert len(held) == 6 and all(a is b for a, b in zip(held, tensors(), strict=True))


@pytest.mark.parametrize("rows", [[1], [0, 1, 1]], ids=["fewer", "more"])
def test_another_batch_may_be_assigned(rows: list[int]) -> None:
    layer, plain = pair()
    layer.index(None, seen(20))
    for one in (layer, plain):
        assign(one, lambda t: t[rows])
    for length in (20, 21, 22):
        check(layer, plain, seen(length)[:1].expand(len(rows), -1))
        for one in (layer, plain):
            one.update(*states(1, len(rows), seed=length))


@torch.no_grad()
@needs_crop
def test_cropped_to_nothing_it_begins_with_a_prompt_again() -> None:
    model = sparq.patch(build(), r=2, k=1, min_length=0)
    cache, ids = static(model), prompt(batch=1, padding=0, length=10)["input_ids"]
    model(**prompt(batch=1, padding=0), past_key_values=cache)
    cache.crop(-40)
    torch.testing.assert_close(model(ids, past_key_values=cache).logits, build()(ids).logits, rtol=1e-4, atol=1e-4)
    assert sparq.report(model).total.decode_steps == 0


@needs_crop
@pytest.mark.parametrize("removed", [0, 1, 3, 20])
@pytest.mark.parametrize("indexed", [False, True], ids=["no index yet", "indexed"])
def test_crop(removed: int, indexed: bool) -> None:
    layer, plain = pair()
    if indexed:
        layer.index(None, seen(20))
    for one in (layer, plain):
        one.crop(-removed)
    for seed in range(3):
        length = 20 - removed + seed
        assert int(layer.get_seq_length()) == length
        if length:
            check(layer, plain, seen(length))
        for one in (layer, plain):
            one.update(*states(1, seed=30 + seed))


def test_padding_may_hold_nan() -> None:
    layer, plain = SparqStaticLayer(SIZE), StaticLayer(SIZE)
    keys, values = states(20)
    keys[1, :, :5], values[1, :, :5] = torch.nan, torch.nan
    layer.update(keys, values), plain.update(keys, values)
    start = torch.tensor([0, 5])
    for length in (20, 21):
        check(layer, plain, seen(length, start))
        layer.update(*states(1)), plain.update(*states(1))


def test_a_new_token_that_is_padding() -> None:
    """A padded prompt fed one token at a time: what is valid is known of each only when it comes."""
    layer, plain = SparqStaticLayer(SIZE), StaticLayer(SIZE)
    start = torch.tensor([0, 5])
    for step in range(10):
        keys, values = states(1, seed=step)
        if step < 5:
            values[1] = torch.nan
        layer.update(keys, values), plain.update(keys, values)
        check(layer, plain, seen(step + 1, start))


def test_a_single_position_that_changes_makes_the_mean_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is read back, as on a GPU."""
    layer, _ = pair(20)
    layer.index(None, seen(20))
    monkeypatch.setattr("sparq.index.can_read", lambda device: False)
    doubt = layer.index(None, seen(20)).mean_is_stale
    assert doubt is not None and not doubt
    changed = seen(20)
    changed[1, 3] = False
    doubt = layer.index(None, changed).mean_is_stale
    assert doubt is not None and doubt


def test_validity_that_changes() -> None:
    layer, plain = pair()
    for start in (torch.tensor([0, 5]), torch.tensor([3, 0]), None):
        check(layer, plain, seen(20, start))
        holes = seen(20, start)
        holes[0, 7] = False
        check(layer, plain, holes)
        layer.update(*states(1)), plain.update(*states(1))
        layer.reset(), plain.reset()
        layer.update(*states(20)), plain.update(*states(20))


def test_more_than_a_block_of_positions() -> None:
    size = BLOCK + 50
    layer, plain = pair(BLOCK - 2, size)
    for seed in range(4):
        check(layer, plain, seen(int(plain.get_seq_length()), size=size))
        layer.update(*states(1, seed=seed)), plain.update(*states(1, seed=seed))


def test_memory() -> None:
    layer = SparqStaticLayer(SIZE)
    assert layer.allocated_bytes == 0 and layer.get_seq_length() == 0
    layer.update(*states(3))
    heads, head_dim = layer.keys.shape[1], layer.keys.shape[3]
    rows, components = 2 * SIZE * head_dim * 4, BLOCK * head_dim * 4
    assert layer.allocated_bytes == 2 * heads * (rows + components + head_dim * 4) + 2 * SIZE
    assert not layer._index.components.blocks.any()  # what was never written is no NaN


def test_a_full_cache_says_so() -> None:
    layer, _ = pair(SIZE)
    layer.index(None, seen(SIZE))
    with pytest.raises((ValueError, IndexError, RuntimeError), match=r"position|range|bounds"):
        layer.update(*states(1))


def test_offload_and_prefetch_move_all_that_is_held() -> None:
    layer, plain = pair()
    layer.index(None, seen(20))
    held = held_by(layer)
    assert len(held) == 5
    layer.device = torch.device("cuda:0")
    for owner, name in held:
        setattr(owner, name, getattr(owner, name).as_subclass(Placed).to("cuda:0"))
    layer._note_contents()

    def places() -> set[str]:
        return {str(getattr(owner, name).device) for owner, name in held}

    layer.offload()
    assert places() == {"cpu"}
    layer.prefetch()
    assert places() == {"cuda:0"}
    there = layer._index.components.blocks
    layer.prefetch()
    assert layer._index.components.blocks is there
    for owner, name in held:
        setattr(owner, name, getattr(owner, name).as_subclass(torch.Tensor))
    layer._note_contents()
    check(layer, plain, seen(20))


def test_upgrade() -> None:
    model = build("gemma3")
    cache = static(model)
    upgrade(cache)
    kinds = [StaticSlidingWindowLayer, SparqStaticLayer, StaticSlidingWindowLayer]
    assert [type(layer) for layer in cache.layers] == kinds and cache.is_compileable
    same = list(cache.layers)
    upgrade(cache)
    assert all(a is b for a, b in zip(cache.layers, same, strict=True))


@pytest.mark.parametrize("filled", [False, True], ids=["early initialised", "filled"])
def test_upgrade_takes_over_the_tensors(filled: bool) -> None:
    model = build()
    cache = static(model)
    cache.early_initialization(2, 2, 16, torch.float32, torch.device("cpu"))
    if filled:
        teacher_forced(model, prompt(), next_tokens(steps=1), cache)
    plain = list(cache.layers)
    upgrade(cache)
    for layer, other in zip(cache.layers, plain, strict=True):
        assert type(layer) is SparqStaticLayer and layer.keys is other.keys and layer.values is other.values
        assert layer.cumulative_length is other.cumulative_length and layer.is_filled == filled
        assert (layer.device, layer.max_cache_len) == (other.device, SIZE)
        assert layer.has_index and vars(other).keys() <= vars(layer).keys()


def test_copies_stand_alone() -> None:
    layer, plain = pair()
    layer.index(None, seen(20))
    other, other_plain = copy.deepcopy(layer), copy.deepcopy(plain)
    layer.update(*states(1, seed=3)), plain.update(*states(1, seed=3))
    other.update(*states(1, seed=4)), other_plain.update(*states(1, seed=4))
    check(layer, plain, seen(21))
    check(other, other_plain, seen(21))


# Models


def edited(model, edit: Callable, cache: StaticCache) -> Tensor:
    """Logits of steps of which others change the cache before every second one."""
    inputs, tokens, logits = prompt(batch=1, padding=0), next_tokens(1, 6), []
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
        for step in range(6):
            if step % 2:
                for layer in cache.layers:
                    edit(layer)
            logits.append(model(tokens[:, step : step + 1], past_key_values=cache).logits[:, -1])
    return torch.stack(logits, 1)


EDITS: dict[str, Callable] = {
    "keys and values": lambda layer: assign(layer, lambda t: t.roll(2, 2)),
    "values and keys": lambda layer: assign(layer, lambda t: t.roll(2, 2), values_first=True),
    "write": lambda layer: (layer.keys[:, :, 5:9].neg_(), layer.values[:, :, 5:9].mul_(-2)),
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_cache_that_others_change_between_steps(edit: str) -> None:
    """Sparse steps are those of the definition, which knows no index, on a cache that was changed in the same way."""
    stock, covering = build(), sparq.patch(build(), k=SIZE, min_length=0)
    dense = edited(stock, EDITS[edit], static(stock))
    torch.testing.assert_close(edited(covering, EDITS[edit], static(covering)), dense, rtol=1e-4, atol=1e-4)
    slow, model = Slow(r=4, k=12).install(build()), sparq.patch(build(), **SPARSE)
    expected = edited(slow, EDITS[edit], static(slow))
    torch.testing.assert_close(edited(model, EDITS[edit], static(model)), expected, rtol=1e-4, atol=1e-4)
    assert sparq.report(model).total.sparse_steps == 3 * 6
    assert (expected - edited(build(), lambda layer: None, static(stock))).abs().max() > 0.1


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma2"])
@pytest.mark.parametrize(
    "knobs", [dict(r=4, k=12), dict(r=3, k=9, mean_value=False), dict(r=2, k=10, local=10, dense_layers=1)], ids=str
)
def test_every_step_equals_the_definition(family: str, knobs: dict) -> None:
    inputs, tokens = prompt(), next_tokens()
    expected = teacher_forced(Slow(**knobs).install(build(family)), inputs, tokens)
    dynamic = sparq.patch(build(family), min_length=0, **knobs)
    teacher_forced(dynamic, inputs, tokens)
    model = sparq.patch(build(family), min_length=0, **knobs)
    actual = teacher_forced(model, inputs, tokens, static(model))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    same_report(sparq.report(model), sparq.report(dynamic))


def same_report(one: sparq.Report, other: sparq.Report) -> None:
    """Counted on the device or by Python; dense steps read the whole of a static cache."""
    assert one.layers.keys() == other.layers.keys()
    for index in one.layers:
        a, b = one.layers[index], other.layers[index]
        assert (a.sparse_steps, a.dense_steps) == (b.sparse_steps, b.dense_steps)
        assert (a.positions_cached, a.positions_read) == (b.positions_cached, b.positions_read)
        assert (a.other_sums, a.ignored_biases) == (0, 0)
        assert a.mean_alpha == (None if b.mean_alpha is None else pytest.approx(b.mean_alpha, rel=1e-5))
        if not a.dense_steps:
            assert (a.bytes_read, a.bytes_dense) == (b.bytes_read, b.bytes_dense)


def test_k_follows_what_is_filled_not_what_is_allocated() -> None:
    """ratio 1: k is half the valid positions of each row, at least 128; the cache has room for ten times as many."""
    inputs, tokens = prompt(length=300, padding=100), next_tokens(steps=4)
    slow = Slow(r=4, ratio=1)
    expected = teacher_forced(slow.install(build(max_position_embeddings=4096)), inputs, tokens)
    model = sparq.patch(build(max_position_embeddings=4096), r=4, ratio=1, min_length=0)
    actual = teacher_forced(model, inputs, tokens, static(model, 3000))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert sparq.report(model).layers[0].positions_read == slow.read[0]


PROMPTS = {"padded": prompt(), "unpadded": prompt(padding=0), "one row": prompt(batch=1), "one token": prompt(2, 1, 0)}


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "phi3", "gemma2", "gemma3"])
def test_generate_gives_the_same_tokens(family: str) -> None:
    model = build(family)
    for inputs in PROMPTS.values():
        sparq.patch(model, **SPARSE)
        expected, dynamic = generate(model, inputs), sparq.report(model).total
        sparq.patch(model, **SPARSE)
        for _ in range(2):
            assert generate(model, inputs, cache_implementation="static") == expected
        total = sparq.report(model).total
        if inputs is not PROMPTS["one token"]:  # k covers its first steps, which a static cache does not know
            assert total.sparse_steps == 2 * dynamic.sparse_steps > 0
        assert total.decode_steps == 2 * dynamic.decode_steps
        sparq.unpatch(model)


@pytest.mark.parametrize(
    "how", [dict(num_beams=3), dict(num_beams=3, num_return_sequences=2), dict(do_sample=True)], ids=str
)
def test_other_ways_to_generate(how: dict) -> None:
    inputs, model = prompt(), sparq.patch(build(), **SPARSE)
    torch.manual_seed(3)
    expected = generate(model, inputs, **how)
    torch.manual_seed(3)
    assert generate(model, inputs, cache_implementation="static", **how) == expected


def test_a_prompt_in_chunks() -> None:
    inputs, model = prompt(), sparq.patch(build(), **SPARSE)
    expected = generate(model, inputs)
    assert generate(model, inputs, cache_implementation="static", prefill_chunk_size=20) == expected


def test_a_cache_that_is_reset_and_used_again() -> None:
    tokens, model = next_tokens(), sparq.patch(build(), **SPARSE)
    cache = static(model)
    for padding, length in ((9, 40), (20, 30), (0, 50), (9, 40)):
        inputs = prompt(length=length, padding=padding, seed=padding)
        expected = teacher_forced(model, inputs, tokens, static(model))
        sparq.patch(model, **SPARSE)
        assert torch.equal(teacher_forced(model, inputs, tokens, cache), expected)
        assert sparq.report(model).total.dense_steps == {}  # the prompt of a cache that was reset is a prompt
        cache.reset()


def test_several_turns_on_one_cache() -> None:
    model = sparq.patch(build(), **SPARSE)

    def talk(cache) -> list[Tensor]:
        replies, mask = [], torch.ones(1, 0, dtype=torch.int64)
        for turn in range(3):
            ids = prompt(batch=1, length=10 + turn, padding=0, seed=turn)["input_ids"]
            for part in (ids, *next_tokens(1, 3, seed=turn).split(1, dim=1)):
                mask = torch.ones(1, mask.shape[1] + part.shape[1], dtype=torch.int64)
                with torch.no_grad():
                    replies.append(model(part, attention_mask=mask, past_key_values=cache).logits[:, -1])
        return replies

    expected = talk(DynamicCache(config=model.config))
    torch.testing.assert_close(talk(static(model)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens_between", [1, 2])
def test_a_cache_that_an_unpatched_model_goes_on_with(tokens_between: int) -> None:
    """What it writes is not in the index, which the next sparse step makes up for."""

    def run(cache) -> Tensor:
        model, logits = sparq.patch(build(), **SPARSE), []
        inputs, tokens = prompt(batch=1, padding=0), next_tokens(1, 8)
        with torch.no_grad():
            model(**inputs, past_key_values=cache)
            model(tokens[:, :1], past_key_values=cache)
            sparq.unpatch(model)
            for step in range(1, 1 + tokens_between):
                model(tokens[:, step : step + 1], past_key_values=cache)
            sparq.patch(model, **SPARSE)
            for step in range(1 + tokens_between, 8):
                logits.append(model(tokens[:, step : step + 1], past_key_values=cache).logits)
        return torch.cat(logits)

    model = build()
    torch.testing.assert_close(run(static(model)), run(DynamicCache(config=model.config)), rtol=1e-4, atol=1e-4)


def test_takes_over_a_cache_that_an_unpatched_model_has_filled() -> None:
    inputs, tokens = prompt(), next_tokens()
    expected = teacher_forced(sparq.patch(build(), **SPARSE), inputs, tokens)
    model = build()
    cache = static(model)
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
        sparq.patch(model, **SPARSE)
        mask, logits = inputs["attention_mask"], []
        for step in range(tokens.shape[1]):
            mask = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
            logits.append(model(tokens[:, step : step + 1], attention_mask=mask, past_key_values=cache).logits[:, -1])
    torch.testing.assert_close(torch.stack(logits, 1), expected, rtol=1e-4, atol=1e-4)


def to_size(mask: Tensor, size: int = SIZE) -> Tensor:
    return torch.nn.functional.pad(mask, (0, size - mask.shape[3]))


@pytest.mark.parametrize("form", ["bool", "float", "beyond the length", "forgetful"])
def test_masks_of_four_dimensions(form: str) -> None:
    inputs, tokens = prompt(), next_tokens()
    inputs["attention_mask"][0, 5:9] = 0

    def forgetful(valid: Tensor, new: int) -> Tensor:
        valid = valid.clone()
        if form == "forgetful":
            valid[0, 10 : valid.shape[1] - 28] = 0  # with each step one more of the old positions is forgotten
        return causal_mask(valid, new)

    def make_mask(valid: Tensor, new: int) -> Tensor:
        mask = to_size(forgetful(valid, new))
        if form == "beyond the length" and new == 1:
            mask[..., valid.shape[1] :] = True
        return torch.where(mask, 0.0, torch.finfo(torch.float32).min) if form == "float" else mask

    expected = decode_with_masks(Slow(r=4, k=12).install(build()), inputs, tokens, forgetful)
    model = sparq.patch(build(), **SPARSE)
    actual = decode_with_masks(on_static_cache(model), inputs, tokens, make_mask)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert sparq.report(model).total.sparse_steps == 3 * 12


def on_static_cache(model) -> Callable:
    """`model` called with one static cache, whatever cache it is given."""
    cache = static(model)
    return lambda *args, **kwargs: model(*args, **kwargs | {"past_key_values": cache})


@pytest.mark.parametrize("shape", ["heads", "bias"])
def test_masks_that_sparq_cannot_read_are_dense(shape: str) -> None:
    inputs, tokens = prompt(), next_tokens(steps=2)

    def make_mask(valid: Tensor, new: int) -> Tensor:
        mask = to_size(causal_mask(valid, new))
        if shape == "heads":
            return mask.expand(-1, 4, -1, -1)
        return torch.where(mask, -0.1 * torch.arange(SIZE), torch.finfo(torch.float32).min)

    reason, model = "attention mask with a bias" if shape == "bias" else "attention mask that is not", build()
    expected = decode_with_masks(on_static_cache(model), inputs, tokens, make_mask)
    sparq.patch(model, **SPARSE)
    actual = decode_with_masks(on_static_cache(model), inputs, tokens, make_mask)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    total = sparq.report(model).total
    assert total.sparse_steps == 0 and sum(total.dense_steps.values()) == 6
    assert all(text.startswith(reason) for text in total.dense_steps)


@pytest.mark.parametrize("min_length, sparse", [(0, 5), (SIZE, 5), (SIZE + 1, 0)])
def test_min_length_is_compared_with_the_size(min_length: int, sparse: int) -> None:
    """A dense step reads all of a static cache, filled or not."""
    model = sparq.patch(build(), r=4, k=12, min_length=min_length)
    teacher_forced(model, prompt(), next_tokens(steps=5), static(model))
    layer = sparq.report(model).layers[0]
    assert layer.sparse_steps == sparse
    assert layer.dense_steps == ({} if sparse else {"shorter than min_length": 5})


@pytest.mark.parametrize("k, sparse", [(SIZE, 0), (SIZE - 1, 5)])
def test_k_that_covers_everything_is_the_stock_model(k: int, sparse: int) -> None:
    inputs, tokens, model = prompt(), next_tokens(steps=5), build()
    expected = teacher_forced(model, inputs, tokens, static(model))
    sparq.patch(model, k=k, min_length=0)
    actual = teacher_forced(model, inputs, tokens, static(model))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    layer = sparq.report(model).layers[0]
    assert (layer.sparse_steps, layer.mean_alpha) == ((sparse, 1.0) if sparse else (0, None))
    assert layer.dense_steps == ({} if sparse else {"k covers the context": 5})


def test_early_initialisation() -> None:
    inputs, tokens, model = prompt(), next_tokens(), sparq.patch(build(), **SPARSE)
    expected = teacher_forced(model, inputs, tokens, static(model))
    sparq.patch(model, **SPARSE)
    cache = static(model)
    cache.early_initialization(2, 2, 16, torch.float32, torch.device("cpu"))
    assert torch.equal(teacher_forced(model, inputs, tokens, cache), expected)
    assert sparq.report(model).total.dense_steps == {}


def test_steps_outside_of_no_grad_leave_no_graph_behind() -> None:
    model = sparq.patch(build(), **SPARSE)
    inputs, token = prompt(batch=1, padding=0), next_tokens(1, 1)
    expected = teacher_forced(model, inputs, token, static(model))
    cache = static(model)
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
    actual = model(token, past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(actual, expected[:, 0])
    totals = model.base_model._sparq_patch.current().stats.on_device[0]
    assert not totals.alpha.requires_grad and not cache.layers[0]._index.value_sum.requires_grad


def test_inference_mode_may_be_left_between_calls() -> None:
    """The cache is of the mode that it was made in, as stock; the counters outlive it."""
    inputs, model = prompt(), sparq.patch(build(), **SPARSE)
    with torch.inference_mode():
        expected = generate(model, inputs, cache_implementation="static")
    assert generate(model, inputs, cache_implementation="static") == expected
    assert sparq.report(model).total.sparse_steps == 2 * 3 * 11


def test_an_offloaded_static_cache_is_dense_with_one_warning() -> None:
    model = build()
    cache = static(model)
    stats, keys = Stats(), torch.zeros(1, 2, SIZE, 16)
    cache.update(keys, keys, 0)
    cache.offloading = True  # what makes one needs a GPU
    upgrade(cache)
    assert all(type(layer) is StaticLayer for layer in cache.layers)
    with pytest.warns(UserWarning, match="offloaded") as caught:
        for _ in range(2):
            step = Step(cache, SparqConfig(min_length=0, k=12), stats)
            sparq_attention("sdpa", attention_module(), keys[:, :, :1], keys, keys, None, sparq_step=step)
    assert len(caught) == 1
    assert stats.layers[0].dense_steps == {"an offloaded cache cannot be read sparsely": 2}


def test_normal_use_is_silent() -> None:
    model = sparq.patch(build("gemma2"), **SPARSE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(model, prompt(), cache_implementation="static")


@torch.no_grad()
@pytest.mark.parametrize("visible", [True, False])
def test_a_chunk_whose_mask_is_not_causal_is_dense(visible: bool) -> None:
    """A later token that an earlier one sees, or drafts side by side."""
    outputs = []
    for model in (sparq.patch(build(), **SPARSE), build()):
        cache = static(model)
        model(**prompt(batch=1, padding=0), past_key_values=cache)
        mask = torch.zeros(1, 1, 2, SIZE, dtype=torch.bool)
        mask[..., 0, :41] = mask[..., 1, :42] = True
        mask[(0, 0, 0, 41) if visible else (0, 0, 1, 40)] = visible
        outputs.append(model(next_tokens(1, 2), attention_mask=mask, past_key_values=cache).logits)
        if model.config._attn_implementation == "sparq":
            assert sparq.report(model).total.dense_steps == {"attention mask that is not causal": 3}
    torch.testing.assert_close(*outputs)


def test_initialised_early_and_first_used_in_inference_mode() -> None:
    model, tokens = sparq.patch(build(), **SPARSE), next_tokens(1, 2)
    cache = static(model)
    cache.early_initialization(1, 2, 16, torch.float32, torch.device("cpu"))
    with torch.inference_mode():
        model(**prompt(batch=1, padding=0), past_key_values=cache)
    with torch.no_grad():
        actual = [model(tokens[:, i : i + 1], past_key_values=cache).logits[:, -1] for i in range(2)]
    expected = teacher_forced(model, prompt(batch=1, padding=0), tokens, static(model))
    torch.testing.assert_close(torch.stack(actual, 1), expected)


@torch.inference_mode()
def test_a_cache_that_stock_has_filled_in_inference_mode_is_followed() -> None:
    """Of the tensors that it was given PyTorch counts no writes."""
    stock, token = build(), next_tokens(1, 1)
    cache = static(stock)
    stock(**prompt(batch=1, padding=0), past_key_values=cache)
    model = sparq.patch(stock, **SPARSE)
    model(token, past_key_values=cache)
    for layer in cache.layers:
        layer.keys[:, :, 3:20] = layer.keys[:, :, 4:21].clone()
    fresh = copy.deepcopy(cache)
    for layer in fresh.layers:
        layer._drop_index()
    torch.testing.assert_close(model(token, past_key_values=cache).logits, model(token, past_key_values=fresh).logits)


@torch.no_grad()
def test_reset_after_a_batch_of_another_size_was_assigned() -> None:
    model = sparq.patch(build(), **SPARSE)
    cache = static(model)
    expected = teacher_forced(model, prompt(), next_tokens(), cache)
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:1].clone(), layer.values[:1].clone()
    cache.reset()
    one = {name: tensor[:1] for name, tensor in prompt().items()}
    actual = teacher_forced(model, one, next_tokens()[:1], cache)
    torch.testing.assert_close(actual, expected[:1], rtol=1e-4, atol=1e-4)
