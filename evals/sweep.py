"""Run the offline tasks for several models over methods and compression ratios, and write what they score as JSON.

    python evals/sweep.py evals/models/recall-llama evals/models/recall-gpt-neox --json evals/results/sweep.json

Everything goes through lm-evaluation-harness and its model `sparq`, as `sparq lm-eval` does. A task's contexts are
prefilled once and decoded by every method. The last 32 tokens of each context, in which the question stands, are
decoded too: no answer comes from the dense prefill but through the cache.
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

from allocator import KEEP_BUFFERS

# No data set and no model comes from a hub, and many threads do not pay for models as small as these.
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

EVALS = Path(__file__).parent
RATIOS = (2, 4, 8, 16)
OTHERS = ("oracle", "window", "h2o", "quest")
DECODED = 32  # tokens of each context: more than a question has
PREFILL_BYTES = 4 << 30  # of K and V kept for the other methods
METRICS = {  # beginning of a task's name: its measure
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
    compression: float  # bytes that dense attention would have read, over those read
    mean_alpha: float | None
    by_depth: dict[str, float]  # pass keys: percent of the text before the fact, share right
    seconds: float


DENSE = Way("dense", 1, {"method": "dense"})


def grid(tokens: int, head_dim: int) -> list[Way]:
    """Every method at every ratio. SparQ's r and k are the paper's, without the floors of `SparqConfig`: at short
    contexts it would otherwise read more than the others."""
    ways = [DENSE, Way("defaults", 8, {"method": "sparq"})]
    for ratio in RATIOS:
        knobs = {"r": head_dim // ratio, "k": tokens // (2 * ratio)}
        ways.append(Way("sparq", ratio, {"method": "sparq"} | knobs))
    for method in OTHERS:
        ways += [Way(method, ratio, {"method": method, "ratio": ratio}) for ratio in RATIOS]
    return ways


def ablations(tokens: int, head_dim: int) -> list[Way]:
    """Changes to SparQ at ratio 8, one at a time."""
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
    return [Way(name, None, base | change) for name, change in changes.items()]


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

    scores: list[Score] = []
    dense: torch.Tensor | None = None
    for way in job.ways:
        begin = time.perf_counter()
        lm = SparqLM(
            model,
            tokenizer=tokenizer,
            batch_size=job.batch,
            decode_context_tokens=DECODED,
            prefills=prefills,
            **way.arguments,
        )
        output = lm_eval.evaluate(lm, tasks, limit=job.limit, bootstrap_iters=0, log_samples=True)
        samples = output["samples"][job.task]
        values = torch.tensor([_value(sample[measure]) for sample in samples], dtype=torch.float64)
        if dense is None:
            dense = values  # the first way
        steps = lm.steps.get(job.task)
        if steps is None and way != DENSE:
            raise RuntimeError(f"{way} made no step of {job.task}")
        by_depth: dict[str, list[float]] = {}
        for sample in samples:
            if "depth" in sample["doc"]:
                by_depth.setdefault(str(sample["doc"]["depth"]), []).append(_value(sample[measure]))
        scores.append(
            Score(
                model=Path(job.model).name,
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
                compression=1.0 if steps is None else steps["compression"],
                mean_alpha=None if steps is None else steps["mean_alpha"],
                by_depth={depth: sum(rights) / len(rights) for depth, rights in by_depth.items()},
                seconds=round(time.perf_counter() - begin, 2),
            )
        )
    return scores


def _value(result: Any) -> float:
    """A document's score; the harness hands a log-likelihood as (nats, bytes)."""
    return -result[0] / result[1] / math.log(2) if isinstance(result, (tuple, list)) else float(result)


def _error(values: Any) -> float:
    return (values.std() / math.sqrt(len(values))).item() if len(values) > 1 else math.nan


PLAN = {  # task: tokens, documents
    "recall_pass_key_1k": (1024, 25),
    "recall_pass_key_2k": (2048, 25),
    "recall_pass_key_4k": (4096, 25),
    "recall_pass_key_8k": (8192, 10),
    "recall_repetition_1k": (1024, 20),
    "recall_repetition_4k": (4096, 10),
    "recall_documentation_1k": (1024, 10),
    "recall_documentation_4k": (4096, 5),
    "ruler_niah_single_1_cued_4k": (4096, 10),
    "ruler_niah_multikey_2_cued_4k": (4096, 20),
    "ruler_niah_multikey_3_cued_1k": (1024, 10),
}
ABLATED = ("recall_pass_key_4k", "recall_repetition_4k", "ruler_niah_multikey_2_cued_4k")
BATCH = 10


def jobs(models: list[str], share: float) -> list[Job]:
    """The longest first. `share` of the documents: 1 is what the committed results have."""
    found = []
    for model in models:
        config = json.loads((Path(model) / "config.json").read_text())
        head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        for task, (tokens, documents) in PLAN.items():
            limit = max(5, round(documents * share / 5) * 5)  # pass keys: five questions about a text
            ways = grid(tokens, head_dim) + (ablations(tokens, head_dim) if task in ABLATED else [])
            found.append(Job(model, task, tokens, min(BATCH, limit), limit, tuple(ways)))
    return sorted(found, key=lambda job: -job.tokens * job.limit * len(job.ways))


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
    parser.add_argument("models", nargs="+", help="folders of models whose tokens are bytes")
    parser.add_argument("--json", type=Path, required=True, help="write the scores here")
    parser.add_argument("--share", type=float, default=1.0, help="of the documents (default: 1)")
    parser.add_argument("--tasks", nargs="+", help="only these (default: all)")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="default: one for each core")
    arguments = parser.parse_args()
    os.environ.update(OFFLINE | KEEP_BUFFERS, OMP_NUM_THREADS="1")  # of the processes to come

    import sparq_kernels

    sparq_kernels.backend("cpu")  # compiled once, before several processes want it
    known = circumstances()  # before the first result makes the checkout dirty
    begin = time.perf_counter()
    todo = [job for job in jobs(arguments.models, arguments.share) if job.task in (arguments.tasks or (job.task,))]
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
