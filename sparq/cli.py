"""What the commands of `sparq` do; their arguments are in sparq_command.py."""

from __future__ import annotations

import argparse
import ipaddress
import logging
import socket
import sys
from collections.abc import Callable
from typing import Any

import sparq_kernels
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from sparq_kernels import cpu
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import sparq
from sparq import branches, gguf, questions, served
from sparq.config import settled


def generate(args: argparse.Namespace) -> int:
    """`sparq generate`: answers, tokens per second of the decode, bytes, and the report; returns the exit status."""
    device = _device(args.device)
    console = Console(highlight=False)
    config, knobs = _settings(args)
    if args.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {args.batch_size}")
    if args.prompt_cache is not None and not args.prompt_cache.parent.is_dir():
        raise ValueError(f"--prompt-cache must be in a folder that exists, got {args.prompt_cache}")
    text, asked = args.prompt_file.read_text(encoding="utf-8"), _questions(args)
    with console.status(f"loading {args.model}"):
        tokenizer, model = _load(args)
        model = model.to(device).eval()
    sparq_kernels.backend(device)  # compiles where that is due, so that no step is timed with it
    chat = tokenizer.chat_template is not None and not args.no_chat_template
    prompts = questions.prompts(tokenizer, text, asked or [""], chat)
    if not all(prompts):
        raise ValueError(f"--prompt-file must hold text where there is no --question, got none from {args.prompt_file}")
    once = f", the first {branches.shared_length(prompts):,} of them read once" if len(prompts) > 1 else ""
    batches = f", {args.batch_size} at a time" if args.batch_size > 1 else ""
    longest = max(map(len, prompts))
    template = ", in the model's chat template" if chat else ""
    console.print(
        f"{args.model}: {len(prompts)} prompt(s) of up to {longest:,} tokens{once}{batches}{template}, {model.dtype}, "
        f"{model.device}\n"
    )

    options = questions.generate_options(tokenizer, model, chat) | dict(max_new_tokens=args.max_new_tokens)
    if args.stop:
        options |= dict(stop_strings=[args.stop], tokenizer=tokenizer)
    sparq.patch(model, config, **knobs)  # refuses a model or knob before any work is done
    sparq.unpatch(model)
    cache = None if args.prompt_cache is None else _beginning(console, args, model, prompts, options)
    stock = _run(console, "stock", model, prompts, options, cache, args.batch_size) if args.compare else None
    with sparq.patched(model, config, **knobs):
        fast = _run(console, "SparQ", model, prompts, options, cache, args.batch_size)
        report = sparq.report(model)

    answers = {
        name: questions.texts(tokenizer, run.new_tokens)
        for name, run in (("stock", stock), ("SparQ", fast))
        if run is not None
    }
    for index in range(len(prompts)):
        if asked:
            console.print(Text(asked[index], style="bold"))
        for name, texts in answers.items():
            console.print(Text(f"  {name}  {texts[index]}"))
    if stock is not None:
        same = sum(a == b for a, b in zip(answers["stock"], answers["SparQ"], strict=True))
        console.print(f"\n{same} of {len(prompts)} answers are the same.")

    table = Table(title="decode")
    for column in ("", "prompt s", "decode tokens/s", "ms/token", "K and V read, MB/token"):
        table.add_column(column, justify="right")
    tokens = max(1, fast.decode_tokens)
    if stock is not None:
        # Stock reads what a dense step would have read at SparQ's lengths; its answers may end a few tokens apart.
        table.add_row("stock", *_figures(stock), f"{report.total.bytes_dense / tokens / 1e6:.2f}")
    table.add_row("SparQ", *_figures(fast), f"{report.total.bytes_read / tokens / 1e6:.2f}")
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


def _questions(args: argparse.Namespace) -> list[str]:
    """Those of `--question`, and the lines of `--questions-file`; empty lines are none."""
    found = list(args.question or [])
    if args.questions_file is not None:
        lines = args.questions_file.read_text(encoding="utf-8").splitlines()
        found += [line.strip() for line in lines if line.strip()]
        if not found:
            raise ValueError(f"--questions-file must have a question in a line, got none from {args.questions_file}")
    return found


def _beginning(
    console: Console, args: argparse.Namespace, model: Any, prompts: list[list[int]], options: dict[str, Any]
) -> DynamicCache:
    path = args.prompt_cache
    with console.status(f"reading what {path} does not hold yet"):
        found = questions.beginning(path, model, prompts, options, args.batch_size)
    was_there = f"{found.held:,} of {found.length:,} tokens that all prompts begin with were in it"
    console.print(f"{path}: {was_there}; {found.does}\n")
    return found.cache


def _run(
    console: Console,
    name: str,
    model: Any,
    prompts: list[list[int]],
    options: dict[str, Any],
    cache: DynamicCache | None,
    batch_size: int,
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

        def on_token(tokens: int) -> None:
            watch.end()
            progress.start_task(decoding)
            progress.update(decoding, advance=tokens, visible=True)

        try:
            return branches.generate(model, prompts, on_token, watch.begin, cache, batch_size, **options)
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
    ms = f"{1000 * run.decode_seconds / run.decode_tokens:.1f}" if run.decode_tokens else "–"
    return f"{run.prompt_seconds:.2f}", f"{run.tokens_per_second:.1f}", ms
