"""Assisted decoding with drafts of any length: the tokens of greedy decoding, and only while it lasts."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    Cache,
    DynamicCache,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StaticCache,
)
from transformers.cache_utils import StaticLayer

import sparq
from tests.sparq.tiny import build, generate, next_tokens, prompt

pytestmark = pytest.mark.slow

SPARSE: dict[str, Any] = dict(r=4, k=12, min_length=0)


def repeating(length: int = 60) -> dict[str, Tensor]:
    """Twenty tokens again and again: something to look up."""
    inputs = prompt(batch=1, padding=0, length=length)
    inputs["input_ids"] = inputs["input_ids"][:, :20].repeat(1, length // 20)
    return inputs


class Repeating(LogitsProcessor):
    """Wants the twenty tokens of the prompt once more now and then, so that some long drafts are accepted in part."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        length = input_ids.shape[1]
        if length % 50 < 38:
            scores = scores.clone()
            scores[:, input_ids[0, length % 20]] += 1000
        return scores


def precise() -> PreTrainedModel:
    return build().double()  # no tie is broken by rounding


def queries_of(model: PreTrainedModel) -> list[int]:
    """How many new tokens each forward pass has, filled while the model runs."""
    seen: list[int] = []
    model.model.embed_tokens.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    return seen


@pytest.mark.parametrize("drafted", [5, 15, 16, 30])
def test_long_drafts_give_the_tokens_of_greedy_decoding(drafted: int) -> None:
    how = dict(tokens=64, logits_processor=LogitsProcessorList([Repeating()]))
    expected = generate(sparq.patch(precise(), **SPARSE), repeating(), **how)
    assert expected != generate(precise(), repeating(), **how)
    model = sparq.patch(precise(), **SPARSE)
    queries = queries_of(model)
    assert generate(model, repeating(), prompt_lookup_num_tokens=drafted, **how) == expected
    assert queries[0] == 60 + drafted  # the first draft together with the prompt
    assert max(queries[1:]) == drafted + 1 and len(queries) < 40
    total = sparq.report(model).total
    assert total.dense_steps == {} and total.sparse_steps > 0


@pytest.mark.parametrize(
    "knobs", [{}, dict(num_assistant_tokens=24, num_assistant_tokens_schedule="constant")], ids=str
)
def test_an_assistant_gives_the_tokens_of_greedy_decoding(knobs: dict) -> None:
    """By default transformers drafts 20 tokens, and more the better they are."""
    inputs = prompt(batch=1, padding=0)
    expected = generate(sparq.patch(precise(), **SPARSE), inputs, 40)
    assistant = precise()
    for name, value in knobs.items():
        setattr(assistant.generation_config, name, value)
    assistant.generation_config.assistant_confidence_threshold = 0.0  # drafts are not ended early
    model = sparq.patch(precise(), **SPARSE)
    queries = queries_of(model)
    assert generate(model, inputs, 40, assistant_model=assistant) == expected
    assert queries[0] > 40 and max(queries[1:]) > 17
    assert sparq.report(model).total.dense_steps == {}


@pytest.mark.parametrize("length", [1, 4, 20])
def test_a_short_prompt_with_its_draft(length: int) -> None:
    inputs = prompt(batch=1, padding=0, length=length)
    knobs = dict(r=4, k=2, min_length=0)
    expected = generate(sparq.patch(precise(), **knobs), inputs, 24)
    model = sparq.patch(precise(), **knobs)
    assert generate(model, inputs, 24, assistant_model=precise()) == expected != generate(precise(), inputs, 24)


def embedded(model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"inputs_embeds": model.get_input_embeddings()(inputs["input_ids"]).detach()}


def test_a_prompt_of_embeddings_with_its_draft() -> None:
    def tokens(model: PreTrainedModel, **how: Any) -> list[list[int]]:
        given = embedded(model, prompt(batch=1, padding=0))
        return model.generate(**given, max_new_tokens=24, do_sample=False, pad_token_id=0, **how).tolist()

    stock, expected = tokens(precise()), tokens(sparq.patch(precise(), **SPARSE))
    if tokens(precise(), prompt_lookup_num_tokens=20) != stock:
        pytest.skip("this transformers drafts other tokens after embeddings, unpatched too")
    assert tokens(sparq.patch(precise(), **SPARSE), prompt_lookup_num_tokens=20) == expected != stock


class WithoutKeptLogits(LlamaForCausalLM):
    """A head whose `forward` cannot be told how many logits are wanted."""

    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)


@pytest.mark.parametrize("drafted", [4, 30])
def test_a_model_that_cannot_keep_some_logits_alone(drafted: int) -> None:
    def made() -> PreTrainedModel:
        model = precise()
        model.__class__ = WithoutKeptLogits
        assert not model._supports_logits_to_keep()
        return model

    how = dict(tokens=64, logits_processor=LogitsProcessorList([Repeating()]))
    expected = generate(sparq.patch(precise(), **SPARSE), repeating(), **how)
    model = sparq.patch(made(), **SPARSE)
    assert generate(model, repeating(), prompt_lookup_num_tokens=drafted, **how) == expected
    assert sparq.report(model).total.dense_steps == {}


@pytest.mark.skipif(not hasattr(StaticLayer, "crop"), reason="this transformers cannot crop a static layer")
@pytest.mark.parametrize("drafted", [4, 30])
def test_drafts_on_a_static_cache(drafted: int) -> None:
    """With room for a last draft, which transformers does not cut to what a cache of its own making has left."""

    def tokens(model: PreTrainedModel, **how: Any) -> list[list[int]]:
        cache = StaticCache(config=model.config, max_cache_len=200)
        processor = LogitsProcessorList([Repeating()])
        return generate(model, repeating(), 64, past_key_values=cache, logits_processor=processor, **how)

    expected = tokens(sparq.patch(precise(), **SPARSE))
    assert expected != tokens(precise())
    model = sparq.patch(precise(), **SPARSE)
    assert tokens(model, prompt_lookup_num_tokens=drafted) == expected
    total = sparq.report(model).total
    assert total.dense_steps == {} and total.sparse_steps > 0


# --- Once it has ended ------------------------------------------------------------------------------------------------


def drafted_cache(model: PreTrainedModel) -> Cache:
    output = model.generate(
        **repeating(),
        max_new_tokens=12,
        do_sample=False,
        pad_token_id=0,
        prompt_lookup_num_tokens=20,
        return_dict_in_generate=True,
    )
    return output.past_key_values


def held(cache: Cache) -> int:
    return int(cache.get_seq_length())


@torch.no_grad()
def test_a_later_pass_is_a_chunk_again() -> None:
    model = sparq.patch(build(), **SPARSE)
    cache = drafted_cache(model)
    sparq.patch(model, **SPARSE)
    chunk = next_tokens(1, 17)
    stock = DynamicCache([(layer.keys.clone(), layer.values.clone()) for layer in cache.layers])
    actual = model(chunk, past_key_values=cache).logits
    assert sparq.report(model).total.dense_steps == {"more than 16 new tokens at once": 3}
    torch.testing.assert_close(actual, build()(chunk, past_key_values=stock).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_an_exception_in_the_middle_ends_it_too() -> None:
    model = sparq.patch(build(), **SPARSE)
    cache = DynamicCache(config=model.config)

    def failing(module: torch.nn.Module, args: tuple, output: Any) -> None:
        raise ZeroDivisionError("mine")

    handle = model.lm_head.register_forward_hook(failing)
    with pytest.raises(ZeroDivisionError):
        generate(model, repeating(), past_key_values=cache, prompt_lookup_num_tokens=20)
    handle.remove()
    gc.collect()  # the traceback has held the frames that held the drafts
    sparq.patch(model, **SPARSE)
    model(next_tokens(1, 17), past_key_values=cache)
    assert sparq.report(model).total.dense_steps == {"more than 16 new tokens at once": 3}


def pickled(cache: Cache) -> Cache:
    return pickle.loads(pickle.dumps(cache))


def saved(cache: Cache) -> Cache:
    buffer = io.BytesIO()
    torch.save(cache, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved])
def test_a_copy_of_the_cache_is_not_drafted_on(copied: Callable[[Cache], Cache]) -> None:
    """Copied while drafts are made on the cache, and used while they still are."""
    model, reasons = sparq.patch(build(), **SPARSE), []
    cache = DynamicCache(config=model.config)

    class Copying(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            if not reasons and held(cache):
                other = copied(cache)
                with sparq.patched(model, **SPARSE):
                    model(next_tokens(1, 17), past_key_values=other)
                    reasons.append(sparq.report(model).total.dense_steps)
            return scores

    how = dict(prompt_lookup_num_tokens=20, logits_processor=LogitsProcessorList([Copying()]))
    generate(model, repeating(), past_key_values=cache, **how)
    assert reasons == [{"more than 16 new tokens at once": 3}]
    assert sparq.report(model).total.dense_steps == {}


def test_unpatching_takes_the_notes_away() -> None:
    model = sparq.patch(build(), **SPARSE)
    assert "_get_candidate_generator" in vars(model)
    sparq.unpatch(model)
    assert "_get_candidate_generator" not in vars(model)
    cache = DynamicCache(config=model.config)
    generate(model, repeating(), past_key_values=cache, prompt_lookup_num_tokens=20)
    assert not hasattr(cache, "_sparq_drafting")


@torch.no_grad()
@pytest.mark.parametrize("make_cache", [DynamicCache, lambda config: StaticCache(config=config, max_cache_len=128)])
def test_a_chunk_that_looks_like_a_draft_is_none(make_cache: Callable) -> None:
    """More tokens than a kernel takes, the last logits alone wanted, as a draft's pass has it; nobody drafts."""
    model = sparq.patch(build(), **SPARSE)
    cache = make_cache(config=model.config)
    model(**repeating(), past_key_values=cache)
    model(next_tokens(1, 20), past_key_values=cache, logits_to_keep=20)
    assert sparq.report(model).total.dense_steps == {"more than 16 new tokens at once": 3}
    assert held(cache) == 80


def test_a_turn_after_an_interruption_whose_traceback_is_kept() -> None:
    """A notebook keeps it, and with it what made the drafts; the prompt of the next turn is a prompt all the same."""
    model = sparq.patch(build(), **SPARSE)
    cache = DynamicCache(config=model.config)
    handle = model.lm_head.register_forward_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError) as kept:
        generate(model, repeating(), past_key_values=cache, prompt_lookup_num_tokens=20)
    handle.remove()
    cache.crop(-held(cache) + 1)
    sparq.patch(model, **SPARSE)
    ids = torch.randint(3, 97, (1, 40), generator=torch.Generator().manual_seed(8))
    generate(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, tokens=2, past_key_values=cache)
    assert sparq.report(model).total.sparse_steps == 3 and kept.tb is not None
