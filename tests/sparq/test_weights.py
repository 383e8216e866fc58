"""Models whose weights are not plain: quantised, or with adapters; before patching, and after."""

from __future__ import annotations

import importlib.util
import re
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    CompileConfig,
    PreTrainedModel,
    TorchAoConfig,
)

import sparq
from sparq.served import unwrap
from tests.sparq.slow import Slow
from tests.sparq.snapshot import snapshot
from tests.sparq.tiny import build, generate, next_tokens, prompt, teacher_forced

KNOBS = dict(r=4, k=12)
SPARSE = KNOBS | dict(min_length=0)
COVERING = dict(r=4, k=10_000, min_length=0)
EVALS = Path(__file__).parents[2] / "evals"
SHAPE = dict(intermediate_size=128)  # quantisers take blocks of 64 weights


def needs(package: str, why: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed: {why}")


needs_torchao = needs("torchao", "it is loud at every import of transformers' models; pip install --no-deps torchao")
needs_bitsandbytes = needs("bitsandbytes", "pip install --no-deps bitsandbytes")
needs_peft = needs("peft", "pip install --no-deps peft")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's


def logits(model: nn.Module) -> torch.Tensor:
    return teacher_forced(model, prompt(), next_tokens(steps=4))  # type: ignore[arg-type]


def tokens(model: nn.Module) -> list[list[int]]:
    return generate(model, prompt())  # type: ignore[arg-type]


def check(model: nn.Module, slack: float = 1e-3) -> None:
    """Patched or not yet, `model` is sparse as the definition says, and the stock model where k covers the context.

    `slack`: how far from the definition it may be, as a share of what sparsity changes. Where activations are rounded
    to 8 bits, a difference in the last place of float32 becomes one of such a step.
    """
    served = unwrap(model)
    sparq.unpatch(model)
    stock, stock_tokens = logits(model), tokens(model)
    Slow(**KNOBS).install(served)
    expected = logits(model)
    served.set_attn_implementation("sdpa")

    sparq.patch(model, **SPARSE)
    actual = logits(model)
    assert sparq.report(model).total.sparse_steps == 3 * 4
    assert (actual - expected).abs().mean() < slack * (stock - expected).abs().mean()
    sparq.patch(model, **COVERING)
    assert tokens(model) == stock_tokens
    sparq.unpatch(model)
    torch.testing.assert_close(logits(model), stock)


def weight_type(model: nn.Module) -> str:
    weight = unwrap(model).model.layers[0].self_attn.q_proj.weight
    return type(weight).__name__ if type(weight) is not nn.Parameter else str(weight.dtype)


def patched_equals_unpatched_twin(model: PreTrainedModel, twin: PreTrainedModel) -> None:
    """`model` was patched before its weights were changed, `twin` after."""
    actual = logits(model)
    assert sparq.report(model).total.sparse_steps == 3 * 4
    torch.testing.assert_close(actual, logits(sparq.patch(twin, **SPARSE)))


QUANTIZE = getattr(getattr(torch.ao, "quantization", None), "quantize_dynamic", None)  # deprecated, for torchao


@pytest.mark.skipif(QUANTIZE is None, reason="this torch has no quantize_dynamic any more")
@pytest.mark.filterwarnings("ignore")
def test_linear_layers_quantised_by_torch_itself() -> None:
    def quantised(model: PreTrainedModel) -> PreTrainedModel:
        return QUANTIZE(model, {nn.Linear}, dtype=torch.qint8)  # a copy: that of a patched model is patched

    model = quantised(build(**SHAPE))
    assert not isinstance(model.model.layers[0].self_attn.q_proj, nn.Linear)
    check(model, slack=0.2)
    patched_equals_unpatched_twin(quantised(sparq.patch(build(**SHAPE), **SPARSE)), quantised(build(**SHAPE)))


@needs_torchao
def test_torchao_when_loaded_and_in_place(tmp_path: Path) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    build(**SHAPE).save_pretrained(tmp_path)
    config = TorchAoConfig(Int8WeightOnlyConfig())
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, dtype=torch.float32).eval()
    assert "Int8" in weight_type(model)
    check(model)

    model = sparq.patch(build(**SHAPE), **SPARSE)
    twin = build(**SHAPE)
    for one in (model, twin):
        quantize_(one, Int8WeightOnlyConfig())
    assert "Int8" in weight_type(model)
    patched_equals_unpatched_twin(model, twin)


@pytest.fixture(scope="module")
def int8_model() -> PreTrainedModel:
    """As docs/cpu.md has it."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    torch._dynamo.reset()
    model = AutoModelForCausalLM.from_pretrained(EVALS / "models" / "recall-llama", dtype=torch.bfloat16).eval()
    quantize_(model, Int8WeightOnlyConfig())
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.compile()
    return model


@needs_torchao
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("step", ["dynamic", "static", "static, compiled"])
def test_torchao_int8_compiled_on_every_cache(int8_model: PreTrainedModel, step: str) -> None:
    model, tokenizer = int8_model, AutoTokenizer.from_pretrained(EVALS / "models" / "recall-llama")
    text = (EVALS / "demo.txt").read_text(encoding="utf-8")[-3000:] + "The pass key of "
    name, key = re.findall(r"pass key of (\w+) is (\d+)", text)[0]
    prompt = tokenizer(text + f"{name} is", return_tensors="pt")
    how: dict[str, Any] = {} if step == "dynamic" else dict(cache_implementation="static", disable_compile=True)
    if step.endswith("compiled"):
        how = dict(cache_implementation="static", compile_config=CompileConfig(mode="default", fullgraph=True))
        how["compile_config"]._compile_all_devices = True

    def answer() -> list[int]:
        return model.generate(**prompt, max_new_tokens=8, do_sample=False, **how)[0, -8:].tolist()

    compiled = torch._dynamo.utils.counters["inductor"]["woq_matcher_count"]
    stock = answer()
    with sparq.patched(model, k=len(text), min_length=0):
        assert answer() == stock
    with sparq.patched(model, min_length=0):
        found = answer()
        total = sparq.report(model).total
    assert tokenizer.decode(found).strip().startswith(key)
    assert total.sparse_steps == total.decode_steps == 4 * 7 and total.bytes_dense > 2 * total.bytes_read
    assert torch._dynamo.utils.counters["inductor"]["woq_matcher_count"] > compiled or step == "static"


@needs_bitsandbytes
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "config, slack",
    [
        (BitsAndBytesConfig(load_in_8bit=True), 0.2),
        (BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32), 1e-3),
    ],
    ids=["8 bit", "4 bit"],
)
def test_bitsandbytes(tmp_path: Path, config: BitsAndBytesConfig, slack: float) -> None:
    build(**SHAPE).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, dtype=torch.float32).eval()
    assert weight_type(model) in ("Int8Params", "Params4bit")
    check(model, slack)


@needs_bitsandbytes
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["8 bit", "4 bit"])
def test_bitsandbytes_after_patching(kind: str) -> None:
    """Layer by layer, as its documentation does it by hand: transformers quantises while it loads."""
    from bitsandbytes import nn as quantised

    model, twin = sparq.patch(build(**SHAPE), **SPARSE), build(**SHAPE)
    for one in (model, twin):
        for layer in one.model.layers:
            for name, old in list(layer.self_attn.named_children()):
                shape = dict(input_features=old.in_features, output_features=old.out_features, bias=False)
                if kind == "8 bit":
                    new: nn.Module = quantised.Linear8bitLt(**shape, has_fp16_weights=False)
                    new.weight = quantised.Int8Params(old.weight.data, requires_grad=False, has_fp16_weights=False)
                else:
                    new = quantised.Linear4bit(**shape, compute_dtype=torch.float32)
                    new.weight = quantised.Params4bit(old.weight.data, requires_grad=False)
                setattr(layer.self_attn, name, new.to("cpu"))  # this move quantises
    assert model.model.layers[0].self_attn.q_proj.weight.dtype in (torch.int8, torch.uint8)
    patched_equals_unpatched_twin(model, twin)


def lora(model: PreTrainedModel, seed: int = 7) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return get_peft_model(model, config).eval()


@needs_peft
def test_lora_and_then_sparq() -> None:
    model = lora(build())
    assert not isinstance(model, PreTrainedModel)
    before = snapshot(model)
    assert sparq.patch(model, **SPARSE) is model
    adapted = logits(model)
    report = sparq.report(model)
    assert report.total.sparse_steps == 12 and report.to_dict() == sparq.report(model.get_base_model()).to_dict()
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), logits(sparq.patch(build(), **SPARSE)))
    assert (adapted - logits(sparq.patch(build(), **SPARSE))).abs().max() > 0.1
    assert sparq.unpatch(model) is model
    assert snapshot(model) == before
    with sparq.patched(model, **SPARSE) as inside:
        assert inside is model and torch.equal(logits(model), adapted)
    assert snapshot(model) == before
    check(model)


@needs_peft
def test_sparq_and_then_lora() -> None:
    model = lora(sparq.patch(build(), **SPARSE))
    actual = logits(model)
    assert sparq.report(model).total.sparse_steps == 12
    torch.testing.assert_close(actual, logits(sparq.patch(lora(build()), **SPARSE)))
    merged = model.merge_and_unload()
    assert isinstance(merged, PreTrainedModel)
    torch.testing.assert_close(logits(merged), actual, rtol=1e-4, atol=1e-4)
    assert sparq.report(merged).total.sparse_steps == 24
    check(merged)


@needs_peft
def test_an_adapter_inside_a_model_of_transformers() -> None:
    from peft import LoraConfig
    from transformers.integrations.peft import MIN_PEFT_VERSION

    if Version(version("peft")) < Version(MIN_PEFT_VERSION):
        pytest.skip(f"this transformers adds adapters with PEFT >= {MIN_PEFT_VERSION} only, {version('peft')} is here")
    model = sparq.patch(build(), **SPARSE)
    plain = logits(model)
    torch.manual_seed(7)
    model.add_adapter(LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "v_proj"]))
    model.eval()
    torch.testing.assert_close(logits(model), logits(sparq.patch(lora(build()), **SPARSE)))
    model.disable_adapters()
    torch.testing.assert_close(logits(model), plain)
    model.enable_adapters()
    check(model)


@needs_peft
def test_an_adapter_saved_from_a_patched_model(tmp_path: Path) -> None:
    from peft import PeftModel

    for name, model in (("stock", lora(build())), ("patched", sparq.patch(lora(build()), **SPARSE))):
        model.save_pretrained(tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "stock").iterdir())
    assert "adapter_model.safetensors" in files
    for name in files:
        assert (tmp_path / "patched" / name).read_bytes() == (tmp_path / "stock" / name).read_bytes()
    loaded = PeftModel.from_pretrained(sparq.patch(build(), **SPARSE), tmp_path / "patched").eval()
    torch.testing.assert_close(logits(loaded), logits(model))


@needs_peft
def test_training_an_adapter_of_a_patched_model() -> None:
    def gradients(model: nn.Module) -> list[torch.Tensor]:
        model.train()
        model(**prompt(), labels=prompt()["input_ids"]).loss.backward()
        return [parameter.grad for parameter in model.parameters() if parameter.requires_grad]

    expected = gradients(lora(build()))
    actual = gradients(sparq.patch(lora(build()), **SPARSE))
    assert len(actual) == len(expected) == 3 * 2 * 2
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@needs_peft
@pytest.mark.parametrize("kind", ["PrefixTuningConfig", "PromptTuningConfig"])
def test_prompts_that_were_learned(kind: str) -> None:
    """A prefix comes as a cache that PEFT has filled; a learned prompt as embeddings before the text."""
    import peft

    def tuned(model: PreTrainedModel) -> nn.Module:
        torch.manual_seed(7)
        config = getattr(peft, kind)(num_virtual_tokens=5, task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, config).eval()
        return model.requires_grad_(False)

    def run(model: nn.Module) -> list[list[int]]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it tells that it ignores position_ids
            return generate(model, prompt(padding=0))  # type: ignore[arg-type]

    stock = run(tuned(build()))
    assert run(sparq.patch(tuned(build()), **COVERING)) == stock
    slow = tuned(build())
    Slow(**KNOBS).install(unwrap(slow))
    model = sparq.patch(tuned(build()), **SPARSE)
    assert run(model) == run(slow) != stock
    assert sparq.report(model).total.sparse_steps == 3 * 11


def test_other_wrappers() -> None:
    wrapper = nn.DataParallel(build())
    assert sparq.patch(wrapper, **SPARSE) is wrapper
    logits(wrapper.module)
    assert sparq.report(wrapper).total.sparse_steps == 12
    sparq.unpatch(wrapper)
    assert snapshot(wrapper.module) == snapshot(build())

    two = nn.ModuleList([build(), build()])
    with pytest.raises(TypeError, match="ModuleList has several: LlamaForCausalLM, LlamaForCausalLM"):
        sparq.patch(two)
