"""Questions about one text: the prompts that they make, and their answers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import TemplateError
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedTokenizerBase

from sparq import branches, prompt_cache
from sparq.cache_argument import NAMES
from sparq.served import unwrap

# What `answer` gives `generate` itself, or what would make something else than one answer to a question.
RESERVED = {"attention_mask", "generation_config", "input_ids", "inputs", "inputs_embeds", "position_ids", *NAMES}
RESERVED |= {"return_dict_in_generate", "streamer"}

Tokens = Tensor | Sequence[int]


def answer(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    context: str | Tokens,
    questions: Sequence[str] | Sequence[Tokens],
    *,
    batch_size: int = 1,
    max_new_tokens: int = 64,
    chat_template: bool = True,
    answer_prefix: str = "",
    prompt_cache: str | os.PathLike | None = None,
    **options: Any,
) -> list[str]:
    """Answers to questions about one context, which is read once; greedy, unless `options` say otherwise.

    Args:
        model: decodes as it is: patched, with SparQ.
        tokenizer: the model's.
        context: a text; or token ids, integers [n], behind which the questions' stand as they are given.
        questions: of the same kind, at least one. An empty text goes on from the context.
        batch_size: how many questions at a time (docs/questions.md says when more are faster). A batch needs that many
            copies of the context's K and V beside the one they are copied from. The answers are those of one question
            at a time, up to rounding, and with SparQ's four-bit index up to its, whose ranges the padding moves.
        max_new_tokens: of each answer, at most.
        chat_template: where the tokenizer has one, context and question are a user's turn, the question in a paragraph
            of its own, and the answer ends with the model's turn. Else the question is joined to the context as it is.
        answer_prefix: what every answer begins with; it is not returned.
        prompt_cache: a file for what all prompts begin with (`save_cache`): made where it is missing, extended where
            the prompts go on from all of it, otherwise used as far as they begin alike. None: nothing is kept.
        options: for `model.generate`.

    Returns:
        The answer to each question in their order, without special tokens and surrounding white space.

    Raises:
        TypeError, ValueError: an argument that is none of these; naming it, its value, and what would be right.
        OSError: the file cannot be read or written.
    """
    served = unwrap(model)
    _check(tokenizer, context, questions, batch_size, max_new_tokens, answer_prefix)
    check_options(served, options)
    if prompt_cache is not None and not Path(prompt_cache).parent.is_dir():
        raise ValueError(f"prompt_cache must be in a folder that exists, got {prompt_cache}")
    chat = chat_template and isinstance(context, str) and tokenizer.chat_template is not None
    made = prompts(tokenizer, context, questions, chat, answer_prefix)
    if not all(made):
        raise ValueError(f"context and questions must have tokens, got none from {context!r} and {questions!r}")
    options = generate_options(tokenizer, served, chat) | dict(max_new_tokens=max_new_tokens) | options
    if options.get("stop_strings") is not None:
        options["tokenizer"] = tokenizer
    cache = None if prompt_cache is None else beginning(Path(prompt_cache), model, made, options, batch_size).cache
    found = branches.generate(model, made, cache=cache, batch_size=batch_size, **options)
    return texts(tokenizer, found.new_tokens)


def prompts(
    tokenizer: Any,
    context: str | Tokens,
    questions: Sequence[str] | Sequence[Tokens],
    chat: bool,
    answer_prefix: str = "",
) -> list[list[int]]:
    """Token ids: the context and each question, which `chat` makes a user's turn, the question in a paragraph of its
    own.

    The question comes last, so that all prompts begin with the context.
    """
    if not isinstance(context, str):
        prefix = tokenizer(answer_prefix, add_special_tokens=False)["input_ids"] if answer_prefix else []
        return [[*_ids("context", context), *_ids("questions", question), *prefix] for question in questions]
    if not chat:
        return tokenizer([f"{context}{question}{answer_prefix}" for question in questions])["input_ids"]
    turns = ["\n\n".join(filter(None, (context.rstrip("\n"), str(question)))) for question in questions]
    rendered = [_render(tokenizer, turn, add_generation_prompt=True) + answer_prefix if turn else "" for turn in turns]
    # The template has written the special tokens already.
    return tokenizer(rendered, add_special_tokens=False)["input_ids"]


def generate_options(tokenizer: Any, model: Any, chat: bool) -> dict[str, Any]:
    """For `model.generate`: greedy, and where an answer ends."""
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    options = dict(do_sample=False, pad_token_id=pad)
    return options | dict(eos_token_id=turn_ends(tokenizer, model)) if chat else options


def texts(tokenizer: Any, new_tokens: list[list[int]]) -> list[str]:
    return [text.strip() for text in tokenizer.batch_decode(new_tokens, skip_special_tokens=True)]


class Beginning(NamedTuple):
    """What `beginning` has found in a file, and what it has done with the file."""

    cache: DynamicCache
    held: int  # tokens that were in the file
    length: int  # tokens of the beginning
    does: str


def beginning(
    path: Path, model: Any, prompts: list[list[int]], options: dict[str, Any], batch_size: int = 1
) -> Beginning:
    """What the prompts begin with, from a file as far as that has it, else computed; the file is written where there is
    none yet, or where the prompts go on from all of it.

    Two tokens at least of each prompt are left: one by itself would be a decode step.
    """
    tokens = prompts[0][: branches.shared_length(prompts)]
    if not tokens:
        raise ValueError("a prompt cache must have prompts that begin alike, with three tokens at least, got others")
    if len(prompts) > 1 and batch_size > 1 and any(DynamicCache(config=model.config).is_sliding):
        raise ValueError(
            f"batch_size must be 1 with a prompt cache where layers have sliding windows, got {batch_size}: of these a "
            "file does not have what a batch needs"
        )
    if path.exists():
        cache, found, length = prompt_cache.load(path, model, tokens)
        held = found.shape[1]
        does = "extended" if held == length < len(tokens) else "left as it is"
    else:
        cache, held, does = DynamicCache(config=model.config), 0, "written"
    if held < len(tokens):
        branches.read(model, tokens, cache, **options)
    if does != "left as it is":
        prompt_cache.save_cache(cache, tokens, path, model)
    return Beginning(cache, held, len(tokens), does)


def check_options(model: Any, options: dict[str, Any]) -> None:
    """Raise a TypeError or ValueError if `options` are none with which `generate` gives one answer to a question."""
    for name in sorted(RESERVED & options.keys()):
        raise TypeError(f"options must be such as max_new_tokens=20 or do_sample=True for model.generate, got {name}")
    for name in ("num_beams", "num_return_sequences"):
        value = options.get(name, getattr(model.generation_config, name, None))
        if value not in (None, 1):
            raise ValueError(
                f"{name} must be 1, got {value}: the questions share a cache, which has no room for others"
            )


def _check(
    tokenizer: Any, context: Any, questions: Any, batch_size: Any, max_new_tokens: Any, answer_prefix: Any
) -> None:
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(f"tokenizer must be a tokenizer of transformers, got {type(tokenizer).__name__}")
    if isinstance(questions, (str, Tensor)) or not isinstance(questions, Sequence):
        raise TypeError(f"questions must be a list, of one question or more, got {type(questions).__name__}")
    if not questions:
        raise ValueError("questions must be one at least, got an empty list")
    if isinstance(context, str):
        if not context.strip():
            raise ValueError(f"context must hold text, got {context!r}")
        for question in questions:
            if not isinstance(question, str):
                raise TypeError(f"questions must be strings, as context is, got {type(question).__name__}")
    elif not _ids("context", context):
        raise ValueError("context must hold tokens, got none")
    else:
        for question in questions:
            _ids("questions", question)
    if not isinstance(answer_prefix, str):
        raise TypeError(f"answer_prefix must be a string, got {type(answer_prefix).__name__}")
    for name, value in (("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number, at least 1, got {value!r}")


def _ids(name: str, tokens: Any) -> list[int]:
    found = tokens.tolist() if isinstance(tokens, Tensor) else tokens
    if not isinstance(found, (list, tuple)) or any(type(token) is not int for token in found):
        got = f"{tokens.dtype} {list(tokens.shape)}" if isinstance(tokens, Tensor) else f"{tokens!r:.60}"
        raise TypeError(f"{name} must be text, or token ids, integers [n], got {got}")
    return list(found)


def _render(tokenizer: Any, *turns: str, **options: Any) -> str:
    """The chat template over turns of user and assistant, in turn."""
    messages = [dict(role=("user", "assistant")[i % 2], content=turn) for i, turn in enumerate(turns)]
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except TemplateError as error:
        without = "chat_template=False (--no-chat-template) does without it"
        raise ValueError(f"the model's chat template fails, {without}: {error}") from error


def turn_ends(tokenizer: Any, model: Any) -> list[int] | None:
    """The tokens that end an answer: the model's and the tokenizer's own, and what the template closes a turn with.

    Many a file names only the token that ends a document.
    """
    given = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(given if isinstance(given, list) else [given])} - {None}
    reply = "Good morning."
    behind = tokenizer(_render(tokenizer, "Hello.", reply).rpartition(reply)[2], add_special_tokens=False)["input_ids"]
    if behind and behind[0] in tokenizer.added_tokens_decoder:
        ends.add(behind[0])
    return sorted(ends) or None
