"""Milliseconds per layer and token of llama.cpp on the CPU, and of SparQ on the same weights, by cached positions.

    pip install llama-cpp-python gguf
    python benchmarks/llamacpp.py --contexts 512 4096 16384 65536 --dtypes float32 float16 --flash-attention on off

The model is the one of benchmarks/generation.py: true layers of Llama-3.2-1B with random weights, and a vocabulary of
256. llama.cpp loads it from a GGUF file, through the low-level interface of llama-cpp-python; weights and cache have
the dtype named. Unless its logits agree with those of transformers' LlamaForCausalLM, nothing is measured.

A step of llama.cpp is one `llama_decode` of one token; one of SparQ, what a user of `generate` waits for, with its
Python. llama.cpp runs in a process of its own and waits while SparQ runs, and the other way round: in every round each
way decodes a few tokens at each context. The first round is not counted. llama.cpp's cache is filled with the keys and
values of a few random tokens, moved to further and further positions, SparQ's with random numbers.

"Layers alone" is a step with 16 cached positions. The slope with the context, ms per layer per 1,000 cached positions,
is that of the line of least squares through the medians of every round, layers alone among them; its standard error is
that of the residuals, and so includes whatever is not a line.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from harness import (
    BARE_CONTEXT,
    SPARQ,
    Line,
    Measured,
    Row,
    at_least_2,
    document,
    parser_of,
    positive,
    progress_of,
    version,
    write_json,
)
from models import add_knobs, build, knobs_of
from opponents import SPARQ_WAY, check, make_runner
from tables import llamacpp_grid, show
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

NEEDED = {"llama_cpp": "llama-cpp-python", "gguf": "gguf"}  # modules: packages
LLAMA_CPP = {True: "llama.cpp, flash", False: "llama.cpp, no flash"}
# Of the logits, relative, against float32 arithmetic on the same weights: llama.cpp rounds activations to the dtype of
# the weights before every product.
TOLERANCE = {"float32": 1e-2, "float16": 2e-2}
PROMPT = 48
GGUF_NAMES = {  # transformers' name within a layer: GGUF's
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}

Rounds = dict[str, dict[int, list[list[float]]]]  # by way and context, of each counted round: seconds of its steps


class LlamaCpp:
    """The worker's methods, called in its process; use it as a context manager."""

    def __init__(self) -> None:
        command = [sys.executable, str(Path(__file__).with_name("llamacpp_worker.py"))]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.stdin.close()
        self.process.wait()

    def __call__(self, name: str, **arguments: object) -> Any:
        print(json.dumps({"do": name, **arguments}), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"llama.cpp ended with status {self.process.wait()} while asked to {name}")
        return json.loads(line)


def disagreement(model: LlamaForCausalLM, llama_cpp: LlamaCpp, flash: bool) -> float:
    """Relative error of llama.cpp's logits for a random prompt."""
    generator = random.Random(2)
    tokens = [generator.randrange(model.config.vocab_size) for _ in range(PROMPT)]
    theirs = torch.tensor(llama_cpp("logits", flash_attention=flash, tokens=tokens))
    with torch.no_grad():
        ours = copy.deepcopy(model).float()(torch.tensor([tokens])).logits[0]
    return float((theirs - ours).norm() / ours.norm())


def check_same_work(model: LlamaForCausalLM, llama_cpp: LlamaCpp, dtype: str, flash: bool) -> float:
    """The disagreement; raise if it is too large."""
    error = disagreement(model, llama_cpp, flash)
    if not error < TOLERANCE[dtype]:
        raise SystemExit(f"{LLAMA_CPP[flash]}, {dtype}: logits are wrong by {error:.1e}, nothing is measured")
    return error


def measure(
    dtype: str, args: argparse.Namespace, llama_cpp: LlamaCpp, tick: Callable[[str], object]
) -> tuple[dict[str, float], Rounds]:
    """By how much llama.cpp's logits differ, and all times."""
    knobs = knobs_of(args)
    model = build("llama-3.2-1b", getattr(torch, dtype), args.layers).model
    check(model, max(args.contexts), batch=1, knobs=knobs)
    contexts = sorted({BARE_CONTEXT, *args.contexts})
    flashes = {LLAMA_CPP[flag == "on"]: flag == "on" for flag in args.flash_attention}
    with tempfile.TemporaryDirectory() as folder:
        tick(f"{dtype}: GGUF file")
        path = Path(folder) / "model.gguf"
        write_gguf(model, path)
        room, flags = contexts[-1] + args.tokens + 1, list(flashes.values())
        llama_cpp("load", path=str(path), dtype=dtype, flash_attention=flags, room=room, threads=args.threads)
    errors = {way: check_same_work(model, llama_cpp, dtype, flash) for way, flash in flashes.items()}
    for context in contexts:
        for way, flash in flashes.items():
            tick(f"{dtype}: filling {way}, {context:,} positions")
            llama_cpp("fill", flash_attention=flash, length=context)
    room = (args.rounds + 1) * (args.tokens + 1)
    runners = {context: make_runner(model, SPARQ_WAY, context, 1, room, knobs) for context in contexts}
    rounds: Rounds = {way: {context: [] for context in contexts} for way in (*flashes, SPARQ)}
    for round_ in range(args.rounds + 1):
        for context in contexts:
            tick(f"{dtype}: round {round_}, {context:,} positions")
            how = dict(length=context, tokens=args.tokens)
            measured = {way: llama_cpp("times", flash_attention=flash, **how) for way, flash in flashes.items()}
            measured[SPARQ] = runners[context].decode(args.tokens)
            if round_:
                for way, seconds in measured.items():
                    rounds[way][context].append(seconds)
    return errors, rounds


def rows_of(dtype: str, rounds: Rounds) -> list[Row]:
    rows = [Row({"dtype": dtype, "cached": context, "batch": 1}) for context in rounds[SPARQ]]
    for row in rows:
        for way, by_context in rounds.items():
            seconds = [second for steps in by_context[row.case["cached"]] for second in steps]
            row.ways[way] = Measured(seconds)
    return rows


def lines_of(dtype: str, rounds: Rounds, layers: int) -> list[dict[str, Any]]:
    """Through the medians of all rounds: milliseconds per layer and 1,000 cached positions."""
    found = []
    for way, by_context in rounds.items():
        medians = [
            (context, statistics.median(one)) for context, of_context in by_context.items() for one in of_context
        ]
        line = Line.through([(context / 1000, 1e3 * seconds / layers) for context, seconds in medians])
        found.append({"dtype": dtype, "way": way, "unit": "1,000 cached tokens", **asdict(line)})
    return found


def permute(weight: Tensor, heads: int) -> Tensor:
    """The rows of a projection to queries or keys, [heads * head_dim, hidden], in the order of llama.cpp's rotation.

    transformers rotates component i together with i + head_dim / 2, llama.cpp 2 i with 2 i + 1 (LlamaModel.permute in
    its converter). `heads` are the KV heads where the weight makes keys.
    """
    rows, hidden = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, hidden).transpose(1, 2).reshape(rows, hidden)


def tensors(model: LlamaForCausalLM) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under GGUF's name, in the model's dtype but for the norms: llama.cpp wants those in float32."""
    config, state = model.config, model.state_dict()
    yield "token_embd.weight", state["model.embed_tokens.weight"]
    for layer in range(config.num_hidden_layers):
        for name, gguf_name in GGUF_NAMES.items():
            weight = state[f"model.layers.{layer}.{name}.weight"]
            if gguf_name == "attn_q":
                weight = permute(weight, config.num_attention_heads)
            elif gguf_name == "attn_k":
                weight = permute(weight, config.num_key_value_heads)
            yield f"blk.{layer}.{gguf_name}.weight", weight.float() if weight.dim() == 1 else weight
    yield "output_norm.weight", state["model.norm.weight"].float()
    yield "output.weight", state["lm_head.weight"]


def write_gguf(model: LlamaForCausalLM, path: Path) -> None:
    """Write a model of float32 or float16, with default rotary embeddings and no biases, to `path`.

    llama.cpp's own converter reads a folder with a tokenizer, which a model of random weights has none of: this writes
    the tensors and the least metadata, and declares that there is no vocabulary (tokens go in as numbers).

    Raises:
        ValueError: where the model has what this does not write.
    """
    import gguf

    config: LlamaConfig = model.config
    rope = config.rope_parameters
    if rope["rope_type"] != "default" or config.attention_bias or config.mlp_bias:
        raise ValueError("only default rotary embeddings and layers without biases can be written")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    for name, tensor in tensors(model):
        writer.add_tensor(name, tensor.detach().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def parse() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--contexts", type=positive, nargs="+", default=[512, 4096, 16384, 65536])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "float16"], choices=list(TOLERANCE))
    parser.add_argument("--flash-attention", nargs="+", default=["on", "off"], choices=["on", "off"])
    parser.add_argument("--layers", type=positive, default=2)
    parser.add_argument("--rounds", type=at_least_2, default=4, help="counted; one more goes ahead")
    parser.add_argument("--tokens", type=positive, default=12, help="decode steps of each way in each round")
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads(), help="of llama.cpp and of PyTorch")
    add_knobs(parser)
    args = parser.parse_args()
    if min(args.contexts) <= BARE_CONTEXT:
        parser.error(f"contexts must be larger than the {BARE_CONTEXT} positions of 'layers alone'")
    if packages := [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]:
        parser.error(f"not installed: pip install {' '.join(packages)}")
    return args


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    load_before = os.getloadavg()
    rows: list[Row] = []
    lines: list[dict[str, Any]] = []
    differ = {}
    contexts = len({BARE_CONTEXT, *args.contexts})
    steps = len(args.dtypes) * (1 + contexts * (len(args.flash_attention) + args.rounds + 1))
    with progress_of(steps) as tick:
        for dtype in args.dtypes:
            with LlamaCpp() as llama_cpp:
                system = llama_cpp("system")
                differ[dtype], rounds = measure(dtype, args, llama_cpp, tick)
            rows += rows_of(dtype, rounds)
            lines += lines_of(dtype, rounds, args.layers)
    versions = {package: version(package) for package in (*NEEDED.values(), "transformers")}
    facts = dict(versions=versions, llama_cpp_system=system, logits_differ_by=differ, lines=lines)
    result = document(args, rows, **facts)
    result["machine"]["load averages"] = [load_before, os.getloadavg()]
    show(llamacpp_grid(result))
    for dtype, errors in differ.items():
        print(f"{dtype}: logits differ by " + ", ".join(f"{error:.0e} ({way})" for way, error in errors.items()))
    if args.json:
        write_json(args.json, result)


if __name__ == "__main__":
    main()
