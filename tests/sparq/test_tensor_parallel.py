"""Tensor parallel, by transformers' own plan: every process decodes its share of the heads sparsely."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.sparq.launch import launch
from tests.sparq.tensor_parallel import observe
from tests.sparq.tiny import build

pytestmark = pytest.mark.slow

PROCESSES = 2
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": dict(num_attention_heads=8, num_key_value_heads=4),
    "gpt_neox": {},
    "qwen3": {},
    "gemma2": dict(tie_word_embeddings=False),  # tied, this small model repeats one token, sparse or not
    "phi3": {},
}
# Phi-3's plan gathers the fused projection: every process has all the heads.
SHARDS = dict.fromkeys(FAMILIES, PROCESSES) | {"phi3": 1}


class Seen(NamedTuple):
    """What `observe` gave in one process, and in each of several."""

    alone: dict[str, Any]
    ranks: list[dict[str, Any]]
    shards: int


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Saved models that were generated with in two processes. One launch for all: it takes longer than the rest."""
    folders = {family: tmp_path_factory.mktemp(family) for family in FAMILIES}
    for family, folder in folders.items():
        # Older transformers shard a vocabulary of an even size only.
        build(family, vocab_size=98, **FAMILIES[family]).save_pretrained(folder)
    worker = Path(__file__).with_name("tensor_parallel.py")
    launch(
        "torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}", *map(str, [worker, *folders.values()])
    )
    return folders


@pytest.fixture(scope="module", params=FAMILIES)
def seen(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Seen:
    folder = folders[request.param]
    # loaded, not built: the default attention implementation of one with a softcap depends on the version
    alone = observe(AutoModelForCausalLM.from_pretrained(folder).eval())
    ranks = [torch.load(folder / f"rank{rank}.pt") for rank in range(PROCESSES)]
    return Seen(alone, ranks, SHARDS[request.param])


def test_tokens_of_one_process(seen: Seen) -> None:
    assert seen.alone["tokens"] != seen.alone["stock"]  # or a dense step would pass
    for rank in seen.ranks:
        for name in ("stock", "tokens", "beams", "unpatched"):
            assert rank[name] == seen.alone[name], name


def test_the_index_is_sharded_with_the_heads(seen: Seen) -> None:
    batch, heads, length, head_dim = seen.alone["keys"].shape
    heads //= seen.shards
    for number, rank in enumerate(seen.ranks):
        first = number % seen.shards * heads
        for name in ("keys", "value_sum"):
            torch.testing.assert_close(rank[name], seen.alone[name][:, first : first + heads], rtol=1e-4, atol=1e-4)
        # [B, Hkv, blocks, d, positions of a block]; what is behind the length is not written
        components = rank["components"].transpose(2, 3).flatten(3)[..., :length]
        assert components.shape == (batch, heads, head_dim, length)
        assert torch.equal(components, rank["keys"].transpose(2, 3))


def test_each_process_reports_its_own_share(seen: Seen) -> None:
    alone = seen.alone["report"]["total"]
    totals = [rank["report"]["total"] for rank in seen.ranks]
    assert alone["sparse_steps"] > 0
    for total in totals:
        for name in ("sparse_steps", "dense_steps", "positions_cached", "positions_read"):
            assert total[name] == alone[name]
        for name in ("bytes_read", "bytes_dense"):
            assert total[name] * seen.shards == alone[name]
    assert sum(total["mean_alpha"] for total in totals) / PROCESSES == pytest.approx(alone["mean_alpha"], rel=1e-4)
