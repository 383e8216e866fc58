"""The harness's model `sparq`: that it scores and generates what the method decodes, and nothing else.

A byte is a token here, and the models are small and random, with weights large enough that attention matters.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import sparq_kernels
import torch
from byte_tokenizer import byte_tokenizer, save_byte_tokenizer
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparq.lm_eval import prefill
from sparq.lm_eval.methods import Window
from sparq.lm_eval.model import SparqLM
from sparq.lm_eval.prefill import Prefills, step
from sparq.lm_eval.registry import METHODS, register_method
from tests.sparq.snapshot import snapshot
from tests.sparq.tiny import build

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
SPARSE = {
    "sparq": dict(r=4, k=12),
    "sparq_variant": dict(r=4, k=12, score_temperature=False),
    "oracle": dict(k=12),
    "window": dict(k=12, sinks=4),
    "h2o": dict(k=12),
    "quest": dict(k=12, page=4),
    "pages": dict(k=12, page=4),
    "rocket": dict(k=12, page=4, r=4),
}
TEXT = "Decoding a token reads the whole cache, and it is the cache that grows; what is read of it need not."
PAIRS = [(TEXT[:n], TEXT[n : n + m]) for n, m in ((60, 9), (60, 20), (33, 1), (45, 12), (80, 5), (21, 30), (60, 9))]
OPTIONS = {"until": ["\n"], "max_gen_toks": 12, "do_sample": False}


@pytest.fixture(scope="module", params=["llama", "gpt_neox"])
def model(request):
    return build(request.param, vocab_size=260, pad_token_id=258, bos_token_id=256, eos_token_id=257)


@pytest.fixture(scope="module")
def llama():
    return build(vocab_size=260, pad_token_id=258, bos_token_id=256, eos_token_id=257)


def harness_model(model, **arguments) -> SparqLM:
    return SparqLM(model, tokenizer=byte_tokenizer(), **{"batch_size": 4, "max_length": 128} | arguments)


def stock(model, **arguments) -> HFLM:
    return HFLM(model, tokenizer=byte_tokenizer(), **{"batch_size": 4, "max_length": 128} | arguments)


def scores(lm, pairs=PAIRS) -> tuple[torch.Tensor, list[bool]]:
    requests = [Instance("loglikelihood", {}, pair, i, ("task", i, 1)) for i, pair in enumerate(pairs)]
    log_likelihoods, greedy = zip(*lm.loglikelihood(requests, disable_tqdm=True), strict=True)
    return torch.tensor(log_likelihoods, dtype=torch.float64), list(greedy)


def rolling(lm, text=TEXT * 3) -> float:
    request = Instance("loglikelihood_rolling", {}, (text,), 0, ("task", 0, 1))
    return lm.loglikelihood_rolling([request], disable_tqdm=True)[0]


def answers(lm, contexts=tuple(context for context, _ in PAIRS), **options: Any) -> list[str]:
    how = OPTIONS | options
    requests = [Instance("generate_until", {}, (c, dict(how)), i, ("task", i, 1)) for i, c in enumerate(contexts)]
    return lm.generate_until(requests, disable_tqdm=True)


def close(a, b) -> None:
    torch.testing.assert_close(a, b, atol=2e-3, rtol=1e-4)


# Switched off, it is the harness's own model.


def test_dense_is_the_harness_own_model_on_a_real_one(smollm2: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    harness = dict(tokenizer=AutoTokenizer.from_pretrained(smollm2), batch_size=4)
    ours, theirs = SparqLM(model, method="dense", decode_context_tokens=4, **harness), HFLM(model, **harness)
    (log_likelihoods, greedy), (expected, expected_greedy) = scores(ours), scores(theirs)
    close(log_likelihoods, expected)
    assert greedy == expected_greedy
    assert rolling(ours) == pytest.approx(rolling(theirs), abs=2e-3)
    assert answers(ours) == answers(theirs)


@pytest.mark.parametrize("decoded", [0, 1, 7, 30])
def test_dense_scores_are_those_of_the_harness(model, decoded):
    expected, greedy = scores(stock(model))
    found, found_greedy = scores(harness_model(model, method="dense", decode_context_tokens=decoded))
    close(found, expected)
    assert found_greedy == greedy


@pytest.mark.parametrize("prefilled", [0, 1, 50, 1000])
def test_dense_rolling_scores_are_those_of_the_harness(model, prefilled):
    lm = harness_model(model, method="dense", rolling_prefill=prefilled)
    assert rolling(lm) == pytest.approx(rolling(stock(model)), rel=1e-4)


@pytest.mark.parametrize("decoded", [0, 1, 7, 30])
def test_dense_generation_is_that_of_the_harness(model, decoded):
    assert answers(harness_model(model, method="dense", decode_context_tokens=decoded)) == answers(stock(model))


def test_contexts_that_are_too_long_lose_their_beginning_as_in_the_harness(model):
    pairs = [(TEXT * 2, TEXT[:20]), (TEXT * 2, TEXT[:20] + TEXT * 2)]
    short = dict(max_length=64)
    close(
        scores(harness_model(model, method="dense", **short), pairs[:1])[0],
        scores(stock(model, **short), pairs[:1])[0],
    )
    with pytest.raises(AssertionError):
        scores(stock(model, **short), pairs[1:])  # what does not fit at all is refused there,
    scores(harness_model(model, method="dense", **short), pairs[1:])  # and scored as far as it fits here


@pytest.mark.parametrize("method", [method for method in METHODS if method != "dense"])
def test_with_k_beyond_the_context_every_method_is_dense(model, method):
    knobs = SPARSE[method] | {"k": 4096}
    lm = harness_model(model, method=method, decode_context_tokens=1, **knobs)
    close(scores(lm)[0], scores(stock(model))[0])
    assert answers(lm) == answers(stock(model))
    assert lm.steps["task"]["layer_steps"]["sparse"] == 0


# Switched on, it decodes sparsely whatever it scores.


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("method", METHODS)
def test_many_tokens_in_one_pass_are_as_many_steps(model, method, batch_size, monkeypatch):
    def measured():
        knobs = SPARSE.get(method, {}) | ({"dense_layers": 1} if method != "dense" else {})
        lm = harness_model(model, method=method, batch_size=batch_size, decode_context_tokens=7, **knobs)
        return *scores(lm), rolling(lm), answers(lm), lm.steps

    passes = []
    monkeypatch.setattr(prefill, "step", lambda *args, **kwargs: (passes.append(1), step(*args, **kwargs))[1])
    found, greedy, rolled, generated, steps = measured()
    few, passes[:] = len(passes), []
    monkeypatch.setattr(prefill, "FED_AT_ONCE", 1)
    one_by_one = measured()
    assert len(passes) > 5 * few
    close(found, one_by_one[0])
    assert rolled == pytest.approx(one_by_one[2], rel=1e-4)
    assert (greedy, generated) == (one_by_one[1], one_by_one[3])
    if method != "dense":
        alike(steps["task"], one_by_one[4]["task"])


def alike(steps, others) -> None:
    assert steps["mean_alpha"] == pytest.approx(others["mean_alpha"], rel=1e-5)
    for name in ("layer_steps", "positions", "bytes"):
        assert steps[name] == others[name]


@pytest.mark.parametrize("method", SPARSE)
def test_sparse_scores_differ_from_dense_ones(model, method):
    lm = harness_model(model, method=method, **SPARSE[method])
    assert (scores(lm)[0] - scores(stock(model))[0]).abs().max() > 0.1
    assert lm.steps["task"]["layer_steps"]["sparse"] > 0
    assert rolling(lm) != pytest.approx(rolling(stock(model)), rel=1e-4)


@pytest.mark.parametrize("method", SPARSE)
@pytest.mark.parametrize("decoded", [0, 3])
def test_batches_score_and_generate_as_single_rows_do(model, method, decoded):
    one, four = (
        harness_model(model, method=method, batch_size=n, decode_context_tokens=decoded, **SPARSE[method])
        for n in (1, 4)
    )
    for a, b in zip(scores(one), scores(four), strict=True):
        close(torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64))
    # Three tokens: products of other shapes round otherwise, and where scores of positions nearly tie, a random model
    # soon says something else.
    assert answers(one, max_gen_toks=3) == answers(four, max_gen_toks=3)


def poisoned(*arguments: Any, **knobs: Any):
    raise RuntimeError("the sparse step was reached")


@pytest.mark.parametrize("ask", [scores, rolling, answers])
def test_a_poisoned_sparse_step_is_reached(llama, monkeypatch, ask):
    monkeypatch.setattr(sparq_kernels, "decode", poisoned)
    with pytest.raises(RuntimeError, match="the sparse step was reached"):
        ask(harness_model(llama, r=4, k=12))
    ask(harness_model(llama, method="dense"))


def test_a_single_token_is_predicted_by_the_prefill_unless_context_is_decoded(llama, monkeypatch):
    monkeypatch.setattr(sparq_kernels, "decode", poisoned)
    one_token = [(TEXT[:61], TEXT[61])]  # a space would go with the token before it
    scores(harness_model(llama, r=4, k=12), one_token)
    with pytest.raises(RuntimeError, match="the sparse step was reached"):
        scores(harness_model(llama, r=4, k=12, decode_context_tokens=1), one_token)


@pytest.mark.parametrize("method", SPARSE)
def test_what_is_generated_sparsely_is_the_likeliest_when_scored_sparsely(model, method):
    lm = harness_model(model, method=method, batch_size=1, decode_context_tokens=5, **SPARSE[method])
    contexts = [TEXT[:60], TEXT[:47]]
    # As bytes, since what a random model generates is not UTF-8, and text would come back as other tokens.
    pairs = []
    for context in contexts:
        ids = lm.tok_encode(context)
        with lm.decoding.on(model):
            mask = torch.ones(1, len(ids), dtype=torch.int64)
            output = lm._model_generate(torch.tensor([ids]), len(ids) + 12, [], attention_mask=mask)
        pairs.append((None, ids, output[0, len(ids) :].tolist()))
    with lm.decoding.on(model):
        # As with a context: a first element of None would mean a rolling window.
        found = lm._loglikelihood_tokens([("request", *pair[1:]) for pair in pairs], disable_tqdm=True)
    assert [greedy for _, greedy in found] == [True, True]
    dense = stock(model)._loglikelihood_tokens(pairs, disable_tqdm=True)
    assert not all(greedy for _, greedy in dense)  # it takes the same steps to say so


def test_rolling_windows_prefill_what_they_are_told_to(llama):
    lm = harness_model(llama, r=4, k=12, rolling_prefill=100)
    rolling(lm, TEXT[:100])  # after BOS from the harness and BOS from the tokenizer: 102 tokens, one of them unread
    assert lm.steps["task"]["layer_steps"] == {"sparse": 0, "dense": {}}
    rolling(lm, TEXT[:100] + "ten tokens")
    assert lm.steps["task"]["layer_steps"]["sparse"] == 3 * 10  # the other ten, in three layers


# The model is left alone.


def test_the_model_is_as_it_was_after_every_call(model):
    before = snapshot(model)
    for method, knobs in SPARSE.items():
        lm = harness_model(model, method=method, **knobs)
        scores(lm, PAIRS[:2])
        answers(lm, [PAIRS[0][0]])
        assert snapshot(model) == before


def test_a_failed_run_leaves_the_model_as_it_was(llama, monkeypatch):
    before = snapshot(llama)
    monkeypatch.setattr(sparq_kernels, "decode", poisoned)
    with pytest.raises(RuntimeError):
        scores(harness_model(llama, r=4, k=12))
    assert snapshot(llama) == before


# Prefills are shared between runs that only decode differently.


@pytest.mark.parametrize("decoded", [0, 3])
def test_kept_prefills_change_nothing(model, decoded):
    prefills = Prefills(1 << 30)
    for method in ("dense", *SPARSE, "h2o", "sparq"):
        options = SPARSE.get(method, {}) | dict(method=method, decode_context_tokens=decoded)
        with_prefills, without = harness_model(model, prefills=prefills, **options), harness_model(model, **options)
        close(scores(with_prefills)[0], scores(without)[0])
        assert answers(with_prefills) == answers(without)
    batches = 2 if decoded == 0 else 4  # of scores, and of answers, whose context is prefilled apart where some is left
    assert prefills.misses == 2 * batches  # once for h2o, which watches the prompt, and once for all others
    assert prefills.hits == (len(SPARSE) + 1) * batches


def test_prefills_keep_no_more_than_they_may(llama):
    def run(max_bytes: int) -> Prefills:
        prefills = Prefills(max_bytes)
        for _ in range(2):
            scores(harness_model(llama, method="dense", batch_size=1, prefills=prefills))
        return prefills

    contexts = len({context for context, _ in PAIRS})
    everything = run(1 << 30)
    assert (everything.misses, everything.hits) == (contexts, 2 * len(PAIRS) - contexts)
    bytes_of_all = sum(cache.layers[0].keys.nbytes * 2 * 3 for cache, _, _ in everything._kept.values())
    assert run(bytes_of_all).misses == contexts
    assert run(bytes_of_all - 1).misses > contexts
    assert run(0).hits == 0
    with pytest.raises(ValueError, match="max_bytes must be at least 0, got -1"):
        Prefills(-1)


# Options.


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(method="magic"), ValueError, "method must be one of dense, sparq, .*, got 'magic'"),
        (dict(method="window", r=4), TypeError, "method 'window' has no knob 'r' .got 4.; its knobs are k, ratio"),
        (dict(method="dense", k=4), TypeError, "method 'dense' has no knob 'k' .got 4.; it has none"),
        (dict(k=0), ValueError, "k must be at least 1, got 0"),
        (dict(decode_context_tokens=-1), ValueError, "decode_context_tokens must be an integer of at least 0, got -1"),
        (dict(rolling_prefill="all"), ValueError, "rolling_prefill must be an integer of at least 0, got 'all'"),
    ],
)
def test_bad_options_are_named_before_any_model_is_loaded(arguments, error, message):
    with pytest.raises(error, match=message):
        SparqLM("a folder that does not exist", **arguments)


def test_a_knob_called_like_an_argument_of_the_harness_is_refused(llama):
    @dataclass(frozen=True, kw_only=True, slots=True)
    class Mine(Window):
        device: str = "cpu"

    try:
        register_method("mine")(Mine)
        with pytest.raises(ValueError, match="method 'mine' must not have a knob 'device': the harness"):
            SparqLM("a folder that does not exist", method="sparq")
    finally:
        METHODS.pop("mine", None)


def test_a_knob_that_does_not_fit_the_model_is_refused_with_the_model_as_it_was(llama):
    before = snapshot(llama)
    with pytest.raises(ValueError, match="r must not be larger than the model's head_dim=16, got r=99"):
        harness_model(llama, r=99, k=12)
    assert snapshot(llama) == before


def test_beams_and_decoded_contexts_do_not_mix(llama):
    lm = harness_model(llama, r=4, k=12, decode_context_tokens=1)
    request = Instance("generate_until", {}, (TEXT, OPTIONS | {"num_beams": 2}), 0, ("task", 0, 1))
    with pytest.raises(ValueError, match="num_beams must be 1 where decode_context_tokens is not 0, got 2"):
        lm.generate_until([request], disable_tqdm=True)
    harness_model(llama, r=4, k=12).generate_until([request], disable_tqdm=True)


# Whole runs of the harness.


def evaluate(lm, task="recall_pass_key_1k", **options):
    manager = TaskManager(include_path=str(ROOT / "evals" / "tasks"), include_defaults=False)
    return lm_eval.simple_evaluate(lm, tasks=[task], limit=2, task_manager=manager, bootstrap_iters=0, **options)


def test_results_carry_configuration_steps_and_bytes(llama):
    lm = harness_model(llama, r=4, k=12, max_length=1024, decode_context_tokens=2)
    found = evaluate(lm)["config"]["sparq"]
    assert found["method"] == "sparq"
    assert (found["r"], found["k"], found["min_length"], found["decode_context_tokens"]) == (4, 12, 0, 2)
    steps = found["tasks"]["recall_pass_key_1k"]
    assert steps["layer_steps"] == {"sparse": 3 * 6, "dense": {}}  # two tokens of context, four of the answer
    assert 0 < steps["mean_alpha"] <= 1
    # A step of one layer: two rows, two KV heads of 16 components, float32; contexts of 1018 to 1023 tokens
    cached = [1018, 1019, 1020, 1021, 1022, 1023]
    assert steps["bytes"]["dense"] == sum(3 * 2 * 2 * 4 * 2 * 16 * n for n in cached)
    # Four components of each position: three groups of codes, half a byte each and two values a group, the rest from K.
    rows = sum(3 * 2 * 2 * 4 * (2 * 12 * 16 + 4 * 16) for _ in cached)
    index = sum(3 * 2 * 2 * 4 * (3 * (128 + 2 * 4) + (n - 3 * 256) * 4) for n in cached)
    assert steps["bytes"]["read"] == rows + index
    assert steps["compression"] == steps["bytes"]["dense"] / steps["bytes"]["read"]
    json.dumps(found)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (dict(k=2000), "recall_pass_key_1k: 12 layer steps: k covers the context"),
        (dict(k=12, dense_layers=3), "recall_pass_key_1k: 12 layer steps: one of the first dense_layers"),
    ],
)
def test_a_run_without_a_sparse_step_fails_and_says_why(llama, options, why):
    with pytest.raises(RuntimeError, match=f"no step of this run was sparse.*{why}"):
        evaluate(harness_model(llama, r=4, max_length=1024, **options))


def test_a_run_of_single_tokens_fails_and_says_how_to_decode_them(llama, tmp_path):
    task = {
        "task": "one_token",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": str(tmp_path / "rows.jsonl"), "cache_dir": str(tmp_path)},
        "test_split": "train",
        "output_type": "multiple_choice",
        "doc_to_text": TEXT,
        "doc_to_choice": ["a", "b"],
        "target_delimiter": "",
        "doc_to_target": "answer",
    }
    (tmp_path / "rows.jsonl").write_text('{"answer": 0}\n{"answer": 1}\n')
    (tmp_path / "task.yaml").write_text(json.dumps(task))
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    run = dict(tasks=["one_token"], task_manager=manager, bootstrap_iters=0)
    with pytest.raises(RuntimeError, match=r"no decode step at all.*decode_context_tokens=1"):
        lm_eval.simple_evaluate(harness_model(llama, r=4, k=12), **run)
    results = lm_eval.simple_evaluate(harness_model(llama, r=4, k=12, decode_context_tokens=1), **run)
    assert results["config"]["sparq"]["tasks"]["one_token"]["layer_steps"]["sparse"] == 3


def test_cached_answers_are_not_taken_over_by_another_configuration(llama, tmp_path):
    options = dict(max_length=1024, r=4)
    cache = dict(use_cache=str(tmp_path / "answers"))
    first = evaluate(harness_model(llama, k=12, **options), **cache)
    again = evaluate(harness_model(llama, k=12, **options), **cache)
    assert again["results"] == first["results"]
    assert again["config"]["sparq"]["tasks"] == {}  # nothing was decoded, which is no error
    for other in (dict(k=13), dict(k=12, decode_context_tokens=1), dict(k=12, max_length=1023)):
        with pytest.raises(ValueError, match=r'use_cache must name a cache of this very configuration.*"k": 12'):
            evaluate(harness_model(llama, **options | other), **cache)


def test_cached_answers_of_other_models_are_not_taken_over(llama, tmp_path):
    cache = dict(use_cache=str(tmp_path / "answers"))
    evaluate(stock(llama, max_length=1024), **cache)
    with pytest.raises(ValueError, match="it holds answers of a model other than sparq"):
        evaluate(harness_model(llama, max_length=1024, r=4, k=12), **cache)


def test_the_command_takes_what_lm_eval_takes(llama, tmp_path):
    llama.save_pretrained(tmp_path / "model")
    save_byte_tokenizer(tmp_path / "model")
    command = [sys.executable, "-m", "sparq", "lm-eval", "--model", "sparq", "--include_path", "evals/tasks"]
    command += ["--model_args", f"pretrained={tmp_path / 'model'},dtype=float32,r=4,k=12,max_length=1024"]
    command += ["--tasks", "recall_documentation_1k", "--limit", "2", "--device", "cpu", "--output_path", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (path,) = tmp_path.glob("**/results_*.json")
    found = json.loads(path.read_text())
    assert found["config"]["sparq"]["tasks"]["recall_documentation_1k"]["layer_steps"]["sparse"] == 2 * 3 * 127
    assert found["results"]["recall_documentation_1k"]["bits_per_byte,none"] > 0
