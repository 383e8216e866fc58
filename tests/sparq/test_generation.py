"""Everything `generate` can do: as the stock model where k covers the context, and as the slow implementation of the
definition where it does not."""

from __future__ import annotations

import copy
import io
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sparq_kernels
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
    cache_utils,
    pipeline,
)
from transformers.generation.streamers import BaseStreamer

import sparq
from sparq.cache import SparqLayer
from tests.sparq.slow import Slow
from tests.sparq.tiny import build, generate, next_tokens, prompt, teacher_forced

SPARSE = dict(r=4, k=12)
COVERING = dict(r=4, k=10_000)
HARSH = dict(r=2, k=4, mean_value=False)  # the bundled model answers right with more
BUNDLED = Path(__file__).parents[2] / "evals" / "models" / "recall-llama"
TEXT = "The pass key of amber is 48213. " + "".join(f"Line {i} says {i * i}. " for i in range(8))

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": dict(num_beams=3),
    "beams, several returned": dict(num_beams=4, num_return_sequences=3),
    "beams that stop early": dict(num_beams=3, early_stopping=True, length_penalty=-0.5, eos_token_id=[28, 72]),
    "beams, sampled": dict(num_beams=3, do_sample=True, top_k=20),
    "sampling": dict(do_sample=True, top_k=20),
    "sampling, several returned": dict(do_sample=True, top_p=0.9, temperature=0.8, num_return_sequences=3),
    "penalties": dict(repetition_penalty=1.3, no_repeat_ngram_size=2),
    "the end at different steps": dict(eos_token_id=[28, 72]),
    "prompt in chunks": dict(prefill_chunk_size=20),
    "prompt in chunks, the last of one token": dict(prefill_chunk_size=39),
    "prompt in small chunks": dict(prefill_chunk_size=16),
}
# Sparse where the random tokens do not end it at once: 12 tokens, the first of them from the prompt.
STEPS = {"beams that stop early": None, "the end at different steps": None}


def seeded(model: PreTrainedModel, **how: Any) -> list[list[int]]:
    torch.manual_seed(3)
    return generate(model, prompt(), **how)


@pytest.mark.parametrize("way", WAYS)
def test_full_budget_is_the_stock_model(way: str) -> None:
    expected = seeded(build(), **WAYS[way])
    assert seeded(sparq.patch(build(), **COVERING, min_length=0), **WAYS[way]) == expected


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_sparse_steps_equal_the_definition(way: str) -> None:
    expected = seeded(Slow(**SPARSE, several=False).install(build()), **WAYS[way])
    assert expected != seeded(build(), **WAYS[way])  # or there is nothing to see
    for cache in ({}, dict(cache_implementation="static")):
        model = sparq.patch(build(), **SPARSE, min_length=0)
        assert seeded(model, **WAYS[way], **cache) == expected
        steps = sparq.report(model).total.sparse_steps
        if way in STEPS:
            assert 0 < steps <= 3 * 11
        else:
            assert steps == 3 * (12 if way == "prompt in chunks, the last of one token" else 11)


def test_beams_with_scores_equal_the_definition() -> None:
    how = dict(num_beams=3, num_return_sequences=3, return_dict_in_generate=True, output_scores=True)

    def scores(model: PreTrainedModel) -> Tensor:
        output = model.generate(**prompt(), max_new_tokens=8, do_sample=False, pad_token_id=0, **how)
        return output.sequences_scores

    expected = scores(Slow(**SPARSE, several=False).install(build()))
    actual = scores(sparq.patch(build(), **SPARSE, min_length=0))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert (actual - scores(build())).abs().max() > 0.01


class StopAfter(StoppingCriteria):
    """Stops each row once it has written one of `tokens`."""

    def __init__(self, tokens: list[int], prompt_length: int) -> None:
        self.tokens, self.prompt_length, self.calls = torch.tensor(tokens), prompt_length, 0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.calls += 1
        return torch.isin(input_ids[:, self.prompt_length :], self.tokens).any(-1)


@pytest.mark.parametrize("knobs", [SPARSE, COVERING], ids=["sparse", "covering"])
def test_stopping_criteria(knobs: dict) -> None:
    """Row 0 meets its criterion at the fourth token, row 1 at the seventh, and then the run stops."""
    model = sparq.patch(build(), **knobs, min_length=0)
    free = generate(model, prompt())
    stops = [free[0][3], free[1][6]]
    assert stops[0] not in free[0][:3] + free[1][:7] and stops[1] not in free[1][:6] + free[0][:4]
    criterion = StopAfter(stops, prompt_length=40)
    stopped = generate(model, prompt(), stopping_criteria=StoppingCriteriaList([criterion]))
    assert criterion.calls == 7 == len(stopped[0])
    assert stopped == [row[:7] for row in free]


class Tokens(BaseStreamer):
    def __init__(self) -> None:
        self.seen: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.seen += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def test_a_streamer_sees_every_token() -> None:
    model, inputs, streamer = sparq.patch(build(), **SPARSE, min_length=0), prompt(batch=1), Tokens()
    tokens = generate(model, inputs, streamer=streamer)
    assert streamer.ended and streamer.seen == inputs["input_ids"][0].tolist() + tokens[0]
    assert tokens == generate(model, inputs)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BUNDLED)


def bundled() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(BUNDLED).eval()


def all_ways(run: Callable[[PreTrainedModel], Any]) -> None:
    """`run` with the bundled model gives the same stock and with k over all, and the same slow and sparse."""
    stock = run(bundled())
    assert run(sparq.patch(bundled(), **COVERING, min_length=0)) == stock
    slow = run(Slow(**HARSH).install(bundled()))
    model = sparq.patch(bundled(), **HARSH, min_length=0)
    assert run(model) == slow != stock
    assert sparq.report(model).total.sparse_steps > 0


def test_streamed_text(tokenizer) -> None:
    inputs = tokenizer(TEXT, return_tensors="pt")

    def streamed(model: PreTrainedModel) -> str:
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
        arguments = dict(**inputs, streamer=streamer, max_new_tokens=16, do_sample=False)
        thread = threading.Thread(target=model.generate, kwargs=arguments)
        thread.start()
        pieces = list(streamer)
        thread.join()
        assert len(pieces) > 1
        return "".join(pieces)

    all_ways(streamed)


def test_printed_text(tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    model = sparq.patch(bundled(), **HARSH, min_length=0)
    inputs = tokenizer(TEXT, return_tensors="pt")
    streamer = TextStreamer(tokenizer, skip_prompt=True)
    tokens = model.generate(**inputs, streamer=streamer, max_new_tokens=8, do_sample=False)
    assert capsys.readouterr().out.rstrip("\n") == tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :])


def test_stop_strings(tokenizer) -> None:
    model = sparq.patch(bundled(), **HARSH, min_length=0)
    inputs = tokenizer(TEXT + "The pass key of amber is", return_tensors="pt")

    def answer(**how: Any) -> str:
        tokens = model.generate(**inputs, max_new_tokens=16, do_sample=False, **how)
        return tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :])

    stop = answer()[3:5]
    assert answer(stop_strings=[stop], tokenizer=tokenizer) == answer()[: answer().index(stop) + 2]


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 2])
def test_text_generation_pipeline(tokenizer, batch_size: int) -> None:
    """Two prompts of different length: with `batch_size=2` the shorter one is padded."""
    texts = [TEXT + "The pass key of", TEXT]

    def run(model: PreTrainedModel) -> list[str]:
        pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
        outputs = pipe(texts, max_new_tokens=12, do_sample=False, return_full_text=False, batch_size=batch_size)
        return [output[0]["generated_text"] for output in outputs]

    all_ways(run)


CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
CHAT = [
    {"role": "system", "content": TEXT},
    {"role": "user", "content": "What is the pass key of amber?"},
]


def test_chat_through_the_pipeline(tokenizer) -> None:
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = CHAT_TEMPLATE

    def run(model: PreTrainedModel) -> list[str]:
        pipe, chat, replies = pipeline("text-generation", model=model, tokenizer=chatty), list(CHAT), []
        for question in ("And again?", "Sure?"):
            chat = pipe(chat, max_new_tokens=10, do_sample=False)[0]["generated_text"]
            assert chat[-1]["role"] == "assistant"
            replies.append(chat[-1]["content"])
            chat = [*chat, {"role": "user", "content": question}]
        return replies

    all_ways(run)


def test_chat_template_by_hand(tokenizer) -> None:
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = CHAT_TEMPLATE
    inputs = chatty.apply_chat_template(CHAT, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert chatty.decode(inputs["input_ids"][0]).endswith("<assistant> ")
    all_ways(lambda model: model.generate(**inputs, max_new_tokens=12, do_sample=False).tolist())


def talk(model: PreTrainedModel, **how: Any) -> list[list[list[int]]]:
    """Three turns on one cache; the second question is a single token, the third comes after a cut of the cache."""
    ids, cache, replies = prompt(batch=1, padding=0)["input_ids"], DynamicCache(config=model.config), []
    for turn, length in enumerate((7, 1, 7)):
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        replies.append(generate(model, inputs, tokens=6, past_key_values=cache, **how))
        question = prompt(batch=1, length=length, padding=0, seed=10 + turn)["input_ids"]
        ids = torch.cat([ids, torch.tensor(replies[-1]), question], dim=1)
        if turn == 1:  # forget the last reply
            cache.crop(-5)
            ids = torch.cat([ids[:, : cache.get_seq_length()], question], dim=1)
    return replies


@pytest.mark.parametrize("how", [{}, dict(prefill_chunk_size=5)], ids=str)
def test_many_turns_on_one_cache(how: dict) -> None:
    stock = talk(build(), **how)
    assert talk(sparq.patch(build(), **COVERING, min_length=0), **how) == stock
    expected = talk(Slow(**SPARSE, several=False).install(build()), **how)
    assert talk(sparq.patch(build(), **SPARSE, min_length=0), **how) == expected != stock


def test_beams_in_the_second_turn() -> None:
    """A cache for one row, made by a dense or a sparse turn, is widened to the beams by the caller."""

    def second_turn(model: PreTrainedModel) -> list[list[int]]:
        inputs, cache = prompt(batch=1, padding=0), DynamicCache(config=model.config)
        generate(model, inputs, tokens=4, past_key_values=cache)
        ids = torch.cat([inputs["input_ids"], next_tokens(1, 4)], dim=1)
        cache.crop(-3)  # down to the prompt
        cache.batch_repeat_interleave(3)
        return generate(
            model,
            {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
            past_key_values=cache,
            num_beams=3,
            num_return_sequences=3,
        )

    stock = second_turn(build())
    assert second_turn(sparq.patch(build(), **COVERING, min_length=0)) == stock
    expected = second_turn(Slow(**SPARSE, several=False).install(build()))
    assert second_turn(sparq.patch(build(), **SPARSE, min_length=0)) == expected != stock


@torch.no_grad()
def test_a_cropped_cache_is_as_one_that_was_never_longer() -> None:
    inputs, model = prompt(), sparq.patch(build(), **SPARSE, min_length=0)
    cache = DynamicCache(config=model.config)
    teacher_forced(model, inputs, next_tokens(seed=7), cache)
    cache.crop(-12)
    assert cache.get_seq_length() == 40
    mask, logits = inputs["attention_mask"], []
    tokens = next_tokens()
    for step in range(tokens.shape[1]):
        mask = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
        logits.append(model(tokens[:, step : step + 1], attention_mask=mask, past_key_values=cache).logits[:, -1])
    expected = teacher_forced(sparq.patch(build(), **SPARSE, min_length=0), inputs, tokens)
    torch.testing.assert_close(torch.stack(logits, 1), expected, rtol=1e-4, atol=1e-4)


def continued(model: PreTrainedModel, cache: DynamicCache) -> list[list[int]]:
    """A second turn on a cache of the prompt and four tokens."""
    inputs = prompt(batch=1, padding=0)
    ids = torch.cat([inputs["input_ids"], next_tokens(1, 6)], dim=1)
    return generate(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, past_key_values=cache)


def first_turn(model: PreTrainedModel) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    teacher_forced(model, prompt(batch=1, padding=0), next_tokens(1, 4), cache)
    return cache


def saved(cache: DynamicCache) -> DynamicCache:
    buffer = io.BytesIO()
    torch.save(cache, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)  # our own


@pytest.mark.parametrize("copied", [copy.deepcopy, saved])
def test_a_copied_cache_goes_on_by_itself(copied: Callable[[DynamicCache], DynamicCache]) -> None:
    model = sparq.patch(build(), **SPARSE, min_length=0)
    cache = first_turn(model)
    other = copied(cache)
    expected = continued(model, cache)
    assert all(isinstance(layer, SparqLayer) for layer in other.layers)
    assert other.get_seq_length() == 44 and continued(model, other) == expected
    stock = build()
    assert continued(stock, first_turn(stock)) != expected


def test_a_cache_goes_from_dense_to_sparse_and_back() -> None:
    """The dense model's steps on what the sparse one has cached are those of a dense model."""
    model, slow = build(), build()
    caches = first_turn(model), first_turn(slow)
    sparse = continued(sparq.patch(model, **SPARSE, min_length=0), caches[0])
    assert sparse == continued(Slow(**SPARSE, several=False).install(slow), caches[1])
    sparq.unpatch(model)
    slow.set_attn_implementation("sdpa")
    ids = torch.randint(3, 97, (1, 70), generator=torch.Generator().manual_seed(5))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for one in (model, slow):
        assert one.config._attn_implementation == "sdpa"
    replies = [generate(one, inputs, past_key_values=cache) for one, cache in zip((model, slow), caches, strict=True)]
    assert replies[0] == replies[1]
    assert all(isinstance(layer, SparqLayer) for layer in caches[0].layers)
    assert not any(isinstance(layer, SparqLayer) for layer in caches[1].layers)


def test_a_step_on_the_meta_device() -> None:
    """Shapes alone, as for planning memory: nothing of a step needs the values."""
    model = sparq.patch(build().to("meta"), **SPARSE, min_length=0)
    ids = torch.zeros(1, 40, dtype=torch.long, device="meta")
    with torch.no_grad():
        cache = model(ids).past_key_values
        logits = model(ids[:, :1], past_key_values=cache).logits
    assert logits.shape == (1, 1, 97) and logits.device.type == "meta"
    assert cache.layers[0].keys.device.type == "meta" and cache.get_seq_length() == 41


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_cache_moved_to_another_device() -> None:
    if sparq_kernels.backend("cpu") == "reference":
        pytest.skip("there is no kernel for this CPU, whose steps would be dense")
    cache = first_turn(sparq.patch(build(), **SPARSE, min_length=0))
    expected = continued(sparq.patch(build(), **SPARSE, min_length=0), copy.deepcopy(cache))
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys.cuda(), layer.values.cuda()
    inputs = prompt(batch=1, padding=0)
    ids = torch.cat([inputs["input_ids"], next_tokens(1, 6)], dim=1).cuda()
    model = sparq.patch(build().cuda(), **SPARSE, min_length=0)
    actual = generate(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, past_key_values=cache)
    assert actual == expected and sparq.report(model).total.sparse_steps > 0


class NoStream:
    """In place of an accelerator's stream, which transformers' offloaded cache needs; everything here is in order."""

    def wait_stream(self, other: NoStream) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass


@pytest.mark.gpu  # if there is one
def test_offloaded_cache_is_dense_as_stock_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each token moves all of it to the device and back: to read less of it there saves nothing."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch, "Stream", NoStream)
        monkeypatch.setattr(torch.cuda, "default_stream", lambda device: NoStream())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = {name: tensor.to(device) for name, tensor in prompt().items()}
    how = dict(cache_implementation="offloaded", num_beams=2)
    expected = generate(build().to(device), inputs, **how)
    model = sparq.patch(build().to(device), **SPARSE, min_length=0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert generate(model, inputs, **how) == expected
        cache = model.generate(
            **inputs, max_new_tokens=3, pad_token_id=0, return_dict_in_generate=True, cache_implementation="offloaded"
        ).past_key_values
    ours = [str(warning.message) for warning in caught if "sparq" in str(warning.message)]
    assert len(ours) == 1 and "an offloaded cache cannot be read sparsely" in ours[0]
    assert not any(isinstance(layer, SparqLayer) for layer in cache.layers)
    total = sparq.report(model).total
    assert total.sparse_steps == 0
    assert total.dense_steps == {"an offloaded cache cannot be read sparsely": 3 * (11 + 2)}


class Rounded(cache_utils.QuantizedLayer):
    """A quantized layer without the packages that transformers' own need."""

    def _quantize(self, tensor: Tensor, axis: int) -> Tensor:
        return tensor.to(torch.bfloat16)

    def _dequantize(self, tensor: Tensor) -> Tensor:
        return tensor.float()


def rounded_cache() -> cache_utils.Cache:
    return cache_utils.Cache(layers=[Rounded() for _ in range(3)])


def test_quantized_cache_is_refused_and_left_alone() -> None:
    inputs, model = prompt(), build()
    expected = generate(model, inputs, past_key_values=rounded_cache())
    sparq.patch(model, **SPARSE, min_length=0)
    fresh, filled = rounded_cache(), rounded_cache()
    with torch.no_grad():
        build()(**inputs, past_key_values=filled)
    for cache, length in ((fresh, 0), (filled, 40)):
        with pytest.raises(ValueError, match=r"quantized cache \(Rounded\).*sparq\.unpatch") as error:
            generate(model, inputs, past_key_values=cache)
        assert "\n" not in str(error.value)
        assert cache.get_seq_length() == length and all(type(layer) is Rounded for layer in cache.layers)
    assert sparq.report(model).total.decode_steps == 0
    sparq.unpatch(model)
    assert generate(model, inputs, past_key_values=fresh) == expected


@pytest.mark.skipif(not hasattr(cache_utils, "Fp8QuantizedLayer"), reason="this transformers has no fp8 cache")
def test_quantized_cache_made_by_generate_is_refused() -> None:
    how = dict(cache_implementation="quantized", cache_config=dict(backend="fp8"))
    model = build()
    expected = generate(model, prompt(), **how)
    sparq.patch(model, **SPARSE, min_length=0)
    with pytest.raises(ValueError, match="quantized cache \\(Fp8QuantizedLayer\\)"):
        generate(model, prompt(), **how)
    assert len(generate(model, prompt())) == 2  # the model is none the worse for it
    assert generate(sparq.unpatch(model), prompt(), **how) == expected
