"""Tables and plots of what `evals/divergence.py`, `evals/answers.py` and `evals/sweep.py` have measured.

    python evals/results.py evals/results

reads divergence.json, answers.json and sweep.json there, and writes tables.md, divergence.png and scores.png.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import answers
import divergence
from summary import markdown

METHODS = {  # name in the sweep: as the tables call it, colour
    "sparq": ("SparQ", "#0072b2"),
    "paper": ("the paper's SparQ", "#d55e00"),
    "oracle": ("oracle top-k", "#009e73"),
    "rocket": ("RocketKV, second stage", "#cc79a7"),
    "quest": ("Quest", "#999933"),
    "h2o": ("H2O", "#e69f00"),
    "window": ("sinks + window", "#7f7f7f"),
}
FIRST = "SmolLM2"  # the pretrained model, with which the tables begin
KINDS = {  # prefix of the tasks: title, format of a score, format of its error
    "chat_pass_key": (
        "Pass keys in real text, asked in chat: share right of five digits",
        "{:.0%}",
        "{:.0%}",
    ),
    "chat_niah": ("RULER's needles, asked as RULER asks: share right", "{:.0%}", "{:.0%}"),
    "chat_repetition": ("Repetition of real text: characters matched of 24 tokens", "{:.0f}", "{:.0f}"),
    "chat_text": ("Real text: bits per byte (less is better)", "{:.3f}", "{:.3f}"),
    "recall_pass_key": ("Pass keys: share right of five digits", "{:.0%}", "{:.0%}"),
    "recall_repetition": ("Repetition: characters matched, at most 128", "{:.0f}", "{:.0f}"),
    "ruler_niah": ("RULER's needles, asked in the needle's words: share right", "{:.0%}", "{:.0%}"),
    "recall_documentation": ("Held-out documentation: bits per byte (less is better)", "{:.3f}", "{:.3f}"),
}
PANELS = {  # of the plot, by the beginning of the model's name
    FIRST: {
        "chat_pass_key_1k": "pass keys, 1k: share right",
        "chat_pass_key_4k": "pass keys, 4k: share right",
        "chat_repetition_1k": "repetition, 1k: characters matched",
        "chat_text_1k": "real text, 1k: bits per byte",
    },
    "": {
        "recall_pass_key_4k": "pass keys, 4k: share right",
        "ruler_niah_multikey_2_cued_4k": "RULER multi-key 2, 4k: share right",
        "recall_repetition_4k": "repetition, 4k: characters matched",
        "recall_documentation_4k": "documentation, 4k: bits per byte",
    },
}
NAMES = {name: label for name, (label, _) in METHODS.items()}
NAMES |= {f"{name}, dense_layers=1": f"{label}, dense_layers=1" for name, label in NAMES.items()}
NAMES["defaults"] = "SparQ, the defaults"
Score = dict[str, Any]


def moved_predictions(content: dict[str, Any]) -> str:
    """The part of the tables that `divergence.py` has measured."""
    known = content["circumstances"]
    contexts = sorted({one["context"] for one in divergence.of_all_settings(content["measured"])})
    parts = [
        f"# How far decoding moves {known['model'].partition('.')[0]}'s predictions",
        "KL from dense attention in bits a token, and the value below which it is for 95 % of the tokens; change of "
        "the next token's negative log-likelihood, in bits; share of equal first choices. Eight documents, contexts of "
        f"{contexts[0]:,} to {contexts[-1]:,} tokens, {divergence.TOKENS} tokens scored in each; ± is the standard "
        f"error over documents. Commit {known['commit']}, torch {known['torch']}, "
        f"transformers {known['transformers']}.",
        divergence.table(content),
        "KL by context:",
        divergence.table_by_context(content),
    ]
    return "\n\n".join(parts) + "\n"


def changed_defaults(content: dict[str, Any]) -> str:
    """The part of the tables that `divergence.py --ablations` has measured."""
    known = content["circumstances"]
    lengths = ", ".join(f"{length:,}" for length in sorted({one["context"] for one in content["measured"]}))
    parts = [
        "# The defaults with one thing changed",
        f"Measured likewise after {lengths} tokens. Commit {known['commit']}.",
        divergence.table(content),
    ]
    return "\n\n".join(parts) + "\n"


def written_texts(content: dict[str, Any]) -> str:
    """The part of the tables that `answers.py` has measured."""
    parts = [
        f"# What {content['circumstances']['model'].partition('.')[0]} writes",
        "Eight documents of 2,048 tokens, continued greedily: tokens until the text is another than the dense one, and "
        "how likely it is under dense attention. Then conversations of three questions on one cache, each about a fact "
        "in a document: right answers.",
        answers.table(content),
    ]
    return "\n\n".join(parts) + "\n"


def tables(content: dict[str, Any]) -> str:
    scores = content["scores"]
    known = content["circumstances"]
    parts = [
        "# Scores of the offline tasks",
        "Made by `make eval` (`evals/sweep.py`, `evals/results.py`); `evals/README.md` says what is measured and how. "
        f"Commit {known['commit']}, Python {known['python']}, torch {known['torch']}, transformers "
        f"{known['transformers']}, lm-eval {known['lm_eval']}, {known['machine']}; "
        f"{known['seconds'] / 60:.0f} minutes. *moved*: bytes of K and V (and of what the method keeps beside them) "
        "that decode steps read, dense ÷ method. ± is the standard error over documents.",
        *([known["note"]] if "note" in known else []),
        "## At a glance",
        glance(scores),
    ]
    for model in models_of(scores):
        mine = [score for score in scores if score["model"] == model]
        parts.append(f"## {model}")
        grid = [score for score in mine if score["ratio"] is not None]
        for prefix, (title, form, error_form) in KINDS.items():
            kind = [score for score in grid if score["task"].startswith(prefix)]
            if kind:
                parts += [f"### {title}", _grid_table(kind, form, error_form)]
        tokens = 1024 if model.startswith(FIRST) else 4096  # where there are most documents
        deep = [score for score in grid if score["by_depth"] and score["tokens"] == tokens]
        if deep:
            title = f"### Pass keys by depth: {tokens // 1024}k, percent of the text before the fact"
            parts += [title, _depth_table(deep)]
        changed = [score for score in mine if score["ratio"] is None]
        if changed:
            parts += [f"### Ablations of SparQ at ratio 8, {tokens // 1024}k", _ablation_table(changed)]
    return "\n\n".join(parts) + "\n"


GLANCE = {  # what the README shows: beginning of a model's name: tasks, as the table calls them
    FIRST: {
        "chat_pass_key_1k": "pass keys, 1k",
        "chat_pass_key_4k": "pass keys, 4k",
        "chat_repetition_1k": "characters repeated, 1k",
        "chat_text_1k": "bits per byte, 1k",
    },
    "recall": {
        "recall_pass_key_4k": "pass keys",
        "ruler_niah_multikey_2_cued_4k": "RULER multi-key 2",
        "recall_repetition_4k": "characters repeated",
    },
}


def glance(scores: list[Score]) -> str:
    """What the README shows: a table for the pretrained model, one for the bundled ones at 4,096 bytes."""
    parts = []
    for begin, tasks in GLANCE.items():
        models = [model for model in models_of(scores) if model.startswith(begin)]
        swept = {score["task"] for score in scores}
        table = _glance_table(scores, models, {task: title for task, title in tasks.items() if task in swept})
        if len(table) > 1:
            parts.append(markdown(table))
    return "\n\n".join(parts)


def _glance_table(scores: list[Score], models: list[str], tasks: dict[str, str]) -> list[list[str]]:
    """SparQ at three ratios and the others at 8."""
    rows = [["", "moved", *(f"{model}: {title}" for model in models for title in tasks.values())]]
    ways = [("dense", 1), *(("sparq", ratio) for ratio in (4, 8, 16))]
    for name in ("paper", "oracle", "rocket", "quest", "h2o", "window"):
        ways.append((name, 8))
    for name, ratio in ways:
        found = {
            (score["model"], score["task"]): score
            for score in scores
            if (score["name"], score["ratio"]) == (name, ratio) and score["model"] in models and score["task"] in tasks
        }
        if not found or len(found) < len(models) * len(tasks):
            continue  # a sweep over other tasks
        moved = [score["compression"] for score in found.values()]
        cells = [_formats(task)[0].format(found[model, task]["mean"]) for model in models for task in tasks]
        rows.append([NAMES.get(name, name), f"{sum(moved) / len(moved):.1f}x less", *cells])
    return rows


def _grid_table(scores: list[Score], form: str, error_form: str) -> str:
    tasks = sorted(unique(score["task"] for score in scores), key=lambda task: (_short(task)[:-2], task))
    rows = [["method", "ratio", "moved", *(f"{_short(task)} ({_documents(scores, task)})" for task in tasks)]]
    for name, ratio in unique((score["name"], score["ratio"]) for score in scores):
        found = {score["task"]: score for score in scores if (score["name"], score["ratio"]) == (name, ratio)}
        moved = [score["compression"] for score in found.values()]
        cells = [_cell(found.get(task), form, error_form) for task in tasks]
        rows.append([NAMES.get(name, name), str(ratio), f"{sum(moved) / len(moved):.1f}x", *cells])
    return markdown(rows)


def _depth_table(scores: list[Score]) -> str:
    depths = list(scores[0]["by_depth"])
    rows = [["method", "ratio", *(f"{depth} %" for depth in depths)]]
    for score in scores:
        name = NAMES.get(score["name"], score["name"])
        rows.append([name, str(score["ratio"]), *(f"{score['by_depth'][depth]:.0%}" for depth in depths)])
    return markdown(rows)


def _ablation_table(scores: list[Score]) -> str:
    tasks = unique(score["task"] for score in scores)
    rows = [["", "moved", *(f"{_short(task)} ({_documents(scores, task)})" for task in tasks)]]
    for name in unique(score["name"] for score in scores):
        found = {score["task"]: score for score in scores if score["name"] == name}
        cells = []
        for task in tasks:
            cells.append(_cell(found.get(task), *_formats(task)))
        moved = [score["compression"] for score in found.values()]
        rows.append([name, f"{sum(moved) / len(moved):.1f}x", *cells])
    return markdown(rows)


def _formats(task: str) -> tuple[str, str]:
    """Of a score and of its error."""
    return next((form, error_form) for prefix, (_, form, error_form) in KINDS.items() if task.startswith(prefix))


def _cell(score: Score | None, form: str, error_form: str) -> str:
    """A dash where the sweep's plan leaves a task out."""
    return "–" if score is None else f"{form.format(score['mean'])} ± {error_form.format(score['error'])}"


def _documents(scores: list[Score], task: str) -> str:
    return "n=" + "/".join(str(n) for n in unique(score["documents"] for score in scores if score["task"] == task))


def _short(task: str) -> str:
    for start in ("recall_", "ruler_", "chat_"):
        task = task.removeprefix(start)
    return task.replace("_cued", "").replace("_", " ")


def models_of(scores: list[Score]) -> list[str]:
    """The pretrained one first."""
    return sorted(unique(score["model"] for score in scores), key=lambda model: not model.startswith(FIRST))


def unique(items: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(items))


def plot(content: dict[str, Any], path: Path) -> None:
    """Score against bytes moved: a row for each model, a column for each of PANELS, a line for each method."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullLocator, ScalarFormatter

    scores = [score for score in content["scores"] if score["ratio"] is not None]
    models = models_of(scores)
    columns = max(map(len, PANELS.values()))
    size = (4 * columns, 3.2 * len(models) + 0.5)
    figure, grid = plt.subplots(len(models), columns, figsize=size, squeeze=False, layout="constrained")
    for model, line in zip(models, grid, strict=True):
        panels = next(panels for begin, panels in PANELS.items() if model.startswith(begin))
        for (task, title), axes in zip(panels.items(), line, strict=True):
            found = [score for score in scores if (score["model"], score["task"]) == (model, task)]
            for score in found:
                if score["name"] == "dense":
                    axes.axhline(score["mean"], color="black", linewidth=1, linestyle="--", label="dense")
            for name, (label, colour) in METHODS.items():
                points = sorted((s for s in found if s["name"] == name), key=lambda s: s["compression"])
                if not points:
                    continue
                axes.errorbar(
                    [point["compression"] for point in points],
                    [point["mean"] for point in points],
                    [point["error"] for point in points],
                    color=colour,
                    label=label,
                    marker="o",
                    markersize=4,
                    capsize=2,
                    linewidth=2 if name == "sparq" else 1.2,
                    zorder=3 if name == "sparq" else 2,
                )
            axes.set_xscale("log", base=2)
            axes.set_xticks([2, 4, 8, 16])
            axes.xaxis.set_major_formatter(ScalarFormatter())
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_title(title, fontsize=10)
            axes.grid(alpha=0.3)
        line[0].set_ylabel(model)
    for axes in grid[-1]:
        axes.set_xlabel("times fewer bytes of the cache read")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the JSON files lie")
    folder = parser.parse_args().folder
    (folder / "tables.md").write_text(all_tables(folder))
    divergence.plot(read(folder, "divergence"), folder / "divergence.png")
    plot(read(folder, "sweep"), folder / "scores.png")


def all_tables(folder: Path) -> str:
    parts = (
        (moved_predictions, "divergence"),
        (changed_defaults, "ablations"),
        (written_texts, "answers"),
        (tables, "sweep"),
    )
    return "\n".join(made(read(folder, name)) for made, name in parts if (folder / f"{name}.json").exists())


def read(folder: Path, name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    return content


if __name__ == "__main__":
    main()
