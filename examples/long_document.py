"""Many questions about one long document, which is read once.

    python examples/long_document.py [MODEL] [DOCUMENT QUESTION...]

Without a model it takes the small one that comes with the repository.
"""

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import sparq

ROOT = Path(__file__).parents[1]
name = sys.argv[1] if len(sys.argv) > 1 else ROOT / "evals" / "models" / "recall-llama"
document = Path(sys.argv[2] if len(sys.argv) > 2 else ROOT / "evals" / "demo.txt").read_text(encoding="utf-8")
questions = sys.argv[3:] or [f"The pass key of {name} is" for name in ("amber", "basalt", "cobalt")]

tokenizer = AutoTokenizer.from_pretrained(name)
model = sparq.patch(AutoModelForCausalLM.from_pretrained(name))

answers = sparq.answer(model, tokenizer, document, questions, max_new_tokens=12)
for question, answer in zip(questions, answers, strict=True):
    print(question, answer.split("\n")[0])
