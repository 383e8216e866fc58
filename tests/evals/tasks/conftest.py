import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[3]
TASKS = REPOSITORY / "evals" / "tasks"


@dataclass
class Evaluation:
    metrics: dict  # {"match,none": ...}
    documents: list[dict]  # in the order of evaluation
    scores: list[dict]  # every document's sample as lm-eval logs it
    arguments: list[tuple]  # every request's, as the model got them


@pytest.fixture
def tasks_folder():
    return TASKS


@pytest.fixture
def byte_tokenizer():
    return str(REPOSITORY / "evals" / "models" / "recall-llama")


@pytest.fixture
def evaluate(tmp_path):
    """A function that runs one of the tasks on rows in place of the hub's, with a model that answers by a function."""
    import lm_eval
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

    class Scripted(LM):
        def __init__(self, answer: Callable):
            super().__init__()
            self.answer = answer
            self.arguments = []

        def respond(self, requests, disable_tqdm=False):
            self.arguments += [request.args for request in requests]
            return [self.answer(*request.args) for request in requests]

        generate_until = loglikelihood = respond
        loglikelihood_rolling = None  # no task of these uses it

    def run(task: str, splits: dict[str, list[dict]], answer: Callable, limit=None, metadata=None) -> Evaluation:
        files = {}
        for split, rows in splits.items():
            files[split] = str(tmp_path / f"{split}.jsonl")
            Path(files[split]).write_text("".join(json.dumps(row) + "\n" for row in rows))
        source = {"path": "json", "data_files": files, "cache_dir": str(tmp_path / "cache")}
        local = {"include": str(TASKS / "paper" / f"{task}.yaml"), "task": task, "dataset_kwargs": {"source": source}}
        (tmp_path / "local.yaml").write_text(json.dumps(local))
        model = Scripted(answer)
        output = lm_eval.simple_evaluate(
            model,
            tasks=[task],
            task_manager=TaskManager(include_path=[TASKS, tmp_path], include_defaults=False, metadata=metadata),
            limit=limit,
            bootstrap_iters=0,
        )
        samples = output["samples"][task]
        return Evaluation(output["results"][task], [sample["doc"] for sample in samples], samples, model.arguments)

    return run
