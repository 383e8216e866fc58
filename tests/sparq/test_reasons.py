"""Dense steps are counted by their reason, and those that nobody expects are warned of, once."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import sparq
from sparq.reasons import EXPECTED, NO_KERNEL, REASONS
from tests.sparq.caches import dynamic, static
from tests.sparq.tiny import build, generate, next_tokens, prompt, teacher_forced

SPARSE: dict[str, Any] = dict(r=4, k=12, min_length=0)
NO_CACHE = "there is no cache (use_cache=False)"
EMPTY_CACHE = "the model left its cache empty (as it does with gradient checkpointing in training mode)"


@contextlib.contextmanager
def warned() -> Iterator[list[str]]:
    """SparQ's own warnings of the block."""
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield messages
    messages += [str(warning.message) for warning in caught if str(warning.message).startswith("sparq")]


# --- No cache ---------------------------------------------------------------------------------------------------------


def without_cache(model: PreTrainedModel) -> None:
    model.config.use_cache = model.generation_config.use_cache = False


def with_checkpointing(model: PreTrainedModel) -> None:
    model.train()
    model.gradient_checkpointing_enable()


@torch.no_grad()
def fills_its_cache(model: PreTrainedModel) -> bool:
    cache = dynamic(model)
    model(**prompt(), past_key_values=cache)
    return cache.get_seq_length() > 0


@pytest.mark.parametrize(
    ("set_up", "reason"), [(without_cache, NO_CACHE), (with_checkpointing, EMPTY_CACHE)], ids=["off", "training"]
)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_generation_without_a_cache_is_dense_and_said(family: str, set_up: Callable, reason: str) -> None:
    stock, model = build(family), sparq.patch(build(family), **SPARSE)
    for one in (stock, model):
        set_up(one)
    if set_up is with_checkpointing and fills_its_cache(stock):
        pytest.skip("this transformers checkpoints where gradients are recorded only, and caches elsewhere")
    expected = generate(stock, prompt())
    with warned() as messages:
        assert generate(model, prompt()) == expected
        total = sparq.report(model).total
        assert generate(model, prompt()) == expected  # whose prompt follows on the steps before
    assert total.sparse_steps == 0 and total.dense_steps == {reason: 3 * 11}
    assert sparq.report(model).total.dense_steps == {reason: 2 * 3 * 11}
    assert total.bytes_read == total.bytes_dense > 0
    assert len(messages) == 1 and reason in messages[0]
    assert reason in " ".join(str(sparq.report(model)).split())


def test_use_cache_may_be_an_argument() -> None:
    model = sparq.patch(build(), **SPARSE)
    with warned() as messages:
        generate(model, prompt(), use_cache=False)
    assert sparq.report(model).total.dense_steps == {NO_CACHE: 3 * 11} and len(messages) == 1
    generate(model, prompt())
    assert sparq.report(model).total.sparse_steps == 3 * 11


@torch.no_grad()
@pytest.mark.parametrize("lengths", [(40, 30, 50), (40, 40, 40), (41, 40, 39), (10, 40)], ids=str)
def test_passes_that_only_score_texts_are_no_decode_steps(lengths: tuple[int, ...]) -> None:
    model = sparq.patch(build(), **SPARSE)
    with warned() as messages:
        for length in lengths:
            model(**prompt(length=length), use_cache=False)
    assert sparq.report(model).total.decode_steps == 0 and not messages


@torch.no_grad()
def test_prompts_on_caches_of_their_own_are_no_decode_steps() -> None:
    model = sparq.patch(build(), **SPARSE)
    with warned() as messages:
        for length in (40, 41, 42):
            model(**prompt(length=length), past_key_values=dynamic(model))
        for length in (43, 44):  # that the model makes itself
            model(**prompt(length=length))
            model(**prompt(length=length + 2), return_dict=False)
    assert sparq.report(model).total.decode_steps == 0 and not messages


# --- Reasons and warnings ---------------------------------------------------------------------------------------------


def steps_on(model: PreTrainedModel, cache: Any, tokens: int = 1, **how: Any) -> Tensor:
    with torch.no_grad():
        model(**prompt(padding=0), past_key_values=cache)
        return model(next_tokens(2, tokens), past_key_values=cache, **how).logits


def autocast(model: PreTrainedModel, cache: Any) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        steps_on(model, cache)


def four_dimensional(value: float | bool, every_head: bool = False) -> Callable:
    def work(model: PreTrainedModel, cache: Any) -> None:
        size = 64 if isinstance(cache, StaticCache) else 41
        mask = torch.full((2, 4 if every_head else 1, 1, size), value)
        mask[..., 41:] = False if isinstance(value, bool) else torch.finfo(torch.float32).min
        steps_on(model, cache, attention_mask=mask)

    return work


def side_by_side(model: PreTrainedModel, cache: Any) -> None:
    mask = torch.ones(2, 1, 2, 64 if isinstance(cache, StaticCache) else 42, dtype=torch.bool)
    mask[..., 1, 40] = mask[..., 0, 41] = False
    mask[..., 42:] = False
    steps_on(model, cache, 2, attention_mask=mask)


# reason: what is changed in the model, its knobs, and what is done
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], Callable]] = {
    "more than 16 new tokens at once": ({}, SPARSE, lambda model, cache: steps_on(model, cache, 17)),
    "one of the first dense_layers": ({}, SPARSE | dict(dense_layers=3), steps_on),
    "shorter than min_length": ({}, SPARSE | dict(min_length=1000), steps_on),
    "k covers the context": ({}, SPARSE | dict(k=1000), steps_on),
    "query, key and value differ in dtype": ({}, SPARSE, autocast),
    "attention dropout": (
        dict(attention_dropout=0.1),
        SPARSE,
        lambda model, cache: steps_on(model.train(), cache),
    ),
    "attention weights were asked for": (
        dict(attn_implementation="eager"),
        SPARSE,
        lambda model, cache: steps_on(model, cache, output_attentions=True),
    ),
    "attention mask with a bias": ({}, SPARSE, four_dimensional(-0.5)),
    "attention mask that is not causal": ({}, SPARSE, side_by_side),
    "attention mask that is not [batch, 1, queries, length]": ({}, SPARSE, four_dimensional(True, every_head=True)),
}


# transformers' static cache takes no keys of another dtype than the first, which is what autocast brings.
ON_CACHES = [
    (reason, make) for reason in CASES for make in (dynamic, static) if (make, CASES[reason][2]) != (static, autocast)
]


@pytest.mark.parametrize(("reason", "make_cache"), ON_CACHES)
def test_a_reason_is_counted_by_its_name_and_warned_of_once(reason: str, make_cache: Callable) -> None:
    """On a static cache too, where nothing is compiled."""
    changes, knobs, work = CASES[reason]
    model = sparq.patch(build(**changes), **knobs)
    with warned() as messages:
        for _ in range(2):
            work(model, make_cache(model))
    total = sparq.report(model).total
    assert total.sparse_steps == 0 and total.dense_steps == {reason: 2 * 3}
    assert reason in REASONS
    if reason in EXPECTED:
        assert not messages
    elif reason != "shorter than min_length":  # said in other words
        assert len(messages) == 1 and reason in messages[0]


@pytest.mark.parametrize("make_cache", [dynamic, static])
def test_sliding_windows_are_expected(make_cache: Callable) -> None:
    model = sparq.patch(build("gemma3"), **SPARSE)
    with warned() as messages:
        steps_on(model, make_cache(model))
    total = sparq.report(model).total
    assert total.dense_steps == {"sliding-window layer": 2} and total.sparse_steps == 1 and not messages


def test_two_reasons_are_two_warnings() -> None:
    model = sparq.patch(build(), **SPARSE)
    with warned() as messages:
        for work in (autocast, four_dimensional(-0.5), autocast):
            work(model, dynamic(model))
    assert len(messages) == 2
    sparq.patch(model, **SPARSE)  # as its counters, its warnings start anew
    with warned() as messages:
        autocast(model, dynamic(model))
    assert len(messages) == 1


# --- No kernel --------------------------------------------------------------------------------------------------------


def without_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPARQ_BACKEND", raising=False)
    monkeypatch.setattr(sparq.attention.sparq_kernels, "backend", lambda device, dtype=torch.float32: "reference")


@pytest.mark.parametrize("make_cache", [dynamic, static])
def test_without_a_kernel_steps_are_dense_and_said_once(make_cache: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    without_kernel(monkeypatch)
    stock, model = build(), sparq.patch(build(), **SPARSE)
    with warned() as messages:
        for _ in range(2):
            actual = steps_on(model, make_cache(model))
    torch.testing.assert_close(actual, steps_on(stock, make_cache(stock)), rtol=1e-4, atol=1e-4)
    total = sparq.report(model).total
    assert total.dense_steps == {NO_KERNEL: 2 * 3} and total.sparse_steps == 0
    assert len(messages) == 1 and NO_KERNEL in messages[0]


def test_the_reference_runs_where_it_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    without_kernel(monkeypatch)
    monkeypatch.setenv("SPARQ_BACKEND", "reference")
    model = sparq.patch(build(), **SPARSE)
    with warned() as messages:
        steps_on(model, dynamic(model))
    assert sparq.report(model).total.sparse_steps == 3 and not messages


def test_float64_needs_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    without_kernel(monkeypatch)
    model = sparq.patch(build().double(), **SPARSE)
    with warned() as messages:
        steps_on(model, dynamic(model))
    assert sparq.report(model).total.sparse_steps == 3 and not messages


@pytest.mark.slow
def test_a_machine_without_a_compiler(tmp_path: Path) -> None:
    code = (
        "import warnings, sparq\n"
        "from tests.sparq.tiny import build, next_tokens, prompt, teacher_forced\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    model = sparq.patch(build(num_hidden_layers=1), r=4, k=12, min_length=0)\n"
        "    teacher_forced(model, prompt(), next_tokens(steps=2))\n"
        "total = sparq.report(model).total\n"
        "print(total.sparse_steps, total.dense_steps, sum('stays dense' in str(w.message) for w in caught))\n"
    )
    changes = dict(
        CXX="no-such-compiler", SPARQ_CACHE_DIR=str(tmp_path), PYTHONPATH=os.pathsep.join(p for p in sys.path if p)
    )
    environment = {name: value for name, value in os.environ.items() if name != "SPARQ_BACKEND"} | changes
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment, cwd=Path.cwd()
    )
    assert done.stdout.splitlines()[-1] == f"0 { ({NO_KERNEL: 2}) } 1"


# --- Calls from elsewhere ---------------------------------------------------------------------------------------------


@torch.no_grad()
def test_forward_called_past_the_hooks_is_dense_with_one_warning() -> None:
    inputs, tokens = prompt(padding=0), next_tokens()
    stock, model = build(), sparq.patch(build(), **SPARSE)
    model(**inputs)
    expected = teacher_forced(stock, inputs, tokens[:, :1])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        cache = DynamicCache(config=model.config)
        model.model.forward(inputs["input_ids"], past_key_values=cache)
        hidden = model.model.forward(tokens[:, :1], past_key_values=cache).last_hidden_state
    ours = [str(warning.message) for warning in caught if "sparq" in str(warning.message)]
    assert len(ours) == 1 and "past its hooks" in ours[0]
    torch.testing.assert_close(model.lm_head(hidden), expected, rtol=1e-4, atol=1e-4)
    assert sparq.report(model).total.decode_steps == 0
    sparq.unpatch(model)
    with warned() as messages:
        model.model.forward(inputs["input_ids"])
    assert not messages


@pytest.fixture
def wrapped() -> Iterator[list[str]]:
    """All attention functions wrapped as a library does it, dropout and more by position; names that were called."""
    called: list[str] = []

    def wrap(name: str, function: Callable) -> Callable:
        def wrapper(module, query, key, value, mask, dropout=0.0, scaling=None, is_causal=None, bias=None, **kwargs):
            called.append(name)
            return function(module, query, key, value, mask, dropout, scaling, is_causal, bias, **kwargs)

        return wrapper

    kept = dict(ALL_ATTENTION_FUNCTIONS.items())
    local = dict(ALL_ATTENTION_FUNCTIONS._local_mapping)
    for name, function in kept.items():
        ALL_ATTENTION_FUNCTIONS[name] = wrap(name, function)
    yield called
    ALL_ATTENTION_FUNCTIONS._local_mapping.clear()
    ALL_ATTENTION_FUNCTIONS._local_mapping.update(local)
    assert dict(ALL_ATTENTION_FUNCTIONS.items()) == kept


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_arguments_by_position(implementation: str, wrapped: list[str]) -> None:
    changes = dict(attn_implementation=implementation)
    expected = teacher_forced(build(**changes), prompt(), next_tokens())
    covering = sparq.patch(build(**changes), k=1000, min_length=0)
    torch.testing.assert_close(teacher_forced(covering, prompt(), next_tokens()), expected, rtol=1e-4, atol=1e-4)
    model = sparq.patch(build(**changes), **SPARSE)
    teacher_forced(model, prompt(), next_tokens())
    assert sparq.report(model).total.sparse_steps == 3 * 12
    assert f"sparq_{implementation}" in wrapped


def test_a_graph_can_count_every_reason() -> None:
    """It has a slot for what stands in REASONS; what does not would be counted as another reason."""
    assert {text for name, text in vars(sparq.reasons).items() if name.isupper() and isinstance(text, str)} == set(
        REASONS
    )
    assert len(set(REASONS)) == len(REASONS) and set(REASONS) >= EXPECTED
