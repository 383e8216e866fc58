"""The documents of the offline tasks, and their scores: what byte-level models can find in texts that come with Python.

Every text counts in bytes, the tokens of the bundled models, and leaves one token for BOS: a document of `length` is a
sequence of `length` tokens, answer included.
"""

import string
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np

sys.path.append(str(Path(__file__).parents[2]))  # the harness loads this file by its path, outside any package
from documents import hide
from recall_text import PASS_KEY_FORM, held_out_text

SEED = 20_232
DEPTHS = (10, 30, 50, 70, 90)  # percent of the text before a fact
NAME_LENGTHS = (4, 8)
CUE = CONTINUATION = 128
SCORED_TEXT = 128  # bytes whose bits are counted


def pass_keys(length: int, texts: int = 20, **_: Any) -> dict[str, datasets.Dataset]:
    """Texts with five facts each, at even depths, and a question for each of them: what follows its name?

    The names in a text are equally long, so that its questions differ in nothing but the name.
    """

    def documents() -> Iterator[dict[str, Any]]:
        rng = np.random.default_rng(SEED)
        for _ in range(texts):
            letters = rng.integers(*NAME_LENGTHS, endpoint=True)
            names: list[str] = []
            while len(names) < len(DEPTHS):
                name = "".join(string.ascii_lowercase[i] for i in rng.integers(0, 26, letters))
                names += [name] if name not in names else []
            keys = [f"{key:05d}" for key in rng.integers(0, 100_000, len(names))]
            facts = [PASS_KEY_FORM.format(name, key) + "\n" for name, key in zip(names, keys, strict=True)]
            questions = [fact[: fact.rindex(key)] for fact, key in zip(facts, keys, strict=True)]
            plain = _plain(rng, length - 1 - sum(map(len, facts)) - 1 - len(questions[0]) - len(keys[0]))
            text = hide(plain, facts, DEPTHS, 80)
            for depth, question, key in zip(DEPTHS, questions, keys, strict=True):
                yield {"prompt": f"{text}\n{question}", "answer": key, "depth": depth}

    return {"test": datasets.Dataset.from_list(list(documents()))}


def pass_key_scores(document: dict[str, Any], results: list[str]) -> dict[str, float]:
    right = float(results[0].startswith(document["answer"]))
    return {"right": right, f"right_at_{document['depth']}": right}


def repetitions(length: int, texts: int = 100, **_: Any) -> dict[str, datasets.Dataset]:
    """Texts that end with the first bytes of a passage that stands in them: how does it go on?"""

    def documents() -> Iterator[dict[str, Any]]:
        rng = np.random.default_rng(SEED + 1)
        passage = CUE + CONTINUATION
        while True:
            text = _plain(rng, length - 1 - passage)
            start = int(rng.integers(0, len(text) - passage + 1))
            again = text[start : start + passage]
            # A ruler or a deep indent cannot be continued: nothing in it says how long it already is.
            if not any(character * 8 in again for character in set(again)):
                yield {"prompt": text + again[:CUE], "answer": again[CUE:]}

    return {"test": datasets.Dataset.from_list([document for document, _ in zip(documents(), range(texts))])}  # noqa: B905


def repetition_scores(document: dict[str, Any], results: list[str]) -> dict[str, int]:
    """How many characters of the answer are matched before the first that is not."""
    matches = [a == b for a, b in zip(results[0], document["answer"], strict=False)]
    return {"matched_characters": ([*matches, False]).index(False)}


def documentation(length: int, texts: int = 100, **_: Any) -> dict[str, datasets.Dataset]:
    """Held-out documentation, the last bytes of which are scored."""
    rng = np.random.default_rng(SEED + 2)
    plain = [_plain(rng, length - 1) for _ in range(texts)]
    return {
        "test": datasets.Dataset.from_list([{"prompt": t[:-SCORED_TEXT], "answer": t[-SCORED_TEXT:]} for t in plain])
    }


def documentation_scores(document: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, Any]:
    return {"bits_per_byte": (results[0][0], len(document["answer"]))}


def _plain(rng: np.random.Generator, length: int) -> str:
    text = held_out_text()
    start = int(rng.integers(0, len(text) - length))
    return text[start : start + length].decode("ascii", "replace").replace("\N{REPLACEMENT CHARACTER}", "?")
