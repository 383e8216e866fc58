"""The command `sparq`: its arguments.

A module beside the packages, because `import sparq` brings torch and transformers along, seconds that nobody wants to
wait for `--help`. What the commands do is in sparq/cli.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

DESCRIPTION = """SparQ Attention (arXiv 2312.04985) for Hugging Face models: decoding that reads less of the KV cache.
`sparq COMMAND --help` says more about a command."""


def version() -> str:
    """SparQ's version; "unknown" where it is not installed, only a tree of files."""
    try:
        return installed_version("sparq-attention")
    except PackageNotFoundError:
        return "unknown"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with `argv`, by default the process's own arguments; returns its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    parser = _parser()
    try:
        if argv[:1] == ["lm-eval"]:  # before this parser can take an argument for its own
            from sparq.lm_eval import command

            return command.main(argv[1:])
        args = parser.parse_args(argv)
        from sparq import cli
    except ImportError as error:
        parser.exit(2, f"sparq: {_one_line(error)}\n")
    try:
        return getattr(cli, args.command)(args)
    except ImportError as error:
        parser.exit(2, f"sparq {args.command}: {_one_line(error)}\n")
    except (TypeError, ValueError, OSError) as error:
        parser.exit(2, f"sparq {args.command}: {error}\n")


def _one_line(error: ImportError) -> str:
    """What is missing or too old; some libraries spread it over a screen."""
    return " ".join(str(error).removeprefix("sparq: ").split())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sparq", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"sparq {version()}")
    commands = parser.add_subparsers(dest="command", required=True)
    _add_generate(commands)
    _add_serve(commands)
    commands.add_parser(
        "build",
        help="compile the CPU kernel now, for example into a container image",
        description="Compile the kernel for this machine's processor now instead of at the first use, unless it is "
        "there already. SPARQ_CACHE_DIR says where; another type of processor compiles its own.",
    )
    commands.add_parser("lm-eval", help="lm-evaluation-harness, all its arguments, and a model `sparq`", add_help=False)
    return parser


def _add_generate(commands: Any) -> None:
    parser = commands.add_parser(
        "generate",
        help="generate text with SparQ, and with --compare also without",
        description="Generate text with a Hugging Face model that is patched with SparQ, and count time and bytes.",
    )
    parser.add_argument("model", help="a folder, a GGUF file, or a name on the Hugging Face hub")
    parser.add_argument("--prompt-file", type=Path, required=True, metavar="F", help="a text file, the prompt")
    parser.add_argument(
        "--question",
        action="append",
        metavar="TEXT",
        help="appended to the prompt; may be given several times: what all begin with is read once",
    )
    parser.add_argument(
        "--questions-file",
        type=Path,
        metavar="F",
        help="a text file with a question in each line, after any --question",
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        default=1,
        metavar="N",
        help="answer N questions at a time, which takes N + 1 times the memory of the prompt's K and V (default: 1)",
    )
    parser.add_argument(
        "--prompt-cache",
        type=Path,
        metavar="FILE",
        help="keep what was read of the prompt in this file, and read no more than what is new: it is made where it is "
        "missing and extended where the prompt goes on",
    )
    parser.add_argument(
        "--no-chat-template",
        action="store_true",
        help="give the model the bare text; else, where it has a chat template, text and question are a user's turn, "
        "and the answer ends with the model's",
    )
    _add_knobs(parser)
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="default: 64")
    parser.add_argument("--stop", metavar="TEXT", help="an answer ends where the model writes this")
    parser.add_argument("--compare", action="store_true", help="generate with the stock model first")
    _add_loading(parser)


def _add_serve(commands: Any) -> None:
    parser = commands.add_parser(
        "serve",
        help="an OpenAI-compatible server whose model decodes with SparQ",
        description="Serve a Hugging Face model that is patched with SparQ: chat completions, completions and "
        "responses as OpenAI's clients ask for them, and /metrics. Requests are answered one after the other. The next "
        "turn of a conversation computes its own tokens only. It needs pip install 'sparq-attention[serving]'.",
    )
    parser.add_argument("model", help="a folder, a GGUF file, or a name on the Hugging Face hub; clients call it so")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="the address to listen on (default: 127.0.0.1, this machine alone; nobody is asked who they are)",
    )
    parser.add_argument("--port", type=int, default=8000, help="default: 8000")
    parser.add_argument(
        "--slots", type=int, default=4, metavar="N", help="conversations whose caches are kept (default: 4)"
    )
    parser.add_argument(
        "--cache-gb",
        type=float,
        metavar="GB",
        help="memory that these may hold together (default: half of what is free when the model is loaded)",
    )
    _add_knobs(parser)
    _add_loading(parser)


def _add_knobs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        metavar="FOLDER",
        help="the knobs, from a sparq_config.json in this folder or under this name on the Hugging Face hub "
        "(default: those saved in the model's config.json, or SparQ's own); the options below replace single ones",
    )
    parser.add_argument("--ratio", type=float, help="compression wanted of the bytes read (default: 8)")
    parser.add_argument("--r", type=int, help="components of the query used to score (default: 4 * head_dim / ratio)")
    parser.add_argument("--k", type=int, help="positions attended in full (default: cached positions / ratio at most)")
    parser.add_argument("--index", choices=("int4", "full"), help="what positions are found by (default: int4)")
    parser.add_argument(
        "--mass", type=float, help="share of the scores with which a query stops (default: 0.95, or with --k 1: all k)"
    )
    parser.add_argument("--min-length", type=int, help="shorter contexts are dense (default: where sparsity pays)")


def _add_loading(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the model's own")
    parser.add_argument("--device", help="default: cuda where there is one, or else cpu")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the Python code that the model's folder may bring along"
    )
