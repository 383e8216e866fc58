"""Tiny random models, engines that serve them, and what transformers gives for the same."""

from __future__ import annotations

import gc
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

import sparq
from sparq.vllm import report

VOCABULARY = 512
LENGTHS = (37, 300, 700)  # of prompts; a group of the index is 256
NEW = 24
# Few positions of many, so that a wrong choice shows.
SPARSE = {"k": 64, "r": 16, "local": 16, "min_length": 0}
COVERING = {"k": 2048, "min_length": 0}

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4096,
    "initializer_range": 0.15,  # logits far apart, so that rounding does not choose tokens
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
MODELS: dict[str, Any] = {
    "llama": lambda: transformers.LlamaConfig(**_SIZES),
    "qwen3": lambda: transformers.Qwen3Config(**_SIZES),
    "mistral": lambda: transformers.MistralConfig(**_SIZES, sliding_window=None),
    "mistral-window": lambda: transformers.MistralConfig(**_SIZES, sliding_window=64),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **_SIZES | {"num_hidden_layers": 4},
        sliding_window=64,
        query_pre_attn_scalar=32,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
}


def make_model(kind: str, folder: Path) -> Path:
    path = folder / kind
    if not path.exists():
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(MODELS[kind]()).float().save_pretrained(path)
    return path


def prompts(lengths: Sequence[int] = LENGTHS, seed: int = 0, shared: int = 0) -> list[list[int]]:
    """Random tokens; the first `shared` ones are the same in all."""
    numbers = random.Random(seed)
    common = [numbers.randrange(3, VOCABULARY) for _ in range(shared)]
    return [common + [numbers.randrange(3, VOCABULARY) for _ in range(n - shared)] for n in lengths]


class Served(NamedTuple):
    tokens: list[list[int]]
    report: dict[str, Any]  # of SparQ; all zeros where it had no part


def engine(model: Path, knobs: dict[str, Any] | None = None, **changes: Any) -> Any:
    """A vLLM engine; with knobs SparQ's, else vLLM's own attention."""
    from vllm import LLM

    options: dict[str, Any] = {
        "model": str(model),
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "max_model_len": 1024,
        "max_num_seqs": 8,
        "enforce_eager": True,
        "kv_cache_memory_bytes": 256 << 20,
        "enable_prefix_caching": False,
        "seed": 0,
    }
    if knobs is not None:
        options |= {"attention_backend": "CUSTOM", "additional_config": {"sparq": knobs}}
    return LLM(**options | changes)


def generate(llm: Any, asked: list[list[int]], new: int = NEW) -> Served:
    from vllm import SamplingParams

    report.TOTALS.__init__()  # type: ignore[misc]
    params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in asked], params, use_tqdm=False)
    return Served([list(output.outputs[0].token_ids) for output in outputs], report.TOTALS.to_dict())


def close(llm: Any) -> None:
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()
    gc.collect()


def serve(
    model: Path,
    knobs: dict[str, Any] | None = None,
    asked: list[list[int]] | None = None,
    new: int = NEW,
    **changes: Any,
) -> Served:
    """An engine made, asked and closed."""
    llm = engine(model, knobs, **changes)
    try:
        return generate(llm, prompts() if asked is None else asked, new)
    finally:
        close(llm)


def by_transformers(
    model: Path, knobs: dict[str, Any] | None, asked: list[list[int]], new: int = NEW
) -> list[list[int]]:
    """The same, one prompt after the other, with `sparq.patch`."""
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    sparq.patch(loaded, sparq.SparqConfig(**knobs))
    found = []
    for prompt in asked:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            out = loaded.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, eos_token_id=None)
        found.append(out[0, len(prompt) :].tolist())
    return found
