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
        output: [B, Hq, Q, d]; alpha: [B, Hq, Q], the approximate score mass of the positions read.
        lse: [B, Hq, Q] float32, the logarithm of the sum of exp(logit) over the positions read.
        sinks: [Hq], one logit for each query head.
    """
    mass = alpha.clamp(min=torch.finfo(alpha.dtype).tiny)  # where α underflows the sink has next to nothing, not NaN
    share = torch.sigmoid(lse - mass.log() - sinks.to(lse.dtype)[:, None])
    return (output * share[..., None]).to(output.dtype)
