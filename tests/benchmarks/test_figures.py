"""The committed tables of speed are those of the committed results, and the README shows them."""

from pathlib import Path

import figures

ROOT = Path(__file__).parents[2]


def test_tables_are_made_from_the_results():
    assert (figures.RESULTS / "tables.md").read_text() == figures.tables()


def test_the_readme_shows_what_was_measured():
    readme, shown = (ROOT / "README.md").read_text(), list(figures.in_readme())
    assert len(shown) == 4
    for grid in shown:
        assert grid.markdown() in readme, grid.title


def test_every_case_and_way_has_its_row():
    attention = figures.read("attention")
    first, *_ = figures.in_readme()
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
