"""SparQ Attention written out from its definition (arXiv 2312.04985), one row and one head at a time, from the full K
and V of an ordinary cache. It shares no code with the package: it is what the package is compared with."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask


def slow_head(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    r: int,
    k: int,
    local: int,
    scale: float,
    softcap: float | None,
    mean_value: bool | float,
    sinks: Tensor | None = None,
    temperature: bool = True,
    index_keys: Tensor | None = None,
    mass: float | None = None,
    k_min: int = 1,
) -> tuple[Tensor, Tensor, list[int]]:
    """One KV head over its valid positions: q [G, d], keys and values [n, d], sinks [G], float64.

    temperature: whether the scores are softened for the components that they lack, as the paper has it.
    index_keys: what the scores are made of, where that is not the keys.
    mass: of the scores summed over the group, at which to stop, with k_min positions at the least.
    Returns the output [G, d], α [G] and the positions read.
    """
    n, head_dim = keys.shape
    magnitude = [sum(abs(float(q[g, i])) for g in range(q.shape[0])) for i in range(head_dim)]
    c = sorted(range(head_dim), key=lambda i: (-magnitude[i], i))[:r]

    scores, indexed = [], keys if index_keys is None else index_keys
    for row in q:
        total = float(row.abs().sum())
        tau = math.sqrt(float(row[c].abs().sum()) / total) if temperature and total else 1.0
        scores.append(torch.softmax(cap(indexed[:, c] @ row[c] * scale / tau, softcap), dim=0))
    s_hat = torch.stack(scores)  # [G, n]

    forced = set(range(n - min(local, n), n))
    summed = s_hat.sum(0).tolist()
    best = sorted((s for s in range(n) if s not in forced), key=lambda s: (-summed[s], s))
    taken = k - len(forced)
    if mass is not None:
        held, taken = sum(summed[s] for s in forced), 0
        while taken < k - len(forced) and (held < mass * len(q) or len(forced) + taken < k_min):
            held, taken = held + summed[best[taken]], taken + 1
    p = sorted(forced | set(best[:taken]))

    y = torch.stack([torch.softmax(cap(keys[p] @ row * scale, softcap), dim=0) @ values[p] for row in q])
    alpha = s_hat[:, p].sum(1)
    output = y.clone()
    for g, mass in enumerate(alpha.tolist()):
        if mean_value is True or (mean_value is not False and mass >= mean_value):
            output[g] = mass * y[g] + (1 - mass) * values.mean(0)
    if sinks is not None:
        # The positions read are the share α of the softmax without a sink; the sink joins its denominator.
        read = torch.stack([cap(keys[p] @ row * scale, softcap).exp().sum() for row in q])
        denominator = read / alpha
        output = output * (denominator / (denominator + sinks.exp()))[:, None]
    return output, alpha, p


def cap(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def coded(keys: Tensor, group: int = 256) -> Tensor:
    """Keys [n, d] as the four-bit index has them: each whole group of positions on sixteen levels a component."""
    result = keys.clone()
    for begin in range(0, len(keys) // group * group, group):
        for c in range(keys.shape[1]):
            run = keys[begin : begin + group, c].tolist()
            low, step = min(run), (max(run) - min(run)) / 15
            for s, x in enumerate(run):
                result[begin + s, c] = low + step * (round((x - low) / step) if step else 0)
    return result


class Slow:
    """Knobs as in `SparqConfig`; decodes every layer that sees the whole context sparsely.

    several: whether up to 16 new tokens on a filled cache are decode steps; in `generate` they are a prompt.
    """

    def __init__(
        self,
        *,
        r: int,
        k: int | None = None,
        ratio: float = 8,
        local: int | None = None,
        mean_value: bool | float = 0.5,
        dense_layers: int = 0,
        several: bool = True,
        index: str = "full",
        mass: float | None = None,
        k_min: int = 64,
    ) -> None:
        self.index, self.mass, self.k_min = index, mass, k_min
        self.several = several
        self.r, self.k, self.ratio, self.local = r, k, ratio, local
        self.mean_value, self.dense_layers = mean_value, dense_layers
        self.alphas: dict[int, list[float]] = {}  # by layer
        self.read: dict[int, int] = {}  # positions read by layer, over rows and steps
        self.cached: dict[int, int] = {}  # valid positions by layer

    def install(self, model: PreTrainedModel) -> PreTrainedModel:
        AttentionInterface.register("slow", self)
        AttentionMaskInterface.register("slow", lambda **kwargs: sdpa_mask(**kwargs | {"allow_is_causal_skip": False}))
        model.set_attn_implementation("slow")
        return model

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor,
        scaling: float | None = None,
        softcap: float | None = None,
        sliding_window: int | None = None,
        s_aux: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        batch, heads, queries, head_dim = query.shape
        kv_heads, layer = key.shape[1], module.layer_idx
        group = heads // kv_heads
        scale = head_dim**-0.5 if scaling is None else scaling
        types = getattr(module.config, "layer_types", None)
        windowed = sliding_window is not None or (types is not None and types[layer] != "full_attention")
        prompt = queries > 1 and attention_mask[:, 0, 0].sum(-1).max() <= 1  # its first token sees itself alone
        prompt = prompt or queries > (16 if self.several else 1)
        dense = prompt or windowed or layer < self.dense_layers
        output = torch.zeros(batch, queries, heads, head_dim, dtype=torch.float64)
        for b in range(batch):
            for h in range(kv_heads):
                mine = slice(h * group, (h + 1) * group)
                q, keys, values = query[b, mine].double(), key[b, h].double(), value[b, h].double()
                sinks = None if s_aux is None else s_aux[mine].double()
                if dense:
                    logits = cap(q @ keys.T * scale, softcap).masked_fill(~attention_mask[b, 0], -torch.inf)
                    if sinks is not None:  # a last position that holds nothing
                        logits = torch.cat([logits, sinks[:, None, None].expand(-1, queries, 1)], dim=-1)
                        keys, values = (torch.cat([x, torch.zeros_like(x[:1])]) for x in (keys, values))
                    # a row of padding sees nothing; what it gives is never read
                    output[b, :, mine] = torch.softmax(logits, -1).nan_to_num().matmul(values).transpose(0, 1)
                    continue
                for i in range(queries):
                    valid = attention_mask[b, 0, i].nonzero()[:, 0]
                    n = len(valid)
                    k = max(128, math.floor(n / (2 * self.ratio))) if self.k is None else self.k
                    k = min(k, n)
                    local = k // 4 if self.mass is None else self.k_min // 4
                    seen = int(valid[-1]) + 1 if n else 0
                    output[b, i, mine], alpha, p = slow_head(
                        q[:, i],
                        keys[valid],
                        values[valid],
                        r=self.r,
                        k=k,
                        local=local if self.local is None else min(self.local, k),
                        scale=scale,
                        softcap=softcap,
                        mean_value=self.mean_value,
                        sinks=sinks,
                        index_keys=coded(keys[:seen])[valid] if self.index == "int4" else None,
                        mass=self.mass,
                        k_min=self.k_min,
                    )
                    self.alphas.setdefault(layer, []).extend(alpha.tolist())
                    if h == 0:
                        self.read[layer] = self.read.get(layer, 0) + len(p)
                        self.cached[layer] = self.cached.get(layer, 0) + n
        return output.to(query.dtype), None
