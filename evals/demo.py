"""The first part of `make demo`: a model reads a text and answers questions about it, stock and with SparQ.

The model is SmolLM2-135M-Instruct where the package that carries it is installed, or else a bundled one.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import demo_text
import smollm2
from rich.console import Console

from sparq_command import main as sparq

EVALS = Path(__file__).parent
# Answers are short; products of bfloat16 are slow on most CPUs.
SMOLLM2 = ("--max-new-tokens", "24", "--dtype", "float32")
BUNDLED = ("--max-new-tokens", "12", "--stop", ".")


def main() -> int:
    console = Console(highlight=False, soft_wrap=True)
    try:
        model = smollm2.folder()
    except (ImportError, OSError) as error:
        console.print(f"{error}\nA bundled model takes its place.")
        console.print("== A model that comes with the repository answers five questions about a text of 7,700 bytes ==")
        questions = [f"The pass key of {name} is" for name in demo_text.FACTS]
        return sparq(arguments(EVALS / "models" / "recall-llama", EVALS / "demo.txt", questions, BUNDLED))
    console.print("== SmolLM2-135M-Instruct reads Python's documentation of its debugger and of `try` ==")
    console.print("So small a model finds sentences in a text as long as this, more is beyond it. Hidden in this one:")
    for fact in demo_text.DOCUMENT_FACTS:
        console.print(f"  {fact}")
    with tempfile.TemporaryDirectory() as folder:
        document = Path(folder) / "document.txt"
        document.write_text(demo_text.document(), encoding="utf-8")
        questions = [question for question, _ in demo_text.DOCUMENT_FACTS.values()]
        return sparq(arguments(model, document, questions, SMOLLM2))


def arguments(model: Path, text: Path, questions: list[str], options: tuple[str, ...]) -> list[str]:
    asked = [argument for question in questions for argument in ("--question", question)]
    return ["generate", str(model), "--prompt-file", str(text), *asked, *options, "--compare"]


if __name__ == "__main__":
    sys.exit(main())
