"""SparQ once more, with parts of it left out, or with its bytes spent in another way."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from sparq_kernels.operator import mean_from
from sparq_kernels.reference import masked_softmax
from torch import Tensor

from sparq.config import SparqConfig, _check_int
from sparq.lm_eval.methods.method import (
    Attended,
    Method,
    best,
    by_mass,
    check_mass,
    exact_mass,
    finite_padding,
    newest,
    products,
    steps_at_once,
    steps_first,
    widened,
)

INDEX_BITS = {"full": 16, "int8": 8, "int4": 4, "int2": 2}
ALPHAS = ("paper", "exact")


@dataclass(frozen=True, kw_only=True, slots=True)
class SparqVariant(Method):
    """SparQ Attention (Ribar et al., arXiv 2312.04985, algorithm 1) and its ablations.

    k, ratio, r, local, mean_value and dense_layers are those of `SparqConfig`, with its rules and floors; with the
    others as they are by default the result is that of `sparq.patch`. The mass reported is the exact attention of
    the positions read, as for every method here; what SparQ blends with is its estimate of it, as in `sparq.report`.

    Per KV head S·r + 2·k·d + 4·d elements are read. With `shared=False` the first two are read for each query head.
    An element stands for 16 bits: of a coded position bits/16 of an element are read for each of the r components, and
    2·r elements, lo and step, for each group of positions.

    Args:
        score_temperature: whether the approximate scores' softmax makes up for the components left out.
        shared: one set of components and positions for a GQA group. False: each query head has its own, as if the
            model had no GQA.
        index: what the positions are scored from. "full": K itself. "int8", "int4", "int2": K coded in so many bits,
            see `coded`. Only groups that lie wholly below what a query sees are coded; the positions of the last,
            incomplete one are scored from K itself.
        group: positions of a group that has one lo and one step for each KV head and component, counted from position
            0 of the cache, padding included.
        mass: the budget by attention mass, between 0 and 1: the fewest positions, the local window first, then those
            with the largest approximate scores, that have this share of the approximate scores, averaged over the GQA
            group. `k` and `ratio` then say how many these may be at the most. None: always so many.
        floor: with `mass`: the fewest positions attended, the local window included. That is a quarter of the floor
            where `local` is None.
        alpha: the share of the softmax that the attended positions have, for the mean value. "paper": the sum of their
            approximate scores. "exact": Z / (Z + Z'), where Z sums the exact exponentials of the attended positions,
            and Z' the approximate ones, those that the scores are the softmax of, of all others.
    """

    r: int | None = None
    local: int | None = None
    mean_value: bool | float = 0.5
    score_temperature: bool = True
    shared: bool = True
    index: str = "full"
    group: int = 256
    mass: float | None = None
    floor: int = 64
    alpha: str = "paper"

    def __post_init__(self) -> None:
        config = self.config  # checks its knobs
        for name in ("score_temperature", "shared"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        for name, known in (("index", INDEX_BITS), ("alpha", ALPHAS)):
            if getattr(self, name) not in tuple(known):
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        _check_int("group", self.group, 1, False)
        _check_int("floor", self.floor, 1, False)
        check_mass(self.mass)
        if self.mass is None:
            return
        if self.floor > config.base_k:
            raise ValueError(
                f"floor must not be larger than k, the most that mass may take: got floor={self.floor} and "
                f"k={config.base_k}" + (" (the least that k=None gives)" if self.k is None else "")
            )
        if self.local is not None and self.local > self.floor:
            raise ValueError(
                f"local must not be larger than floor, which counts the local window: got local={self.local} and "
                f"floor={self.floor}"
            )

    @property
    def config(self) -> SparqConfig:
        """The same knobs for `sparq.patch`, but for the index and the mass, which are made here."""
        return SparqConfig(
            r=self.r,
            k=self.k,
            ratio=self.ratio,
            local=self.local,
            index="full",
            mass=1.0,
            mean_value=self.mean_value,
            dense_layers=self.dense_layers,
            min_length=0,
        )

    def positions(self, valid: int, head_dim: int) -> int:
        return self.config.positions(valid)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, valid: Tensor, scale: float, state: Any = None
    ) -> Attended:
        return next(self._steps(query[:, :, :, None], key, value, valid[:, None], scale))

    def attend_each(
        self, query: Tensor, key: Tensor, value: Tensor, valid: Tensor, scale: float, state: Any = None
    ) -> Iterator[Attended]:
        if query.shape[3] == 1:
            return self.attend_one_by_one(query, key, value, valid, scale, state)
        return self._steps(query, key, value, valid, scale)

    def _steps(self, query: Tensor, key: Tensor, value: Tensor, valid: Tensor, scale: float) -> Iterator[Attended]:
        q, keys, values = widened(query), widened(key), finite_padding(value, valid[:, -1])
        queries, length = query.shape[3], key.shape[2]
        codes = None if self.index == "full" else coded(key, self.group, INDEX_BITS[self.index])
        begin = 0
        while begin < queries:
            seen = length - queries + begin + 1
            count = min(queries - begin, steps_at_once(query, key))
            scored = keys
            if codes is not None:
                whole = seen - seen % self.group
                # A code is that of K alone: these steps see the same ones.
                count = min(count, whole + self.group - seen)
                scored = torch.cat([codes[:, :, :whole], keys[:, :, whole:]], dim=2)
            some = q[:, :, :, begin : begin + count]
            allowed = valid[:, begin : begin + count]  # [B, Q, S]
            outputs, kept, mass = self._attend_some(some, keys, scored, values, allowed, scale)
            for i in range(count):
                elements = self._elements(kept[:, i], valid[:, begin + i, : seen + i], query[:, :, :, begin + i])
                yield Attended(outputs[:, :, :, i].to(query.dtype), kept[:, i], mass[:, i], elements)
            begin += count

    def _attend_some(
        self, query: Tensor, key: Tensor, scored: Tensor, value: Tensor, valid: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Steps 1 to 5 of a few queries [B, Hkv, G, Q, d], widened, that score the rows `scored` in place of K.

        Returns the outputs like query, the positions [B, Q, Hkv, sets, S], and their exact attention [B, Q, Hkv, G].
        """
        steps = query.shape[0], query.shape[3]
        allowed = valid.flatten(0, 1)  # [B·Q, S]
        approximate = self._approximate(query, scored, scale)  # [B·Q, Hkv, G, S]
        scores = masked_softmax(approximate, allowed[:, None, None])
        kept = self._choose(scores, allowed, query.shape[-1])
        logits = steps_first(products(query, key) * scale)
        weights = masked_softmax(logits, kept).unflatten(0, steps).permute(0, 2, 3, 1, 4)
        output = products(weights, value.transpose(-1, -2))  # [B, Hkv, G, Q, d]
        if self.mean_value is not False:
            if self.alpha == "exact":
                chosen = logits.masked_fill(~kept, -torch.inf).logsumexp(-1)
                others = approximate.masked_fill(kept | ~allowed[:, None, None], -torch.inf).logsumexp(-1)
                alpha = torch.sigmoid(chosen - others)  # Z / (Z + Z'), [B·Q, Hkv, G]
            else:
                alpha = scores.masked_fill(~kept, 0).sum(-1)
            alpha = torch.where(kept.sum(-1) >= allowed.sum(-1)[:, None, None], 1.0, alpha)
            alpha = alpha.unflatten(0, steps).permute(0, 2, 3, 1)[..., None]  # [B, Hkv, G, Q, 1]
            seen = valid.sum(-1).clamp(min=1)[:, None, :, None]  # [B, 1, Q, 1]
            mean = (valid[:, None].to(value.dtype) @ value / seen)[:, :, None]  # [B, Hkv, 1, Q, d]
            blended = alpha * output + (1 - alpha) * mean
            output = torch.where(alpha < mean_from(self.mean_value), output, blended)
        return output, kept.unflatten(0, steps), exact_mass(logits, kept, allowed).unflatten(0, steps)

    def _approximate(self, query: Tensor, key: Tensor, scale: float) -> Tensor:
        """Steps 1 and 2: the logits by r components alone, [B·Q, Hkv, G, S]."""
        magnitude = query.abs().sum(2, keepdim=True) if self.shared else query.abs()  # [B, Hkv, 1 or G, Q, d]
        r = self.config.components(query.shape[-1])
        components = magnitude.argsort(dim=-1, descending=True, stable=True)[..., :r]
        taken = torch.zeros_like(magnitude, dtype=torch.bool).scatter(-1, components, True)
        partial = query.masked_fill(~taken, 0)
        logits = products(partial, key) * scale
        if self.score_temperature:
            tau = (partial.abs().sum(-1, keepdim=True) / query.abs().sum(-1, keepdim=True)).sqrt()
            logits = logits / torch.where(tau > 0, tau, 1.0)  # an all-zero query divides 0 by 0
        return steps_first(logits)

    def _choose(self, scores: Tensor, valid: Tensor, head_dim: int) -> Tensor:
        """Step 3: the positions with the largest scores, the local window always among them."""
        budget = self._budget(valid, head_dim)
        score = scores.sum(2, keepdim=True) if self.shared else scores
        if self.mass is None:
            local = budget // 4 if self.local is None else budget.clamp(max=self.local)
            return best(score, valid[:, None, None], budget, forced=newest(valid, local)[:, None, None])
        least = budget.clamp(max=self.floor)
        local = least.clamp(max=self.floor // 4 if self.local is None else self.local)
        share = score / scores.shape[2] if self.shared else score
        return by_mass(
            share, valid[:, None, None], self.mass, least, budget, forced=newest(valid, local)[:, None, None]
        )

    def _select(self, query: Tensor, key: Tensor, logits: Tensor, valid: Tensor, scale: float, state: Any) -> Tensor:
        raise NotImplementedError("SparqVariant attends in _steps, which have an index")

    def _elements(self, kept: Tensor, valid: Tensor, query: Tensor) -> int:
        """valid: [B, S], of all that the query sees."""
        batch, kv_heads, _, head_dim = query.shape
        sets = kv_heads * kept.shape[2]  # of components, each of which scores the positions of a row
        r = self.config.components(head_dim)
        read = 2 * head_dim * int(kept.sum()) + 4 * head_dim * batch * kv_heads
        if self.index == "full":
            return read + sets * r * int(valid.sum())
        whole = valid.shape[1] - valid.shape[1] % self.group
        positions = sets * r * int(valid[:, :whole].sum())
        groups = sets * r * int(valid[:, :whole].unflatten(1, (-1, self.group)).any(-1).sum()) if whole else 0
        rest = sets * r * int(valid[:, whole:].sum())
        return read + -(-positions * INDEX_BITS[self.index] // 16) + 2 * groups + rest


def coded(key: Tensor, group: int, bits: int) -> Tensor:
    """What codes of so many bits keep of K [B, Hkv, S, d], in groups of positions: of the whole ones, widened.

    In each group, KV head and component: lo = min K, step = (max - min) / (2^bits - 1), both in K's dtype, as they are
    stored; code = round((K - lo) / step), half to even, 0 where step is 0; and K becomes lo + step·code. The range is
    that of the finite keys: others are coded as its ends, NaN as lo, so that nobody's padding harms its group.
    """
    largest = 2**bits - 1
    whole = key.shape[2] // group
    keys = widened(key[:, :, : whole * group]).unflatten(2, (whole, group))  # [B, Hkv, groups, group, d]
    finite = keys.isfinite()
    low = keys.masked_fill(~finite, torch.inf).amin(3, keepdim=True)
    high = keys.masked_fill(~finite, -torch.inf).amax(3, keepdim=True)
    some = finite.any(3, keepdim=True)
    low, high = low.masked_fill(~some, 0), high.masked_fill(~some, 0)
    step = widened(((high - low) / largest).to(key.dtype))  # low is one of K's already
    code = ((keys - low) / step.masked_fill(step == 0, 1)).round().clamp(0, largest)
    code = code.nan_to_num(nan=0).masked_fill(step == 0, 0)
    return (low + step * code).flatten(2, 3)
