"""Write the text of `make demo`: documentation that the bundled model has never read, with five facts hidden in it.

python evals/demo_text.py > evals/demo.txt
"""

from recall_text import PASS_KEY_FORM, held_out_text

LENGTH = 7500  # bytes
FACTS = {"amber": 48213, "basalt": 70956, "cobalt": 31487, "dahlia": 92604, "ember": 15839}


def demo_text() -> str:
    """The facts stand at even depths, each on a line of its own."""
    lines = held_out_text()[:LENGTH].decode().splitlines(keepends=True)
    for number, (name, key) in enumerate(FACTS.items()):
        lines.insert(len(lines) * (2 * number + 1) // (2 * len(FACTS)), PASS_KEY_FORM.format(name, key) + "\n")
    return "".join(lines)


if __name__ == "__main__":
    print(demo_text(), end="")
