"""The pipeline answers as `sparq.answer` does, with SparQ."""

from __future__ import annotations

from typing import Any

import pytest
from byte_tokenizer import byte_tokenizer
from transformers import PreTrainedModel, pipeline

import sparq
from sparq.pipeline import SparqTextGenerationPipeline
from tests.sparq.test_questions import ASKED, TEXT
from tests.sparq.tiny import build

SPARSE = dict(r=4, k=12, index="full", min_length=0)


@pytest.fixture
def model() -> PreTrainedModel:
    return build(vocab_size=260)


def made(model: Any, **options: Any) -> SparqTextGenerationPipeline:
    return pipeline("sparq-text-generation", model=model, tokenizer=byte_tokenizer(), device="cpu", **options)


@pytest.mark.parametrize("batch_size", [None, 1, 3])
def test_answers_are_those_of_the_function(model: Any, batch_size: int | None) -> None:
    with sparq.patched(model, **SPARSE):
        expected = sparq.answer(model, byte_tokenizer(), TEXT, ASKED, max_new_tokens=12)
    assert expected != sparq.answer(model, byte_tokenizer(), TEXT, ASKED, max_new_tokens=12)
    pipe = made(model)
    assert isinstance(pipe, SparqTextGenerationPipeline)
    options: dict[str, Any] = dict(max_new_tokens=12, sparq_config=SPARSE)
    assert pipe(TEXT, questions=ASKED, batch_size=batch_size, **options) == {"answers": expected}
    assert pipe(TEXT, question=ASKED[0], **options) == {"answer": expected[0]}
    assert pipe(TEXT, questions=ASKED[:1], **options) == {"answers": expected[:1]}
    assert pipe(TEXT, **options) == {"answer": expected[2]}, "goes on from the context"
    assert pipe([TEXT, TEXT[:300]], questions=ASKED, **options)[0] == {"answers": expected}
    assert not sparq.is_patched(model)


def test_what_is_given_to_the_pipeline_is_for_all_calls(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = made(model)(TEXT, questions=ASKED, max_new_tokens=5, sparq_config=SPARSE)
    sizes = []
    real = sparq.branches.generate
    monkeypatch.setattr(
        sparq.branches,
        "generate",
        lambda *args, **options: sizes.append(options["batch_size"]) or real(*args, **options),
    )
    pipe = made(model, batch_size=2, max_new_tokens=5, sparq_config=SPARSE)
    assert pipe(TEXT, questions=ASKED) == expected
    assert pipe(TEXT, questions=ASKED, batch_size=3) == expected
    assert sizes == [2, 3]


def test_a_patched_model_decodes_as_it_is(model: Any) -> None:
    sparq.patch(model, **SPARSE)
    expected = {"answers": sparq.answer(model, byte_tokenizer(), TEXT, ASKED)}
    steps = sparq.report(model).total.sparse_steps
    assert made(model)(TEXT, questions=ASKED) == expected
    assert sparq.report(model).total.sparse_steps == 2 * steps > 0
    assert made(model)(TEXT, questions=ASKED, sparq_config=sparq.SparqConfig(min_length=9999)) != expected
    assert sparq.report(model).total.sparse_steps == 2 * steps, "a block of its own"


def test_wrong_arguments(model: Any) -> None:
    pipe = made(model)
    for options, error, message in (
        (dict(question="Why?", questions=["Who?"]), ValueError, "question must be left out beside questions, got 'Why"),
        (dict(questions="Who?"), TypeError, "questions must be a list"),
        (dict(question=["Who?"]), TypeError, "questions must be strings"),
        (dict(questions=["Who?"], batch_size=0), ValueError, "batch_size must be a whole number, at least 1, got 0"),
        (dict(question="Why?", sparq_config=dict(ratio=0)), ValueError, "ratio must be"),
    ):
        with pytest.raises(error, match=message):
            pipe(TEXT, **options)
    assert not sparq.is_patched(model)
