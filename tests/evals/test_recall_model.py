from pathlib import Path

import pytest
import torch
from muon import orthogonalise
from recall import generated_prefix, measure, prefill, teacher_forced_prefix, token_ids
from recall_model import OFFSETS
from recall_text import RecallText
from train_recall import ARCHITECTURES, make_optimizers
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.slow

MODELS = Path(__file__).parents[2] / "evals" / "models"


@pytest.fixture(scope="module", params=["recall-llama", "recall-gpt-neox"])
def folder(request):
    return MODELS / request.param


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(params=ARCHITECTURES)
def architecture(request):
    return request.param


def test_size(folder, model):
    assert sum(parameter.numel() for parameter in model.parameters()) <= 3_000_000
    assert (folder / "model.safetensors").stat().st_size <= 10_000_000


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


def test_generates_the_pass_key_from_text(folder, model):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    filler = "".join(f"Line {line} says that objects have an identity, a type and a value.\n" for line in range(10))
    prompt = f"{filler}The pass key of amber is 48213.\n{filler}The pass key of amber is "
    output = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=5)
    assert tokenizer.decode(output[0], skip_special_tokens=True) == prompt + "48213"


def test_training_forward_is_the_models_own(architecture):
    module = ARCHITECTURES[architecture]
    model = module.build(layers=3, seed=0)
    input_ids = torch.randint(0, 256, (2, 50))
    with torch.no_grad():
        own = model(input_ids).logits
        torch.testing.assert_close(module.forward(model, input_ids, torch.arange(50).expand(2, -1)), own)


def test_positions_after_a_jump_are_one_sequence_with_those_before(architecture):
    module = ARCHITECTURES[architecture]
    model = module.build(layers=1, seed=0)
    input_ids, positions = torch.randint(0, 256, (1, 50)), torch.arange(50)[None]
    jump = positions + 1000 * (positions >= 30)
    # The model's own forward at positions that it takes for one sequence: the bytes left out are masked.
    padded = torch.zeros(1, 1050, dtype=torch.long)
    padded[0, jump[0]] = input_ids[0]
    mask = torch.zeros(1, 1050, dtype=torch.long)
    mask[0, jump[0]] = 1
    with torch.no_grad():
        own = model(padded, attention_mask=mask, position_ids=torch.arange(1050)[None]).logits[0, jump[0]]
        torch.testing.assert_close(module.forward(model, input_ids, jump)[0], own)


def test_offset_heads_start_out_looking_back(architecture):
    model = ARCHITECTURES[architecture].build(layers=1, seed=0)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(torch.randint(0, 256, (1, 200)), output_attentions=True).attentions[0][0]
    for head, offset in enumerate(OFFSETS[0]):
        assert attentions[head].diagonal(-offset)[20:].mean() > 0.5


def test_muon_leaves_offsets_alone(architecture):
    module = ARCHITECTURES[architecture]
    model = module.build(layers=3, seed=0)
    muon, adamw = (
        {id(p) for p in optimizer.param_groups[0]["params"]} for optimizer in make_optimizers(architecture, model)
    )
    assert muon | adamw == {id(p) for p in model.parameters()}
    assert not muon & adamw
    assert adamw.issuperset(id(projection.weight) for projection in module.offset_projections(model))


@pytest.mark.parametrize("shape", [(2, 16, 32), (2, 32, 16)])
def test_orthogonalise_evens_out_singular_values(shape):
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
    assert values.min() > 0.3
    assert values.max() < 1.5
