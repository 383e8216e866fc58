"""What is committed of the results fits together."""

from pathlib import Path

import divergence
import pytest
import results

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def test_tables_and_readme_are_made_from_the_scores():
    folder, readme = ROOT / "evals" / "results", (ROOT / "README.md").read_text()
    assert (folder / "tables.md").read_text() == results.all_tables(folder)
    for_the_readme, _ = results.glance(results.read(folder, "sweep")["scores"]).split("\n\n")
    assert for_the_readme in readme
    assert divergence.glance(results.read(folder, "divergence")) in readme
