"""How the counts of steps are taken down, by Python and on the device."""

from __future__ import annotations

import threading

import pytest

import sparq
from tests.sparq.caches import static
from tests.sparq.tiny import build, next_tokens, prompt, teacher_forced

SPARSE = dict(r=4, k=12, min_length=0)


def test_the_score_mass_of_all_layers_is_summed_at_once() -> None:
    """On a GPU a sum for each layer would be two kernels more a layer."""
    model = sparq.patch(build(), **SPARSE)
    teacher_forced(model, prompt(), next_tokens())
    stats = model.base_model._sparq_patch.current().stats
    assert list(stats.alphas) == [tuple(range(model.config.num_hidden_layers))]
    report = sparq.report(model)
    assert report.total.mean_alpha == pytest.approx(
        sum(layer.mean_alpha for layer in report.layers.values()) / len(report.layers)
    )


def test_threads_lose_no_count() -> None:
    inputs, tokens, model = prompt(batch=1, padding=0), next_tokens(1, 6), sparq.patch(build(), **SPARSE)
    threads = [threading.Thread(target=lambda: teacher_forced(model, inputs, tokens, static(model))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sparq.report(model).total.sparse_steps == 4 * 3 * 6
