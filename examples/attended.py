"""Where does the model look? What its layers and heads attend while they answer, in words and as a plot.

    python examples/attended.py [MODEL] [PLOT.png]

Without a model it takes the small one that comes with the repository. The plot takes matplotlib.
"""

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import sparq

ROOT = Path(__file__).parents[1]
name = sys.argv[1] if len(sys.argv) > 1 else ROOT / "evals" / "models" / "recall-llama"
plot = Path(sys.argv[2] if len(sys.argv) > 2 else "attended.png")

tokenizer = AutoTokenizer.from_pretrained(name)
model = sparq.patch(AutoModelForCausalLM.from_pretrained(name), ratio=16, min_length=0)
text = (ROOT / "evals" / "demo.txt").read_text(encoding="utf-8") + "The pass key of amber is"
inputs = tokenizer(text, return_tensors="pt")

with sparq.record(model) as recording:
    output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
print(tokenizer.decode(output[0, inputs.input_ids.shape[1] :]))

for layer in sorted(recording.positions):
    counts = recording.counts(layer)[0]  # [KV heads, cached positions]: how many of the new tokens attended each
    attended = counts[:, : inputs.input_ids.shape[1]].sum(0)
    share = (attended > 0).float().mean()
    # The 24 positions in a row that were attended most, in front of the newest, which always are.
    begin = int(attended[:-256].unfold(0, 24, 1).sum(1).argmax())
    most = tokenizer.decode(inputs.input_ids[0, begin : begin + 24])
    print(f"layer {layer} attended {share:.0%} of the text, most of all {most!r}")

recording.plot().savefig(plot)
print(f"{plot}: a line for each new token; the darker, the more heads have attended a position")
