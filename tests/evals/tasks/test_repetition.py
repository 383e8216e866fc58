import itertools

import pytest

pytestmark = pytest.mark.slow

WHOLE = object()
# The first five that the authors' own llminference/tasks/repetition.py makes of the text below.
ORDER = [7965, 17107, 1175, 6789, 8749]


@pytest.fixture
def text():
    """Words of seven characters; three contexts of about 6,000 and a remainder."""
    words = (
        "".join(letters) for letters in itertools.product("abcdefg", "tuvwxyz", "hijklm", "nopqrs", "abcdef", "st")
    )
    return " ".join(itertools.islice(words, 2800))


@pytest.fixture
def splits(text):
    """As the hub has it: one row a split, the text cut in the middle of words."""
    parts = {"train": text[:17003], "validation": text[17003:19001], "test": text[19001:]}
    return {name: [{"text": part}] for name, part in parts.items()}


def expected_reference(text, prompt):
    """What follows the prompt in the text, to the end of the word in which the 256th character stands."""
    assert text.count(prompt) == 1
    start = text.index(prompt) + len(prompt)
    return text[start : text.index(" ", start + 256)]


def test_prompts(evaluate, splits, text):
    evaluation = evaluate("sparq_repetition", splits, lambda prompt, settings: "")
    settings = {"until": [], "do_sample": False, "temperature": 0.0, "max_gen_toks": 128}
    assert len(evaluation.documents) == 3 * 15
    for document, arguments in zip(evaluation.documents, evaluation.arguments, strict=True):
        context, prompt = document["context"], document["prompt"]
        assert arguments == (context + "\n" + prompt, settings)
        assert 6000 <= len(context) < 6007 and context in text
        assert 128 <= len(prompt) < 135
        assert prompt + document["reference"] in context
        assert document["reference"] == expected_reference(text, prompt)
        assert text.startswith(prompt, document["id"])


def test_order_and_limit(evaluate, splits):
    evaluation = evaluate("sparq_repetition", splits, lambda prompt, settings: "", limit=5)
    assert [document["id"] for document in evaluation.documents] == ORDER


@pytest.mark.parametrize(
    "generation, length",
    [
        (lambda reference: "", 0),
        (lambda reference: "?", 0),
        (lambda reference: reference, WHOLE),
        (lambda reference: reference[1:], WHOLE),
        (lambda reference: "\n  " + reference[1:] + " and on", WHOLE),
        (lambda reference: reference[:101] + "?" + reference[102:], 100),
        (lambda reference: reference[:101], 100),  # ends early, without an error
    ],
)
def test_match_length(evaluate, splits, text, generation, length):
    def answer(prompt, settings):
        return generation(expected_reference(text, prompt[prompt.index("\n") + 1 :]))

    evaluation = evaluate("sparq_repetition", splits, answer)
    # Less the space that every reference begins with.
    lengths = [len(document["reference"]) - 1 if length is WHOLE else length for document in evaluation.documents]
    assert [score["match_length_char"] for score in evaluation.scores] == lengths
    assert evaluation.metrics["match_length_char,none"] == pytest.approx(sum(lengths) / len(lengths))
