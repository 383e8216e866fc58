"""The committed tables of speed are those of the committed results, and the README and docs show them."""

import json
from pathlib import Path

import pytest
import tables
from rich.console import Console
from tables import Grid

ROOT = Path(__file__).parents[2]


def test_tables_are_made_from_the_results():
    assert (tables.RESULTS / "tables.md").read_text() == tables.everything()


def test_the_readme_and_the_documents_show_what_was_measured():
    readme, documents = (ROOT / "README.md").read_text(), [path.read_text() for path in (ROOT / "docs").glob("*.md")]
    cards = list(tables.RESULTS.glob("gpu-*.json"))
    (glance,), shown, measured = tables.made(tables.IN_README), list(tables.made(tables.IN_DOCS)), tables.gpu_grids()
    assert glance.markdown() in readme and len(glance.rows) == 5 and len(shown) == 6
    for grid in (*shown, *measured):
        assert any(grid.markdown() in text for text in documents), grid.title
    assert ("**not measured yet.**" in readme) == (not cards)
    assert any("**On a GPU**: not measured yet." in text for text in documents) == (not cards)


def test_a_card_that_was_measured_has_its_tables(tmp_path):
    table = {"title": "Attention", "columns": ["shape", "dtype"], "rows": [["S1", "bfloat16"]], "left": 2}
    content = {"machine": {"device": "made up", "torch": "2.11"}, "attention": {"tables": [table, table]}}
    (tmp_path / "gpu-made-up.json").write_text(json.dumps(content | {"generation": {}}))
    (grid,) = tables.gpu_grids(tmp_path)
    assert grid.title == "made up, torch 2.11: Attention" and grid.markdown().endswith("| S1 | bfloat16 |")


def test_every_case_has_its_row():
    attention = tables.read(tables.RESULTS, "attention")
    first, rest = tables.papers_grid(attention), tables.sweep_grid(attention)
    assert len(first.rows) + len(rest.rows) == len(attention["rows"])
    row = attention["rows"][0]
    assert first.rows[0][0].endswith(row["case"]["shape"])
    assert f"{row['ratios']['SparQ']['C++ dense']['value']:.1f}x" in first.rows[0][6]


@pytest.mark.parametrize("name, wrong", [("SparQ", (True, True)), ("C++ dense", (False, True))], ids=["ours", "theirs"])
def test_a_wrong_output_has_no_ratio(name, wrong):
    content = tables.read(tables.RESULTS, "attention")
    right = tables.attention_grid(content).rows[0][5:7]
    content["rows"][0]["ways"][name]["wrong"] = "differs"
    cells = tables.attention_grid(content).rows[0][5:7]
    assert list(cells) == ["WRONG" if is_wrong else cell for is_wrong, cell in zip(wrong, right, strict=True)]
    assert "x" in right[0] and "x" in right[1]


def line(slope: float, at_zero: float, error: float | None = 0.0) -> dict:
    return {"slope": slope, "at_zero": at_zero, "slope_error": error}


@pytest.mark.parametrize(
    ("ours", "expected"),
    (
        (line(0.1, 10), ("4.0x", "from 10.0")),
        (line(0.5, 6), ("0.8x", "up to 10.0")),
        (line(0.1, 5), ("4.0x", "everywhere")),
        (line(0.6, 9), ("0.7x", "nowhere")),
        (line(0.1, 5, error=0.06), ("unclear", "unclear")),
        (line(-0.1, 5, error=None), ("unclear", "unclear")),
    ),
)
def test_where_sparq_is_faster(ours, expected):
    assert tables.lines_compared(ours, line(0.4, 7)) == expected


def test_a_grid_says_the_same_on_a_terminal_and_as_markdown():
    grid = Grid("A title", ("name", "of", "GB/s"), [("void f<int>[3]", "x|y", "1.5"), ("g", "z", "20")])
    expected = ["| name | of | GB/s |", "| --- | --- | ---: |", "| void f<int>[3] | x\\|y | 1.5 |", "| g | z | 20 |"]
    assert grid.markdown().splitlines() == expected
    console = Console(width=80)
    with console.capture() as captured:
        console.print(grid.table())
    assert "void f<int>[3]" in captured.get() and "x|y" in captured.get()


def test_what_was_not_measured_has_no_table(tmp_path):
    assert list(tables.made(tables.IN_README, tmp_path)) == list(tables.made(tables.OTHERS, tmp_path)) == []
