"""Kept conversations: the longest common beginning is found, nothing stale is ever handed out, memory is bounded."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from sparq import branches, held, patch
from sparq.serving.conversations import SMALLEST_SHARE, Conversation, Conversations
from tests.sparq.tiny import build

PLENTY = 1 << 30


@pytest.fixture(scope="module", params=["llama", "gemma3", "gemma4"])
def model(request):
    """The second has layers with a sliding window, the third layers that share K and V."""
    return patch(build(request.param), ratio=8, min_length=0, k=16, r=8)


@pytest.fixture(scope="module")
def llama():
    return patch(build("llama"), ratio=8, min_length=0, k=16, r=8)


def read(model, conversation: Conversation, tokens: list[int]) -> Conversation:
    """Go on to all of `tokens`, as the prompt of `generate` does."""
    branches.read(model, tokens, conversation.cache, do_sample=False)
    return Conversation(list(tokens), conversation.cache)


def said(model, tokens: list[int], conversations: Conversations) -> Conversation:
    conversation = read(model, conversations.take(tokens), tokens)
    conversations.keep(conversation)
    return conversation


def tokens(seed: int, length: int) -> list[int]:
    return torch.randint(3, 90, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def assert_holds(cache: DynamicCache, model, expected: list[int]) -> None:
    """What a new cache would hold after these tokens."""
    fresh = read(model, Conversation([], DynamicCache(config=model.config)), expected).cache
    assert cache.get_seq_length() == len(expected)
    for layer, right in zip(cache.layers, fresh.layers, strict=True):
        if right.keys is None:  # of a layer that shares another's
            continue
        length = right.keys.shape[2]
        torch.testing.assert_close(layer.keys[:, :, -length:], right.keys, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(layer.values[:, :, -length:], right.values, atol=1e-5, rtol=1e-5)


def test_the_next_turn_finds_all_that_was_kept(model):
    kept = Conversations(model, slots=2, max_bytes=PLENTY)
    first = said(model, tokens(0, 60), kept)
    found = kept.take(first.tokens + tokens(1, 9))
    assert found.tokens == first.tokens and found.cache is first.cache and len(kept) == 0
    assert_holds(found.cache, model, found.tokens)


def test_two_tokens_at_least_are_left_to_compute(llama):
    kept = Conversations(llama, slots=2, max_bytes=PLENTY)
    first = said(llama, tokens(0, 60), kept)
    found = kept.take(first.tokens)
    assert found.tokens == first.tokens[:-2]
    assert_holds(found.cache, llama, found.tokens)


def test_another_answer_cuts_back_to_what_is_common(llama):
    kept = Conversations(llama, slots=2, max_bytes=PLENTY)
    first = said(llama, tokens(0, 60), kept)
    found = kept.take([*first.tokens[:40], 2, *tokens(2, 9)])
    assert found.tokens == first.tokens[:40] and found.cache is first.cache
    assert_holds(found.cache, llama, found.tokens)


def test_a_window_that_has_slid_past_is_computed_again(caplog):
    gemma = patch(build("gemma3"), ratio=8, min_length=0, k=16, r=8)
    kept = Conversations(gemma, slots=2, max_bytes=PLENTY)
    first = said(gemma, tokens(0, 60), kept)
    with caplog.at_level("INFO", "sparq"):
        found = kept.take([*first.tokens[:40], 2, *tokens(2, 9)])
    assert found.tokens == [] and found.cache.get_seq_length() == 0 and "computed again" in caplog.text
    assert len(kept) == 1, "nothing was lost by it"


def test_a_shared_beginning_of_a_longer_conversation_is_copied_and_both_go_on(llama):
    kept = Conversations(llama, slots=3, max_bytes=PLENTY)
    document = tokens(0, 40)
    longer = said(llama, document + tokens(1, 60), kept)
    other = kept.take([*document, 2, *tokens(2, 30)])
    assert other.tokens == document and other.cache is not longer.cache and len(kept) == 1
    assert_holds(other.cache, llama, document)
    other = read(llama, other, [*document, 2, *tokens(2, 30)])
    kept.keep(other)
    again = kept.take(longer.tokens + tokens(3, 5))
    assert again.cache is longer.cache
    assert_holds(again.cache, llama, longer.tokens)


def test_a_small_part_of_a_prompt_is_computed_again(llama):
    kept = Conversations(llama, slots=3, max_bytes=PLENTY)
    document = tokens(0, 40)
    said(llama, document, kept)
    enough = int(len(document) / SMALLEST_SHARE)
    assert kept.take(document + [2] * (enough - len(document) + 1)).tokens == []
    assert kept.take(document + [2] * (enough - len(document))).tokens == document


def test_the_longest_unused_is_forgotten(llama):
    kept = Conversations(llama, slots=2, max_bytes=PLENTY)
    first, second = said(llama, tokens(0, 30), kept), said(llama, tokens(1, 30), kept)
    said(llama, first.tokens + tokens(2, 5), kept)  # the first is used again
    said(llama, tokens(3, 30), kept)
    assert len(kept) == 2
    assert kept.take([*second.tokens, 2, 2]).tokens == []
    assert kept.take([*first.tokens, 2, 2]).tokens == first.tokens


def test_memory_is_bounded(llama, caplog):
    one = said(llama, tokens(0, 30), Conversations(llama, slots=1, max_bytes=PLENTY))
    held = sum(layer.allocated_bytes for layer in one.cache.layers)
    kept = Conversations(llama, slots=9, max_bytes=2 * held)
    for seed in range(5):
        said(llama, tokens(seed, 30), kept)
    assert len(kept) == 2 and kept.nbytes == 2 * held
    with caplog.at_level("WARNING", "sparq"):
        said(llama, tokens(9, 4000), kept)
    assert len(kept) == 2 and "not kept" in caplog.text, "what is too large by itself drives nobody out"


def test_no_slots_keep_nothing(llama, caplog):
    kept = Conversations(llama, slots=0, max_bytes=PLENTY)
    said(llama, tokens(0, 30), kept)
    assert len(kept) == 0 and kept.nbytes == 0 and not caplog.text


def test_what_is_taken_is_nobody_elses(llama):
    kept = Conversations(llama, slots=2, max_bytes=PLENTY)
    first = said(llama, tokens(0, 60), kept)
    kept.take(first.tokens + tokens(1, 5))  # and an exception comes
    assert kept.take(first.tokens + tokens(1, 5)).tokens == []


def test_forget(llama):
    kept = Conversations(llama, slots=2, max_bytes=PLENTY)
    first = said(llama, tokens(0, 60), kept)
    kept.forget()
    assert len(kept) == 0 and kept.take([*first.tokens, 2, 2]).tokens == []


@settings(deadline=None, max_examples=25)
@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.integers(1, 40), st.integers(0, 30), st.booleans()), min_size=1, max_size=6
    ),
    st.integers(0, 3),
)
def test_whatever_was_said_the_cache_is_that_of_its_tokens(turns, slots):
    """turns: of which of three texts how many tokens, with how many others behind; whether it fails on the way."""
    model = _model()
    kept = Conversations(model, slots, PLENTY)
    for seed, length, others, fails in turns:
        prompt = tokens(seed, length) + tokens(100 + others, others) + [2, 2]
        found = kept.take(prompt)
        assert found.tokens == prompt[: len(found.tokens)] and len(found.tokens) <= len(prompt) - 2
        assert len(found.tokens) == 0 or len(found.tokens) >= SMALLEST_SHARE * len(prompt)
        if found.tokens:
            assert_holds(found.cache, model, found.tokens)
        if not fails:
            kept.keep(read(model, found, prompt))
        assert len(kept) <= slots


_built = {}


def _model():
    if "llama" not in _built:
        _built["llama"] = patch(build("llama"), ratio=8, min_length=0, k=16, r=8)
    return _built["llama"]


def test_a_copied_beginning_is_a_copy(llama):
    one = read(llama, Conversation([], DynamicCache(config=llama.config)), tokens(0, 30)).cache
    assert held.can_be_cut(one, 10)
    copy = held.beginning(one, 10, llama.config)
    for layer, original in zip(copy.layers, one.layers, strict=True):
        assert layer.keys.untyped_storage().nbytes() == layer.keys.nbytes
        assert layer.keys.data_ptr() != original.keys.data_ptr()
        torch.testing.assert_close(layer.keys, original.keys[:, :, :10], atol=0, rtol=0)
