"""`attn_implementation="sparq"`: a model that is given this name patches itself when it first runs.

transformers hands an attention function neither the model nor the cache, so the first call looks for the model among
those whose `forward` it is inside of. From then on the model is patched as by `sparq.patch(model)`, with the knobs of
`model.config.sparq`, a dict, where there is one.
"""

from __future__ import annotations

import sys
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import eager_mask, sdpa_mask
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from sparq import patching
from sparq.attention import sparq_attention
from sparq.served import NAME, is_softcapped

_beside: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # attention layers of patched models, but of other parts


def patching_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Dense attention, as transformers calls it, that first patches the model which `module` belongs to.

    Raises:
        ValueError: SparQ cannot serve the model, or a knob in its configuration is wrong.
        RuntimeError: `module` is called outside of any model's forward pass.
    """
    if module not in _beside:
        _patch_around(module)
    base = _base(module.config)  # type: ignore[arg-type]
    return sparq_attention(base, module, query, key, value, attention_mask, *args, **kwargs)


@torch.compiler.disable(reason="the model is patched now; the graph is made anew when it runs next")
def _patch_around(module: nn.Module) -> None:
    model = _model_around(module)
    if not patching.is_patched(model):
        patching.patch(model)
    if not getattr(module, "is_causal", False):  # an encoder of images, say: it keeps the name, and is asked again
        _beside.add(module)


def mask(*args: Any, config: PreTrainedConfig | None = None, **kwargs: Any) -> Tensor | None:
    """The mask that `patching_attention` needs for a model of this configuration."""
    function = eager_mask if config is not None and _base(config) == "eager" else sdpa_mask
    return function(*args, config=config, **kwargs)


def _base(config: PreTrainedConfig) -> str:
    """As `served` chooses it, of the configuration alone: a mask function is given no more."""
    model = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return "sdpa" if getattr(model, "_supports_sdpa", True) and not is_softcapped(config) else "eager"


def _model_around(module: nn.Module) -> PreTrainedModel:
    """The outermost model that holds `module` and is being run."""
    found, frame = None, sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, PreTrainedModel) and any(inside is module for inside in owner.modules()):
            found = owner
        frame = frame.f_back  # type: ignore[assignment]
    if found is None:
        raise RuntimeError(
            f"sparq: {type(module).__name__} was called outside of a model, so attn_implementation={NAME!r} cannot "
            "serve it; call sparq.patch(model) instead"
        )
    return found


def register() -> None:
    """Make the implementation known to transformers (idempotent)."""
    AttentionInterface.register(NAME, patching_attention)
    AttentionMaskInterface.register(NAME, mask)


register()
