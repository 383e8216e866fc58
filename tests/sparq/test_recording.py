"""`record`: the positions noted are those that were attended, of every sparse step and no other."""

from __future__ import annotations

import copy

import pytest
import torch
from packaging.version import Version
from torch import Tensor
from transformers import Cache, DynamicCache

import sparq
from sparq import Recording
from sparq.lm_eval.comparison import Comparison
from sparq.lm_eval.methods import Oracle
from tests.sparq.caches import on_either_cache
from tests.sparq.tiny import build, generate, next_tokens, prompt, teacher_forced

SPARSE = dict(r=4, k=12, min_length=0)


@torch.no_grad()
def test_what_is_noted_is_what_the_step_depends_on() -> None:
    """Without the mean value, V of other positions may be anything; V of each of these matters."""
    model = sparq.patch(build(num_hidden_layers=1), **SPARSE, mean_value=False)
    inputs = prompt(batch=1)
    cache = DynamicCache(config=model.config)
    model(**inputs, past_key_values=cache)

    def step(changed: Tensor | None = None) -> Tensor:
        """Logits of a step with other values at these positions [Hkv, n] of the cache."""
        own = copy.deepcopy(cache)
        if changed is not None:
            values = own.layers[0].values
            values.scatter_(2, changed[None, :, :, None].expand(1, -1, -1, values.shape[3]), 9.0)
        return model(input_ids=torch.tensor([[5]]), past_key_values=own).logits

    with sparq.record(model) as recording:
        expected = step()
    (positions,) = recording.positions[0]
    heads = range(positions.shape[1])
    assert positions.shape == (1, 2, 1, 12) and recording.cached == {0: [41]}
    held = [[p for p in positions[0, head, 0].tolist() if p < 40] for head in heads]  # the newest is not there before
    others = torch.tensor([[p for p in range(40) if p not in held[head]][:28] for head in heads])
    assert torch.equal(step(others), expected)
    for place in range(11):
        assert not torch.equal(step(torch.tensor([[held[head][place]] for head in heads])), expected)


@on_either_cache
def test_every_sparse_step_of_every_layer(make_cache) -> None:
    model = sparq.patch(build(), **SPARSE, dense_layers=1)
    inputs, tokens = prompt(), next_tokens(steps=6)  # of two rows, of which one is padded by 9
    with sparq.record(model) as recording:
        teacher_forced(model, inputs, tokens, make_cache(model))
    assert isinstance(recording, Recording) and sorted(recording.positions) == [1, 2]
    for layer, steps in recording.positions.items():
        assert [step.shape for step in steps] == [(2, 2, 1, 12)] * 6
        for number, step in enumerate(steps):
            assert step.dtype == torch.int64 and step.device.type == "cpu"
            assert (step.diff(dim=-1) > 0).all() and (step[..., -1] == 40 + number).all()
            assert (step[1] >= 9).all()
        counts = recording.counts(layer)
        assert counts.shape == (2, 2, max(recording.cached[layer])) and (counts.sum(-1) == 6 * 12).all()
        assert (counts.sum(-1).double().mean() * 2).item() == sparq.report(model).layers[layer].positions_read
    before = copy.deepcopy(recording)
    teacher_forced(model, inputs, tokens, make_cache(model))
    assert all(len(recording.positions[layer]) == len(before.positions[layer]) for layer in (1, 2)), "it has ended"


def test_a_head_that_stops_earlier_has_fewer() -> None:
    model = sparq.patch(build(), r=4, k=30, mass=0.6, k_min=2, min_length=0)
    with sparq.record(model) as recording:
        generate(model, prompt())
    total = sparq.report(model).total
    read = [int((step >= 0).sum()) for steps in recording.positions.values() for step in steps]
    assert sum(read) / 2 == pytest.approx(total.positions_read, abs=3)  # of two KV heads; a layer's are rounded
    assert any((step == -1).any() for steps in recording.positions.values() for step in steps)
    for layer in recording.positions:
        assert recording.counts(layer).sum() == sum(int((step >= 0).sum()) for step in recording.positions[layer])


def test_the_tokens_of_a_draft() -> None:
    model = sparq.patch(build(), **SPARSE)
    with sparq.record(model) as recording:
        expected = generate(model, prompt(batch=1), prompt_lookup_num_tokens=3)
    assert {step.shape[2] for step in recording.positions[0]} - {1}, "several tokens at once"
    assert expected == generate(model, prompt(batch=1))
    recording.counts(0)


def test_results_are_the_same_and_patching_anew_goes_on_recording() -> None:
    model = sparq.patch(build(), **SPARSE)
    expected = generate(model, prompt())
    with sparq.record(model) as recording:
        assert generate(model, prompt()) == expected
        sparq.patch(model, r=2, k=6, min_length=0)
        generate(model, prompt())
    assert {step.shape[3] for step in recording.positions[0]} == {12, 6}


def test_inside_a_block() -> None:
    model = build()
    with sparq.patched(model, **SPARSE), sparq.record(model) as recording:
        generate(model, prompt())
    assert len(recording.positions[0]) == 11


def test_a_copy_is_not_recorded() -> None:
    model = sparq.patch(build(), **SPARSE)
    with sparq.record(model) as recording:
        generate(copy.deepcopy(model), prompt())
    assert not recording.positions


def test_who_cannot_be_recorded() -> None:
    model = build()
    with (
        pytest.raises(ValueError, match="model must be patched to be recorded, this LlamaForCausalLM is not"),
        sparq.record(model),
    ):
        pass
    comparison = Comparison(model, Oracle(k=12))
    with (
        pytest.raises(ValueError, match="must decode with SparQ to be recorded, not with Oracle"),
        sparq.record(model),
    ):
        pass
    comparison.remove()
    sparq.patch(model, **SPARSE)
    with sparq.record(model), pytest.raises(ValueError, match="must not be recorded already"), sparq.record(model):
        pass
    with sparq.record(model) as recording:  # the first has ended
        pass
    with pytest.raises(KeyError, match="layer 0 had no sparse step; those that had are"):
        recording.counts(0)
    with pytest.raises(ValueError, match="there must be a sparse step to plot"):
        pytest.importorskip("matplotlib")
        recording.plot()


def test_batches_of_different_sizes_are_not_added_up() -> None:
    model = sparq.patch(build(), **SPARSE)
    with sparq.record(model) as recording:
        generate(model, prompt(batch=1))
        generate(model, prompt(batch=2))
    with pytest.raises(ValueError, match=r"steps of one batch, got \[batch, KV heads\] of \[\(1, 2\), \(2, 2\)\]"):
        recording.counts(0)


def test_the_plot_shows_what_was_attended() -> None:
    pytest.importorskip("matplotlib")
    model = sparq.patch(build(), **SPARSE)
    with sparq.record(model) as recording:
        generate(model, prompt())
    figure = recording.plot(row=1)
    assert [axes.get_ylabel() for axes in figure.axes] == ["layer 0", "layer 1", "layer 2"]
    for layer, axes in enumerate(figure.axes):
        shown = torch.tensor(axes.images[0].get_array())
        assert shown.shape == (11, 51)
        assert torch.equal(shown.sum(0), recording.counts(layer)[1].float().mean(0))


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_step_is_not_left_out_silently() -> None:
    model = sparq.patch(build(), **SPARSE)
    inputs = prompt(batch=1)
    cache: Cache = model(**inputs).past_key_values
    with sparq.record(model) as recording:
        step = torch.compile(model, backend="eager", fullgraph=True)
        if Version(torch.__version__) < Version("2.13"):  # a compiled step of this kind is dense there
            step(input_ids=torch.tensor([[5]]), past_key_values=cache)
            assert sparq.report(model).total.sparse_steps == 0
        else:
            with pytest.raises(Exception, match="a compiled step cannot be recorded"):
                step(input_ids=torch.tensor([[5]]), past_key_values=cache)
    assert not recording.positions
