"""Tensor parallel, by transformers' own plan: every process decodes its share of the heads sparsely."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests.sparq.launch import launch
from tests.sparq.tensor_parallel import observe
from tests.sparq.tiny import build

PROCESSES = 2
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": dict(num_attention_heads=8, num_key_value_heads=4),
    "gpt_neox": {},
    "qwen3": {},
    "gemma2": dict(tie_word_embeddings=False),  # tied, this small model repeats one token, sparse or not
    "phi3": {},
}


def model_of(family: str) -> PreTrainedModel:
    # Older transformers shard a vocabulary of an even size only.
    return build(family, vocab_size=98, **FAMILIES[family])


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What each process saw, by family. One launch for all: it takes longer than what is launched."""
    folders = {family: tmp_path_factory.mktemp(family) for family in FAMILIES}
    for family, folder in folders.items():
        model_of(family).save_pretrained(folder)
    worker = str(Path(__file__).with_name("tensor_parallel.py"))
    launch(
        "torch.distributed.run", "--standalone", "--nproc-per-node", f"{PROCESSES}", worker, *map(str, folders.values())
    )
    return {
        family: [torch.load(folder / f"rank{rank}.pt") for rank in range(PROCESSES)]
        for family, folder in folders.items()
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_of_one_process(ranks: dict[str, list[dict[str, Any]]], family: str) -> None:
    alone = observe(model_of(family))
    assert alone["tokens"] != alone["stock"]  # or a dense step would pass
    for rank in ranks[family]:
        for name in ("stock", "tokens", "beams", "unpatched"):
            assert rank[name] == alone[name], name


@pytest.mark.parametrize("family", FAMILIES)
def test_the_index_is_sharded_with_the_heads(ranks: dict[str, list[dict[str, Any]]], family: str) -> None:
    alone, length = observe(model_of(family)), 51
    for number, rank in enumerate(ranks[family]):
        # Phi-3's plan gathers the fused projection: every process has all the heads
        shards = 1 if family == "phi3" else PROCESSES
        heads = alone["keys"].shape[1] // shards
        mine = slice(number % shards * heads, (number % shards + 1) * heads)
        for name in ("keys", "value_sum"):
            torch.testing.assert_close(rank[name], alone[name][:, mine], rtol=1e-4, atol=1e-4)
        # [B, Hkv, blocks, d, positions of a block]; what is behind the length is not written
        flat = [x["components"].transpose(2, 3).flatten(3)[..., :length] for x in (rank, alone)]
        torch.testing.assert_close(flat[0], flat[1][:, mine], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_process_reports_its_own_share(ranks: dict[str, list[dict[str, Any]]], family: str) -> None:
    alone = observe(model_of(family))["report"]["total"]
    totals = [rank["report"]["total"] for rank in ranks[family]]
    shards = 1 if family == "phi3" else PROCESSES
    for total in totals:
        for name in ("sparse_steps", "dense_steps", "positions_cached", "positions_read"):
            assert total[name] == alone[name]
        for name in ("bytes_read", "bytes_dense"):
            assert total[name] * shards == alone[name]
    assert alone["sparse_steps"] > 0
    assert sum(total["mean_alpha"] for total in totals) / PROCESSES == pytest.approx(alone["mean_alpha"], rel=1e-4)
