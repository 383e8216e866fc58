"""The ways to generate that the whole-model benchmarks compare, and the clockwork that lets them take turns."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import graphed
import torch
from model_shapes import Heads
from torch import Tensor
from transformers import CompileConfig, DynamicCache, PreTrainedModel, StaticCache, StoppingCriteriaList
from transformers.cache_utils import Cache

import sparq
from sparq.cache import SparqLayer, upgrade
from sparq.static_cache import SparqStaticLayer
from sparq.timing import DecodeClock

BARE_CONTEXT = 16  # next to no cache
ALL_LAYERS = 1 << 30
SIZE_STEP = 64  # of a static cache on a GPU: each layer of stock's would copy a mask of any length to make it fit


@dataclass(frozen=True)
class Way:
    """How to generate: with which cache, patched or not, compiled or not."""

    name: str
    is_static: bool = False
    is_compiled: bool = False
    is_graphed: bool = False  # replays a CUDA graph of one step, of which `generate` has no part
    patched: bool = False
    sparse: bool = False  # of a patched one: whether its steps may be sparse
    bare: bool = False  # decodes from next to no cache

    @property
    def is_stock(self) -> bool:
        return not self.patched and not self.bare


LAYERS_ALONE = Way("layers alone", bare=True)
DYNAMIC = Way("stock dynamic")
STATIC = Way("stock static", is_static=True)
OWN_CACHE = Way("SparQ's cache", patched=True)
SPARQ = Way("SparQ", patched=True, sparse=True)
COMPILED = Way("stock compiled", is_static=True, is_compiled=True)
SPARQ_COMPILED = Way("SparQ compiled", is_static=True, is_compiled=True, patched=True, sparse=True)
GRAPHED = Way("stock static, graph", is_static=True, is_graphed=True)
SPARQ_GRAPHED = Way("SparQ static, graph", is_static=True, is_graphed=True, patched=True, sparse=True)

WAYS = (LAYERS_ALONE, DYNAMIC, STATIC, OWN_CACHE, SPARQ)
COMPILED_WAYS = (COMPILED, SPARQ_COMPILED)
GRAPHED_WAYS = (GRAPHED, SPARQ_GRAPHED)


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """The same model with the very same weights: what is done to one's modules does not touch the other's."""
    weights = {id(tensor): tensor for tensor in model.parameters()}
    return copy.deepcopy(model, weights)


@dataclass
class Runner:
    """One way, ready to decode token after token from its own cache."""

    way: Way
    model: PreTrainedModel
    cache: Cache
    batch: int
    first_token: float | None = None  # seconds, where the prompt was really computed
    second_token: float | None = None
    seconds: list[float] = field(default_factory=list)  # of each decode step that counts
    cache_bytes: int = 0  # the most that the cache has held between two steps

    def decode(self, tokens: int) -> list[float]:
        """Seconds of each of `tokens` decode steps of `generate`, which goes on from the cache."""
        clock, _ = self._generate(self.cache.get_seq_length() + 1, tokens + 1)
        return clock.decode_seconds()

    def prefill(self, prompt: Tensor) -> None:
        """Compute a prompt [batch, length] into the empty cache, and time the first two tokens after it."""
        clock, started = self._generate(prompt.shape[1], 2, prompt)
        self.first_token, self.second_token = clock.times[0] - started, clock.times[1] - clock.times[0]

    def _generate(self, length: int, tokens: int, prompt: Tensor | None = None) -> tuple[DecodeClock, float]:
        clock = DecodeClock()
        if prompt is None:  # `generate` takes the last token alone where the others are cached
            prompt = torch.ones(self.batch, int(length), dtype=torch.long, device=self.model.device)
        options: dict[str, Any] = {}
        if self.way.is_compiled:
            # `generate` compiles by itself on a GPU; on a CPU it has to be asked.
            options["compile_config"] = CompileConfig(mode="default")
            options["compile_config"]._compile_all_devices = True
        else:
            options["disable_compile"] = True  # a static cache on a GPU would be compiled unasked
        started = time.perf_counter()
        self.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            past_key_values=self.cache,
            max_new_tokens=tokens,
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([clock]),
            **options,
        )
        self.cache_bytes = max(self.cache_bytes, bytes_of(self.cache))
        return clock, started


@dataclass
class GraphRunner(Runner):
    """Replays a graph of one step, made before the first; it is checked against eager steps then."""

    wrong: str | None = None  # how replays differ from the steps they stand for

    def __post_init__(self) -> None:
        self._replay: Callable[[], Tensor] | None = None

    def decode(self, tokens: int) -> list[float]:
        """Seconds of each of `tokens` replays, waited for one by one as `generate` does."""
        if self._replay is None:
            self._replay = self._captured()
        seconds = []
        for _ in range(tokens):
            started = time.perf_counter()
            self._replay()
            if self.model.device.type == "cuda":
                torch.cuda.synchronize(self.model.device)
            seconds.append(time.perf_counter() - started)
        return seconds

    def _captured(self) -> Callable[[], Tensor]:
        step = graphed.Step(self.model, self.cache, self.batch)
        for _ in range(graphed.WARM_UP):
            step()
        self.cache_bytes = bytes_of(self.cache)
        replay = graphed.replayed(step)
        self.wrong = graphed.replay_error(step, replay, tolerance(self.model.dtype))
        return replay


def tolerance(dtype: torch.dtype) -> float:
    """The relative error that rounding explains, in the order of sums that each path has."""
    return 1e-4 if dtype == torch.float32 else 3e-2


def make_runner(
    model: PreTrainedModel, way: Way, context: int, batch: int, room: int, knobs: dict[str, Any], prefill: bool
) -> Runner:
    """A runner whose cache holds `context` positions, and has room for `room` more where its size is fixed.

    Args:
        prefill: compute a prompt of random tokens, and time it. Otherwise the cache is filled with random K and V.
    """
    if way.bare:
        context = BARE_CONTEXT
    if way.is_graphed:
        room += graphed.WARM_UP + graphed.CHECKED
    own = twin(model)
    if way.patched:
        sparq.patch(own, **knobs, **({} if way.sparse else {"dense_layers": ALL_LAYERS}))
    cache = empty_cache(model, way, context + room)
    runner = (GraphRunner if way.is_graphed else Runner)(way, own, cache, batch)
    if prefill:
        vocabulary = model.config.get_text_config(decoder=True).vocab_size
        generator = torch.Generator().manual_seed(1)
        prompt = torch.randint(vocabulary, (batch, context), generator=generator)
        runner.prefill(prompt.to(model.device))
    else:
        fill(cache, model, context, batch, room if way.patched and not way.is_static else 0)
    return runner


def empty_cache(model: PreTrainedModel, way: Way, size: int) -> Cache:
    config = model.config
    if way.is_static:
        if model.device.type == "cuda":
            size = -(-size // SIZE_STEP) * SIZE_STEP
        return StaticCache(config=config, max_cache_len=size)
    cache = DynamicCache(config=config)
    if way.patched:
        upgrade(cache)  # filled as it is used: what it would adopt, it would first have to copy
    return cache


def fill(cache: Cache, model: PreTrainedModel, context: int, batch: int, spare: int = 0) -> None:
    """With random keys and values, the same for every cache but for what `spare` draws.

    Args:
        spare: positions that storage shall have room for, as it has between two growths. At its very end SparQ's would
            grow: true, but once in a quarter of the tokens that are cached (`memory.py` counts both states).
    """
    heads = Heads.of(model.config)
    generator = torch.Generator(model.device).manual_seed(1)
    for index in range(model.config.get_text_config(decoder=True).num_hidden_layers):
        shape = (batch, heads.kv, context + spare, heads.head_dim)
        key, value = (torch.randn(shape, generator=generator, dtype=model.dtype, device=model.device) for _ in range(2))
        cache.update(key, value, index)
        if spare:
            cache.layers[index].crop(-spare)


def take_turns(runners: list[Runner], rounds: int, tokens: int, tick: Callable[[str], None]) -> None:
    """Let every runner decode `tokens` tokens, round after round, so that a drifting machine favours none.

    The first of several rounds is not counted: it faults memory in, makes SparQ's index, compiles; later ones are what
    a long answer sees. The order turns around each time, lest one way always come after the one that heats the caches.
    """
    for round_ in range(rounds):
        for runner in runners if round_ % 2 else runners[::-1]:
            tick(runner.way.name)
            measured = runner.decode(tokens)
            if round_ or rounds == 1:
                runner.seconds += measured


def steps_of(rounds: int, tokens: int) -> int:
    """Tokens that each cache takes up in `take_turns`, with those that `generate` makes before the first one timed."""
    return rounds * (tokens + 1)


def bytes_of(cache: Cache) -> int:
    """Storage held: K, V, slack to grow, and SparQ's index."""
    return sum(_layer_bytes(layer) for layer in cache.layers)


def _layer_bytes(layer: Any) -> int:
    if isinstance(layer, (SparqLayer, SparqStaticLayer)):
        return layer.allocated_bytes
    held: Iterable[Tensor | None] = (getattr(layer, name, None) for name in ("keys", "values"))
    return sum(tensor.untyped_storage().nbytes() for tensor in held if tensor is not None)
