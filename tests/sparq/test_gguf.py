"""GGUF files: a small one with random weights, written here, and what is wrong with others."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path

import pytest
import torch
from byte_tokenizer import byte_characters
from llamacpp import tensors
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import sparq.gguf
from sparq_command import main

writing = pytest.importorskip("gguf")

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Bytes; digits that are merged, two pairs because old versions of transformers read one as none; special tokens.
TOKENS = [*byte_characters(), "12", "34", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
NUMBER, END_OF_TEXT, END_OF_TURN = 256, 258, 260


def small_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=777,
        vocab_size=len(TOKENS),
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def write(path: Path, pre: str | None = "smollm", template: str | None = TEMPLATE) -> LlamaForCausalLM:
    model = small_model()
    config = model.config
    writer = writing.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([1] * END_OF_TEXT + [3] * (len(TOKENS) - END_OF_TEXT))  # normal, control
    writer.add_token_merges(["1 2", "3 4"])
    writer.add_bos_token_id(END_OF_TEXT)
    writer.add_unk_token_id(END_OF_TEXT)
    writer.add_eos_token_id(END_OF_TURN)
    if template is not None:
        writer.add_chat_template(template)
    for name, tensor in tensors(model):
        if name != "output.weight":  # the embeddings once more
            writer.add_tensor(name, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model" / "small.gguf"
    path.parent.mkdir()
    write(path)
    return path


def generate(model: Path, tmp_path: Path, *options: str, text: str = "x" * 200) -> int:
    (tmp_path / "prompt.txt").write_text(text)
    return main(["generate", str(model), "--prompt-file", str(tmp_path / "prompt.txt"), "--max-new-tokens=4", *options])


def fails(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        generate(model, tmp_path)
    assert stopped.value.code == 2
    return capsys.readouterr().err


@pytest.mark.slow
def test_the_model_is_the_one_that_was_written(tmp_path: Path) -> None:
    expected = write(tmp_path / "small.gguf")
    _, model = sparq.gguf.load(tmp_path / "small.gguf", dtype=torch.float32)
    ids = torch.arange(50)[None]
    torch.testing.assert_close(model.eval()(ids).logits, expected(ids).logits)


@pytest.mark.slow
@pytest.mark.parametrize("whole", [True, False], ids=["file", "folder"])
def test_the_command_takes_the_file_or_its_folder(
    file: Path, whole: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = file if whole else file.parent
    assert generate(model, tmp_path, "--r=4", "--k=16", "--min-length=0", "--question=Why?", "--question=How?") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "in the model's chat template" in out and "torch.float32" in out
    begin = len("Tuser\n") + 200 + len("\n\n")
    rest = len("Why?E\nTassistant\n")
    assert f"2 prompt(s) of up to {begin + rest} tokens, the first {begin} of them read once" in out


@pytest.mark.parametrize(
    ("pre", "expected", "said"),
    [
        ("smollm", [*b"12"], None),
        ("gpt-2", [NUMBER], None),
        (None, [NUMBER], None),
        ("of-tomorrow", [NUMBER], "transformers does not know the pre-tokenizer 'of-tomorrow'"),
    ],
)
def test_digits_are_split_as_in_training(
    tmp_path: Path, pre: str | None, expected: list[int], said: str | None
) -> None:
    write(tmp_path / "small.gguf", pre)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tokenizer, _ = sparq.gguf.load(tmp_path / "small.gguf")
    messages = [str(warning.message) for warning in caught if "pre-tokenizer" in str(warning.message)]
    assert len(messages) == (said is not None)
    assert all(said in message for message in messages if said)

    tokenizer.save_pretrained(tmp_path / "saved")
    for each in (tokenizer, AutoTokenizer.from_pretrained(tmp_path / "saved")):
        assert each("12", add_special_tokens=False)["input_ids"] == expected
        assert (each.eos_token, each.model_max_length) == ("<|im_end|>", 777)


def test_other_models_are_left_to_transformers(tmp_path: Path) -> None:
    assert sparq.gguf.file_of("owner/name") is None
    assert sparq.gguf.file_of(str(tmp_path)) is None
    (tmp_path / "model.GGUF").touch()
    assert sparq.gguf.file_of(str(tmp_path)) == tmp_path / "model.GGUF"
    (tmp_path / "model.safetensors").touch()
    assert sparq.gguf.file_of(str(tmp_path)) is None
    assert sparq.gguf.file_of(str(tmp_path / "model.GGUF")) == tmp_path / "model.GGUF", "it was asked for"


def test_a_folder_with_several_files_is_asked_about(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("Q4.gguf", "Q8.gguf"):
        (tmp_path / name).touch()
    said = fails(tmp_path, tmp_path, capsys)
    assert "a folder must hold one GGUF file" in said
    assert said.endswith("holds 2; name one of them: Q4.gguf, Q8.gguf\n")


def test_a_file_that_is_not_there_ends_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fails(tmp_path / "none.gguf", tmp_path, capsys).endswith(f"there is no GGUF file {tmp_path}/none.gguf\n")


@pytest.mark.parametrize("length", [0, 3, 100, 2000, -2000])
def test_a_broken_file_ends_with_one_line(
    file: Path, length: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_bytes(file.read_bytes()[:length])
    said = fails(file, tmp_path, capsys).splitlines()[-1]
    assert "GGUF file" in said and str(file) in said


def test_another_file_ends_with_one_line(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_bytes(b"PK" + file.read_bytes()[2:])
    assert f"{file} is not a whole GGUF file: " in fails(file, tmp_path, capsys)


def test_without_the_package_it_is_said_what_to_install(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else real(name))
    assert fails(file, tmp_path, capsys).endswith("which is not installed: pip install gguf\n")
