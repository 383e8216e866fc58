"""Heavy hitters: positions are evicted for good, by the attention that they have had."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from sparq_kernels.reference import masked_softmax
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from sparq.cache import SparqLayer
from sparq.config import _check_int
from sparq.lm_eval.methods.method import Attended, Method, best, newest

OBSERVED_AT_ONCE = 1 << 20  # elements of a prompt's attention: 4 MB in float32, which a processor cache holds


class H2OLayer(SparqLayer):
    """A layer of a dynamic cache that remembers what attention its positions have had, and which are left.

    The evicted keys and values stay where they are, unread: dense attention, and the mask, go on to fit. `crop` takes
    positions away, but neither the attention that their queries have paid nor the evictions that they have caused:
    a copy of the cache is the way back.
    """

    scores: Tensor | None  # [B, Hkv, S] float32 (float64 for keys of float64): attention, summed
    kept: Tensor | None  # [B, Hkv, S] bool: not evicted

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.scores = self.kept = None

    @classmethod
    def adopt(cls, layer: DynamicLayer) -> H2OLayer:
        """One in place of `layer`, none of whose tokens has been attended to yet."""
        new = super().adopt(layer)
        assert isinstance(new, H2OLayer)
        new._extend()
        return new

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        self._extend()
        return keys, values

    def _extend(self) -> None:
        """New positions have had no attention yet, and are kept."""
        if self.get_seq_length() == 0:
            return
        assert self.keys is not None
        shape = self.keys.shape[:3]
        dtype = torch.float64 if self.keys.dtype == torch.float64 else torch.float32
        scores = torch.zeros(shape, dtype=dtype, device=self.keys.device)
        kept = torch.ones(shape, dtype=torch.bool, device=self.keys.device)
        if self.scores is not None and self.kept is not None:
            before = self.scores.shape[2]
            scores[:, :, :before], kept[:, :, :before] = self.scores, self.kept
        self.scores, self.kept = scores, kept

    def reset(self) -> None:
        super().reset()
        self.scores = self.kept = None

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        length = self.get_seq_length()  # what the argument means differs between versions of transformers
        if self.scores is not None and self.kept is not None:
            self.scores, self.kept = self.scores[:, :, :length], self.kept[:, :, :length]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        if self.scores is not None and self.kept is not None:
            beams = beam_idx.to(self.scores.device)
            self.scores, self.kept = self.scores[beams], self.kept[beams]

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.scores is not None and self.kept is not None:
            self.scores = self.scores.repeat_interleave(repeats, dim=0)
            self.kept = self.kept.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        if self.scores is not None and self.kept is not None:
            self.scores, self.kept = self.scores[indices], self.kept[indices]


@dataclass(frozen=True, kw_only=True, slots=True)
class H2O(Method):
    """H2O (Zhang et al., arXiv 2306.14048): the most recent positions, and those that have had most attention so far.

    A position's score is the attention probability paid to it by all queries after it and its own, summed: in the
    prompt, which is dense, and in the decode steps, where it is the softmax over what is left. Each decode step, before
    it attends, evicts the lowest scores until k are left, the current position included; these never come back. For a
    GQA group the scores are summed over the group: one set of positions, as K and V are held once for all of it.

    Per KV head, 2·k·d elements are read, and k scores read and written, counted in the cache's dtype. From `ratio`:
    k·(2·d + 2) = 2·S·d / ratio.

    Args:
        local: the most recent of the k positions, the current one included, at least 1. None: half of k, as in the
            paper; the authors of SparQ took k / 4.
    """

    local: int | None = None

    observes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        Method.__post_init__(self)
        _check_int("local", self.local, 1, True)
        if self.k is not None and self.local is not None and self.local > self.k:
            raise ValueError(
                f"local must not be larger than k, which counts the local window: got local={self.local} and k={self.k}"
            )

    def positions(self, valid: int, head_dim: int) -> int:
        if self.k is not None:
            return min(valid, self.k)
        return min(valid, max(1, int(valid * head_dim / (self.ratio * (head_dim + 1)))))

    def observe(self, query: Tensor, key: Tensor, mask: Tensor | None, scale: float, state: H2OLayer) -> None:
        """Add the attention of these queries to the scores in `state`, the layer that holds `key`.

        Evicted positions are among those that they see, and stay evicted. The queries are taken in chunks, each with
        the positions that any of them sees, so that the attention of a long prompt is never all in memory, and neither
        the future nor padding is computed.
        """
        batch, kv_heads, group, queries, _ = query.shape
        length = key.shape[2]
        assert state.scores is not None
        wide = state.scores.dtype
        scores, keys, scaled = state.scores.clone(), key.to(wide), query.to(wide) * scale
        positions = torch.arange(length, device=key.device)
        chunk = max(1, OBSERVED_AT_ONCE // (kv_heads * group * length))
        for row, start in itertools.product(range(batch), range(0, queries, chunk)):
            q = scaled[row, :, :, start : start + chunk]  # [Hkv, G, chunk, d]
            own = positions[length - queries + start :][: q.shape[2], None]  # their own positions
            if mask is None:
                allowed = positions <= own  # [chunk, S]
            else:
                allowed = mask[row, start : start + chunk]
                allowed = allowed & allowed.gather(-1, own)
            seen = allowed.any(0).nonzero()
            if len(seen) == 0:
                continue
            columns = slice(int(seen[0]), int(seen[-1]) + 1)
            logits = q @ keys[row, :, None, columns].transpose(-1, -2)  # [Hkv, G, chunk, columns]
            scores[row, :, columns] += masked_softmax(logits, allowed[:, columns]).sum((1, 2))
        state.scores = scores

    def attend_each(
        self, query: Tensor, key: Tensor, value: Tensor, valid: Tensor, scale: float, state: H2OLayer | None = None
    ) -> Iterator[Attended]:
        """One after the other: each evicts before the next. The state knows all the new positions already."""
        assert state is not None and state.scores is not None and state.kept is not None
        scores, kept, queries = state.scores, state.kept, query.shape[3]
        for i in range(queries):
            seen = scores.shape[2] - queries + 1 + i
            state.scores, state.kept = scores[:, :, :seen], kept[:, :, :seen]
            yield self.attend(query[:, :, :, i], key[:, :, :seen], value[:, :, :seen], valid[:, i, :seen], scale, state)
            scores[:, :, :seen], kept[:, :, :seen] = state.scores, state.kept
        state.scores, state.kept = scores, kept

    def _select(
        self, query: Tensor, key: Tensor, logits: Tensor, valid: Tensor, scale: float, state: H2OLayer
    ) -> Tensor:
        if not isinstance(state, H2OLayer) or state.scores is None or state.kept is None:
            raise TypeError(f"state must be the H2OLayer that holds the keys, got {state!r}")
        budget = self._budget(valid, query.shape[-1])
        local = (budget // 2).clamp(min=1) if self.local is None else budget.clamp(max=self.local)
        left = state.kept[:, :, None] & valid[:, None, None]  # [B, Hkv, 1, S]
        kept = best(state.scores[:, :, None], left, budget, forced=newest(valid, local)[:, None, None])
        attention = masked_softmax(logits, kept)  # [B, Hkv, G, S]
        state.scores = state.scores + attention.sum(2)
        state.kept = state.kept & (kept[:, :, 0] | ~valid[:, None])  # padding is not evicted
        return kept

    def _elements(self, kept: Tensor, valid: Tensor, query: Tensor) -> int:
        return (2 * query.shape[-1] + 2) * int(kept.sum())
