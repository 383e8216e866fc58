"""Generation on a lent GPU, a few minutes long: `generation.py --gpu`.

Whole models of true shape, with random weights and caches that are drawn on the device. The ways take turns, round
after round, as they do on a CPU; where the caches of all of them do not fit side by side, each is made anew for its
turn. The rows that matter most come first, the JSON file is written again after each turn, and a cell says what there
was no time or no memory for.
"""

from __future__ import annotations

import argparse
import functools
import gc
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import device_time
import sparq_kernels
import torch
from agreement import wrong_model, wrong_operator
from common import machine
from model_options import knobs_of
from model_shapes import Heads, Subject, build, from_config
from report import Grid, write_json
from rich.console import Console
from transformers import LlamaConfig
from turns import Ratio, median_and_deciles
from ways import DYNAMIC, GRAPHED, OWN_CACHE, SPARQ_GRAPHED, STATIC, GraphRunner, Runner, Way, bytes_of, make_runner

import sparq

SPARQ_DYNAMIC = Way("SparQ dynamic", patched=True, sparse=True)
GPU_WAYS = (DYNAMIC, SPARQ_GRAPHED, GRAPHED, SPARQ_DYNAMIC, STATIC, OWN_CACHE)
# as tables show them; SparQ's cache kept dense says what is gained without any sparsity
NAMES = [way.name for way in (DYNAMIC, STATIC, GRAPHED, OWN_CACHE, SPARQ_DYNAMIC, SPARQ_GRAPHED)]
OUT_OF_MEMORY, NO_TIME = "out of memory", "no time"

LARGE, SMALL = "llama-3-8b", "llama-3.2-1b"
# model, cached, batch: what matters most first, and each model made but twice
ROWS = (
    *((LARGE, cached, 1) for cached in (65536, 131072, 16384)),
    *((SMALL, cached, 1) for cached in (65536, 131072, 16384, 4096)),
    *((SMALL, cached, 8) for cached in (16384, 65536, 4096, 131072)),
    *((LARGE, cached, batch) for cached, batch in ((16384, 8), (4096, 1), (4096, 8), (65536, 8), (131072, 8))),
)
FULL = dict(dtypes=["bfloat16"], rounds=2, tokens=10)

TINY = "tiny"
TINY_ROWS = ((TINY, 600, 1), (TINY, 300, 2))
TINY_KNOBS = dict(r=4, k=32, min_length=0)  # sparse on a CPU, too

WARM_UP = 3  # tokens of each new runner that do not count
MEMORY_SHARE = 0.8  # of what is free, for all caches side by side: steps need the rest
SPARQ_SHARE = 1.5  # a cache with the component copy of K
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
class Cell:
    """What one way was measured to do, or why it was not."""

    way: Way
    seconds: list[float] = field(default_factory=list)  # of each counted step, one token for every batch row
    cache_bytes: int | None = None
    peak_bytes: int | None = None  # of a step, weights and this way's cache included; on a GPU
    missing: str | None = None

    @property
    def median(self) -> float:
        return median_and_deciles(self.seconds)[0]

    def json(self) -> dict[str, object]:
        timed: dict[str, object] = dict(seconds_per_token=None, deciles=None)
        if self.seconds:
            median, deciles = median_and_deciles(self.seconds)
            timed = dict(seconds_per_token=median, deciles=deciles)
        return dict(
            **timed,
            steps=len(self.seconds),
            cache_bytes=self.cache_bytes,
            peak_bytes=self.peak_bytes,
            missing=self.missing,
        )


@dataclass
class Row:
    """All ways at one context and batch of a model."""

    model: str
    dtype: str
    context: int
    batch: int
    operator: str  # the implementation that served
    cells: dict[str, Cell] = field(default_factory=lambda: {way.name: Cell(way) for way in GPU_WAYS})
    are_caches_kept: bool = True  # side by side; or else each way's is made anew for its turn
    wrong: str | None = None
    unchecked: str | None = None  # why nobody knows
    sparse_steps: int = 0  # of SparQ's ways, summed over layers
    dense_steps: dict[str, int] = field(default_factory=dict)  # why, and how many
    mean_alpha: float | None = None

    @property
    def best_stock(self) -> Cell | None:
        return fastest(cell for cell in self.cells.values() if cell.way.is_stock)

    @property
    def best_sparq(self) -> Cell | None:
        return fastest(cell for cell in self.cells.values() if cell.way.sparse)

    @property
    def speedup(self) -> Ratio | None:
        """SparQ's best against stock's best; None where either is not known, or where SparQ is wrong, has no kernel or
        has made no sparse step."""
        stock, ours = self.best_stock, self.best_sparq
        left_out = [c for c in self.cells.values() if c.way.is_stock and c.missing not in (None, OUT_OF_MEMORY)]
        no_claim = self.wrong or self.unchecked or self.operator == "reference" or not self.sparse_steps
        if no_claim or left_out or stock is None or ours is None:
            return None
        count = min(len(stock.seconds), len(ours.seconds))  # the time may have run out amid a round
        return Ratio.of(stock.seconds[:count], ours.seconds[:count])

    def json(self) -> dict[str, object]:
        stock, ours, speedup = self.best_stock, self.best_sparq, self.speedup
        own = {name: value for name, value in vars(self).items() if name != "cells"}
        return dict(
            **own,
            ways={name: self.cells[name].json() for name in NAMES},
            best_stock=None if stock is None else stock.way.name,
            best_sparq=None if ours is None else ours.way.name,
            speedup=None if speedup is None else vars(speedup),
        )


def fastest(cells: Iterable[Cell]) -> Cell | None:
    return min((cell for cell in cells if cell.seconds), key=lambda cell: cell.median, default=None)


class Clock:
    """How much time is left, and whether it is enough for one turn more."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds
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
    return needed < MEMORY_SHARE * device_time.free_bytes()


def release() -> None:
    """Give back what nobody holds: a patched model and its hooks hold each other."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Turns:
    """The turns of all ways of one row.  `done` is called after each."""

    def __init__(
        self, subject: Subject, row: Row, args: argparse.Namespace, clock: Clock, done: Callable[[], None]
    ) -> None:
        self.subject, self.row, self.args, self.clock, self.done = subject, row, args, clock, done
        self.runners: dict[str, Runner] = {}

    def take(self) -> None:
        for round_ in range(self.args.rounds):
            for way in GPU_WAYS if round_ % 2 == 0 else GPU_WAYS[::-1]:
                cell = self.row.cells[way.name]
                if cell.missing:
                    continue
                if not self.clock.suffices():
                    cell.missing = None if cell.seconds else NO_TIME
                    continue
                started = time.monotonic()
                self._turn(cell)
                self.clock.note(started)
                self.done()
        self._drop_all()

    def _turn(self, cell: Cell) -> None:
        why = self._try(cell)
        if why == OUT_OF_MEMORY and self.runners:
            # Others hold what this way needs; from now on nobody does.
            self.row.are_caches_kept = False
            why = self._try(cell)
        if why is not None and not cell.seconds:
            cell.missing = why

    def _try(self, cell: Cell) -> str | None:
        """One turn; why there was none."""
        if not self.row.are_caches_kept:
            self._drop_all()
        why = None
        try:
            self._measure(cell)
        except Exception as error:  # a graph that cannot be captured: the other ways still matter
            why = reason(error)
        if why is not None:
            self.runners.pop(cell.way.name, None)
            release()
        return why

    def _measure(self, cell: Cell) -> None:
        row, tokens, device = self.row, self.args.tokens, self.subject.model.device
        runner = self.runners.get(cell.way.name)
        is_new = runner is None
        if runner is None:
            # `generate` makes a token before the first one timed.
            room = WARM_UP + 1 + self.args.rounds * (tokens + 1)
            knobs = knobs_for(self.args)
            runner = make_runner(self.subject.model, cell.way, row.context, row.batch, room, knobs, prefill=False)
            self.runners[cell.way.name] = runner
        held, rise = bytes_of(runner.cache), Rise(device)
        warm = runner.decode(WARM_UP) if is_new else cell.seconds
        first = fastest(row.cells.values())
        if first is not None and min(warm) > OUT_OF_THE_RUNNING * first.median:
            tokens = min(tokens, FEW)
        seconds = runner.decode(tokens)
        if isinstance(runner, GraphRunner) and runner.wrong:
            row.wrong = f"{cell.way.name}: {runner.wrong}"
        cell.seconds += seconds
        cell.cache_bytes = runner.cache_bytes
        if rise.bytes is not None:
            cell.peak_bytes = max(cell.peak_bytes or 0, weight_bytes(self.subject) + held + rise.bytes)

    def _drop_all(self) -> None:
        for runner in self.runners.values():
            if runner.way.sparse:
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


_told: set[str] = set()


def reason(error: BaseException) -> str:
    """In one line; the first of a kind is printed with where it came from."""
    chain: list[BaseException] = [error]  # a failed capture raises once more when it ends
    while chain[-1].__context__ is not None:
        chain.append(chain[-1].__context__)
    if any(isinstance(each, torch.OutOfMemoryError) for each in chain):
        return OUT_OF_MEMORY
    lines = str(chain[-1]).strip().splitlines()
    why = f"{type(chain[-1]).__name__}: {lines[0][:120] if lines else ''}"
    if why not in _told:
        _told.add(why)
        traceback.print_exception(error)
    return why


def measure(
    subject: Subject,
    row: Row,
    args: argparse.Namespace,
    clock: Clock,
    checked: Callable[[], str | None],
    done: Callable[[], None],
) -> None:
    """Fill the row.  `checked`: what is wrong with the patched model, if anything is."""
    config, started = sparq.SparqConfig(**knobs_for(args)), time.monotonic()
    try:
        row.wrong = checked() or wrong_operator(subject.model, row.context, row.batch, config)
    except Exception as error:
        row.unchecked = reason(error)
    release()
    clock.note(started)
    row.are_caches_kept = fits(subject, row.context, row.batch)
    Turns(subject, row, args, clock, done).take()


def leave_out(row: Row, why: str) -> None:
    for cell in row.cells.values():
        cell.missing = why


def run(args: argparse.Namespace) -> bool:
    """Measure and report; whether nothing was found wrong."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(f"no CUDA device: torch {torch.__version__} sees none; --device cpu --tiny tries the command")
    clock, console, dtype = Clock(args.seconds), Console(width=200), args.dtypes[0]
    facts = device_time.properties() if args.device == "cuda" else {}
    operator = sparq_kernels.backend(args.device, getattr(torch, dtype))
    settings = dict(knobs=knobs_for(args), rounds=args.rounds, tokens=args.tokens, seconds=args.seconds, tiny=args.tiny)
    result: dict[str, object] = dict(machine={**machine(), **facts}, operator=operator, settings=settings)
    rows = [Row(model, dtype, context, batch, operator) for model, context, batch in chosen(args)]

    def write(count: int) -> None:
        """After every turn: a lent machine may go before the last one."""
        result["rows"] = [row.json() for row in rows[:count]]
        times, memory = grids(rows[:count])
        result["tables"] = [{**asdict(times), "printed": True}, {**asdict(memory), "printed": False}]
        result["wrong"] = [f"{setting(row)}: {row.wrong}" for row in rows[:count] if row.wrong]
        if args.json:
            write_json(args.json, result)

    write(0)
    # What everybody knows would push the rows out of sight: names that changed, and the dense steps of the check.
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message="sparq: decode steps are dense while k covers")
    if args.tiny:
        torch.set_num_threads(1)  # handing so little work to threads takes longer than the work
    gc.freeze()  # so that looking for what nobody holds, ten times a row, does not look through PyTorch each time
    subject: Subject | None = None
    for count, row in enumerate(rows, 1):
        if not clock.suffices():
            leave_out(row, NO_TIME)
        else:
            try:
                if subject is None or subject.name != row.model:
                    subject = None  # one model in memory, not two
                    release()
                    subject = shaped(row.model, dtype, args.device)
                    checked = functools.cache(functools.partial(wrong_model, subject.model))
            except Exception as error:
                leave_out(row, reason(error))
            else:
                measure(subject, row, args, clock, checked, functools.partial(write, count))
        write(count)
        console.print(told(row), highlight=False, markup=False, soft_wrap=True)
    gc.unfreeze()
    return not any(row.wrong for row in rows)


def chosen(args: argparse.Namespace) -> tuple[tuple[str, int, int], ...]:
    return TINY_ROWS if args.tiny else ROWS


def knobs_for(args: argparse.Namespace) -> dict[str, Any]:
    """Sparse from the first cached token on: where that begins to pay on a GPU is what the rows are to show."""
    return TINY_KNOBS if args.tiny else {**knobs_of(args), "min_length": 0}


def shaped(name: str, dtype: str, device: str) -> Subject:
    """All layers and the whole vocabulary."""
    if name != TINY:
        return build(name, getattr(torch, dtype), None, device)
    config = tiny()
    model = from_config(config, getattr(torch, dtype), device)
    return Subject(model, name, config.num_hidden_layers, config.num_hidden_layers, 300, 300, True)


def told(row: Row) -> str:
    """What to watch while the rest is measured."""
    ways = ", ".join(f"{name} {milliseconds(row.cells[name])}" for name in NAMES)
    return f"{setting(row)}: {ways} ms; {against(row)}"


def setting(row: Row) -> str:
    return f"{row.model}, {row.context:,} cached, batch {row.batch}"


def milliseconds(cell: Cell) -> str:
    return f"{1e3 * cell.median:.2f}" if cell.seconds else cell.missing or "–"


def against(row: Row) -> str:
    if row.wrong:
        return f"WRONG: {row.wrong}"
    if row.unchecked:
        return f"not checked: {row.unchecked}"
    if row.operator == "reference":
        return "no kernel"
    return "–" if row.speedup is None else str(row.speedup)


def grids(rows: list[Row]) -> list[Grid]:
    columns = ("model", "cached", "batch")
    said = [(row, (row.model, f"{row.context:,}", str(row.batch))) for row in rows]
    times = Grid(
        "Generation on the GPU, random weights, ms a token",
        (*columns, *NAMES, "best stock", "SparQ's best against it", "caches"),
        [
            (
                *cells,
                *(milliseconds(row.cells[name]) for name in NAMES),
                "–" if row.best_stock is None else row.best_stock.way.name,
                against(row),
                "side by side" if row.are_caches_kept else "one at a time",
            )
            for row, cells in said
        ],
        left=3,
    )
    memory = Grid(
        "Peak memory of a step, weights included (of it the cache), GiB",
        (*columns, *NAMES),
        [(*cells, *(gibibytes(row.cells[name]) for name in NAMES)) for row, cells in said],
        left=3,
    )
    return [times, memory]


def gibibytes(cell: Cell) -> str:
    if not cell.seconds or cell.cache_bytes is None:
        return cell.missing or "–"
    peak = "–" if cell.peak_bytes is None else f"{cell.peak_bytes / 2**30:.1f}"
    return f"{peak} ({cell.cache_bytes / 2**30:.1f})"
