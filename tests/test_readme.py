"""The README's first example, run as it stands there on a bundled model and a long text."""

import re
from pathlib import Path

import pytest

import sparq

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_example_generates_and_its_steps_are_sparse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    example = re.search(r"```python\n(.*?)```", readme, re.DOTALL)
    assert example is not None and example[1].startswith("import sparq\n")
    code = example[1].replace("meta-llama/Llama-3.2-1B", str(ROOT / "evals" / "models" / "recall-llama"))
    text = (ROOT / "evals" / "demo.txt").read_text(encoding="utf-8")
    (tmp_path / "long.txt").write_text(text + "The pass key of amber is", encoding="utf-8")
    monkeypatch.chdir(tmp_path)

    names: dict = {}
    exec(code, names)

    shown = capsys.readouterr().out
    assert shown.startswith(" 48213.")
    assert str(sparq.report(names["model"])) in shown
    total = sparq.report(names["model"]).total
    assert total.sparse_steps == total.decode_steps > 0
    assert total.bytes_dense > 7 * total.bytes_read
