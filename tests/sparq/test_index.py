"""The index of a layer: what is read for it, and that its sum is of the valid positions, in storage of either kind."""

from __future__ import annotations

import pytest
import torch
from sparq_kernels import BLOCK, layout, read_components
from torch import Tensor

import sparq.index
from sparq.cache import SparqLayer
from tests.sparq.caches import (
    FIXED,
    GROWING,
    HEAD_DIM,
    HEADS,
    assign,
    check,
    filled,
    held_by,
    index,
    made,
    on_either_layer,
    pair,
    states,
)


def test_index_reads_only_what_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    written, summed = [], []
    write, sum_values = layout.write_components, sparq.index._sum

    def watched_write(components: Tensor, key: Tensor, position: int) -> None:
        written.append((position, position + key.shape[2]))
        write(components, key, position)

    def watched_sum(values: Tensor, begin: int, end: int, *args) -> Tensor:
        summed.append((begin, end))
        return sum_values(values, begin, end, *args)

    monkeypatch.setattr(layout, "write_components", watched_write)
    monkeypatch.setattr(sparq.index, "_sum", watched_sum)
    layer, start = filled(500), torch.tensor([0, 7])
    assert not written and not summed
    layer.index(start)
    layer.index(start)
    assert written == summed == [(0, 500)]
    layer.update(*states(1))
    assert layer._index.unindexed == layer._index.unsummed == 0  # one token is appended to everything at once
    layer.index(start)
    assert written == summed == [(0, 500)]
    layer.reorder_cache(torch.tensor([1, 0]))
    layer.index(start.flip(0))
    assert written == summed == [(0, 500)]
    layer.crop(-3)
    assert summed[1:] == [(498, 501)]  # taken back
    layer.update(*states(2))
    layer.index(start.flip(0))
    assert written[1:] == [(498, 500)] and summed[2:] == [(498, 500)]


@on_either_layer
def test_padding_may_hold_anything(kind: tuple[type, type]) -> None:
    keys, values = states(20)
    keys[1, :, :7] = values[1, :, :7] = torch.nan
    values[0, :, 4] = torch.inf
    layer, plain = made(kind[0]), made(kind[1])
    start, mask = torch.tensor([0, 7]), torch.ones(2, 20, dtype=torch.bool)
    mask[0, 4] = False
    new = keys, values
    for seed in range(2):
        layer.update(*new), plain.update(*new)
        check(layer, plain, start, mask)
        new = states(1, seed=5 + seed)
        mask = torch.cat([mask, mask.new_ones(2, 1)], 1)


def test_cropping_what_was_infinite_leaves_a_finite_sum() -> None:
    keys, values = states(20)
    values[:, :, 18] = torch.inf
    layer = SparqLayer()
    layer.update(keys, values)
    assert layer.index().value_sum.isinf().all()
    layer.crop(-3)
    torch.testing.assert_close(layer.index().value_sum, values[:, :, :17].sum(2))


@on_either_layer
def test_sum_is_kept_in_float32(kind: tuple[type, type]) -> None:
    """bfloat16 has no 1003: it goes from 1000 to 1004, and a sum of ones stops growing long before."""
    ones = torch.ones(1, HEADS, 1003, HEAD_DIM, dtype=torch.bfloat16)
    for start, left_out in ((None, 0), (torch.tensor([2]), 2)):
        layer = made(kind[0])
        layer.update(ones, ones)
        assert (index(layer, start).value_sum == 1003 - left_out).all()
        for _ in range(5):
            layer.update(ones[:, :, :1], ones[:, :, :1])
            index(layer, start)
        indexed = index(layer, start)
        assert (indexed.value_sum == 1008 - left_out).all()
        assert (indexed.components if indexed.ranges is None else indexed.ranges).dtype == torch.bfloat16


def test_validity_moves_with_its_rows() -> None:
    """A crop takes back what was summed by the mask of that time, in the rows of now."""
    layer, plain = pair(GROWING, 20)
    start, mask = torch.tensor([7, 0]), torch.ones(2, 20, dtype=torch.bool)
    mask[0, 18] = mask[1, 17] = False
    layer.index(start, mask)
    for one in (layer, plain):
        one.reorder_cache(torch.tensor([1, 0]))
        one.crop(-3)
    check(layer, plain, start.flip(0), mask.flip(0)[:, :17])


@on_either_layer
def test_validity_that_changes_between_steps(kind: tuple[type, type]) -> None:
    layer, plain = pair(kind, 20)
    holes = torch.ones(2, 20, dtype=torch.bool)
    holes[0, 3] = False
    others = holes.clone()
    others[1, 11] = False
    for new, (start, mask) in enumerate(
        (
            (None, None),
            (torch.tensor([0, 7]), None),
            (torch.tensor([2, 7]), None),
            (None, holes),
            (None, others),
            (None, torch.ones(2, 20, dtype=torch.bool)),
            (torch.tensor([2, 7]), others),
            (None, None),
        )
    ):
        for more in (0, 1):  # at once, and when a token has come
            if more:
                layer.update(*states(1, seed=new)), plain.update(*states(1, seed=new))
            all_of_it = None if mask is None else torch.nn.functional.pad(mask, (0, new + more), value=True)
            check(layer, plain, start, all_of_it)


def refuse_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layer takes its tensors for a GPU's, from which nothing may be read back."""

    def refused(*args) -> None:
        raise AssertionError("read back from the device")

    monkeypatch.setattr(sparq.index, "can_read", lambda tensor: False)
    monkeypatch.setattr(torch, "equal", refused)
    for name in ("__bool__", "item", "tolist", "__int__", "__float__", "__index__", "numpy"):
        monkeypatch.setattr(Tensor, name, refused)


def holes(length: int) -> Tensor:
    """[2, length] bool: some padding, a hole, and a new token that is invalid in one row."""
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[0, :5] = mask[1, 9] = mask[1, 21:22] = False
    return mask


@pytest.mark.parametrize("tokens", [1, 3])
def test_elsewhere_nothing_is_read_back(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """New tokens are in the sum as their mask says, and as a layer has them that may look."""
    layer, looking = filled(20), filled(20)
    results: list[list] = [[], []]
    for own, answers in ((looking, results[0]), (layer, results[1])):
        with monkeypatch.context() as patched:
            if own is layer:
                refuse_reading(patched)
            for step in range(6):
                length = 20 + step * tokens
                if step:
                    own.update(*states(tokens, seed=step))
                answers.append(own.index(None, holes(length)))
            assert torch.is_tensor(own.sum_before(1))
    for known, blind in zip(*results, strict=True):
        assert known.mean_is_stale is None and (blind.mean_is_stale is None or not blind.mean_is_stale)
        torch.testing.assert_close(blind.value_sum, known.value_sum, rtol=0, atol=0)
    assert all(answer.mean_is_stale is not None for answer in results[1][1:])
    assert torch.equal(layer.sum_before(1), looking.sum_before(1))
    length = layer.get_seq_length()
    assert torch.equal(read_components(layer.index(None, holes(length)).components, length), layer.keys)


@pytest.mark.parametrize("before", ["nothing", "start", "mask"])
@pytest.mark.parametrize("now", ["nothing", "start", "mask"])
def test_elsewhere_a_mask_that_changes_is_noted_until_the_sum_is_made_anew(
    before: str, now: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def validity(which: str, length: int) -> tuple[Tensor | None, Tensor | None]:
        return torch.tensor([0, 7]) if which == "start" else None, holes(length) if which == "mask" else None

    layer, doubts = filled(20), []
    with monkeypatch.context() as patched:
        refuse_reading(patched)
        layer.index(*validity(before, 20))
        for length in (21, 22):
            layer.update(*states(1))
            doubts.append(layer.index(*validity(now, length)).mean_is_stale)
        layer.reorder_cache(torch.tensor([1, 0]))
    if before == now:
        assert all(doubt is None or not doubt for doubt in doubts)
    else:
        assert all(bool(doubt) for doubt in doubts)
        assert layer._index.stale.tolist() == [True, "mask" in (before, now)]
    assign(layer, lambda t: t)
    assert layer.index(*validity(now, 22)).mean_is_stale is None


@on_either_layer
def test_a_new_token_that_is_padding(kind: tuple[type, type]) -> None:
    """A padded prompt fed one token at a time: what is valid is known of each only when it comes."""
    layer, plain = made(kind[0]), made(kind[1])
    for step in range(10):
        keys, values = states(1, seed=step)
        if step < 5:
            values[1] = torch.nan
        layer.update(keys, values), plain.update(keys, values)
        mask = torch.ones(2, step + 1, dtype=torch.bool)
        mask[1, :5] = False
        check(layer, plain, mask=mask)


@on_either_layer
def test_more_than_a_block_of_positions(kind: tuple[type, type]) -> None:
    layer, plain = pair(kind, BLOCK - 2, BLOCK + 50)
    for seed in range(4):
        check(layer, plain)
        layer.update(*states(1, seed=seed)), plain.update(*states(1, seed=seed))
    check(layer, plain)


def test_of_fixed_size_single_tokens_extend_it_and_many_make_it_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, _ = pair(FIXED, 20)
    index(layer)
    anew, real = [], sparq.index._sum
    monkeypatch.setattr(sparq.index, "_sum", lambda *args: anew.append(1) or real(*args))

    def tensors() -> list[Tensor]:
        return [layer.cumulative_length, *(getattr(owner, name) for owner, name in held_by(layer))]

    held = tensors()
    for length in range(21, 30):
        layer.update(*states(1, seed=length))
        index(layer)
    assert not anew
    layer.update(*states(2))
    index(layer)
    assert anew == [1]
    layer.reset()
    # a captured graph knows these by their address
    assert len(held) == 6 and all(a is b for a, b in zip(held, tensors(), strict=True))


def test_of_fixed_size_a_single_position_that_changes_makes_the_mean_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is read back, as on a GPU."""
    layer, _ = pair(FIXED, 20)
    index(layer)
    monkeypatch.setattr("sparq.index.can_read", lambda device: False)
    doubt = index(layer).mean_is_stale
    assert doubt is not None and not doubt
    changed = torch.ones(2, 20, dtype=torch.bool)
    changed[1, 3] = False
    doubt = index(layer, mask=changed).mean_is_stale
    assert doubt is not None and doubt


def test_of_fixed_size_it_is_of_nothing_after_a_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is read back, as on a GPU: no comparison of masks makes up for what it would still hold."""
    layer, plain = pair(FIXED, 20)
    index(layer)
    monkeypatch.setattr("sparq.index.can_read", lambda device: False)
    for one in (layer, plain):
        one.reset()
        one.update(*states(1, seed=1))
    indexed = index(layer)
    assert indexed.mean_is_stale is not None and not indexed.mean_is_stale
    torch.testing.assert_close(indexed.value_sum, plain.values[:, :, 0])
