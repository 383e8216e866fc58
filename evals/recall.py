"""Measure how well a model finds what it read: pass keys answered and repeated passages continued, on held-out text.

    python evals/recall.py evals/models/recall-llama --lengths 1024 4096 --texts 100 --window 128

The prompt up to its last byte is prefilled with the model's own attention. What follows, the first answer byte
included, is decoded: in one teacher-forced pass, or, with `--decode`, in one-token steps by `model.generate`. Both
give the same figures: a greedy answer is right exactly if each of its bytes is the likeliest after the true ones.
"""

import argparse
import itertools
import json
import math
import platform
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from recall_text import RecallText, Task
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

SEED = 20_231
CUE = CONTINUATION = 128  # bytes of the repeated passage that are given, and that are asked for
FIRST_MEASURED = 32  # the bits per byte leave out the bytes that have hardly any context


@dataclass(frozen=True, slots=True)
class Recall:
    length: int  # bytes of prompt and answer together
    attention: str  # of the decoded bytes
    texts: int
    pass_keys: float  # share of pass keys with all five digits right
    repetition: float  # mean length of the exactly continued part, as a share of CONTINUATION
    bits_per_byte: float  # of the plain text in the prompt


@torch.inference_mode()
def measure(
    model: PreTrainedModel,
    length: int,
    texts: int,
    windows: tuple[int | None, ...] = (None,),
    decode: bool = False,
    attention: str = "dense",
) -> list[Recall]:
    """One result for each window: the number of last positions that a decoded byte sees, None for all."""
    source = RecallText(SEED, held_out=True)
    pass_keys: dict[int | None, list[bool]] = {window: [] for window in windows}
    repetition: dict[int | None, list[float]] = {window: [] for window in windows}
    bits = []
    for _ in track(range(texts), f"{length} bytes", transient=True):
        for task, is_pass_key in (
            (source.pass_key(length), True),
            (source.repetition(length, CUE, CONTINUATION), False),
        ):
            prompt = token_ids(model, task.prompt)
            cache, logits = prefill(model, prompt)
            for window in windows:
                if decode:
                    matched = generated_prefix(model, prompt, task, cache)
                else:
                    matched = teacher_forced_prefix(model, prompt, task, cache, window)
                if is_pass_key:
                    pass_keys[window].append(matched == len(task.answer))
                else:
                    repetition[window].append(matched / CONTINUATION)
            if not is_pass_key:
                text = slice(FIRST_MEASURED, length - CUE - CONTINUATION)
                nats = F.cross_entropy(logits[0, text].float(), prompt[0, 1:][text])
                bits.append(nats.item() / math.log(2))
    return [
        Recall(
            length,
            f"window {window}" if window else attention,
            texts,
            float(np.mean(pass_keys[window])),
            float(np.mean(repetition[window])),
            float(np.mean(bits)),
        )
        for window in windows
    ]


def token_ids(model: PreTrainedModel, data: bytes) -> torch.Tensor:
    return torch.tensor([[model.config.bos_token_id, *data]], device=model.device)


def prefill(model: PreTrainedModel, prompt: torch.Tensor) -> tuple[DynamicCache, torch.Tensor]:
    """The cache of all but the prompt's last token, which is the first to be decoded, and these tokens' logits."""
    cache = DynamicCache(config=model.config)
    logits = model(prompt[:, :-1], past_key_values=cache).logits
    return cache, logits


def teacher_forced_prefix(
    model: PreTrainedModel, prompt: torch.Tensor, task: Task, cache: DynamicCache, window: int | None
) -> int:
    """The number of answer bytes before the first that is not the likeliest; the cache comes back as it was."""
    answer = torch.tensor([list(task.answer)], device=model.device)
    decoded = torch.cat([prompt[:, -1:], answer[:, :-1]], dim=1)
    past, queries = cache.get_seq_length(), decoded.shape[1]
    mask = None
    if window is not None:
        distance = torch.arange(past, past + queries)[:, None] - torch.arange(past + queries)
        mask = ((distance >= 0) & (distance < window)).to(model.device)[None, None]  # [1, 1, queries, keys]
    logits = model(decoded, past_key_values=cache, attention_mask=mask).logits
    cache.crop(-queries)
    return matched_prefix(logits[0].argmax(-1).tolist(), task.answer)


def generated_prefix(model: PreTrainedModel, prompt: torch.Tensor, task: Task, cache: DynamicCache) -> int:
    """The number of answer bytes before the first that greedy generation misses."""
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        past_key_values=cache,
        max_new_tokens=len(task.answer),
        do_sample=False,
    )
    generated = output[0, prompt.shape[1] :].tolist()
    return matched_prefix(generated, task.answer)


def matched_prefix(predicted: list[int], answer: bytes) -> int:
    matches = (token == byte for token, byte in zip(predicted, answer, strict=False))  # generation may stop early
    return sum(itertools.takewhile(bool, matches))


def show(results: list[Recall]) -> None:
    table = Table("bytes", "attention", "pass keys right", f"of {CONTINUATION} bytes continued", "bits per byte")
    for result in results:
        table.add_row(
            str(result.length),
            result.attention,
            f"{result.pass_keys:.1%} of {result.texts}",
            f"{result.repetition:.1%}",
            f"{result.bits_per_byte:.2f}",
        )
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder or Hub name of a causal model whose token ids are bytes")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096], help="bytes of context")
    parser.add_argument("--texts", type=int, default=100, help="texts per length and task")
    parser.add_argument("--window", type=int, help="also measure decoding that sees only so many last positions")
    parser.add_argument("--decode", action="store_true", help="generate the answers in one-token steps")
    parser.add_argument("--sparq-r", type=int, help="decode sparsely: query components that score the positions")
    parser.add_argument("--sparq-k", type=int, help="decode sparsely: positions attended to")
    parser.add_argument("--sparq-ratio", type=float, help="decode sparsely: compression of the bytes read")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    options = {"r": arguments.sparq_r, "k": arguments.sparq_k, "ratio": arguments.sparq_ratio}
    sparq_options = {name: value for name, value in options.items() if value is not None}
    if arguments.window and (arguments.decode or sparq_options):
        parser.error("--window is measured teacher-forced: leave out --decode and --sparq-*")
    if sparq_options and not arguments.decode:
        parser.error("--sparq-* change one-token steps only: add --decode")

    model = AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
    ).eval()
    attention = "dense"
    if sparq_options:
        import sparq

        sparq.patch(model, **sparq_options, min_length=0)  # the question is quality, not where sparsity pays
        attention = "SparQ " + " ".join(f"{name}={value}" for name, value in sparq_options.items())
    windows = (None, arguments.window) if arguments.window else (None,)
    results = []
    for length in arguments.lengths:
        results += measure(model, length, arguments.texts, windows, arguments.decode, attention)
        show(results[-len(windows) :])
    if len(arguments.lengths) > 1:
        show(results)
    if arguments.json:
        configuration = {
            "seed": SEED,
            "cue": CUE,
            "continuation": CONTINUATION,
            "decoded_by": "generate" if arguments.decode else "one teacher-forced pass",
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        content = {"configuration": configuration, "results": [asdict(result) for result in results]}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
