"""transformers' OpenAI-compatible server around one model with SparQ."""

from __future__ import annotations

import contextlib
import inspect
import json
import socket
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Any

import psutil
import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from jinja2 import TemplateError
from pydantic import TypeAdapter, ValidationError
from starlette.exceptions import HTTPException as StarletteHTTPException
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import GenerationState, Modality

from sparq.config import SparqConfig, settled
from sparq.patching import configured, patch
from sparq.questions import turn_ends
from sparq.served import unwrap
from sparq.serving.conversations import Conversations
from sparq.serving.disconnects import Disconnects
from sparq.serving.inference import Cancelled, Inference
from sparq.serving.metrics import Metrics

# Parts of a message's content, as OpenAI's and transformers' clients call them.
MEDIA = {"audio_url", "file", "image_url", "input_audio", "input_file", "input_image", "video_url"}


def build(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    config: SparqConfig | Mapping[str, Any] | None = None,
    slots: int = 4,
    max_bytes: int | None = None,
    **knobs: Any,
) -> FastAPI:
    """An ASGI application that serves `model` with SparQ: POST /v1/chat/completions, /v1/completions, /v1/responses,
    GET /v1/models, /metrics, /health.

    Args:
        model: a causal language model. It belongs to the application from now on.
        tokenizer: its tokenizer, a fast one; with a chat template where there is to be a chat.
        name: what clients call the model.
        config, knobs: as `sparq.patch` takes them.
        slots: conversations whose caches are kept, 0 or more.
        max_bytes: that they may hold together. None: half of the memory that is free now.

    Raises:
        TypeError, ValueError: a bad argument, or a model that SparQ cannot serve, with the reason.
    """
    if slots < 0:
        raise ValueError(f"slots must be 0 or more, got {slots}")
    if max_bytes is not None and max_bytes < 0:
        raise ValueError(f"max_bytes must be 0 or more, got {max_bytes}")
    if not hasattr(tokenizer, "_tokenizer"):
        raise ValueError(f"tokenizer must be a fast one, which decodes token by token, got {type(tokenizer).__name__}")
    settings = settled(configured(unwrap(model)) if config is None else config, knobs)
    patch(model, settings)
    if tokenizer.chat_template is not None:
        model.generation_config.eos_token_id = turn_ends(tokenizer, model)
    model.generation_config.cache_implementation = None  # a conversation's cache is a dynamic one
    conversations = Conversations(model, slots, _half_of_free(model.device) if max_bytes is None else max_bytes)
    metrics = Metrics(conversations)
    inference = Inference(model, settings, conversations, metrics)
    app = _transformers_app(_OneModel(name, model, tokenizer, conversations), _State(inference))
    app.get("/metrics")(lambda: Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8"))
    app.add_middleware(Disconnects)
    _answer_errors(app)
    return app


def run(app: FastAPI, listener: socket.socket) -> None:
    """Answer on a bound socket until SIGINT or SIGTERM; requests in progress are then given five seconds."""
    with contextlib.suppress(KeyboardInterrupt):  # which uvicorn raises when all is done
        uvicorn.Server(uvicorn.Config(app, timeout_graceful_shutdown=5)).run(sockets=[listener])


class _OneModel:
    """In place of transformers' manager of models, which loads whatever a client names, pickles too."""

    def __init__(
        self, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, conversations: Conversations
    ) -> None:
        self.force_model = name
        self._loaded = model, tokenizer
        self._conversations = conversations

    def process_model_name(self, name: str) -> str:
        return name

    def load_model_and_processor(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        return self._loaded

    def get_model_modality(self, *args: Any, **kwargs: Any) -> Modality:
        return Modality.LLM

    async def load_model_streaming(self, name: str, gguf_file: str | None = None) -> AsyncIterator[str]:
        """For `transformers chat`, which asks for its model to be loaded."""
        if name == self.force_model:
            event = {"status": "ready", "model": name, "cached": True}
        else:
            message = f"model must be {self.force_model}, the only one here, got {name}"
            event = {"status": "error", "model": name, "message": message}
        yield f"data: {json.dumps(event)}\n\n"

    def list_models(self) -> list[dict[str, Any]]:
        return [{"id": self.force_model, "object": "model", "created": 0, "owned_by": "sparq"}]

    get_gen_models = list_models  # its name in transformers 5.17

    def shutdown(self) -> None:
        """POST /reset, and the end. The model stays."""
        self._conversations.forget()


class _State(GenerationState):
    def __init__(self, inference: Inference) -> None:
        super().__init__()
        self._inference = inference

    def get_manager(self, model_id: str, use_cb: bool = False) -> Inference:
        return self._inference


class _Checked:
    """What a request must be before it is looked at; transformers checks the names of its fields."""

    _valid_params_class: Any
    _unused_fields: set[str]
    model_manager: Any

    def _validate_request(self, body: dict) -> None:
        super()._validate_request(body)  # type: ignore[misc]
        for name in ("messages", "input"):
            _refuse_media(body.get(name))
        # The types are those of streams, and either may leave the model out.
        whole = {"model": self.model_manager.force_model, **body, "stream": True}
        try:
            checked = TypeAdapter(self._valid_params_class).validate_python(whole)
        except ValidationError as error:
            raise _refusal(error) from error
        _read_all(checked)
        for name, most in (("temperature", 2), ("top_p", 1)):
            if not 0 <= (body.get(name) or 0) <= most:
                raise HTTPException(400, f"{name} must be from 0 to {most}, got {body[name]}")
        body.setdefault("stream", False)  # as OpenAI has it; transformers streams responses
        if "max_completion_tokens" in self._unused_fields:  # of transformers 5.17: it would be ignored
            tokens = body.pop("max_completion_tokens", None)
            if tokens is not None:
                body["max_tokens"] = tokens

    def _build_generation_config(self, body: dict, *args: Any, **kwargs: Any) -> GenerationConfig:
        seed = body.pop("seed", None)  # transformers sets it now, and whoever is in the queue before uses it
        generation_config = super()._build_generation_config(body, *args, **kwargs)  # type: ignore[misc]
        generation_config.sparq_seed = seed
        # transformers leaves it to the model whether these have a meaning.
        if body.get("temperature") == 0:
            generation_config.do_sample, generation_config.temperature = False, None
        elif body.get("temperature") is not None or body.get("top_p") is not None:
            generation_config.do_sample = True
        return generation_config


class _Chat(_Checked, ChatCompletionHandler):
    pass


class _Completion(_Checked, CompletionHandler):
    pass


class _Response(_Checked, ResponseHandler):
    def _validate_request(self, body: dict) -> None:
        super()._validate_request(body)
        if "input" not in body:  # which OpenAI's types leave open
            raise HTTPException(400, "input: Field required")


class _NotServed:
    """Of whatever else transformers' server has: speech, decisions."""

    async def handle_request(self, *args: Any, **kwargs: Any) -> None:
        raise HTTPException(501, "this server answers /v1/chat/completions, /v1/completions and /v1/responses")


def _transformers_app(models: _OneModel, state: _State) -> FastAPI:
    handlers: dict[str, Any] = {
        "chat_handler": _Chat(models, state),  # type: ignore[arg-type]
        "completion_handler": _Completion(models, state),  # type: ignore[arg-type]
        "response_handler": _Response(models, state),  # type: ignore[arg-type]
    }
    names = [name for name in inspect.signature(build_server).parameters if name.endswith("_handler")]
    return build_server(
        model_manager=models,  # type: ignore[arg-type]
        generation_state=state,
        **{name: handlers.get(name, _NotServed()) for name in names},
    )


def _answer_errors(app: FastAPI) -> None:
    """Errors in OpenAI's form, which its clients show."""

    def answer(status: int, message: str) -> JSONResponse:
        kind = "invalid_request_error" if status < 500 else "server_error"
        return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": None}}, status)

    @app.exception_handler(StarletteHTTPException)
    def refused(request: Request, error: StarletteHTTPException) -> Response:
        return answer(error.status_code, str(error.detail))

    @app.exception_handler(RequestValidationError)
    def not_json(request: Request, error: RequestValidationError) -> Response:
        return answer(400, f"the body must be a JSON object: {error.errors()[0]['msg']}")

    # What `generate` and chat templates raise about their arguments.
    for kind in (ValueError, TypeError, TemplateError):
        app.exception_handler(kind)(lambda request, error: answer(400, str(error)))
    app.exception_handler(Cancelled)(lambda request, error: Response(status_code=499))
    app.exception_handler(Exception)(lambda request, error: answer(500, "an error in the server, which its log shows"))


def _read_all(checked: Any, where: str = "") -> None:
    """What pydantic checks only when it is read: the items of lists, messages and their parts.

    Raises:
        HTTPException: where something is wrong, and what.
    """
    if isinstance(checked, (str, bytes)) or not isinstance(checked, Iterable):
        return
    try:
        for name, value in checked.items() if isinstance(checked, dict) else enumerate(checked):
            _read_all(value, f"{where}{name}.")
    except ValidationError as error:
        raise _refusal(error, where) from error


def _refusal(error: ValidationError, where: str = "") -> HTTPException:
    """Of a value that may be of several kinds: what is wrong with it as the first of them."""
    found = error.errors(include_url=False)[0]
    place = where + ".".join(str(part) for part in found["loc"])
    return HTTPException(400, f"{place}: {found['msg']}, got {found['input']!r:.100}")


def _refuse_media(items: Any) -> None:
    """items: messages, or parts of one; transformers would leave out what is not text."""
    for item in items if isinstance(items, list) else []:
        if isinstance(item, dict):
            if item.get("type") in MEDIA:
                raise HTTPException(400, f"content must be text, got a part of type {item['type']}")
            _refuse_media(item.get("content"))


def _half_of_free(device: torch.device) -> int:
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return free // 2
