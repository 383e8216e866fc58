"""The command `sparq generate`, end to end on a small model with random weights."""

import pytest
import torch
from byte_tokenizer import save_byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from sparq.cli import main

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


def generate(folder, *options):
    return main(["generate", str(folder), "--prompt-file", str(folder / "prompt.txt"), "--max-new-tokens=6", *options])


def test_compare_prints_both_answers_speed_bytes_and_report(model_folder, capsys):
    assert generate(model_folder, "--k=4096", "--min-length=0", "--compare") == 0
    out = capsys.readouterr().out
    assert "  stock  " in out and "  SparQ  " in out
    assert "1 of 1 answers are the same" in out, "k covers the context"
    assert "tokens/s" in out and "MB/step" in out
    assert "k covers the context" in out


def test_sparse_run_reports_sparse_steps(model_folder, capsys):
    assert generate(model_folder, "--r=4", "--k=16", "--min-length=0", "--question=Why?", "--question=And line 7?") == 0
    out = capsys.readouterr().out
    assert "Why?" in out and "And line 7?" in out
    assert "stock" not in out
    # six tokens: the first comes from the prompt, five decode steps follow in each of the two layers
    total = next(line for line in out.splitlines() if line.startswith("│   all"))
    assert [cell.strip() for cell in total.split("│")][2:4] == ["10", "0"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--r=99"], "r must not be larger than the model's head_dim=16, got r=99"),
        (["--k=0"], "k must be at least 1, got 0"),
        (["--ratio=0.5"], "ratio must be"),
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
