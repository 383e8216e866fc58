"""The committed tables of speed are those of the committed results, and the README and docs show them."""

import json
from pathlib import Path

import figures

ROOT = Path(__file__).parents[2]


def test_tables_are_made_from_the_results():
    assert (figures.RESULTS / "tables.md").read_text() == figures.tables()


def test_the_readme_and_the_documents_show_what_was_measured():
    readme, documents = (ROOT / "README.md").read_text(), [path.read_text() for path in (ROOT / "docs").glob("*.md")]
    cards = [json.loads(path.read_text()) for path in figures.RESULTS.glob("gpu-*.json")]
    (glance,), shown = figures.in_readme(), list(figures.in_docs())
    assert glance.markdown() in readme and len(glance.rows) == 5
    assert len(shown) == 4 + sum(len(list(figures.gpu_grids(card))) for card in cards)
    for grid in shown:
        assert any(grid.markdown() in text for text in documents), grid.title
    assert ("**not measured yet.**" in readme) == (not cards)
    assert any("**On a GPU**: not measured yet." in text for text in documents) == (not cards)


def test_a_card_that_was_measured_has_its_tables(tmp_path):
    table = {"title": "Attention", "columns": ["shape", "dtype"], "rows": [["S1", "bfloat16"]], "left": 2}
    content = {"machine": {"device": "made up", "torch": "2.11"}, "attention": {"tables": [table, table]}}
    (tmp_path / "gpu-made-up.json").write_text(json.dumps(content | {"generation": {}}))
    (grid,) = figures.in_docs(tmp_path)
    assert grid.title == "made up, torch 2.11: Attention" and grid.markdown().endswith("| S1 | bfloat16 |")


def test_every_case_and_way_has_its_row():
    attention = figures.read("attention")
    first, *_ = figures.in_docs()
    rest, *_ = figures.others()
    assert len(first.rows) + len(rest.rows) == len(attention["rows"])
    row = attention["rows"][0]
    assert first.rows[0][0] == str(figures.case_of(row)) and f"{row['vs_kernel']['value']:.1f}x" in first.rows[0][6]


def test_a_wrong_output_has_no_ratio():
    attention = figures.read("attention")
    attention["rows"][0] |= {"wrong": {"SparQ": "differs"}, "vs_torch": None, "vs_kernel": None}
    grid = figures.attention_grid(attention, figures.README)
    assert grid.rows[0][5:7] == ("WRONG", "WRONG")


def test_what_was_not_measured_has_no_table(tmp_path):
    assert list(figures.in_readme(tmp_path)) == list(figures.others(tmp_path)) == []
