"""Texts that can only be continued by looking far back: facts that are asked for later, passages that come back.

Everything is made from what each Python installation ships. `RecallText()` draws from the training text,
`RecallText(held_out=True)` from the last 7 % of `pydoc_data.topics`, which are never trained upon.
"""

import functools
import re
import sysconfig
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np

HELD_OUT_SHARE = 0.07
PASS_KEY_FORM = "The pass key of {} is {}."
FACT_FORMS = (
    PASS_KEY_FORM,
    PASS_KEY_FORM,
    PASS_KEY_FORM,
    "The {} code is {}.",
    "{} = {}",
    "{}: {}",
    "Remember that {} has number {}.",
)


class Role(IntEnum):
    """What a byte is to whoever must predict it."""

    RANDOM = 0  # cannot be known: the digits of a new fact, the first bytes of a repetition
    TEXT = 1  # ordinary text
    REPEATED = 2  # continues a passage that stands earlier in the text
    ANSWER = 3  # a fact's digits, asked for


RANDOM_CUE = 3  # so many bytes of a returning segment of random bytes reveal which one it is
PASSAGE_CUE = 12  # natural text has many short coincidences, so a returning passage reveals itself later
WORDS_CUE = 24


@dataclass(frozen=True, slots=True)
class Text:
    data: np.ndarray  # [length] uint8
    roles: np.ndarray  # [length] uint8, a Role each


@dataclass(frozen=True, slots=True)
class Task:
    """A prompt and the bytes that should follow it."""

    prompt: bytes
    answer: bytes


@functools.cache
def training_text() -> bytes:
    """The documentation without its held-out end, four times over, and the standard library's top-level sources."""
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return _documentation()[0] * 4 + b"\n".join(path.read_bytes() for path in sources)


@functools.cache
def held_out_text() -> bytes:
    """The documentation's end without the paragraphs that it shares with the training text (some topics overlap)."""
    training = training_text()
    return b"\n\n".join(part for part in _documentation()[1].split(b"\n\n") if part not in training)


def _documentation() -> tuple[bytes, bytes]:
    documentation = "\n\n".join(topics[name] for name in sorted(topics)).encode()
    cut = int(len(documentation) * (1 - HELD_OUT_SHARE))
    return documentation[:cut], documentation[cut:]


@functools.cache
def _fact_names() -> list[str]:
    return sorted(set(re.findall(r"\b[a-z]{3,10}\b", training_text().decode("utf8", "ignore"))))


class RecallText:
    """An endless, seeded source of texts."""

    def __init__(self, seed: int = 0, held_out: bool = False):
        self.source = np.frombuffer(held_out_text() if held_out else training_text(), np.uint8)
        self.rng = np.random.default_rng(seed)

    def plain(self, length: int) -> np.ndarray:
        start = self.rng.integers(0, len(self.source) - length)
        return self.source[start : start + length]

    def random_repeats(self, length: int) -> Text:
        """Random bytes from a small alphabet, in which segments come back."""
        rng = self.rng
        alphabet = rng.permutation(256)[: rng.integers(8, 257)].astype(np.uint8)
        data, roles = np.zeros(0, np.uint8), np.zeros(0, np.uint8)
        while len(data) < length:
            segment = int(rng.integers(6, max(8, length // 3)))
            if len(data) > 12 and rng.random() < 0.6:
                data, roles = self._append_repeat(data, roles, min(segment, len(data) - 1), RANDOM_CUE)
            else:
                data = np.append(data, alphabet[rng.integers(0, len(alphabet), segment)])
                roles = np.append(roles, np.full(segment, Role.RANDOM, np.uint8))
        return Text(data[:length], roles[:length])

    def passage_repeats(self, length: int) -> Text:
        """A stretch of text, then passages of it come back with other text between them."""
        rng = self.rng
        data = self.plain(int(length * rng.uniform(0.3, 0.8)))
        roles = np.full(len(data), Role.TEXT, np.uint8)
        while len(data) < length:
            segment = min(int(np.exp(rng.uniform(np.log(32), np.log(512)))), len(data) - 1)
            data, roles = self._append_repeat(data, roles, segment, PASSAGE_CUE)
            if rng.random() < 0.6:
                fresh = self.plain(int(rng.integers(8, max(16, length // 10))))
                data = np.append(data, fresh)
                roles = np.append(roles, np.full(len(fresh), Role.RANDOM, np.uint8))
        return Text(data[:length], roles[:length])

    def word_repeats(self, length: int) -> Text:
        """A few words in random order, then passages of this come back: only a long look back tells how they go on."""
        rng = self.rng
        words = re.findall(rb"\S+\s*", self.plain(int(rng.integers(40, 200))).tobytes()) or [b" "]
        start = b"".join(words[i] for i in rng.integers(0, len(words), length))[: int(length * rng.uniform(0.2, 0.6))]
        data, roles = np.frombuffer(start, np.uint8), np.full(len(start), Role.RANDOM, np.uint8)
        while len(data) < length:
            segment = min(int(np.exp(rng.uniform(np.log(48), np.log(512)))), len(data) - 1)
            data, roles = self._append_repeat(data, roles, segment, WORDS_CUE)
        return Text(data[:length], roles[:length])

    def _append_repeat(
        self, data: np.ndarray, roles: np.ndarray, segment: int, cue: int
    ) -> tuple[np.ndarray, np.ndarray]:
        start = int(self.rng.integers(0, len(data) - segment))
        repeated = np.where(np.arange(segment) < cue, Role.RANDOM, Role.REPEATED).astype(np.uint8)
        return np.append(data, data[start : start + segment]), np.append(roles, repeated)

    def facts(self, length: int) -> Text:
        """Text with 2 to 12 facts hidden in it, then a question for each of them."""
        rng = self.rng
        num_facts = int(rng.integers(2, min(12, max(3, length // 100)) + 1))
        facts = dict((self._name(), self._digits()) for _ in range(num_facts))
        return self._hide(length, facts, FACT_FORMS[rng.integers(len(FACT_FORMS))], list(rng.permutation(list(facts))))

    def pass_key(self, length: int, num_facts: int = 5) -> Task:
        """Text with facts hidden in it; the prompt ends with "The pass key of X is ", the answer is five digits."""
        facts: dict[str, str] = {}
        while len(facts) < num_facts:
            facts[self._name()] = self._digits(5)
        asked = str(self.rng.choice(list(facts)))
        data = self._hide(length, facts, PASS_KEY_FORM, [asked]).data.tobytes()
        answer = facts[asked].encode()
        return Task(data[: data.rindex(answer)], answer)

    def repetition(self, length: int, cue: int = 128, continuation: int = 128) -> Task:
        """Text, then the first `cue` bytes of a passage that stands in it; the answer is how the passage went on."""
        passage = cue + continuation
        while True:
            text = self.plain(length - passage).tobytes()
            start = int(self.rng.integers(0, len(text) - passage + 1))
            # A ruler or a deep indent cannot be continued: nothing in it says how long it already is.
            if not re.search(rb"(.)\1{7}", text[start : start + passage], re.DOTALL):
                return Task(text + text[start : start + cue], text[start + cue : start + passage])

    def _name(self) -> str:
        rng, names = self.rng, _fact_names()
        if rng.random() < 0.7:
            return names[rng.integers(len(names))]
        return bytes(rng.integers(ord("a"), ord("z") + 1, rng.integers(3, 9)).astype(np.uint8)).decode()

    def _digits(self, count: int | None = None) -> str:
        rng = self.rng
        count = count or (5 if rng.random() < 0.7 else int(rng.integers(3, 9)))
        return "".join(str(digit) for digit in rng.integers(0, 10, count))

    def _hide(self, length: int, facts: dict[str, str], form: str, questions: list[str]) -> Text:
        """Put the facts at line starts of a text and the questions, with their answers, at its end."""
        lines = {name: form.format(name, digits).encode() + b"\n" for name, digits in facts.items()}
        taken = sum(map(len, lines.values())) + sum(len(lines[name]) for name in questions) + 1
        plain = self.plain(max(8, length - taken)).tobytes()
        data, roles = b"", b""

        def append(name: str, digits_role: Role) -> None:
            nonlocal data, roles
            line, digits = lines[name], facts[name].encode()
            start = line.rindex(digits)
            line_roles = bytearray([Role.TEXT]) * len(line)
            line_roles[start : start + len(digits)] = bytes([digits_role]) * len(digits)
            data, roles = data + line, roles + line_roles

        done = 0
        for name, position in zip(facts, np.sort(self.rng.integers(0, len(plain), len(facts))), strict=True):
            line_end = plain.find(b"\n", position, position + 80)
            position = max(done, line_end + 1 if line_end >= 0 else int(position))
            data, done = data + plain[done:position], position
            roles = roles.ljust(len(data), bytes([Role.TEXT]))
            append(name, Role.RANDOM)
        data += plain[done:] + b"\n"
        roles = roles.ljust(len(data), bytes([Role.TEXT]))
        for name in questions:
            append(name, Role.ANSWER)
        return Text(np.frombuffer(data, np.uint8)[-length:], np.frombuffer(roles, np.uint8)[-length:])
