"""What a chat model writes with sparse decoding, compared with what it writes densely: long texts, and several turns.

    python evals/answers.py MODEL --json evals/results/answers.json

*Long*: documents of 2,048 tokens are continued greedily by 512 tokens. How many tokens pass until the sparse text is
another than the dense one, and how likely is either under dense attention (bits a token)?

*Turns*: three facts stand in a document; the chat model is asked for one after the other. All is one conversation on
one cache: the second and third question follow the answers that were decoded sparsely. How many answers are right?
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import smollm2
import torch
from divergence import PAPER, Setting, decoding
from documents import documents
from rich.console import Console
from summary import markdown, mean_and_error
from sweep import circumstances
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from sparq.branches import shared_length
from sparq.cache import upgrade
from sparq.cache_argument import generate_cache_name
from sparq.lm_eval.prefill import step

CONTEXT, ANSWER = 2048, 512
TURNS, CONVERSATIONS, ANSWERED = 3, 12, 24
SEED = 20240504
WORDS = ["garden", "river", "winter", "candle", "mirror", "pepper", "thunder", "violin", "ladder", "orchard"]
FACT = "The special magic number for {} is {}."
QUESTION = "What is the special magic number for {} mentioned in the provided text?"
DENSE = Setting("dense", "dense", "dense", {})
SETTINGS = [
    DENSE,
    Setting("the paper's SparQ", "the paper's SparQ, 8x", "sparq", {"ratio": 8, **PAPER}),
    Setting("SparQ", "SparQ, 8x", "sparq", {"ratio": 8}),
]


@dataclass(frozen=True, slots=True)
class Long:
    """One document's continuation."""

    document: str
    name: str  # of the setting
    until_other: int  # tokens that are those of the dense text, at most ANSWER
    bits: float  # a token, negative log-likelihood of this text under dense attention


@dataclass(frozen=True, slots=True)
class Turn:
    """One question of one conversation."""

    conversation: int
    turn: int
    name: str
    right: bool


@torch.no_grad()
def long_answers(model: Any, tokenizer: Any, console: Console) -> list[Long]:
    """All documents as one batch: rows of equal length."""
    names = list(documents())
    ids = torch.tensor([tokenizer(text)["input_ids"][:CONTEXT] for text in documents().values()])
    with console.status("reading the documents"):
        cache = DynamicCache(config=model.config)
        upgrade(cache)
        last = step(model, cache, ids, None)[:, -1]
    texts: dict[str, Any] = {}
    results = []
    for setting in SETTINGS:
        begin = time.perf_counter()
        with console.status(f"{setting.name}: {ANSWER} tokens of {len(names)} documents"), decoding(setting, model):
            texts[setting.name] = text = greedy(model, copy.deepcopy(cache), last)
        console.print(f"{setting.name}: {ANSWER} tokens in {time.perf_counter() - begin:.0f} s")
        equal = (text == texts[DENSE.name]).long().cumprod(1).sum(1).tolist()
        for row, name in enumerate(names):  # one by one: logits of whole texts are large
            mine = copy.deepcopy(cache)
            mine.batch_select_indices(torch.tensor([row]))
            logits = step(model, mine, text[row : row + 1, :-1], None, all_logits=True)
            log_probs = torch.cat([last[row : row + 1, None], logits], 1).float().log_softmax(-1)
            bits = -log_probs.gather(-1, text[row : row + 1, :, None]).mean().item() / math.log(2)
            results.append(Long(name, setting.name, equal[row], bits))
    return results


def greedy(model: Any, cache: Any, last: Any) -> Any:
    """ANSWER tokens [B, ANSWER]; the end of a text does not end it."""
    tokens = [last.argmax(-1, keepdim=True)]
    while len(tokens) < ANSWER:
        tokens.append(step(model, cache, tokens[-1], None)[:, -1].argmax(-1, keepdim=True))
    return torch.cat(tokens, 1)


def conversations(tokenizer: Any) -> list[tuple[str, list[tuple[str, str]]]]:
    """Documents of about CONTEXT tokens with facts in them, and questions with their answers."""
    rng, found, texts = random.Random(SEED), [], list(documents().values())
    for number in range(CONVERSATIONS):
        text = texts[number % len(texts)]
        tokens = tokenizer(text)["input_ids"]
        begin = rng.randrange(len(tokens) - CONTEXT)
        lines = tokenizer.decode(tokens[begin : begin + CONTEXT]).split("\n")
        facts = [(word, str(rng.randrange(10**6, 10**7))) for word in rng.sample(WORDS, TURNS)]
        for index, (word, value) in enumerate(facts):
            lines.insert(
                rng.randrange(index * len(lines) // TURNS, (index + 1) * len(lines) // TURNS), FACT.format(word, value)
            )
        rng.shuffle(facts)
        found.append(("\n".join(lines), [(QUESTION.format(word), value) for word, value in facts]))
    return found


@torch.no_grad()
def turns(model: Any, tokenizer: Any, console: Console) -> list[Turn]:
    results = []
    for number, (text, questions) in enumerate(conversations(tokenizer)):
        with console.status(f"conversation {number + 1} of {CONVERSATIONS}"):
            cache = DynamicCache(config=model.config)
            upgrade(cache)
            beginning = chat(tokenizer, [{"role": "user", "content": text}])
            same = shared_length(
                [beginning, chat(tokenizer, [{"role": "user", "content": f"{text}\n\n{questions[0][0]}"}])]
            )
            step(model, cache, torch.tensor([beginning[:same]]), None)
            for setting in SETTINGS:
                with decoding(setting, model):
                    answers = converse(model, tokenizer, copy.deepcopy(cache), text, [asked for asked, _ in questions])
                for turn, ((_, value), answer) in enumerate(zip(questions, answers, strict=True)):
                    results.append(Turn(number, turn, setting.name, value in answer))
    return results


def converse(model: Any, tokenizer: Any, cache: Any, text: str, questions: list[str]) -> list[str]:
    """The answers, each decoded on what the cache then holds of text, questions and answers."""
    ids, answers = [], []
    for turn, question in enumerate(questions):
        if turn == 0:
            ids = chat(tokenizer, [{"role": "user", "content": f"{text}\n\n{question}"}])
        else:  # as the template goes on behind the tokens that were decoded
            ids += chat(tokenizer, [{"role": "system", "content": ""}, {"role": "user", "content": question}], turn)
        given = torch.tensor([ids])
        output = model.generate(
            input_ids=given,
            attention_mask=torch.ones_like(given),
            **{generate_cache_name(): cache},
            max_new_tokens=ANSWERED,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )
        answers.append(tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True))
        ids = output[0].tolist()
        if ids[-1] != tokenizer.eos_token_id:
            ids.append(tokenizer.eos_token_id)
    return answers


def chat(tokenizer: Any, messages: list[dict[str, str]], turn: int = 0) -> list[int]:
    """Token ids of a conversation up to where the model answers; with `turn`, only what its last message adds."""
    ids: list[int] = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    if not turn:
        return ids
    before: list[int] = tokenizer.apply_chat_template(messages[:-1], return_dict=False)
    return tokenizer("\n")["input_ids"] + ids[len(before) :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder with a chat model and its tokenizer, or smollm2")
    parser.add_argument("--json", type=Path, help="write what was measured here")
    arguments = parser.parse_args()
    console, begin = Console(highlight=False), time.perf_counter()
    folder = smollm2.folder_of(arguments.model)
    known = circumstances()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.model_max_length = 10**9  # whole documents are tokenised, and cut
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True).eval()
    long, asked = long_answers(model, tokenizer, console), turns(model, tokenizer, console)
    known |= {"model": Path(folder).name, "seconds": round(time.perf_counter() - begin)}
    content = {"circumstances": known, "long": [asdict(one) for one in long], "turns": [asdict(one) for one in asked]}
    if arguments.json:
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")
    console.print(table(content), soft_wrap=True)


def table(content: dict[str, Any]) -> str:
    """Markdown, ± the standard error over documents."""
    head = [
        "",
        f"tokens as dense, of {ANSWER}",
        "bits a token",
        *(f"question {turn + 1} right" for turn in range(TURNS)),
    ]
    rows = [head]
    for name in dict.fromkeys(one["name"] for one in content["long"]):
        long = [one for one in content["long"] if one["name"] == name]
        cells = [f"{mean:.2f} ± {error:.2f}" for mean, error in [mean_and_error([one["bits"] for one in long])]]
        length, error = mean_and_error([one["until_other"] for one in long])
        for turn in range(TURNS):
            right = [one["right"] for one in content["turns"] if (one["name"], one["turn"]) == (name, turn)]
            cells.append(f"{sum(right)} of {len(right)}")
        rows.append([name, f"{length:.0f} ± {error:.0f}" if name != DENSE.name else "", *cells])
    return markdown(rows)


if __name__ == "__main__":
    main()
