import io

from rich import box
from rich.table import Table

from structmat.analysis import pages


def test_in_a_notebook_too_the_file_gets_plain_text(monkeypatch):
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    table = Table("a", box=box.MARKDOWN)
    table.add_row("[bold]1[/bold]")
    file = io.StringIO()
    pages.page_of(file, 80).print(table)
    assert "| 1 |" in file.getvalue() and "\x1b" not in file.getvalue()
