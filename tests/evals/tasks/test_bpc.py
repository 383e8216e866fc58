import math

import pytest

pytestmark = pytest.mark.slow

# 6,000 characters end inside the word "prefill", 400 more inside "reference".
PREFILL = " = Title = \n \n ".ljust(5996, "x") + " prefill"
REFERENCE = " reads".ljust(396, "y") + " reference"


@pytest.fixture
def pages():
    texts = [
        PREFILL + REFERENCE + " and what nobody reads",
        "too short",
        PREFILL + " short",
        PREFILL + "\n" + REFERENCE[1:] + "\n",
        PREFILL + REFERENCE,
        "x" * 8000,  # a single word
    ]
    return {"train": [{"page": text} for text in texts]}


def test_pages_are_split_at_whitespace(evaluate, pages):
    evaluation = evaluate("sparq_wikitext103", pages, lambda prefill, reference: (0.0, False))
    assert sorted(evaluation.arguments) == [
        (PREFILL, "\n" + REFERENCE[1:]),
        (PREFILL, REFERENCE),
        (PREFILL, REFERENCE),
    ]


def test_bits_per_character(evaluate, pages):
    def log_likelihood(prefill, reference):
        return (-math.log(2) * len(reference) * (4 if reference.startswith("\n") else 1), False)

    evaluation = evaluate("sparq_wikitext103", pages, log_likelihood)
    assert evaluation.metrics["bpc,none"] == pytest.approx((1 + 1 + 4) / 3)
    assert sorted(score["bpc"] for score in evaluation.scores) == pytest.approx([1, 1, 4])


def test_every_page_has_the_same_weight(evaluate, pages):
    pages["train"][0]["page"] = PREFILL + REFERENCE + "z" * 394  # twice as long

    def log_likelihood(prefill, reference):
        return (-math.log(2) * len(reference) * (4 if "z" in reference else 1), False)

    assert evaluate("sparq_wikitext103", pages, log_likelihood).metrics["bpc,none"] == pytest.approx((1 + 1 + 4) / 3)


def test_order_and_limit(evaluate):
    text = PREFILL + REFERENCE
    pages = {"train": [{"page": text.replace("Title", f"Page{i}")} for i in range(6)]}
    evaluation = evaluate("sparq_wikitext103", pages, lambda prefill, reference: (0.0, False), limit=4)
    assert [prefill[3:8] for prefill, _ in evaluation.arguments] == ["Page0", "Page3", "Page5", "Page4"]
