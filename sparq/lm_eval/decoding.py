"""How a model decodes while it is evaluated: densely, with SparQ, or with a method that SparQ is compared with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

import sparq
from sparq.lm_eval.comparison import Comparison
from sparq.lm_eval.registry import METHODS, find_method
from sparq.reporting import Report


@dataclass(frozen=True, slots=True)
class Decoding:
    """A method and its knobs."""

    method: str  # as `registry.find_method` takes it
    config: Any  # an instance of the class found

    @classmethod
    def take_knobs(cls, method: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Take out of `arguments` whatever this method, or any that is registered, has a knob for, and is not None.

        Raises:
            TypeError, ValueError: no such method.
        """
        classes = [config for config in (find_method(method), *METHODS.values()) if config is not None]
        names = {field.name for config in classes for field in dataclasses.fields(config)}
        taken = {name: arguments.pop(name) for name in sorted(names & set(arguments))}
        return {name: value for name, value in taken.items() if value is not None}

    @classmethod
    def of(cls, method: str, knobs: dict[str, Any]) -> Decoding:
        """
        Raises:
            TypeError, ValueError: no such method, a knob that it does not have, or a bad value of one it has.
        """
        config = find_method(method)
        known = [] if config is None else [field.name for field in dataclasses.fields(config)]
        for name, value in knobs.items():
            if name not in known:
                has = f"its knobs are {', '.join(known)}" if known else "it has none"
                raise TypeError(f"method {method!r} has no knob {name!r} (got {value!r}); {has}")
        if method == "sparq":
            knobs = {"min_length": 0} | knobs
        return cls(method, None if config is None else config(**knobs))

    @property
    def prefill_kind(self) -> str:
        """What tells caches apart that this method leaves after a prefill from others."""
        return self.method if getattr(self.config, "observes", False) else ""

    @contextmanager
    def on(self, model: PreTrainedModel) -> Iterator[Callable[[], Report] | None]:
        """Let `model` decode so within a `with` block; gives what reports its steps, None where all are dense."""
        if self.method == "dense":
            yield None
        elif self.method == "sparq":
            with sparq.patched(model, self.config):
                yield lambda: sparq.report(model)
        else:
            comparison = Comparison(model, self.config)
            try:
                yield comparison.report
            finally:
                comparison.remove()

    def to_dict(self) -> dict[str, Any]:
        return {"method": self.method} | ({} if self.config is None else dataclasses.asdict(self.config))
