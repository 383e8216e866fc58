"""The backend for NVIDIA GPUs, over vLLM's FlashAttention, whose rows of K and V are what SparQ reads.

Its interfaces, shapes and kernels are tested without a GPU; it has not run on one yet (docs/vllm.md).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

from torch import Tensor
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadata,
    FlashAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import KVCacheLayout

from sparq.vllm.batch import Decodes, DecodesFirst
from sparq.vllm.decoding import SparqDecoding, current_index, page_sizes, with_index

GPU_PAGE = 256  # positions; vLLM's default of 16 would be runs of 16 bytes of the index


class SparqGPUBackend(FlashAttentionBackend):
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "float16", "bfloat16"]

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @classmethod
    def get_supported_kernel_block_sizes(cls, kv_cache_spec: Any = None) -> list[Any]:
        return list(page_sizes(current_index()))

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        return GPU_PAGE

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return attn_type == "decoder"

    @classmethod
    def supports_kv_cache_dtype(cls, kv_cache_dtype: Any) -> bool:
        return kv_cache_dtype is None or kv_cache_dtype in cls.supported_kv_cache_dtypes

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return False

    @classmethod
    def supports_non_causal(cls) -> bool:
        return False

    @classmethod
    def supports_mm_prefix(cls) -> bool:
        return False

    @classmethod
    def supports_rswa(cls) -> bool:
        return False

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return False

    @classmethod
    def supports_dcp(cls) -> bool:
        return False

    @classmethod
    def supports_pcp(cls) -> bool:
        return False

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        return False  # rows are made of the lengths that the CPU knows

    @staticmethod
    def get_impl_cls() -> type[FlashAttentionImpl]:
        return SparqGPUImpl

    @staticmethod
    def get_builder_cls() -> type[FlashAttentionMetadataBuilder]:
        return SparqGPUMetadataBuilder

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        return with_index(spec, interleaved=True)


@dataclass
class SparqGPUMetadata(FlashAttentionMetadata):
    """Of a batch: vLLM's own of all of it, for layers that stay dense, and its parts."""

    decodes: Decodes | None = None
    rest: FlashAttentionMetadata | None = None  # behind the decodes

    @property
    def whole(self) -> FlashAttentionMetadata:
        return self


class SparqGPUMetadataBuilder(DecodesFirst, FlashAttentionMetadataBuilder):
    supports_update_block_table = False  # the decodes have tables of their own

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        # Of uniform drafts the rows are made anew every step, at another address.
        return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> FlashAttentionMetadata:
        common = common_attn_metadata
        if not self.is_ours:
            return super().build(common_prefix_len, common, fast_build)
        decodes, rest = self.begin(common)
        # Both would plan ahead into one buffer, so only one does: what prompts need, where there are any.
        whole = super().build(common_prefix_len, common, fast_build or decodes is not None)
        metadata = SparqGPUMetadata(
            **{field.name: getattr(whole, field.name) for field in fields(whole)}, decodes=decodes
        )
        if decodes is None:
            metadata.rest = whole
        elif rest is not None:
            metadata.rest = super().build(0, rest, fast_build)
        return metadata


class SparqGPUImpl(SparqDecoding, FlashAttentionImpl):
    device, interleaved = "cuda", True

    def dense_inputs(
        self, layer: Any, dense: FlashAttentionMetadata, kv_cache: Tensor
    ) -> tuple[Tensor, FlashAttentionMetadata]:
        return self.rows(kv_cache), dense

    def rows(self, kv_cache: Tensor) -> Tensor:
        """What vLLM's class knows as the cache: [pages, Hkv, N, 2 d]."""
        pages, heads, page, _ = kv_cache.shape
        width = 2 * self.head_size
        strides = (*kv_cache.stride()[:2], width, 1)
        return kv_cache.as_strided((pages, heads, page, width), strides, kv_cache.storage_offset())
