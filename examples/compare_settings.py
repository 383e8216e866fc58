"""How much may be left out? The same answer at several settings, and what each of them read.

    python examples/compare_settings.py [MODEL]

Without a model it takes the small one that comes with the repository.
"""

import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

import sparq

ROOT = Path(__file__).parents[1]
name = sys.argv[1] if len(sys.argv) > 1 else ROOT / "evals" / "models" / "recall-llama"

tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name)
text = (ROOT / "evals" / "demo.txt").read_text(encoding="utf-8") + "The pass key of amber is"
inputs = tokenizer(text, return_tensors="pt")


def answer() -> str:
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    return tokenizer.decode(output[0, inputs.input_ids.shape[1] :]).strip().split("\n")[0]


table = Table("ratio", "answer", "bytes read of dense", "mean α")
table.add_row("dense", answer(), "", "")
for ratio in (4, 8, 16, 32):
    with sparq.patched(model, ratio=ratio, min_length=0):  # the model is stock again behind the block
        found = answer()
        total = sparq.report(model).total
    alpha = "–" if total.mean_alpha is None else f"{total.mean_alpha:.3f}"
    table.add_row(str(ratio), found, f"1/{total.bytes_dense / total.bytes_read:.1f}", alpha)
Console().print(table)
