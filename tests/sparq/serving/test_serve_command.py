"""`sparq serve` as a user starts it, asked by OpenAI's client and by `transformers chat`."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import demo_text
import openai
import pytest
import requests

from sparq_command import main
from tests.sparq.serving.test_server import KEY, MODEL, TEMPLATE, TEXT, answer, question

pytestmark = pytest.mark.slow

START = 120  # seconds; most of them for importing torch and transformers on a busy machine


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model with a chat template."""
    copy = tmp_path_factory.mktemp("models") / "recall"
    shutil.copytree(MODEL, copy)
    (copy / "chat_template.jinja").write_text(TEMPLATE)
    return copy


@contextmanager
def served(model: Path, *options: str, cwd: Path | None = None) -> Iterator[str]:
    """The address of a server, which ends as by Ctrl+C, and then must have ended well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("sparq")), "serve", str(model), f"--port={port}", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=cwd
    )
    url = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + START
        while True:
            assert process.poll() is None and time.monotonic() < until, process.communicate()[0]
            try:
                requests.get(f"{url}/health").raise_for_status()
                break
            except requests.ConnectionError:
                time.sleep(0.2)
        yield url
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=30)
        assert process.returncode == 0, said
        sys.stdout.write(said)  # for the test to look at
    finally:
        process.kill()
        process.communicate()


def test_a_folder_is_served_and_its_log_says_what_was_read(folder, capsys):
    with served(folder, "--ratio=8", "--min-length=0", "--slots=2") as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=60)
        assert [model.id for model in client.models.list()] == [str(folder)]
        for name in ("amber", "ember"):
            messages = [dict(role="user", content=TEXT + question(name))]
            chat = client.chat.completions.create(model=str(folder), messages=messages, max_tokens=KEY, temperature=0)
            assert chat.choices[0].message.content == answer(name)
        with pytest.raises(openai.BadRequestError, match="pinned"):
            client.chat.completions.create(model="another", messages=messages)
    log = capsys.readouterr().out
    assert f"{url}/v1 answers as" in " ".join(log.split())
    assert "tokens/s" in log and "fewer bytes read, mean α" in log and "cached" in log


def test_transformers_chat(folder):
    """Its user asks twice and leaves."""
    with served(folder, "--ratio=8", "--min-length=0") as url:
        program = str(Path(sys.executable).with_name("transformers"))
        chat = subprocess.run(
            [program, "chat", str(folder), url, "do_sample=False", f"max_new_tokens={KEY}"],
            input="The pass key of amber is 12345. The pass key of amber is\ny\n!exit\n",
            env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"},
            capture_output=True,
            text=True,
            timeout=START,
            cwd=folder,
        )
        assert "12345" in chat.stdout.split("amber is")[-1], chat.stdout + chat.stderr
        metrics = requests.get(f"{url}/metrics").text
    assert 'sparq_requests_total{outcome="done"} 1.0' in metrics or 'outcome="done"} 2.0' in metrics


def test_a_real_model_chats_over_several_turns(smollm2):
    """SmolLM2, whose file names only the token that ends a document: it must stop at the end of its turn."""
    with served(smollm2, "--ratio=8", "--min-length=0", "--dtype=float32") as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=300)
        facts = list(demo_text.DOCUMENT_FACTS.items())
        text = "\n\n".join([demo_text.document()[:6000], *(fact for fact, _ in facts)])
        messages = []
        for number, (_, (asked, right)) in enumerate(facts[:2]):
            messages.append(dict(role="user", content=asked if number else f"{text}\n\n{asked}"))
            chat = client.chat.completions.create(model=str(smollm2), messages=messages, max_tokens=40, temperature=0)
            reply = chat.choices[0].message.content
            assert right in reply and "<|im_end|>" not in reply and chat.choices[0].finish_reason == "stop"
            messages.append(dict(role="assistant", content=reply))
        metrics = requests.get(f"{url}/metrics").text
    cached = next(line for line in metrics.splitlines() if line.startswith("sparq_prompt_tokens_cached_total"))
    assert float(cached.split()[1]) > 1000, "the second turn did not read the text again"


@pytest.mark.parametrize(
    "options, names",
    [
        (["--ratio=0"], "ratio must be"),
        (["--r=1000"], "r must not be larger"),
        (["--mass=2"], "mass must be"),
        (["--slots=-1"], "--slots must be 0 or more, got -1"),
        (["--cache-gb=-1"], "--cache-gb must be 0 or more, got -1"),
        (["--port=70000"], "--port"),
        (["--host=nowhere.invalid"], "--host"),
        (["--device=nothing"], "--device must be"),
    ],
)
def test_bad_options_are_refused_at_the_start(folder, options, names, capsys):
    with pytest.raises(SystemExit) as error:
        main(["serve", str(folder), *options])
    assert error.value.code == 2 and names in capsys.readouterr().err


def test_an_address_in_use_is_refused_before_the_model_is_loaded(folder, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(SystemExit):
        main(["serve", "no such model", f"--port={other.getsockname()[1]}"])
    assert "in use" in capsys.readouterr().err


def test_a_pickle_is_not_read(folder, tmp_path, capsys):
    copy = tmp_path / "pickled"
    shutil.copytree(folder, copy)
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(SystemExit):
        main(["serve", str(copy), "--port=0"])
    assert "safetensors" in capsys.readouterr().err


def test_code_of_a_model_is_not_run(folder, tmp_path, capsys):
    copy = tmp_path / "coded"
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    config |= dict(auto_map=dict(AutoModelForCausalLM="code.Model", AutoConfig="code.Config"), model_type="strange")
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "code.py").write_text("raise SystemExit('this must not run')\n")
    with pytest.raises(SystemExit) as error:
        main(["serve", str(copy), "--port=0"])
    assert error.value.code == 2 and "trust_remote_code" in capsys.readouterr().err
