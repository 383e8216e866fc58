"""Assisted decoding: which tokens of a forward pass are a draft.

transformers verifies a draft in one pass with the token before it, the first one together with the whole prompt. Every
token of a draft is a decode step, so that the result is, token for token, that of decoding without an assistant; and
only `generate` knows how many tokens are a draft. It asks the model for the object that makes the drafts before the
first pass, and lets go of it when it is done: what is noted on the cache then lives exactly as long as the drafts.
"""

from __future__ import annotations

import weakref
from typing import Any

from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from sparq.cache_argument import find_cache

METHOD = "_get_candidate_generator"  # of transformers' GenerationMixin, called on the instance


class Drafting:
    """On a cache whose tokens come from assisted decoding."""

    def __init__(self, generator: Any = None, prompt_left: int = 0) -> None:
        self._generator = None if generator is None else weakref.ref(generator)
        self.prompt_left = prompt_left  # tokens of the prompt that no pass has computed yet

    def __reduce__(self) -> tuple:
        return Drafting, ()  # a copy of the cache, or a file, is not what `generate` is decoding on

    def __deepcopy__(self, memo: dict) -> Drafting:
        return Drafting()

    @property
    def is_alive(self) -> bool:
        return self._generator is not None and self._generator() is not None


class DraftNotes:
    """Stands in for a model's method, notes on the cache what it is asked, and lets the method answer."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        generator = getattr(type(self.model), METHOD)(self.model, *args, **kwargs)
        model_kwargs = kwargs.get("model_kwargs") or {}
        cache = find_cache(model_kwargs.values())
        if cache is not None and kwargs.get("input_ids") is not None:
            embeds = model_kwargs.get("inputs_embeds")
            prompt = kwargs["input_ids"] if embeds is None else embeds
            cache._sparq_drafting = Drafting(generator, prompt.shape[1])  # type: ignore[attr-defined]
        return generator

    def install(self) -> None:
        if hasattr(type(self.model), METHOD):
            vars(self.model)[METHOD] = self

    def remove(self) -> None:
        vars(self.model).pop(METHOD, None)


def drafting(cache: Cache | None) -> Drafting | None:
    """What is noted on `cache`, while its drafts are being made."""
    found: Drafting | None = getattr(cache, "_sparq_drafting", None)
    return found if found is not None and found.is_alive else None
