"""SparQ in a real vLLM: token for token what vLLM gives where k covers the context, and what `sparq.patch` gives in
transformers where it does not."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.vllm.engines import (
    COVERING,
    NEW,
    SPARSE,
    Served,
    by_transformers,
    close,
    engine,
    generate,
    make_model,
    prompts,
    serve,
)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def llama(folder: Path) -> Path:
    return make_model("llama", folder)


@pytest.fixture(scope="session")
def dense(llama: Path) -> Served:
    """What vLLM's own attention gives."""
    return serve(llama)


@pytest.fixture(scope="session")
def sparse(llama: Path) -> list[list[int]]:
    """What transformers gives with SparQ."""
    return by_transformers(llama, SPARSE, prompts())


def was_sparse(served: Served) -> bool:
    found = served.report
    return (
        0 < found["sparse_token_layers"] == found["token_layers"]
        and found["positions_read"] < found["positions_cached"]
    )


def test_vllms_own_attention_has_nothing_of_ours(dense: Served) -> None:
    assert dense.report["token_layers"] == 0


@pytest.mark.parametrize("index", ["int4", "full"])
@pytest.mark.parametrize("page", [256, 512])
def test_where_k_covers_the_context_it_is_vllms_own(llama: Path, dense: Served, index: str, page: int) -> None:
    served = serve(llama, COVERING | {"index": index}, block_size=page)
    assert served.tokens == dense.tokens
    assert served.report["decoded_tokens"] == 3 * (NEW - 1)


@pytest.mark.parametrize("index", ["int4", "full"])
def test_sparse_steps_give_what_they_give_in_transformers(llama: Path, dense: Served, index: str) -> None:
    knobs = SPARSE | {"index": index}
    served = serve(llama, knobs)
    assert served.tokens == by_transformers(llama, knobs, prompts())
    assert served.tokens != dense.tokens and was_sparse(served)


@pytest.mark.parametrize("changes", [{"block_size": 256}, {"max_num_seqs": 1}, {"enforce_eager": False}], ids=str)
def test_neither_pages_nor_batches_nor_graphs_change_tokens(
    llama: Path, sparse: list[list[int]], changes: dict[str, Any]
) -> None:
    served = serve(llama, SPARSE, **changes)
    assert served.tokens == sparse and was_sparse(served)


def test_small_pages_of_the_full_index(llama: Path) -> None:
    knobs = SPARSE | {"index": "full"}
    assert serve(llama, knobs, block_size=64).tokens == by_transformers(llama, knobs, prompts())


def test_a_budget_by_mass(llama: Path) -> None:
    knobs = {"k": 300, "r": 16, "mass": 0.8, "k_min": 16, "min_length": 0}
    served = serve(llama, knobs)
    assert served.tokens == by_transformers(llama, knobs, prompts())
    assert was_sparse(served) and served.report["mean_alpha"] > 0.8


def test_half_precision(llama: Path) -> None:
    assert serve(llama, COVERING, dtype="bfloat16").tokens == serve(llama, dtype="bfloat16").tokens


def test_chunks_of_prompts(llama: Path, sparse: list[list[int]]) -> None:
    served = serve(llama, SPARSE, max_num_batched_tokens=96, max_model_len=1024, enable_chunked_prefill=True)
    assert served.tokens == sparse and was_sparse(served)


def test_a_prefix_that_is_cached(llama: Path) -> None:
    asked = prompts((600, 700, 580), shared=540)
    expected = by_transformers(llama, SPARSE, asked)
    llm = engine(llama, SPARSE, enable_prefix_caching=True, block_size=256)
    try:
        first = generate(llm, asked[:1])
        rest = generate(llm, asked[1:])
        again = generate(llm, asked)
    finally:
        close(llm)
    assert first.tokens + rest.tokens == expected == again.tokens
    # Two pages of 256 of each prompt were there.
    assert first.report["prompt_tokens"] == 600 and rest.report["prompt_tokens"] == 700 + 580 - 2 * 512
    assert was_sparse(again)


def test_eight_requests_at_once(llama: Path) -> None:
    asked = prompts((5, 60, 255, 256, 257, 511, 513, 800), seed=1)
    served = serve(llama, SPARSE, asked)
    assert served.tokens == by_transformers(llama, SPARSE, asked) and served.report["decoded_tokens"] == 8 * (NEW - 1)


def test_preemption(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too few pages for all requests: one is put aside and computed again, densely, so only where k covers the context
    its tokens must be the same."""
    from vllm.v1.core.sched.scheduler import Scheduler

    asked, new = prompts((240, 245, 250, 230), seed=2), 40
    expected = serve(llama, COVERING, asked, new, block_size=256).tokens
    happened = []
    preempt = Scheduler._preempt_request
    monkeypatch.setattr(Scheduler, "_preempt_request", lambda *a, **k: (happened.append(1), preempt(*a, **k))[1])
    llm = engine(llama, COVERING, block_size=256, num_gpu_blocks_override=7)
    try:
        served = generate(llm, asked, new)
    finally:
        close(llm)
    assert happened and served.tokens == expected


@pytest.mark.parametrize("kind", ["qwen3", "mistral"])
def test_other_models(folder: Path, kind: str) -> None:
    model = make_model(kind, folder)
    served = serve(model, SPARSE)
    assert served.tokens == by_transformers(model, SPARSE, prompts()) and was_sparse(served)


def test_real_weights(smollm2: Path) -> None:
    """SmolLM2-135M-Instruct with the defaults, but for the length from which they are sparse."""
    import demo_text
    import transformers

    asked = [transformers.AutoTokenizer.from_pretrained(smollm2)(demo_text.document())["input_ids"][:1500]]
    served = serve(smollm2, {"min_length": 0}, asked, max_model_len=2048, skip_tokenizer_init=False)
    assert served.tokens == by_transformers(smollm2, {"min_length": 0}, asked) and was_sparse(served)


def test_tensor_parallel(llama: Path, sparse: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes, each with half of the heads."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    llm = engine(llama, SPARSE, tensor_parallel_size=2, worker_extension_cls="sparq.vllm.report.WorkerExtension")
    try:
        tokens = generate(llm, prompts()).tokens
        reports = llm.collective_rpc("sparq_report")
    finally:
        close(llm)
    assert tokens == sparse and len(reports) == 2
    for found in reports:
        assert found["sparse_token_layers"] == found["token_layers"] == 2 * 3 * (NEW - 1)
        assert found["positions_read"] < found["positions_cached"]


@pytest.mark.parametrize("hybrid", [True, False])
def test_layers_with_a_window_stay_dense_and_others_do_not(folder: Path, hybrid: bool) -> None:
    model, off = make_model("gemma3", folder), {"disable_hybrid_kv_cache_manager": not hybrid}
    assert serve(model, COVERING, **off).tokens == serve(model).tokens
    served = serve(model, SPARSE, **off)
    assert served.tokens == by_transformers(model, SPARSE, prompts())
    assert served.report["token_layers"] == 2 * 3 * (NEW - 1)  # two of four layers


def test_a_model_of_windows_alone_is_vllms_own(folder: Path) -> None:
    model = make_model("mistral-window", folder)
    served = serve(model, SPARSE)
    assert served.tokens == serve(model).tokens and served.report["token_layers"] == 0


def test_the_first_layers_can_stay_dense(llama: Path) -> None:
    knobs = SPARSE | {"dense_layers": 1}
    served = serve(llama, knobs)
    assert served.tokens == by_transformers(llama, knobs, prompts())
    assert served.report["token_layers"] == 3 * (NEW - 1)


def test_short_contexts_are_dense_request_by_request(llama: Path, dense: Served, sparse: list[list[int]]) -> None:
    served = serve(llama, SPARSE | {"min_length": 500})
    assert served.tokens == [*dense.tokens[:2], sparse[2]]
    found = served.report
    assert found["token_layers"] == 2 * 3 * (NEW - 1) and found["sparse_token_layers"] == 2 * (NEW - 1)


def test_a_kernel_that_lies_is_noticed(llama: Path, dense: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is served is what the operator gives: with another one, other tokens."""
    import sparq_kernels

    decode = sparq_kernels.decode

    def poisoned(*args: Any, **kwargs: Any) -> Any:
        result = decode(*args, **kwargs)
        return result._replace(output=torch.full_like(result.output, 7.0))

    monkeypatch.setattr(sparq_kernels, "decode", poisoned)
    assert serve(llama, COVERING).tokens != dense.tokens


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"ratio": 0.5}, "ratio must be a finite number of at least 1, got 0.5"),
        ({"rato": 8}, "sparq.*: unknown knob 'rato'; the knobs are r, k, ratio"),
        ({"k": 8, "local": 9}, "local must not be larger than k"),
        ({"r": 33}, "r must not be larger than the model's head_dim=32, got r=33"),
    ],
)
def test_wrong_knobs_are_refused_at_the_start(llama: Path, knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message):
        engine(llama, knobs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_cache_dtype": "fp8", "dtype": "bfloat16"}, "does not serve a KV cache in fp8"),
        ({"block_size": 96}, "block_size must be one of .256, 512, 1024, 2048. for SparQ's index .int4., got 96"),
    ],
)
def test_what_is_not_served_is_refused_in_words(llama: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message):
        engine(llama, SPARSE, **changes)


@pytest.mark.parametrize(("given", "kept"), [(None, "1"), ("0", "0")])
def test_large_pages_of_memory_are_asked_for(
    llama: Path, monkeypatch: pytest.MonkeyPatch, given: str | None, kept: str
) -> None:
    from vllm.engine.arg_utils import EngineArgs

    name = "THP_MEM_ALLOC_ENABLE"
    monkeypatch.setenv(name, given or "")  # so that it is restored
    if given is None:
        monkeypatch.delenv(name)
    EngineArgs(model=str(llama), skip_tokenizer_init=True).create_engine_config()
    assert os.environ.get(name) == given
    EngineArgs(model=str(llama), skip_tokenizer_init=True, attention_backend="CUSTOM").create_engine_config()
    assert os.environ[name] == kept


def test_drafts(llama: Path, sparse: list[list[int]]) -> None:
    """Each token of a draft chooses for itself: the tokens are the same, drafted or not.

    The last test: drafts bring Numba along, and after that vLLM makes no other engine in this process."""
    speculation = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
    served = serve(llama, SPARSE, speculative_config=speculation)
    assert served.tokens == sparse
    assert served.report["decoded_tokens"] > 3 * (NEW - 1)  # those that were rejected too
