"""A cache in a file: keys and values of tokens that were read once, for another process to go on from.

The file is safetensors: the tokens, and of each layer K and V [B, Hkv, n, d], nothing that would be unpickled. Its
metadata say which format it is of, and which model has made it. The index is not among it: it is made of K again, which
is faster than reading it (docs/prompt-caches.md).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import Cache, DynamicCache, PreTrainedModel

from sparq.held import Held, fill, held_by, is_empty_by_nature, is_enough
from sparq.served import NAME, causal_layers, decoder_of, unwrap

log = logging.getLogger(__name__)

FORMAT = "sparq-prompt-cache"
VERSION = 1  # a file of a larger one is of a later SparQ
SAMPLES = 64  # elements of each weight that are looked at to know the model again
# Of a configuration, what K and V do not depend on; the dtype is compared by itself, and the weights tell the rest.
OF_NO_MATTER = {
    NAME,
    "_name_or_path",
    "architectures",
    "attn_implementation",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "id2label",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "problem_type",
    "quantization_config",
    "return_dict",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}


def save_cache(cache: Cache, tokens: Tensor | Sequence[int], path: str | os.PathLike, model: nn.Module) -> None:
    """Write a cache and the tokens it is of into a file, which `load_cache` reads.

    The file is replaced in one go: whoever reads it meanwhile, or after a failure in the middle, finds the old one. It
    takes the bytes of K and V; where a layer's storage has room to grow, K and V are copied once on the way.

    Args:
        cache: a dynamic or a static cache, of a patched model or not, that holds tokens.
        tokens: integers [B, n], or [n] for a batch of one: what the model was fed; those beyond what the cache holds
            (the last one that was generated) are left out. A mask is not kept: of a padded batch keep it yourself.
        path: the file; its folder must exist.
        model: the model that has filled the cache, patched or not.

    Raises:
        TypeError, ValueError: an argument that is none of these, fewer tokens than the cache holds, a layer that holds
            something else than K and V, or tokens that stand for images or sounds.
        OSError: the file cannot be written.
    """
    path = Path(path)
    if not isinstance(cache, Cache) or not hasattr(cache, "layers"):
        raise TypeError(f"cache must be a cache of transformers, got {type(cache).__name__}")
    held = {i: held_by(i, layer) for i, layer in enumerate(cache.layers) if not is_empty_by_nature(layer)}
    lengths = sorted({layer.length for layer in held.values()})
    if len(lengths) != 1 or not lengths[0]:
        raise ValueError(f"cache must hold the same tokens in all its layers, and some, got {lengths or 'no'} tokens")
    (length,), batch = lengths, next(iter(held.values())).keys.shape[0]
    ids = _token_ids(tokens)
    if ids.shape[0] != batch:
        raise ValueError(f"tokens must be of the cache's batch of {batch}, got {tuple(ids.shape)}")
    if ids.shape[1] < length:
        raise ValueError(f"tokens must be all {length} that the cache holds, got {ids.shape[1]}")
    ids = ids[:, :length].contiguous()
    _refuse_media(unwrap(model), ids)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path must be in a folder that exists, got {path}")

    tensors = {"tokens": ids}
    for i, layer in held.items():
        tensors |= {_name(i, "keys"): layer.keys.contiguous(), _name(i, "values"): layer.values.contiguous()}
    metadata = {
        "format": FORMAT,
        "format_version": str(VERSION),
        "model": fingerprint(model),
        "model_type": str(decoder_of(model).config.model_type),
        "dtype": _dtype(model),
        "transformers": transformers.__version__,
    }
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        save_file(tensors, temporary, metadata)
        os.replace(temporary, path)
    except SafetensorError as error:  # what the disk refuses comes as this
        raise OSError(f"{path} cannot be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    log.info(f"{length:,} tokens written to {path}")


def load_cache(
    path: str | os.PathLike, model: nn.Module, tokens: Tensor | Sequence[int] | None = None
) -> tuple[DynamicCache, Tensor]:
    """The cache that `save_cache` has written, cut back to the tokens that a prompt begins with.

    On the CPU nothing is read yet: K and V are a map of the file until the model first writes behind them. The file may
    be replaced meanwhile, but not written into.

    Args:
        path: the file.
        model: the model that goes on from it, patched or not; the same as has made it.
        tokens: integers [B, n], or [n] for a batch of one. None: the whole cache. `generate` needs a token at least
            that is not in the cache, and where it computes one alone that is a decode step: whoever generates from a
            prompt gives it here without its last two.

    Returns:
        A plain dynamic cache, and the tokens that it holds, int64 [B, m] on the model's device: the longest common
        beginning of the file's and `tokens`. A layer with a sliding window cannot be cut back where it has forgotten
        what would be needed: then nothing is held, m = 0, and a message of the logger `sparq` says so.

    Raises:
        TypeError, ValueError: an argument that is none of these, a file that is none of `save_cache`'s, is damaged, or
            of a later format, and one that another model has made, or the same in another dtype.
        OSError: the file cannot be read.
    """
    loaded = load(path, model, tokens)
    return loaded.cache, loaded.tokens


class Loaded(NamedTuple):
    """What `load` has found."""

    cache: DynamicCache
    tokens: Tensor  # int64 [B, m] that it holds
    length: int  # tokens of the file, m or more


def load(path: str | os.PathLike, model: nn.Module, tokens: Tensor | Sequence[int] | None = None) -> Loaded:
    """`load_cache`, for whoever wants to know how much there was."""
    wanted = None if tokens is None else _token_ids(tokens)
    served, decoder = unwrap(model), decoder_of(model)
    path = Path(path)
    try:
        with path.open("rb"), safe_open(path, "pt") as file:  # `open` says in words why a file cannot be read
            _check_metadata(path, file.metadata() or {}, model)
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict
    except SafetensorError as error:
        raise ValueError(f"{path} must be a whole safetensors file: {error}") from error
    cache = DynamicCache(config=served.config)
    layers = {i: layer for i, layer in enumerate(cache.layers) if not is_empty_by_nature(layer)}
    ids, stored = _checked(path, found, list(layers))
    batch, length = ids.shape
    keep = length
    if wanted is not None:
        if wanted.shape[0] != batch:
            raise ValueError(f"tokens must be of the file's batch of {batch}, got {tuple(wanted.shape)}")
        keep = _common(ids, wanted)
    if not all(is_enough(layer, stored[i], keep) for i, layer in layers.items()):
        log.warning(
            f"sparq: {path} cannot be cut back to {keep:,} of its {length:,} tokens, since a layer with a sliding "
            "window has forgotten what it would need; nothing of it is used"
        )
        keep = 0
    if keep:
        devices: dict[Any, torch.device] = {
            module.layer_idx: next(module.parameters()).device for module in causal_layers(decoder)
        }
        for i, layer in layers.items():
            fill(layer, stored[i], keep, devices.get(i, decoder.device))
    log.info(f"{keep:,} of {length:,} tokens taken from {path}")
    return Loaded(cache, ids[:, :keep].to(decoder.device), length)


def fingerprint(model: nn.Module) -> str:
    """What tells the model apart from others: 32 hexadecimal digits of its configuration and a sample of every weight,
    adapters included, whatever device they lie on.

    Raises:
        ValueError: some of the weights are not in memory.
    """
    decoder = decoder_of(model)
    digest = hashlib.sha256()
    settings = {name: value for name, value in decoder.config.to_dict().items() if name not in OF_NO_MATTER}
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, weight in sorted(decoder.state_dict().items()):
        digest.update(name.encode())
        for part in _parts(name, weight):
            digest.update(part)
    for name, module in decoder.named_modules():  # PEFT's layers: which of their adapters are in use
        if isinstance(getattr(module, "active_adapters", None), list):
            digest.update(f"{name} {module.active_adapters} {module.disable_adapters}".encode())
    return digest.hexdigest()[:32]


def _check_metadata(path: Path, metadata: dict[str, str], model: nn.Module) -> None:
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} must be a prompt cache, written by sparq.save_cache; this safetensors file is not")
    version = metadata.get("format_version", "")
    if not version.isdecimal() or int(version) > VERSION:
        raise ValueError(
            f"{path} was written by a later SparQ: its format_version is {version}, and this one reads up to "
            f"{VERSION}; pip install -U sparq-attention"
        )
    if metadata.get("dtype") != _dtype(model):
        raise ValueError(f"{path} was made in {metadata.get('dtype')}, and the model is in {_dtype(model)}")
    if metadata.get("model") != fingerprint(model):
        raise ValueError(
            f"{path} was made by another model: its weights, adapters or settings are not those of this "
            f"{type(unwrap(model)).__name__} (a {metadata.get('model_type')} under transformers "
            f"{metadata.get('transformers')}, and this is a {decoder_of(model).config.model_type} under "
            f"{transformers.__version__})"
        )


def _checked(path: Path, found: dict[str, Tensor], layers: list[int]) -> tuple[Tensor, dict[int, Held]]:
    """The tokens [B, n] and what the layers hold, of a file's tensors."""
    names = {"tokens"} | {_name(i, what) for i in layers for what in ("keys", "values")}
    if names != found.keys():
        raise ValueError(f"{path} is damaged: it must hold tokens, and K and V of {len(layers)} layers")
    ids = found["tokens"]
    if ids.dim() != 2 or ids.dtype != torch.int64:
        raise ValueError(f"{path} is damaged: tokens must be int64 [batch, n], and are {ids.dtype} {list(ids.shape)}")
    stored = {i: Held(found[_name(i, "keys")], found[_name(i, "values")], ids.shape[1]) for i in layers}
    for i, held in stored.items():
        keys, values = list(held.keys.shape), list(held.values.shape)
        if not (len(keys) == len(values) == 4 and keys[:3] == values[:3] and keys[0] == ids.shape[0]):
            raise ValueError(f"{path} is damaged: layer {i} has keys {keys} and values {values}")
    return ids, stored


def _token_ids(tokens: Tensor | Sequence[int]) -> Tensor:
    """int64 [B, n] on the CPU."""
    ids = torch.as_tensor(tokens)
    if ids.is_floating_point() and not ids.numel():  # an empty list
        ids = ids.long()
    if ids.dim() not in (1, 2) or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"tokens must be integers [n] or [batch, n], got {ids.dtype} {list(ids.shape)}")
    return ids.to("cpu", torch.int64).reshape(ids.shape if ids.dim() == 2 else (1, len(ids)))


def _common(one: Tensor, other: Tensor) -> int:
    """How many columns both begin with."""
    length = min(one.shape[1], other.shape[1])
    return int((one[:, :length] == other[:, :length]).all(0).long().cumprod(0).sum())


def _refuse_media(model: PreTrainedModel, ids: Tensor) -> None:
    for name, value in model.config.to_dict().items():
        stands_for_media = re.fullmatch(r"(image|video|audio|vision).*_token_(id|index)", name)
        if stands_for_media and isinstance(value, int) and bool((ids == value).any()):
            raise ValueError(f"tokens must be text, got {value}, the model's {name}: it does not say of what")


def _parts(name: str, weight: Any) -> Iterator[bytes]:
    """Shape and some elements of a weight; of one that consists of several tensors, as quantised ones do, of each."""
    if isinstance(weight, Tensor) and is_traceable_wrapper_subclass(weight):
        inside, settings = weight.__tensor_flatten__()  # such as: whether activations are rounded too
        yield re.sub(" at 0x[0-9a-f]+", "", f"{type(weight).__name__} {settings}").encode()  # an object's address
        weight = tuple(getattr(weight, attribute) for attribute in inside)
    if isinstance(weight, (tuple, list)):
        for part in weight:
            yield from _parts(name, part)
    elif not isinstance(weight, Tensor):
        # The rest of what quantised modules keep; an object would show its address.
        yield (repr(weight) if isinstance(weight, (int, float, str, torch.dtype)) else type(weight).__name__).encode()
    elif weight.is_meta:
        raise ValueError(f"model must have its weights in memory, {name} is on the device meta (offloaded)")
    else:
        weight = weight.detach()
        if weight.is_quantized:
            yield f"{weight.qscheme()}".encode()
            weight = weight.int_repr()
        yield f"{list(weight.shape)}".encode()
        if weight.numel():
            # By their places, not in a flat view: that would copy a weight which is not contiguous.
            places = torch.arange(0, weight.numel(), max(1, weight.numel() // SAMPLES), device=weight.device)[:SAMPLES]
            some = weight[torch.unravel_index(places, weight.shape)] if weight.dim() else weight[None]
            yield some.cpu().contiguous().view(torch.uint8).numpy().tobytes()


def _dtype(model: nn.Module) -> str:
    return str(decoder_of(model).dtype).removeprefix("torch.")


def _name(index: int, what: str) -> str:
    return f"layers.{index}.{what}"
