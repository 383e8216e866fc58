"""SQuAD and TriviaQA as the SparQ paper ran them.

The rules are those of llminference/tasks/qa.py in github.com/graphcore-research/llm-inference-research. A rule drawn
by lot is drawn here from the same generator, seed and order of draws, so the documents are the authors' own, in their
order: the first N are the N that they evaluated.
"""

import collections
import re
from collections.abc import Iterator

import datasets
import numpy as np

SQUAD_SEED, SQUAD_SHUFFLE_SEED = 82735235, 945237
TRIVIAQA_SEED, TRIVIAQA_SHUFFLE_SEED = 2751584, 487523
DISTRACTORS = 7
# The authors draw five examples for every question and use the first in SQuAD, none in TriviaQA. What is drawn in vain
# still moves the generator on.
EXAMPLES = 5
TRIVIAQA_CHARACTERS = range(4000, 8001)

ENDS = re.compile(r"""^[\s"'_.,]*(the |a |an )?|[\s"'_.,]*$""")


def squad(source: dict, **_) -> dict[str, datasets.Dataset]:
    """Documents of sparq_squad: id, context (8 passages), title, example_question, example_answer, question, answers.

    source: arguments of datasets.load_dataset. lm-eval adds the model's arguments and the task's metadata, unused here.
    """
    rows = datasets.load_dataset(**source)["validation"].to_list()
    documents = datasets.Dataset.from_list(list(squad_documents(rows)))
    return {"test": documents.shuffle(seed=SQUAD_SHUFFLE_SEED)}


def squad_documents(rows: list[dict]) -> Iterator[dict]:
    """One document per row of SQuAD 1.1, in the order of rows."""
    rng = np.random.RandomState(SQUAD_SEED)
    rows_on = collections.defaultdict(list)
    for row in rows:
        rows_on[row["context"]].append(row)
    passages = sorted({passage(row) for row in rows})
    for row in rows:
        # Drawn with replacement: a distractor can come twice, and can be the passage itself.
        context = [passage(row)] + [passages[i] for i in rng.choice(len(passages), DISTRACTORS)]
        rng.shuffle(context)
        # The example asks about the same passage; if that has no other question, about any.
        neighbours = [other for other in rows_on[row["context"]] if other["id"] != row["id"]]
        rng.shuffle(neighbours)
        others = [rows[i] for i in rng.choice(len(rows), EXAMPLES + 1) if rows[i]["id"] != row["id"]]
        example = (neighbours + others)[0]
        yield {
            "id": row["id"],
            "context": "\n".join(context),
            "title": title(row),
            "example_question": example["question"],
            "example_answer": min(example["answers"]["text"], key=len),
            "question": row["question"],
            "answers": row["answers"]["text"],
        }


def title(row: dict) -> str:
    return row["title"].replace("_", " ")


def passage(row: dict) -> str:
    return f"Title: {title(row)}. Background: {row['context']}"


def triviaqa(source: dict, **_) -> dict[str, datasets.Dataset]:
    """Documents of sparq_triviaqa: id, context (one Wikipedia page), question, answers.

    source: arguments of datasets.load_dataset. lm-eval adds the model's arguments and the task's metadata, unused here.
    """
    rows = datasets.load_dataset(**source)["validation"]
    # Web pages make up most of a row, and only Wikipedia's are used.
    rows = rows.select_columns(["question_id", "question", "answer", "entity_pages"])
    documents = datasets.Dataset.from_list(list(triviaqa_documents(rows)))
    return {"test": documents.shuffle(seed=TRIVIAQA_SHUFFLE_SEED)}


def triviaqa_documents(rows: datasets.Dataset) -> Iterator[dict]:
    """One document per row that has a Wikipedia page of 4,000 to 8,000 characters, in the order of rows."""
    rng = np.random.RandomState(TRIVIAQA_SEED)
    for row in rows:
        pages = [page for page in row["entity_pages"]["wiki_context"] if len(page) in TRIVIAQA_CHARACTERS]
        if not pages:
            continue
        rng.choice(len(rows), EXAMPLES + 2)
        yield {
            "id": row["question_id"],
            "context": pages[rng.randint(len(pages))],
            "question": row["question"],
            "answers": row["answer"]["aliases"],
        }


def process_results(doc: dict, results: list[str]) -> dict[str, float]:
    """match: 1 if the generation begins with one of the answers, case, articles and outer punctuation aside."""
    (generation,) = results
    answers = [normalised(answer) for answer in doc["answers"]]
    # An answer of nothing but punctuation would match everything.
    return {"match": float(any(normalised(generation).startswith(answer) for answer in answers if answer))}


def normalised(text: str) -> str:
    return ENDS.sub("", text.lower())
