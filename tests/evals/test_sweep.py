"""The sweep over methods and ratios, on a small random model, and what is made of its scores."""

import dataclasses
import json
import math
import re

import pytest
import results
import sweep
from byte_tokenizer import save_byte_tokenizer

from tests.sparq.tiny import build

pytestmark = pytest.mark.slow


def test_a_task_left_out_is_a_dash(scores):
    documentation = [score for score in scores if score.task == "recall_documentation_1k"]
    elsewhere = [dataclasses.replace(score, task="recall_documentation_4k") for score in documentation[:1]]
    text = results.tables(content([*documentation, *elsewhere]))
    (row,) = [line for line in text.splitlines() if line.startswith("| SparQ | 8 |")]
    assert row.count("–") == 1 and row.count("±") == 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    model = build(vocab_size=260, pad_token_id=258, bos_token_id=256, eos_token_id=257, max_position_embeddings=8192)
    model.save_pretrained(folder)
    save_byte_tokenizer(folder)
    return str(folder)


@pytest.fixture(scope="module")
def scores(folder):
    ways = (*sweep.grid(1024, 16), sweep.ablations(1024, 64)[0])
    scores = sweep.run(sweep.Job(folder, "recall_pass_key_1k", 1024, 5, 5, 32, ways))
    few = (sweep.DENSE, sweep.Way("sparq", 8, {"method": "sparq", "r": 2, "k": 64}))
    return scores + sweep.run(sweep.Job(folder, "recall_documentation_1k", 1024, 5, 5, 32, few))


def test_every_way_is_scored_and_reads_about_what_was_asked_for(scores):
    names = ["dense", "defaults", *(name for name in sweep.NAMES for _ in sweep.RATIOS), "SparQ"]
    assert [score.name for score in scores[: len(names)]] == names
    for score in scores[: len(names) - 1]:
        if score.name != "defaults":  # of 16 components they read 8 at least
            # Where attention is spread out, as here, SparQ's mass takes all of its cap, twice the k of a fixed budget.
            reads = 2 if score.name == "sparq" else 1
            assert score.ratio / reads * 0.7 <= score.compression <= score.ratio * 1.3, score.name
        assert (score.mean_alpha is None) == (score.name == "dense")


def test_changes_are_against_dense_on_the_same_documents(scores):
    documentation = [score for score in scores if score.task == "recall_documentation_1k"]
    dense, *others = documentation
    assert dense.change == 0
    for score in others:
        assert score.change == pytest.approx(score.mean - dense.mean, abs=1e-9)
        assert score.change != 0
    assert dense.mean > 1
    assert math.isfinite(dense.error)


def test_pass_keys_are_also_counted_by_depth(scores):
    score = next(score for score in scores if score.task == "recall_pass_key_1k")
    assert set(score.by_depth) == {"10", "30", "50", "70", "90"}


def test_the_plan_has_every_method_at_every_ratio(folder):
    jobs = sweep.jobs([folder], share=1)
    assert {job.task for job in jobs} == set(sweep.PLAN)
    for job in jobs:
        assert job.ways[0] == sweep.DENSE
        asked = [(way.name, way.ratio) for way in job.ways if way.name in sweep.NAMES]
        assert asked == [(method, ratio) for method in sweep.NAMES for ratio in (4, 8, 16)]
        assert any(job.task.startswith(name) for name in sweep.METRICS)


def test_the_chat_plan_compares_like_with_like(tmp_path):
    (tmp_path / "config.json").write_text('{"vocab_size": 49152, "hidden_size": 576, "num_attention_heads": 9}')
    jobs = sweep.jobs([str(tmp_path)], share=1)
    assert {job.task for job in jobs} == set(sweep.CHAT_PLAN)
    for job in jobs:
        assert job.ways[0] == sweep.DENSE
        ways = {(way.name, way.ratio): way.arguments for way in job.ways}
        is_full = sweep.CHAT_PLAN[job.task].is_full
        for name in sweep.NAMES:
            is_whole = name == "sparq" or (is_full and name == "paper")
            wanted = sweep.RATIOS if is_whole else () if name == "h2o" and not is_full else (8,)
            assert [ratio for way, ratio in ways if way == name] == list(wanted)
            if is_whole:
                assert ways[f"{name}, dense_layers=1", 8] == ways[name, 8] | {"dense_layers": 1}


def test_the_others_go_on_from_what_h2o_has_read(folder):
    ways = (sweep.DENSE, *(sweep.Way(name, 8, {"method": name, "ratio": 8}) for name in ("oracle", "h2o", "quest")))
    job = sweep.Job(folder, "recall_pass_key_1k", 1024, 5, 5, 32, ways)
    together = sweep.run(job)
    alone = sweep.run(dataclasses.replace(job, ways=ways[:2]))
    assert [score.name for score in together] == [way.name for way in ways]
    for score, expected in zip(together, alone, strict=False):
        assert (score.mean, score.change) == (expected.mean, expected.change)
        assert score.mean_alpha == pytest.approx(expected.mean_alpha)


def test_the_pretrained_model_comes_first(scores):
    later = [dataclasses.replace(score, model="recall-llama") for score in scores]
    first = [dataclasses.replace(later[0], model="SmolLM2-135M", task="chat_pass_key_1k")]
    models = [
        line for line in results.tables(content([*later, *first])).splitlines() if re.match("## (Smol|recall)", line)
    ]
    assert models == ["## SmolLM2-135M", "## recall-llama"]


def content(scores):
    known = dict.fromkeys(("commit", "python", "torch", "transformers", "lm_eval", "machine"), "x") | {"seconds": 60}
    return {"circumstances": known, "scores": json.loads(json.dumps([sweep.asdict(score) for score in scores]))}


def test_tables_show_every_score(scores):
    text = results.tables(content(scores))
    assert "## tiny" in text
    rows = [line for line in text.splitlines() if line.startswith("| SparQ | 8 |")]
    documentation = next(s for s in scores if (s.task, s.name, s.ratio) == ("recall_documentation_1k", "sparq", 8))
    assert any(f"{documentation.mean:.3f} ± {documentation.error:.3f}" in row for row in rows)
    assert "### Ablations" in text
    for line in text.splitlines():
        assert not line.startswith("| ---") or set(line) <= set("| -:")


def test_the_plot_is_drawn(scores, tmp_path):
    renamed = content(scores)
    for score in renamed["scores"]:
        score["task"] = score["task"].replace("1k", "4k")
    results.plot(renamed, tmp_path / "scores.png")
    assert (tmp_path / "scores.png").read_bytes().startswith(b"\x89PNG")
