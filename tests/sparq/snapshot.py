"""All of a model that patching could change."""

from __future__ import annotations

import hashlib
from typing import Any

from transformers import PreTrainedModel


def snapshot(model: PreTrainedModel) -> dict[str, Any]:
    weights = {
        name: hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()
        for name, tensor in model.state_dict().items()
    }
    hooks = {
        name: {kind: list(held) for kind, held in vars(module).items() if kind.endswith("_hooks") and held}
        for name, module in model.named_modules()
    }
    attributes = {name: sorted(vars(module)) for name, module in model.named_modules()}
    methods = {name: id(vars(module)["forward"]) for name, module in model.named_modules() if "forward" in vars(module)}
    configs = {
        name: (module.config.to_dict(), module.config._attn_implementation)
        for name, module in model.named_modules()
        if isinstance(module, PreTrainedModel)
    }
    return dict(
        weights=weights, hooks=hooks, attributes=attributes, methods=methods, configs=configs, training=model.training
    )
