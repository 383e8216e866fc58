"""What the layers of one forward pass share is worked out once."""

from __future__ import annotations

import pytest
import sparq_kernels
import torch
from transformers import DynamicCache, StaticCache

import sparq
from sparq.config import SparqConfig
from sparq.stats import Stats
from sparq.step import Step
from tests.sparq.test_plan import keys, rows
from tests.sparq.tiny import build, next_tokens, prompt

SPARSE = dict(r=4, k=12, min_length=0)


def test_made_once_for_all_layers_that_share_a_mask() -> None:
    step = Step(None, SparqConfig(k=2), Stats())
    one, other = rows("111111", "000111"), rows("111111", "011111")
    first = step.plan(one, 6, keys(6))
    assert step.plan(one, 6, keys(6)) is first
    second = step.plan(other, 6, keys(6))
    assert second.start is not None and second.start.tolist() == [0, 1]
    assert step.plan(other, 5, keys(5)).length.tolist() == [5, 5]


@pytest.mark.parametrize("is_static", [False, True], ids=["dynamic", "static"])
def test_a_mask_is_counted_once_for_all_layers(is_static: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where each layer would start a kernel to count it."""
    counted, given = [], []
    decode = sparq_kernels.decode

    def count(mask: torch.Tensor, length: torch.Tensor, queries: int, config: sparq.SparqConfig) -> torch.Tensor:
        budget = config.budget(4)
        counted.append(sparq_kernels.count_valid(sparq_kernels.Visible(length, mask=mask), budget, queries=queries))
        return counted[-1]

    def noted(
        query: torch.Tensor,
        cached: sparq_kernels.Cached,
        visible: sparq_kernels.Visible,
        budget: sparq_kernels.Budget,
        **options: object,
    ) -> object:
        assert torch.equal(visible.counts, sparq_kernels.count_valid(visible, budget))
        given.append(visible.counts)
        return decode(query, cached, visible, budget, **options)

    monkeypatch.setattr(sparq.plan, "count_once", count)
    monkeypatch.setattr(sparq_kernels, "decode", noted)
    model = sparq.patch(build(), **SPARSE)
    inputs = prompt()
    inputs["attention_mask"][0, 20:23] = 0  # a hole: what is valid is no range
    cache = StaticCache(config=model.config, max_cache_len=64) if is_static else DynamicCache()
    mask = torch.zeros(2, 64, dtype=torch.int64) if is_static else inputs["attention_mask"]
    mask[:, :40] = inputs["attention_mask"]
    model(inputs["input_ids"], attention_mask=mask, past_key_values=cache)
    counted.clear()
    for step in range(3):
        if is_static:
            mask[:, 40 + step] = 1
        else:
            mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
        model(next_tokens(2, 1), attention_mask=mask.clone(), past_key_values=cache)
    layers = model.config.num_hidden_layers
    assert len(counted) == 3 and len(given) == 3 * layers
    assert sparq.report(model).total.sparse_steps == 3 * layers
