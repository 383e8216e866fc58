"""`answer`: each question gets the answer that it gets alone, from a context that is read once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import sparq
from sparq import branches, questions
from tests.sparq.tiny import build

ROOT = Path(__file__).parents[2]
RECALL = ROOT / "evals" / "models" / "recall-llama"
KEYS = {"amber": "48213", "basalt": "70956", "cobalt": "31487"}  # of evals/demo.txt
TEXT = "".join(f"line {i} has the number {i * i}.\n" for i in range(20))
ASKED = ["Why?", "And what of line 7, then?", "", "?"]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<pad>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture
def model() -> PreTrainedModel:
    return build(vocab_size=260)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return byte_tokenizer()


@pytest.fixture
def chat_tokenizer(tokenizer: Any) -> PreTrainedTokenizerBase:
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any, Any]]:
    """Prompts, options and tokens of each call of `branches.generate`."""
    calls, real = [], branches.generate

    def listening(model: Any, prompts: Any, **options: Any) -> Any:
        found = real(model, prompts, **options)
        calls.append((prompts, options, found.new_tokens))
        return found

    monkeypatch.setattr(branches, "generate", listening)
    return calls


def alone(model: Any, tokenizer: Any, text: str, **options: Any) -> str:
    """What `generate` answers to a text."""
    inputs = tokenizer(text, return_tensors="pt")
    options = dict(do_sample=False, pad_token_id=258) | options
    output = model.generate(inputs.input_ids, attention_mask=inputs.attention_mask, **options)
    return tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True).strip()


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("sparse", [False, True], ids=["stock", "SparQ"])
def test_a_model_that_knows_answers_right(batch_size: int, sparse: bool) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(RECALL), AutoTokenizer.from_pretrained(RECALL)
    if sparse:
        sparq.patch(model, min_length=0)
    text = (ROOT / "evals" / "demo.txt").read_text(encoding="utf-8")
    asked = [f"The pass key of {name} is" for name in KEYS]
    found = sparq.answer(model, tokenizer, text, asked, batch_size=batch_size, max_new_tokens=8)
    assert [answer[:5] for answer in found] == list(KEYS.values())
    if sparse:
        total = sparq.report(model).total
        assert total.sparse_steps == total.decode_steps == 4 * 7 * (1 if batch_size == 3 else 3)


@pytest.mark.parametrize("batch_size", [1, 2, 4, 9])
@pytest.mark.parametrize("sparse", [False, True], ids=["stock", "SparQ"])
def test_each_question_has_the_answer_that_it_has_alone(
    model: Any, tokenizer: Any, batch_size: int, sparse: bool
) -> None:
    if sparse:
        sparq.patch(model, r=4, k=12, index="full", min_length=0)
    found = sparq.answer(model, tokenizer, TEXT, ASKED, batch_size=batch_size, max_new_tokens=12)
    assert found == [alone(model, tokenizer, TEXT + question, max_new_tokens=12) for question in ASKED]
    assert len(set(found)) > 1


def test_token_ids(model: Any, tokenizer: Any) -> None:
    context, *rest = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (TEXT, *ASKED[:2]))
    expected = sparq.answer(model, tokenizer, [256, *context], rest, max_new_tokens=6)
    assert expected == sparq.answer(model, tokenizer, TEXT, ASKED[:2], max_new_tokens=6)
    tensors = [torch.tensor(tokens) for tokens in rest]
    assert expected == sparq.answer(model, tokenizer, torch.tensor([256, *context]), tensors, max_new_tokens=6)


def test_a_chat_template_makes_context_and_question_a_turn(model: Any, chat_tokenizer: Any, asked: Any) -> None:
    sparq.answer(model, chat_tokenizer, TEXT, ["Why?", "Who?"], answer_prefix="It is", max_new_tokens=3)
    prompts, options, _ = asked[-1]
    turn = f"user: {TEXT.rstrip()}\n\n"
    assert chat_tokenizer.batch_decode(prompts) == [f"{turn}{q}<pad>assistant: It is" for q in ("Why?", "Who?")]
    assert set(options["eos_token_id"]) >= {257, 258}, "the tokenizer's, and what the template ends a turn with"
    sparq.answer(model, chat_tokenizer, TEXT, ["Why?"], answer_prefix=" It is", chat_template=False, max_new_tokens=3)
    prompts, options, _ = asked[-1]
    assert chat_tokenizer.batch_decode(prompts) == [f"<bos>{TEXT}Why? It is"] and "eos_token_id" not in options


def test_options_reach_generate(model: Any, tokenizer: Any, asked: Any) -> None:
    torch.manual_seed(0)
    found = [sparq.answer(model, tokenizer, TEXT, ["Why?"], do_sample=True, temperature=9.0) for _ in range(2)]
    assert found[0] != found[1] and asked[-1][1]["do_sample"]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_an_answer_ends_where_the_model_writes_a_stop_string(
    model: Any, tokenizer: Any, asked: Any, batch_size: int
) -> None:
    """Of each row of a batch, whatever padding `generate` fills it up with."""
    sparq.answer(model, tokenizer, TEXT, ASKED, max_new_tokens=12)
    free = asked[-1][2]
    stop = next(row[3] for row in free if row[3] < 128)  # of ASCII, so that it is a text by itself
    for eos in (257, None):  # without one `generate` does not even pad
        model.generation_config.eos_token_id = eos
        options = dict(stop_strings=[chr(stop)], batch_size=batch_size)
        sparq.answer(model, tokenizer, TEXT, ASKED, max_new_tokens=12, **options)
        ends = [next((i + 1 for i, token in enumerate(row) if token in (stop, eos)), 12) for row in free]
        assert asked[-1][2] == [row[:end] for row, end in zip(free, ends, strict=True)]
        assert len(set(ends)) > 1


def test_a_prompt_cache(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    lengths: list[int] = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    expected = sparq.answer(model, tokenizer, TEXT, ASKED[:2], max_new_tokens=4)
    for batch_size, passes in ((1, [len(TEXT) + 1, 4, 25]), (1, [4, 25]), (2, [25])):
        lengths.clear()
        options = dict(max_new_tokens=4, batch_size=batch_size, prompt_cache=tmp_path / "kept")
        assert sparq.answer(model, tokenizer, TEXT, ASKED[:2], **options) == expected
        assert [length for length in lengths if length > 1] == passes


def test_what_cannot_be_asked_is_refused_before_anything_is_read(
    model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(model), "forward", lambda *args, **kwargs: pytest.fail("read"))
    windows = build("gemma3", vocab_size=260)
    monkeypatch.setattr(type(windows), "forward", lambda *args, **kwargs: pytest.fail("read"))
    right: dict[str, Any] = dict(model=model, tokenizer=tokenizer, context=TEXT, questions=["Why?"])
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        (dict(model=tokenizer), TypeError, "model must be a transformers PreTrainedModel"),
        (dict(tokenizer=model), TypeError, "tokenizer must be a tokenizer of transformers, got LlamaForCausalLM"),
        (dict(questions="Why?"), TypeError, "questions must be a list, of one question or more, got str"),
        (dict(questions=torch.tensor([1])), TypeError, "questions must be a list, of one question or more, got Tensor"),
        (dict(questions=[]), ValueError, "questions must be one at least, got an empty list"),
        (dict(questions=["Why?", 5]), TypeError, "questions must be strings, as context is, got int"),
        (dict(context=[1, 2]), TypeError, r"questions must be text, or token ids, integers \[n\], got 'Why\?'"),
        (dict(context=[1, 2], questions=[torch.ones(3)]), TypeError, r"got torch.float32 \[3\]"),
        (dict(context=[1, True], questions=[[1]]), TypeError, "context must be text, or token ids"),
        (dict(context=None), TypeError, "context must be text, or token ids, integers .*, got None"),
        (dict(context=" \n"), ValueError, "context must hold text"),
        (dict(context=[], questions=[[1]]), ValueError, "context must hold tokens, got none"),
        (dict(batch_size=0), ValueError, "batch_size must be a whole number, at least 1, got 0"),
        (dict(batch_size=True), ValueError, "batch_size must be a whole number, at least 1, got True"),
        (dict(max_new_tokens=0), ValueError, "max_new_tokens must be a whole number, at least 1, got 0"),
        (dict(answer_prefix=None), TypeError, "answer_prefix must be a string, got NoneType"),
        (dict(num_beams=2), ValueError, "num_beams must be 1, got 2"),
        (dict(num_return_sequences=2, do_sample=True), ValueError, "num_return_sequences must be 1, got 2"),
        (dict(attention_mask=None), TypeError, "options must be such as max_new_tokens=20 .*, got attention_mask"),
        (dict(prompt_cache=tmp_path / "no" / "kept"), ValueError, "prompt_cache must be in a folder that exists"),
        (
            dict(model=windows, questions=["Why?", "Who?"], batch_size=2, prompt_cache=tmp_path / "kept"),
            ValueError,
            "batch_size must be 1 with a prompt cache where layers have sliding windows",
        ),
    ]
    for changes, error, message in cases:
        with pytest.raises(error, match=message):
            sparq.answer(**right | changes)
    assert not list(tmp_path.iterdir())
    model.generation_config.num_beams = 3
    with pytest.raises(ValueError, match="num_beams must be 1, got 3"):
        sparq.answer(**right)


def test_a_chat_template_that_fails_says_what_to_do(model: Any, tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ raise_exception('no such role') }}"
    with pytest.raises(ValueError, match=r"chat template fails, chat_template=False .*: no such role"):
        sparq.answer(model, tokenizer, TEXT, ["Why?"])


def test_a_turn_ends_with_what_the_template_closes_it_with(model: Any, chat_tokenizer: Any) -> None:
    assert questions.generate_options(chat_tokenizer, model, chat=True)["eos_token_id"][-2:] == [257, 258]
