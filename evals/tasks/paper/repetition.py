"""Shakespeare repetition as the SparQ paper ran it: copy on from a line that has stood in the context before.

The rules are those of llminference/tasks/repetition.py in github.com/graphcore-research/llm-inference-research.
"""

import itertools
import re
from collections.abc import Iterator

import datasets

SHUFFLE_SEED = 544085
# Lengths in characters; each runs on to the end of its last word. A remainder too short is left out.
CONTEXT = re.compile(r".{6000,}?(?=\s|$)", flags=re.DOTALL)
PROMPT_AND_REFERENCE = re.compile(r"(.{128,}?)(\s.{255,}?)(?=\s|$)", flags=re.DOTALL)


def shakespeare(source: dict, **_) -> dict[str, datasets.Dataset]:
    """Documents of sparq_repetition: id (place in the text), context, prompt, reference.

    source: arguments of datasets.load_dataset. lm-eval adds the model's arguments and the task's metadata, unused here.
    """
    splits = datasets.load_dataset(**source)
    text = "".join(splits[name][0]["text"] for name in ("train", "validation", "test"))
    return {"test": datasets.Dataset.from_list(list(repetition_documents(text))).shuffle(seed=SHUFFLE_SEED)}


def repetition_documents(text: str) -> Iterator[dict]:
    """The text cut into contexts, and every context cut into prompts that stand in it, each with what follows there."""
    for context in CONTEXT.finditer(text):
        for part in PROMPT_AND_REFERENCE.finditer(context[0]):
            yield {
                "id": context.start() + part.start(),
                "context": context[0],
                "prompt": part[1],
                "reference": part[2],
            }


def process_results(doc: dict, results: list[str]) -> dict[str, int]:
    """match_length_char: characters that the generation copies before it errs or ends, leading whitespace aside."""
    (generation,) = results
    pairs = zip(generation.lstrip(), doc["reference"].lstrip(), strict=False)
    return {"match_length_char": sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))}
