"""Methods from outside the tree: registered by name, or named as module:Class."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import sparq
from sparq import SparqConfig
from sparq.lm_eval import Method, register_method
from sparq.lm_eval.decoding import Decoding
from sparq.lm_eval.methods import Window
from sparq.lm_eval.registry import METHODS, find_method
from tests.sparq.tiny import build, generate, prompt

SOURCE = '''
from dataclasses import dataclass
from sparq.lm_eval import Method

NUMBER = 3

@dataclass(frozen=True, kw_only=True, slots=True)
class First(Method):
    """The first positions, and the newest."""

    strength: float = 1.0

    def _select(self, query, key, logits, valid, scale, state):
        kept = valid & (valid.cumsum(-1) < self._budget(valid, query.shape[-1])[:, None])
        kept[:, -1] = True
        return kept[:, None, None].expand(-1, key.shape[1], -1, -1)
'''


@dataclass(frozen=True, kw_only=True, slots=True)
class Newest(Method):
    """`Window` without sinks, said in another way."""

    reach: int = 1

    def _select(self, query: Tensor, key: Tensor, logits: Tensor, valid: Tensor, scale: float, state: Any) -> Tensor:
        kept = valid & (valid.flip(-1).cumsum(-1).flip(-1) <= self._budget(valid, query.shape[-1])[:, None])
        return kept[:, None, None].expand(-1, key.shape[1], -1, -1)


@pytest.fixture(autouse=True)
def registry() -> Iterator[None]:
    """What a test registers is gone after it."""
    before = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(before)


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "outside_the_tree.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "outside_the_tree"
    sys.modules.pop("outside_the_tree", None)


def tokens_of(decoding: Decoding) -> list[list[int]]:
    model = build()
    with decoding.on(model) as report:
        found = generate(model, prompt())
        assert report is not None and report().total.sparse_steps
    return found


def test_a_registered_method_decodes_by_its_name() -> None:
    assert register_method("newest")(Newest) is Newest
    knobs = {"k": 12, "reach": 2, "batch_size": 4}
    taken = Decoding.take_knobs("newest", knobs)
    assert taken == {"k": 12, "reach": 2} and knobs == {"batch_size": 4}
    decoding = Decoding.of("newest", taken)
    assert decoding.to_dict() == {"method": "newest", "k": 12, "ratio": 8, "dense_layers": 0, "reach": 2}
    assert tokens_of(decoding) == tokens_of(Decoding.of("window", {"k": 12, "sinks": 0}))


def test_a_class_is_named_with_its_module(outside: str) -> None:
    knobs: dict[str, Any] = {"k": 12, "strength": 2.0}
    decoding = Decoding.of(f"{outside}:First", Decoding.take_knobs(f"{outside}:First", knobs))
    assert decoding.method == f"{outside}:First" and not knobs
    assert tokens_of(decoding) != tokens_of(Decoding.of("window", {"k": 12, "sinks": 0}))
    with pytest.raises(TypeError, match=r"has no knob 'r' .* its knobs are k, ratio, dense_layers, strength"):
        Decoding.of(f"{outside}:First", {"r": 3})


@pytest.mark.parametrize(
    "name, error, message",
    [
        ("newest", ValueError, "method must be one of dense, sparq, .*rocket, or module:Class, got 'newest'"),
        ("no_such_module:First", ValueError, "got 'no_such_module:First': No module named .*; PYTHONPATH says where"),
        (":First", ValueError, "method must name a module that can be imported, got ':First'"),
        ("outside_the_tree:Second", ValueError, "a class of outside_the_tree, .* there is no 'Second'"),
        ("outside_the_tree:NUMBER", TypeError, "must be a subclass of sparq.lm_eval.Method, got 3"),
        ("sparq:SparqConfig", TypeError, "must be a subclass of sparq.lm_eval.Method, got <class .*SparqConfig"),
        ("sparq.lm_eval:Method", TypeError, "must define _select, got <class .*Method"),
    ],
)
def test_names_that_find_no_method(outside: str, name: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        find_method(name)


def test_names_that_are_there_already_are_kept() -> None:
    for name in ("dense", "sparq", "window"):
        with pytest.raises(ValueError, match=f"name must be one that no method has yet, got '{name}'; taken are dense"):
            register_method(name)(Newest)
    register_method("newest")(Newest)
    again = type("Newest", (Newest,), {"__module__": Newest.__module__, "__qualname__": Newest.__qualname__})
    register_method("newest")(again)  # a cell of a notebook that runs twice
    assert find_method("newest") is again
    assert (METHODS["dense"], METHODS["sparq"], METHODS["window"]) == (None, SparqConfig, Window)


@pytest.mark.parametrize("name", ["", "my method", "a:b", "a=b", "a,b", None])
def test_names_that_the_command_line_could_not_say(name: Any) -> None:
    with pytest.raises(ValueError, match="name must be a Python identifier"):
        register_method(name)


@pytest.mark.parametrize("what", [3, int, SparqConfig, Method])
def test_what_is_no_method_is_not_registered(what: Any) -> None:
    before = dict(METHODS)
    with pytest.raises(TypeError, match="what is registered must"):
        register_method("mine")(what)
    assert before == METHODS


def test_the_example_of_the_documentation_is_a_method() -> None:
    """The first and the newest positions: what `Window` attends with k - 4 of the newest and 4 sinks."""
    text = (Path(__file__).parents[3] / "evals" / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"`method=mine:FirstAndLast`.*?```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {"sparq": sparq, "dataclass": dataclass}
    exec(code, names)
    register_method("first_and_last")(names["FirstAndLast"])
    found = tokens_of(Decoding.of("first_and_last", {"k": 8}))
    assert found == tokens_of(Decoding.of("window", {"k": 12, "sinks": 4}))
