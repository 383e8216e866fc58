"""Run the offline tasks for several models over methods and compression ratios, and write what they score as JSON.

    python evals/sweep.py smollm2 evals/models/recall-llama evals/models/recall-gpt-neox --json evals/results/sweep.json

`smollm2` is the pretrained chat model that PyPI has (evals/smollm2.py). Everything goes through lm-evaluation-harness
and its model `sparq`, as `sparq lm-eval` does. A task's contexts are prefilled once and decoded by every method. The
last tokens of each context, in which the question stands, are decoded too: no answer comes from the dense prefill but
through the cache.
"""

import argparse
import contextlib
import io
import json
import logging
import math
import multiprocessing
import os
import platform
import subprocess
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import smollm2
from allocator import KEEP_BUFFERS
from divergence import PAPER
from summary import less_at_16_bits

from sparq.config import MASS

# No data set and no model comes from a hub, and many threads do not pay for models as small as these.
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

EVALS = Path(__file__).parent
RATIOS = (4, 8, 16)
OTHERS = ("oracle", "rocket", "window", "h2o", "quest")
NAMES = ("sparq", "paper", *OTHERS)
PREFILL_BYTES = 4 << 30  # of K and V kept for the other methods
METRICS = {  # beginning of a task's name: its measure
    "chat_pass_key": "right",
    "chat_niah": "right",
    "chat_variable_tracking": "right",
    "chat_repetition": "matched_characters",
    "chat_text": "bits_per_byte",
    "recall_pass_key": "right",
    "recall_repetition": "matched_characters",
    "recall_documentation": "bits_per_byte",
    "ruler_niah": "right",
}


@dataclass(frozen=True, slots=True)
class Way:
    """One way to decode."""

    name: str  # a method's, or what is different from SparQ's ordinary way
    ratio: float | None  # the compression that is asked for; None: an ablation
    arguments: dict[str, Any]  # of the harness's model `sparq`


@dataclass(frozen=True, slots=True)
class Job:
    """A task of one model, decoded in all ways."""

    model: str
    task: str
    tokens: int
    batch: int
    limit: int
    decoded: int  # tokens at the end of each context
    ways: tuple["Way", ...]  # of decoding, dense first


@dataclass(frozen=True, slots=True)
class Score:
    model: str
    task: str
    tokens: int
    name: str
    ratio: float | None  # the compression that was asked for
    arguments: dict[str, Any]
    measure: str
    documents: int
    mean: float
    error: float  # the standard error of the mean
    change: float  # against dense, on the same documents
    change_error: float
    compression: float  # bytes that dense attention would have read, over those read, in 16 bits
    mean_alpha: float | None
    by_depth: dict[str, float]  # pass keys: percent of the text before the fact, share right
    seconds: float


DENSE = Way("dense", 1, {"method": "dense"})


def way(name: str, ratio: float, tokens: int, head_dim: int, **changes: Any) -> Way:
    """A method at a ratio. SparQ's knobs are those of `SparqConfig`, but shares of the context where that has floors:
    at short contexts it would otherwise read more than the others."""
    arguments: dict[str, Any]
    if name == "sparq":
        r, k = min(head_dim, int(4 * head_dim / ratio)), int(tokens / ratio)
        arguments = {"method": name, "r": r, "k": k, "mass": MASS, "k_min": tokens // 32, "local": tokens // 128}
    elif name == "paper":
        arguments = {"method": "sparq", "r": int(head_dim / ratio), "k": int(tokens / (2 * ratio)), **PAPER}
    else:
        arguments = {"method": name, "ratio": ratio}
    suffix = "".join(f", {knob}={value}" for knob, value in changes.items())
    return Way(name + suffix, ratio, arguments | changes)


def grid(tokens: int, head_dim: int) -> list[Way]:
    """Every method at every ratio."""
    ways = [way(name, ratio, tokens, head_dim) for name in NAMES for ratio in RATIOS]
    return [DENSE, Way("defaults", 8, {"method": "sparq"}), *ways]


def chat_grid(tokens: int, head_dim: int, is_full: bool = True) -> list[Way]:
    """SparQ, and where `is_full` the paper's too, at three ratios, and at ratio 8 with a dense first layer. The others
    at ratio 8 alone, H2O, which has to read every prompt anew, only where `is_full`.
    """
    ways = [DENSE, Way("defaults", 8, {"method": "sparq"})]
    for name in NAMES:
        if name == "h2o" and not is_full:
            continue
        is_whole = name == "sparq" or (is_full and name == "paper")
        ways += [way(name, ratio, tokens, head_dim) for ratio in (RATIOS if is_whole else (8,))]
        if is_whole:
            ways.append(way(name, 8, tokens, head_dim, dense_layers=1))
    return ways


def chat_ablations(tokens: int, head_dim: int) -> list[Way]:
    """What the index and the mass do at ratio 8."""
    base = way("sparq", 8, tokens, head_dim).arguments
    fixed = {"k": tokens // 16, "mass": 1.0, "local": tokens // 64}
    changes: dict[str, dict[str, Any]] = {
        "SparQ": {},
        "all k = S/16": fixed,
        "r = 16": {"r": 16},
        "mass 0.9": {"mass": 0.9},
        "full index, r = 8": {"index": "full", "r": 8},
        "full index, r = 8, all k": {"index": "full", "r": 8, **fixed},
        "full index, r = 32, all k": {"index": "full", **fixed},
    }
    return [Way(name, None, base | change) for name, change in changes.items()]


def ablations(tokens: int, head_dim: int) -> list[Way]:
    """Changes to the paper's SparQ at ratio 8, one at a time, without a mean value in heads that look everywhere."""
    r, k = head_dim // 8, tokens // 16
    changes: dict[str, dict[str, Any]] = {"SparQ": {}}
    changes |= {f"r = {other}": {"r": other} for other in (r // 4, r // 2, 2 * r, 4 * r)}
    changes |= {f"k = {other}": {"k": other} for other in (k // 8, k // 4, k // 2, 2 * k, 4 * k)}
    changes |= {
        f"r = {3 * r // 2}, k = {k // 2}": {"r": 3 * r // 2, "k": k // 2},  # the same bytes
        "no mean value": {"mean_value": False},
        "no local window": {"local": 0},
        "local window of k / 2": {"local": k // 2},
        "first layer dense": {"dense_layers": 1},
        "no score temperature": {"method": "sparq_variant", "score_temperature": False},
        "components and positions per head": {"method": "sparq_variant", "shared": False},
    }
    base = {"method": "sparq", "r": r, "k": k}
    index = {"index": "full", "mass": 1.0}
    return [Way(name, None, base | ({} if "method" in change else index) | change) for name, change in changes.items()]


def run(job: Job) -> list[Score]:
    """Every score of a job; runs in a process of its own, whose output would fight over the terminal."""
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        return _run(job)


def _run(job: Job) -> list[Score]:
    import lm_eval
    import torch
    from lm_eval.tasks import TaskManager
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from sparq.lm_eval.model import SparqLM
    from sparq.lm_eval.prefill import Prefills

    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32, use_safetensors=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    manager = TaskManager(include_path=str(EVALS / "tasks"), include_defaults=False, metadata={"tokenizer": job.model})
    tasks = manager.load([job.task])
    prefills = Prefills(PREFILL_BYTES)
    measure = next(metric for name, metric in METRICS.items() if job.task.startswith(name))

    runs: dict[tuple[str, float | None], tuple[list[dict[str, Any]], float, float | None, float]] = {}
    # H2O watches the prompt; the others can go on from what it has read.
    for way in sorted(job.ways, key=lambda way: way.arguments["method"] != "h2o"):
        begin = time.perf_counter()
        lm = SparqLM(
            model,
            tokenizer=tokenizer,
            batch_size=job.batch,
            decode_context_tokens=job.decoded,
            prefills=prefills,
            **way.arguments,
        )
        output = lm_eval.evaluate(lm, tasks, limit=job.limit, bootstrap_iters=0, log_samples=True)
        steps = lm.steps.get(job.task)
        if steps is None and way != DENSE:
            raise RuntimeError(f"{way} made no step of {job.task}")
        done = (1.0, None) if steps is None else (_less(steps, lm), steps["mean_alpha"])
        runs[way.name, way.ratio] = output["samples"][job.task], *done, time.perf_counter() - begin

    scores: list[Score] = []
    dense: torch.Tensor | None = None
    for way in job.ways:
        samples, less, mean_alpha, seconds = runs[way.name, way.ratio]
        values = torch.tensor([_value(sample[measure]) for sample in samples], dtype=torch.float64)
        if dense is None:
            dense = values  # the first way
        by_depth: dict[str, list[float]] = {}
        for sample in samples:
            if "depth" in sample["doc"]:
                by_depth.setdefault(str(sample["doc"]["depth"]), []).append(_value(sample[measure]))
        scores.append(
            Score(
                model=Path(job.model).name.split(".")[0],
                task=job.task,
                tokens=job.tokens,
                name=way.name,
                ratio=way.ratio,
                arguments=way.arguments,
                measure=measure,
                documents=len(values),
                mean=values.mean().item(),
                error=_error(values),
                change=(values - dense).mean().item(),
                change_error=_error(values - dense),
                compression=less,
                mean_alpha=mean_alpha,
                by_depth={depth: sum(rights) / len(rights) for depth, rights in by_depth.items()},
                seconds=round(seconds, 2),
            )
        )
    return scores


def _less(steps: dict[str, Any], lm: Any) -> float:
    return less_at_16_bits(
        steps["bytes"]["read"],
        steps["bytes"]["dense"],
        steps["positions"]["cached"],
        steps["positions"]["read"],
        steps["layer_steps"]["sparse"],
        sum(steps["layer_steps"]["dense"].values()),
        lm.decoding.config,
        lm.model.config,
    )


def _value(result: Any) -> float:
    """A document's score; the harness hands a log-likelihood as (nats, bytes)."""
    return -result[0] / result[1] / math.log(2) if isinstance(result, (tuple, list)) else float(result)


def _error(values: Any) -> float:
    return (values.std() / math.sqrt(len(values))).item() if len(values) > 1 else math.nan


@dataclass(frozen=True, slots=True)
class Planned:
    tokens: int
    documents: int
    decoded: int = 32  # tokens of each context: more than a question has
    batch: int = 10
    is_full: bool = True  # of the paper's SparQ, too, all ratios, and H2O


CHAT_PLAN = {
    "chat_niah_single_1_1k": Planned(1024, 5, 48, 1, False),
    "chat_niah_single_1_4k": Planned(4096, 1, 48, 1, False),
    "chat_pass_key_1k": Planned(1024, 40, 24, 5),
    "chat_pass_key_2k": Planned(2048, 10, 24, 5, False),
    "chat_pass_key_4k": Planned(4096, 10, 24, 5, False),
    "chat_repetition_1k": Planned(1024, 10, 32, 5, False),
    "chat_text_1k": Planned(1024, 10, 1, 1, False),
}
PLAN = {
    "recall_pass_key_4k": Planned(4096, 25),
    "recall_repetition_4k": Planned(4096, 10),
    "recall_documentation_4k": Planned(4096, 5),
    "ruler_niah_multikey_2_cued_4k": Planned(4096, 20),
    "ruler_niah_multikey_3_cued_1k": Planned(1024, 10),
}
ABLATED = ("chat_pass_key_1k", "recall_pass_key_4k", "recall_repetition_4k")
BYTES = 300  # tokens at most that a vocabulary of bytes has


def jobs(models: list[str], share: float, has_ablations: bool = False) -> list[Job]:
    """The longest first. `share` of the documents: 1 is what the committed results have."""
    found = []
    for model in models:
        config = json.loads((Path(model) / "config.json").read_text())
        head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        is_chat = config["vocab_size"] > BYTES
        for task, planned in (CHAT_PLAN if is_chat else PLAN).items():
            tokens, least = planned.tokens, min(5, planned.documents)  # pass keys: five questions about a text
            limit = max(least, round(planned.documents * share / least) * least)
            if is_chat:
                ways = chat_grid(tokens, head_dim, planned.is_full)
                more = chat_ablations(tokens, head_dim)
            else:
                ways, more = grid(tokens, head_dim), ablations(tokens, head_dim)
            ways += more if has_ablations and task in ABLATED else []
            batch = min(planned.batch, limit)
            found.append(Job(model, task, tokens, batch, limit, planned.decoded, tuple(ways)))
    return sorted(found, key=cost, reverse=True)


def cost(job: Job) -> float:
    return job.tokens * job.limit * len(job.ways) * (10 if job.task in CHAT_PLAN else 1)


def circumstances() -> dict[str, Any]:
    import lm_eval
    import torch
    import transformers

    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=EVALS)
    return {
        "commit": commit.stdout.strip(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "lm_eval": lm_eval.__version__,
        "machine": platform.machine(),
    }


def write(path: Path, scores: list[Score], known: dict[str, Any], seconds: float) -> None:
    ordered = sorted(scores, key=lambda score: (score.model, score.task, score.ratio is None))
    content = {
        "circumstances": known | {"seconds": round(seconds)},
        "scores": [asdict(score) for score in ordered],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def main() -> None:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "models", nargs="+", help="folders: models whose tokens are bytes, pretrained chat models; or smollm2"
    )
    parser.add_argument("--json", type=Path, required=True, help="write the scores here")
    parser.add_argument("--share", type=float, default=1.0, help="of the documents (default: 1)")
    parser.add_argument("--ablations", action="store_true", help="SparQ's parts changed one at a time, too")
    parser.add_argument("--tasks", nargs="+", help="only these (default: all)")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="default: one for each core")
    arguments = parser.parse_args()
    os.environ.update(OFFLINE | KEEP_BUFFERS, OMP_NUM_THREADS="1")  # of the processes to come

    import sparq_kernels

    sparq_kernels.backend("cpu")  # compiled once, before several processes want it
    known = circumstances()  # before the first result makes the checkout dirty
    begin = time.perf_counter()
    models = [smollm2.folder_of(model) for model in arguments.models]
    todo = [
        job
        for job in jobs(models, arguments.share, arguments.ablations)
        if job.task in (arguments.tasks or (job.task,))
    ]
    scores: list[Score] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.processes, mp_context=spawn) as pool, Progress(*columns) as progress:
        bar = progress.add_task("tasks", total=len(todo))
        for future in as_completed([pool.submit(run, job) for job in todo]):
            scores += future.result()
            name, seconds = f"{scores[-1].model} {scores[-1].task}", sum(score.seconds for score in future.result())
            progress.update(bar, advance=1, description=name)
            progress.console.print(f"{name}: {seconds:.0f} s")
            write(arguments.json, scores, known, time.perf_counter() - begin)


if __name__ == "__main__":
    main()
