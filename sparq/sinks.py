"""Attention sinks: a learned logit for each query head that takes a share of the softmax and gives nothing for it
(gpt-oss)."""

from __future__ import annotations

import torch
from torch import Tensor


def attenuate(output: Tensor, alpha: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """What is left of a sparse step's `output` beside the sinks.

    A sink adds exp(s_h) to the denominator Z of head h's softmax, so the output shrinks by Z / (Z + exp(s_h)). The
    positions read have exp(lse) of Z, and by the approximate scores that is the share α: Z is taken as exp(lse) / α.
    Where k covers the context α is 1, and Z exact.

    Args:
        output: [B, Hq, 1, d]; alpha: [B, Hq, 1], the approximate score mass of the positions read.
        lse: [B, Hq, 1] float32, the logarithm of the sum of exp(logit) over the positions read.
        sinks: [Hq], one logit for each query head.
    """
    mass = alpha.clamp(min=torch.finfo(alpha.dtype).tiny)  # where α underflows the sink has next to nothing, not NaN
    share = torch.sigmoid(lse - mass.log() - sinks.to(lse.dtype)[:, None])
    return (output * share[..., None]).to(output.dtype)


def lse_of_positions(
    query: Tensor, key: Tensor, positions: Tensor, scale: float | None, softcap: float | None
) -> Tensor:
    """[B, Hq, 1]: the logarithm of the sum of exp(logit) over `positions` [B, Hkv, 1, k], unused ones -1."""
    batch, heads, _, head_dim = query.shape
    chosen = positions[:, :, 0]  # [B, Hkv, k]
    rows = key.gather(2, chosen.clamp(min=0)[..., None].expand(-1, -1, -1, head_dim)).float()
    logits = query.reshape(batch, key.shape[1], -1, head_dim).float() @ rows.transpose(-1, -2)
    logits = logits * (head_dim**-0.5 if scale is None else scale)  # [B, Hkv, G, k]
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(chosen[:, :, None] < 0, -torch.inf)
    return logits.logsumexp(-1).reshape(batch, heads, 1)
