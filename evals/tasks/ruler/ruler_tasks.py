"""RULER's needles (Hsieh et al., 2024), asked for in the words in which they stand in the text.

RULER asks "What is the special magic number for X mentioned in the provided text?", but the needle says "One of the
special magic numbers for X is: 7." A byte-level model without any instruction tuning finds what followed the same words
before; it does not understand the question. The texts, the needles and the score are those of the harness.
"""

import random
import re
from collections.abc import Callable
from typing import Any

import datasets
from lm_eval.tasks.ruler import niah_utils

DOCUMENTS = 100


def niah_single_1(length: int, **others: Any) -> dict[str, datasets.Dataset]:
    """One number in a noise of repeated sentences."""
    return _cued(niah_utils.niah_single_1, length, others)


def niah_multikey_2(length: int, **others: Any) -> dict[str, datasets.Dataset]:
    """One number among numbers for other words: the text is nothing but needles."""
    return _cued(niah_utils.niah_multikey_2, length, others)


def niah_multikey_3(length: int, **others: Any) -> dict[str, datasets.Dataset]:
    """The same with random identifiers, 36 characters each, for words and numbers."""
    return _cued(niah_utils.niah_multikey_3, length, others)


def _cued(
    make: Callable[..., dict[str, datasets.Dataset]], length: int, others: dict[str, Any]
) -> dict[str, datasets.Dataset]:
    """The documents that `make` draws, the same ones always: the harness draws them from Python's global generator."""
    state = random.getstate()
    random.seed(0)
    try:
        data = make(max_seq_lengths=[length], **others)
    finally:
        random.setstate(state)

    def cue(document: dict[str, Any]) -> dict[str, str]:
        found = re.search(r"The special magic (\w+) for (.+) mentioned in", document["gen_prefix"])
        if found is None:
            raise ValueError(f"gen_prefix must name what is asked for, got {document['gen_prefix']!r}")
        kind, key = found.groups()
        return {"prompt": f"{document['input']}\nOne of the special magic {kind}s for {key} is: "}

    test = data["test"].select(range(DOCUMENTS)).map(cue)
    return {"test": test}


def scores(document: dict[str, Any], results: list[str]) -> dict[str, float]:
    return {"right": float(results[0].startswith(document["outputs"][0]))}
