"""Which tokens of vLLM's batch are decoded sparsely, and what the operator is told of them; for both devices."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from sparq.vllm.report import TOTALS


@dataclass
class Decodes:
    """The first tokens of a batch: those that are no part of a prompt. Each is a row of the operator's: it sees itself
    and what is before it, so that the tokens of a draft are rows with the same pages."""

    block_table: Tensor  # int32 [tokens, pages]
    length: Tensor  # int64 [tokens]
    counted: dict[Any, Any] = field(default_factory=dict)  # of `report.Totals`, for all layers

    @property
    def count(self) -> int:
        return len(self.length)


class DecodesFirst:
    """For a builder of vLLM's: splits batches. vLLM puts decodes before prompts where a builder asks for it."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)  # type: ignore[call-arg]
        self.is_ours = kv_cache_spec.state_content_bytes is not None
        parallel = vllm_config.parallel_config
        TOTALS.process = parallel.data_parallel_index, parallel.rank
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)  # type: ignore[attr-defined]
        # Outlives a step: where a step is a CUDA graph, it goes on reading what it has read first.
        most = vllm_config.scheduler_config.max_num_batched_tokens + vllm_config.scheduler_config.max_num_seqs
        self._length = torch.zeros(most, dtype=torch.int64, device=device)

    def begin(self, common: Any) -> tuple[Decodes | None, Any | None]:
        """`split`, once for each step of the engine: counted, and now and then told to the log."""
        from vllm import envs

        decodes, rest = self.split(common)
        TOTALS.log(envs.VLLM_LOG_STATS_INTERVAL)  # of whole steps: the layers of this one are still to be counted
        TOTALS.step(0 if decodes is None else decodes.count, common.num_actual_tokens)
        return decodes, rest

    def split(self, common: Any) -> tuple[Decodes | None, Any | None]:
        """The tokens that are decoded, and the batch of what is behind them, if anything is.

        Tokens of a prompt stay dense however the prompt is cut, so that a result depends neither on chunks nor on what
        was cached before. common: vLLM's CommonAttentionMetadata.
        """
        from vllm.v1.attention.backends.utils import split_decodes_and_prefills

        if not self.is_ours or common.causal is not True:
            return None, common
        requests, _, tokens, _ = split_decodes_and_prefills(
            common,
            self.reorder_batch_threshold or 1,  # type: ignore[attr-defined]
            # In the trial runs of an engine nobody says what is a prompt.
            treat_short_extends_as_decodes=common.is_prefilling is None,
        )
        if not tokens:
            return None, common
        decodes = self._decodes(common, requests, tokens)
        return decodes, _behind(common, requests, tokens) if requests < common.num_reqs else None

    def _decodes(self, common: Any, requests: int, tokens: int) -> Decodes:
        starts = common.query_start_loc_cpu[: requests + 1].long()
        table = common.block_table_tensor[:requests]
        pages = -(-common.max_seq_len // self.kv_cache_spec.block_size)  # type: ignore[attr-defined]
        table, length = table[:, :pages], self._length[:tokens]
        if tokens == requests:
            length.copy_(common.seq_lens[:requests])
            return Decodes(table, length)
        row = torch.repeat_interleave(torch.arange(requests), starts[1:] - starts[:-1])
        behind = starts[1:][row] - 1 - torch.arange(tokens)  # tokens of the same draft that this one does not see
        row, behind = (x.to(length.device, non_blocking=True) for x in (row, behind))
        length.copy_(common.seq_lens[:requests][row] - behind)
        return Decodes(table[row], length)


def _behind(common: Any, requests: int, tokens: int) -> Any:
    """The batch without its first requests, which have so many tokens."""
    return replace(
        common,
        query_start_loc=common.query_start_loc[requests:] - tokens,
        query_start_loc_cpu=common.query_start_loc_cpu[requests:] - tokens,
        seq_lens=common.seq_lens[requests:],
        num_reqs=common.num_reqs - requests,
        num_actual_tokens=common.num_actual_tokens - tokens,
        block_table_tensor=common.block_table_tensor[requests:],
        slot_mapping=common.slot_mapping[tokens:],
        **{
            name: None if getattr(common, name) is None else getattr(common, name)[requests:]
            for name in ("is_prefilling", "seq_lens_cpu_upper_bound")
        },
    )
