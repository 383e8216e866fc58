import re

import pytest

pytestmark = pytest.mark.slow

TITLES = {"A": "Ostrava", "B": "Ostrava", "C": "New_York_City", "D": "New_York_City", "E": "Oxygen", "F": "Oxygen"}

# What the authors' own llminference/tasks/qa.py makes of the rows below: question, passages, the example's question.
SQUAD_DOCUMENTS = """
D1 CAECADBE D0
A1 CAEFBCCE A0
C1 BCAAADBC C0
F0 AEFAEFFC E1
E0 DEEFFDDE E1
B1 EBBCBBCE B0
D0 DDCDCADD D1
E1 CEEFDCFE E0
A0 DBDAEAAB A1
B0 CDDBECDB B1
C0 ABCCBAFF C1
"""
SQUAD_PROMPT = """\
Title: New York City. Background: Passage C.
Title: Ostrava. Background: Passage A.
Title: Oxygen. Background: Passage E.
Title: New York City. Background: Passage C.
Title: Ostrava. Background: Passage A.
Title: New York City. Background: Passage D.
Title: Ostrava. Background: Passage B.
Title: Oxygen. Background: Passage E.
From what you've just read about New York City, please answer the following questions.
Question: Question D0?
Answer: D0
Question: Question D1?
Answer:"""
# Likewise: question, the page's beginning and its length.
TRIVIAQA_DOCUMENTS = [
    ("q3", "Question 6?", "6b ", 4000),
    ("q2", "Question 5?", "5b ", 8000),
    ("q5", "Question 10?", "10c ", 5000),
    ("q4", "Question 9?", "9a ", 4000),
    ("q1", "Question 2?", "2b ", 4000),
    ("q0", "Question 1?", "1a ", 4000),
]

GENERATION = {"until": [], "do_sample": False, "temperature": 0.0, "max_gen_toks": 30}


@pytest.fixture
def squad():
    """Passages A to F with two questions each, F with one, whose example has to come from elsewhere."""
    return {
        "validation": [
            {
                "id": f"{name}{number}",
                "title": TITLES[name],
                "context": f"Passage {name}.",
                "question": f"Question {name}{number}?",
                "answers": {
                    "text": [f"answer {name}{number}", f"{name}{number}", f"{number}{name}"],
                    "answer_start": [0, 7, 7],
                },
            }
            for name in TITLES
            for number in range(1 if name == "F" else 2)
        ]
    }


@pytest.fixture
def triviaqa():
    """Twelve rows; every fourth has no page, every fourth one too short, the others some of 4,000 to 8,000."""
    lengths = [(3999,), (4000, 8000), (8001, 4000, 5000, 3999, 6000), ()]

    def row(i):
        pages = [f"{i}{'abcde'[j]} ".ljust(length, ".") for j, length in enumerate(lengths[i % 4])]
        return {
            "question": f"Question {i}?",
            "question_id": f"q{i // 2}",  # the web's and Wikipedia's row of one question
            "question_source": "",
            "entity_pages": {
                "doc_source": ["TagMe"] * len(pages),
                "filename": ["page.txt"] * len(pages),
                "title": ["Page"] * len(pages),
                "wiki_context": pages,
            },
            "search_results": {"search_context": ["x" * 5000]},
            "answer": {
                "aliases": [f"The Answer {i}", f"{i}."],
                "normalized_aliases": [f"answer {i}", f"{i}"],
                "value": f"The Answer {i}",
            },
        }

    return {"validation": [row(i) for i in range(12)]}


def test_squad_prompt(evaluate, squad):
    evaluation = evaluate("sparq_squad", squad, lambda prompt, settings: "", limit=1)
    assert evaluation.arguments == [(SQUAD_PROMPT, GENERATION)]


def test_squad_documents_are_the_authors(evaluate, squad):
    evaluation = evaluate("sparq_squad", squad, lambda prompt, settings: "")
    documents = []
    for document in evaluation.documents:
        passages = "".join(re.findall(r"Passage (.)", document["context"]))
        documents.append(f"{document['id']} {passages} {document['example_question'][9:11]}")
    assert documents == SQUAD_DOCUMENTS.split("\n")[1:-1]


def test_squad_limit_takes_the_first(evaluate, squad):
    def asked(limit):
        evaluation = evaluate("sparq_squad", squad, lambda prompt, settings: "", limit=limit)
        return [document["id"] for document in evaluation.documents]

    assert asked(3) == asked(None)[:3] == ["D1", "A1", "C1"]


def test_squad_counts_any_of_the_answers(evaluate, squad):
    def answer(prompt, settings):
        """Right, by the second alias, about passages A and B alone."""
        question = re.findall(r"Question (\w+)\?", prompt)[-1]
        return f" {question}\nQuestion: another?" if question[0] in "AB" else " unknown"

    evaluation = evaluate("sparq_squad", squad, answer)
    assert evaluation.metrics["match,none"] == pytest.approx(4 / 11)
    assert [score["match"] for score in evaluation.scores] == [d["id"][0] in "AB" for d in evaluation.documents]


@pytest.mark.parametrize(
    "generation, match",
    [
        ("", 0),
        (" ", 0),
        (" The Answer 6", 1),
        ("\n\nanswer 6, I think", 1),
        (' "an ANSWER 6"', 1),
        (" 6", 1),  # the alias "6." without its full stop
        (" It is the answer 6", 0),
        (" Answer", 0),
        (" 7", 0),
    ],
)
def test_triviaqa_match(evaluate, triviaqa, generation, match):
    evaluation = evaluate("sparq_triviaqa", triviaqa, lambda prompt, settings: generation, limit=1)
    assert evaluation.metrics["match,none"] == match


def test_answers_of_punctuation_match_nothing(evaluate, triviaqa):
    for row in triviaqa["validation"]:
        row["answer"]["aliases"] = ["...", "'"]
    evaluation = evaluate("sparq_triviaqa", triviaqa, lambda prompt, settings: "... anything")
    assert evaluation.metrics["match,none"] == 0


def test_triviaqa_documents_are_the_authors(evaluate, triviaqa):
    evaluation = evaluate("sparq_triviaqa", triviaqa, lambda prompt, settings: "")
    documents = evaluation.documents
    assert [
        (document["id"], document["question"], document["context"].rstrip("."), len(document["context"]))
        for document in documents
    ] == TRIVIAQA_DOCUMENTS


@pytest.mark.parametrize("task, cue", [("sparq_triviaqa", "Answer:"), ("sparq_triviaqa_pythia", "Single-word answer:")])
def test_triviaqa_prompt(evaluate, triviaqa, task, cue):
    evaluation = evaluate(task, triviaqa, lambda prompt, settings: "", limit=1)
    assert evaluation.arguments == [("6b ".ljust(4000, ".") + f"\nQuestion: Question 6?\n{cue}", GENERATION)]
