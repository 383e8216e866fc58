"""What goes wrong stays where it is: poisoned rows, exceptions in the middle of generation, threads, and no leaks."""

from __future__ import annotations

import gc
import threading
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StoppingCriteriaList

import sparq
from sparq.cache import SparqLayer
from tests.sparq.tiny import build, generate, next_tokens, prompt, teacher_forced

pytestmark = pytest.mark.slow

SPARSE = dict(r=4, k=12, min_length=0)


# --- Poison -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def logits_of_embeddings(model: PreTrainedModel, embeddings: Tensor, mask: Tensor, steps: int) -> Tensor:
    """Prompt and decode steps [B, steps + 1, vocabulary], all given as embeddings [B, length, hidden]."""
    length = embeddings.shape[1] - steps
    output = model(inputs_embeds=embeddings[:, :length], attention_mask=mask[:, :length], use_cache=True)
    logits = [output.logits[:, -1]]
    for step in range(steps):
        end = length + step + 1
        output = model(
            inputs_embeds=embeddings[:, end - 1 : end],
            attention_mask=mask[:, :end],
            past_key_values=output.past_key_values,
        )
        logits.append(output.logits[:, -1])
    return torch.stack(logits, 1)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", [slice(0, 40), slice(41, 42)], ids=["in the prompt", "in a decode step"])
def test_a_poisoned_row_leaves_the_others_as_they_are(poison: float, where: slice) -> None:
    inputs, steps = prompt(batch=3), 6
    model = sparq.patch(build(), **SPARSE)
    ids = torch.cat([inputs["input_ids"], next_tokens(3, steps)], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, steps, dtype=torch.long)], 1)
    embeddings = model.get_input_embeddings()(ids).detach()
    clean = logits_of_embeddings(model, embeddings, mask, steps)
    assert clean.isfinite().all()
    embeddings[1, where] = poison
    poisoned = logits_of_embeddings(model, embeddings, mask, steps)
    assert torch.equal(poisoned[[0, 2]], clean[[0, 2]])
    assert not poisoned[1, -1].isfinite().any()  # it was poisoned indeed
    assert sparq.report(model).total.sparse_steps == 2 * 3 * steps


def test_a_row_of_nothing_but_padding_is_finite_and_changes_no_other() -> None:
    inputs, tokens = prompt(batch=3), next_tokens(3, 4)
    model = sparq.patch(build(), **SPARSE)
    expected = teacher_forced(model, inputs, tokens)
    empty = {"input_ids": inputs["input_ids"].clone(), "attention_mask": inputs["attention_mask"].clone()}
    empty["attention_mask"][1] = 0
    masked = empty["attention_mask"]
    with torch.no_grad():
        output = model(**empty)
        for step in range(4):  # the new tokens of that row are masked as well: it never has a valid position
            masked = torch.cat([masked, torch.tensor([[1], [0], [1]])], 1)
            output = model(tokens[:, step : step + 1], attention_mask=masked, past_key_values=output.past_key_values)
            assert output.logits[1].isfinite().all()
            torch.testing.assert_close(output.logits[[0, 2], -1], expected[[0, 2], step], rtol=1e-5, atol=1e-5)
    assert sparq.report(model).total.sparse_steps == 2 * 3 * 4


# --- Exceptions -------------------------------------------------------------------------------------------------------


class Interrupt:
    """Raises `error` when it is asked for the `calls`-th time: as a stopping criterion, or as a hook."""

    def __init__(self, error: type[BaseException], calls: int) -> None:
        self.error, self.left = error, calls

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.left -= 1
        if self.left == 0:
            raise self.error("in the middle")
        return torch.zeros(1, dtype=torch.bool)


@contextmanager
def interrupted(model: PreTrainedModel, where: str, error: type[BaseException], calls: int) -> Any:
    """Generation keyword arguments that make it fail; a hook fails in the given layer, before or after attention."""
    interrupt = Interrupt(error, calls)
    if where == "stopping criterion":
        yield dict(stopping_criteria=StoppingCriteriaList([interrupt]))
        return
    attention = model.model.layers[1].self_attn
    if where == "before a layer's attention":
        handle = attention.register_forward_pre_hook(lambda *args: (interrupt(), None)[1])
    else:
        handle = attention.register_forward_hook(lambda *args: (interrupt(), None)[1])
    try:
        yield {}
    finally:
        handle.remove()


WHERE = ["stopping criterion", "before a layer's attention", "after a layer's attention"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("where", WHERE)
def test_after_an_exception_the_next_generation_is_right(where: str, error: type[BaseException]) -> None:
    inputs = prompt()
    expected = generate(sparq.patch(build(), **SPARSE), inputs)
    model = sparq.patch(build(), **SPARSE)
    for calls in (1, 5):  # in the prompt, and in a decode step
        with interrupted(model, where, error, calls) as added, pytest.raises(error, match="in the middle"):
            generate(model, inputs, **added)
        assert generate(model, inputs) == expected
    sparq.unpatch(model)
    assert generate(model, inputs) == generate(build(), inputs)


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("full", [True, False], ids=["k covers all", "sparse"])
def test_after_an_exception_the_cache_goes_on(where: str, full: bool) -> None:
    """Cropped to the tokens that all layers hold, it serves as if nothing had happened."""
    inputs, knobs = prompt(batch=1, padding=0), dict(r=16, k=1000, min_length=0) if full else SPARSE
    model = sparq.patch(build(), **knobs)
    expected = generate(model, inputs)[0]
    cache = DynamicCache(config=model.config)
    with interrupted(model, where, ValueError, 6) as added, pytest.raises(ValueError, match="in the middle"):
        generate(model, inputs, past_key_values=cache, **added)
    lengths = [layer.get_seq_length() for layer in cache.layers]
    # The stopping criterion fails behind a whole pass; a hook in layer 1 leaves the layers before it one token longer.
    uneven = {"stopping criterion": 0, "before a layer's attention": 1, "after a layer's attention": 2}[where]
    assert lengths == [max(lengths)] * uneven + [min(lengths)] * (3 - uneven)
    done = min(lengths) - 40
    assert 4 <= done <= 6
    for layer in cache.layers:
        layer.crop(min(lengths) - layer.get_seq_length())
    so_far = torch.cat([inputs["input_ids"], torch.tensor([expected[: done + 1]])], 1)
    again = generate(
        model, {"input_ids": so_far, "attention_mask": torch.ones_like(so_far)}, 11 - done, past_key_values=cache
    )
    assert expected == expected[: done + 1] + again[0]


@pytest.mark.parametrize("padding", [0, 9])
@pytest.mark.parametrize("full", [True, False], ids=["k covers all", "sparse"])
@pytest.mark.parametrize("made", ["by layer", "as it fills"])
@pytest.mark.parametrize("in_prompt", [True, False])
def test_a_cache_left_half_written_fails_clearly(padding: int, full: bool, made: str, in_prompt: bool) -> None:
    """Nobody has cropped. (transformers fails at the mask's size, and answers wrongly where there is no padding.)"""
    inputs = prompt(padding=padding)
    model = sparq.patch(build(), **(dict(r=16, k=1000, min_length=0) if full else SPARSE))
    cache = DynamicCache(config=model.config) if made == "by layer" else DynamicCache()
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 2).long()], 1)
    with torch.no_grad():
        if not in_prompt:
            model(**inputs, past_key_values=cache)
        tokens, seen = (inputs["input_ids"], mask[:, :40]) if in_prompt else (next_tokens(2, 1), mask[:, :41])
        with interrupted(model, "before a layer's attention", ValueError, 1), pytest.raises(ValueError, match="middle"):
            model(tokens, attention_mask=seen, past_key_values=cache)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="a forward pass was interrupted between layers"):
                model(next_tokens(2, 1), attention_mask=mask[:, : seen.shape[1] + 1], past_key_values=cache)
        expected = model(**inputs).logits
        if made == "by layer":
            cache.reset()
            assert torch.equal(model(**inputs, past_key_values=cache).logits, expected)


# --- Threads ----------------------------------------------------------------------------------------------------------


def test_two_threads_generate_with_one_model() -> None:
    """Different batch sizes, prompts and lengths, each with its own cache: as if each had been alone."""
    model = sparq.patch(build(), **SPARSE)
    work = [(prompt(1, 40, 0, seed=1), 12), (prompt(3, 25, 9, seed=2), 20), (prompt(2, 60, 9, seed=3), 7)]
    expected = [generate(model, inputs, tokens) for inputs, tokens in work]
    alone = sparq.report(model)
    sparq.patch(model, **SPARSE)  # counters start anew

    rounds, start = 6, threading.Barrier(2)

    def worker(offset: int) -> list[tuple[int, list[list[int]]]]:
        start.wait()
        order = [(offset + round_) % len(work) for round_ in range(rounds)]
        return [(i, generate(model, *work[i])) for i in order]

    with ThreadPoolExecutor(2) as pool:
        results = [result for future in [pool.submit(worker, n) for n in range(2)] for result in future.result()]
    assert len(results) == 2 * rounds
    for i, tokens in results:
        assert tokens == expected[i]
    together, times = sparq.report(model), 2 * rounds // len(work)  # every piece of work as often as the others
    assert alone.total.sparse_steps > 0
    for name in ("sparse_steps", "decode_steps", "positions_cached", "positions_read", "bytes_read", "bytes_dense"):
        assert getattr(together.total, name) == times * getattr(alone.total, name)
        for layer in alone.layers:
            assert getattr(together.layers[layer], name) == times * getattr(alone.layers[layer], name)
    assert together.total.mean_alpha == pytest.approx(alone.total.mean_alpha, rel=1e-5)


# --- Leaks ------------------------------------------------------------------------------------------------------------


def live_tensors() -> int:
    gc.collect()
    # by type: asking some objects for their class makes them warn
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def own_bytes() -> int:
    """What Python holds that SparQ's own lines have allocated: transformers and torch have caches that fill up."""
    gc.collect()
    own = [tracemalloc.Filter(True, f"*/{package}/*") for package in ("sparq", "sparq_kernels")]
    own.append(tracemalloc.Filter(False, "*/tests/*"))
    return sum(trace.size for trace in tracemalloc.take_snapshot().filter_traces(own).traces)


def growth(work: Callable[[], Any], times: int) -> tuple[int, int]:
    """By how many live tensors, and bytes allocated by SparQ, the process grows while `work` is done `times` times."""
    tensors = live_tensors()
    tracemalloc.start()
    for _ in range(10):
        work()  # what tracing sees for the first time
    held = own_bytes()
    for _ in range(times - 10):
        work()
    grown = own_bytes() - held
    tracemalloc.stop()
    return live_tensors() - tensors, grown


def test_nothing_leaks_over_200_generations() -> None:
    model = sparq.patch(build(num_hidden_layers=2), **SPARSE)
    lengths = iter(range(10_000))

    def work() -> None:
        generate(model, prompt(batch=1, length=20 + next(lengths) % 7, padding=0), tokens=3)

    for _ in range(20):
        work()
    resident = resident_bytes() if Path("/proc/self/statm").exists() else 0
    tensors, grown = growth(work, 200)
    assert tensors <= 2  # a counter's sum may be another tensor than before
    assert grown < 190 * 50, grown  # bytes
    if resident:
        assert resident_bytes() - resident < 32 << 20
    assert sparq.report(model).total.sparse_steps == 2 * 2 * 220  # steps were sparse indeed


def test_a_leak_would_be_seen() -> None:
    layers: list[SparqLayer] = []

    def leak() -> None:
        layers.append(SparqLayer())
        layers[-1].update(torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 1, 4))

    tensors, grown = growth(leak, 200)
    assert tensors >= 200 and grown > 190 * 50, grown
