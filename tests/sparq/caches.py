"""Caches that grow and static ones, for tests of what holds for both: of whole models, and single layers of them beside
transformers' own."""

from __future__ import annotations

import pytest
import torch
from sparq_kernels import GROUP, read_components
from sparq_kernels.layout import find_codes, find_ranges
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import DynamicLayer, StaticLayer

import sparq
from sparq.cache import SparqLayer
from sparq.index import Indexed
from sparq.static_cache import SparqStaticLayer

SIZE = 64  # of a static cache, unless a test says another
ROOM = 1024  # of a single static layer, likewise
HEADS, HEAD_DIM = 2, 4


def dynamic(model: PreTrainedModel, size: int = SIZE) -> DynamicCache:
    """It grows, and asks for no size."""
    return DynamicCache(config=model.config)


def static(model: PreTrainedModel, size: int = SIZE) -> StaticCache:
    return StaticCache(config=model.config, max_cache_len=size)


on_either_cache = pytest.mark.parametrize("make_cache", [dynamic, static])


def same_report(one: sparq.Report, other: sparq.Report) -> None:
    """Counted on the device or by Python; dense steps read the whole of a static cache."""
    assert one.layers.keys() == other.layers.keys()
    for index in one.layers:
        a, b = one.layers[index], other.layers[index]
        assert (a.sparse_steps, a.dense_steps) == (b.sparse_steps, b.dense_steps)
        assert (a.positions_cached, a.positions_read) == (b.positions_cached, b.positions_read)
        assert (a.other_sums, a.ignored_biases) == (0, 0)
        assert a.mean_alpha == (None if b.mean_alpha is None else pytest.approx(b.mean_alpha, rel=1e-5))
        if not a.dense_steps:
            assert (a.bytes_read, a.bytes_dense) == (b.bytes_read, b.bytes_dense)


# --- Single layers ----------------------------------------------------------------------------------------------------

# SparQ's layer and the one of transformers that it stands for
GROWING = SparqLayer, DynamicLayer
FIXED = SparqStaticLayer, StaticLayer


class CodedLayer(SparqLayer):
    """With a four-bit index."""

    def __init__(self) -> None:
        super().__init__()
        self.use_index("int4")


class CodedStaticLayer(SparqStaticLayer):
    """Likewise."""

    def __init__(self, max_cache_len: int) -> None:
        super().__init__(max_cache_len, index="int4")


CODED, FIXED_CODED = (CodedLayer, DynamicLayer), (CodedStaticLayer, StaticLayer)
on_either_layer = pytest.mark.parametrize(
    "kind", [GROWING, FIXED, CODED, FIXED_CODED], ids=["growing", "fixed", "growing coded", "fixed coded"]
)


def is_fixed(kind: tuple[type, type]) -> bool:
    return kind[1] is StaticLayer


def made(cls: type, size: int = ROOM):
    return cls(size) if issubclass(cls, StaticLayer) else cls()


def states(length: int, batch: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random new keys and values [B, H, length, d]."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, HEADS, length, HEAD_DIM, generator=generator) for _ in range(2))  # type: ignore


def filled(length: int = 300, batch: int = 2, cls: type = SparqLayer, size: int = ROOM):
    layer = made(cls, size)
    layer.update(*states(length, batch))
    return layer


def pair(kind: tuple[type, type], length: int = 300, size: int = ROOM):
    """A layer of SparQ's and one of transformers' own that hold the same."""
    return [filled(length, cls=cls, size=size) for cls in kind]


def valid_positions(batch: int, length: int, start: Tensor | None, mask: Tensor | None) -> Tensor:
    """[B, length] bool."""
    valid = torch.ones(batch, length, dtype=torch.bool)
    if start is not None:
        valid &= torch.arange(length) >= start[:, None]
    return valid if mask is None else valid & mask


def index(layer: SparqLayer | SparqStaticLayer, start: Tensor | None = None, mask: Tensor | None = None) -> Indexed:
    """The layer's index over the positions from `start` [B] on that `mask` [B, length] allows."""
    if isinstance(layer, SparqLayer):
        return layer.index(start, mask)
    batch, _, size, _ = layer.keys.shape
    length = int(layer.get_seq_length())
    valid = valid_positions(batch, length, start, mask)
    return layer.index(None, torch.nn.functional.pad(valid, (0, size - length)))


def check(
    layer: SparqLayer | SparqStaticLayer,
    plain: DynamicLayer | StaticLayer,
    start: Tensor | None = None,
    mask: Tensor | None = None,
) -> None:
    """`layer` holds what `plain` holds, and its index is what is computed from that alone."""
    length = int(plain.get_seq_length())
    assert int(layer.get_seq_length()) == length
    assert layer.get_mask_sizes(3) == plain.get_mask_sizes(3)
    if length == 0 and isinstance(layer, SparqLayer):
        return
    exactly = dict(rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(layer.keys, plain.keys, **exactly)
    torch.testing.assert_close(layer.values, plain.values, **exactly)

    components, ranges, value_sum, mean_is_stale = index(layer, start, mask)
    keys, values = plain.keys[:, :, :length], plain.values[:, :, :length]
    if ranges is None:
        torch.testing.assert_close(read_components(components, length), keys, **exactly)
    else:  # of all whole groups, as if they had arrived at once
        groups = length // GROUP
        found = find_ranges(keys[:, :, : groups * GROUP])
        assert torch.equal(ranges[:, :, :groups], found)
        assert torch.equal(components[:, :, :groups], find_codes(keys[:, :, : groups * GROUP], found))
    valid = valid_positions(keys.shape[0], length, start, mask)
    expected = values.double().where(valid[:, None, :, None], 0.0).sum(2)
    assert value_sum.dtype == torch.float32 and mean_is_stale is None
    torch.testing.assert_close(value_sum.double(), expected, rtol=1e-5, atol=1e-5 if length < 100 else 1e-4)


def assign(layer, change, values_first: bool = False) -> None:
    """As public code evicts tokens, or puts a document's tokens behind others."""
    for name in ("values", "keys") if values_first else ("keys", "values"):
        setattr(layer, name, change(getattr(layer, name)))


def held_by(layer) -> list[tuple[object, str]]:
    """All tensors of a layer of either kind: whose attribute, and its name."""
    names = ("keys", "values") if hasattr(layer, "cumulative_length") else ("_key_storage", "_value_storage")
    own = [(layer, name) for name in names]
    index = [(layer._index, name) for name in ("value_sum", "start", "mask")]
    return [
        (owner, name)
        for owner, name in (*own, *index, (layer._index.components, "blocks"), (layer._index.components, "ranges"))
        if getattr(owner, name) is not None
    ]
