"""One call makes a Hugging Face model decode sparsely; everything else stays as it was.

    python examples/quickstart.py [MODEL]

Without a model it takes the small one that comes with the repository, which knows nothing but how to look things up.
"""

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import sparq

ROOT = Path(__file__).parents[1]
name = sys.argv[1] if len(sys.argv) > 1 else ROOT / "evals" / "models" / "recall-llama"

tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name)
text = (ROOT / "evals" / "demo.txt").read_text(encoding="utf-8") + "The pass key of amber is"
inputs = tokenizer(text, return_tensors="pt")

sparq.patch(model)
output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
print(tokenizer.decode(output[0, inputs.input_ids.shape[1] :]))
print(sparq.report(model))  # the steps that were sparse, and the bytes they read
