"""Weights in 8 bits on a CPU, for the linear layers are most of a sparse step.

    pip install 'sparq-attention[int8]'
    python examples/int8_weights.py [MODEL]

Without a model it takes the small one that comes with the repository. docs/cpu.md says what it gains and what it costs.
"""

import sys
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import sparq

try:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_
except ImportError:
    sys.exit("Weights in 8 bits need torchao, which is not installed: pip install 'sparq-attention[int8]'")

ROOT = Path(__file__).parents[1]
name = sys.argv[1] if len(sys.argv) > 1 else ROOT / "evals" / "models" / "recall-llama"

tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16)  # in float32 it would be slower than without
text = (ROOT / "evals" / "demo.txt").read_text(encoding="utf-8") + "The pass key of amber is"
inputs = tokenizer(text, return_tensors="pt")

quantize_(model, Int8WeightOnlyConfig())
for module in model.modules():
    if isinstance(module, nn.Linear):
        module.compile()  # some seconds, at the first token; uncompiled, all weights would be unpacked for each
sparq.patch(model, min_length=0)  # so short a text, of so small a model, would not pay
cache = DynamicCache(config=model.config)
with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # of many tokens uncompiled layers are the faster
    model(inputs.input_ids[:, :-2], past_key_values=cache, logits_to_keep=1)
output = model.generate(**inputs, past_key_values=cache, max_new_tokens=12, do_sample=False)
print(tokenizer.decode(output[0, inputs.input_ids.shape[1] :]))
print(sparq.report(model))
