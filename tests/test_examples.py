"""The examples answer right, as a stranger starts them."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "examples" / "notebook.ipynb"
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
KEYS = {"amber": "48213", "basalt": "70956", "cobalt": "31487"}  # of evals/demo.txt


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path: Path, tmp_path: Path) -> None:
    if path.stem == "attended":
        pytest.importorskip("matplotlib")
    run = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    if path.stem == "int8_weights" and importlib.util.find_spec("torchao") is None:
        assert run.returncode == 1 and "need torchao, which is not installed: pip install" in run.stderr
        pytest.skip("torchao is not installed; that the example says so has been seen")
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    if path.stem in ("quickstart", "int8_weights"):
        assert lines[0].strip().startswith(KEYS["amber"])
        moved = re.search(r"│ +all │.*│ +([\d.]+)x │", run.stdout)
        assert "mean α" in run.stdout and moved and float(moved[1]) > 8
    elif path.stem == "attended":
        assert lines[0].startswith(f"{KEYS['amber']}, which stands in the text at ")
        times = [int(number) for line in lines[1:] for number in re.findall(r"\d+(?=[,\]])", line)]
        assert sum(times) > 10, "it attends what it answers"
        assert (tmp_path / "attended.png").stat().st_size > 10_000
    elif path.stem == "long_document":
        assert lines == [f"The pass key of {name} is {key}." for name, key in KEYS.items()]
    else:
        assert sum(KEYS["amber"] in line for line in lines) == 5  # dense, and at four ratios
        moved = [float(x) for x in re.findall(r"1/([\d.]+)", run.stdout)]
        assert moved == sorted(moved) and len(moved) == 4 and moved[1] > 8


def test_notebook() -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "outputs are made by whoever runs it"
    folder = {"metadata": {"path": str(NOTEBOOK.parent)}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=folder).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = "".join(output.get("text", "") for output in outputs)
    assert printed.count(KEYS["amber"]) >= 5  # stock, SparQ, and most of the ratios
    shown = [output["data"] for output in outputs if "data" in output]
    assert any("<table>" in data.get("text/html", "") for data in shown)
    assert sum("image/png" in data for data in shown) == 2
    answers = "".join(data.get("text/plain", "") for data in shown)
    assert all(key in answers for key in KEYS.values())


def test_all_examples_are_here() -> None:
    names = ["attended", "compare_settings", "int8_weights", "long_document", "quickstart"]
    assert [path.stem for path in EXAMPLES] == names
