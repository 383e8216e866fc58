"""Milliseconds a layer that the linear layers alone take, by the ways to hold their weights on a CPU.

    python benchmarks/linear_layers.py --json linear-layers.json
    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 python benchmarks/linear_layers.py --ways bfloat16 torchao

The linear layers of Llama-3.2-1B's layers with random weights, for a token, a batch and a prompt; more of them than the
processor's cache holds, whatever the weights' bits. The ways take turns, and each one's output is compared with that of
float32. Ways whose package is missing are left out, and said to be.
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from collections.abc import Callable
from functools import partial

import torch
from harness import Measured, Row, finish, parser_of, positive, progress, version
from models import compile_linear
from tables import linear_layers_grid, show
from torch import Tensor, nn

HIDDEN, INTERMEDIATE, KV = 2048, 8192, 512  # of Llama-3.2-1B
BATCH, PROMPT = 8, 512  # tokens
TOO_SLOW = 0.1  # seconds a layer: such a way gets no more turns than make a median
Made = Callable[[nn.Module], nn.Module]


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        new = partial(nn.Linear, bias=False)
        self.q, self.k, self.v, self.o = new(HIDDEN, HIDDEN), new(HIDDEN, KV), new(HIDDEN, KV), new(HIDDEN, HIDDEN)
        self.gate, self.up = new(HIDDEN, INTERMEDIATE), new(HIDDEN, INTERMEDIATE)
        self.down = new(INTERMEDIATE, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.o(self.q(x)) + self.k(x).repeat(1, 1, 4) + self.v(x).repeat(1, 1, 4)
        return x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))


def torchao(model: nn.Module, config: str) -> nn.Module:
    import torchao.quantization as ao

    ao.quantize_(model, getattr(ao, config)())
    return model


def dynamic(model: nn.Module) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def bitsandbytes(model: nn.Module, bits: int) -> nn.Module:
    """As transformers does it with its `BitsAndBytesConfig`."""
    from bitsandbytes import nn as bnb

    for parent in list(model.modules()):
        for name, old in list(parent.named_children()):
            if isinstance(old, nn.Linear):
                shape = (old.in_features, old.out_features, False)
                if bits == 8:
                    new: nn.Module = bnb.Linear8bitLt(*shape, has_fp16_weights=False, threshold=6.0)
                    new.weight = bnb.Int8Params(old.weight.data, requires_grad=False, has_fp16_weights=False)
                else:
                    new = bnb.Linear4bit(*shape, compute_dtype=old.weight.dtype, quant_type="nf4")
                    new.weight = bnb.Params4bit(old.weight.data, requires_grad=False, quant_type="nf4")
                setattr(parent, name, new.to("cpu"))  # this move quantises
    return model.eval()


def quanto(model: nn.Module) -> nn.Module:
    import optimum.quanto as quanto

    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)
    return model


F32, BF16 = torch.float32, torch.bfloat16
WEIGHT_ONLY, BOTH = "Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"
WAYS: dict[str, tuple[torch.dtype, str | None, Made]] = {  # dtype, package, what is done to the model
    "float32": (F32, None, lambda model: model),
    "bfloat16": (BF16, None, lambda model: model),
    "torchao int8, compiled": (BF16, "torchao", lambda model: compile_linear(torchao(model, WEIGHT_ONLY))),
    "torchao int8, not compiled": (BF16, "torchao", lambda model: torchao(model, WEIGHT_ONLY)),
    "torchao int8, compiled, float32": (F32, "torchao", lambda model: compile_linear(torchao(model, WEIGHT_ONLY))),
    "torchao int8 activations too, compiled": (BF16, "torchao", lambda model: compile_linear(torchao(model, BOTH))),
    "torchao int8 activations too, not compiled": (BF16, "torchao", lambda model: torchao(model, BOTH)),
    "torch dynamic int8, float32": (F32, None, dynamic),
    "bitsandbytes int8": (BF16, "bitsandbytes", lambda model: bitsandbytes(model, 8)),
    "bitsandbytes nf4": (BF16, "bitsandbytes", lambda model: bitsandbytes(model, 4)),
    "quanto int8": (BF16, "optimum-quanto", quanto),
    "quanto int8, float32": (F32, "optimum-quanto", quanto),
}


@torch.no_grad()
def measure(args: argparse.Namespace) -> list[Row]:
    torch.manual_seed(0)
    base = nn.Sequential(*(Layer() for _ in range(args.layers))).eval()
    inputs = [torch.randn(batch, tokens, HIDDEN) for batch, tokens in ((1, 1), (BATCH, 1), (1, PROMPT))]
    token, expected = inputs[0], base(inputs[0])
    models: dict[str, nn.Module] = {}
    rows = [Row({"batch": x.shape[0], "tokens": x.shape[1]}) for x in inputs]
    for name in progress(args.ways, "quantising, compiling"):
        dtype, package, made = WAYS[name]
        if package is not None and version(package) is None:
            for row in rows:
                row.ways[name] = Measured(missing=f"{package} is not installed")
            continue
        models[name] = made(copy.deepcopy(base).to(dtype))
        error = (models[name](token.to(dtype)) - expected).norm() / expected.norm()
        for row in rows:
            row.ways[name] = Measured(facts={"error": float(error)})
    for row, x, rounds in zip(rows, inputs, (args.rounds, args.rounds, 3), strict=True):
        for round_ in progress(range(rounds + 1), f"{x.shape[0]} x {x.shape[1]} tokens"):
            for name, model in models.items():
                times = row.ways[name].seconds
                if len(times) >= 3 and min(times) > TOO_SLOW * args.layers:
                    continue
                given = x.to(WAYS[name][0])
                started = time.perf_counter()
                model(given)
                if round_:  # the first one compiles
                    times.append(time.perf_counter() - started)
    return rows


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--layers", type=positive, default=6)
    parser.add_argument("--rounds", type=positive, default=20)
    parser.add_argument("--ways", nargs="+", default=[""], help="only those whose name begins so")
    args = parser.parse_args()
    args.ways = [name for name in WAYS if name.startswith(tuple(args.ways))]
    if not args.ways:
        parser.error(f"--ways must begin one of {', '.join(WAYS)}")
    warnings.filterwarnings("ignore")
    # All ways compile one function of torchao's; what is over the limit would run uncompiled.
    torch._dynamo.config.recompile_limit = 64
    packages = {package: version(package) for _, package, _ in WAYS.values() if package}
    show(linear_layers_grid(finish(args, measure(args), packages=packages)))


if __name__ == "__main__":
    main()
