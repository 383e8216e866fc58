"""What the commands of `sparq` do; their arguments are in sparq_command.py."""

from __future__ import annotations

import argparse
import ipaddress
import logging
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sparq_kernels
import torch
from jinja2 import TemplateError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from sparq_kernels import cpu
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import sparq
from sparq import branches, gguf, prompt_cache, served
from sparq.config import settled


def generate(args: argparse.Namespace) -> int:
    """`sparq generate`: answers, tokens per second of the decode, bytes, and the report; returns the exit status."""
    device = _device(args.device)
    console = Console(highlight=False)
    config, knobs = _settings(args)
    if args.prompt_cache is not None and not args.prompt_cache.parent.is_dir():
        raise ValueError(f"--prompt-cache must be in a folder that exists, got {args.prompt_cache}")
    text = args.prompt_file.read_text(encoding="utf-8")
    with console.status(f"loading {args.model}"):
        tokenizer, model = _load(args)
        model = model.to(device).eval()
    sparq_kernels.backend(device)  # compiles where that is due, so that no step is timed with it
    chat = tokenizer.chat_template is not None and not args.no_chat_template
    prompts = _prompts(tokenizer, text, args.question or [""], chat)
    if not all(prompts):
        raise ValueError(f"--prompt-file must hold text where there is no --question, got none from {args.prompt_file}")
    once = f", the first {branches.shared_length(prompts):,} of them read once" if len(prompts) > 1 else ""
    longest = max(map(len, prompts))
    template = ", in the model's chat template" if chat else ""
    console.print(
        f"{args.model}: {len(prompts)} prompt(s) of up to {longest:,} tokens{once}{template}, {model.dtype}, "
        f"{model.device}\n"
    )

    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    options = dict(max_new_tokens=args.max_new_tokens, do_sample=False, pad_token_id=pad)
    if chat:
        options |= dict(eos_token_id=_turn_ends(tokenizer, model))
    if args.stop:
        options |= dict(stop_strings=[args.stop], tokenizer=tokenizer)
    sparq.patch(model, config, **knobs)  # refuses a model or knob before any work is done
    sparq.unpatch(model)
    cache = None if args.prompt_cache is None else _beginning(console, args.prompt_cache, model, prompts, options)
    stock = _run(console, "stock", model, prompts, options, cache) if args.compare else None
    with sparq.patched(model, config, **knobs):
        fast = _run(console, "SparQ", model, prompts, options, cache)
        report = sparq.report(model)

    answers = {
        name: [answer.strip() for answer in tokenizer.batch_decode(run.new_tokens, skip_special_tokens=True)]
        for name, run in (("stock", stock), ("SparQ", fast))
        if run is not None
    }
    for index in range(len(prompts)):
        if args.question:
            console.print(Text(args.question[index], style="bold"))
        for name, texts in answers.items():
            console.print(Text(f"  {name}  {texts[index]}"))
    if stock is not None:
        same = sum(a == b for a, b in zip(answers["stock"], answers["SparQ"], strict=True))
        console.print(f"\n{same} of {len(prompts)} answers are the same.")

    table = Table(title="decode")
    for column in ("", "prompt s", "decode tokens/s", "ms/token", "K and V read, MB/token"):
        table.add_column(column, justify="right")
    steps = max(1, report.total.decode_steps // max(1, len(report.layers)))
    if stock is not None:
        # Stock reads what a dense step would have read at SparQ's lengths; its answers may end a few tokens apart.
        table.add_row("stock", *_figures(stock), f"{report.total.bytes_dense / steps / 1e6:.2f}")
    table.add_row("SparQ", *_figures(fast), f"{report.total.bytes_read / steps / 1e6:.2f}")
    console.print(table)
    if stock is not None:
        console.print(f"decode speed: {fast.tokens_per_second / stock.tokens_per_second:.2f}x stock\n")
    print(report)
    return 0


def serve(args: argparse.Namespace) -> int:
    """`sparq serve`: answers until it is interrupted; returns the exit status."""
    from sparq import serving  # an ImportError where its packages are missing

    device = _device(args.device)
    config, knobs = _settings(args)
    if args.slots < 0:
        raise ValueError(f"--slots must be 0 or more, got {args.slots}")
    if not 0 <= args.port <= 65535:
        raise ValueError(f"--port must be from 0, any that is free, to 65535, got {args.port}")
    if args.cache_gb is not None and not args.cache_gb >= 0:
        raise ValueError(f"--cache-gb must be 0 or more, got {args.cache_gb}")
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("sparq").setLevel(logging.INFO)
    console = Console(highlight=False)
    with _listener(args.host, args.port) as listener:
        with console.status(f"loading {args.model}"):
            tokenizer, model = _load(args)
            model = model.to(device).eval()
            if tokenizer.chat_template is not None:
                model.generation_config.eos_token_id = _turn_ends(tokenizer, model)
            max_bytes = None if args.cache_gb is None else int(args.cache_gb * 1e9)
            app = serving.build(model, tokenizer, args.model, config, args.slots, max_bytes, **knobs)
        host, port = listener.getsockname()[:2]
        if not ipaddress.ip_address(host).is_loopback:
            console.print(f"Whoever reaches {host} can use this server: nobody is asked who they are.")
        chat = "" if tokenizer.chat_template is not None else "; it has no chat template, ask for completions"
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
        console.print(f"{url} answers as {args.model}, {model.dtype}, {model.device}{chat}")
        serving.run(app, listener)
    return 0


def _listener(host: str, port: int) -> socket.socket:
    """Bound, so that an address that cannot be had is known before a model is loaded."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise ValueError(
            f"--host and --port must be an address of this machine that is free, got {host}, {port}: {error}"
        ) from None
    return listener


def build(args: argparse.Namespace) -> int:
    """`sparq build`: the CPU kernel compiled, or found; returns the exit status."""
    try:
        there = cpu.library().exists()
        path = cpu.build()
    except (cpu.CompilerError, OSError) as error:
        print(f"sparq build: {error}", file=sys.stderr)
        return 1
    print(f"the CPU kernel {'is there already' if there else 'has been compiled'}: {path}")
    return 0


def _settings(args: argparse.Namespace) -> tuple[sparq.SparqConfig | None, dict[str, Any]]:
    """A configuration and single knobs in place of its own, as `sparq.patch` takes them.

    Raises:
        TypeError, ValueError, OSError: for what no model is needed to know.
    """
    names = ("r", "k", "ratio", "index", "mass", "min_length")
    knobs = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    config = None if args.config is None else sparq.SparqConfig.from_pretrained(args.config)
    settled(config, knobs)
    return config, knobs


def _device(name: str | None) -> torch.device:
    """The device of `--device`; None: a GPU where there is one."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise ValueError(f"--device must be one of PyTorch's, for example cpu or cuda, got {name}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device must be one that this PyTorch can use, got {name}, and it finds no GPU")
    return device


def _load(args: argparse.Namespace) -> tuple[Any, Any]:
    # Said outright: left open, transformers asks on the terminal. Pickled weights are not read at all.
    trusted = dict(trust_remote_code=args.trust_remote_code)
    dtype = args.dtype or "auto"
    file = gguf.file_of(args.model)
    if file is not None:
        return gguf.load(file, dtype=dtype, **trusted)
    tokenizer = AutoTokenizer.from_pretrained(args.model, **trusted)
    return tokenizer, AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype, use_safetensors=True, **trusted)


def _prompts(tokenizer: Any, text: str, questions: list[str], chat: bool) -> list[list[int]]:
    """Token ids: the text and each question, which `chat` makes a user's turn, the question in a paragraph of its own.

    The question comes last, so that all prompts begin with the text.
    """
    if not chat:
        return tokenizer([text + question for question in questions])["input_ids"]
    turns = ["\n\n".join(part for part in (text.rstrip("\n"), question) if part) for question in questions]
    rendered = [_render(tokenizer, turn, add_generation_prompt=True) if turn else "" for turn in turns]
    # The template has written the special tokens already.
    return tokenizer(rendered, add_special_tokens=False)["input_ids"]


def _render(tokenizer: Any, *turns: str, **options: Any) -> str:
    """The chat template over turns of user and assistant, in turn."""
    messages = [dict(role=("user", "assistant")[i % 2], content=turn) for i, turn in enumerate(turns)]
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except TemplateError as error:
        raise ValueError(f"the model's chat template fails, --no-chat-template does without it: {error}") from error


def _turn_ends(tokenizer: Any, model: Any) -> list[int] | None:
    """The tokens that end an answer: the model's and the tokenizer's own, and what the template closes a turn with.

    Many a file names only the token that ends a document.
    """
    given = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(given if isinstance(given, list) else [given])} - {None}
    answer = "Good morning."
    behind = tokenizer(_render(tokenizer, "Hello.", answer).rpartition(answer)[2], add_special_tokens=False)[
        "input_ids"
    ]
    if behind and behind[0] in tokenizer.added_tokens_decoder:
        ends.add(behind[0])
    return sorted(ends) or None


def _beginning(
    console: Console, path: Path, model: Any, prompts: list[list[int]], options: dict[str, Any]
) -> DynamicCache:
    """What the prompts begin with, from the file of `--prompt-cache` as far as that has it, else computed; the file is
    written where there is none yet, or where the prompts go on from all of it.

    Two tokens at least of each prompt are left: one by itself would be a decode step.
    """
    left = min(map(len, prompts)) - 2
    tokens = prompts[0][: min(left, branches.shared_length(prompts)) if len(prompts) > 1 else left]
    if left < 1 or not tokens:
        raise ValueError("--prompt-cache must have prompts that begin alike, with three tokens at least, got others")
    if path.exists():
        cache, found, length = prompt_cache.load(path, model, tokens)
        held = found.shape[1]
        does = "extended" if held == length < len(tokens) else "left as it is"
    else:
        cache, held, does = DynamicCache(config=model.config), 0, "written"
    if held < len(tokens):
        with console.status(f"reading {len(tokens) - held:,} tokens"):
            branches.read(model, tokens, cache, **options)
    if does != "left as it is":
        sparq.save_cache(cache, tokens, path, model)
    console.print(f"{path}: {held:,} of {len(tokens):,} tokens that all prompts begin with were in it; {does}\n")
    return cache


def _run(
    console: Console,
    name: str,
    model: Any,
    prompts: list[list[int]],
    options: dict[str, Any],
    cache: DynamicCache | None,
) -> branches.Branches:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(SpinnerColumn(), *columns, console=console, transient=True) as progress:
        held = 0 if cache is None else cache.get_seq_length()
        shared = max(held, branches.shared_length(prompts))
        tokens = sum(map(len, prompts)) - (len(prompts) - 1) * shared - held
        reading = progress.add_task(f"{name}: prompt", total=tokens)
        decoding = progress.add_task(
            f"{name}: decode", total=len(prompts) * options["max_new_tokens"], start=False, visible=False
        )
        watch = _Reading(model, lambda tokens: progress.advance(reading, tokens))

        def on_token() -> None:
            watch.end()
            progress.start_task(decoding)
            progress.update(decoding, advance=1, visible=True)

        try:
            return branches.generate(model, prompts, on_token, watch.begin, cache, **options)
        finally:
            watch.end()


class _Reading:
    """Tells how far a prompt is computed: each attention layer that is done is its share of the prompt's tokens."""

    def __init__(self, model: Any, advance: Callable[[float], object]) -> None:
        self._layers = served.causal_layers(model)
        self._advance = advance
        self._hooks: list[Any] = []

    def begin(self, tokens: int) -> None:
        self.end()
        share = tokens / max(1, len(self._layers))
        for layer in self._layers:
            self._hooks.append(layer.register_forward_hook(lambda *args: self._told(share)))

    def end(self) -> None:
        """No decode step is timed with hooks."""
        while self._hooks:
            self._hooks.pop().remove()

    def _told(self, share: float) -> None:
        self._advance(share)  # and returns None: the layer's output stays as it is


def _figures(run: branches.Branches) -> tuple[str, str, str]:
    ms = f"{1000 * run.decode_seconds / run.decode_steps:.1f}" if run.decode_steps else "–"
    return f"{run.prompt_seconds:.2f}", f"{run.tokens_per_second:.1f}", ms
