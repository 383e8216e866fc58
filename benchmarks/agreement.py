"""Whether what is about to be measured is right: a wrong answer is not fast."""

from __future__ import annotations

from typing import Any

import sparq_kernels
import torch
from model_shapes import Heads
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from ways import tolerance, twin
from workload import relative_error

import sparq

PROMPT, STEPS = 96, 8  # tokens of the short context


def check(model: PreTrainedModel, context: int, batch: int, knobs: dict[str, Any]) -> None:
    """Raise SystemExit, with the reason in one line, unless the patched model and the operator are right.

    Args:
        context: positions that the operator is tried on, those that are going to be measured.
    """
    why = wrong_model(model) or wrong_operator(model, context, batch, sparq.SparqConfig(**knobs))
    if why is not None:
        raise SystemExit(f"wrong, so nothing is measured: {why}")


def wrong_model(model: PreTrainedModel) -> str | None:
    """How a patched model whose k covers the context differs from the stock model, or None.

    The same tokens are fed to both, a prompt and then one by one, and every step's logits are compared: this tries
    hooks, cache, masks and the dense steps of the patch. What a sparse step computes is `wrong_operator`'s to say.
    """
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    tokens = torch.randint(vocabulary, (2, PROMPT + STEPS), generator=torch.Generator().manual_seed(2))
    tokens = tokens.to(model.device)
    covering = sparq.patch(twin(model), k=PROMPT + STEPS, min_length=0)
    expected, got = teacher_forced(model, tokens), teacher_forced(covering, tokens)
    error = relative_error(got, expected)
    if not error < tolerance(model.dtype):
        return f"with k covering the context the patched model's logits differ from stock's by {error:.1e}"
    if model.dtype == torch.float32 and not torch.equal(got.argmax(-1), expected.argmax(-1)):
        return "with k covering the context the patched model's tokens are not stock's"
    return None


@torch.inference_mode()
def teacher_forced(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Logits [B, STEPS + 1, vocabulary] after the prompt and after each further token, on a dynamic cache."""
    cache = DynamicCache(config=model.config)
    logits = [model(tokens[:, :PROMPT], past_key_values=cache, logits_to_keep=1).logits[:, -1]]
    for token in tokens[:, PROMPT:].split(1, dim=1):
        logits.append(model(token, past_key_values=cache).logits[:, -1])
    return torch.stack(logits, 1)


def wrong_operator(model: PreTrainedModel, context: int, batch: int, config: sparq.SparqConfig) -> str | None:
    """How the operator differs from the reference in float64 on a cache of this shape, or None."""
    heads = Heads.of(model.config)
    shape, dtype, device = (batch, heads.kv, context, heads.head_dim), model.dtype, model.device
    generator = torch.Generator(device).manual_seed(3)

    def draw(*shape: int) -> Tensor:  # where it is needed, as it is needed: a GPU's cache is drawn on no host
        return torch.randn(shape, generator=generator, dtype=dtype, device=device)

    key, value = draw(*shape), draw(*shape)
    query = draw(batch, heads.query, 1, heads.head_dim)
    components = sparq_kernels.allocate_components(*shape, dtype, device)
    sparq_kernels.write_components(components, key, 0)
    value_sum = value.sum(2, dtype=torch.float32)
    budget = sparq_kernels.Budget(config.components(heads.head_dim), config.min_k, config.k_divisor, config.local)
    inputs = (query, key, components, value, value_sum)

    def output(row: int, dtype: torch.dtype) -> Tensor:
        return attended(torch.tensor([context], device=device), *(tensor[row : row + 1].to(dtype) for tensor in inputs))

    def attended(length: Tensor, query: Tensor, *cached: Tensor) -> Tensor:
        return sparq_kernels.decode(query, sparq_kernels.Cached(*cached), sparq_kernels.Visible(length), budget).output

    lengths = torch.full((batch,), context, device=device)
    fast = attended(lengths, *inputs)
    slow = torch.cat([output(row, torch.float64) for row in range(batch)])  # in float64 a row takes enough memory
    error = relative_error(fast, slow)
    if not error < tolerance(dtype):
        return f"the operator differs from the reference by {error:.1e} at context {context}, {dtype}"
    return None
