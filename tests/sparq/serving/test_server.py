"""The server, asked by OpenAI's own client over HTTP: a bundled model that finds pass keys in a text of 7,500 bytes."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import demo_text
import openai
import pytest
import requests
import torch
import uvicorn
from fastapi import FastAPI
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families
from transformers import AutoModelForCausalLM, AutoTokenizer

import sparq
from sparq import serving

ROOT = Path(__file__).parents[3]
MODEL = ROOT / "evals" / "models" / "recall-llama"
TEXT = (ROOT / "evals" / "demo.txt").read_text()
# The bundled model goes on with a text; this template has nothing else.
TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message.content }}{% endfor %}"
SLOTS = 3
KEY = 6  # tokens of a pass key, and of the space before it


@dataclass
class Running:
    app: FastAPI
    model: Any
    url: str

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", timeout=60, max_retries=0)

    def metrics(self) -> dict[str, float]:
        """Sums over labels; of requests by outcome."""
        sums: dict[str, float] = {}
        for family in text_string_to_metric_families(requests.get(f"{self.url}/metrics").text):
            for sample in family.samples:
                if sample.name.endswith("_created"):
                    continue
                name = sample.labels.get("outcome", sample.name.removeprefix("sparq_"))
                sums[name] = sums.get(name, 0) + sample.value
        return sums

    def ask(self, *contents: str, **options: Any) -> Any:
        """A chat; contents: what user and assistant have said, in turn."""
        messages = [dict(role=("user", "assistant")[i % 2], content=content) for i, content in enumerate(contents)]
        options = dict(model="recall", max_tokens=KEY, temperature=0) | options
        return self.client.chat.completions.create(messages=messages, **options)

    def wait_until(self, name: str, count: float) -> None:
        until = time.monotonic() + 20
        while self.metrics().get(name, 0) < count:
            assert time.monotonic() < until, f"{name} is {self.metrics().get(name, 0)}, not {count}"
            time.sleep(0.05)


def load() -> tuple[Any, Any]:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.chat_template = TEMPLATE
    return AutoModelForCausalLM.from_pretrained(MODEL).eval(), tokenizer


def question(name: str) -> str:
    return f"\nThe pass key of {name} is"


def answer(name: str) -> str:
    return f" {demo_text.FACTS[name]}"


def said(completion: Any) -> str:
    return completion.choices[0].message.content


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    model, tokenizer = load()
    app = serving.build(model, tokenizer, "recall", slots=SLOTS, ratio=8, min_length=0)
    http = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=http.run)
    thread.start()
    while not http.started:
        assert thread.is_alive()
        time.sleep(0.01)
    port = http.servers[0].sockets[0].getsockname()[1]
    yield Running(app, model, f"http://127.0.0.1:{port}")
    http.should_exit = True
    thread.join(30)
    assert not thread.is_alive()


@pytest.fixture(autouse=True)
def nothing_kept(server: Running) -> None:
    requests.post(f"{server.url}/reset").raise_for_status()


def test_answers_are_right_and_sparse(server):
    before = server.metrics()
    for name in demo_text.FACTS:
        assert said(server.ask(TEXT + question(name))) == answer(name)
    now = server.metrics()
    change = {name: now[name] - before.get(name, 0) for name in now}
    assert change["done"] == 5 and change["new_tokens_total"] == 5 * KEY
    assert change["sparse_steps_total"] == 5 * (KEY - 1) * len(server.model.model.layers)
    assert 4 * change["read_bytes_total"] < change["dense_read_bytes_total"]
    assert 0.9 < change["alpha_total"] / change["sparse_steps_total"] <= 1
    assert change["prompt_seconds_total"] > 0 and change["decode_seconds_total"] > 0
    assert change["prompt_tokens_cached_total"] > 0.79 * change["prompt_tokens_total"], "the text was read once"
    assert now["requests_waiting"] == 0


def test_usage_and_reason(server):
    prompt = "One two three."
    short = server.ask(prompt, max_tokens=3)
    assert short.usage.prompt_tokens == 1 + len(prompt) and short.usage.completion_tokens == 3
    assert short.choices[0].finish_reason == "length" and short.model == "recall"


def test_a_stream_says_the_same(server):
    chunks = list(server.ask(TEXT + question("cobalt"), stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == answer("cobalt")
    assert sum(bool(chunk.choices[0].delta.content) for chunk in chunks) > 1, "token by token"
    assert chunks[-1].choices[0].finish_reason == "length" and chunks[-1].usage.completion_tokens == KEY


def test_completions_and_responses(server):
    options = dict(model="recall", temperature=0)
    prompt = TEXT + question("dahlia")
    completion = server.client.completions.create(prompt=prompt, max_tokens=KEY, **options)
    assert completion.choices[0].text == answer("dahlia")
    chunks = server.client.completions.create(prompt=prompt, max_tokens=KEY, stream=True, **options)
    assert "".join(chunk.choices[0].text for chunk in chunks) == answer("dahlia")
    response = server.client.responses.create(input=prompt, max_output_tokens=KEY, **options)
    assert response.output_text == answer("dahlia")
    events = server.client.responses.create(input=prompt, max_output_tokens=KEY, stream=True, **options)
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == answer("dahlia")


def test_the_second_turn_costs_its_own_tokens(server):
    first = TEXT + question("amber")
    before = server.metrics()
    reply = said(server.ask(first))
    between = server.metrics()
    assert between["prompt_tokens_cached_total"] == before.get("prompt_tokens_cached_total", 0)
    assert said(server.ask(first, reply, question("ember"))) == answer("ember")
    after = server.metrics()
    prompt = after["prompt_tokens_total"] - between["prompt_tokens_total"]
    cached = after["prompt_tokens_cached_total"] - between["prompt_tokens_cached_total"]
    # The last token of an answer has not been through the model.
    assert cached == 1 + len(first.encode()) + KEY - 1 and prompt - cached == 1 + len(question("ember"))


def test_two_at_once_and_each_gets_its_own(server):
    names = ["basalt", "amber", "ember", "cobalt"]
    with ThreadPoolExecutor(4) as pool:
        texts = list(pool.map(lambda name: ask_for(server, name, stream=name in names[:2]), names))
    assert texts == [answer(name) for name in names]


def test_a_temperature_samples_and_a_seed_is_its_requests_own(server):
    """Also while others, with other seeds, are in the queue."""
    prompt, options = "Once upon a time", dict(temperature=1.5, max_tokens=20)
    alone = {seed: said(server.ask(prompt, seed=seed, **options)) for seed in (1, 2)}
    assert alone[1] != alone[2]
    by_top_p = server.ask(prompt, temperature=None, top_p=0.99, seed=1, max_tokens=20)
    assert said(by_top_p) != said(server.ask(prompt, max_tokens=20))
    with ThreadPoolExecutor(6) as pool:
        seeds = [1, 2] * 3
        assert list(pool.map(lambda seed: said(server.ask(prompt, seed=seed, **options)), seeds)) == [
            alone[seed] for seed in seeds
        ]


def ask_for(server: Running, name: str, stream: bool) -> str:
    found = server.ask(TEXT + question(name), stream=stream)
    return "".join(chunk.choices[0].delta.content or "" for chunk in found) if stream else said(found)


def test_ten_conversations_beyond_the_slots(server):
    prompts = [f"Conversation {i}. " + f"word{i} " * (20 + i) for i in range(SLOTS + 10)]
    expected = [alone(server.model, prompt) for prompt in prompts]
    for turn in range(2):
        for prompt, right in zip(prompts, expected, strict=True):
            assert said(server.ask(prompt)) == right, turn
            assert server.metrics()["conversations"] <= SLOTS
    assert server.metrics()["conversations"] == SLOTS
    assert server.metrics()["conversations_bytes"] > 0


def alone(model: Any, prompt: str) -> str:
    """What the patched model says without a server."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=KEY, do_sample=False)
    return tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)


def test_a_stream_that_is_left_frees_the_model_and_leaves_nothing_behind(server):
    cancelled = server.metrics().get("cancelled", 0)
    stream = server.ask(TEXT + question("amber"), stream=True, max_tokens=600)
    for _, _chunk in zip(range(4), stream, strict=False):
        pass
    stream.close()
    server.wait_until("cancelled", cancelled + 1)
    now = server.metrics()
    assert now["conversations"] == 0 and now["requests_waiting"] == 0
    assert said(server.ask(TEXT + question("amber"))) == answer("amber")


class Slow:
    """A hook: the prompt takes as long as the test needs."""

    def __init__(self, model: Any) -> None:
        self.reached, self.goes_on = threading.Event(), threading.Event()
        self.layers = 0
        self.hooks = [layer.register_forward_hook(self.wait) for layer in model.model.layers]

    def wait(self, *args: Any) -> None:
        self.layers += 1
        self.reached.set()
        assert self.goes_on.wait(20)

    def __enter__(self) -> Slow:
        return self

    def __exit__(self, *error: Any) -> None:
        self.goes_on.set()
        for hook in self.hooks:
            hook.remove()


@pytest.mark.parametrize("stream", [False, True])
def test_whoever_leaves_during_the_prompt_or_in_the_queue_is_not_computed_for(server, stream):
    before = server.metrics()
    with Slow(server.model) as slow:
        body = dict(model="recall", messages=[dict(role="user", content=TEXT)], stream=stream)
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda _: leave(server.url, body, slow.reached), range(2)))
        time.sleep(0.3)  # the server reads that they have gone
        slow.goes_on.set()
        server.wait_until("cancelled", before.get("cancelled", 0) + 2)
        assert slow.layers == 1, "the first request stopped between two layers, the second before it had begun"
    now = server.metrics()
    assert now["conversations"] == 0 and now["requests_waiting"] == 0
    assert now["new_tokens_total"] == before.get("new_tokens_total", 0)
    assert said(server.ask(TEXT + question("basalt"))) == answer("basalt")


def leave(url: str, body: dict[str, Any], reached: threading.Event) -> None:
    """Ask, and close the connection when the model has begun."""
    host, port = url.removeprefix("http://").split(":")
    content = json.dumps(body).encode()
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        assert reached.wait(20)


MISSING = object()
BAD = {
    "no messages": (dict(messages=MISSING), "messages"),
    "messages of another type": (dict(messages=3), "messages"),
    "a message that is none": (dict(messages=["hello"]), "messages"),
    "a role that is none": (dict(messages=[dict(role="nobody", content="hello")]), "nobody"),
    "no content": (dict(messages=[dict(role="user")]), "messages.0"),
    "an image": (
        dict(messages=[dict(role="user", content=[dict(type="image_url", image_url=dict(url="data:,"))])]),
        "image_url",
    ),
    "no tokens": (dict(max_tokens=0), "max_tokens must be 1 or more, got 0"),
    "fewer than none": (dict(max_tokens=-3), "max_tokens must be 1 or more, got -3"),
    "tokens in words": (dict(max_tokens="many"), "max_tokens"),
    "a temperature below zero": (dict(temperature=-1), "temperature"),
    "top_p beyond one": (dict(top_p=3), "top_p"),
    "an unknown field": (dict(colour="red"), "colour"),
    "another model": (dict(model="gpt-4"), "gpt-4"),
    "a prompt that is too long": (
        dict(messages=[dict(role="user", content="a" * 9000)]),
        "shorter than the model's 8192 tokens, it has 9001",
    ),
}


@pytest.mark.parametrize("body, names", BAD.values(), ids=BAD)
def test_bad_requests_are_refused_with_what_is_wrong(server, body, names):
    body = dict(model="recall", messages=[dict(role="user", content="hello")]) | body
    body = {name: value for name, value in body.items() if value is not MISSING}
    answer = requests.post(f"{server.url}/v1/chat/completions", json=body)
    assert answer.status_code in (400, 422) and names in answer.json()["error"]["message"]
    assert server.metrics()["requests_waiting"] == 0


@pytest.mark.parametrize(
    "path, body, names",
    [
        ("chat/completions", b"{", "JSON"),
        ("chat/completions", b"[1]", "JSON"),
        ("completions", dict(prompt=[["a"]]), "prompt"),
        ("responses", dict(), "input"),
        ("responses", dict(input=[dict(type="input_image", image_url="data:,", detail="low")]), "input_image"),
        ("audio/transcriptions", dict(), "answers"),
        ("nothing", dict(), "Not Found"),
    ],
)
def test_bad_requests_to_other_places(server, path, body, names):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = requests.post(f"{server.url}/v1/{path}", data=content, headers={"Content-Type": "application/json"})
    assert not answer.ok and names in answer.json()["error"]["message"]


def test_without_a_chat_template_completions_are_left():
    model, tokenizer = load()
    tokenizer.chat_template = None
    with TestClient(serving.build(model, tokenizer, "recall"), raise_server_exceptions=False) as client:
        chat = client.post("/v1/chat/completions", json=dict(messages=[dict(role="user", content="hello")]))
        assert chat.status_code == 400 and "chat_template" in chat.json()["error"]["message"]
        assert client.post("/v1/completions", json=dict(prompt="hello", max_tokens=1)).status_code == 200


def test_the_answer_ends_where_the_models_context_does(server):
    long = server.ask("a" * 8180, max_tokens=100)
    assert long.usage.total_tokens == 8192 and long.choices[0].finish_reason == "length"


def test_a_clients_generation_config(server):
    """As `transformers chat` sends it; beams need a cache of their own."""
    config = json.dumps(dict(max_new_tokens=KEY, do_sample=False, num_beams=2))
    found = server.ask(TEXT + question("amber"), max_tokens=None, extra_body=dict(generation_config=config))
    assert said(found) == answer("amber") and server.metrics()["conversations"] == 0


def test_max_completion_tokens(server):
    """Of which transformers 5.17 knows nothing."""
    assert server.ask("abc", max_tokens=None, max_completion_tokens=2).usage.completion_tokens == 2


def test_models_health_and_what_transformers_chat_asks(server):
    assert [model.id for model in server.client.models.list()] == ["recall"]
    assert requests.get(f"{server.url}/health").json() == {"status": "ok"}
    event = requests.post(f"{server.url}/load_model", json=dict(model="recall")).text
    assert json.loads(event.removeprefix("data: "))["status"] == "ready"
    event = requests.post(f"{server.url}/load_model", json=dict(model="another")).text
    assert json.loads(event.removeprefix("data: "))["message"] == "model must be recall, the only one here, got another"


def test_what_cannot_be_served_is_refused_at_the_start():
    model, tokenizer = load()
    for wrong, names in (
        (dict(slots=-1), "slots must be 0 or more, got -1"),
        (dict(max_bytes=-1), "max_bytes must be 0 or more, got -1"),
        (dict(ratio=0), "ratio"),
        (dict(r=1000), "r must not be larger"),
    ):
        with pytest.raises(ValueError, match=names):
            serving.build(model, tokenizer, "recall", **wrong)
    assert not sparq.is_patched(model)
    with pytest.raises(ValueError, match="tokenizer must be a fast one"):
        serving.build(model, object(), "recall")


def test_weights_stay_where_they_are_and_no_gradients_are_kept(server):
    server.ask("abc")
    assert all(parameter.grad is None for parameter in server.model.parameters())
    assert torch.is_grad_enabled()
