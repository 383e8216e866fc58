"""Run the offline tasks for several models over methods and compression ratios, and write what they score as JSON.

    python evals/sweep.py evals/models/recall-llama evals/models/recall-gpt-neox --json evals/results/sweep.json

Everything goes through lm-evaluation-harness and its model `sparq`, as `sparq lm-eval` does. A task's contexts are
prefilled once and decoded by every method. The last 32 tokens of each context, in which the question stands, are
decoded too: no answer comes from the dense prefill but through the cache.
"""

import argparse
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

# No data set and no model comes from a hub, and many threads do not pay for models as small as these.
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}

EVALS = Path(__file__).parent
RATIOS = (2, 4, 8, 16)
METHODS = ("sparq", "oracle", "window", "h2o", "quest")  # each at each of RATIOS, and dense once
DECODED = 32  # tokens of each context: more than a question has
PREFILL_BYTES = 4 << 30  # of K and V kept for the other methods
METRICS = {  # task: its measure, and whether more is better
    "recall_pass_key": ("right", True),
    "recall_repetition": ("matched_characters", True),
    "recall_documentation": ("bits_per_byte", False),
    "ruler_niah": ("right", True),
}


@dataclass(frozen=True, slots=True)
class Job:
    """A task of one model, decoded in all ways."""

    model: str
    task: str
    tokens: int
    batch: int
    limit: int
    ways: tuple[dict[str, Any], ...]  # of decoding: name, ratio, and arguments of the model `sparq`


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


def grid(tokens: int, head_dim: int) -> list[dict[str, Any]]:
    """Every method at every ratio. SparQ's r and k are the paper's, without the floors of `SparqConfig`: at short
    contexts it would otherwise read more than the others."""
    ways: list[dict[str, Any]] = [{"name": "dense", "ratio": 1, "method": "dense"}]
    for method in METHODS:
        for ratio in RATIOS:
            knobs = {"r": head_dim // ratio, "k": tokens // (2 * ratio)} if method == "sparq" else {"ratio": ratio}
            ways.append({"name": method, "ratio": ratio, "method": method, **knobs})
    return ways


def ablations(tokens: int, head_dim: int) -> list[dict[str, Any]]:
    """Changes to SparQ at ratio 8, one at a time."""
    r, k = head_dim // 8, tokens // 16
    base = {"method": "sparq", "r": r, "k": k}
    ways: list[dict[str, Any]] = [{"name": "dense", "method": "dense"}, {"name": "SparQ", **base}]
    ways += [{"name": f"r={other}", **base, "r": other} for other in (r // 4, r // 2, 2 * r, 4 * r)]
    ways += [{"name": f"k={other}", **base, "k": other} for other in (k // 8, k // 4, k // 2, 2 * k, 4 * k)]
    ways += [
        {"name": "no mean value", **base, "mean_value": False},
        {"name": "no local window", **base, "local": 0},
        {"name": "local window k/2", **base, "local": k // 2},
        {"name": "no score temperature", **base, "method": "sparq_variant", "score_temperature": False},
        {"name": "positions per head", **base, "method": "sparq_variant", "shared": False},
        {"name": "first layer dense", **base, "dense_layers": 1},
    ]
    return [{"ratio": None} | way for way in ways]


def run(job: Job) -> list[Score]:
    """Every score of a job; runs in a process of its own."""
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
    manager = TaskManager(include_path=str(EVALS / "tasks"), metadata={"tokenizer": job.model})
    tasks = manager.load([job.task])
    prefills = Prefills(PREFILL_BYTES)
    measure, _ = next(metric for name, metric in METRICS.items() if job.task.startswith(name))

    scores: list[Score] = []
    dense: torch.Tensor | None = None
    for way in job.ways:
        begin = time.perf_counter()
        arguments = {name: value for name, value in way.items() if name not in ("name", "ratio")}
        lm = SparqLM(
            model,
            tokenizer=tokenizer,
            batch_size=job.batch,
            decode_context_tokens=DECODED,
            prefills=prefills,
            **arguments,
        )
        output = lm_eval.evaluate(lm, tasks, limit=job.limit, bootstrap_iters=0, log_samples=True)
        samples = output["samples"][job.task]
        values = torch.tensor([_value(sample[measure]) for sample in samples], dtype=torch.float64)
        if dense is None:
            dense = values  # the first way
        steps = lm.steps.get(job.task)
        if steps is None and arguments["method"] != "dense":
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
                name=way["name"],
                ratio=way["ratio"],
                arguments=arguments,
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


def jobs(models: list[str], share: float) -> list[Job]:
    """The longest first. `share` of the documents: 1 is what the committed results have."""
    planned = [
        # task, tokens, batch, documents
        *((f"recall_pass_key_{n}k", 1024 * n, 10, 100 if n < 8 else 50) for n in (1, 2, 4, 8)),
        *((f"recall_repetition_{n}k", 1024 * n, 10, 50 if n < 8 else 30) for n in (1, 2, 4, 8)),
        *((f"recall_documentation_{n}k", 1024 * n, 10, 30) for n in (1, 4)),
        ("ruler_niah_single_1_cued_4k", 4096, 10, 50),
        ("ruler_niah_multikey_2_cued_4k", 4096, 10, 50),
        ("ruler_niah_multikey_3_cued_1k", 1024, 10, 30),
    ]
    found = []
    for model in models:
        config = json.loads((Path(model) / "config.json").read_text())
        head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        for task, tokens, batch, documents in planned:
            limit = max(5, round(documents * share / 5) * 5)  # pass keys: five questions about a text
            ways = grid(tokens, head_dim)
            found.append(Job(model, task, tokens, min(batch, limit), limit, tuple(ways)))
            if task in ("recall_pass_key_4k", "recall_repetition_4k", "ruler_niah_multikey_2_cued_4k"):
                found.append(Job(model, task, tokens, min(batch, limit), limit, tuple(ablations(tokens, head_dim))))
    return sorted(found, key=lambda job: -job.tokens)


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


def main() -> None:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="folders of models whose tokens are bytes")
    parser.add_argument("--json", type=Path, required=True, help="write the scores here")
    parser.add_argument("--share", type=float, default=1.0, help="of the documents (default: 1)")
    parser.add_argument("--tasks", nargs="+", help="only these (default: all)")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="default: one for each core")
    arguments = parser.parse_args()
    os.environ.update(OFFLINE, OMP_NUM_THREADS="1")

    import sparq_kernels

    sparq_kernels.backend("cpu")  # compiled once, before several processes want it
    begin = time.perf_counter()
    todo = [job for job in jobs(arguments.models, arguments.share) if job.task in (arguments.tasks or (job.task,))]
    scores: list[Score] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.processes, mp_context=spawn) as pool, Progress(*columns) as progress:
        bar = progress.add_task("tasks", total=len(todo))
        for future in as_completed([pool.submit(run, job) for job in todo]):
            scores += future.result()
            progress.update(bar, advance=1, description=f"{scores[-1].model} {scores[-1].task}")
    content = {
        "circumstances": circumstances() | {"seconds": round(time.perf_counter() - begin)},
        "scores": [asdict(score) for score in sorted(scores, key=lambda s: (s.model, s.task, s.ratio is None))],
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
