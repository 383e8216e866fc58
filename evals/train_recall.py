"""Train a small byte-level model that finds what it read thousands of bytes ago.

    python evals/train_recall.py --architecture llama

runs the whole recipe (about half an hour on 2 CPU cores) and writes evals/models/recall-llama; `gpt-neox` makes
evals/models/recall-gpt-neox. Stages and learning rates count steps, so the machine's speed does not change the
recipe. `--resume` continues after an interruption.
"""

import argparse
import functools
import json
import math
import os
import platform
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import recall_gpt_neox
import recall_llama
import torch
import torch.nn.functional as F
import transformers
from allocator import KEEP_BUFFERS
from byte_tokenizer import save_byte_tokenizer
from muon import Muon
from recall_model import BOS, PAD
from recall_text import RecallText, Role
from transformers import PreTrainedModel

ENVIRONMENT = {
    **KEEP_BUFFERS,
    # On a machine in use, a thread that waits for the others must not keep them from its core by spinning.
    "GOMP_SPINCOUNT": "2000",
}

ARCHITECTURES = {"llama": recall_llama, "gpt-neox": recall_gpt_neox}
LAYERS = 4
MUON_LR, ADAMW_LR = 0.01, 2e-3
WARMUP_STEPS = 50
WEIGHTS = {Role.RANDOM: 0.0, Role.TEXT: 0.2, Role.REPEATED: 1.0, Role.ANSWER: 6.0}
LOG_STEPS, SAVE_STEPS = 50, 50


@dataclass(frozen=True, slots=True)
class Stage:
    length: int
    batch: int
    steps: int
    position_span: int  # random jumps spread a text over so many positions: short texts teach long distances too
    mix: tuple[float, float, float, float]  # shares of random repeats, word repeats, passage repeats, facts
    learning_rate: tuple[float, float]  # shares of the full rates at the stage's start and end


FIRST_STAGES = (
    Stage(256, batch=8, steps=1100, position_span=2048, mix=(0.1, 0.25, 0.3, 0.35), learning_rate=(1.0, 1.0)),
    Stage(512, batch=8, steps=350, position_span=4096, mix=(0.05, 0.2, 0.4, 0.35), learning_rate=(1.0, 0.6)),
)
STAGES = {
    "llama": (
        *FIRST_STAGES,
        Stage(1024, batch=4, steps=600, position_span=4096, mix=(0.0, 0.15, 0.5, 0.35), learning_rate=(0.6, 0.2)),
        Stage(4096, batch=1, steps=140, position_span=8192, mix=(0.0, 0.1, 0.5, 0.4), learning_rate=(0.2, 0.02)),
        Stage(1024, batch=4, steps=250, position_span=8192, mix=(0.0, 0.2, 0.6, 0.2), learning_rate=(0.3, 0.02)),
    ),
    "gpt-neox": (
        *FIRST_STAGES,
        # Shorter for want of time only: the machine was in use while the bundled model was trained.
        Stage(1024, batch=4, steps=300, position_span=4096, mix=(0.0, 0.15, 0.5, 0.35), learning_rate=(0.6, 0.4)),
        Stage(4096, batch=1, steps=70, position_span=8192, mix=(0.0, 0.1, 0.5, 0.4), learning_rate=(0.2, 0.02)),
        Stage(1024, batch=4, steps=150, position_span=8192, mix=(0.0, 0.2, 0.6, 0.2), learning_rate=(0.3, 0.02)),
    ),
}


def draw_batch(text: RecallText, stage: Stage) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids [B, S + 1], the bytes' roles [B, S + 1], position ids [B, S]."""
    length, rng = stage.length, text.rng
    ids = np.full((stage.batch, length + 1), PAD)
    roles = np.full((stage.batch, length + 1), Role.RANDOM)
    positions = np.arange(length)[None].repeat(stage.batch, 0)
    ids[:, 0] = BOS
    for row in range(stage.batch):
        draw = (text.random_repeats, text.word_repeats, text.passage_repeats, text.facts)[rng.choice(4, p=stage.mix)]
        sample = draw(length)
        ids[row, 1 : len(sample.data) + 1] = sample.data
        roles[row, 1 : len(sample.roles) + 1] = sample.roles
        for jump in rng.integers(1, length, 2):
            if rng.random() < 0.5:
                positions[row, jump:] += rng.integers(0, (stage.position_span - length) // 2 + 1)
    return torch.from_numpy(ids), torch.from_numpy(roles), torch.from_numpy(positions)


def loss_function(
    logits: torch.Tensor, target: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The weighted loss, and each byte's cross-entropy and whether it was predicted right, [B, S]."""
    cross_entropy = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view(target.shape)
    return (cross_entropy * weights).sum() / weights.sum(), cross_entropy, logits.argmax(-1) == target


def make_optimizers(architecture: str, model: PreTrainedModel) -> tuple[Muon, torch.optim.AdamW]:
    """Muon for the matrices, AdamW for the rest and for queries and keys with offsets, which Muon would wipe out."""
    with_offsets = {id(projection.weight) for projection in ARCHITECTURES[architecture].offset_projections(model)}
    matrices = [p for p in model.base_model.layers.parameters() if p.ndim == 2 and id(p) not in with_offsets]
    taken = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in taken]
    return Muon(matrices, lr=MUON_LR), torch.optim.AdamW(rest, lr=ADAMW_LR, betas=(0.9, 0.95), weight_decay=0.0)


class Log:
    """A line of JSON for the run's circumstances and one for every LOG_STEPS steps."""

    def __init__(self, path: Path, append: bool):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("a" if append else "w")
        self.sums: dict[str, list[float]] = {}

    def write(self, **values: object) -> None:
        line = json.dumps(values)
        print(line, flush=True)
        self.file.write(line + "\n")
        self.file.flush()

    def add(self, loss: torch.Tensor, cross_entropy: torch.Tensor, right: torch.Tensor, roles: torch.Tensor) -> None:
        measured = {
            "loss": loss.detach(),
            "repeated_right": right[roles == Role.REPEATED].float().mean(),
            "answer_right": right[roles == Role.ANSWER].float().mean(),
            "text_bits_per_byte": cross_entropy.detach()[roles == Role.TEXT].mean() / math.log(2),
        }
        for name, value in measured.items():
            if not value.isnan():  # a batch without such bytes
                self.sums.setdefault(name, []).append(value.item())

    def means(self) -> dict[str, float]:
        means = {name: round(float(np.mean(values)), 4) for name, values in self.sums.items()}
        self.sums.clear()
        return means


def train(
    architecture: str, stages: tuple[Stage, ...], seed: int, checkpoint: Path, log_path: Path, resume: bool
) -> PreTrainedModel:
    forward = ARCHITECTURES[architecture].forward
    model, text = ARCHITECTURES[architecture].build(LAYERS, seed), RecallText(seed)
    optimizers = make_optimizers(architecture, model)
    first_step = tokens = 0
    earlier_seconds = 0.0
    if resume:
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, optimizer_state in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(optimizer_state)
        text.rng.bit_generator.state = state["rng"]
        first_step, tokens, earlier_seconds = state["step"], state["tokens"], state["seconds"]

    log = Log(log_path, append=resume)
    log.write(
        resumed_at_step=first_step,
        seed=seed,
        parameters=sum(p.numel() for p in model.parameters()),
        stages=[asdict(stage) for stage in stages],
        weights={role.name: weight for role, weight in WEIGHTS.items()},
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        threads=torch.get_num_threads(),
    )
    role_weights = torch.tensor([WEIGHTS[role] for role in Role])

    @functools.partial(torch.compile, dynamic=False)
    def compiled(
        ids: torch.Tensor, weights: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return loss_function(forward(model, ids[:, :-1], positions), ids[:, 1:], weights)

    start = time.time()
    stage_start = stage_end = 0
    for stage in stages:
        stage_start, stage_end = stage_end, stage_end + stage.steps
        for step in range(max(first_step, stage_start), stage_end):
            ids, roles, positions = draw_batch(text, stage)
            roles = roles[:, 1:]
            loss, cross_entropy, right = compiled(ids, role_weights[roles], positions)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            first_rate, last_rate = stage.learning_rate
            rate = first_rate + (last_rate - first_rate) * (step - stage_start) / stage.steps
            rate *= min(1.0, (step + 1) / WARMUP_STEPS)
            for optimizer, base_lr in zip(optimizers, (MUON_LR, ADAMW_LR), strict=True):
                optimizer.param_groups[0]["lr"] = base_lr * rate
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            tokens += stage.batch * stage.length
            log.add(loss, cross_entropy, right, roles)
            done, seconds = step + 1, earlier_seconds + time.time() - start
            if done % LOG_STEPS == 0 or done == stage_end:
                log.write(step=done, length=stage.length, tokens=tokens, seconds=round(seconds), **log.means())
            if done % SAVE_STEPS == 0 or done == stage_end:
                state = {
                    "model": model.state_dict(),
                    "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                    "rng": text.rng.bit_generator.state,
                    "step": done,
                    "tokens": tokens,
                    "seconds": seconds,
                }
                torch.save(state, checkpoint.with_suffix(".new"))
                checkpoint.with_suffix(".new").replace(checkpoint)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="llama")
    parser.add_argument("--output", type=Path, help="a folder; by default evals/models/recall-ARCHITECTURE")
    parser.add_argument("--checkpoint", type=Path, help="by default recall-ARCHITECTURE.pt among temporary files")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    if any(os.environ.get(name) != value for name, value in ENVIRONMENT.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | ENVIRONMENT)
    torch.set_num_threads(arguments.threads)
    name = f"recall-{arguments.architecture}"
    output = arguments.output or Path(__file__).parent / "models" / name
    checkpoint = arguments.checkpoint or Path(tempfile.gettempdir()) / f"{name}.pt"
    log_path, stages = output / "training-log.jsonl", STAGES[arguments.architecture]
    model = train(arguments.architecture, stages, arguments.seed, checkpoint, log_path, arguments.resume)
    model.save_pretrained(output)
    save_byte_tokenizer(output)


if __name__ == "__main__":
    main()
