"""vLLM's HTTP server with SparQ, asked by the `openai` client."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import demo_text
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "evals" / "models" / "recall-llama"
TEXT = (ROOT / "evals" / "demo.txt").read_text()
LAYERS = json.loads((MODEL / "config.json").read_text())["num_hidden_layers"]
START = 240  # seconds


class Server:
    def __init__(self, log: Path, *options: str, **knobs: Any) -> None:
        """options: of vLLM's command.  knobs: SparQ's."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{free.getsockname()[1]}"
        host, port = self.url.removeprefix("http://").split(":")
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", host, "--port", port]
        command += ["--model", str(MODEL), "--served-model-name", "recall", "--dtype", "float32"]
        command += options or ["--enforce-eager"]
        command += ["--kv-cache-memory-bytes", str(512 << 20), "--max-model-len", "8192"]
        command += ["--attention-backend", "CUSTOM", "--additional-config", json.dumps({"sparq": knobs})]
        command += ["--worker-extension-cls", "sparq.vllm.report.WorkerExtension"]
        kept = {name: value for name, value in os.environ.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}
        changes = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_LOGGING_LEVEL": "INFO", "VLLM_LOG_STATS_INTERVAL": "1"}
        metrics = log.parent / "metrics"
        metrics.mkdir()
        changes["PROMETHEUS_MULTIPROC_DIR"] = str(metrics)
        if options:  # a core for each of two processes
            changes["VLLM_CPU_OMP_THREADS_BIND"] = "0|1"
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(command, env=kept | changes, stdout=file, stderr=subprocess.STDOUT)
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", timeout=120)

    def wait(self) -> None:
        until = time.monotonic() + START
        while time.monotonic() < until and self.process.poll() is None:
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
                return
            except OSError:
                time.sleep(1)
        raise AssertionError(self.log.read_text()[-4000:])

    def reports(self) -> list[dict[str, Any]]:
        """Of each worker of the first engine."""
        body = json.dumps({"method": "sparq_report"}).encode()
        request = urllib.request.Request(f"{self.url}/collective_rpc", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["results"]

    def report(self) -> dict[str, Any]:
        return self.reports()[0]

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(tmp_path_factory.mktemp("server") / "log", ratio=8)
    try:
        running.wait()
        yield running
    finally:
        running.stop()


def ask(server: Server, name: str, **options: Any) -> Any:
    prompt = f"{TEXT}\nThe pass key of {name} is"
    return server.client.completions.create(model="recall", prompt=prompt, max_tokens=12, temperature=0, **options)


def test_pass_keys_are_found_by_sparse_steps(server: Server) -> None:
    before = server.report()
    for name, key in demo_text.FACTS.items():
        assert str(key) in ask(server, name).choices[0].text
    found = server.report()
    assert found["sparse_token_layers"] - before["sparse_token_layers"] > 5 * 8
    assert found["bytes_dense"] > 3 * found["bytes_read"] and found["mean_alpha"] > 0.8


def test_a_stream_says_the_same(server: Server) -> None:
    name, key = next(iter(demo_text.FACTS.items()))
    whole = ask(server, name).choices[0].text
    pieces = [part.choices[0].text for part in ask(server, name, stream=True) if part.choices]
    assert "".join(pieces) == whole and str(key) in whole and len(pieces) > 3


def test_the_log_says_what_was_read(server: Server) -> None:
    for name in demo_text.FACTS:
        time.sleep(0.5)
        ask(server, name)
    assert "fewer bytes of the cache read than dense, mean alpha" in server.log.read_text()


def test_the_metrics_are_among_vllms(server: Server) -> None:
    for name in demo_text.FACTS:
        time.sleep(0.5)
        ask(server, name)
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=60) as answer:
        samples = text_string_to_metric_families(answer.read().decode())
        found = {sample.name: sample for family in samples for sample in family.samples}
    assert found["vllm:generation_tokens_total"].value > 0
    assert found["sparq_sparse_steps_total"].value == LAYERS * found["sparq_decoded_tokens_total"].value > 0
    assert found["sparq_dense_read_bytes_total"].value > 3 * found["sparq_read_bytes_total"].value
    assert found["sparq_alpha_total"].value > 0.8 * found["sparq_sparse_steps_total"].value
    assert found["sparq_alpha_total"].labels == {"engine": "0", "worker": "0"}


@pytest.mark.parametrize("split", ["pipeline", "data"])
def test_two_processes(tmp_path: Path, split: str) -> None:
    """A half of the layers for each, or a half of the requests.  vLLM's CPU worker has no room for what comes from the
    layers before it until a model is compiled, so that a pipeline of two cannot be eager."""
    server = Server(tmp_path / "log", f"--{split}-parallel-size=2", ratio=8)
    try:
        server.wait()
        with ThreadPoolExecutor() as together:
            answers = list(together.map(lambda name: ask(server, name).choices[0].text, demo_text.FACTS))
        found = server.reports()
    finally:
        server.stop()
    assert all(str(key) in answer for key, answer in zip(demo_text.FACTS.values(), answers, strict=True))
    tokens = 11 * len(answers)  # the first of 12 is the prompt's
    assert len(found) == (2 if split == "pipeline" else 1)
    for report in found:
        layers = LAYERS // len(found)
        assert report["sparse_token_layers"] == report["token_layers"] == layers * report["decoded_tokens"]
        assert report["decoded_tokens"] == tokens if split == "pipeline" else 0 < report["decoded_tokens"] < tokens


def test_wrong_knobs_end_the_server_with_words(tmp_path: Path) -> None:
    refused = Server(tmp_path / "log", ratio=0.5)
    try:
        assert refused.process.wait(START) != 0
    finally:
        refused.stop()
    assert "ratio must be a finite number of at least 1, got 0.5" in refused.log.read_text()
