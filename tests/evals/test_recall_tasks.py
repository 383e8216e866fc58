"""The offline tasks: their documents are what they say, and their scores count what they should."""

import importlib.util
import math
import random
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

TASKS = Path(__file__).parents[2] / "evals" / "tasks"
SHARED = 32  # tokens at the end of a context that a sweep decodes: questions of one text differ in these alone


def load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


recall = load(TASKS / "recall" / "recall_tasks.py")


@pytest.mark.parametrize("length", [1024, 4096])
def test_pass_keys_stand_in_the_text_at_their_depths_and_fill_the_length(length):
    documents = list(recall.pass_keys(length, texts=3)["test"])
    assert len(documents) == 15
    for first in range(0, 15, 5):
        five = documents[first : first + 5]
        assert [document["depth"] for document in five] == [10, 30, 50, 70, 90]
        assert len({document["prompt"][:-SHARED] for document in five}) == 1
        assert len({document["prompt"] for document in five}) == 5
    for document in documents:
        prompt, key = document["prompt"], document["answer"]
        assert len(("?" + prompt + key).encode()) == length  # BOS is a token
        question = prompt[prompt.rindex("\n") + 1 :]
        fact = question + key + ".\n"
        assert prompt.count(fact) == 1
        assert 100 * prompt.index(fact) / len(prompt) == pytest.approx(document["depth"], abs=12)
    assert list(recall.pass_keys(length, texts=3)["test"]) == documents


def test_pass_keys_are_right_or_wrong():
    document = {"answer": "01234", "depth": 70}
    assert recall.pass_key_scores(document, ["01234"]) == {"right": 1.0, "right_at_70": 1.0}
    assert recall.pass_key_scores(document, ["01235"]) == {"right": 0.0, "right_at_70": 0.0}
    assert recall.pass_key_scores(document, [""]) == {"right": 0.0, "right_at_70": 0.0}


def test_repeated_passages_stand_in_the_text_before():
    for document in recall.repetitions(1024, texts=5)["test"]:
        text, passage = document["prompt"][:-128], document["prompt"][-128:] + document["answer"]
        assert passage in text
        assert len(document["answer"]) == 128
        assert len(document["prompt"] + document["answer"]) == 1023


def test_repetition_counts_characters_before_the_first_wrong_one():
    document = {"answer": "abcdef"}
    for generated, matched in (("abcdef", 6), ("abxdef", 2), ("", 0), ("abc", 3), ("abcdefgh", 6)):
        assert recall.repetition_scores(document, [generated]) == {"matched_characters": matched}


def test_documentation_is_scored_by_its_last_bytes():
    for document in recall.documentation(1024, texts=3)["test"]:
        assert len(document["prompt"]) == 1023 - 128
        assert len(document["answer"]) == 128
    score = recall.documentation_scores({"answer": "x" * 128}, [(-128 * math.log(2), False)])
    assert score == {"bits_per_byte": (-128 * math.log(2), 128)}


@pytest.mark.parametrize(("needles", "letters"), [("single_1", 7), ("multikey_2", 7), ("multikey_3", 36)])
def test_needles_are_asked_for_in_their_own_words(needles, letters):
    ruler = load(TASKS / "ruler" / "ruler_tasks.py")
    tokenizer = str(TASKS.parent / "models" / "recall-llama")
    documents = getattr(ruler, f"niah_{needles}")(length=1024, tokenizer=tokenizer)["test"]
    assert len(documents) == ruler.DOCUMENTS
    for document in documents.select(range(5)):
        (answer,) = document["outputs"]
        cue = document["prompt"][document["prompt"].rindex("\n") + 1 :]
        assert cue.startswith("One of the special magic ")
        assert len(answer) == letters
        assert document["prompt"].count(cue + answer) == 1
        assert len(document["prompt"]) < 1024
        assert ruler.scores(document, [answer + " and"]) == {"right": 1.0}
        assert ruler.scores(document, [" " + answer]) == {"right": 0.0}


def test_needles_are_the_same_ones_whatever_was_drawn_before():
    ruler = load(TASKS / "ruler" / "ruler_tasks.py")
    tokenizer = str(TASKS.parent / "models" / "recall-llama")
    first = ruler.niah_multikey_2(length=1024, tokenizer=tokenizer)["test"]
    random.seed(7)
    expected = random.Random(7).random()
    again = ruler.niah_multikey_2(length=1024, tokenizer=tokenizer)["test"]
    assert first["prompt"] == again["prompt"]
    assert random.random() == expected
