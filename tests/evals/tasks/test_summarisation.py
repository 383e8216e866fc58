import sys

import pytest

pytestmark = pytest.mark.slow

HIGHLIGHTS = "The cat sat on the mat .\nIt slept ."  # 35 bytes


@pytest.fixture
def articles():
    """Eight articles, the first and the last out of bounds."""
    lengths = [3999, 4000, 5000, 6000, 7000, 7999, 8000, 8001]
    return {
        "validation": [
            {"id": f"a{i}", "article": f"(CNN) {i} ".ljust(length, "."), "highlights": HIGHLIGHTS}
            for i, length in enumerate(lengths)
        ]
    }


def test_prompt(evaluate, articles, byte_tokenizer):
    evaluation = evaluate(
        "sparq_cnn_dailymail", articles, lambda prompt, settings: "", metadata={"pretrained": byte_tokenizer}, limit=1
    )
    settings = {"until": [], "do_sample": False, "temperature": 0.0, "max_gen_toks": 128}
    assert evaluation.arguments == [("Article: " + "(CNN) 1 ".ljust(4000, ".") + "\nSummary:", settings)]


def test_articles_are_the_authors(evaluate, articles, byte_tokenizer):
    evaluation = evaluate(
        "sparq_cnn_dailymail", articles, lambda prompt, settings: "", metadata={"pretrained": byte_tokenizer}
    )
    assert [document["id"] for document in evaluation.documents] == ["a1", "a4", "a6", "a5", "a2", "a3"]


@pytest.mark.parametrize(
    "summary, score",
    [
        ("", 0),
        ("Dogs barked .", 0),
        (HIGHLIGHTS, 1),
        ("Cats sat on the mats", 5 / 6.5),  # stems: 5 words in order, of 5 and of 8
        (HIGHLIGHTS + " And much more, which is more than the reference has and is cut off.", 1),
        ("." * 35 + HIGHLIGHTS, 0),  # likewise
    ],
)
def test_rouge(evaluate, articles, byte_tokenizer, summary, score):
    evaluation = evaluate(
        "sparq_cnn_dailymail", articles, lambda prompt, settings: summary, metadata={"tokenizer": byte_tokenizer}
    )
    assert evaluation.metrics["rougeL,none"] == pytest.approx(score)


def test_the_tokenizer_has_to_be_named(evaluate, articles):
    with pytest.raises(ValueError, match="needs the model's tokenizer: name it with --model_args"):
        evaluate("sparq_cnn_dailymail", articles, lambda prompt, settings: "")


def test_a_missing_package_is_named_at_once(evaluate, articles, byte_tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score", None)

    def answer(prompt, settings):
        raise AssertionError("generated in vain")

    with pytest.raises(ImportError, match="pip install rouge-score"):
        evaluate("sparq_cnn_dailymail", articles, answer, metadata={"pretrained": byte_tokenizer})
