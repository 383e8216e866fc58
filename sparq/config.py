"""The knobs of SparQ, checked when they are set, and how they travel: as a dict, and as a file in a model's folder."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparq_kernels import Budget
from transformers.utils import cached_file

from sparq.index import KINDS

MIN_COMPONENTS = 8
MIN_POSITIONS = 128
MASS = 0.95  # with less, and with fewer components, the search ends too early (evals/README.md)
FILE = "sparq_config.json"
FORMAT = 1  # of that file: one with a larger number is of a later SparQ, whose knobs may mean something else


@dataclass(frozen=True, kw_only=True, slots=True)
class SparqConfig:
    """How much of the cache a decode step reads (symbols as in SparQ Attention, arXiv 2312.04985, section 4).

    The defaults go beyond the paper: positions are found by codes of four bits, and how many are read is for the
    attention to say. `SparqConfig.paper()` is the paper's method.

    Args:
        r: components of the query used to score positions, 1..head_dim. None: 4 * head_dim / ratio, at least 32, and
            with index="full", where each takes four times the bytes, head_dim / ratio, at least 8.
        k: positions attended in full, the local window and the current token included, at least 1; with `mass` the
            most. None: the number of valid cached positions of each batch row / (2 * ratio), or with `mass` / ratio, at
            least 128, growing with the context.
        ratio: the compression wanted of the bytes read, 1, 1.5, 2, ...; fills in `r` and `k` where they are None. Half
            steps only: k is then the same integer division on every device.
        local: the most recent positions, the current one included, that are always among the k. None: k / 4; with
            `mass` a quarter of `k_min`.
        index: what positions are found by. "int4": K's components in codes of four bits, an eighth of the bytes of K
            and V in 16 bits. "full": the components themselves, in a second copy of K, as in the paper.
        mass: 0 < mass < 1, to let each query and KV head stop where the positions it attends, the best first, have that
            share of the approximate scores: few where attention is sharp, many where it is not. 1.0: all k, as in the
            paper. None: 0.95 where k is None, else 1.0.
        k_min: the least that a query attends where `mass` decides, at most k. None: 128, or k.
        mean_value: where the mean value stands in for the positions that were not attended (step 5). True: in every
            query head, as in the paper. False: in none. A number, 0..1: in those whose positions have at least that
            share of the approximate score mass; heads that look everywhere are better off without it.
        dense_layers: the first layers of the model that stay dense.
        min_length: below this number of cached positions a step is dense. None: the point where sparsity begins to pay
            on this device. 0: every step with more than k valid positions is sparse. The size of a static cache counts,
            however much of it is filled, since a dense step reads all of it.

    Raises:
        TypeError, ValueError: naming the knob, its value and what would be right.
    """

    r: int | None = None
    k: int | None = None
    ratio: float = 8
    local: int | None = None
    index: str = "int4"
    mass: float | None = None
    k_min: int | None = None
    mean_value: bool | float = 0.5
    dense_layers: int = 0
    min_length: int | None = None

    def __post_init__(self) -> None:
        for name, least, optional in (
            ("r", 1, True),
            ("k", 1, True),
            ("local", 0, True),
            ("k_min", 1, True),
            ("dense_layers", 0, False),
            ("min_length", 0, True),
        ):
            _check_int(name, getattr(self, name), least, optional)
        if isinstance(self.ratio, bool) or not isinstance(self.ratio, (int, float)):
            raise TypeError(f"ratio must be a number, got {self.ratio!r} of type {type(self.ratio).__name__}")
        if not (math.isfinite(self.ratio) and self.ratio >= 1):
            raise ValueError(f"ratio must be a finite number of at least 1, got {self.ratio!r}")
        if 2 * self.ratio != int(2 * self.ratio):
            raise ValueError(f"ratio must be a multiple of 0.5, got {self.ratio!r}; r and k can be given instead")
        if not isinstance(self.mean_value, (bool, float)):
            raise TypeError(f"mean_value must be True, False or a float of 0 to 1, got {self.mean_value!r}")
        if not 0 <= self.mean_value <= 1:
            raise ValueError(f"mean_value must be True, False or a float of 0 to 1, got {self.mean_value!r}")
        if self.index not in KINDS:
            raise ValueError(f"index must be one of {', '.join(map(repr, KINDS))}, got {self.index!r}")
        if self.mass is not None:
            if not isinstance(self.mass, float):
                raise TypeError(f"mass must be a float above 0 and up to 1, or None, got {self.mass!r}")
            if not 0 < self.mass <= 1:
                raise ValueError(f"mass must be above 0 and at most 1, or None, got {self.mass!r}")
        if self.k_min is not None and self.k_min > self.base_k:
            raise ValueError(
                f"k_min must not be larger than k, got k_min={self.k_min} and k={self.base_k}"
                + (" (the least that k=None gives)" if self.k is None else "")
            )
        if self.local is not None and self.local > self.base_k:
            raise ValueError(
                f"local must not be larger than k, which counts the local window: got local={self.local} and "
                f"k={self.base_k}" + (" (the least that k=None gives)" if self.k is None else "")
            )

    @property
    def base_k(self) -> int:
        """Positions attended in full at the least (exactly, where k was given)."""
        return MIN_POSITIONS if self.k is None else self.k

    @property
    def k_divisor(self) -> int | None:
        """k is at least the number of valid positions divided by this, rounded down; None where k was given."""
        if self.k is not None:
            return None
        return int(2 * self.ratio) if self.stop_at is None else int(self.ratio)

    @property
    def stop_at(self) -> float | None:
        """The share of the scores with which a query stops; None: it reads all k."""
        mass = self.mass
        if mass is None:
            mass = MASS if self.k is None else 1.0
        return mass if mass < 1 else None

    @property
    def least_k(self) -> int:
        """What a query attends at the least where the scores say when to stop."""
        return min(MIN_POSITIONS, self.base_k) if self.k_min is None else self.k_min

    def components(self, head_dim: int) -> int:
        """r for heads of `head_dim` components.

        Raises:
            ValueError: where r was given and is larger than head_dim.
        """
        if self.r is None:
            times = 4 if self.index == "int4" else 1
            return min(head_dim, times * max(MIN_COMPONENTS, int(head_dim / self.ratio)))
        if self.r > head_dim:
            raise ValueError(f"r must not be larger than the model's head_dim={head_dim}, got r={self.r}")
        return self.r

    def positions(self, valid: int) -> int:
        """k for a batch row of `valid` cached positions (never more than these)."""
        grown = 0 if self.k_divisor is None else valid // self.k_divisor
        return min(valid, max(self.base_k, grown))

    def least(self, valid: int) -> int:
        """The fewest of them that a query attends."""
        return self.positions(valid) if self.stop_at is None else min(valid, max(self.least_k, self.local or 0))

    def budget(self, r: int) -> Budget:
        """What the operator is told, with so many components."""
        if self.stop_at is None:
            return Budget(r, self.base_k, self.k_divisor, self.local)
        local = self.least_k // 4 if self.local is None else self.local
        return Budget(r, self.base_k, self.k_divisor, local, self.stop_at, self.least_k)

    @classmethod
    def paper(cls, ratio: float = 8, **knobs: Any) -> SparqConfig:
        """SparQ Attention as its paper has it: full components, a fixed k, the mean value in every head. knobs: others,
        or these, changed."""
        own: dict[str, Any] = {"index": "full", "mass": 1.0, "mean_value": True, "ratio": ratio}
        return cls(**own | knobs)

    def to_dict(self) -> dict[str, Any]:
        """All knobs by name, plain data that JSON keeps as it is; `from_dict` takes it back."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, knobs: Mapping[str, Any]) -> SparqConfig:
        """The configuration with these knobs; those left out have their defaults.

        Raises:
            TypeError, ValueError: no such knob, or a wrong value of one, naming what would be right.
        """
        if not isinstance(knobs, Mapping):
            raise TypeError(f"knobs must be a dict, got {knobs!r} of type {type(knobs).__name__}")
        names = [field.name for field in dataclasses.fields(cls)]
        unknown = [name for name in knobs if name not in names]
        if unknown:
            raise TypeError(f"unknown knob {unknown[0]!r}; the knobs are {', '.join(names)}")
        return cls(**knobs)

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write `sparq_config.json` into `folder`, a model's for example, which is made where it is missing."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"format_version": FORMAT, **self.to_dict()}, indent=2)
        (folder / FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike, **options: Any) -> SparqConfig:
        """Read what `save_pretrained` has written.

        Args:
            name: a folder, or a name on the Hugging Face hub.
            options: for the hub, as a model's `from_pretrained` takes them: revision, token, cache_dir, subfolder,
                local_files_only, ...

        Raises:
            OSError: there is no such file.
            TypeError, ValueError: no such knob, a wrong value of one, a file that is none of SparQ's, or one of a later
                format.
        """
        path = cached_file(name, FILE, **options)
        assert path is not None  # it raises where there is none
        try:
            knobs = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} must be JSON: {error}") from error
        if not isinstance(knobs, dict):
            raise ValueError(f"{path} must hold an object of knobs, got {knobs!r}")
        version = knobs.pop("format_version", FORMAT)
        if isinstance(version, bool) or not isinstance(version, int) or version < 1:
            raise ValueError(f"{path}: format_version must be an integer of at least 1, got {version!r}")
        if version > FORMAT:
            raise ValueError(
                f"{path} was written by a later SparQ: its format_version is {version}, and this one reads up to "
                f"{FORMAT}; pip install -U sparq-attention"
            )
        try:
            return cls.from_dict(knobs)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{path}: {error}") from error


def settled(config: SparqConfig | Mapping[str, Any] | None, knobs: Mapping[str, Any]) -> SparqConfig:
    """`config`, a dict of its knobs or None for the defaults, with `knobs` in place of single fields.

    Raises:
        TypeError, ValueError: naming the argument or the knob, its value and what would be right.
    """
    if isinstance(config, SparqConfig):
        config = config.to_dict()
    if config is not None and not isinstance(config, Mapping):
        raise TypeError(
            f"config must be a SparqConfig, a dict of its knobs or None, got {config!r} of type {type(config).__name__}"
        )
    return SparqConfig.from_dict({**(config or {}), **knobs})


def _check_int(name: str, value: object, least: int, optional: bool) -> None:
    if value is None and optional:
        return
    kind = "an integer or None" if optional else "an integer"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be {kind}, got {value!r} of type {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
