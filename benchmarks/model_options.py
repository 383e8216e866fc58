"""The command-line options that the whole-model benchmarks share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from model_shapes import SHAPES, Subject, build, is_real

import sparq

MEASURED_LAYERS = 2  # of a named shape


def positive(text: str) -> int:
    return _at_least(1, text)


def at_least_2(text: str) -> int:
    return _at_least(2, text)


def _at_least(least: int, text: str) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} must be an integer of at least {least}")
    return int(text)


def knobs_of(args: argparse.Namespace) -> dict[str, Any]:
    return dict(r=args.r, k=args.k, ratio=args.ratio)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """What every whole-model benchmark takes."""
    parser.add_argument(
        "--model", default="llama-3.2-1b", help=f"{', '.join(SHAPES)}, or a real model's folder or name"
    )
    parser.add_argument("--layers", type=positive, help="keep the first of them only (default: 2; of a real model all)")
    parser.add_argument("--all-layers", action="store_true", help="of a named shape too, with its whole vocabulary")
    parser.add_argument("--rounds", type=positive, help="of several the first is not counted")
    parser.add_argument("--tokens", type=at_least_2, help="decode steps of each way in each round")
    parser.add_argument("--r", type=positive)
    parser.add_argument("--k", type=positive)
    parser.add_argument("--ratio", type=float, default=8)
    parser.add_argument("--json", type=Path, help="write all measurements, machine and settings there")
    parser.add_argument("--quick", action="store_true", help="less of everything: under a minute")


def build_subject(args: argparse.Namespace, dtype: str, device: str = "cpu") -> Subject:
    layers = args.layers
    if layers is None and not args.all_layers and not is_real(args.model):
        layers = MEASURED_LAYERS
    return build(args.model, getattr(torch, dtype), layers, device)


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with one line about what is wrong."""
    if args.layers is not None and args.all_layers:
        parser.error("--layers and --all-layers exclude each other")
    if is_real(args.model) and "/" not in args.model and not Path(args.model).is_dir():
        parser.error(f"--model must be one of {', '.join(SHAPES)}, a folder, or owner/name, got {args.model!r}")
    try:
        sparq.SparqConfig(**knobs_of(args))
    except (TypeError, ValueError) as error:
        parser.error(str(error))


def fill_in(args: argparse.Namespace, full: dict[str, Any], quick: dict[str, Any]) -> None:
    """Give every option that was left out its value, of `quick` under --quick."""
    for name, value in (quick if args.quick else full).items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def settings_of(args: argparse.Namespace) -> dict[str, object]:
    """For a JSON file: no paths of the machine."""
    plain = {name: value for name, value in vars(args).items() if not isinstance(value, Path)}
    return {**plain, "model": Path(args.model).name}
