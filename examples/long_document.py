"""Many questions about one long document: its prompt is computed once, and each question goes on from there.

    python examples/long_document.py [MODEL] [DOCUMENT QUESTION...]

Without a model it takes the small one that comes with the repository.
"""

import copy
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import sparq

ROOT = Path(__file__).parents[1]
name = sys.argv[1] if len(sys.argv) > 1 else ROOT / "evals" / "models" / "recall-llama"
document = Path(sys.argv[2] if len(sys.argv) > 2 else ROOT / "evals" / "demo.txt").read_text(encoding="utf-8")
questions = sys.argv[3:] or [f"The pass key of {name} is" for name in ("amber", "basalt", "cobalt")]

tokenizer = AutoTokenizer.from_pretrained(name)
model = sparq.patch(AutoModelForCausalLM.from_pretrained(name))

cache = DynamicCache()
read = tokenizer(document, return_tensors="pt").input_ids
with torch.no_grad():
    model(read, past_key_values=cache, logits_to_keep=1)

for question in questions:
    # A copy holds the tokens alone; its index is made when the first sparse step asks for it.
    asked = tokenizer(question, return_tensors="pt", add_special_tokens=False).input_ids
    tokens = torch.cat([read, asked], 1)
    answered = model.generate(tokens, past_key_values=copy.deepcopy(cache), max_new_tokens=12, do_sample=False)
    answer = tokenizer.decode(answered[0, tokens.shape[1] :])
    print(question, answer.strip().split("\n")[0])
