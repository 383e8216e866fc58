"""Log-likelihoods by decoding: a context is prefilled, what follows it is fed to the model, each token a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparq.lm_eval.prefill import Prefills, feed, left_padded, prefill


@dataclass(frozen=True, slots=True)
class Row:
    """A sequence whose last `scored` tokens are to be scored.

    The first token that is decoded is predicted by the prefill; each of the others by a step that is fed the one
    before it.
    """

    prefilled: Sequence[int]  # at least one
    decoded: Sequence[int]  # at least one
    scored: int  # 1..len(prefilled) + len(decoded) - 1


def score(
    model: Any,
    rows: Sequence[Row],
    pad: int,
    softmax_dtype: torch.dtype | None = None,
    prefills: Prefills | None = None,
    kind: str = "",
) -> list[tuple[float, bool]]:
    """For each row the sum of the log-probabilities of its scored tokens, in nats, and whether each of them was the
    likeliest. `prefills` and `kind` as in `prefill`."""
    ids, mask = left_padded([row.prefilled for row in rows], pad, model.device)
    in_prefill = [max(0, row.scored - len(row.decoded)) for row in rows]
    cache, logits = prefill(model, ids, mask, any(in_prefill), prefills, kind)

    steps = max(len(row.decoded) for row in rows)
    decoded = torch.tensor([list(row.decoded) + [pad] * (steps - len(row.decoded)) for row in rows]).to(ids)
    whole = None if mask.all() else torch.cat([mask, torch.ones_like(decoded)], 1)
    results = [_compare(logits[:, -1:], decoded[:, :1], softmax_dtype)]  # [B, tokens] each
    done = 0
    for found in feed(model, cache, decoded[:, :-1], whole):
        results.append(_compare(found, decoded[:, done + 1 : done + 1 + found.shape[1]], softmax_dtype))
        done += found.shape[1]
    log_probs, greedy = (torch.cat(column, 1).cpu() for column in zip(*results, strict=True))

    scores = []
    for b, row in enumerate(rows):
        scored = slice(max(0, len(row.decoded) - row.scored), len(row.decoded))
        total, right = float(log_probs[b, scored].double().sum()), bool(greedy[b, scored].all())
        if in_prefill[b]:
            before = _compare(logits[b, -1 - in_prefill[b] : -1], ids[b, -in_prefill[b] :], softmax_dtype)
            total, right = total + float(before[0].double().sum()), right and bool(before[1].all())
        scores.append((total, right))
    return scores


def _compare(logits: Tensor, targets: Tensor, softmax_dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """log p of targets [...] under logits [..., vocabulary], and whether each is the likeliest."""
    log_probs = F.log_softmax(logits, dim=-1, dtype=softmax_dtype)
    return log_probs.gather(-1, targets[..., None])[..., 0], log_probs.argmax(-1) == targets
