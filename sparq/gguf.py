"""Models from GGUF files, llama.cpp's format: transformers reads them, and what it gets wrong is mended here."""

from __future__ import annotations

import importlib.util
import os
import struct
import warnings
from pathlib import Path
from typing import Any

from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

# llama.cpp's names of pre-tokenizers (`tokenizer.ggml.pre`): those that split as GPT-2's does, and those that first set
# each digit apart.
AS_GPT2 = {"default", "gpt-2", "jais", "mpt", "olmo", "phi-2", "roberta-bpe"}
DIGIT_BY_DIGIT = {"command-r", "refact", "smollm", "starcoder"}


def file_of(model: str) -> Path | None:
    """The GGUF file that `model` is, or that lies in the folder `model`; None: it is a model of another kind.

    Raises:
        ValueError: there is no such file, or the folder has several.
    """
    path = Path(model)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if _is_named_gguf(file))
        if not files or any(path.glob("*.safetensors")):
            return None
        if len(files) > 1:
            names = ", ".join(file.name for file in files)
            raise ValueError(f"a folder must hold one GGUF file, {model} holds {len(files)}; name one of them: {names}")
        return files[0]
    if not _is_named_gguf(path):
        return None
    if not path.is_file():
        raise ValueError(f"there is no GGUF file {model}")
    return path


def load(path: str | os.PathLike[str], *, dtype: Any = "auto", **options: Any) -> tuple[Any, Any]:
    """The tokenizer and the model of a GGUF file, its weights unpacked.

    Args:
        path: the file.
        dtype: of the model; "auto": the file's own, float32 where its weights are quantised.
        options: for `from_pretrained`, of both.

    Raises:
        ImportError: the package gguf is missing.
        ValueError: the file is broken, or of an architecture that transformers does not read.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ImportError("GGUF files are read with the package gguf, which is not installed: pip install gguf")
    folder, name = Path(path).absolute().parent, Path(path).name
    metadata = _metadata(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name, **options)
        # Said outright, unpacking is no fallback that transformers would warn of.
        unpacked = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=name, dtype=dtype, quantization_config=unpacked, use_safetensors=True, **options
        )
    except (ValueError, TypeError, KeyError, IndexError, struct.error) as error:
        raise ValueError(f"transformers does not read the GGUF file {path}: {error}") from error
    _mend(tokenizer, metadata.get("tokenizer.ggml.pre"))
    eos = metadata.get("tokenizer.ggml.eos_token_id")
    if eos is not None:  # transformers 5.17 takes the token that begins a text for the one that ends it
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(eos)
    # Unset it is so large that nobody is warned of a text that is too long.
    tokenizer.model_max_length = min(tokenizer.model_max_length, model.config.max_position_embeddings)
    return tokenizer, model


def _is_named_gguf(path: Path) -> bool:
    return path.suffix.lower() == ".gguf"


def _metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Keys and values of the file's head; of arrays only their length."""
    from transformers.integrations.gguf.reader import read_gguf_metadata

    try:
        metadata, _ = read_gguf_metadata(str(path))
    except (ValueError, KeyError, IndexError, struct.error) as error:
        raise ValueError(f"{path} is not a whole GGUF file: {error}") from error
    return metadata


def _mend(tokenizer: Any, name: str | None) -> None:
    """Split words and numbers as in training, where transformers takes GPT-2's way for want of a better one."""
    backend = tokenizer.backend_tokenizer
    if not isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel) or name is None or name in AS_GPT2:
        return
    if name in DIGIT_BY_DIGIT:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    else:
        warnings.warn(
            f"transformers does not know the pre-tokenizer '{name}' of this GGUF file and splits text as GPT-2 does: "
            "some words or numbers may come in other tokens than in training, and answers may be worse",
            stacklevel=3,
        )
