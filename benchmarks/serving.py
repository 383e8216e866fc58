"""Tokens per second of vLLM on a CPU: its own attention against SparQ's, by cached positions and requests at once.

    make test-vllm   # makes .venv-vllm
    .venv-vllm/bin/python benchmarks/serving.py --contexts 4096 16384 65536 --batches 1 8

The model has true layers of Llama-3.2-1B with random weights, and a vocabulary of 256. Two engines, each in a process
of its own, take turns with a few steps each: what is timed is a step of the engine, scheduler and sampling included.
Before that both must give the same tokens for real prompts where k covers them. Long prompts are not computed: vLLM
takes them for computed, and their keys and values are random numbers, so that no query stops early ("mass": 1.0).
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from harness import SPARQ, Measured, Row, finish, parser_of, positive, progress
from rich.console import Console
from rich.table import Table

OWN = "vLLM's own"
WAYS = (OWN, SPARQ)
KNOBS = {"mass": 1.0}
COVERING = {"k": 4096, "min_length": 0}
PROMPTS = (90, 700, 1500)  # real ones
VOCABULARY = 256
KV_HEADS, HEAD_DIM = 8, 64


class Engine:
    """A process with an engine in it, asked by name."""

    def __init__(self, *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, *arguments))
        self.process.start()

    def ask(self, name: str, *arguments: Any) -> Any:
        self.connection.send((name, arguments))
        kind, answer = self.connection.recv()
        if kind == "error":
            raise SystemExit(answer)
        return answer

    def close(self) -> None:
        self.connection.send(("stop", ()))
        self.process.join(30)
        self.process.kill()


def _serve(connection: Connection, *arguments: Any) -> None:
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR", VLLM_CPU_OMP_THREADS_BIND="nobind"
    )
    os.environ.update(HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", TQDM_DISABLE="1")
    os.environ["THP_MEM_ALLOC_ENABLE"] = "1"  # as SparQ has it, for both
    os.dup2(2, 1)  # vLLM writes to stdout
    try:
        worker = _Worker(*arguments)
        while (message := connection.recv())[0] != "stop":
            connection.send(("answer", getattr(worker, message[0])(*message[1])))
    except Exception as error:
        connection.send(("error", f"{type(error).__name__}: {error}"))
        raise


class _Worker:
    def __init__(
        self,
        folder: str,
        way: str,
        dtype: str,
        layers: int,
        knobs: dict[str, Any],
        longest: int,
        requests: int,
        full: int,
    ) -> None:
        from vllm import LLM

        own: dict[str, Any] = {}
        if way == SPARQ:
            own = {"attention_backend": "CUSTOM", "additional_config": {"sparq": knobs}}
        tokens = longest * full * 5 // 4 + 16384
        each = 2 * KV_HEADS * HEAD_DIM * (2 if dtype == "bfloat16" else 4) * layers
        self.llm = LLM(
            model=folder,
            skip_tokenizer_init=True,
            dtype=dtype,
            max_model_len=longest + 1024,
            max_num_seqs=requests,
            max_num_batched_tokens=8192,
            enforce_eager=True,
            enable_prefix_caching=False,
            kv_cache_memory_bytes=int(tokens * each * 1.2),
            **own,
        )
        self.count = 0

    def tokens(self) -> list[list[int]]:
        """Of real prompts."""
        from vllm import SamplingParams

        numbers = random.Random(0)
        asked = [{"prompt_token_ids": [numbers.randrange(3, VOCABULARY) for _ in range(n)]} for n in PROMPTS]
        params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, detokenize=False)
        return [list(out.outputs[0].token_ids) for out in self.llm.generate(asked, params, use_tqdm=False)]

    def skip_prompts(self) -> None:
        """From now on keys and values of prompts are random."""
        self.llm.apply_model(_skip_prompts)

    def fill(self, context: int, requests: int) -> None:
        """Requests of `context` cached positions that are being decoded, and no others."""
        from vllm import SamplingParams

        engine = self.llm.llm_engine
        engine.abort_request([f"r{i}" for i in range(self.count)])
        params = SamplingParams(temperature=0, max_tokens=900, ignore_eos=True, detokenize=False)
        for _ in range(requests):
            engine.add_request(f"r{self.count}", {"prompt_token_ids": [5] * context}, params)
            self.count += 1
        decoding: set[str] = set()
        while len(decoding) < requests:
            decoding |= {output.request_id for output in engine.step()}

    def steps(self, count: int) -> list[float]:
        found = []
        for _ in range(count):
            begin = time.perf_counter()
            self.llm.llm_engine.step()
            found.append(time.perf_counter() - begin)
        return found

    def report(self) -> dict[str, Any]:
        from sparq.vllm.report import TOTALS

        return TOTALS.to_dict()


def _skip_prompts(model: Any) -> None:
    import torch
    from vllm.forward_context import get_forward_context

    forward = model.forward

    def skipping(input_ids: Any, positions: Any, *rest: Any, **named: Any) -> Any:
        context = get_forward_context()
        metadata = context.attn_metadata
        if not metadata or next(iter(metadata.values())).max_query_len <= 1:
            return forward(input_ids, positions, *rest, **named)
        for name in metadata:
            layer, slots = context.no_compile_layers[name], context.slot_mapping[name]
            shape = (len(slots), layer.num_kv_heads, layer.head_size)
            key, value = (torch.randn(shape, dtype=layer.kv_cache.dtype) for _ in range(2))
            layer.impl.do_kv_cache_update(layer, key, value, layer.kv_cache, slots)
        return torch.randn(len(input_ids), model.config.hidden_size, dtype=layer.kv_cache.dtype)

    model.forward = skipping


def make_model(folder: Path, layers: int) -> None:
    import torch
    from models import llama
    from transformers import AutoModelForCausalLM

    config = llama("llama-3.2-1b")
    config.num_hidden_layers, config.vocab_size, config.max_position_embeddings = layers, VOCABULARY, 1 << 20
    config.bos_token_id = config.eos_token_id = None
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--contexts", type=positive, nargs="+", default=[256, 4096, 16384, 65536])
    parser.add_argument("--batches", type=positive, nargs="+", default=[1, 8], help="requests at once")
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--layers", type=positive, default=2)
    parser.add_argument("--ratio", type=float, default=8)
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--steps", type=positive, default=6, help="of the engine, in a turn")
    parser.add_argument("--most", type=float, default=4.5, help="GB of K and V of all requests together, in an engine")
    return parser.parse_args(arguments)


def measure(args: argparse.Namespace, folder: Path, dtype: str) -> list[Row]:
    each = 2 * KV_HEADS * HEAD_DIM * (2 if dtype == "bfloat16" else 4) * args.layers  # bytes of a position
    cases = [(n, batch) for batch in args.batches for n in args.contexts if n * batch * each <= 1e9 * args.most]
    if not cases:
        return []
    longest, requests = max(n for n, _ in cases), max(batch for _, batch in cases)
    room = max(n * batch for n, batch in cases) // requests
    tokens = []
    for way in WAYS:
        engine = Engine(str(folder), way, dtype, args.layers, COVERING, max(PROMPTS), len(PROMPTS), len(PROMPTS))
        tokens.append(engine.ask("tokens"))
        engine.close()
    wrong = None if tokens[0] == tokens[1] else "not the same tokens where k covers the context"
    knobs = KNOBS | {"ratio": args.ratio}
    full = max(1, -(-room * requests // longest))  # requests of the longest context that would take as much room
    engines = {way: Engine(str(folder), way, dtype, args.layers, knobs, longest, requests, full) for way in WAYS}
    rows = []
    for engine in engines.values():
        engine.ask("skip_prompts")
    for context, batch in progress(cases, dtype):
        row = Row({"dtype": dtype, "context": context, "batch": batch}, {way: Measured(wrong=wrong) for way in WAYS})
        for engine in engines.values():
            engine.ask("fill", context, batch)
            engine.ask("steps", 2)
        for turn in range(args.rounds):
            for way in WAYS if turn % 2 else WAYS[::-1]:
                row.ways[way].seconds += engines[way].ask("steps", args.steps)
        rows.append(row)
    for way, engine in engines.items():
        print(way, engine.ask("report"), file=sys.stderr)
        engine.close()
    return rows


def show(rows: list[Row], layers: int) -> None:
    table = Table(title=f"vLLM on the CPU: Llama-3.2-1B, {layers} of 16 layers")
    for name in ("dtype", "cached", "requests", *(f"{way}: tokens/s" for way in WAYS), "ratio (10–90 %)"):
        table.add_column(name, justify="right")
    for row in rows:
        case, ratio = row.case, row.ratio(OWN)
        speeds = [f"{case['batch'] / row.ways[way].median:.1f}" for way in WAYS]
        said = "wrong" if ratio is None else f"{ratio.value:.2f}x ({ratio.low:.2f}–{ratio.high:.2f})"
        table.add_row(case["dtype"], f"{case['context']:,}", str(case["batch"]), *speeds, said)
    Console(width=110).print(table)


def main(arguments: list[str]) -> int:
    args = parse(arguments)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as directory:
        make_model(Path(directory), args.layers)
        for dtype in args.dtypes:
            rows += measure(args, Path(directory), dtype)
    finish(args, rows)
    show(rows, args.layers)
    return 0 if all(row.ratio(OWN) is not None for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
