"""The caches of the last conversations, for the next turn of one of them to go on from."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from typing import Any

from transformers import DynamicCache, PreTrainedModel

from sparq import held
from sparq.branches import common_length
from sparq.cache import allocated_bytes

log = logging.getLogger(__name__)

# New tokens behind cached ones are computed under a mask with a place for each pair of them, a gigabyte for 30,000: too
# much where the cached ones are a small part of a prompt.
SMALLEST_SHARE = 1 / 4


@dataclass
class Conversation:
    """What a model has read and written."""

    tokens: list[int]  # that the cache holds
    cache: DynamicCache


class Conversations:
    """The last conversations of one model, those longest unused forgotten first.

    A cache is handed out by `take`, and is then nobody else's: what was being computed when an exception came is not
    found here again. `keep` brings it back.

    Args:
        model: that computes them.
        slots: how many are kept, 0 or more.
        max_bytes: that they may hold together: K, V and the index, room to grow included.
    """

    def __init__(self, model: PreTrainedModel, slots: int, max_bytes: int) -> None:
        self.model, self.slots, self.max_bytes = model, slots, max_bytes
        self._kept: list[Conversation] = []  # the last used last
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def nbytes(self) -> int:
        return sum(_nbytes(kept.cache) for kept in list(self._kept))

    def take(self, tokens: list[int]) -> Conversation:
        """The conversation that `tokens` go on from, cut back to what they have in common; else a new, empty one.

        Two tokens at least are left to compute: one by itself would be a decode step, not the end of a prompt. Where
        `tokens` share no more than the beginning of a longer conversation, a system prompt or a document, that is
        copied, and the other conversation stays.
        """
        with self._lock:
            lengths = [common_length((kept.tokens, tokens)) for kept in self._kept]
            shared = max(lengths, default=0)
            kept = self._kept[lengths.index(shared)] if lengths else None
            keep = min(shared, len(tokens) - 2)
            if kept is None or keep <= 0 or keep < SMALLEST_SHARE * len(tokens):
                return self._new()
            if not held.can_be_cut(kept.cache, keep):
                log.info(
                    f"{keep:,} tokens of a conversation are computed again: a layer with a sliding window has "
                    "forgotten what it would need to go back to them"
                )
                return self._new()
            if keep < len(kept.tokens) / 2:
                return Conversation(tokens[:keep], held.beginning(kept.cache, keep, self.model.config))
            self._kept.remove(kept)
        surplus = len(kept.tokens) - keep
        if surplus:
            kept.cache.crop(-surplus)  # negative in all versions: that many tokens less
        return Conversation(tokens[:keep], kept.cache)

    def keep(self, conversation: Conversation) -> None:
        """Keep a conversation, and forget others until all fit."""
        if not self.slots:
            return
        needed = _nbytes(conversation.cache)
        if needed > self.max_bytes:
            log.warning(
                f"a conversation of {len(conversation.tokens):,} tokens is not kept, and its next turn reads all of it "
                f"again: it takes {needed / 1e9:.2f} GB, and {self.max_bytes / 1e9:.2f} are allowed"
            )
            return
        with self._lock:
            self._kept.append(conversation)
            while len(self._kept) > self.slots or self.nbytes > self.max_bytes:
                self._kept.pop(0)

    def forget(self) -> None:
        with self._lock:
            self._kept.clear()

    def _new(self) -> Conversation:
        return Conversation([], DynamicCache(config=self.model.config))


def _nbytes(cache: DynamicCache) -> int:
    layers: list[Any] = cache.layers
    windows = (layer for layer in layers if getattr(layer, "is_sliding", False) and layer.is_initialized)
    return allocated_bytes(cache) + sum(layer.keys.nbytes + layer.values.nbytes for layer in windows)
