"""Contexts read densely into a cache, from which decoding goes on."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

from sparq.cache import upgrade
from sparq.cache_argument import cache_name
from sparq.generating import each_token_decides
from sparq.served import unwrap

FED_AT_ONCE = 64  # tokens: a pass costs little more than its arithmetic, and the logits of all stay small


class Prefills:
    """What prefills left behind, for runs over one model that differ only in how they decode; the oldest go first.

    What a method that `observes` has left serves the others, too: the same keys and values.

    Args:
        max_bytes: of K and V kept, at least 0.
    """

    def __init__(self, max_bytes: int) -> None:
        if max_bytes < 0:
            raise ValueError(f"max_bytes must be at least 0, got {max_bytes}")
        self.max_bytes = max_bytes
        self.hits = self.misses = 0
        self._kept: OrderedDict[Any, tuple[Cache, Tensor, int]] = OrderedDict()
        self._bytes = 0

    def get(self, key: Any) -> tuple[Cache, Tensor] | None:
        """A copy of the cache, and the logits. key: the kind of cache, and what has been read."""
        kind, *read = key
        if not kind:
            key = next((other for other in self._kept if list(other[1:]) == read), key)
        if key not in self._kept:
            self.misses += 1
            return None
        self.hits += 1
        self._kept.move_to_end(key)
        cache, logits, _ = self._kept[key]
        return copy.deepcopy(cache), logits

    def put(self, key: Any, cache: Cache, logits: Tensor) -> None:
        tensors = [getattr(layer, name) for layer in cache.layers for name in ("keys", "values")]
        size = sum(tensor.nbytes for tensor in tensors if tensor is not None)  # layers that share others' hold none
        if size > self.max_bytes:
            return
        self._kept[key] = (copy.deepcopy(cache), logits, size)
        self._bytes += size
        while self._bytes > self.max_bytes:
            self._bytes -= self._kept.popitem(last=False)[1][2]


def left_padded(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, int64 [B, longest]."""
    longest = max(map(len, rows))
    ids = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def step(model: Any, cache: Cache, ids: Tensor, mask: Tensor | None, all_logits: bool = False) -> Tensor:
    """Feed tokens [B, Q] to `model`; `mask` [B, cached and new] marks what is not padding, None: nothing is.

    Returns:
        The logits of the last token, [B, 1, vocabulary], or, with `all_logits`, of all, [B, Q, vocabulary].
    """
    inputs: dict[str, Any] = {}
    if mask is not None:
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        inputs = dict(attention_mask=mask, position_ids=positions[:, -ids.shape[1] :])
    if not all_logits and ids.shape[1] > 1 and model._supports_logits_to_keep():
        inputs["logits_to_keep"] = 1
    inputs[cache_name(type(unwrap(model)).forward)] = cache  # an adapter's own takes anything
    logits = model(input_ids=ids, use_cache=True, **inputs).logits
    return logits if all_logits else logits[:, -1:]


def feed(model: Any, cache: Cache, ids: Tensor, mask: Tensor | None) -> Iterator[Tensor]:
    """Decode tokens [B, T] that are known beforehand: the logits after each, [B, n, vocabulary], some at a time.

    Each token is a step of the method that the model decodes with. Many go into one pass, where the cache has nothing
    but attention's layers; others (recurrent states) may not be able to go on with several tokens.

    mask: [B, at least cached and T], as in `step`.
    """
    at_once = FED_AT_ONCE if all(isinstance(layer, DynamicLayer) for layer in cache.layers) else 1
    cached = cache.get_seq_length()
    with each_token_decides(cache):
        for begin in range(0, ids.shape[1], at_once):
            some = ids[:, begin : begin + at_once]
            end = cached + begin + some.shape[1]
            yield step(model, cache, some, None if mask is None else mask[:, :end], all_logits=True)


def prefill(
    model: Any,
    ids: Tensor,
    mask: Tensor,
    all_logits: bool = False,
    prefills: Prefills | None = None,
    kind: str = "",
) -> tuple[Cache, Tensor]:
    """The cache of left-padded contexts and the logits as `step` gives them; contexts that are the same are read once.

    Args:
        ids, mask: [B, P], as from `left_padded`.
        prefills: what to look in first, and to leave the result in.
        kind: what sets this cache apart from others of the same tokens.
    """
    unique, inverse = torch.unique(torch.cat([ids, mask], 1), dim=0, return_inverse=True)
    if len(unique) == len(ids):
        unique, inverse = torch.cat([ids, mask], 1), None
    key = (kind, all_logits, tuple(unique.shape), unique.cpu().numpy().tobytes())
    found = None if prefills is None else prefills.get(key)
    if found is None:
        unique_ids, unique_mask = unique.chunk(2, 1)
        cache: Cache = DynamicCache(config=model.config)
        upgrade(cache)  # for whatever method, dense too: stock's copies itself at every token
        logits = step(model, cache, unique_ids, None if unique_mask.all() else unique_mask, all_logits)
        if prefills is not None:
            prefills.put(key, cache, logits)
    else:
        cache, logits = found
    if inverse is not None:
        cache.batch_select_indices(inverse)
        logits = logits[inverse]
    return cache, logits
