"""What all methods have in common: a budget, a choice of positions, and exact attention over these."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from sparq_kernels.reference import masked_softmax
from torch import Tensor

from sparq.config import _check_int

LOGITS_AT_ONCE = 1 << 19  # elements


class Attended(NamedTuple):
    """One decode step of one layer."""

    output: Tensor  # [B, Hkv, G, d], in the query's dtype
    kept: Tensor  # bool [B, Hkv, 1, S], one set of positions for the GQA group, or [B, Hkv, G, S]: one for each head
    mass: Tensor  # [B, Hkv, G]: share of the exact attention that the kept positions have
    elements: int  # read of K, V and what the method keeps beside them, summed over rows and KV heads


@dataclass(frozen=True, kw_only=True, slots=True)
class Method(ABC):
    """A rule for the positions that a decode step attends to.

    Args:
        k: positions attended, the current one included, at least 1. None: as many as `ratio` allows.
        ratio: the compression wanted of the bytes read; fills in `k`, which then grows with the context, where it is
            None. No floor: a short context may leave one position.
        dense_layers: the first layers of the model that stay dense.

    Raises:
        TypeError, ValueError: naming the knob, its value and what would be right.
    """

    k: int | None = None
    ratio: float = 8
    dense_layers: int = 0

    observes: ClassVar[bool] = False  # whether it has to see the prompt's attention, too

    def __post_init__(self) -> None:
        _check_int("k", self.k, 1, True)
        _check_int("dense_layers", self.dense_layers, 0, False)
        if isinstance(self.ratio, bool) or not isinstance(self.ratio, (int, float)):
            raise TypeError(f"ratio must be a number, got {self.ratio!r} of type {type(self.ratio).__name__}")
        if not (math.isfinite(self.ratio) and self.ratio >= 1):
            raise ValueError(f"ratio must be a finite number of at least 1, got {self.ratio!r}")

    def positions(self, valid: int, head_dim: int) -> int:
        """How many of a row's `valid` cached positions are attended, at the most."""
        wanted = int(valid / self.ratio) if self.k is None else self.k
        return min(valid, max(1, wanted))

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, valid: Tensor, scale: float, state: Any = None
    ) -> Attended:
        """One decode step.

        Args:
            query: [B, Hkv, G, d], the newest token's, by KV head.
            key, value: [B, Hkv, S, d], the newest token included.
            valid: bool [B, S], False for padding.
            scale: what logits are multiplied with.
            state: of a method that `observes`: what it knows of this layer's past; brought up to date.

        float64 is computed in float64, everything else in float32.
        """
        q, keys = widened(query), widened(key)
        logits = q @ keys.transpose(-1, -2) * scale  # [B, Hkv, G, S]
        kept = self._select(q, keys, logits, valid, scale, state)
        output = masked_softmax(logits, kept) @ finite_padding(value, valid)
        mass = exact_mass(logits, kept, valid)
        return Attended(output.to(query.dtype), kept, mass, self._elements(kept, valid, query))

    def attend_each(
        self, query: Tensor, key: Tensor, value: Tensor, valid: Tensor, scale: float, state: Any = None
    ) -> Iterator[Attended]:
        """As `attend` for the newest Q tokens, one step each: query [B, Hkv, G, Q, d], valid [B, Q, S].

        The steps are computed together, so many at a time that their logits stay in a processor cache. A step's
        positions may be those that it can see alone, or all.
        """
        if query.shape[3] == 1:
            yield from self.attend_one_by_one(query, key, value, valid, scale, state)
            return
        q, keys = widened(query), widened(key)
        values = finite_padding(value, valid[:, -1])
        batch, queries = query.shape[0], query.shape[3]
        at_once = steps_at_once(query, key)
        for begin in range(0, queries, at_once):
            some = q[:, :, :, begin : begin + at_once]
            count = some.shape[3]
            allowed = valid[:, begin : begin + count].flatten(0, 1)  # [B·Q, S]
            by_step = steps_first(products(some, keys) * scale)  # [B·Q, Hkv, G, S]
            kept = self._select(steps_first(some), keys, by_step, allowed, scale, state)
            weights = masked_softmax(by_step, kept).unflatten(0, (batch, count)).permute(0, 2, 3, 1, 4)
            outputs = products(weights, values.transpose(-1, -2)).to(query.dtype)
            masses = exact_mass(by_step, kept, allowed).unflatten(0, (batch, count))
            for i in range(count):
                chosen = kept.unflatten(0, (batch, count))[:, i]
                elements = self._elements(chosen, valid[:, begin + i], query[:, :, :, begin + i])
                yield Attended(outputs[:, :, :, i], chosen, masses[:, i], elements)

    def attend_one_by_one(
        self, query: Tensor, key: Tensor, value: Tensor, valid: Tensor, scale: float, state: Any = None
    ) -> Iterator[Attended]:
        """`attend_each` for a method with an `attend` of its own."""
        queries, length = query.shape[3], key.shape[2]
        for i in range(queries):
            seen = length - queries + 1 + i
            yield self.attend(query[:, :, :, i], key[:, :, :seen], value[:, :, :seen], valid[:, i, :seen], scale, state)

    def observe(self, query: Tensor, key: Tensor, mask: Tensor | None, scale: float, state: Any) -> None:
        """Take note of the attention of tokens that are computed densely; of a method that `observes`.

        Args:
            query: [B, Hkv, G, Q, d], the newest tokens'; key: [B, Hkv, S, d], these tokens included.
            mask: bool [B, Q, S], what each query sees; one that does not see itself is padding. None: everything
                before it and itself.
            state: as of `attend`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no use for the attention of a prompt")

    @abstractmethod
    def _select(self, query: Tensor, key: Tensor, logits: Tensor, valid: Tensor, scale: float, state: Any) -> Tensor:
        """The positions to attend to, bool [B, Hkv, 1 or G, S]; arguments as in `attend`, widened, and the exact
        logits [B, Hkv, G, S]. Of several steps at once (`attend_each`) `key` has one row for as many of the others,
        whose valid positions are the first of those of the last of them."""

    def _elements(self, kept: Tensor, valid: Tensor, query: Tensor) -> int:
        """Elements read: here K and V of the kept positions."""
        return 2 * query.shape[-1] * int(kept.sum())

    def _budget(self, valid: Tensor, head_dim: int) -> Tensor:
        """`positions` of each row, int64 [B]."""
        counts = [self.positions(n, head_dim) for n in valid.sum(-1).tolist()]
        return torch.tensor(counts, device=valid.device)


def steps_at_once(query: Tensor, key: Tensor) -> int:
    """Of how many steps [B, Hkv, G, Q, d] the logits stay in a processor cache."""
    return max(1, LOGITS_AT_ONCE // (query[:, :, :, 0, 0].numel() * key.shape[2]))


def steps_first(tensor: Tensor) -> Tensor:
    """[B, Hkv, G, Q, n] as [B·Q, Hkv, G, n]."""
    return tensor.permute(0, 3, 1, 2, 4).flatten(0, 1)


def products(vectors: Tensor, rows: Tensor) -> Tensor:
    """Each of [B, Hkv, G, Q, n] with each row of its KV head [B, Hkv, N, n]: [B, Hkv, G, Q, N]."""
    return (vectors.flatten(2, 3) @ rows.transpose(-1, -2)).unflatten(2, vectors.shape[2:4])


def best(score: Tensor, allowed: Tensor, budget: Tensor, forced: Tensor | None = None) -> Tensor:
    """The `budget` allowed positions with the largest scores, the `forced` before all others; ties to the lower index.

    score: [B, Hkv, sets, N]; allowed, forced: bool, broadcastable to it; budget: [B]. Returns bool like score.
    """
    if forced is not None:
        score = score.masked_fill(forced, torch.inf)
    score = score.masked_fill(~allowed, -torch.inf)
    wanted = budget[:, None, None, None]
    largest = score.topk(int(budget.max()), dim=-1).values
    least = largest.gather(-1, (wanted - 1).clamp(min=0).expand(*score.shape[:-1], 1))  # the last that is wanted
    above, level = score > least, score == least
    room = wanted - above.sum(-1, keepdim=True)
    return (above | (level & (level.cumsum(-1) <= room))) & allowed & (wanted > 0)


def by_mass(
    share: Tensor, allowed: Tensor, mass: float, least: Tensor, most: Tensor, forced: Tensor | None = None
) -> Tensor:
    """The fewest allowed positions whose shares sum to `mass`, the `forced` first, then the largest shares, ties to the
    lower index; `least` of them at the least, `most` at the most.

    share: [B, Hkv, sets, N], sums to 1; allowed, forced: bool, broadcastable to it; least, most: [B], at most as many
    as are allowed. Returns bool like share.
    """
    share = share.masked_fill(~allowed, 0)
    first = share if forced is None else share.masked_fill(forced, torch.inf)
    order = first.masked_fill(~allowed, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
    # In float64, so that it does not matter that thousands are summed.
    reached = share.double().gather(-1, order).cumsum(-1)
    count = (reached < mass).sum(-1, keepdim=True) + 1  # [B, Hkv, sets, 1]
    count = torch.minimum(torch.maximum(count, least[:, None, None, None]), most[:, None, None, None])
    chosen = torch.arange(share.shape[-1], device=share.device) < count
    return torch.zeros_like(chosen).scatter(-1, order, chosen) & allowed


def check_mass(mass: object) -> None:
    """Raise unless it is None or a budget by attention mass."""
    if mass is None:
        return
    if isinstance(mass, bool) or not isinstance(mass, (int, float)):
        raise TypeError(f"mass must be a number or None, got {mass!r} of type {type(mass).__name__}")
    if not 0 < mass < 1:
        raise ValueError(f"mass must be larger than 0 and smaller than 1, or None, got {mass!r}")


def newest(valid: Tensor, count: Tensor) -> Tensor:
    """The last `count` [B] valid positions of each row: bool [B, S] for valid [B, S]."""
    newest_first = valid.flip(-1).cumsum(-1).flip(-1)  # 1 at the last valid position, 2 at the one before, ...
    return valid & (newest_first <= count[:, None])


def finite_padding(values: Tensor, valid: Tensor) -> Tensor:
    """Widened [B, Hkv, S, d] that weights of 0 at invalid positions do away with: padding may hold NaN."""
    values = widened(values)
    if values.transpose(1, 2)[~valid].isfinite().all():  # so it is most often, and the rest need not be copied
        return values
    return values.masked_fill(~valid[:, None, :, None], 0)


def widened(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def exact_mass(logits: Tensor, kept: Tensor, valid: Tensor) -> Tensor:
    return masked_softmax(logits, valid[:, None, None]).masked_fill(~kept, 0).sum(-1)
