"""Data parallel evaluation: `accelerate launch` with processes that have a share of the prompts each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import sparq
from tests.sparq.data_parallel import PROMPTS
from tests.sparq.launch import launch
from tests.sparq.tiny import build, generate

pytestmark = pytest.mark.slow


def test_gathered_results_are_those_of_one_process(tmp_path: Path) -> None:
    file = tmp_path / "gathered.json"
    # Not --cpu: with it accelerate starts one process, whatever --num_processes says. The program chooses the CPU.
    launch(
        "accelerate.commands.launch",
        *("--multi_gpu", "--num_processes", "2", "--main_process_port", "0"),
        *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),  # or it warns of its defaults
        str(Path(__file__).with_name("data_parallel.py")),
        str(file),
    )
    shares = json.loads(file.read_text())
    assert [len(share["tokens"]) for share in shares] == [3, 2]

    model = sparq.patch(build(), r=4, k=12, min_length=0)
    assert [tokens for share in shares for tokens in share["tokens"]] == [generate(model, each) for each in PROMPTS]
    total = sparq.report(model).to_dict()["total"]
    for name in ("sparse_steps", "positions_read", "bytes_read", "bytes_dense"):
        assert sum(share["total"][name] for share in shares) == total[name] > 0
