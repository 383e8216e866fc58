"""What only `generate` knows of a forward pass: which of its tokens are a prompt, and which a draft.

transformers' `generate` computes a prompt, in chunks if it is told to, inside a method that it calls on the model. It
verifies a draft in one pass with the token before it, the first one together with the whole prompt. Every token of a
draft is a decode step, so that the result is, token for token, that of decoding without an assistant. Before the first
such pass `generate` asks the model for the object that makes the drafts, and lets go of it when it is done.

Both methods are listened to on a patched model; what they say is noted for as long as it is true.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from sparq.cache_argument import find_cache

PREFILL = "_prefill"  # of transformers' GenerationMixin, like the next
CANDIDATES = "_get_candidate_generator"


_is_prefill: ContextVar[bool] = ContextVar("sparq_is_prefill", default=False)


class Drafting:
    """On a cache whose tokens come from assisted decoding."""

    def __init__(self, generator: Any = None, prompt_left: int = 0, counts_tokens: bool = False) -> None:
        self._generator = None if generator is None else weakref.ref(generator)
        self.counts_tokens = counts_tokens  # each is a step that reads for itself, not a draft that is verified at once
        self.prompt_left = prompt_left  # tokens of the prompt that no pass has computed yet

    def __reduce__(self) -> tuple:
        return Drafting, ()  # a copy of the cache, or a file, is not what `generate` is decoding on

    @property
    def is_alive(self) -> bool:
        return self._generator is not None and self._generator() is not None


class GenerateNotes:
    """Stands in for two methods of a model: notes what they are asked, and lets them answer."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._own: dict[str, Any] = {}  # what somebody else has put in a method's place

    def install(self) -> None:
        for name, method in ((PREFILL, self.prefill), (CANDIDATES, self.candidates)):
            if hasattr(type(self.model), name):
                if name in vars(self.model):
                    self._own[name] = vars(self.model)[name]
                vars(self.model)[name] = method

    def remove(self) -> None:
        for name in (PREFILL, CANDIDATES):
            vars(self.model).pop(name, None)
        vars(self.model).update(self._own)
        self._own = {}

    def _call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        if name in self._own:
            return self._own[name](*args, **kwargs)
        return getattr(type(self.model), name)(self.model, *args, **kwargs)

    def prefill(
        self, input_ids: Any, generation_config: Any, model_kwargs: dict, is_first_iteration: bool = True, **others: Any
    ) -> Any:
        if is_first_iteration:  # an assistant is called again and again, for a few tokens each time
            cache = find_cache(model_kwargs.values())
            if cache is not None:  # drafts on it have ended, though a traceback may keep their object alive
                cache._sparq_drafting = None  # type: ignore[attr-defined]
        token = _is_prefill.set(is_first_iteration)
        try:
            return self._call(PREFILL, input_ids, generation_config, model_kwargs, is_first_iteration, **others)
        finally:
            _is_prefill.reset(token)

    def candidates(self, *args: Any, **kwargs: Any) -> Any:
        generator = self._call(CANDIDATES, *args, **kwargs)
        model_kwargs = kwargs.get("model_kwargs") or {}
        cache = find_cache(model_kwargs.values())
        if cache is not None and kwargs.get("input_ids") is not None:
            embeds = model_kwargs.get("inputs_embeds")
            prompt = kwargs["input_ids"] if embeds is None else embeds
            cache._sparq_drafting = Drafting(generator, prompt.shape[1])  # type: ignore[attr-defined]
        return generator


@contextmanager
def each_token_decides(cache: Cache) -> Iterator[None]:
    """In a `with` block every new token of a pass on `cache` is a decode step, however many there are: each chooses its
    own positions, and the logits are those of feeding one token after the other. So are the counts of the report.

    For measuring what is known beforehand, in one pass instead of hundreds. `generate` does the same with a draft.
    """
    pass_by_pass = _Held()
    cache._sparq_drafting = Drafting(pass_by_pass, counts_tokens=True)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        cache._sparq_drafting = None  # type: ignore[attr-defined]


class _Held:
    """An object that can be referred to weakly."""


def is_prefill() -> bool:
    """Whether `generate` is computing a prompt, in this thread or task."""
    return not torch.compiler.is_compiling() and _is_prefill.get()


def drafting(cache: Cache | None) -> Drafting | None:
    """What is noted on `cache`, while its drafts are being made."""
    found: Drafting | None = getattr(cache, "_sparq_drafting", None)
    return found if found is not None and found.is_alive else None
