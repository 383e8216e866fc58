"""Decode steps of a patched model under torch.compile: one graph for all steps, and what it counts and cannot know."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from packaging.version import Version
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend, EagerAndRecordGraphs
from transformers import CompileConfig, DynamicCache, StaticCache

import sparq
from tests.sparq.caches import SIZE, same_report, static
from tests.sparq.tiny import build, generate, next_tokens, prompt, teacher_forced

pytestmark = pytest.mark.slow

SPARSE = dict(r=4, k=12, min_length=0)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@torch.no_grad()
def decode(model, call: Callable, inputs: dict, tokens: Tensor, cache: StaticCache, prompt_call=None) -> Tensor:
    """`teacher_forced` with masks of one size, as a graph needs them; `call` makes the steps after the prompt."""
    length = inputs["input_ids"].shape[1]
    mask = torch.zeros(inputs["input_ids"].shape[0], SIZE, dtype=torch.int64)
    mask[:, :length] = inputs["attention_mask"]
    first = model if prompt_call is None else prompt_call
    first(input_ids=inputs["input_ids"], attention_mask=mask.clone(), past_key_values=cache)
    logits = []
    for step in range(tokens.shape[1]):
        mask[:, length + step] = 1
        token = tokens[:, step : step + 1]
        logits.append(call(input_ids=token, attention_mask=mask.clone(), past_key_values=cache).logits[:, -1])
    return torch.stack(logits, 1)


def compiled_and_expected(family: str, knobs: dict, backend, steps: int = 6, **changes):
    inputs, tokens = prompt(), next_tokens(steps=steps)
    eager = sparq.patch(build(family, **changes), **knobs)
    expected = decode(eager, eager, inputs, tokens, static(eager))
    model = sparq.patch(build(family, **changes), **knobs)
    call = torch.compile(model, fullgraph=True, backend=backend)
    actual = decode(model, call, inputs, tokens, static(model))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert actual.argmax(-1).equal(expected.argmax(-1))
    same_report(sparq.report(model), sparq.report(eager))
    return model, sparq.report(model)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "qwen3", "phi3"])
def test_one_graph_for_all_steps(family: str) -> None:
    graphs = EagerAndRecordGraphs()
    with torch._dynamo.config.patch(error_on_recompile=True):
        _, report = compiled_and_expected(family, SPARSE, graphs)
    assert len(graphs.graphs) == 1 and report.total.sparse_steps == 3 * 6
    called = [str(node.target) for node in graphs.graphs[0].graph.nodes]
    assert called.count("sparq_kernels.decode.default") == called.count("sparq_kernels.append.default") == 3


def test_functionalised() -> None:
    """The graph that backends are given mutates nothing: what each operator writes has to be declared."""
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled_and_expected("llama", SPARSE, "aot_eager", num_hidden_layers=2)


def test_inductor_copies_no_cache() -> None:
    """A cache-sized clone before every `append` would cost more than dense attention."""
    from torch._inductor.utils import run_and_get_code

    inputs, tokens = prompt(), next_tokens(steps=4)
    eager = sparq.patch(build(num_hidden_layers=1), **SPARSE)
    expected = decode(eager, eager, inputs, tokens, static(eager))
    model = sparq.patch(build(num_hidden_layers=1), **SPARSE)
    call = torch.compile(model, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        actual, (code,) = run_and_get_code(decode, model, call, inputs, tokens, static(model))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert sparq.report(model).total.sparse_steps == 4
    (append,) = re.findall(r"sparq_kernels\.append\.default\((\w+), (\w+), (\w+), None", code)
    (read,) = re.findall(r"sparq_kernels\.decode\.default\(\w+, (\w+), (\w+), (\w+), ", code)
    assert {*append} == {*read} and all(name.startswith("arg") for name in append)


def test_sliding_layers_recompile_as_often_as_stock() -> None:
    """Their stock cache layers hold their length in Python."""
    family, inputs, tokens, graphs = "gemma2", prompt(), next_tokens(steps=4), []
    for patched in (False, True):
        model = sparq.patch(build(family), **SPARSE) if patched else build(family)
        counter = CompileCounterWithBackend("eager")
        call = torch.compile(model, fullgraph=True, backend=counter)
        actual = decode(model, call, inputs, tokens, static(model))
        graphs.append(counter.frame_count)
        torch._dynamo.reset()
    assert graphs[1] == graphs[0]
    eager = sparq.patch(build(family), **SPARSE)
    expected = decode(eager, eager, inputs, tokens, static(eager))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    same_report(sparq.report(model), sparq.report(eager))


def test_a_reset_cache_and_another_prompt_need_no_new_graph() -> None:
    model = sparq.patch(build(), **SPARSE)
    counter, cache, tokens = CompileCounterWithBackend("eager"), static(model), next_tokens(steps=3)
    call = torch.compile(model, fullgraph=True, backend=counter)
    for padding, length in ((9, 40), (0, 30), (20, 50)):
        inputs = prompt(padding=padding, length=length)
        eager = sparq.patch(build(), **SPARSE)
        expected = decode(eager, eager, inputs, tokens, static(eager))
        torch.testing.assert_close(decode(model, call, inputs, tokens, cache), expected, rtol=1e-4, atol=1e-4)
        cache.reset()
    assert counter.frame_count == 1
    assert sparq.report(model).total.sparse_steps == 3 * 9
    decode(model, call, inputs, tokens, static(model))  # nor does another cache of that size
    assert counter.frame_count == 1


@pytest.mark.parametrize("early", [False, True], ids=["fresh", "early initialised"])
def test_a_compiled_prompt(early: bool) -> None:
    inputs, tokens = prompt(), next_tokens(steps=4)
    eager = sparq.patch(build(), **SPARSE)
    expected = decode(eager, eager, inputs, tokens, static(eager))
    model = sparq.patch(build(), **SPARSE)
    cache = static(model)
    if early:
        cache.early_initialization(2, 2, 16, torch.float32, torch.device("cpu"))
    call = torch.compile(model, fullgraph=True, backend="aot_eager")
    actual = decode(model, call, inputs, tokens, cache, prompt_call=call)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # the prompt and all steps
    assert sparq.report(model).total.sparse_steps == 3 * 4


@pytest.mark.parametrize(
    "knobs, reason",
    [
        (dict(dense_layers=3), "one of the first dense_layers"),
        (dict(min_length=SIZE + 1), "shorter than min_length"),
        (dict(k=SIZE), "k covers the context"),
    ],
    ids=str,
)
def test_dense_steps_are_counted_with_their_reason(knobs: dict, reason: str) -> None:
    with torch._dynamo.config.patch(error_on_recompile=True):
        _, report = compiled_and_expected("llama", SPARSE | knobs, "eager", steps=3)
    everything = 4 * 2 * 2 * 2 * 16 * SIZE  # float32, rows, KV heads, K and V, d, all of the cache
    layer = report.layers[0]
    assert layer.dense_steps == {reason: 3} and layer.sparse_steps == 0
    assert layer.bytes_read == layer.bytes_dense == 3 * everything


def test_a_reason_without_a_place_is_still_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a graph; Python counts any reason by its name."""
    monkeypatch.setattr(sparq.attention, "_dense_reason", lambda *args: "something new")
    reasons = []
    for compiled in (True, False):
        model = sparq.patch(build(), **SPARSE)
        call = torch.compile(model, fullgraph=True, backend="eager") if compiled else model
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            decode(model, call, prompt(), next_tokens(steps=2), static(model))
        reasons.append(sparq.report(model).total.dense_steps)
    assert reasons == [{sparq.reasons.OTHER_REASON: 3 * 2}, {"something new": 3 * 2}]


@torch.no_grad()
@pytest.mark.parametrize("family, padding", [("llama", 0), ("llama", 9), ("gpt_oss", 9)])
def test_a_dynamic_cache_is_one_graph(family: str, padding: int) -> None:
    """The first graphs know the first numbers of tokens; the last serves any, until the storage has to grow."""
    inputs, tokens = prompt(padding=padding), next_tokens(steps=12)
    expected_model = sparq.patch(build(family), **SPARSE)
    expected = steps_on_a_dynamic_cache(expected_model, expected_model, inputs, tokens)
    counter = CompileCounterWithBackend("eager")
    model = sparq.patch(build(family), **SPARSE)
    actual = steps_on_a_dynamic_cache(model, torch.compile(model, fullgraph=True, backend=counter), inputs, tokens)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    same_report(sparq.report(model), sparq.report(expected_model))
    assert sparq.report(model).total.sparse_steps and not sparq.report(model).total.other_sums
    assert counter.frame_count <= 3


@torch.no_grad()
def test_a_dynamic_cache_grows_and_goes_on_without_its_graph() -> None:
    """Its storage is made anew at 256 positions; then eager steps follow on what compiled ones have left."""
    inputs, tokens = prompt(), next_tokens(steps=230)
    expected_model, model = (sparq.patch(build(), **SPARSE) for _ in range(2))
    expected = steps_on_a_dynamic_cache(expected_model, expected_model, inputs, tokens)
    compiled, calls = torch.compile(model, fullgraph=True, backend="eager"), []

    def call(**kwargs):
        calls.append(len(calls) < 220)
        return (compiled if calls[-1] else model)(**kwargs)

    actual = steps_on_a_dynamic_cache(model, call, inputs, tokens)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    same_report(sparq.report(model), sparq.report(expected_model))


@torch.no_grad()
def test_a_dynamic_cache_that_grows_often_is_not_compiled_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where it does not double."""
    monkeypatch.setattr(sparq.cache, "room_to_grow", lambda length, device: 1)
    monkeypatch.setattr(sparq.cache, "CAPACITY_STEP", 4)
    inputs, tokens = prompt(batch=1), next_tokens(1, 40)
    expected_model, model = (sparq.patch(build(), **SPARSE) for _ in range(2))
    expected = steps_on_a_dynamic_cache(expected_model, expected_model, inputs, tokens)
    counter = CompileCounterWithBackend("eager")
    actual = steps_on_a_dynamic_cache(model, torch.compile(model, fullgraph=True, backend=counter), inputs, tokens)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert counter.frame_count <= 5  # of ten growths


@torch.no_grad()
def test_a_dynamic_cache_compiles_with_inductor() -> None:
    inputs, tokens = prompt(padding=0), next_tokens(steps=5)
    if Version(torch.__version__) < Version("2.13"):
        stock = build()
        try:
            steps_on_a_dynamic_cache(stock, torch.compile(stock, fullgraph=True), inputs, tokens)
        except torch._inductor.exc.InductorError:
            pytest.skip(
                f"the Inductor of torch {torch.__version__} cannot compile such steps of the stock model either"
            )
    expected_model, model = (sparq.patch(build(), **SPARSE) for _ in range(2))
    expected = steps_on_a_dynamic_cache(expected_model, expected_model, inputs, tokens)
    actual = steps_on_a_dynamic_cache(model, torch.compile(model, fullgraph=True), inputs, tokens)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_dynamic_cache_whose_mask_changes_says_so() -> None:
    """What was valid when it was summed is masked out later; a graph cannot sum anew."""
    model, inputs, tokens = sparq.patch(build(), **SPARSE), prompt(padding=0), next_tokens(steps=3)
    call = torch.compile(model, fullgraph=True, backend="eager")
    cache = DynamicCache(config=model.config)
    model(**inputs, past_key_values=cache)
    for step in range(3):
        mask = torch.ones(2, 41 + step, dtype=torch.int64)
        mask[:, :20] = step < 2
        call(input_ids=tokens[:, step : step + 1], attention_mask=mask, past_key_values=cache)
    assert sparq.report(model).total.other_sums == 3


def steps_on_a_dynamic_cache(model, call: Callable, inputs: dict, tokens: Tensor) -> Tensor:
    cache, mask, logits = DynamicCache(config=model.config), inputs["attention_mask"], []
    model(**inputs, past_key_values=cache)
    for step in range(tokens.shape[1]):
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        output = call(input_ids=tokens[:, step : step + 1], attention_mask=mask, past_key_values=cache)
        logits.append(output.logits[:, -1])
    return torch.stack(logits, 1)


def run_with(make_mask: Callable, steps: int = 4) -> sparq.Report:
    """Compiled steps under masks [2, 1, 1, SIZE] made from [2, SIZE] bool."""
    model, inputs, tokens = sparq.patch(build(), **SPARSE), prompt(), next_tokens(steps=steps)
    call, cache = torch.compile(model, fullgraph=True, backend="eager"), static(model)
    valid = torch.zeros(2, SIZE, dtype=torch.bool)
    valid[:, :40] = inputs["attention_mask"]
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
        for step in range(steps):
            valid[:, 40 + step] = True
            mask = make_mask(valid.clone(), step)[:, None, None]
            call(input_ids=tokens[:, step : step + 1], attention_mask=mask, past_key_values=cache)
    return sparq.report(model)


def test_a_graph_that_cannot_follow_a_mask_says_so() -> None:
    def forgetful(valid: Tensor, step: int) -> Tensor:
        valid[0, : 2 * max(0, step - 1)] = False  # in the last two steps
        return valid

    report = run_with(forgetful)
    assert [layer.other_sums for layer in report.layers.values()] == [2, 2, 2]
    assert "WRONG MEAN, 6 layer steps" in str(report) and report.total.sparse_steps == 12
    report = run_with(lambda valid, step: valid)
    assert report.total.other_sums == 0 and "WRONG" not in str(report)


def test_a_graph_that_ignores_a_bias_says_so() -> None:
    def biased(valid: Tensor, step: int) -> Tensor:
        return torch.where(valid, -0.5 if step > 2 else 0.0, torch.finfo(torch.float32).min)

    report = run_with(biased)
    assert report.total.ignored_biases == 3 and "WRONG SCORES, 3 layer steps" in str(report)


def test_patching_again_is_seen_by_a_compiled_model() -> None:
    inputs, tokens, model = prompt(), next_tokens(steps=2), build()
    call = torch.compile(model, fullgraph=True, backend="eager")
    stock = decode(model, call, inputs, tokens, static(model))
    sparq.patch(model, **SPARSE)
    torch.testing.assert_close(
        decode(model, call, inputs, tokens, static(model)), teacher_forced(model, inputs, tokens), rtol=1e-4, atol=1e-4
    )
    sparq.patch(model, **SPARSE | dict(r=2))
    torch.testing.assert_close(
        decode(model, call, inputs, tokens, static(model)), teacher_forced(model, inputs, tokens), rtol=1e-4, atol=1e-4
    )
    sparq.unpatch(model)
    torch.testing.assert_close(decode(model, call, inputs, tokens, static(model)), stock)


def test_generate_that_compiles_by_itself() -> None:
    """It does so on GPUs; a private switch of transformers makes it do so here."""
    config = CompileConfig(backend="aot_eager", mode=None, fullgraph=True)
    config._compile_all_devices = True
    model = build(num_hidden_layers=2)
    sparq.patch(model, **SPARSE)
    expected = [generate(model, inputs, tokens=5) for inputs in (prompt(), prompt(padding=3))]
    sparq.patch(model, **SPARSE)
    compiled: list[int] = []
    for inputs, tokens in zip((prompt(), prompt(padding=3)), expected, strict=True):
        actual = generate(model, inputs, tokens=5, cache_implementation="static", compile_config=config)
        assert actual == tokens
        compiled.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert compiled[0] > 0 and compiled[1] == compiled[0]
    assert sparq.report(model).total.sparse_steps == 2 * 2 * 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_cuda_graphs(family: str) -> None:
    inputs = {name: tensor.cuda() for name, tensor in prompt(length=300).items()}
    model = build(family).cuda()
    sparq.patch(model, **SPARSE)
    expected, tokens = generate(model, inputs, tokens=20), sparq.report(model).total.sparse_steps
    for _ in range(2):
        sparq.patch(model, **SPARSE)
        actual = generate(model, inputs, tokens=20, cache_implementation="static")  # reduce-overhead is its default
        assert actual == expected
        report = sparq.report(model).total
        assert report.sparse_steps == tokens and report.other_sums == 0
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0
