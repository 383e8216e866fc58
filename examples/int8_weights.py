"""Weights in 8 bits on a CPU, so that the linear layers, the most of a sparse step, take half as long.

    pip install 'sparq-attention[int8]'
    python examples/int8_weights.py [MODEL]

Without a model it takes the small one that comes with the repository. docs/cpu.md says what it gains and what it costs.
"""

import sys
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

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
        module.compile()  # seconds, at the first tokens; uncompiled, each weight is unpacked anew for every token
sparq.patch(model, min_length=0)  # so short a text, of so small a model, would not pay
output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
print(tokenizer.decode(output[0, inputs.input_ids.shape[1] :]))
print(sparq.report(model))
