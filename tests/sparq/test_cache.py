"""SparQ's cache layers against transformers' own and an index computed from scratch, after every operation."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from sparq_kernels import BLOCK
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticSlidingWindowLayer

from sparq.cache import CAPACITY_STEP, SparqLayer, room_to_grow, upgrade
from sparq.static_cache import SparqStaticLayer
from tests.sparq.caches import (
    CODED,
    FIXED,
    FIXED_CODED,
    GROWING,
    HEAD_DIM,
    HEADS,
    assign,
    check,
    filled,
    held_by,
    index,
    is_fixed,
    made,
    on_either_cache,
    on_either_layer,
    pair,
    states,
    static,
)
from tests.sparq.tiny import build, prompt


def empty(layer: DynamicLayer) -> None:
    if type(layer) is DynamicLayer:
        layer.__init__()  # its own `reset` has left zeros of the same length until transformers 5.18
    else:
        layer.reset()


OPERATIONS: dict[str, Callable] = {
    "nothing": lambda layer: None,
    "update one": lambda layer: layer.update(*states(1, layer.keys.shape[0], seed=1)),
    "update many": lambda layer: layer.update(*states(700, layer.keys.shape[0], seed=1)),
    "crop a few": lambda layer: layer.crop(-3),
    "crop one": lambda layer: layer.crop(-1),
    "crop most": lambda layer: layer.crop(-290),
    "crop all": lambda layer: layer.crop(-300),
    "crop nothing": lambda layer: layer.crop(0),
    "reorder_cache": lambda layer: layer.reorder_cache(torch.tensor([1, 1])),
    "reset": lambda layer: empty(layer),
    "reset and one": lambda layer: (empty(layer), layer.update(*states(1, seed=1))),
    "reset and many": lambda layer: (empty(layer), layer.update(*states(90, seed=1))),
    "offload": lambda layer: layer.offload(),
    "offload and prefetch": lambda layer: (layer.offload(), layer.prefetch()),
    "assignment": lambda layer: assign(layer, lambda t: t.roll(1, 2)),
    "assignment, values first": lambda layer: assign(layer, lambda t: t.roll(1, 2), values_first=True),
    "assignment of one row": lambda layer: assign(layer, lambda t: t[:1]),
    "assignment of more rows": lambda layer: assign(layer, lambda t: t.repeat_interleave(3, 0)),
    "assignment of the same": lambda layer: assign(layer, lambda t: t),
    "assignment of keys alone": lambda layer: setattr(layer, "keys", layer.keys.roll(1, 2)),
    "assignment of values alone": lambda layer: setattr(layer, "values", layer.values.roll(1, 2)),
    "write into keys": lambda layer: layer.keys[:, :, 9:12].fill_(3.0),
    "write into values": lambda layer: layer.values.mul_(2),
    "write under no_grad": lambda layer: torch.no_grad()(layer.keys.neg_)(),
    "write in inference mode": lambda layer: torch.inference_mode()(layer.values.neg_)(),
    "write through an assigned tensor": lambda layer: write_through_assigned(layer),
    "write, one, write": lambda layer: (layer.keys.neg_(), layer.update(*states(1)), layer.values[:, :, 20].zero_()),
}
OPERATIONS_WHERE_STORAGE_GROWS: dict[str, Callable] = {
    "batch_repeat_interleave": lambda layer: layer.batch_repeat_interleave(3),
    "batch_select_indices": lambda layer: layer.batch_select_indices(torch.tensor([1])),
    "batch_select_indices by a list": lambda layer: layer.batch_select_indices([1, 0]),
    "batch_select_indices by a mask": lambda layer: layer.batch_select_indices(torch.tensor([False, True])),
    "assignment of fewer": lambda layer: assign(layer, lambda t: t[:, :, -200:]),
    "assignment of fewer, values first": lambda layer: assign(layer, lambda t: t[:, :, -200:], values_first=True),
    "assignment of more": lambda layer: assign(layer, lambda t: torch.cat([t, t[:, :, :90]], 2)),
    "assignment of more, values first": lambda layer: assign(
        layer, lambda t: torch.cat([t, t[:, :, :90]], 2), values_first=True
    ),
    "assignment of a selection": lambda layer: assign(layer, lambda t: t.index_select(2, KEPT)),
}
OPERATIONS_WHERE_IT_IS_FIXED: dict[str, Callable] = {
    "reset and write": lambda layer: (
        layer.reset(),
        layer.values[:, :, :1].zero_(),
        layer.update(*states(90, seed=1)),
    ),
}
KEPT = torch.tensor([0, 1, 2, 3, *range(150, 300)])  # a few of the first, and the newest


def write_through_assigned(layer: DynamicLayer) -> None:
    keys, values = layer.keys.clone(), layer.values.clone()
    layer.keys, layer.values = keys, values
    if isinstance(layer, (SparqLayer, SparqStaticLayer)):
        index(layer)
    keys.mul_(2), values[:, :, 5:].neg_()


@pytest.mark.parametrize("indexed", [False, True], ids=["no index yet", "indexed"])
@pytest.mark.parametrize(
    ("kind", "operation"),
    [
        pytest.param(kind, operation, id=f"{name}-{operation}")
        for (name, kind), others in (
            (("growing", GROWING), OPERATIONS_WHERE_STORAGE_GROWS),
            (("growing coded", CODED), OPERATIONS_WHERE_STORAGE_GROWS),
            (("fixed", FIXED), OPERATIONS_WHERE_IT_IS_FIXED),
            (("fixed coded", FIXED_CODED), OPERATIONS_WHERE_IT_IS_FIXED),
        )
        for operation in OPERATIONS | others
    ],
)
def test_operation(kind: tuple[type, type], operation: str, indexed: bool) -> None:
    layer, plain = pair(kind)
    if operation.startswith("crop") and not hasattr(plain, "crop"):
        pytest.skip("this transformers cannot crop a static layer")
    padding = {2: torch.tensor([0, 7]), 1: torch.tensor([7]), 6: torch.tensor([0, 0, 0, 7, 7, 7])}
    if indexed:
        index(layer, padding[2])
    for one in (layer, plain):
        (OPERATIONS | OPERATIONS_WHERE_STORAGE_GROWS | OPERATIONS_WHERE_IT_IS_FIXED)[operation](one)
    batch = plain.keys.shape[0] if plain.keys is not None else 2
    start = padding[batch] if plain.get_seq_length() > 7 else None
    if operation == "reorder_cache":
        check(layer, plain, torch.tensor([7, 7]))  # of the rows that were chosen; then the padding changes
    check(layer, plain, start)

    for seed in range(3):
        new = states(1, batch, seed=20 + seed)
        returned = layer.update(*new), plain.update(*new)
        assert torch.equal(returned[0][0], returned[1][0]) and torch.equal(returned[0][1], returned[1][1])
        if is_fixed(kind):  # a graph knows it by its address
            assert returned[0][0] is layer.keys and returned[0][1] is layer.values
        check(layer, plain, start)


@on_either_layer
def test_a_write_between_an_update_and_its_index(kind: tuple[type, type]) -> None:
    """The token has been appended to the index already when somebody changes it."""
    layer, plain = pair(kind)
    index(layer)
    for seed in range(3):
        for one in (layer, plain):
            keys, _ = one.update(*states(1, seed=seed))
            keys[:, :, 300 + seed].mul_(3)
            one.values[:, :, 7].zero_()
        check(layer, plain)


def test_a_write_through_an_older_view_is_found() -> None:
    layer = filled()
    older = layer.keys, layer.values
    layer.update(*states(1, seed=1))
    layer.index()
    for tensor in older:
        tensor[:, :, 11].fill_(5.0)
    own = DynamicLayer()
    own.update(layer.keys.clone(), layer.values.clone())
    check(layer, own)


@pytest.mark.parametrize("longer", [False, True])
@pytest.mark.parametrize("name", ["keys", "values"])
def test_keys_and_values_of_different_length_are_named(name: str, longer: bool) -> None:
    layer = filled()
    layer.index()
    length = 310 if longer else 200
    setattr(layer, name, torch.ones(2, HEADS, length, HEAD_DIM))
    held = layer.keys.clone(), layer.values.clone()
    message = f"same number of tokens, got {length if name == 'keys' else 300} and {300 if name == 'keys' else length}"
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            layer.update(*states(1, seed=1))
        assert torch.equal(layer.keys, held[0]) and torch.equal(layer.values, held[1])
    other = "values" if name == "keys" else "keys"
    setattr(layer, other, torch.zeros(2, HEADS, length, HEAD_DIM))
    own = DynamicLayer()
    own.update(layer.keys.clone(), layer.values.clone())
    for one in (layer, own):
        one.update(*states(1, seed=1))
    check(layer, own)


@pytest.mark.parametrize("kept", ["given by update", "read from the layer", "a slice"])
@pytest.mark.parametrize("tokens", [1, 5, 700])
def test_what_was_handed_out_never_changes(kept: str, tokens: int) -> None:
    layer, plain = SparqLayer(), DynamicLayer()
    views = layer.update(*states(240))
    plain.update(*states(240))
    if kept != "given by update":
        views = layer.keys, layer.values
    if kept == "a slice":
        views = tuple(t[:, :1, 200:] for t in views)
    before = [t.clone() for t in views]
    layer.index()
    for seed in range(2):
        for one in (layer, plain):
            one.crop(-4)
            one.update(*states(tokens, seed=seed + 1))
        check(layer, plain)
    assert all(torch.equal(t, old) for t, old in zip(views, before, strict=True))


def test_layers_that_share_tensors_go_their_own_ways() -> None:
    first, plains = filled(), [filled(cls=DynamicLayer) for _ in range(3)]
    second = SparqLayer()
    second.keys, second.values = first.keys, first.values
    second.lazy_initialization(first.keys, first.values)
    layers = (first, second, SparqLayer.adopt(first))
    for seed in range(3):
        for number, (layer, plain) in enumerate(zip(layers, plains, strict=True)):
            for one in (layer, plain):
                one.crop(-number)
                one.update(*states(2, seed=10 * number + seed))
        for layer, plain in zip(layers, plains, strict=True):
            check(layer, plain)


def test_a_rejected_draft_copies_nothing() -> None:
    layer, plain = filled(), filled(cls=DynamicLayer)
    layer.index()
    places = [layer._key_storage.data_ptr(), layer._value_storage.data_ptr()]
    for seed in range(5):
        for one in (layer, plain):
            one.update(*states(6, seed=seed))
            one.crop(-4)
        check(layer, plain)
        assert [layer._key_storage.data_ptr(), layer._value_storage.data_ptr()] == places


def test_crop_to_a_length_is_what_transformers_makes_of_it() -> None:
    """It was deprecated in 5.17 and has become an error since."""
    layer, plain = filled(), filled(cls=DynamicLayer)
    try:
        plain.crop(5)
    except ValueError as refused:
        with pytest.raises(ValueError) as error:
            layer.crop(5)
        assert str(error.value) == str(refused)
    else:
        layer.crop(5)
    check(layer, plain)


def test_operations_on_an_empty_layer_do_nothing() -> None:
    layer = SparqLayer()
    for operation in (
        lambda: layer.crop(-1),
        lambda: layer.reorder_cache(torch.tensor([0])),
        lambda: layer.batch_repeat_interleave(2),
        lambda: layer.batch_select_indices(torch.tensor([0])),
        layer.offload,
        layer.prefetch,
        layer.reset,
    ):
        operation()
        assert layer.get_seq_length() == 0 and layer.keys is None
    layer.update(*states(5))
    plain = DynamicLayer()
    plain.update(*states(5))
    check(layer, plain)


def test_batch_may_change_once_all_is_cropped() -> None:
    layer = filled(batch=2)
    layer.index()
    layer.crop(-300)
    layer.reorder_cache(torch.tensor([0, 1, 2, 3]))  # nothing is there to reorder, so nothing is wrong
    layer.update(*states(10, batch=3))
    plain = filled(10, batch=3, cls=DynamicLayer)
    check(layer, plain)


@pytest.mark.parametrize("wrong", [(3, HEADS, HEAD_DIM), (2, 1, HEAD_DIM), (2, HEADS, 8)])
def test_update_names_what_does_not_match(wrong: tuple[int, int, int]) -> None:
    batch, heads, head_dim = wrong
    layer = filled(10)
    with pytest.raises(ValueError, match="key_states"):
        layer.update(torch.zeros(batch, heads, 1, head_dim), torch.zeros(batch, heads, 1, head_dim))
    check(layer, filled(10, cls=DynamicLayer))


@torch.no_grad()
def test_growth_is_by_doubling_at_first() -> None:
    """Single tokens: each reallocation at least doubles the storage, so fewer positions are copied than are held."""
    layer, storages, indices = SparqLayer(), [], []
    tokens = 3000
    for step in range(tokens):
        key = torch.full((1, 1, 1, 2), float(step))
        layer.update(key, key)
        components, *_ = layer.index()
        if not storages or layer.keys.data_ptr() != storages[-1][0].data_ptr():
            storages.append((layer.keys, step))  # kept, or the allocator gives the same address again
        if not indices or components.data_ptr() != indices[-1][0].data_ptr():
            indices.append((components, step))
    assert torch.equal(layer.keys[0, 0, :, 0], torch.arange(float(tokens)))
    for grown, step in ((storages, CAPACITY_STEP), (indices, BLOCK)):
        assert 2 <= len(grown) <= 2 + math.log2(tokens / step)
        assert sum(copied for _, copied in grown) <= 2 * tokens
    held = (1 + 1 + 1) * 2 * 4 * 2 * tokens  # K, V, components; d = 2, four bytes, at most twice what is needed
    assert layer.allocated_bytes <= held


@pytest.mark.parametrize(
    ("device", "length", "room"),
    [
        ("cpu", 300, 300),
        ("cpu", 2048, 2048),
        ("cpu", 8000, 2048),
        ("cpu", 16384, 4096),
        ("cpu", 131072, 32768),
        ("cuda", 300, 2048),
        ("cuda", 16384, 2048),
        ("cuda", 131072, 16384),
    ],
)
def test_room_to_grow(device: str, length: int, room: int) -> None:
    assert room_to_grow(length, torch.device(device)) == room


@torch.no_grad()
@pytest.mark.parametrize(
    ("tokens", "most"), [(65536, 65536 + 8192 + 256), (131072, 131072 * 9 // 8 + 256), (300, 2560)]
)
def test_elsewhere_growth_is_by_an_eighth(tokens: int, most: int) -> None:
    """Of Llama-3-8B's 17 GB at 128k doubling would make 51; `meta` stands for any device that is not the CPU."""
    layer = SparqLayer()
    prompt, token = (torch.empty(1, 1, n, 2, dtype=torch.float16, device="meta") for n in (tokens, 1))
    layer.update(prompt, prompt)
    keys, _ = layer.update(token, token)
    assert keys.shape[2] == tokens + 1 and layer._key_storage is not None
    assert tokens < layer._key_storage.shape[2] <= most
    room = layer._key_storage.shape[2]
    grown = 0
    for _ in range(3000):
        layer.update(token, token)
        grown, room = grown + (layer._key_storage.shape[2] != room), layer._key_storage.shape[2]
    assert grown <= 3000 / max(BLOCK, tokens // 8) + 1


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1000, 5000, 13000])
def test_after_a_growth_tokens_go_into_both_copies_at_once(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU's storage grows: one kernel a token, but for the first one after each growth."""
    monkeypatch.setattr("sparq.cache.room_to_grow", lambda length, device: max(BLOCK, length // 8))
    layer, late, grown, capacity = filled(tokens), 0, 0, 0
    layer.index()
    for _ in range(3 * BLOCK):
        layer.update(*states(1))
        late += layer._index.unindexed
        grown, capacity = grown + (layer._key_storage.shape[2] != capacity), layer._key_storage.shape[2]
        layer.index()
    assert late <= grown <= 4


def test_a_long_prompt_takes_no_more_than_it_needs() -> None:
    layer = filled(1000)
    layer.index()
    per_position = 2 * HEADS * HEAD_DIM * 4
    rows = 2 * -(-1000 // CAPACITY_STEP) * CAPACITY_STEP * per_position
    components = -(-1000 // BLOCK) * BLOCK * per_position
    assert layer.allocated_bytes == rows + components + per_position
    assert filled(1000).allocated_bytes == rows  # the index is made when it is asked for


def test_adopted_tensors_are_read_and_never_written() -> None:
    plain = filled(300, cls=DynamicLayer)
    keys, values = plain.keys, plain.values
    before = keys.clone(), values.clone()
    for meddle in (
        lambda layer: None,
        lambda layer: layer.crop(-5),
        lambda layer: (layer.crop(-5), layer.offload()),
        lambda layer: (layer.crop(-5), layer.offload(), layer.prefetch()),
        lambda layer: (layer.crop(-5), layer.batch_repeat_interleave(1)),
        lambda layer: (layer.crop(-5), layer.reorder_cache(torch.tensor([0, 1]))),
    ):
        layer = SparqLayer.adopt(plain)
        assert layer.keys.data_ptr() == keys.data_ptr()  # nothing is copied until the layer grows
        meddle(layer)
        own = filled(layer.get_seq_length(), cls=DynamicLayer)
        own.keys, own.values = keys[:, :, : layer.get_seq_length()], values[:, :, : layer.get_seq_length()]
        for one in (layer, own):
            one.update(*states(3, seed=9))
        check(layer, own, torch.tensor([0, 7]))
        assert torch.equal(keys, before[0]) and torch.equal(values, before[1])


@on_either_cache
def test_upgrade_takes_plain_layers_only(make_cache: Callable) -> None:
    cache = make_cache(build("gemma3"))
    upgrade(cache)
    is_static = make_cache is static
    sliding, full = (
        (StaticSlidingWindowLayer, SparqStaticLayer) if is_static else (DynamicSlidingWindowLayer, SparqLayer)
    )
    assert [type(layer) for layer in cache.layers] == [sliding, full, sliding]
    assert cache.is_compileable == is_static
    same = list(cache.layers)
    upgrade(cache)
    assert all(a is b for a, b in zip(cache.layers, same, strict=True))


def test_upgrade_of_a_cache_that_is_filled() -> None:
    model, inputs = build(), prompt()
    with torch.no_grad():
        cache = model(**inputs).past_key_values
        plain = [copy.copy(layer) for layer in cache.layers]
        upgrade(cache)
        for layer, other in zip(cache.layers, plain, strict=True):
            assert type(layer) is SparqLayer and (layer.dtype, layer.device) == (other.keys.dtype, other.device)
            check(layer, other, torch.tensor([0, 9]))
        assert cache.get_seq_length() == 40 and cache.is_croppable and not cache.is_compileable
        cache.crop(-4)
        assert cache.get_seq_length() == 36


def test_upgrade_leaves_layers_of_other_types() -> None:
    class Quantized(DynamicLayer):  # as transformers' quantized layers, which hold more than keys and values
        pass

    layer = Quantized()
    cache = DynamicCache()
    cache.layers.append(layer)
    upgrade(cache)
    assert cache.layers[0] is layer


@on_either_layer
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_stand_alone(how: str, kind: tuple[type, type]) -> None:
    (layer, plain), start = pair(kind), torch.tensor([0, 7])
    index(layer, start)
    if how == "deepcopy":
        other = copy.deepcopy(layer)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(layer))
    else:
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    other_plain = copy.deepcopy(plain)
    layer.update(*states(1, seed=3)), plain.update(*states(1, seed=3))
    other.update(*states(1, seed=4)), other_plain.update(*states(1, seed=4))
    check(layer, plain, start)
    check(other, other_plain, start)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("cropped", [0, 250])
def test_copies_carry_the_tokens_and_nothing_else(how: str, cropped: int) -> None:
    layer, start = filled(), torch.tensor([0, 7])
    layer.index(start)
    layer.crop(-cropped)
    length = 300 - cropped
    if how == "pickle":
        written = pickle.dumps(layer)
        assert len(written) < 2 * 2 * HEADS * length * HEAD_DIM * 4 + 4000
        other = pickle.loads(written)
    else:
        other = copy.deepcopy(layer)
    used = 2 * layer.keys.numel() * layer.keys.element_size()
    assert other.allocated_bytes == used < layer.allocated_bytes
    assert other.keys.untyped_storage().nbytes() == used / 2
    assert other.index(start).value_sum.data_ptr() != layer.index(start).value_sum.data_ptr()
    for one in (layer, other):
        plain = filled(cls=DynamicLayer)
        plain.crop(-cropped)
        for own in (one, plain):
            own.update(*states(1, seed=3))
        check(one, plain, start)


def test_a_copy_of_an_adopted_layer_is_its_own() -> None:
    plain = filled(cls=DynamicLayer)
    other = copy.deepcopy(SparqLayer.adopt(plain))
    assert other.keys.data_ptr() != plain.keys.data_ptr()
    check(other, plain)
    assert copy.deepcopy(SparqLayer()).keys is None


def test_dynamic_cache_can_be_made_from_its_own_contents() -> None:
    cache = DynamicCache()
    cache.update(*states(30), 0)
    upgrade(cache)
    again = DynamicCache(list(cache))
    assert torch.equal(again.layers[0].keys, cache.layers[0].keys)


class Placed(torch.Tensor):
    """A tensor that says it is wherever it was moved to: this machine has one device only."""

    place = torch.device("cpu")

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.place

    def to(self, device: torch.device | str, **kwargs) -> Placed:  # type: ignore[override]
        moved = torch.Tensor.clone(self).as_subclass(Placed)
        moved.place = torch.device(device)
        return moved


@on_either_layer
def test_offload_and_prefetch_move_all_that_is_held(kind: tuple[type, type]) -> None:
    layer, plain = pair(kind)
    start, mask = torch.tensor([0, 7]), torch.ones(2, 300, dtype=torch.bool)
    index(layer, start, mask)
    layer.device = torch.device("cuda:0")
    held = held_by(layer)
    assert len(held) == (5 if is_fixed(kind) else 6) + (
        kind in (CODED, FIXED_CODED)
    )  # `start` is in the mask where storage is fixed
    for owner, name in held:
        setattr(owner, name, getattr(owner, name).as_subclass(Placed).to("cuda:0"))
    layer._note_contents()

    def tensors() -> list[Tensor]:
        return [getattr(owner, name) for owner, name in held]

    layer.offload()
    assert {str(tensor.device) for tensor in tensors()} == {"cpu"}
    layer.prefetch()
    there = tensors()
    assert {str(tensor.device) for tensor in there} == {"cuda:0"}
    layer.prefetch()
    assert all(a is b for a, b in zip(tensors(), there, strict=True))  # all is where it belongs

    for owner, name in held:
        setattr(owner, name, getattr(owner, name).as_subclass(torch.Tensor))
    layer._note_contents()
    check(layer, plain, start, mask)


@on_either_layer
def test_made_in_inference_mode_and_used_outside(kind: tuple[type, type]) -> None:
    layer, plain = made(kind[0]), filled(cls=kind[1])
    with torch.inference_mode():
        layer.update(*states(300))
        index(layer)
    for seed in range(2):
        layer.update(*states(1, seed=seed)), plain.update(*states(1, seed=seed))
        check(layer, plain)
    with torch.inference_mode():
        layer.update(*states(1, seed=7)), plain.update(*states(1, seed=7))
        check(layer, plain)
    if hasattr(plain, "crop"):  # a static layer has it in newer versions of transformers
        layer.crop(-2), plain.crop(-2)
        check(layer, plain)


class Layers(RuleBasedStateMachine):
    """Any sequence of operations leaves what `DynamicLayer` holds, and an index that can be made from it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.plain = SparqLayer(), DynamicLayer()
        self.batch, self.seed = 2, 0
        self.first_valid = [0, 0]
        self.holes: list[set[int]] = [set(), set()]
        self.kept: list[tuple[Tensor, Tensor]] = []  # what others hold, and what it was

    def both(self, operation: Callable) -> None:
        for layer in (self.layer, self.plain):
            operation(layer)

    def filled(self) -> bool:
        return self.plain.get_seq_length() > 0

    @rule(length=st.sampled_from([1, 1, 1, 2, 5, BLOCK - 1, BLOCK, 2 * BLOCK + 3]))
    def update(self, length: int) -> None:
        self.seed += 1
        self.both(lambda layer: layer.update(*states(length, self.batch, self.seed)))

    @precondition(filled)
    @rule(share=st.floats(0, 1))
    def crop(self, share: float) -> None:
        tokens = int(share * (self.plain.get_seq_length() - 1))
        self.both(lambda layer: layer.crop(-tokens))

    @precondition(filled)
    @rule()
    def crop_one(self) -> None:
        if self.plain.get_seq_length() > 1:
            self.both(lambda layer: layer.crop(-1))

    def select(self, rows: list[int]) -> None:
        self.first_valid = [self.first_valid[row] for row in rows]
        self.holes = [self.holes[row] for row in rows]
        self.batch = len(rows)

    @precondition(filled)
    @rule(data=st.data())
    def reorder_cache(self, data: st.DataObject) -> None:
        rows = data.draw(st.lists(st.integers(0, self.batch - 1), min_size=self.batch, max_size=self.batch))
        self.both(lambda layer: layer.reorder_cache(torch.tensor(rows)))
        self.select(rows)

    @precondition(filled)
    @rule(data=st.data())
    def batch_select_indices(self, data: st.DataObject) -> None:
        rows = data.draw(st.lists(st.integers(0, self.batch - 1), min_size=1, max_size=3))
        self.both(lambda layer: layer.batch_select_indices(torch.tensor(rows)))
        self.select(rows)

    @precondition(lambda self: self.filled() and self.batch <= 2)
    @rule(repeats=st.integers(1, 2))
    def batch_repeat_interleave(self, repeats: int) -> None:
        self.both(lambda layer: layer.batch_repeat_interleave(repeats))
        self.select([row for row in range(self.batch) for _ in range(repeats)])

    @rule()
    def reset(self) -> None:
        self.both(empty)

    @rule(prefetch=st.booleans())
    def offload(self, prefetch: bool) -> None:
        self.both(lambda layer: (layer.offload(), prefetch and layer.prefetch()))

    @rule(data=st.data())
    def change_validity(self, data: st.DataObject) -> None:
        self.first_valid = data.draw(st.lists(st.integers(0, 9), min_size=self.batch, max_size=self.batch))
        holes = st.sets(st.integers(0, 600), max_size=2)
        self.holes = data.draw(st.lists(holes, min_size=self.batch, max_size=self.batch))

    @precondition(filled)
    @rule()
    def adopt(self) -> None:
        self.layer = SparqLayer.adopt(self.plain)
        self.keep()
        for name in ("keys", "values"):  # what is written into one of the two is not written into the other
            setattr(self.plain, name, getattr(self.plain, name).clone())

    @precondition(filled)
    @rule()
    def keep(self) -> None:
        self.kept += [(tensor, tensor.clone()) for tensor in (self.layer.keys, self.layer.values)]

    @rule(draft=st.integers(1, 5), rejected=st.integers(1, 5), kept=st.booleans())
    def reject(self, draft: int, rejected: int, kept: bool) -> None:
        self.update(draft)
        if kept:
            self.keep()
        self.both(lambda layer: layer.crop(-min(rejected, draft)))
        self.update(1)

    @precondition(filled)
    @rule(data=st.data(), values_first=st.booleans())
    def assign(self, data: st.DataObject, values_first: bool) -> None:
        """Tokens in any order and number, some of them twice, of any rows."""
        length = self.plain.get_seq_length()
        tokens = torch.tensor(data.draw(st.lists(st.integers(0, length - 1), min_size=1, max_size=12)))
        if data.draw(st.booleans()):
            tokens = torch.cat([torch.arange(length), tokens])
        rows = data.draw(st.lists(st.integers(0, self.batch - 1), min_size=1, max_size=3))
        self.both(lambda layer: assign(layer, lambda t: t[rows].index_select(2, tokens), values_first))
        self.select(rows)

    @precondition(filled)
    @rule(
        name=st.sampled_from(["keys", "values"]),
        share=st.floats(0, 1),
        mode=st.sampled_from([torch.no_grad, torch.enable_grad, torch.inference_mode]),
    )
    def write(self, name: str, share: float, mode: type) -> None:
        self.check_kept()
        self.kept.clear()  # others may hold what is written into
        self.sparse_step()  # or there is often no index to go stale
        position = int(share * (self.plain.get_seq_length() - 1))
        with mode():
            self.both(lambda layer: getattr(layer, name)[:, :, position:].mul_(-1.5))

    def check_kept(self) -> None:
        assert all(torch.equal(tensor, before) for tensor, before in self.kept)

    @rule()
    def copied(self) -> None:
        self.layer = copy.deepcopy(self.layer)

    @rule()
    def sparse_step(self) -> None:
        length = self.plain.get_seq_length()
        start = torch.tensor(self.first_valid) if any(self.first_valid) else None
        mask = None
        if any(self.holes):
            mask = torch.ones(self.batch, length, dtype=torch.bool)
            for row, holes in enumerate(self.holes):
                mask[row, [hole for hole in holes if hole < length]] = False
        check(self.layer, self.plain, start, mask)

    @invariant()
    def same_contents(self) -> None:
        assert self.layer.get_seq_length() == self.plain.get_seq_length()
        if self.filled():
            assert torch.equal(self.layer.keys, self.plain.keys)
            assert torch.equal(self.layer.values, self.plain.values)

    def teardown(self) -> None:
        self.sparse_step()
        self.check_kept()


Layers.TestCase.settings = settings(max_examples=100, stateful_step_count=25, deadline=None, derandomize=True)
TestLayers = Layers.TestCase
