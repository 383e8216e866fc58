"""What `torchrun` starts for test_tensor_parallel.py: `tensor_parallel.py FOLDER...` generates with the model saved in
each folder, tensor parallel, and leaves what it saw there, one file for each process."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.distributed import DistributedConfig

import sparq
from tests.sparq.tiny import generate, prompt

SPARSE = dict(r=3, k=12, index="full", min_length=0)  # the prompts are too short for a group of codes


def observe(model: PreTrainedModel) -> dict[str, Any]:
    """Tokens, stock and sparse; the cache and the report after the greedy ones."""
    stock = generate(model, prompt())
    sparq.patch(model, **SPARSE)
    output = model.generate(
        **prompt(), max_new_tokens=12, do_sample=False, pad_token_id=0, return_dict_in_generate=True
    )
    report = sparq.report(model)
    layer = output.past_key_values.layers[1]  # full attention in every family
    return {
        "stock": stock,
        "tokens": output.sequences[:, 40:].tolist(),
        "keys": layer.keys,
        "components": layer._index.components.blocks,
        "value_sum": layer._index.value_sum,
        "report": report.to_dict(),
        "beams": generate(model, prompt(), num_beams=2),
        "unpatched": generate(sparq.unpatch(model), prompt()),
    }


def main(folders: list[str]) -> None:
    torch.set_num_threads(1)
    for folder in folders:
        model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_plan="auto"))
        torch.save(observe(model.eval()), Path(folder) / f"rank{torch.distributed.get_rank()}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
