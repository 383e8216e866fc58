"""evals/divergence.py on a bundled model: what it measures, and that nothing is measured where nothing differs."""

from pathlib import Path

import divergence
import pytest
import torch
from divergence import Setting, compare, contexts, measure, of_all_settings, plot, table, table_by_context

pytestmark = pytest.mark.slow

MODEL = str(Path(divergence.__file__).parent / "models" / "recall-llama")
TEXT = "".join(f"Line {i} says that {i} times {i} is {i * i}.\n" for i in range(60))
SETTINGS = [
    Setting("all", "all", "sparq", {"k": 10_000}),
    Setting("SparQ", "SparQ", "sparq", {"r": 4, "k": 32, "index": "full"}),
    Setting("SparQ, first layer dense", "first", "sparq", {"r": 4, "k": 32, "index": "full", "dense_layers": 1}),
    Setting("SparQ", "coded", "sparq", {"r": 16, "k": 32}),
    Setting("SparQ, first layer dense", "coded, first", "sparq", {"r": 16, "k": 32, "dense_layers": 1}),
    Setting("oracle top-k", "oracle", "oracle", {"k": 32}),
]


@pytest.fixture(scope="module")
def measured() -> list[divergence.Measured]:
    return measure(MODEL, "lines", TEXT, (512, 1024), SETTINGS)


def test_each_context_kind_and_setting_is_measured_once(measured: list[divergence.Measured]) -> None:
    found = [(one.context, one.kind, one.name) for one in measured]
    assert len(set(found)) == len(found) == 2 * 2 * len(SETTINGS)


def test_reading_everything_changes_nothing(measured: list[divergence.Measured]) -> None:
    for one in measured:
        assert (one.kl < 1e-5 and one.same == 1 and one.less == 1) == (one.name == "all"), one


def test_bytes_are_counted_token_by_token(measured: list[divergence.Measured]) -> None:
    """16 heads' worth of tricks aside: S positions of r components and k of 2·d, against 2·S·d, on average over S."""
    for one in measured:
        if one.name == "SparQ":
            cached, d = one.context + (divergence.TOKENS + 1) / 2, 64
            expected = 2 * d * cached / (4 * cached + 32 * 2 * d + 4 * d)
            assert one.less == pytest.approx(expected, rel=1e-3)
        if one.name == "coded":  # in 16 bits, of which a code takes four; two values a group; the rest from K
            seen = [one.context + i for i in range(1, divergence.TOKENS + 1)]
            tail, all_of_them = sum(n % 256 for n in seen), sum(seen)
            read = (all_of_them - tail) * 16 * (1 / 4 + 2 / 256) + tail * 16 + len(seen) * (32 * 2 * 64 + 4 * 64)
            assert one.less == pytest.approx(2 * 64 * all_of_them / read, rel=0.02)
        if one.name.endswith("first"):
            name = one.name.removesuffix(", first").replace("first", "SparQ")
            whole = next(o.less for o in measured if (o.context, o.kind, o.name) == (one.context, one.kind, name))
            assert 1 < one.less < whole
            layers = 4  # of which one reads everything
            assert one.less == pytest.approx(layers / (1 + (layers - 1) / whole), rel=0.02)


@pytest.mark.parametrize("weights", divergence.WEIGHTS[1:])
@pytest.mark.filterwarnings("ignore")
def test_weights_held_otherwise_move_predictions_and_have_a_row(weights: str) -> None:
    package = {"int8": "torchao"}.get(weights, weights.split()[0])
    if package in ("torchao", "bitsandbytes"):
        pytest.importorskip(package)
    found = measure(MODEL, "lines", TEXT, (512,), SETTINGS[:1], weights)
    assert {(one.kind, one.name) for one in found if one.line == "weights"} == {
        (kind, f"{weights} weights, dense") for kind in divergence.KINDS
    }
    for one in found:
        assert (0 < one.kl < 0.5) if one.line == "weights" else (one.kl < 0.01 and one.less == 1), one


def test_a_repeated_passage_comes_back() -> None:
    tokens = torch.arange(5000)
    for length, kind, prefix, cue, decoded in contexts(tokens, (1000, 2000)):
        assert prefix + len(cue) == length and len(decoded) == divergence.TOKENS + 1
        together = torch.cat([cue, decoded])
        assert together.tolist() == list(range(int(together[0]), int(together[0]) + len(together)))
        assert decoded[0] == length if kind == "plain" else together[0] == int(0.35 * length)


def test_compare() -> None:
    """Two tokens of a vocabulary of two."""
    dense, sparse = (torch.tensor(p).log() for p in ([[0.5, 0.5], [0.9, 0.1]], [[0.25, 0.75], [0.9, 0.1]]))
    kl, high, change, same = compare(dense, sparse, torch.tensor([0, 1]))
    divergent = 0.5 * 1 + 0.5 * (torch.tensor(2 / 3).log2().item())
    assert kl == pytest.approx(divergent / 2) and high == pytest.approx(0.95 * divergent)
    assert change == pytest.approx(0.5) and same == 0.5


def test_tables_and_plot(measured: list[divergence.Measured], tmp_path: Path) -> None:
    content = {"measured": [divergence.asdict(one) for one in measured if one.context == 512 or one.name == "SparQ"]}
    assert {one["context"] for one in of_all_settings(content["measured"])} == {512}
    assert len(table(content).splitlines()) == 2 + len(SETTINGS)
    assert "–" in table_by_context(content)
    plot(content, tmp_path / "divergence.png")
    assert (tmp_path / "divergence.png").stat().st_size > 10_000
