"""How far sparse decoding moves a model's predictions from those of dense attention, token by token.

    python evals/divergence.py MODEL --json evals/results/divergence.json
    python evals/divergence.py MODEL --weights int8 --lines "SparQ"

Real documents are read densely; the tokens that follow are fed one by one, each a decode step that chooses its own
positions (all in one forward pass: `sparq.generating.each_token_decides`). For every such token the distribution of the
next one is compared with that of dense attention on the same tokens: KL(dense, sparse) in bits, the change of the next
token's negative log-likelihood in bits, and whether the likeliest token is the same. *plain* goes on in the document;
*repeat* comes back to a passage from 35 % of it, which only a long look back can predict.

`--weights` measures all this on a model whose weights are held in another way (`WEIGHTS`), and has a row more: how far
these weights move dense attention's predictions from those of the float32 model, which reads the same.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from summary import less_at_16_bits, markdown, mean_and_error

LENGTHS = (1024, 2048, 4096, 7424)
TOKENS = 64  # scored after each context
CUE = 32  # tokens of a passage that come back before the scored ones, read densely
PASSAGE = 0.35  # of the context: where the passage stands that comes back
KINDS = ("plain", "repeat")
SPARQ_ONLY = (2048, 7424)  # tokens of context: in plain PyTorch the others take five times SparQ's time
WEIGHTS = ("float32", "bfloat16", "int8", "dynamic int8", "bitsandbytes int8", "bitsandbytes nf4")
PAPER = {"index": "full", "mass": 1.0, "mean_value": True}
COLOURS = {
    "SparQ": "#0072b2",
    "SparQ, all k": "#56b4e9",
    "SparQ, all components": "#332288",
    "the paper's SparQ": "#d55e00",
    "the paper's, mean value from 0.5": "#e69f00",
    "oracle top-k": "#009e73",
    "oracle top-p": "#66c2a5",
    "RocketKV, second stage": "#cc79a7",
    "pages of 8, per dimension": "#aa4499",
    "pages of 8, by norm": "#882255",
    "pages of 16, per dimension": "#ddaacc",
    "Quest": "#999933",
    "sinks + window": "#7f7f7f",
}


@dataclass(frozen=True, slots=True)
class Setting:
    """One way to decode."""

    line: str  # settings of one method that differ in how much they read
    name: str
    method: str
    knobs: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Measured:
    """One document, context and setting; means over the scored tokens."""

    document: str
    context: int
    kind: str
    line: str
    name: str
    kl: float  # bits
    kl_high: float  # 95 % of the tokens lie below it
    nll_change: float  # bits
    same: float  # share of equal first choices
    less: float  # bytes that dense attention reads, over those read
    alpha: float  # as the report gives it


def ratios(line: str, method: str, ratios: tuple[float, ...], **knobs: Any) -> list[Setting]:
    return [Setting(line, f"{line}, {ratio:g}x", method, {"ratio": ratio, **knobs}) for ratio in ratios]


def settings() -> list[Setting]:
    """What `make eval` compares."""
    found = ratios("the paper's SparQ", "sparq", (4, 8, 16), **PAPER)
    found += ratios("the paper's, mean value from 0.5", "sparq", (8,), **PAPER | {"mean_value": 0.5})
    found += ratios("SparQ", "sparq", (4, 8, 16))
    found += ratios("SparQ, all k", "sparq", (8,), mass=1.0)
    found += ratios("oracle top-k", "oracle", (8,))
    found.append(Setting("oracle top-p", "oracle top-p, 0.95", "oracle", {"mass": 0.95}))
    found += ratios("RocketKV, second stage", "rocket", (8,))
    found += ratios("pages of 8, per dimension", "pages", (5,), page=8, spread="dimension", first_pages=1)
    found += ratios("pages of 8, by norm", "pages", (7,), page=8, spread="norm", first_pages=1)
    found += ratios("Quest", "quest", (8,), first_pages=1)
    found += ratios("sinks + window", "window", (8,))
    return found


def more_settings() -> list[Setting]:
    """What is compared besides, more slowly."""
    found = ratios("the paper's SparQ", "sparq", (2,), **PAPER)
    found += ratios("the paper's SparQ, first layer dense", "sparq", (8,), dense_layers=1, **PAPER)
    found += ratios("the paper's, mean value from 0.5", "sparq", (4,), **PAPER | {"mean_value": 0.5})
    found += ratios("SparQ, first layer dense", "sparq", (8,), dense_layers=1)
    found += ratios("SparQ, all k", "sparq", (4, 16), mass=1.0)
    found.append(Setting("SparQ, all components", "SparQ, all components, k = S/16", "sparq", {"r": 64, "mass": 1.0}))
    found += ratios("oracle top-k", "oracle", (16,))
    found.append(Setting("oracle top-p", "oracle top-p, 0.98", "oracle", {"mass": 0.98}))
    found += ratios("RocketKV, second stage", "rocket", (4, 16))
    found += ratios("pages of 16, per dimension", "pages", (5,), page=16, spread="dimension", first_pages=1)
    found += ratios("pages of 8, by norm", "pages", (5,), page=8, spread="norm", first_pages=1)
    found += ratios("Quest", "quest", (4,), first_pages=1)
    found += ratios("oracle top-k, first layer dense", "oracle", (8,), dense_layers=1)
    found += ratios("RocketKV, second stage, first layer dense", "rocket", (8,), dense_layers=1)
    return found


def ablations() -> list[Setting]:
    """The defaults with one thing changed; in plain PyTorch (`sparq_variant`) what the operator does not do."""
    base = {"r": 32, "ratio": 8}
    found = [Setting("defaults", "the defaults (r = 32)", "sparq", base)]

    def change(line: str, name: str, method: str = "sparq", **knobs: Any) -> None:
        found.append(Setting(line, name, method, base | knobs))

    for r in (8, 16, 64):
        change("r", f"r = {r}", r=r)
    for mass in (0.8, 0.9, 0.97, 0.99):
        change("mass", f"mass {mass}", mass=mass)
    for ratio in (16, 4, 2):
        change("cap", f"at most S/{ratio}", ratio=ratio)
    for k_min in (32, 64):
        change("floor", f"at least {k_min}", k_min=k_min)
    change("floor", "at least 256", k=512, mass=0.95, k_min=256)
    for local in (0, 8, 128):
        change("window", f"local window of {local}", local=local)
    change("mean", "the mean value in every head", mean_value=True)
    change("mean", "no mean value", mean_value=False)
    for layers in (1, 2):
        change("layers", f"dense_layers={layers}", dense_layers=layers)
    change("index", "full index, r = 8", index="full", r=8)
    variant = {"mass": 0.95, "floor": 128, "ratio": 4}  # which has S/(2 ratio) for a cap
    change(
        "variant", "α of exact and approximate exponentials", "sparq_variant", index="int4", alpha="exact", **variant
    )
    change("variant", "groups of 64", "sparq_variant", index="int4", group=64, **variant)
    change("variant", "groups of 1,024", "sparq_variant", index="int4", group=1024, **variant)
    change("variant", "two bits, r = 64", "sparq_variant", index="int2", **variant | {"r": 64})
    return found


class Reader:
    """A model and its cache of one document; `weights` is one of `WEIGHTS`, as docs/cpu.md has them."""

    def __init__(self, folder: str, weights: str = "float32") -> None:
        import torch
        from transformers import AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()  # several processes' would fight over the terminal
        torch.set_num_threads(1)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.tokenizer.model_max_length = 10**9  # the whole document is tokenised, and cut
        self.model = load(folder, weights)

    def read(self, tokens: Any) -> None:
        """Densely, into a new cache."""
        from transformers import DynamicCache

        from sparq.cache import upgrade

        self.cache = DynamicCache(config=self.model.config)
        upgrade(self.cache)  # what all methods can decode on
        self.go_on(tokens)

    def go_on(self, tokens: Any) -> None:
        from sparq.lm_eval.prefill import step

        step(self.model, self.cache, tokens[None], None)

    def back_to(self, length: int) -> None:
        surplus = self.cache.get_seq_length() - length
        if surplus:
            self.cache.crop(-surplus)  # negative in all versions of transformers: that many tokens less

    def decode(self, tokens: Any) -> Any:
        """Log-probabilities [T, vocabulary] after each of the tokens; the cache is afterwards what it was before."""
        import torch

        from sparq.lm_eval.prefill import feed

        length = self.cache.get_seq_length()
        logits = torch.cat(list(feed(self.model, self.cache, tokens[None], None)), 1)
        self.back_to(length)
        return logits[0].float().log_softmax(-1)


def load(folder: str, weights: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options: dict[str, Any] = {"use_safetensors": True}
    options["dtype"] = torch.float32 if weights in ("float32", "dynamic int8") else torch.bfloat16
    if weights == "bitsandbytes int8":
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    elif weights == "bitsandbytes nf4":
        four_bits = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
        options["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, **four_bits)
    model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    if weights == "int8":  # what compiling changes is speed
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(model, Int8WeightOnlyConfig())
    elif weights == "dynamic int8":
        model = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    return model


def contexts(tokens: Any, lengths: tuple[int, ...]) -> Iterator[tuple[int, str, int, Any, Any]]:
    """Length, kind, how much of the document comes first, what is read densely behind it, and what is decoded (with
    one token more, to be predicted): the longest context first, each a cut of the one before."""
    import torch

    for length in sorted(lengths, reverse=True):
        yield length, "plain", length, tokens[:0], tokens[length : length + TOKENS + 1]
        passage = tokens[int(PASSAGE * length) :][: CUE + TOKENS + 1]
        yield length, "repeat", length - CUE, torch.as_tensor(passage[:CUE]), passage[CUE:]


def measure(
    folder: str,
    document: str,
    text: str,
    lengths: tuple[int, ...],
    chosen: list[Setting],
    weights: str = "float32",
) -> list[Measured]:
    """All settings on one document; runs in a process of its own."""
    import torch

    reader = Reader(folder, weights)
    readers = [reader] if weights == "float32" else [reader, Reader(folder)]
    tokens = torch.tensor(reader.tokenizer(text)["input_ids"])
    longest = max(lengths) + TOKENS + 1
    if len(tokens) < longest:
        raise ValueError(f"{document!r} must have at least {longest:,} tokens, it has {len(tokens):,}")
    results = []
    with torch.no_grad():
        for one in readers:
            one.read(tokens[: max(lengths)])
        for length, kind, prefix, cue, decoded in contexts(tokens, lengths):
            for one in readers:
                one.back_to(prefix)
                if len(cue):
                    one.go_on(cue)
            dense = reader.decode(decoded[:-1])
            if weights != "float32":
                found = compare(readers[-1].decode(decoded[:-1]), dense, decoded[1:])
                name = f"{weights} weights, dense"
                results.append(Measured(document, length, kind, "weights", name, *found, less=1, alpha=math.nan))
            for setting in chosen:
                if setting.method != "sparq" and length in SPARQ_ONLY:
                    continue
                with decoding(setting, reader.model) as report:
                    sparse = reader.decode(decoded[:-1])
                    report_made = report()
                found = compare(dense, sparse, decoded[1:])
                results.append(
                    Measured(
                        document,
                        length,
                        kind,
                        setting.line,
                        setting.name,
                        *found,
                        less(report_made, reader.model),
                        report_made.total.mean_alpha or math.nan,
                    )
                )
    return results


def less(report: Any, model: Any) -> float:
    """Bytes of K and V that dense attention would have read token by token, over those read (and of what the method
    keeps beside K and V), in 16 bits."""
    total = report.total
    if model.dtype.itemsize == 2:
        return total.bytes_dense / total.bytes_read
    return less_at_16_bits(
        total.bytes_read,
        total.bytes_dense,
        total.positions_cached,
        total.positions_read,
        total.sparse_steps,
        sum(total.dense_steps.values()),
        report.config,
        model.config,
    )


def decoding(setting: Setting, model: Any) -> Any:
    from sparq.lm_eval.decoding import Decoding

    return Decoding.of(setting.method, setting.knobs).on(model)


def compare(dense: Any, sparse: Any, targets: Any) -> tuple[float, float, float, float]:
    """KL in bits, mean and 95th percentile; change of the targets' negative log-likelihood in bits; equal choices."""
    kl = (dense.exp() * (dense - sparse)).sum(-1) / math.log(2)
    chosen = targets[:, None]
    change = (dense.gather(-1, chosen) - sparse.gather(-1, chosen)) / math.log(2)
    same = (dense.argmax(-1) == sparse.argmax(-1)).float()
    return kl.mean().item(), kl.quantile(0.95).item(), change.mean().item(), same.mean().item()


def main() -> None:
    import smollm2
    from documents import documents
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from sweep import circumstances

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder with a causal model and its tokenizer, or smollm2")
    parser.add_argument("--json", type=Path, help="write what was measured here")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens of context")
    parser.add_argument("--all", action="store_true", help="more settings of every method, twice as slowly")
    parser.add_argument("--ablations", action="store_true", help="SparQ's defaults with one thing changed, instead")
    parser.add_argument("--lines", help="only settings whose line holds this text")
    parser.add_argument("--weights", choices=WEIGHTS, default=WEIGHTS[0], help="how the model holds its weights")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="default: one for each core")
    arguments = parser.parse_args()
    folder = smollm2.folder_of(arguments.model)
    os.environ.update({"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"})
    import sparq_kernels

    sparq_kernels.backend("cpu")  # compiled once, before several processes want it
    known, begin = circumstances(), time.perf_counter()
    compared = ablations() if arguments.ablations else settings() + (more_settings() if arguments.all else [])
    chosen = [one for one in compared if arguments.lines is None or arguments.lines in one.line]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    results: list[Measured] = []
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.processes, mp_context=spawn) as pool, Progress(*columns) as progress:
        todo = [
            pool.submit(measure, folder, name, text, tuple(arguments.lengths), chosen, arguments.weights)
            for name, text in documents().items()
        ]
        bar = progress.add_task("documents", total=len(todo))
        for future in as_completed(todo):
            results += future.result()
            progress.update(bar, advance=1)
    known |= {"model": Path(folder).name, "weights": arguments.weights, "seconds": round(time.perf_counter() - begin)}
    content = {"circumstances": known, "measured": [asdict(one) for one in results]}
    if arguments.json:
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")
    Console(highlight=False).print(table(content), soft_wrap=True)


def of_all_settings(measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was measured in contexts that no setting leaves out."""
    names = {one["name"] for one in measured}
    contexts = {one["context"] for one in measured}
    whole = {c for c in contexts if {one["name"] for one in measured if one["context"] == c} == names}
    return [one for one in measured if one["context"] in whole]


def table(content: dict[str, Any]) -> str:
    """Markdown: means over documents and contexts, ± the standard error over documents."""
    measured = of_all_settings(content["measured"])
    head = ["", *(f"{kind}: {what}" for kind in KINDS for what in ("less", "KL", "95 %", "ΔNLL", "same"))]
    rows = [head]
    for name in dict.fromkeys(one["name"] for one in measured):
        cells = [name]
        for kind in KINDS:
            found = [one for one in measured if (one["name"], one["kind"]) == (name, kind)]
            less, high, change, same = (
                over_documents(found, key)[0] for key in ("less", "kl_high", "nll_change", "same")
            )
            kl, error = over_documents(found, "kl")
            cells += [f"{less:.1f}x", f"{kl:.3f} ± {error:.3f}", f"{high:.2f}", f"{change:+.3f}", f"{same:.1%}"]
        rows.append(cells)
    return markdown(rows)


GLANCE = (
    "the paper's SparQ, 8x",
    "SparQ, 8x",
    "SparQ, 16x",
    "SparQ, all k, 8x",
    "oracle top-k, 8x",
    "RocketKV, second stage, 8x",
    "pages of 8, by norm, 7x",
    "Quest, 8x",
    "sinks + window, 8x",
)


def glance(content: dict[str, Any]) -> str:
    """Markdown, what the README shows."""
    measured = of_all_settings(content["measured"])
    rows = [["", "moved", *(f"{kind}: {what}" for kind in KINDS for what in ("KL, bits a token", "same first choice"))]]
    for name in GLANCE:
        found = [one for one in measured if one["name"] == name]
        cells = [name, f"{over_documents(found, 'less')[0]:.1f}x less"]
        for kind in KINDS:
            those = [one for one in found if one["kind"] == kind]
            kl, error = over_documents(those, "kl")
            cells += [f"{kl:.3f} ± {error:.3f}", f"{over_documents(those, 'same')[0]:.1%}"]
        rows.append(cells)
    return markdown(rows)


def table_by_context(content: dict[str, Any]) -> str:
    """Markdown: KL, a column for each kind and context."""
    measured = content["measured"]
    contexts = sorted({one["context"] for one in measured})
    head = ["", *(f"{kind} {context:,}" for kind in KINDS for context in contexts)]
    rows = [head]
    for name in dict.fromkeys(one["name"] for one in measured):
        cells = [name]
        for kind in KINDS:
            for context in contexts:
                wanted = (name, kind, context)
                found = [one for one in measured if (one["name"], one["kind"], one["context"]) == wanted]
                kl, error = over_documents(found, "kl")
                cells.append(f"{kl:.3f} ± {error:.3f}" if found else "–")
        rows.append(cells)
    return markdown(rows)


def over_documents(found: list[dict[str, Any]], key: str) -> tuple[float, float]:
    """The mean, and its standard error over documents: contexts of one document say much the same."""
    names = dict.fromkeys(one["document"] for one in found)
    means = [mean_and_error([one[key] for one in found if one["document"] == name])[0] for name in names]
    return mean_and_error(means)


def plot(content: dict[str, Any], path: Path) -> None:
    """KL against bytes: a panel for each kind, a line for each method, a mark for each setting."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullLocator, ScalarFormatter

    measured = of_all_settings(content["measured"])
    figure, panels = plt.subplots(1, len(KINDS), figsize=(10, 4.2), layout="constrained", sharey=True)
    for kind, axes in zip(KINDS, panels, strict=True):
        for line in dict.fromkeys(one["line"] for one in measured):
            base, _, first_dense = line.partition(", first layer")
            points = []
            for name in dict.fromkeys(one["name"] for one in measured if one["line"] == line):
                found = [one for one in measured if (one["name"], one["kind"]) == (name, kind)]
                points.append((over_documents(found, "less")[0], *over_documents(found, "kl")))
            less, kl, error = zip(*sorted(points), strict=True)
            axes.errorbar(
                less,
                kl,
                error,
                label=line,
                color=COLOURS.get(base, "black"),
                marker="s" if first_dense else "o",
                markersize=4,
                capsize=2,
                linestyle=":" if first_dense else "-",
                linewidth=2 if line == "SparQ" else 1.2,
                markerfacecolor="white" if first_dense else None,
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks([2, 4, 8, 16])
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_title(f"{kind} text")
        axes.set_xlabel("times fewer bytes of the cache read")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("KL from dense attention, bits a token")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main()
