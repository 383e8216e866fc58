"""The ways to generate that SparQ is compared with, and its own; whether it is right; and the turns that they take."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from gpu_stages import graph_step
from harness import BARE_CONTEXT, SPARQ
from models import Heads
from torch import Tensor
from transformers import CompileConfig, DynamicCache, PreTrainedModel, StaticCache, StoppingCriteriaList
from transformers.cache_utils import Cache
from workload import Inputs, Shape, attended, decode, relative_error

import sparq
from sparq.cache import SparqLayer, upgrade
from sparq.cache_argument import cache_name, generate_cache_name
from sparq.static_cache import SparqStaticLayer
from sparq.timing import DecodeClock

ALL_LAYERS = 1 << 30
SIZE_STEP = 64  # of a static cache on a GPU: each layer of stock's would copy a mask of any length to make it fit
PROMPT, STEPS = 96, 8  # tokens of the short context on which the patched model is tried


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
SPARQ_WAY = Way(SPARQ, patched=True, sparse=True)
COMPILED = Way("stock compiled", is_static=True, is_compiled=True)
SPARQ_COMPILED = Way("SparQ compiled", is_static=True, is_compiled=True, patched=True, sparse=True)
GRAPHED = Way("stock static, graph", is_static=True, is_graphed=True)
SPARQ_GRAPHED = Way("SparQ static, graph", is_static=True, is_graphed=True, patched=True, sparse=True)

WAYS = (LAYERS_ALONE, DYNAMIC, STATIC, OWN_CACHE, SPARQ_WAY)
COMPILED_WAYS = (COMPILED, SPARQ_COMPILED)
GRAPHED_WAYS = (GRAPHED, SPARQ_GRAPHED)


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """The same model with the very same weights: what is done to one's modules does not touch the other's."""
    weights = {id(tensor): tensor for tensor in model.parameters()}
    other = copy.deepcopy(model, weights)
    for module, copied in zip(model.modules(), other.modules(), strict=True):
        if module._compiled_call_impl is not None:  # which no copy keeps
            copied.compile()
    return other


@dataclass
class Runner:
    """One way, ready to decode token after token from its own cache."""

    way: Way
    model: PreTrainedModel
    cache: Cache
    batch: int
    first_tokens: dict[str, float] = field(default_factory=dict)  # seconds, where the prompt was computed
    seconds: list[float] = field(default_factory=list)  # of each decode step that counts
    cache_bytes: int = 0  # the most that the cache has held between two steps

    def decode(self, tokens: int) -> list[float]:
        """Seconds of each of `tokens` decode steps of `generate`, which goes on from the cache."""
        # `generate` takes the last token alone where the others are cached.
        length = int(self.cache.get_seq_length()) + 1
        prompt = torch.ones(self.batch, length, dtype=torch.long, device=self.model.device)
        return self._generate(prompt, tokens + 1).decode_seconds()

    def prefill(self, prompt: Tensor) -> None:
        """Compute a prompt [batch, length] into the empty cache, and time the first two tokens after it."""
        started = time.perf_counter()
        first, second = self._generate(prompt, 2).times
        self.first_tokens = {"first token s": first - started, "second s": second - first}

    def _generate(self, prompt: Tensor, tokens: int) -> DecodeClock:
        clock = DecodeClock()
        options: dict[str, Any] = {"disable_compile": True}  # a static cache on a GPU would be compiled unasked
        if self.way.is_compiled:
            # `generate` compiles by itself on a GPU; on a CPU it has to be asked.
            options = {"compile_config": CompileConfig(mode="default")}
            options["compile_config"]._compile_all_devices = True
        self.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            **{generate_cache_name(): self.cache},
            max_new_tokens=tokens,
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([clock]),
            **options,
        )
        self.cache_bytes = max(self.cache_bytes, bytes_of(self.cache))
        return clock


@dataclass
class GraphRunner(Runner):
    """Replays a graph of one step, made before the first; it is checked against eager steps then."""

    wrong: str | None = None  # how replays differ from the steps they stand for
    _replay: Callable[[], Tensor] | None = None

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
        step = graph_step.Step(self.model, self.cache, self.batch)
        for _ in range(graph_step.WARM_UP):
            step()
        self.cache_bytes = bytes_of(self.cache)
        replay = graph_step.replayed(step)
        self.wrong = graph_step.replay_error(step, replay, tolerance(self.model.dtype))
        return replay


def make_runner(
    model: PreTrainedModel, way: Way, context: int, batch: int, room: int, knobs: dict[str, Any], prefill: bool = False
) -> Runner:
    """A runner whose cache holds `context` positions, and has room for `room` more where its size is fixed.

    prefill: compute a prompt of random tokens, and time it. Otherwise the cache is filled with random K and V.
    """
    if way.bare:
        context = BARE_CONTEXT
    if way.is_graphed:
        room += graph_step.WARM_UP + graph_step.CHECKED
    own = twin(model)
    if way.patched:
        sparq.patch(own, **knobs, **({} if way.sparse else {"dense_layers": ALL_LAYERS}))
    if way.is_static:
        multiple = SIZE_STEP if model.device.type == "cuda" else 1
        cache: Cache = StaticCache(config=model.config, max_cache_len=-(-(context + room) // multiple) * multiple)
    else:
        cache = DynamicCache(config=model.config)
        if way.patched:
            upgrade(cache)  # filled as it is used: what it would adopt, it would first have to copy
    runner = (GraphRunner if way.is_graphed else Runner)(way, own, cache, batch)
    if prefill:
        vocabulary = model.config.get_text_config(decoder=True).vocab_size
        generator = torch.Generator().manual_seed(1)
        prompt = torch.randint(vocabulary, (batch, context), generator=generator)
        runner.prefill(prompt.to(model.device))
    else:
        fill(cache, model, context, batch, room if way.patched and not way.is_static else 0)
    return runner


def fill(cache: Cache, model: PreTrainedModel, context: int, batch: int, spare: int = 0) -> None:
    """With random keys and values, the same for every cache but for what `spare` draws.

    spare: positions that storage shall have room for, as it has between two growths. At its very end SparQ's would
    grow: true, but once in a quarter of the tokens that are cached (`memory.py` counts both states).
    """
    heads = Heads.of(model.config)
    generator = torch.Generator(model.device).manual_seed(1)
    how: dict[str, Any] = dict(generator=generator, dtype=model.dtype, device=model.device)
    for index in range(model.config.get_text_config(decoder=True).num_hidden_layers):
        key, value = (torch.randn(batch, heads.kv, context + spare, heads.head_dim, **how) for _ in range(2))
        cache.update(key, value, index)
        if spare:
            cache.layers[index].crop(-spare)


def take_turns(runners: list[Runner], rounds: int, tokens: int) -> None:
    """Let every runner decode `tokens` tokens, round after round, so that a drifting machine favours none.

    The first of several rounds is not counted: it faults memory in, makes SparQ's index, compiles; later ones are what
    a long answer sees. The order turns around each time, lest one way always come after the one that heats the caches.
    """
    for round_ in range(rounds):
        for runner in runners if round_ % 2 else runners[::-1]:
            measured = runner.decode(tokens)
            if round_ or rounds == 1:
                runner.seconds += measured


def steps_of(rounds: int, tokens: int) -> int:
    """Tokens that each cache takes up in `take_turns`, with those that `generate` makes before the first one timed."""
    return rounds * (tokens + 1)


def bytes_of(cache: Cache) -> int:
    """Storage held: K, V, slack to grow, and SparQ's index."""
    total = 0
    layers: list[Any] = cache.layers
    for layer in layers:
        if isinstance(layer, (SparqLayer, SparqStaticLayer)):
            total += layer.allocated_bytes
        else:
            held = (getattr(layer, name, None) for name in ("keys", "values"))
            total += sum(tensor.untyped_storage().nbytes() for tensor in held if tensor is not None)
    return total


def tolerance(dtype: torch.dtype) -> float:
    """The relative error that rounding explains, in the order of sums that each path has."""
    return 1e-4 if dtype == torch.float32 else 3e-2


def check(model: PreTrainedModel, context: int, batch: int, knobs: dict[str, Any]) -> None:
    """Raise SystemExit, with the reason in one line, unless the patched model and the operator are right on a cache of
    the size that is going to be measured: a wrong answer is not fast."""
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
    given: dict[str, Any] = {cache_name(type(model).forward): DynamicCache(config=model.config)}
    logits = [model(tokens[:, :PROMPT], logits_to_keep=1, **given).logits[:, -1]]
    for token in tokens[:, PROMPT:].split(1, dim=1):
        logits.append(model(token, **given).logits[:, -1])
    return torch.stack(logits, 1)


def wrong_operator(model: PreTrainedModel, context: int, batch: int, config: sparq.SparqConfig) -> str | None:
    """How the operator differs from the reference in float64 on a cache of this shape, or None."""
    heads, dtype, device = Heads.of(model.config), model.dtype, model.device
    budget = config.budget(config.components(heads.head_dim))
    shape = Shape(batch, heads.query, heads.kv, heads.head_dim, context, budget.r, budget.k, config.index)
    generator = torch.Generator(device).manual_seed(3)

    def draw(*shape: int) -> Tensor:  # where it is needed, as it is needed: a GPU's cache is drawn on no host
        return torch.randn(shape, generator=generator, dtype=dtype, device=device)

    rows = (batch, heads.kv, context, heads.head_dim)
    key, value = draw(*rows), draw(*rows)
    x = Inputs.of(draw(batch, heads.query, 1, heads.head_dim), key, value, config.index)
    knobs = {name: x for name, x in budget._asdict().items() if name not in ("r", "k")}
    found = decode(shape, x, return_positions=config.index != "full", **knobs)
    if config.index == "full":
        # Row by row: one in float64 takes enough memory.
        right = torch.cat([decode(shape, x.row(index, torch.float64), **knobs).output for index in range(batch)])
    else:  # scores of codes are rounded: right for what was chosen
        right = attended(shape, x, found)
    error = relative_error(found.output, right)
    if not error < tolerance(dtype):
        return f"the operator differs from the reference by {error:.1e} at context {context}, {dtype}"
    return None
