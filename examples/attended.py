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
inputs = tokenizer(text, return_tensors="pt", return_offsets_mapping=True)
places = inputs.pop("offset_mapping")[0]  # [tokens, 2]: where each begins and ends in the text

with sparq.record(model) as recording:
    output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
answer = tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True).strip()
begin = text.find(answer)
is_answer = (places[:, 0] >= begin) & (places[:, 1] <= begin + len(answer)) & (begin >= 0)
print(f"{answer}, which stands in the text {'at ' + str(begin) if begin >= 0 else 'nowhere'}")

for layer in sorted(recording.positions):
    counts = recording.counts(layer)[0, :, : len(places)]  # [KV heads, positions]: how many new tokens attended each
    share, there = (counts > 0).any(0).float().mean(), counts[:, is_answer].sum(1).tolist()
    print(f"layer {layer} attended {share:.0%} of the text; its heads the place of the answer {there} times")

recording.plot().savefig(plot)
print(f"{plot}: a line for each new token; the darker, the more heads have attended a position")
