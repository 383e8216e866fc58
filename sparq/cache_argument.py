"""How a cache is found among the arguments of a model's call, and what the argument is called.

transformers 5.24 calls `cache` what was `past_key_values` before.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

from transformers import GenerationMixin
from transformers.cache_utils import Cache

NAMES = ("cache", "past_key_values")


def find_cache(values: Iterable[Any]) -> Cache | None:
    """The first cache of transformers among the values of arguments, whatever they are called."""
    return next((value for value in values if isinstance(value, Cache)), None)


@functools.lru_cache(maxsize=64)
def cache_name(function: Callable) -> str:
    """What `function`, the `forward` of a model's class for example, calls the argument for a cache.

    Raises:
        ValueError: it has none by a known name.
    """
    for name in NAMES:
        if name in inspect.signature(function).parameters:
            return name
    raise ValueError(f"{function.__qualname__} must take a cache, as one of {', '.join(NAMES)}")


def generate_cache_name() -> str:
    """What `generate` calls the cache that it is given."""
    return cache_name(GenerationMixin.prepare_inputs_for_generation)
