"""The command `sparq`: `generate` end to end on a small model with random weights, the rest in processes of its own."""

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from byte_tokenizer import save_byte_tokenizer
from transformers import AutoTokenizer, DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from sparq import SparqConfig, branches, cli, save_cache
from sparq_command import main
from tests.sparq.test_versions import TOO_OLD
from tests.sparq.tiny import build

pytestmark = pytest.mark.slow

PROMPT = "".join(f"line {i} has the number {i * i}.\n" for i in range(20))


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=260,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=258,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    save_byte_tokenizer(folder)
    (folder / "prompt.txt").write_text(PROMPT)
    return folder


def sparq(*arguments, path=None, **environment):
    """Run the installed command; modules in the folder `path` come before all others."""
    environment = {**os.environ, "COLUMNS": "120", **environment}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    command = [str(Path(sys.executable).with_name("sparq")), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def generate(folder, *options):
    return main(["generate", str(folder), "--prompt-file", str(folder / "prompt.txt"), "--max-new-tokens=6", *options])


def test_compare_prints_both_answers_speed_bytes_and_report(model_folder, capsys):
    assert generate(model_folder, "--k=4096", "--min-length=0", "--compare") == 0
    out = capsys.readouterr().out
    assert "  stock  " in out and "  SparQ  " in out
    assert "1 of 1 answers are the same" in out, "k covers the context"
    assert "tokens/s" in out and "MB/token" in out and "read once" not in out
    assert "k covers the context" in out


def test_sparse_run_reports_sparse_steps(model_folder, capsys):
    assert generate(model_folder, "--r=4", "--k=16", "--min-length=0", "--question=Why?", "--question=And line 7?") == 0
    out = capsys.readouterr().out
    assert "Why?" in out and "And line 7?" in out
    assert "stock" not in out
    shared = len(PROMPT) + 1  # the tokenizer's first
    assert f"2 prompt(s) of up to {shared + 11} tokens, the first {shared} of them read once" in " ".join(out.split())
    # In each of two layers: the question is a prompt, from which the first of six tokens comes, and five follow.
    total = next(line for line in out.splitlines() if line.startswith("│   all"))
    assert [cell.strip() for cell in total.split("│")][2:4] == ["20", "0"]


def test_knobs_come_from_a_file_and_options_replace_single_ones(model_folder, tmp_path, capsys):
    SparqConfig(r=4, k=16, min_length=0).save_pretrained(tmp_path)
    assert generate(model_folder, f"--config={tmp_path}", "--r=3") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "SparqConfig(r=3, k=16," in out and "min_length=0)" in out


def test_knobs_saved_with_the_model_are_found(model_folder, tmp_path, capsys):
    folder = shutil.copytree(model_folder, tmp_path / "tuned")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"sparq": {"k": 16, "min_length": 0}}))
    assert generate(folder) == 0
    assert "k=16," in capsys.readouterr().out
    SparqConfig(ratio=4).save_pretrained(tmp_path)
    assert generate(folder, f"--config={tmp_path}") == 0
    assert "k=None, ratio=4," in " ".join(capsys.readouterr().out.split())


def test_what_questions_share_with_each_other_is_read_once_too(model_folder, capsys):
    assert generate(model_folder, "--compare", "--question=What is 1?", "--question=What is 2?") == 0
    out = capsys.readouterr().out
    assert f"the first {1 + len(PROMPT) + 8} of them read once" in " ".join(out.split())
    assert "2 of 2 answers are the same" in out, "dense: the context is short"


@pytest.fixture
def read(monkeypatch):
    """The number of tokens of each pass of a model that has more than one."""
    passes = []
    real = LlamaForCausalLM.forward

    def forward(self, input_ids=None, **kwargs):
        if input_ids.shape[1] > 1:
            passes.append(input_ids.shape[1])
        return real(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", functools.wraps(real)(forward))
    return passes


def said(capsys):
    return " ".join(capsys.readouterr().out.split())


def test_a_prompt_cache_is_written_used_and_extended(model_folder, tmp_path, capsys, read):
    file, prompt_file = tmp_path / "kept.safetensors", tmp_path / "prompt.txt"
    prompt_file.write_text(PROMPT)
    tokens = 1 + len(PROMPT)

    def run(*options):
        read.clear()
        assert generate(model_folder, "--prompt-file", str(prompt_file), "--min-length=0", "--k=16", *options) == 0
        return said(capsys)

    expected = run()
    assert read == [tokens]
    answer = expected.partition("SparQ ")[2].partition("decode")[0]

    out = run(f"--prompt-cache={file}")
    assert f"0 of {tokens - 2} tokens that all prompts begin with were in it; written" in out.replace(",", "")
    assert read == [tokens - 2, 2] and answer in out
    written = file.read_bytes()

    out = run(f"--prompt-cache={file}", "--compare")
    assert f"{tokens - 2} of {tokens - 2} tokens that all prompts begin with were in it; left as it is" in out
    assert read == [2, 2] and answer in out and file.read_bytes() == written

    prompt_file.write_text(PROMPT + "One more line.\n")
    out = run(f"--prompt-cache={file}")
    assert f"{tokens - 2} of {tokens + 13} tokens that all prompts begin with were in it; extended" in out
    assert read == [15, 2] and file.read_bytes() != written

    prompt_file.write_text(PROMPT[:50] + "Another way.\n")
    extended = file.read_bytes()
    out = run(f"--prompt-cache={file}")
    assert f"51 of {1 + 63 - 2} tokens that all prompts begin with were in it; left as it is" in out
    assert read == [11, 2] and file.read_bytes() == extended


def test_questions_share_a_prompt_cache(model_folder, tmp_path, capsys, read):
    file = tmp_path / "kept.safetensors"
    questions = ("--question=Why is that?", "--question=And line 7?")
    for held, passes in (0, [1 + len(PROMPT), 12, 11]), (1 + len(PROMPT), [12, 11]):
        read.clear()
        assert generate(model_folder, *questions, f"--prompt-cache={file}") == 0
        assert f"{held} of {1 + len(PROMPT)} tokens" in said(capsys) and read == passes


def test_a_prompt_cache_of_another_model_ends_with_one_line(model_folder, tmp_path, capsys):
    model = build(vocab_size=260)
    cache = DynamicCache(config=model.config)
    ids = torch.arange(3, 30)[None]
    model(ids, past_key_values=cache)
    save_cache(cache, ids, tmp_path / "kept", model)
    for options, message in (
        ([f"--prompt-cache={tmp_path / 'kept'}"], "kept was made by another model"),
        ([f"--prompt-cache={tmp_path / 'no' / 'kept'}"], "--prompt-cache must be in a folder that exists, got"),
    ):
        with pytest.raises(SystemExit) as exit_:
            generate(model_folder, *options)
        assert exit_.value.code == 2 and message in capsys.readouterr().err


@pytest.fixture
def chat_folder(model_folder, tmp_path):
    """The same model with a template whose turns end with a token that the tokenizer does not call its end."""
    folder = shutil.copytree(model_folder, tmp_path / "chat")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<pad>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def asked(monkeypatch):
    """What `branches.generate` is given: prompts and options of each call."""
    calls = []
    real = branches.generate

    def listening(model, prompts, *args, **options):
        calls.append((prompts, options))
        return real(model, prompts, *args, **options)

    monkeypatch.setattr(branches, "generate", listening)
    return calls


def test_a_chat_template_makes_text_and_question_a_turn(chat_folder, capsys, asked):
    assert generate(chat_folder, "--question=Why?", "--question=And line 7?") == 0
    ((prompts, options),) = asked
    tokenizer = AutoTokenizer.from_pretrained(chat_folder)
    turn = f"user: {PROMPT.rstrip()}\n\n"
    assert tokenizer.batch_decode(prompts) == [
        f"{turn}{question}<pad>assistant: " for question in ("Why?", "And line 7?")
    ]
    assert options["eos_token_id"] == [257, 258], "the model's, and the one that the template ends a turn with"
    out = " ".join(capsys.readouterr().out.split())
    assert f"the first {len(turn)} of them read once, in the model's chat template" in out


def test_without_the_chat_template_the_text_is_bare(chat_folder, capsys, asked):
    assert generate(chat_folder, "--no-chat-template", "--question=Why?") == 0
    ((prompts, options),) = asked
    assert AutoTokenizer.from_pretrained(chat_folder).batch_decode(prompts) == [f"<bos>{PROMPT}Why?"]
    assert "eos_token_id" not in options
    assert "chat template" not in capsys.readouterr().out


def test_a_chat_template_that_fails_ends_with_one_line(chat_folder, capsys):
    (chat_folder / "chat_template.jinja").write_text("{{ raise_exception('no such role') }}")
    with pytest.raises(SystemExit) as exit_:
        generate(chat_folder)
    assert exit_.value.code == 2
    assert (
        "template fails, chat_template=False (--no-chat-template) does without it: no such role"
        in capsys.readouterr().err
    )


def test_questions_in_batches_are_those_of_one_at_a_time(model_folder, tmp_path, capsys, asked):
    (tmp_path / "questions").write_text("Why?\n\n  And what of line 7, then?  \nWho?\n")
    answers = []
    for options in [], ["--batch-size=2"]:
        questions = ["--question=When?", f"--questions-file={tmp_path / 'questions'}", "--min-length=0"]
        assert generate(model_folder, *questions, *options) == 0
        out = capsys.readouterr().out
        answers.append([line for line in out.splitlines() if line.startswith("  SparQ  ")])
        out = " ".join(out.split())
        positions = [out.index(text) for text in ("When?", "Why?", "And what of line 7, then?", "Who?")]
        assert positions == sorted(positions)
        assert f"4 prompt(s) of up to {len(PROMPT) + 26} tokens" in out
        assert ("2 at a time" in out) == bool(options)
    (prompts, one), (same_prompts, batch) = asked
    assert prompts == same_prompts and one == batch and len(prompts) == 4
    assert answers[0] == answers[1] and len(set(answers[0])) > 1


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--batch-size=0", "--batch-size must be at least 1, got 0"),
        ("--questions-file={folder}/empty", "--questions-file must have a question in a line, got none from"),
        ("--questions-file={folder}/none", "No such file"),
    ],
)
def test_questions_that_are_none_end_with_one_line(model_folder, tmp_path, capsys, option, message):
    (tmp_path / "empty").write_text("\n \n")
    with pytest.raises(SystemExit) as exit_:
        generate(model_folder, option.format(folder=tmp_path))
    assert exit_.value.code == 2 and message in capsys.readouterr().err


def test_the_progress_of_prompts_adds_up_and_changes_nothing():
    model = build()
    prompts = [[*range(10, 60), 3, 4], [*range(10, 60), 5, 6]]
    options = dict(max_new_tokens=3, do_sample=False, pad_token_id=0)
    expected = branches.generate(model, prompts, **options).new_tokens
    told, hooks = [], []
    reading = cli._Reading(model, told.append)

    def on_token(tokens):
        reading.end()
        hooks.append(sum(len(module._forward_hooks) for module in model.modules()))

    assert branches.generate(model, prompts, on_token, reading.begin, **options).new_tokens == expected
    assert len(told) == 3 * model.config.num_hidden_layers and sum(told) == pytest.approx(50 + 2 + 2)
    assert hooks == [0] * 6, "decode steps go without"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--r=99"], "r must not be larger than the model's head_dim=16, got r=99"),
        (["--k=0"], "k must be at least 1, got 0"),
        (["--ratio=0.5"], "ratio must be"),
        (["--config=tests"], "sparq_config.json"),
        (["--device=toaster"], "--device must be one of PyTorch's, for example cpu or cuda, got toaster"),
    ],
)
def test_bad_knobs_end_with_one_line(model_folder, capsys, options, message):
    with pytest.raises(SystemExit) as exit_:
        generate(model_folder, *options)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_missing_prompt_file_ends_with_one_line(tmp_path, model_folder, capsys):
    with pytest.raises(SystemExit):
        main(["generate", str(model_folder), "--prompt-file", str(tmp_path / "none.txt")])
    assert "none.txt" in capsys.readouterr().err


def test_an_empty_prompt_ends_with_one_line(tmp_path, model_folder, capsys, monkeypatch):
    (tmp_path / "empty.txt").touch()
    # a tokenizer that adds no token of its own
    monkeypatch.setattr(PreTrainedTokenizerBase, "__call__", lambda self, texts: {"input_ids": [[] for _ in texts]})
    with pytest.raises(SystemExit) as exit_:
        main(["generate", str(model_folder), "--prompt-file", str(tmp_path / "empty.txt")])
    assert exit_.value.code == 2
    assert "--prompt-file must hold text" in capsys.readouterr().err


def test_a_gpu_that_is_not_there_ends_with_one_line(model_folder, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as exit_:
        generate(model_folder, "--device=cuda:1")
    assert exit_.value.code == 2
    assert capsys.readouterr().err.endswith("got cuda:1, and it finds no GPU\n")


def test_build_compiles_once_and_says_where(tmp_path):
    first, second = (sparq("build", SPARQ_CACHE_DIR=str(tmp_path / "cache")) for _ in range(2))
    assert first.returncode == second.returncode == 0
    (library,) = (tmp_path / "cache").glob("*.so")
    assert first.stdout == f"the CPU kernel has been compiled: {library}\n"
    assert "compiling the CPU kernel, once for this machine" in first.stderr
    assert second.stdout == f"the CPU kernel is there already: {library}\n"
    assert "compiling" not in second.stderr


def test_build_without_a_compiler_ends_with_one_line(tmp_path):
    done = sparq("build", SPARQ_CACHE_DIR=str(tmp_path), CXX="no-such-compiler")
    assert done.returncode == 1
    assert done.stderr == (
        "sparq build: CXX=no-such-compiler does not exist. Install one, for example: apt install g++\n"
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--help"], ["generate", "build", "lm-eval"]),
        (["generate", "--help"], ["--prompt-file", "--compare"]),
        (["--version"], ["sparq 0."]),
    ],
    ids=" ".join,
)
def test_help_comes_without_torch_and_transformers(arguments, words):
    done = sparq(*arguments, PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 0 and all(word in done.stdout for word in words)
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "sparq_command" in imported and "argparse" in imported, "the list is there"
    assert not imported & {"sparq", "sparq_kernels", "torch", "transformers", "rich"}


def test_the_module_is_the_same_command():
    run = subprocess.run([sys.executable, "-m", "sparq", "--version"], capture_output=True, text=True, check=True)
    assert run.stdout == sparq("--version").stdout


def test_version_of_a_tree_that_is_not_installed(tmp_path):
    source = Path(__file__).parents[2] / "sparq_command.py"
    (tmp_path / source.name).write_text(source.read_text())
    code = "import sparq_command; sparq_command.main(['--version'])"
    run = subprocess.run([sys.executable, "-S", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert run.stdout == "sparq unknown\n"


@pytest.mark.parametrize("arguments", [["generate", "model", "--prompt-file=p"], ["lm-eval", "--help"]], ids=" ".join)
def test_an_unsupported_version_ends_with_one_line(arguments, tmp_path):
    metadata = tmp_path / "transformers-4.57.1.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 4.57.1\n")
    done = sparq(*arguments, path=tmp_path)
    assert done.returncode == 2
    assert done.stderr == TOO_OLD + "\n"


def missing(folder, name):
    """A module that shadows the installed one and fails as one that is not installed."""
    (folder / f"{name}.py").write_text(f"raise ModuleNotFoundError(\"No module named '{name}'\", name='{name}')\n")


def test_lm_eval_without_the_harness_ends_with_one_line(tmp_path):
    missing(tmp_path, "lm_eval")
    done = sparq("lm-eval", "--help", path=tmp_path)
    assert done.returncode == 2
    assert done.stderr == (
        "sparq: lm-eval: No module named 'lm_eval'; the harness comes with pip install 'sparq-attention[eval]'\n"
    )


def test_lm_eval_without_something_the_harness_needs_ends_with_one_line(tmp_path, model_folder):
    pytest.importorskip("lm_eval")
    missing(tmp_path, "sacrebleu")  # which the harness imports only when it runs
    done = sparq("lm-eval", "--model=sparq", f"--model_args=pretrained={model_folder}", "--tasks=none", path=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == (
        "sparq: lm-eval: No module named 'sacrebleu'; the harness comes with pip install 'sparq-attention[eval]'"
    )
