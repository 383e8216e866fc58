"""A model's folder may come from anywhere: its weights are not unpickled, and its code is not run unless it is said."""

from __future__ import annotations

import json
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import recall
import torch
import train_recall
from byte_tokenizer import save_byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, dynamic_module_utils

from sparq_command import main


class Bomb:
    """Unpickling it makes a folder."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.target),)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    folder = tmp_path / "model"
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=260,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=258,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    save_byte_tokenizer(folder)
    return folder


@pytest.fixture
def goes_off(tmp_path: Path) -> Path:
    return tmp_path / "gone-off"


def generate(folder: Path, *options: str) -> int:
    (folder / "prompt.txt").write_text("Once")
    return main(["generate", str(folder), "--prompt-file", str(folder / "prompt.txt"), "--max-new-tokens=2", *options])


def measure(folder: Path) -> None:
    arguments = ["recall.py", str(folder), "--lengths", "512", "--texts", "1", "--threads", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", arguments)
        recall.main()


def pickled(folder: Path, bomb: object, index: bool) -> None:
    """Weights as a pickle, in place of safetensors."""
    (folder / "model.safetensors").unlink()
    name = "pytorch_model-00001-of-00001.bin" if index else "pytorch_model.bin"
    torch.save({"lm_head.weight": bomb}, folder / name)
    if index:
        content = {"metadata": {}, "weight_map": {"lm_head.weight": name}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(content))


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_the_bomb_goes_off(folder: Path, goes_off: Path) -> None:
    """Or the tests below could not fail."""
    pickled(folder, Bomb(goes_off), index=False)
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert goes_off.is_dir()


@pytest.mark.parametrize("index", [False, True], ids=["one file", "with an index"])
@pytest.mark.parametrize("program", [generate, measure])
def test_pickled_weights_are_not_read(
    program: Callable, index: bool, folder: Path, goes_off: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pickled(folder, Bomb(goes_off), index)
    with pytest.raises((SystemExit, OSError)) as error:
        program(folder)
    assert "safetensors" in capsys.readouterr().err + str(error.value)
    assert not goes_off.exists()


def test_harmless_pickled_weights_are_not_read_either(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pickled(folder, torch.zeros(260, 32), index=False)
    with pytest.raises(SystemExit):
        generate(folder)
    assert "safetensors" in capsys.readouterr().err


@pytest.mark.slow
def test_pickled_adapters_are_not_unpickled(folder: Path, goes_off: Path) -> None:
    """transformers loads an adapter that lies in the folder by itself, where PEFT is installed."""
    pytest.importorskip("peft")
    config = dict(
        peft_type="LORA", task_type="CAUSAL_LM", target_modules=["q_proj"], base_model_name_or_path=str(folder)
    )
    (folder / "adapter_config.json").write_text(json.dumps(config))
    torch.save({"base_model.model.lm_head.lora_A.weight": Bomb(goes_off)}, folder / "adapter_model.bin")
    for program in (generate, measure):
        with pytest.raises((SystemExit, OSError, pickle.UnpicklingError)):
            program(folder)
    assert not goes_off.exists()


@pytest.mark.parametrize("kind", ["config", "model", "tokenizer"])
def test_code_is_run_only_where_it_is_said(
    kind: str, folder: Path, goes_off: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = f"import os\nos.mkdir({str(goes_off)!r})\n"
    if kind == "tokenizer":
        source += "from transformers import PreTrainedTokenizerFast as Base\nclass Custom(Base):\n    pass\n"
        edit(
            folder / "tokenizer_config.json", tokenizer_class="Custom", auto_map={"AutoTokenizer": [None, "own.Custom"]}
        )
    elif kind == "config":
        source += "from transformers import LlamaConfig\nclass Custom(LlamaConfig):\n    model_type = 'custom'\n"
        edit(folder / "config.json", model_type="custom", auto_map={"AutoConfig": "own.Custom"})
    else:
        source += "from transformers import LlamaForCausalLM\nclass Custom(LlamaForCausalLM):\n    pass\n"
        edit(folder / "config.json", auto_map={"AutoModelForCausalLM": "own.Custom"})
    (folder / "own.py").write_text(source)
    try:
        generate(folder)  # with code beside a model that transformers knows, its own serves
    except SystemExit as stopped:
        assert stopped.code == 2 and "trust_remote_code" in capsys.readouterr().err
    if kind != "config":
        measure(folder)
    else:
        with pytest.raises(ValueError, match="trust_remote_code"):
            measure(folder)
    assert not goes_off.exists()

    if kind == "config":  # a type of model that nothing is registered for: with its code it gets as far as that
        with pytest.raises(SystemExit):
            generate(folder, "--trust-remote-code")
    else:
        assert generate(folder, "--trust-remote-code") == 0
    assert goes_off.is_dir()


def test_a_checkpoint_of_the_training_is_not_unpickled(tmp_path: Path, goes_off: Path) -> None:
    """Its default place is the folder for temporary files, where others may write."""
    checkpoint, log = tmp_path / "state.pt", tmp_path / "log.jsonl"
    model = train_recall.train("llama", (), 0, checkpoint, log, resume=False)
    state = {
        "model": {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()},
        "optimizers": [optimizer.state_dict() for optimizer in train_recall.make_optimizers("llama", model)],
        "rng": np.random.default_rng(3).bit_generator.state,
        "step": 3,
        "tokens": 4,
        "seconds": 1.5,
    }
    torch.save(state, checkpoint)
    resumed = train_recall.train("llama", (), 0, checkpoint, log, resume=True)
    assert not any(parameter.any() for parameter in resumed.parameters())

    torch.save(state | {"seconds": Bomb(goes_off)}, checkpoint)
    with pytest.raises(pickle.UnpicklingError):
        train_recall.train("llama", (), 0, checkpoint, log, resume=True)
    assert not goes_off.exists()
