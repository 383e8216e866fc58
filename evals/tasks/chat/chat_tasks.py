"""The documents of the tasks for a pretrained chat model, and their scores.

A question stands in the model's chat template, after the text that it is about. The answer's beginning is given, as
RULER does; what is scored is whether the answer itself is the likeliest, token by token: exactly what greedy decoding
would have given. Lengths are the model's tokens. Questions about a text differ in one name of so many tokens, so that
all that comes before them is read once.
"""

import random
import re
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np

sys.path.append(str(Path(__file__).parents[2]))  # the harness loads this file by its path, outside any package
from documents import documents, hide

SEED = 20_232
DEPTHS = (10, 30, 50, 70, 90)  # percent of the text before a fact
# fmt: off
NAMES = (
    "Amsterdam", "Athens", "Baltimore", "Barcelona", "Beijing", "Berlin", "Boston", "Brussels", "Cairo", "Chicago",
    "Cleveland", "Copenhagen", "Dallas", "Denver", "Detroit", "Dublin", "Edinburgh", "Florence", "Geneva",
    "Glasgow", "Hamburg", "Houston", "Istanbul", "Jerusalem", "Lisbon", "Liverpool", "London", "Madrid",
    "Manchester", "Melbourne", "Miami", "Milan", "Minneapolis", "Montreal", "Moscow", "Munich", "Oxford", "Paris",
    "Philadelphia", "Pittsburgh", "Prague", "Rome", "Seattle", "Shanghai", "Singapore", "Stockholm", "Sydney",
    "Tokyo", "Toronto", "Vancouver", "Venice", "Vienna", "Warsaw",
)
# fmt: on
FACT = "The pass key of {} is {}."
CUE, CONTINUATION = 32, 24  # tokens of a passage that comes back
SCORED_TEXT = 64  # tokens whose bits are counted
ASIDE = 64  # tokens for the chat template, a question and its answer, at the most


def load(tokenizer: str) -> Any:
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    loaded.model_max_length = 10**9  # whole documents are tokenised, and cut
    return loaded


def asked(tokenizer: Any, question: str, answer_begins: str) -> str:
    messages = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) + answer_begins


def pass_keys(length: int, tokenizer: str, texts: int = 20, **_: Any) -> dict[str, datasets.Dataset]:
    """Real texts with five facts each, at even depths, and a question for each of them."""
    loaded = load(tokenizer)
    lengths = {name: len(loaded(f" {name}").input_ids) for name in NAMES}
    commonest = statistics.mode(lengths.values())
    names = [name for name, count in lengths.items() if count == commonest]

    def made() -> Iterator[dict[str, Any]]:
        rng = np.random.default_rng(SEED)
        for plain in _plain(loaded, rng, texts, length - ASIDE - 15 * len(DEPTHS)):
            chosen = rng.choice(names, len(DEPTHS), replace=False)
            keys = [f"{key:05d}" for key in rng.integers(0, 100_000, len(DEPTHS))]
            text = hide(plain, [FACT.format(*fact) + "\n" for fact in zip(chosen, keys, strict=True)], DEPTHS, 200)
            for depth, name, key in zip(DEPTHS, chosen, keys, strict=True):
                prompt = asked(loaded, f"{text}\n\nWhat is the pass key of {name}?", FACT.split(" {}.")[0].format(name))
                yield {"prompt": prompt, "answer": f" {key}", "depth": depth}

    return {"test": datasets.Dataset.from_list(list(made()))}


def right(document: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, float]:
    return {"right": float(results[0][1])}


def niah_single_1(length: int, tokenizer: str, texts: int = 40, **_: Any) -> dict[str, datasets.Dataset]:
    """RULER's: a number in a noise of repeated sentences; one question about each text."""
    return _niah(length, tokenizer, texts, "repeat", "words", "numbers", 1)


def niah_multikey_2(length: int, tokenizer: str, texts: int = 20, **_: Any) -> dict[str, datasets.Dataset]:
    """RULER's: one number among numbers for other words, and nothing else; five questions about each text."""
    return _niah(length, tokenizer, texts, "needle", "words", "numbers", 5)


def niah_multikey_3(length: int, tokenizer: str, texts: int = 20, **_: Any) -> dict[str, datasets.Dataset]:
    """The same with random identifiers for words and numbers; a question about each text."""
    return _niah(length, tokenizer, texts, "needle", "uuids", "uuids", 1)


def _niah(
    length: int, tokenizer: str, texts: int, haystack: str, keys: str, values: str, questions: int
) -> dict[str, datasets.Dataset]:
    from lm_eval.tasks.ruler import niah_utils, prepare_niah

    loaded = load(tokenizer)
    state = random.getstate()
    random.seed(0)
    try:
        found = prepare_niah.generate_samples(
            prepare_niah.get_haystack(type_haystack=haystack),
            max_seq_length=length,
            template=niah_utils.TEMPLATE,
            type_haystack=haystack,
            type_needle_k=keys,
            type_needle_v=values,
            num_samples=texts,
            TOKENIZER=loaded,
        )
    finally:
        random.setstate(state)
    made = []
    for document in found:
        (key,) = re.findall(r"special magic \w+ for (.+?) mentioned in", document["gen_prefix"])
        needles = dict(re.findall(r"special magic \w+ for (\S+) is: (\S+)\.", document["input"]))
        long = len(loaded(f" {key}").input_ids)
        others = [other for other in needles if other != key and len(loaded(f" {other}").input_ids) == long]
        for other in [key, *others[:: max(1, len(others) // 4)]][:questions]:
            question, begins = (document[name].replace(key, other) for name in ("input", "gen_prefix"))
            if other != key:  # the needle of `key` is in the text, too
                text = document["input"].rpartition("\n")
                question = text[0] + text[1] + text[2].replace(key, other)
            made.append({"prompt": asked(loaded, question, begins), "answer": f" {needles[other]}"})
    return {"test": datasets.Dataset.from_list(made)}


def variable_tracking(length: int, tokenizer: str, texts: int = 20, **_: Any) -> dict[str, datasets.Dataset]:
    """RULER's: which five variables have a value, four of them by way of another?"""
    import contextlib
    import io

    from lm_eval.tasks.ruler import vt_utils

    loaded = load(tokenizer)
    states = random.getstate(), np.random.get_state()
    random.seed(0)
    np.random.seed(0)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            example = vt_utils.sys_vartrack_w_noise_random(loaded, 1, 500, incremental=5)[0]
            found = vt_utils.sys_vartrack_w_noise_random(loaded, texts, length - 100, icl_example=example)
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
    made = [{"prompt": asked(loaded, one["input"], one["gen_prefix"]), "outputs": one["outputs"]} for one in found]
    return {"test": datasets.Dataset.from_list(made)}


def tracked(document: dict[str, Any], results: list[str]) -> dict[str, float]:
    """RULER's score: the share of the variables that are named."""
    return {"right": sum(name in results[0] for name in document["outputs"]) / len(document["outputs"])}


def repetitions(length: int, tokenizer: str, texts: int = 40, **_: Any) -> dict[str, datasets.Dataset]:
    """Real texts that end with the first tokens of a passage that stands in them: how does it go on?"""
    loaded = load(tokenizer)
    rng = np.random.default_rng(SEED + 1)
    made = []
    for plain in _plain(loaded, rng, texts, length - CUE - CONTINUATION):
        tokens = loaded(plain).input_ids
        start = int(rng.integers(len(tokens) // 10, len(tokens) // 2))
        passage = tokens[start : start + CUE + CONTINUATION]
        made.append({"prompt": plain + loaded.decode(passage[:CUE]), "answer": loaded.decode(passage[CUE:])})
    return {"test": datasets.Dataset.from_list(made)}


def repetition_scores(document: dict[str, Any], results: list[str]) -> dict[str, int]:
    """How many characters of the answer are matched before the first that is not."""
    matches = [a == b for a, b in zip(results[0], document["answer"], strict=False)]
    return {"matched_characters": ([*matches, False]).index(False)}


def plain_texts(length: int, tokenizer: str, texts: int = 40, **_: Any) -> dict[str, datasets.Dataset]:
    """Real texts, the last tokens of which are scored."""
    loaded = load(tokenizer)
    made = []
    for plain in _plain(loaded, np.random.default_rng(SEED + 2), texts, length):
        tokens = loaded(plain).input_ids
        made.append({"prompt": loaded.decode(tokens[:-SCORED_TEXT]), "answer": loaded.decode(tokens[-SCORED_TEXT:])})
    return {"test": datasets.Dataset.from_list(made)}


def text_scores(document: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, Any]:
    return {"bits_per_byte": (results[0][0], len(document["answer"].encode()))}


def _plain(tokenizer: Any, rng: np.random.Generator, texts: int, length: int) -> Iterator[str]:
    """Cuts of `length` tokens, of each kind of document in turn."""
    kinds = [tokenizer(text).input_ids for text in documents().values()]
    kinds = [tokens for tokens in kinds if len(tokens) > length]
    for i in range(texts):
        tokens = kinds[i % len(kinds)]
        start = int(rng.integers(0, len(tokens) - length))
        yield tokenizer.decode(tokens[start : start + length])
