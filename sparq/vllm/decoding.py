"""What the implementations for both devices share: new tokens into pages, and the sparse step on them."""

from __future__ import annotations

from typing import Any

import sparq_kernels
from sparq_kernels import Cached, Visible
from torch import Tensor

from sparq import sinks
from sparq.config import SparqConfig
from sparq.vllm.batch import Decodes
from sparq.vllm.knobs import budget_of, config_of
from sparq.vllm.pages import pages_of
from sparq.vllm.report import TOTALS


class SparqDecoding:
    """For an implementation of vLLM's attention, before its own class."""

    device: str
    interleaved: bool  # whether rows of K and V lie beside each other

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        from vllm.config import get_current_vllm_config

        if self.alibi_slopes is not None:  # type: ignore[attr-defined]
            raise ValueError("SparQ does not serve ALiBi; leave out --attention-backend CUSTOM")
        backend = sparq_kernels.backend(self.device)
        if backend == "reference":
            raise ValueError(
                f"SparQ has no kernel for this {self.device} (a warning above says why): decoding would be slow"
            )
        self.config = config_of(get_current_vllm_config())
        self.budget = budget_of(self.config, self.head_size, self.device)  # type: ignore[attr-defined]
        self._pages: tuple[Any, Cached] | None = None
        _made[:] = [self.config.index]

    def is_ours(self, kv_cache: Tensor) -> bool:
        """Whether its pages have more than K and V; layers with a sliding window may have plain ones."""
        return kv_cache.shape[3] > 2 * self.head_size  # type: ignore[attr-defined]

    def stays_dense(self, layer: Any) -> bool:
        """Whether this layer decodes densely though its pages have an index."""
        from vllm.model_executor.models.utils import extract_layer_index

        window = self.sliding_window  # type: ignore[attr-defined]
        if window not in (None, -1, (-1, -1)):
            return True
        return bool(self.config.dense_layers) and extract_layer_index(layer.layer_name) < self.config.dense_layers

    def pages(self, kv_cache: Tensor) -> Cached:
        known = (kv_cache.data_ptr(), kv_cache.shape, kv_cache.stride())
        if self._pages is None or self._pages[0] != known:
            self._pages = known, pages_of(kv_cache, self.head_size, self.config.index, self.interleaved)  # type: ignore[attr-defined]
        return self._pages[1]

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """vLLM's hook: write the step's keys and values [tokens, Hkv, d]."""
        if not self.is_ours(kv_cache):
            super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)  # type: ignore[misc]
            return
        tokens = slot_mapping.shape[0]  # vLLM pads K and V for its graphs
        sparq_kernels.append_slots(self.pages(kv_cache), key[:tokens], value[:tokens], slot_mapping)

    def dense_inputs(self, layer: Any, dense: Any, kv_cache: Tensor) -> tuple[Tensor, Any]:
        """The cache and the metadata that vLLM's own class wants for the tokens `dense`."""
        raise NotImplementedError

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """As in vLLM's class; kv_cache is [pages, Hkv, N, C]."""
        attend, scales = super().forward, (output_scale, output_block_scale)  # type: ignore[misc]
        if attn_metadata is None or not self.is_ours(kv_cache):
            return attend(layer, query, key, value, kv_cache, attn_metadata, output, *scales)
        decodes, dense, first = attn_metadata.decodes, attn_metadata.rest, 0
        if decodes is not None and self.stays_dense(layer):
            dense = attn_metadata.whole
        elif decodes is not None:
            self.decode(decodes, query, kv_cache, output)
            first = decodes.count
        if dense is not None:
            cache, metadata = self.dense_inputs(layer, dense, kv_cache)
            attend(layer, query[first:], key[first:], value[first:], cache, metadata, output[first:], *scales)
        return output

    def decode(self, decodes: Decodes, query: Tensor, kv_cache: Tensor, output: Tensor) -> None:
        """Write the attention of the first tokens of query [tokens, Hq, d] to those of output."""
        cached = self.pages(kv_cache)._replace(block_table=decodes.block_table)
        count = decodes.count
        result = sparq_kernels.decode(
            query[:count, :, None],
            cached,
            Visible(decodes.length),
            self.budget,
            scale=self.scale,  # type: ignore[attr-defined]
            softcap=self.softcap(),
            mean_value=self.config.mean_value,
        )
        found = result.output
        if getattr(self, "sinks", None) is not None:
            found = sinks.attenuate(found, result.alpha, result.lse, self.sinks)  # type: ignore[attr-defined]
        output[:count].copy_(found.view_as(output[:count]))
        TOTALS.layer(result, cached, decodes, self.config.index, self.budget.r, self.budget.dense_below)

    def softcap(self) -> float | None:
        cap = getattr(self, "logits_soft_cap", None)
        return float(cap) if cap else None


def reasons_against(selected: Any) -> list[str]:
    """What SparQ does not serve of what vLLM wants to know from a backend (AttentionSelectorConfig)."""
    found = []
    for name, words in (
        ("use_mla", "multi-head latent attention"),
        ("use_sparse", "a model's own sparse attention"),
        ("use_non_causal", "attention that is not causal"),
        ("use_mm_prefix", "prefixes that see each other (multimodal)"),
        ("use_dcp", "context parallelism"),
        ("use_pcp", "context parallelism"),
        ("use_kv_connector", "KV connectors"),
        ("use_rswa", "reference sliding windows"),
    ):
        if getattr(selected, name, False) and words not in found:
            found.append(words)
    if selected.kv_cache_dtype not in (None, "auto", "float16", "bfloat16"):
        found.append(f"a KV cache in {selected.kv_cache_dtype}")
    if str(getattr(selected.attn_type, "value", selected.attn_type)) != "decoder":
        found.append(f"{selected.attn_type} attention")
    return found


def page_sizes(index: str) -> list[int]:
    """Positions of a page that the operator serves."""
    return [size for size in (64, 128, 256, 512, 1024, 2048) if index == "full" or size >= sparq_kernels.GROUP]


_made: list[str] = []  # the index of the engine that was made last in this process


def current_index() -> str:
    """The index of the engine that is being made. vLLM asks backends for pages when layers have been made, and does not
    say of which engine: it is the one whose layers were made last."""
    from vllm.config import get_current_vllm_config_or_none

    vllm_config = get_current_vllm_config_or_none()
    if vllm_config is not None:
        return config_of(vllm_config).index
    return _made[-1] if _made else SparqConfig().index


def with_index(spec: Any, interleaved: bool) -> Any:
    """vLLM's spec of a layer's cache, with room for the index and the sums; layers with a window keep plain pages."""
    import dataclasses

    from vllm.v1.kv_cache_interface import FullAttentionSpec

    from sparq.vllm.pages import content_bytes

    if spec.state_content_bytes is not None or type(spec) is not FullAttentionSpec:
        return spec
    index = current_index()
    # vLLM splits larger blocks into the largest pages there are.
    sizes = page_sizes(index)
    if not any(spec.block_size % size == 0 for size in sizes):
        raise ValueError(f"block_size must be one of {sizes} for SparQ's index {index!r}, got {spec.block_size}")
    page = max(size for size in sizes if spec.block_size % size == 0)
    return dataclasses.replace(spec, state_content_bytes=content_bytes(page, spec.head_size, spec.dtype, index))
