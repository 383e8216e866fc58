"""What a layer of a cache holds of its tokens, taken out of it and put into a new one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from sparq.cache import SparqLayer
from sparq.static_cache import SparqStaticLayer

KINDS = (DynamicLayer, SparqLayer, DynamicSlidingWindowLayer, StaticLayer, SparqStaticLayer)


class Held(NamedTuple):
    """What a layer holds."""

    keys: Tensor  # [B, Hkv, m, d]: of the last m of its tokens
    values: Tensor
    length: int  # tokens it has seen

    @property
    def first(self) -> int:
        """The first token that is still held."""
        return self.length - self.keys.shape[2]


def held_by(index: int, layer: Any) -> Held:
    """Views of what the layer of that index holds; raises ValueError where that is something else than K and V."""
    kind = type(layer)
    if kind not in KINDS:
        raise ValueError(f"cache must have dynamic or static layers, layer {index} is a {kind.__name__}")
    length = int(layer.get_seq_length())
    if not length:
        return Held(torch.empty(0, 0, 0, 0), torch.empty(0, 0, 0, 0), 0)
    keys, values = layer.keys.detach()[:, :, :length], layer.values.detach()[:, :, :length]
    if keys.shape[:3] != values.shape[:3]:
        raise ValueError(f"cache must hold as many keys as values, layer {index} has {keys.shape} and {values.shape}")
    return Held(keys, values, length)


def is_empty_by_nature(layer: Any) -> bool:
    """Whether it is the layer of a model's layer that shares another's K and V."""
    return not isinstance(layer, (DynamicLayer, StaticLayer)) and getattr(layer, "keys", layer) is None


def needed_from(layer: Any, keep: int) -> int:
    """The first of `keep` tokens that `layer` needs to go on from them."""
    return max(0, keep - layer.sliding_window + 1) if isinstance(layer, DynamicSlidingWindowLayer) else 0


def is_enough(layer: Any, held: Held, keep: int) -> bool:
    """Whether `layer` can go on from the first `keep` tokens of what is held."""
    return not keep or held.first <= needed_from(layer, keep)


def fill(layer: Any, held: Held, keep: int, device: torch.device) -> None:
    """Let a new layer of a dynamic cache hold the first `keep` tokens."""
    begin, end = needed_from(layer, keep) - held.first, keep - held.first
    keys, values = (tensor[:, :, begin:end].to(device) for tensor in (held.keys, held.values))
    _put(layer, keys, values, keep)


def fill_rows(layer: Any, held: Held, keep: Sequence[int], length: int) -> None:
    """Let a new layer of a dynamic cache hold a row for each of `keep`: so many tokens of a batch of one, with padding
    in front of them that makes `length`. Copies them.

    The padding repeats the first token: a four-bit index has one range for it and the tokens that follow.
    """
    begin = needed_from(layer, length)

    def copied(tensor: Tensor) -> Tensor:
        batch = tensor.new_zeros(len(keep), tensor.shape[1], length - begin, tensor.shape[3])
        for row, count in zip(batch, keep, strict=True):
            taken = min(count, length - begin)  # a window slides over the padding too
            row[:, length - begin - taken :] = tensor[0, :, count - taken - held.first : count - held.first]
            if 0 < taken < length - begin:
                row[:, : length - begin - taken] = row[:, length - begin - taken, None]
        return batch

    _put(layer, copied(held.keys), copied(held.values), length)


def _put(layer: Any, keys: Tensor, values: Tensor, length: int) -> None:
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values
    if isinstance(layer, DynamicSlidingWindowLayer):
        layer.cumulative_length = length


def can_be_cut(cache: Cache, keep: int) -> bool:
    """Whether the first `keep` tokens can be had of a dynamic cache: a layer with a sliding window may have forgotten
    what it would need."""
    return all(is_enough(layer, held, keep) for layer, held in _all_held(cache))


def beginning(cache: Cache, keep: int, config: PreTrainedConfig) -> DynamicCache:
    """A new cache with a copy of the first `keep` tokens of one that `can_be_cut` to them; config: the model's."""
    new = DynamicCache(config=config)
    layers: list[Any] = [layer for layer in new.layers if not is_empty_by_nature(layer)]
    for layer, (_, held) in zip(layers, _all_held(cache), strict=True):
        fill(layer, held, keep, held.keys.device)
        layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
    return new


def _all_held(cache: Cache) -> list[tuple[Any, Held]]:
    layers = enumerate(cache.layers)
    return [(layer, held_by(i, layer)) for i, layer in layers if not is_empty_by_nature(layer)]
