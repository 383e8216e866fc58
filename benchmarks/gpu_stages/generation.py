"""Stage `generation`: whole models of true shape, with random weights and caches that are drawn on the device.

The ways take turns, round after round, as they do on a CPU; where the caches of all of them do not fit side by side,
each is made anew for its turn. The rows that matter most come first, the JSON file is written again after each turn,
and a cell says what there was no time or no memory for.
"""

from __future__ import annotations

import functools
import gc
import time
import warnings
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import sparq_kernels
import torch
from gpu_stages.clocks import clock_of
from gpu_stages.failures import NO_TIME, OUT_OF_MEMORY, reason
from gpu_stages.stage import Stage
from harness import Measured, Ratio, Row, machine
from models import Heads, Subject, build, from_config
from opponents import (
    DYNAMIC,
    GRAPHED,
    OWN_CACHE,
    SPARQ_GRAPHED,
    STATIC,
    GraphRunner,
    Runner,
    Way,
    bytes_of,
    make_runner,
    wrong_model,
    wrong_operator,
)
from tables import UNKNOWN, Grid
from transformers import LlamaConfig

import sparq

SPARQ_DYNAMIC = Way("SparQ dynamic", patched=True, sparse=True)
GPU_WAYS = (DYNAMIC, SPARQ_GRAPHED, GRAPHED, SPARQ_DYNAMIC, STATIC, OWN_CACHE)
# as tables show them; SparQ's cache kept dense says what is gained without any sparsity
NAMES = [way.name for way in (DYNAMIC, STATIC, GRAPHED, OWN_CACHE, SPARQ_DYNAMIC, SPARQ_GRAPHED)]
STOCKS, SPARSE = [way.name for way in GPU_WAYS if way.is_stock], [way.name for way in GPU_WAYS if way.sparse]

LARGE, SMALL = "llama-3-8b", "llama-3.2-1b"
# model, cached, batch: what matters most first, and each model made but twice
ROWS = (
    *((LARGE, cached, 1) for cached in (65536, 131072, 16384)),
    *((SMALL, cached, 1) for cached in (65536, 131072, 16384, 4096)),
    *((SMALL, cached, 8) for cached in (16384, 65536, 4096, 131072)),
    *((LARGE, cached, batch) for cached, batch in ((16384, 8), (4096, 1), (4096, 8), (65536, 8), (131072, 8))),
)
DTYPE = "bfloat16"
ROUNDS, TOKENS = 2, 10
# Sparse from the first token on: where that begins to pay, the rows are to show. All k, as random keys have no sharp
# attention, of which a mass would read the most that it may.
KNOBS = dict(ratio=8, mass=1.0, min_length=0)

# A dry run: next to nothing, sparse on a CPU, too.
TINY = "tiny"
TINY_ROWS = ((TINY, 600, 1), (TINY, 300, 2))
TINY_KNOBS = dict(r=4, k=32, min_length=0)

WARM_UP = 3  # tokens of each new runner that do not count
MEMORY_SHARE = 0.8  # of what is free, for all caches side by side: steps need the rest
SPARQ_SHARE = 1.2  # a cache with codes of K, and a bit
PATIENCE = 2  # times the longest turn of late has to be left for the next: they get longer with the context
FIRST_TURN = 2.5  # seconds; before there has been any
OUT_OF_THE_RUNNING = 3  # times the fastest: so slow a way is timed just a little
FEW = 3  # tokens


def tiny() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )


@dataclass
class ModelRow(Row):
    """All ways at one context and batch of a model."""

    ways: dict[str, Measured] = field(default_factory=lambda: {name: Measured() for name in NAMES})
    operator: str = ""  # the implementation that served
    are_caches_kept: bool = True  # side by side; or else each way's is made anew for its turn
    wrong: str | None = None
    unchecked: str | None = None  # why nobody knows
    sparse_steps: int = 0  # of SparQ's ways, summed over layers
    dense_steps: dict[str, int] = field(default_factory=dict)  # why, and how many
    mean_alpha: float | None = None

    def __str__(self) -> str:
        return f"{self.case['model']}, {self.case['cached']:,} cached, batch {self.case['batch']}"

    @property
    def best_stock(self) -> str | None:
        return self.fastest(STOCKS)

    @property
    def best_sparq(self) -> str | None:
        return self.fastest(SPARSE)

    @property
    def speedup(self) -> Ratio | None:
        """SparQ's best against stock's best; None where either is not known, or where SparQ is wrong, has no kernel or
        has made no sparse step."""
        left_out = [name for name in STOCKS if self.ways[name].missing not in (None, OUT_OF_MEMORY)]
        if self.wrong or self.unchecked or self.operator == "reference" or not self.sparse_steps or left_out:
            return None
        return self.ratio(self.best_stock, self.best_sparq)

    def json(self) -> dict[str, Any]:
        names = ("operator", "are_caches_kept", "wrong", "unchecked", "sparse_steps", "dense_steps", "mean_alpha")
        best = dict(best_stock=self.best_stock, best_sparq=self.best_sparq, speedup=self.speedup and vars(self.speedup))
        return {**super().json(), **{name: getattr(self, name) for name in names}, **best}


class TimeLeft:
    """How much time is left, and whether it is enough for one turn more."""

    def __init__(self, end: float) -> None:
        self._end = end
        self._latest: deque[float] = deque([FIRST_TURN], maxlen=2 * len(GPU_WAYS))  # kernels are compiled in the first

    def suffices(self) -> bool:
        return time.monotonic() + PATIENCE * max(self._latest) < self._end

    def note(self, started: float) -> None:
        self._latest.append(time.monotonic() - started)


def fits(subject: Subject, context: int, batch: int) -> bool:
    """Whether the caches of all ways fit side by side beside the model."""
    if subject.model.device.type != "cuda":
        return True
    heads = Heads.of(subject.model.config)
    one = 2 * subject.layers * batch * heads.kv * context * heads.head_dim * subject.model.dtype.itemsize
    needed = one * sum(SPARQ_SHARE if way.sparse else 1 for way in GPU_WAYS)
    return needed < MEMORY_SHARE * clock_of("cuda").free_bytes()


def release() -> None:
    """Give back what nobody holds: a patched model and its hooks hold each other."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Turns:
    """The turns of all ways of one row.  `done` is called after each."""

    def __init__(
        self, subject: Subject, row: ModelRow, knobs: dict[str, Any], clock: TimeLeft, done: Callable[[], object]
    ) -> None:
        self.subject, self.row, self.knobs, self.clock, self.done = subject, row, knobs, clock, done
        self.runners: dict[Way, Runner] = {}

    def take(self) -> None:
        for round_ in range(ROUNDS):
            for way in GPU_WAYS if round_ % 2 == 0 else GPU_WAYS[::-1]:
                cell = self.row.ways[way.name]
                if cell.missing:
                    continue
                if not self.clock.suffices():
                    cell.missing = None if cell.seconds else NO_TIME
                    continue
                started = time.monotonic()
                self._turn(way, cell)
                self.clock.note(started)
                self.done()
        self._drop_all()

    def _turn(self, way: Way, cell: Measured) -> None:
        why = self._try(way, cell)
        if why == OUT_OF_MEMORY and self.runners:
            # Others hold what this way needs; from now on nobody does.
            self.row.are_caches_kept = False
            why = self._try(way, cell)
        if why is not None and not cell.seconds:
            cell.missing = why

    def _try(self, way: Way, cell: Measured) -> str | None:
        """One turn; why there was none."""
        if not self.row.are_caches_kept:
            self._drop_all()
        why = None
        try:
            self._measure(way, cell)
        except Exception as error:  # a graph that cannot be captured: the other ways still matter
            why = reason(error)
        if why is not None:
            self.runners.pop(way, None)
            release()
        return why

    def _measure(self, way: Way, cell: Measured) -> None:
        row, tokens, model = self.row, TOKENS, self.subject.model
        runner = self.runners.get(way)
        is_new = runner is None
        if runner is None:
            # `generate` makes a token before the first one timed.
            room = WARM_UP + 1 + ROUNDS * (tokens + 1)
            runner = make_runner(model, way, row.case["cached"], row.case["batch"], room, self.knobs)
            self.runners[way] = runner
        held, rise = bytes_of(runner.cache), Rise(model.device)
        warm = runner.decode(WARM_UP) if is_new else cell.seconds
        first = row.fastest(NAMES)
        if first is not None and min(warm) > OUT_OF_THE_RUNNING * row.ways[first].median:
            tokens = min(tokens, FEW)
        seconds = runner.decode(tokens)
        if isinstance(runner, GraphRunner) and runner.wrong:
            row.wrong = f"{way.name}: {runner.wrong}"
        cell.seconds += seconds
        cell.facts["cache_bytes"] = runner.cache_bytes
        if rise.bytes is not None:
            peak = weight_bytes(self.subject) + held + rise.bytes  # of a step, with weights and this way's cache
            cell.facts["peak_bytes"] = max(cell.facts.get("peak_bytes", 0), peak)

    def _drop_all(self) -> None:
        for way, runner in self.runners.items():
            if way.sparse:
                self._count(runner)
        self.runners.clear()
        release()

    def _count(self, runner: Runner) -> None:
        total = sparq.report(runner.model).total
        self.row.sparse_steps += total.sparse_steps
        for why, steps in total.dense_steps.items():
            self.row.dense_steps[why] = self.row.dense_steps.get(why, 0) + steps
        self.row.mean_alpha = total.mean_alpha


class Rise:
    """By how much the memory in use exceeds, at its height, what is in use now."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)

    @property
    def bytes(self) -> int | None:
        if self._device.type != "cuda":
            return None
        return torch.cuda.max_memory_allocated(self._device) - self._before


def weight_bytes(subject: Subject) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in subject.model.parameters())


def measure(
    subject: Subject,
    row: ModelRow,
    knobs: dict[str, Any],
    clock: TimeLeft,
    checked: Callable[[], str | None],
    done: Callable[[], object],
) -> None:
    """Fill the row.  `checked`: what is wrong with the patched model, if anything is."""
    cached, batch, started = row.case["cached"], row.case["batch"], time.monotonic()
    try:
        row.wrong = checked() or wrong_operator(subject.model, cached, batch, sparq.SparqConfig(**knobs))
    except Exception as error:
        row.unchecked = reason(error)
    release()
    clock.note(started)
    row.are_caches_kept = fits(subject, cached, batch)
    Turns(subject, row, knobs, clock, done).take()


def leave_out(row: ModelRow, why: str) -> None:
    for cell in row.ways.values():
        cell.missing = why


def main(stage: Stage) -> None:
    clock, knobs = TimeLeft(stage.ends), TINY_KNOBS if stage.is_dry else KNOBS
    operator = sparq_kernels.backend(stage.device, getattr(torch, DTYPE))
    rows = [
        ModelRow({"model": model, "dtype": DTYPE, "cached": cached, "batch": batch}, operator=operator)
        for model, cached, batch in (TINY_ROWS if stage.is_dry else ROWS)
    ]
    facts = clock_of(stage.device).properties()
    stage.save(machine={**machine(), **facts}, settings=dict(knobs=knobs, rounds=ROUNDS, tokens=TOKENS), rows=[])
    # What everybody knows would push the rows out of sight: names that changed, and the dense steps of the check.
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message="sparq: decode steps are dense while k covers")
    if stage.is_dry:
        torch.set_num_threads(1)  # handing so little work to threads takes longer than the work
    gc.freeze()  # so that looking for what nobody holds, ten times a row, does not look through PyTorch each time
    subject: Subject | None = None
    for count, row in enumerate(rows, 1):
        done = functools.partial(report, stage, rows[:count])  # after every turn: a lent machine may go before the last
        if not clock.suffices():
            leave_out(row, NO_TIME)
        else:
            try:
                if subject is None or subject.name != row.case["model"]:
                    subject = None  # one model in memory, not two
                    release()
                    subject = shaped(row.case["model"], stage.device)
                    checked = functools.cache(functools.partial(wrong_model, subject.model))
            except Exception as error:
                leave_out(row, reason(error))
            else:
                measure(subject, row, knobs, clock, checked, done)
        done()
        print(f"{row}: {', '.join(f'{name} {cell_of(row, name)}' for name in NAMES)} ms; {against(row)}", flush=True)
    gc.unfreeze()


def shaped(name: str, device: str) -> Subject:
    """All layers and the whole vocabulary."""
    if name != TINY:
        return build(name, getattr(torch, DTYPE), None, device)
    config = tiny()
    model = from_config(config, getattr(torch, DTYPE), device)
    return Subject(model, name, config.num_hidden_layers, config.num_hidden_layers, 300, 300, True)


def report(stage: Stage, rows: list[ModelRow]) -> None:
    times, memory = grids(rows)
    stage.set_tables(times, hidden=(memory,))
    stage.save(
        rows=[row.json() for row in rows],
        wrong=[f"{row}: {row.wrong}" for row in rows if row.wrong],
        said=f"{len(rows)} rows",
    )


def grids(rows: list[ModelRow]) -> tuple[Grid, Grid]:
    columns = ("model", "cached", "batch")
    said = [(row, (row.case["model"], f"{row.case['cached']:,}", str(row.case["batch"]))) for row in rows]
    times = [
        (
            *cells,
            *(cell_of(row, name) for name in NAMES),
            row.best_stock or UNKNOWN,
            against(row),
            "side by side" if row.are_caches_kept else "one at a time",
        )
        for row, cells in said
    ]
    memory = [(*cells, *(gibibytes(row.ways[name]) for name in NAMES)) for row, cells in said]
    best = ("best stock", "SparQ's best against it", "caches")
    return (
        Grid("Generation on the GPU, random weights, ms a token", (*columns, *NAMES, *best), times, left=3),
        Grid("Peak memory of a step, weights included (of it the cache), GiB", (*columns, *NAMES), memory, left=3),
    )


def cell_of(row: ModelRow, name: str) -> str:
    way = row.ways[name]
    return f"{1e3 * way.median:.2f}" if way.seconds else way.missing or UNKNOWN


def against(row: ModelRow) -> str:
    if row.wrong:
        return f"WRONG: {row.wrong}"
    if row.unchecked:
        return f"not checked: {row.unchecked}"
    if row.operator == "reference":
        return "no kernel"
    ratio = row.speedup
    return UNKNOWN if ratio is None else f"{ratio.value:.2f}x" + " unclear" * ratio.unclear


def gibibytes(way: Measured) -> str:
    if not way.seconds:
        return way.missing or UNKNOWN
    peak = f"{way.facts['peak_bytes'] / 2**30:.1f}" if "peak_bytes" in way.facts else UNKNOWN
    return f"{peak} ({way.facts['cache_bytes'] / 2**30:.1f})"
