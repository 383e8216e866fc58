"""Milliseconds per layer and token of llama.cpp on the CPU, and of SparQ on the same weights, by cached positions.

    pip install llama-cpp-python gguf
    python benchmarks/llamacpp.py --contexts 512 4096 16384 65536 --dtypes float32 float16

The model has true layers of Llama-3.2-1B with random weights, and a vocabulary of 256. llama.cpp loads it from a GGUF
file, through the low-level interface of llama-cpp-python; weights and cache have the dtype named. Unless its logits
agree with those of transformers' LlamaForCausalLM, nothing is measured.

A step of llama.cpp is one `llama_decode` of one token; one of SparQ, what a user of `generate` waits for, with its
Python. They take turns, llama.cpp in a process of its own: in every round each way decodes a few tokens at each
context. llama.cpp's cache is filled with the keys and values of a few random tokens, moved to further and further
positions, SparQ's with random numbers.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from harness import (
    BARE_CONTEXT,
    SPARQ,
    Measured,
    Row,
    finish,
    line_of,
    parser_of,
    positive,
    progress,
    version,
)
from models import build
from opponents import SPARQ_WAY, check, make_runner, steps_of
from tables import llamacpp_grid, show
from torch import Tensor
from transformers import LlamaForCausalLM
from workload import DTYPES, relative_error

NEEDED = {"llama_cpp": "llama-cpp-python", "gguf": "gguf"}  # modules: packages
LLAMA_CPP = {"llama.cpp, flash": True, "llama.cpp, no flash": False}  # ways: whether with flash attention
# Of the logits, relative, against float32 arithmetic on the same weights: llama.cpp rounds activations to the dtype of
# the weights before every product.
TOLERANCE = {"float32": 1e-2, "float16": 2e-2}
PROMPT = 48
KNOBS = {"mass": 1.0}  # all k: random keys have no sharp attention
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


class LlamaCpp(subprocess.Popen):
    """llamacpp_worker.py in its process, with a model and room for so many positions; use it as a context manager."""

    def __init__(self, model: LlamaForCausalLM, dtype: str, room: int) -> None:
        worker = str(Path(__file__).with_name("llamacpp_worker.py"))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.gguf"
            write_gguf(model, path)
            command = [sys.executable, worker, str(path), dtype, str(room), str(torch.get_num_threads())]
            super().__init__(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            self.system = self._answer()

    def __call__(self, name: str, way: str, **arguments: object) -> Any:
        """What the method of the worker's Context gives."""
        print(json.dumps({"do": name, "flash": LLAMA_CPP[way], **arguments}), file=self.stdin, flush=True)
        return self._answer()

    def _answer(self) -> Any:
        line = self.stdout.readline()
        if not line:
            raise SystemExit(f"llama.cpp ended with status {self.wait()}")
        return json.loads(line)


def disagreement(model: LlamaForCausalLM, llama_cpp: LlamaCpp, dtype: str, way: str) -> float:
    """Relative error of llama.cpp's logits for a random prompt; raise if it is too large."""
    generator = random.Random(2)
    tokens = [generator.randrange(model.config.vocab_size) for _ in range(PROMPT)]
    theirs = torch.tensor(llama_cpp("logits", way, tokens=tokens))
    with torch.no_grad():
        ours = copy.deepcopy(model).float()(torch.tensor([tokens])).logits[0]
    error = relative_error(theirs, ours)
    if not error < TOLERANCE[dtype]:
        raise SystemExit(f"{way}, {dtype}: logits are wrong by {error:.1e}, nothing is measured")
    return error


def measure(
    model: LlamaForCausalLM, llama_cpp: LlamaCpp, dtype: str, contexts: list[int], rounds: int, tokens: int
) -> list[Row]:
    """A row of each context; a round more than is counted goes ahead."""
    rows = [Row({"dtype": dtype, "cached": context, "batch": 1}) for context in contexts]
    runners = [make_runner(model, SPARQ_WAY, context, 1, steps_of(rounds + 1, tokens), KNOBS) for context in contexts]
    for row in rows:
        row.ways = {way: Measured() for way in (*LLAMA_CPP, SPARQ)}
        for way in LLAMA_CPP:
            llama_cpp("fill", way, length=row.case["cached"])
    for round_ in progress(range(rounds + 1), f"{dtype}, rounds"):
        for row, runner in zip(rows, runners, strict=True):
            length = row.case["cached"]
            measured = {way: llama_cpp("times", way, length=length, tokens=tokens) for way in LLAMA_CPP}
            measured[SPARQ] = runner.decode(tokens)
            if round_:
                for way, seconds in measured.items():
                    row.ways[way].seconds += seconds
    return rows


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
    """
    import gguf

    config = model.config
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
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
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
    parser.add_argument("--layers", type=positive, default=2)
    parser.add_argument("--rounds", type=positive, default=4, help="counted; one more goes ahead")
    parser.add_argument("--tokens", type=positive, default=12, help="decode steps of each way in each round")
    args = parser.parse_args()
    if min(args.contexts) <= BARE_CONTEXT:
        parser.error(f"contexts must be larger than the {BARE_CONTEXT} positions of 'layers alone'")
    if packages := [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]:
        parser.error(f"not installed: pip install {' '.join(packages)}")
    return args


def main() -> None:
    args = parse()
    contexts = sorted({BARE_CONTEXT, *args.contexts})
    rows: list[Row] = []
    lines: list[dict[str, Any]] = []
    differ: dict[str, dict[str, float]] = {}
    for dtype in args.dtypes:
        model = build("llama-3.2-1b", DTYPES[dtype], args.layers).model
        check(model, contexts[-1], batch=1, knobs=KNOBS)
        with LlamaCpp(model, dtype, contexts[-1] + args.tokens + 1) as llama_cpp:
            system = llama_cpp.system
            differ[dtype] = {way: disagreement(model, llama_cpp, dtype, way) for way in LLAMA_CPP}
            measured = measure(model, llama_cpp, dtype, contexts, args.rounds, args.tokens)
        for way in (*LLAMA_CPP, SPARQ):
            line = line_of(measured, way, "cached", 1000, args.layers)
            lines.append({"dtype": dtype, "way": way, "unit": "1,000 cached tokens", **line})
        rows += measured
    versions = {package: version(package) for package in NEEDED.values()}
    result = finish(args, rows, versions=versions, llama_cpp_system=system, logits_differ_by=differ, lines=lines)
    show(llamacpp_grid(result))
    for dtype, errors in differ.items():
        print(f"{dtype}: logits differ by " + ", ".join(f"{error:.0e} ({way})" for way, error in errors.items()))


if __name__ == "__main__":
    main()
