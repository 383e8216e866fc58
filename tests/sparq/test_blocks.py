"""Blocks of `with sparq.patched(model)` in threads, in tasks and in each other: each has its own knobs and report."""

from __future__ import annotations

import asyncio
import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from contextvars import copy_context
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import sparq
from sparq import patching
from tests.sparq.snapshot import snapshot
from tests.sparq.tiny import build, generate, next_tokens, prompt, teacher_forced

SPARSE: dict[str, Any] = dict(r=4, k=12, min_length=0)
OTHER: dict[str, Any] = dict(r=2, k=6, min_length=0)
BEAMS: dict[str, Any] = dict(num_beams=3)
TIMEOUT = 30  # seconds


def logits(model: PreTrainedModel) -> torch.Tensor:
    return teacher_forced(model, prompt(), next_tokens(steps=2))


def steps(model: PreTrainedModel) -> int:
    return sparq.report(model).total.sparse_steps


@pytest.fixture(scope="module")
def expected() -> dict[int, torch.Tensor]:
    """Logits by k; 0: of the stock model."""
    sparse = {knobs["k"]: logits(sparq.patch(build(), **knobs)) for knobs in (SPARSE, OTHER)}
    return sparse | {0: logits(build())}


@pytest.fixture
def model() -> Iterator[PreTrainedModel]:
    """It is as it was when the test has ended."""
    model = build()
    before = snapshot(model)
    yield model
    sparq.unpatch(model)
    assert snapshot(model) == before


def run(*works: Callable[[], Any]) -> list[Any]:
    """The works' results, each done in a thread of its own; what one of them raises is raised here."""
    results: list[Any] = [None] * len(works)
    errors: list[BaseException] = []

    def guarded(number: int) -> None:
        try:
            results[number] = works[number]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(number,), daemon=True) for number in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * TIMEOUT)
    if errors:
        raise errors[0]
    return results


def test_two_threads_that_patch_at_once(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have found the model unpatched when they put their patch on it."""
    before, meet = snapshot(model), threading.Barrier(2, timeout=TIMEOUT)

    class Meeting(patching.Patch):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            meet.wait()

    monkeypatch.setattr(patching, "Patch", Meeting)

    def request() -> int:
        with sparq.patched(model, **SPARSE):
            logits(model)
            return steps(model)

    assert run(request, request) == [6, 6]
    assert snapshot(model) == before


def test_threads_have_their_own_knobs_and_reports(model: PreTrainedModel, expected: dict) -> None:
    before, meet = snapshot(model), threading.Barrier(2, timeout=TIMEOUT)

    def request(knobs: dict, times: int) -> Callable[[], tuple]:
        def work() -> tuple:
            with sparq.patched(model, **knobs):
                meet.wait()
                actual = [logits(model) for _ in range(times)]
                meet.wait()
                return actual, steps(model), sparq.report(model).config.k

        return work

    (one, one_steps, one_k), (two, two_steps, two_k) = run(request(SPARSE, 1), request(OTHER, 3))
    assert (one_steps, one_k, two_steps, two_k) == (6, 12, 18, 6)
    assert torch.equal(one[0], expected[12]) and all(torch.equal(each, expected[6]) for each in two)
    assert snapshot(model) == before


@pytest.mark.parametrize("leaves_first", ["first", "second"])
def test_one_block_ends_while_another_is_open(model: PreTrainedModel, expected: dict, leaves_first: str) -> None:
    before, is_open, left = snapshot(model), threading.Barrier(2, timeout=TIMEOUT), threading.Event()
    entered = threading.Event()

    def work(name: str, knobs: dict) -> Callable[[], Any]:
        def within() -> Any:
            if name == "second":
                entered.wait(TIMEOUT)
            with sparq.patched(model, **knobs):
                entered.set()
                is_open.wait()
                if name != leaves_first:
                    left.wait(TIMEOUT)
                    return logits(model), steps(model)
            left.set()
            return None

        return within

    results = run(work("first", SPARSE), work("second", OTHER))
    staying, k = (results[1], 6) if leaves_first == "first" else (results[0], 12)
    assert torch.equal(staying[0], expected[k]) and staying[1] == 6
    assert snapshot(model) == before


def test_many_threads_in_and_out(model: PreTrainedModel) -> None:
    before = snapshot(model)

    def work() -> list[int]:
        seen = []
        for _ in range(4):
            with sparq.patched(model, **SPARSE):
                teacher_forced(model, prompt(batch=1, length=20, padding=0), next_tokens(1, 1))
                seen.append(steps(model))
        return seen

    assert run(*[work] * 4) == [[3] * 4] * 4
    assert snapshot(model) == before


def test_a_thread_started_inside_a_block_uses_it(model: PreTrainedModel, expected: dict) -> None:
    """As `generate` with a streamer is started in one."""
    with sparq.patched(model, **SPARSE):
        (actual,) = run(lambda: logits(model))
        assert torch.equal(actual, expected[12]) and steps(model) == 6
        assert run(lambda: steps(model)) == [6]
        with sparq.patched(model, **OTHER):
            assert torch.equal(run(lambda: logits(model))[0], expected[6])
        assert steps(model) == 6


def test_tasks_have_their_own_blocks(model: PreTrainedModel, expected: dict) -> None:
    before, seen = snapshot(model), []

    async def request(knobs: dict, waits: int) -> None:
        with sparq.patched(model, **knobs):
            for _ in range(3):
                for _ in range(waits):  # the others go on meanwhile, and some of them end
                    await asyncio.sleep(0)
                assert torch.equal(logits(model), expected[knobs["k"]])
            seen.append((knobs["k"], steps(model)))

    async def both() -> None:
        await asyncio.gather(request(SPARSE, 1), request(OTHER, 3), request(SPARSE, 2))

    asyncio.run(both())
    assert sorted(seen) == [(6, 18), (12, 18), (12, 18)]
    assert snapshot(model) == before


def test_what_patch_has_set_comes_back(model: PreTrainedModel, expected: dict) -> None:
    sparq.patch(model, **SPARSE)
    logits(model)
    patched = snapshot(model)
    with sparq.patched(model, **OTHER):
        with sparq.patched(model, **SPARSE):
            assert torch.equal(logits(model), expected[12]) and steps(model) == 6
        assert torch.equal(logits(model), expected[6])
        assert sparq.report(model).config.k == 6 and steps(model) == 6
    assert sparq.report(model).config.k == 12 and steps(model) == 6
    assert torch.equal(logits(model), expected[12]) and snapshot(model) == patched


def test_patching_inside_a_block_is_the_blocks(model: PreTrainedModel, expected: dict) -> None:
    before = snapshot(model)
    with sparq.patched(model, **SPARSE):
        logits(model)
        assert sparq.patch(model, **OTHER) is model
        assert steps(model) == 0 and torch.equal(logits(model), expected[6])
    assert snapshot(model) == before

    sparq.patch(model, **SPARSE)
    with sparq.patched(model, **SPARSE):
        sparq.patch(model, **OTHER)
    assert sparq.report(model).config.k == 12 and torch.equal(logits(model), expected[12])


def test_patching_in_another_thread_is_the_models(model: PreTrainedModel, expected: dict) -> None:
    with sparq.patched(model, **SPARSE):
        run(lambda: sparq.patch(model, **OTHER))
        assert torch.equal(logits(model), expected[12]) and sparq.report(model).config.k == 12
    assert sparq.report(model).config.k == 6 and torch.equal(logits(model), expected[6])


def test_unpatching_while_a_block_is_open(model: PreTrainedModel, expected: dict) -> None:
    before = snapshot(model)
    with sparq.patched(model, **SPARSE):
        sparq.unpatch(model)
        assert snapshot(model) == before and torch.equal(logits(model), expected[0])
        with pytest.raises(ValueError, match="must be patched"):
            sparq.report(model)
        with sparq.patched(model, **OTHER):
            assert torch.equal(logits(model), expected[6])
        assert snapshot(model) == before
    assert snapshot(model) == before

    with sparq.patched(model, **SPARSE):
        sparq.unpatch(model)
        sparq.patch(model, **OTHER)
    assert torch.equal(logits(model), expected[6])  # the block that has ended has taken nothing away


def test_a_block_on_another_model_is_none_of_this_ones(model: PreTrainedModel, expected: dict) -> None:
    other = build()
    with sparq.patched(model, **SPARSE), sparq.patched(other, **OTHER):
        assert torch.equal(logits(model), expected[12]) and torch.equal(logits(other), expected[6])
        assert (steps(model), steps(other)) == (6, 6)
    assert snapshot(other) == snapshot(build())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_made_inside_a_block_keeps_its_knobs(model: PreTrainedModel, expected: dict, copied: Callable) -> None:
    before = snapshot(model)
    sparq.patch(model, **OTHER)
    with sparq.patched(model, **SPARSE):
        logits(model)
        other = copied(model)
        assert steps(other) == 0 and sparq.report(other).config.k == 12
        assert torch.equal(logits(other), expected[12]) and steps(model) == 6
    assert torch.equal(logits(other), expected[12]) and torch.equal(logits(model), expected[6])
    with sparq.patched(other, **OTHER):
        assert torch.equal(logits(other), expected[6])
    assert sparq.report(other).config.k == 12
    sparq.patch(other, **OTHER)
    assert sparq.report(other).config.k == 6
    assert snapshot(sparq.unpatch(other)) == before


def test_an_exception_in_one_thread_is_no_other_threads(model: PreTrainedModel, expected: dict) -> None:
    before, entered, failed = snapshot(model), threading.Barrier(2, timeout=TIMEOUT), threading.Event()

    def failing() -> None:
        with pytest.raises(KeyError), sparq.patched(model, **OTHER):
            entered.wait()
            raise KeyError("mine")
        failed.set()

    def staying() -> torch.Tensor:
        with sparq.patched(model, **SPARSE):
            entered.wait()
            failed.wait(TIMEOUT)
            return logits(model)

    assert torch.equal(run(failing, staying)[1], expected[12])
    assert snapshot(model) == before


def test_generation_in_threads_with_their_own_knobs(model: PreTrainedModel) -> None:
    """Sampled in one, in beams in the other, at the same time."""
    alone = [generate(sparq.patch(build(), **knobs), prompt(), **how) for knobs, how in ((SPARSE, {}), (OTHER, BEAMS))]
    meet = threading.Barrier(2, timeout=TIMEOUT)

    def request(knobs: dict, how: dict) -> Callable[[], list]:
        def work() -> list:
            with sparq.patched(model, **knobs):
                meet.wait()
                return generate(model, prompt(), **how)

        return work

    assert run(request(SPARSE, {}), request(OTHER, BEAMS)) == alone


def test_a_block_may_end_in_another_context_than_it_was_begun_in() -> None:
    """As a generator does that a server starts in one task and finishes in another."""
    model = build()
    before = snapshot(model)

    def stream() -> Iterator[int]:
        with sparq.patched(model, **SPARSE):
            yield 1

    running = stream()
    copy_context().run(next, running)
    assert copy_context().run(list, running) == []
    assert snapshot(model) == before


def test_a_block_on_a_model_that_patches_itself() -> None:
    model = build()
    model.config.sparq = SPARSE
    model.set_attn_implementation("sparq")
    with sparq.patched(model, **OTHER):
        generate(model, prompt())
    generate(model, prompt())
    assert sparq.report(model).config == sparq.SparqConfig(**SPARSE) and sparq.report(model).total.sparse_steps
    model.set_attn_implementation("sparq")
    sparq.unpatch(model)
    generate(model, prompt())
    assert model.config._attn_implementation == "sdpa"


def test_unpatched_by_another_thread_at_the_last_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look at what is patched and the look at what is entered; the model is left as it was."""
    model, real = sparq.patch(build(), **SPARSE), patching.is_entered

    def look(decoder: PreTrainedModel) -> bool:
        monkeypatch.setattr(patching, "is_entered", real)
        sparq.unpatch(model)
        return real(decoder)

    monkeypatch.setattr(patching, "is_entered", look)
    assert generate(model, prompt()) == generate(build(), prompt())
    assert snapshot(model) == snapshot(build())


def test_the_inner_model_patched_first_and_then_the_outer() -> None:
    """Only the outer knows in `generate` that chunks are a prompt."""
    model = build()
    before = snapshot(model)
    sparq.patch(model.model, **SPARSE)
    sparq.patch(model, **SPARSE)
    generate(model, prompt(), tokens=3, prefill_chunk_size=10)
    assert sparq.report(model).total.sparse_steps == 3 * 2
    assert snapshot(sparq.unpatch(model)) == before


def test_a_method_that_somebody_else_has_put_on_the_model() -> None:
    model, calls = build(), []

    def prefill(*args, **kwargs):
        calls.append(1)
        return type(model)._prefill(model, *args, **kwargs)

    model._prefill = prefill
    generate(sparq.patch(model, **SPARSE), prompt())
    assert calls == [1]
    assert sparq.unpatch(model)._prefill is prefill
