"""The tasks for a pretrained chat model: their documents are what they say, and their scores count what they should."""

import re

import pytest
import sweep
from byte_tokenizer import byte_tokenizer, save_byte_tokenizer

from tests.evals.test_recall_tasks import TASKS, load

pytestmark = pytest.mark.slow

chat = load(TASKS / "chat" / "chat_tasks.py")
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> str:
    """Bytes, with a chat template."""
    folder = tmp_path_factory.mktemp("tokenizer")
    save_byte_tokenizer(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return str(folder)


@pytest.mark.parametrize("length", [2048, 4096])
def test_pass_keys_stand_in_a_text_that_its_questions_share(tokenizer, length):
    documents = list(chat.pass_keys(length, tokenizer, texts=2)["test"])
    assert [document["depth"] for document in documents] == 2 * [10, 30, 50, 70, 90]
    for document in documents:
        prompt = document["prompt"]
        assert prompt.startswith("<user>")
        (name,) = re.findall(r"What is the pass key of (\w+)\?\n<assistant>The pass key of \1$", prompt[:-3])
        assert prompt.count(f"The pass key of {name} is{document['answer']}.\n") == 1
        assert len(byte_tokenizer()(prompt).input_ids) <= length + 5 * 30  # these names and facts are many bytes
    for first in (0, 5):
        texts = {document["prompt"].rpartition("\n\nWhat is")[0] for document in documents[first : first + 5]}
        assert len(texts) == 1
        assert len({len(document["prompt"]) for document in documents[first : first + 5]}) == 1
    assert list(chat.pass_keys(length, tokenizer, texts=2)["test"]) == documents


@pytest.mark.parametrize("make", [chat.niah_single_1, chat.niah_multikey_2, chat.niah_multikey_3])
def test_needles_are_asked_for_as_ruler_asks(tokenizer, make):
    documents = list(make(4096, tokenizer, texts=2)["test"])
    assert len(documents) >= 2
    for document in documents:
        text, question = document["prompt"].rsplit("\nWhat is the special magic ", 1)
        (key,) = re.findall(r"for (\S+) mentioned in the provided text\?\n<assistant>", question)
        assert question.endswith(f"for {key} mentioned in the provided text is")
        assert f"for {key} is:{document['answer']}." in text
    assert list(make(4096, tokenizer, texts=2)["test"]) == documents


def test_needles_in_one_text_are_asked_for_in_as_many_tokens(tokenizer):
    documents = list(chat.niah_multikey_2(4096, tokenizer, texts=4)["test"])
    texts = {}
    for document in documents:
        texts.setdefault(document["prompt"].rsplit("\nWhat is", 1)[0], []).append(document["prompt"])
    assert len(texts) == 4
    assert all(len(set(prompts)) == len(prompts) for prompts in texts.values())
    assert all(len({len(prompt) for prompt in prompts}) == 1 for prompts in texts.values())
    assert max(map(len, texts.values())) > 1


def test_tracked_variables_count_by_share():
    document = {"outputs": ["ABC", "DEF", "GHI", "JKL"]}
    assert chat.tracked(document, ["ABC JKL and XYZ"]) == {"right": 0.5}


def test_repeated_passages_stand_in_the_text_before(tokenizer):
    for document in chat.repetitions(1024, tokenizer, texts=4)["test"]:
        passage = document["prompt"][-chat.CUE :] + document["answer"]
        assert "\N{REPLACEMENT CHARACTER}" in passage or passage in document["prompt"][: -chat.CUE]
    document = {"answer": "abcdef"}
    assert chat.repetition_scores(document, ["abcxef"]) == {"matched_characters": 3}
    assert chat.repetition_scores(document, ["abcdefgh"]) == {"matched_characters": 6}


def test_texts_are_scored_in_bits_per_byte(tokenizer):
    documents = list(chat.plain_texts(1024, tokenizer, texts=3)["test"])
    assert len({document["prompt"] for document in documents}) == 3
    assert chat.text_scores({"answer": "aé"}, [(-6.0, False)]) == {"bits_per_byte": (-6.0, 3)}


def test_an_answer_is_right_where_every_token_is_the_likeliest():
    assert chat.right({}, [(-0.1, True)]) == {"right": 1.0}
    assert chat.right({}, [(-0.1, False)]) == {"right": 0.0}


def test_the_sweep_decodes_whole_questions(smollm2):
    """What is shared by the questions about a text ends before the last tokens that the plan decodes."""
    loaded = chat.load(str(smollm2))
    for task in ("chat_pass_key_1k", "chat_niah_multikey_2_1k"):
        decoded = sweep.CHAT_PLAN[task].decoded if task in sweep.CHAT_PLAN else 48
        make = chat.pass_keys if "pass_key" in task else chat.niah_multikey_2
        prompts = [loaded(document["prompt"]).input_ids for document in list(make(1024, str(smollm2), texts=1)["test"])]
        assert len(prompts) == 5
        assert len({tuple(prompt[:-decoded]) for prompt in prompts}) == 1
