"""A grid says the same on a terminal and as Markdown."""

from report import Grid, write_markdown
from rich.console import Console

GRID = Grid("A title", ("name", "of", "GB/s"), [("void f<int>[3]", "x|y", "1.5"), ("g", "z", "20")])


def test_markdown_aligns_numbers_right_and_keeps_pipes(tmp_path):
    path = tmp_path / "new" / "table.md"
    write_markdown(path, [GRID, GRID])
    expected = ["| name | of | GB/s |", "| --- | --- | ---: |", "| void f<int>[3] | x\\|y | 1.5 |", "| g | z | 20 |"]
    assert GRID.markdown().splitlines() == expected
    assert path.read_text().count("**A title**\n\n| name") == 2


def test_terminal_shows_cells_as_they_are():
    console = Console(width=80)
    with console.capture() as captured:
        console.print(GRID.table())
    assert "void f<int>[3]" in captured.get() and "x|y" in captured.get()
