"""A pipeline of transformers, in the manner of kvpress: a context, and questions about it."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from transformers import AutoModelForCausalLM, Pipeline
from transformers.pipelines import PIPELINE_REGISTRY

from sparq.patching import is_patched, patched
from sparq.questions import answer

TASK = "sparq-text-generation"


class SparqTextGenerationPipeline(Pipeline):
    """Answers to questions about a context, by `sparq.answer`, decoded with SparQ.

        pipe = pipeline("sparq-text-generation", model=model, tokenizer=tokenizer)
        pipe(context, question="Why?")["answer"]
        pipe(context, questions=["Why?", "Who?"])["answers"]

    A model that is patched decodes as it is; another is patched for the time of a call.
    """

    _load_tokenizer: Any = True

    def __call__(  # type: ignore[override]  # nothing else stands behind the context
        self, context: str | list[str], *, batch_size: int | None = None, **options: Any
    ) -> Any:
        """Each of these but `context` may also be given to `pipeline`, for all calls.

        Args:
            context: a text, or a list of several.
            batch_size: how many questions at a time, as `sparq.answer` has it.
            options: `question`, a string, or `questions`, a list of them, or neither, to go on from the context;
                `sparq_config`, the knobs of SparQ, a SparqConfig or a dict (None: the model's own, if it is patched
                those it is patched with); the others of `sparq.answer`.

        Returns:
            A dict with "answer", a string, or with "answers", a list, where there were `questions`; of a list of
            contexts a list of these.

        Raises:
            TypeError, ValueError: as `sparq.answer` and `sparq.patch`; both `question` and `questions`.
        """
        size = self._batch_size if batch_size is None else batch_size
        if size is not None:  # transformers' own is of contexts
            options["questions_at_once"] = size
        return super().__call__(context, batch_size=1, **options)

    def _sanitize_parameters(self, **options: Any) -> tuple[dict, dict, dict]:
        if "questions_at_once" in options:
            options["batch_size"] = options.pop("questions_at_once")
        return {}, options, {}

    def preprocess(self, input_: str, **options: Any) -> dict[str, Any]:
        return {"context": input_}

    def _forward(self, input_tensors: dict[str, Any], **options: Any) -> Any:
        question, questions = options.pop("question", None), options.pop("questions", None)
        sparq_config = options.pop("sparq_config", None)
        tokenizer: Any = self.tokenizer
        if question is not None and questions is not None:
            raise ValueError(f"question must be left out beside questions, got {question!r} and {questions!r}")
        asked = [question or ""] if questions is None else questions
        as_it_is = sparq_config is None and is_patched(self.model)
        with nullcontext() if as_it_is else patched(self.model, sparq_config):
            answers = answer(self.model, tokenizer, input_tensors["context"], asked, **options)
        return {"answer": answers[0]} if questions is None else {"answers": answers}

    def postprocess(self, model_outputs: dict[str, Any], **options: Any) -> dict[str, Any]:
        return model_outputs


PIPELINE_REGISTRY.register_pipeline(TASK, SparqTextGenerationPipeline, pt_model=AutoModelForCausalLM)
