"""WikiText-103 as the SparQ paper ran it: bits per character of a continuation.

The rules are those of llminference/tasks/bpc.py in github.com/graphcore-research/llm-inference-research.
"""

import math
import re

import datasets

SHUFFLE_SEED = 2353669
# 6,000 characters and the rest of the last word, then 400 and the rest of the last word. Pages that are shorter do not
# match.
SPLIT = re.compile(r"(.{6000}.*?)(\s.{399}.*?)(?:\s|$)", flags=re.DOTALL)


def wikitext103(source: dict, **_) -> dict[str, datasets.Dataset]:
    """Documents of sparq_wikitext103: prefill, reference (which begins with the whitespace between the two).

    source: arguments of datasets.load_dataset. lm-eval adds the model's arguments and the task's metadata, unused here.
    """
    splits = (SPLIT.match(row["page"]) for row in datasets.load_dataset(**source)["train"])
    documents = [{"prefill": split[1], "reference": split[2]} for split in splits if split]
    return {"test": datasets.Dataset.from_list(documents).shuffle(seed=SHUFFLE_SEED)}


def process_results(doc: dict, results: list[tuple[float, bool]]) -> dict[str, float]:
    """bpc: bits per character of the reference, given the prefill."""
    ((log_likelihood, _),) = results
    return {"bpc": -log_likelihood / math.log(2) / len(doc["reference"])}
