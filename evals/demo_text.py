"""The texts of `make demo`, each with facts hidden in it, and what is asked about them.

    python evals/demo_text.py > evals/demo.txt              # for the bundled model
    python evals/demo_text.py --smollm2 > /tmp/document.txt # for SmolLM2-135M-Instruct

Both are documentation that every Python installation ships. The bundled model has never read its own, and completes
sentences. SmolLM2 answers questions. It is too small to answer any about the documentation itself at this length, with
dense attention too; sentences that stand out, it finds.
"""

import argparse
from pydoc_data.topics import topics

from recall_text import PASS_KEY_FORM, held_out_text

LENGTH = 7500  # bytes
FACTS = {"amber": 48213, "basalt": 70956, "cobalt": 31487, "dahlia": 92604, "ember": 15839}

TOPICS = ("debugger", "try")
# 6,000 to 7,500 tokens, whichever Python's documentation it is.
DOCUMENT_LENGTH = 26000  # characters
DOCUMENT_FACTS = {  # a sentence, what is asked about it, and what an answer must hold
    "The secret number of the vault is 4820173.": ("What is the secret number of the vault?", "4820173"),
    "The telephone number of the bakery is 5550173.": ("What is the telephone number of the bakery?", "5550173"),
    "Marta's favourite dish is mushroom soup.": ("What is Marta's favourite dish?", "mushroom soup"),
}


def demo_text() -> str:
    """For the bundled model: the facts stand at even depths, each on a line of its own."""
    lines = held_out_text()[:LENGTH].decode().splitlines(keepends=True)
    return "".join(_hidden(lines, [PASS_KEY_FORM.format(name, key) + "\n" for name, key in FACTS.items()]))


def document() -> str:
    """For SmolLM2: what the documentation says of the debugger and of `try`, the facts paragraphs at even depths."""
    text = "\n\n".join(topics[name].strip() for name in TOPICS)
    paragraphs = text[:DOCUMENT_LENGTH].split("\n\n")[:-1]  # the last one is cut
    return "\n\n".join(_hidden(paragraphs, list(DOCUMENT_FACTS))) + "\n"


def _hidden(parts: list[str], facts: list[str]) -> list[str]:
    parts = list(parts)
    for number, fact in enumerate(facts):
        parts.insert(len(parts) * (2 * number + 1) // (2 * len(facts)), fact)
    return parts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smollm2", action="store_true", help="the text for SmolLM2, not the bundled model's")
    print(document() if parser.parse_args().smollm2 else demo_text(), end="")
