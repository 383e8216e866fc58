import re

import numpy as np
import pytest
from recall_text import PASS_KEY_FORM, PASSAGE_CUE, RecallText, Role, held_out_text, training_text

pytestmark = pytest.mark.slow


def role_bytes(text, role):
    return text.data[text.roles == role].tobytes()


@pytest.mark.parametrize("length", [256, 1024, 4096])
@pytest.mark.parametrize("kind", ["random_repeats", "word_repeats", "passage_repeats", "facts"])
def test_every_byte_has_a_role(kind, length):
    source = RecallText(seed=1)
    for _ in range(10):
        text = getattr(source, kind)(length)
        assert len(text.data) == len(text.roles) <= length
        assert text.data.dtype == text.roles.dtype == np.uint8


def test_passages_repeat_what_stands_earlier():
    source = RecallText(seed=2)
    for _ in range(10):
        text = source.passage_repeats(1024)
        data = text.data.tobytes()
        repeated = np.flatnonzero(text.roles == Role.REPEATED)
        for run in np.split(repeated, np.flatnonzero(np.diff(repeated) > 1) + 1):
            start, stop = run[0] - PASSAGE_CUE, run[-1] + 1
            assert data.find(data[start:stop]) < start


def test_answers_are_the_facts_digits():
    source = RecallText(seed=3)
    for _ in range(20):
        text = source.facts(1024)
        facts = re.findall(rb"\d+", role_bytes(text, Role.RANDOM))
        assert sorted(role_bytes(text, Role.ANSWER)) == sorted(b"".join(facts))


@pytest.mark.parametrize("length", [1024, 4096, 8192])
def test_pass_key_stands_in_the_prompt_once(length):
    source = RecallText(seed=4, held_out=True)
    for _ in range(10):
        task = source.pass_key(length)
        name = re.search(rb"The pass key of (\w+) is $", task.prompt).group(1).decode()
        assert re.fullmatch(rb"\d{5}", task.answer)
        fact = PASS_KEY_FORM.format(name, task.answer.decode()).encode()
        assert task.prompt.count(fact) == 1
        assert len(task.prompt) + len(task.answer) == length - len(".\n")


@pytest.mark.parametrize("length", [1024, 4096, 8192])
def test_repetition_continues_a_passage_of_the_prompt(length):
    source = RecallText(seed=5, held_out=True)
    for _ in range(10):
        task = source.repetition(length, cue=128, continuation=64)
        assert len(task.prompt) + len(task.answer) == length
        passage = task.prompt[-128:] + task.answer
        assert passage in task.prompt[:-128]


def test_held_out_text_is_not_in_the_training_text():
    training, held_out = training_text(), held_out_text()
    assert len(held_out) > 2 * 8192
    pieces = {held_out[start : start + 64] for start in range(0, len(held_out) - 64, 64)}
    rulers = {piece for piece in pieces if re.search(rb"(.)\1{7}", piece)}  # tables everywhere look the same
    assert len(pieces - rulers) > 200
    assert not any(piece in training for piece in pieces - rulers)


def test_a_seed_gives_the_same_text_again():
    first, second = (RecallText(seed=6, held_out=True) for _ in range(2))
    assert first.pass_key(1024) == second.pass_key(1024)
    assert first.repetition(1024) == second.repetition(1024)
    assert first.pass_key(1024) != RecallText(seed=7, held_out=True).pass_key(1024)
