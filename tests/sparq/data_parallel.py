"""What `accelerate launch` starts for test_data_parallel.py: every process generates for its share of the prompts, as
in README.md; the first one writes all results to the file named."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

import sparq
from tests.sparq.tiny import build, generate, prompt

PROMPTS = [prompt(batch=1, length=30 + 3 * seed, seed=seed) for seed in range(5)]  # 5: the shares are not equal


def main(file: str) -> None:
    torch.set_num_threads(1)
    state = PartialState(cpu=True)
    model = sparq.patch(build().to(state.device), r=4, k=12, min_length=0)
    with state.split_between_processes(PROMPTS) as mine:
        tokens = [generate(model, {name: x.to(state.device) for name, x in inputs.items()}) for inputs in mine]
    gathered = gather_object([{"tokens": tokens, "total": sparq.report(model).to_dict()["total"]}])
    if state.is_main_process:
        Path(file).write_text(json.dumps(gathered))
    state.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
