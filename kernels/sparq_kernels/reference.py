"""One decode step in plain PyTorch: what every kernel is tested against, on any device and dtype.

The five steps are those of SparQ Attention (Ribar et al., arXiv 2312.04985, algorithm 1), with one set of components
and one set of positions for all query heads of a KV head.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .groups import Budget, Cached, Visible
from .layout import GROUP, read_codes

Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # of `operator.DecodeOutput`


def decode_reference(
    query: Tensor,
    cached: Cached,
    visible: Visible,
    budget: Budget,
    *,
    scale: float,
    softcap: float | None,
    mean_from: float,
    return_positions: bool,
) -> Results:
    """Arguments and results as in `operator.decode`; the arguments must have been checked.

    float64 inputs are computed in float64, everything else in float32.  `positions` is [B, Hkv, Q, 0] unless asked for.
    """
    length, start, mask, _ = visible
    if cached.block_table is not None:
        cached = in_a_row(cached, length)
    assert cached.value_sum is not None
    results = []
    for i in range(query.shape[2]):
        later = query.shape[2] - 1 - i  # new tokens that this query does not see
        seen = (length - later).clamp(min=0)
        own_sum = cached.value_sum
        assert own_sum is not None
        if later:
            size = cached.key.shape[2]
            unseen = valid_positions(length, start, mask, size) & ~valid_positions(seen, None, None, size)
            not_summed = cached.value.masked_fill(~unseen[:, None, :, None], 0).sum(2, dtype=own_sum.dtype)
            own_sum = own_sum - not_summed
        results.append(
            _decode_one(
                query[:, :, i : i + 1],
                cached._replace(value_sum=own_sum),
                visible._replace(length=seen),
                budget,
                scale,
                softcap,
                mean_from,
                return_positions,
            )
        )
    output, alpha, positions, lse, read = (torch.cat(parts, 2) for parts in zip(*results, strict=True))
    return output, alpha, positions, lse, read


def _decode_one(
    query: Tensor,
    cache: Cached,
    visible: Visible,
    limits: Budget,
    scale: float,
    softcap: float | None,
    mean_from: float,
    return_positions: bool,
) -> Results:
    """The five steps for one query of each row; the sum of V is over what it sees."""
    key, value, value_sum = cache.key, cache.value, cache.value_sum
    length, start, mask, _ = visible
    r, k_min, mass = limits.r, limits.k_min, limits.mass
    assert value_sum is not None
    batch, num_heads, _, head_dim = query.shape
    num_kv_heads, cached = key.shape[1], key.shape[2]
    compute = torch.float64 if query.dtype == torch.float64 else torch.float32
    q = query.to(compute).reshape(batch, num_kv_heads, -1, head_dim)  # [B, Hkv, G, d]

    valid = valid_positions(length, start, mask, cached)  # [B, S]
    n = valid.sum(-1)  # [B]
    budget, window = budget_and_window(n, limits)
    k_max = max_positions(cached, limits)

    # 1. Components: the r largest of the group's summed magnitudes.
    magnitude = q.abs().sum(2)  # [B, Hkv, d]
    c = magnitude.sort(dim=-1, descending=True, stable=True).indices[..., :r]  # [B, Hkv, r]
    q_c = q.gather(-1, c[:, :, None].expand(-1, -1, q.shape[2], -1))  # [B, Hkv, G, r]

    # 2. Approximate scores, with the temperature that makes up for the components left out.
    k_c = indexed(cache, c, length).to(compute)  # [B, Hkv, r, S]
    tau = (q_c.abs().sum(-1, keepdim=True) / q.abs().sum(-1, keepdim=True)).sqrt()
    tau = torch.where(tau > 0, tau, 1.0)  # an all-zero query divides 0 by 0
    approximate = soften(q_c @ k_c * (scale / tau), softcap)  # [B, Hkv, G, S]
    s_hat = masked_softmax(approximate, valid[:, None, None])

    # 3. Positions: the best by the group's summed scores, the newest `window` valid ones forced in.
    newest_first = valid.flip(-1).cumsum(-1).flip(-1)  # [B, S]: 1 at the last valid position, 2 at the one before, ...
    forced = valid & (newest_first <= window[:, None])
    score = s_hat.sum(2).nan_to_num(nan=0.0)  # [B, Hkv, S]
    score = score.masked_fill(forced[:, None], torch.inf).masked_fill(~valid[:, None], -torch.inf)
    ranked = score.sort(dim=-1, descending=True, stable=True).indices[..., :k_max]  # [B, Hkv, k_max]
    budget = budget[:, None].expand(-1, num_kv_heads)  # [B, Hkv]
    if mass is not None:
        share = s_hat.sum(2).nan_to_num(nan=0.0).gather(-1, ranked) / s_hat.shape[2]
        wanted = (share.cumsum(-1) < mass).sum(-1) + 1
        least = torch.maximum(n.clamp(max=k_min), window)
        least = torch.where(n < limits.dense_below, n, least)[:, None]
        budget = torch.minimum(torch.maximum(wanted, least), budget)
    chosen = torch.arange(k_max, device=q.device) < budget[..., None]  # [B, Hkv, k_max]
    p = ranked.masked_fill(~chosen, cached).sort(-1).values  # ascending, unused slots last
    p_safe = p.clamp(max=cached - 1)

    # 4. Attention over the chosen positions.  Rows of unused slots may be uninitialised: they become 0 first.
    def rows(of: Tensor) -> Tensor:
        gathered = of.gather(2, p_safe[..., None].expand(-1, -1, -1, head_dim)).to(compute)
        return gathered.masked_fill(~chosen[..., None], 0.0)  # [B, Hkv, k_max, d]

    logits = soften(q @ rows(key).transpose(-1, -2) * scale, softcap)  # [B, Hkv, G, k_max]
    y = masked_softmax(logits, chosen[:, :, None]) @ rows(value)  # [B, Hkv, G, d]
    lse = logits.masked_fill(~chosen[:, :, None], -torch.inf).logsumexp(-1)  # [B, Hkv, G]

    # 5. Blend with the mean value by the score mass that was not attended, unless that is too much.
    picked = s_hat.gather(-1, p_safe[:, :, None].expand(-1, -1, q.shape[2], -1)).masked_fill(~chosen[:, :, None], 0.0)
    everything = (budget >= n[:, None])[..., None]  # [B, Hkv, 1]
    alpha = torch.where(everything, 1.0, picked.sum(-1))  # [B, Hkv, G]
    output = y
    if mean_from < math.inf:
        mean = (value_sum.to(compute) / n.clamp(min=1)[:, None, None])[:, :, None]  # [B, Hkv, 1, d]
        blended = alpha[..., None] * y + (1 - alpha[..., None]) * mean
        output = torch.where((everything | (alpha < mean_from))[..., None], y, blended)

    positions = (
        p.masked_fill(p == cached, -1)[:, :, None] if return_positions else p.new_empty(batch, num_kv_heads, 1, 0)
    )
    return (
        output.reshape(batch, num_heads, 1, head_dim).to(query.dtype),
        alpha.reshape(batch, num_heads, 1).float(),
        positions,
        lse.reshape(batch, num_heads, 1).float(),
        budget[..., None].to(torch.int32),
    )


def indexed(cache: Cached, c: Tensor, length: Tensor) -> Tensor:
    """What the index has for the components c [B, Hkv, r] of every position: [B, Hkv, r, S].

    Codes are of whole groups; what a query sees of its last group is K itself.
    """
    key, blocks, ranges = cache.key, cache.key_components, cache.key_ranges
    size = key.shape[2]
    if ranges is None:
        blocks = blocks[:, :, : -(-size // blocks.shape[4])]
        found = blocks.gather(3, c[:, :, None, :, None].expand(-1, -1, blocks.shape[2], -1, blocks.shape[4]))
        return found.transpose(2, 3).flatten(3)[..., :size]
    own = key.transpose(2, 3).gather(2, c[..., None].expand(-1, -1, -1, size))
    groups = size // GROUP
    if not groups:
        return own
    coded = read_codes(blocks, ranges, groups)
    coded = coded.gather(2, c[..., None].expand(-1, -1, -1, coded.shape[3]))
    whole = length // GROUP * GROUP
    is_coded = torch.arange(groups * GROUP, device=key.device) < whole[:, None]  # [B, groups * GROUP]
    front = torch.where(is_coded[:, None, None], coded, own[..., : groups * GROUP].to(coded.dtype))
    return torch.cat([front, own[..., groups * GROUP :].to(coded.dtype)], -1)


def in_a_row(cached: Cached, length: Tensor) -> Cached:
    """The same cache without a block table, its pages copied one behind the other; value_sum is over length."""
    assert cached.block_table is not None and cached.value_sum is not None
    size, pages = cached.key.shape[2], cached.block_table.shape[1]
    page = torch.arange(pages, device=length.device)
    table = cached.block_table.masked_fill(page * size >= length[:, None], 0).long()  # what is behind may be anything

    def join(stored: Tensor) -> Tensor:
        return stored[table].transpose(1, 2).flatten(2, 3)  # [B, Hkv, pages * ..., ...]

    value, ranges = join(cached.value), cached.key_ranges
    compute = cached.value_sum.dtype
    whole = (page < length[:, None] // size)[:, :, None, None]
    sums = cached.value_sum[table].masked_fill(~whole, 0).sum(1)
    s = torch.arange(pages * size, device=length.device)
    last = (s < length[:, None]) & (s >= length[:, None] // size * size)  # what is seen of a page that is not full
    sums = sums + value.masked_fill(~last[:, None, :, None], 0).sum(2, dtype=compute)
    ranges = None if ranges is None else join(ranges)
    return Cached(join(cached.key), join(cached.key_components), value, sums, ranges)


def max_positions(cached: int, limits: Budget) -> int:
    """The largest budget that a row can have, known from the shapes alone (they may be symbolic)."""
    k, k_divisor = torch.sym_max(limits.k, limits.dense_below - 1), limits.k_divisor
    return torch.sym_min(cached, k if k_divisor is None else torch.sym_max(k, cached // k_divisor))


def valid_positions(length: Tensor, start: Tensor | None, mask: Tensor | None, cached: int) -> Tensor:
    """bool [B, S]: start <= s < length, and allowed by the mask."""
    s = torch.arange(cached, device=length.device)
    valid = s < length[:, None]
    if start is not None:
        valid = valid & (s >= start[:, None])
    return valid if mask is None else valid & mask


def budget_and_window(n: Tensor, limits: Budget) -> tuple[Tensor, Tensor]:
    """How many of n valid positions are attended, and how many of these are the newest ones; in n's shape."""
    k, k_divisor, local = limits.k, limits.k_divisor, limits.local
    budget = n.clamp(max=k) if k_divisor is None else torch.minimum(n, (n // k_divisor).clamp(min=k))
    budget = torch.where(n < limits.dense_below, n, budget)
    return budget, budget // 4 if local is None else budget.clamp(max=local)


def soften(logits: Tensor, softcap: float | None) -> Tensor:
    """Gemma 2's cap on logits: softcap * tanh(logits / softcap)."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def masked_softmax(logits: Tensor, allowed: Tensor) -> Tensor:
    """Softmax over the last axis; 0 where not allowed, and everywhere in a row that allows nothing."""
    weights = torch.softmax(logits.masked_fill(~allowed, -torch.inf), dim=-1)
    return weights.masked_fill(~allowed, 0.0)
