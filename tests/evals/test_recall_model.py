from pathlib import Path

import pytest
import torch
from muon import orthogonalise
from recall import generated_prefix, measure, prefill, teacher_forced_prefix, token_ids
from recall_model import build, forward
from recall_text import RecallText
from transformers import AutoModelForCausalLM, AutoTokenizer

FOLDER = Path(__file__).parents[2] / "evals" / "models" / "recall-llama"


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


def test_size(model):
    assert sum(parameter.numel() for parameter in model.parameters()) <= 3_000_000
    assert (FOLDER / "model.safetensors").stat().st_size <= 8_000_000


def test_recalls_with_dense_attention_but_not_with_a_window(model):
    dense, window = measure(model, 1024, texts=10, windows=(None, 128))
    assert dense.pass_keys >= 0.8
    assert dense.repetition >= 0.3
    assert window.pass_keys <= 0.4
    assert window.repetition <= 0.3


def test_generation_gives_what_the_teacher_forced_pass_says(model):
    source = RecallText(seed=1, held_out=True)
    for task in [source.pass_key(512), source.repetition(512, continuation=32)]:
        prompt = token_ids(model, task.prompt)
        with torch.inference_mode():
            cache, _ = prefill(model, prompt)
            forced = teacher_forced_prefix(model, prompt, task, cache, window=None)
            assert cache.get_seq_length() == prompt.shape[1] - 1
        assert generated_prefix(model, prompt, task, cache) == forced


def test_generates_the_pass_key_from_text(model):
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    filler = "".join(f"Line {line} says that objects have an identity, a type and a value.\n" for line in range(10))
    prompt = f"{filler}The pass key of amber is 48213.\n{filler}The pass key of amber is "
    output = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=5)
    assert tokenizer.decode(output[0], skip_special_tokens=True) == prompt + "48213"


def test_training_forward_is_the_models_own():
    model = build(layers=3, seed=0)
    input_ids = torch.randint(0, 256, (2, 50))
    with torch.no_grad():
        own = model(input_ids).logits
        torch.testing.assert_close(forward(model, input_ids, torch.arange(50).expand(2, -1)), own)


def test_offset_heads_start_out_looking_back():
    model = build(layers=1, seed=0)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(torch.randint(0, 256, (1, 200)), output_attentions=True).attentions[0][0]
    for head, offset in enumerate((1, 2, 3, 4)):
        assert attentions[head].diagonal(-offset)[20:].mean() > 0.5


@pytest.mark.parametrize("shape", [(2, 16, 32), (2, 32, 16)])
def test_orthogonalise_evens_out_singular_values(shape):
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
    assert values.min() > 0.3
    assert values.max() < 1.5
