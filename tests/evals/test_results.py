"""What is committed of the sweep's results fits together."""

import json
from pathlib import Path

import pytest
import results

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def test_tables_and_readme_are_made_from_the_scores():
    content = json.loads((ROOT / "evals" / "results" / "sweep.json").read_text())
    assert (ROOT / "evals" / "results" / "tables.md").read_text() == results.tables(content)
    assert results.glance(content["scores"]) in (ROOT / "README.md").read_text()
