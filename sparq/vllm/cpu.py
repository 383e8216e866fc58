"""The backend for CPUs. Prompts are computed by vLLM's own kernel, on pages of their own: a page here holds rows of K,
which vLLM's kernel packs otherwise, and differently for every kind of processor. What a prompt copies for that is
little beside what it computes."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from sparq.vllm.batch import Decodes, DecodesFirst
from sparq.vllm.decoding import SparqDecoding, current_index, page_sizes, reasons_against, with_index

PROMPT_PAGE = 128  # positions of a page of vLLM's own, for prompts


class SparqCPUBackend(CPUAttentionBackend):
    supported_kv_cache_dtypes = ["auto", "float16", "bfloat16"]  # noqa: RUF012

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        return list(page_sizes(current_index()))

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        from sparq_vllm import CPU_PAGE

        return CPU_PAGE

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return attn_type == "decoder"

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return False

    @classmethod
    def supports_non_causal(cls) -> bool:
        return False

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        return SparqCPUImpl

    @staticmethod
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        return SparqCPUMetadataBuilder

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        return with_index(spec, interleaved=False)

    @classmethod
    def check(cls, selected: Any) -> None:
        """Refuse what cannot be served: vLLM's platform for CPUs asks nobody.

        Raises:
            ValueError: with the reasons.
        """
        reasons = reasons_against(selected)
        if not cls.supports_head_size(selected.head_size):
            reasons.append(
                f"heads of {selected.head_size} (vLLM's kernel for prompts knows {cls.get_supported_head_sizes()})"
            )
        if reasons:
            raise ValueError(f"SparQ does not serve {', '.join(reasons)}; leave out --attention-backend CUSTOM")


@dataclass
class DenseTokens:
    """Tokens for vLLM's kernel, and where what they see is copied from and to."""

    metadata: CPUAttentionMetadata  # of the pages that are copied to
    page: Tensor  # int64 [positions], of ours
    offset: Tensor
    slots: Tensor  # int64 [positions], in the pages that are copied to
    pages: int
    copied: Tensor | None = None  # room for one layer after the other

    def room(self, like: Tensor, head_dim: int) -> Tensor:
        if self.copied is None:
            heads = like.shape[1]
            self.copied = torch.zeros(self.pages, heads, PROMPT_PAGE, 2 * head_dim, dtype=like.dtype)
        return self.copied


@dataclass
class SparqCPUMetadata(CPUAttentionMetadata):
    """Of a batch. What vLLM's class has is of all of it, but for what its kernel needs."""

    decodes: Decodes | None = None
    rest: DenseTokens | None = None  # behind the decodes
    whole: DenseTokens | None = None  # all tokens, for layers that stay dense


class SparqCPUMetadataBuilder(DecodesFirst, CPUAttentionMetadataBuilder):
    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> CPUAttentionMetadata:
        common = common_attn_metadata
        if not self.is_ours:
            return super().build(common_prefix_len, common, fast_build)
        decodes, rest = self.begin(common)
        metadata = SparqCPUMetadata(
            num_actual_tokens=common.num_actual_tokens,
            max_query_len=common.max_query_len,
            query_start_loc=common.query_start_loc,
            max_seq_len=common.max_seq_len,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            slot_mapping=common.slot_mapping,
            scheduler_metadata=None,
            causal=common.causal,
            decodes=decodes,
        )
        if rest is not None:
            metadata.rest = self._dense(rest)
        if decodes is not None and self._some_stay_dense:
            metadata.whole = self._dense(common)
        return metadata

    @functools.cached_property
    def _some_stay_dense(self) -> bool:
        from vllm.config import get_layers_from_vllm_config
        from vllm.model_executor.layers.attention import Attention

        layers = get_layers_from_vllm_config(self.vllm_config, Attention, self.layer_names)
        return any(layer.impl.stays_dense(layer) for layer in layers.values())

    def _dense(self, common: Any) -> DenseTokens:
        lengths = common.seq_lens.long()
        needed = (lengths + PROMPT_PAGE - 1) // PROMPT_PAGE
        first = needed.cumsum(0) - needed  # page of each request
        table = first[:, None] + torch.arange(int(needed.max()))
        metadata = super().build(0, replace(common, block_table_tensor=table.int()), False)
        row = torch.repeat_interleave(lengths)
        begin = lengths.cumsum(0) - lengths
        position = torch.arange(len(row)) - begin[row]
        size = self.block_size
        page = common.block_table_tensor.long()[row, position // size]
        slots = first[row] * PROMPT_PAGE + position
        return DenseTokens(metadata, page, position % size, slots, int(needed.sum()))


class SparqCPUImpl(SparqDecoding, CPUAttentionBackendImpl):
    device, interleaved = "cpu", False

    def dense_inputs(self, layer: Any, dense: DenseTokens, kv_cache: Tensor) -> tuple[Tensor, CPUAttentionMetadata]:
        return self._copy(layer, dense, kv_cache), dense.metadata

    def _copy(self, layer: Any, dense: DenseTokens, kv_cache: Tensor) -> Tensor:
        """What the tokens see, in pages as vLLM's kernel reads them [pages, Hkv, N, 2 d]."""
        pages, copied = self.pages(kv_cache), dense.room(kv_cache, self.head_size)
        keys, values = (x[dense.page, :, dense.offset] for x in (pages.key, pages.value))  # [positions, Hkv, d]
        halves = copied.view(*copied.shape[:2], 2 * PROMPT_PAGE, self.head_size).chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(keys, values, *halves, dense.slots, layer.isa)
        return copied
