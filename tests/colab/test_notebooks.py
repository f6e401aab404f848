"""Notebooks are what their sources say, were executed whole and clean, and run."""

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError

from colab import build
from colab.address import REPOSITORY

NAMES = build.names()
VOLATILE = re.compile(r"(?<![\w.:/<])/\w[\w.-]*/\w| at 0x[0-9a-f]{6}")
"""An absolute path, or an address in memory."""


def test_every_notebook_has_a_source_and_a_line_in_the_index():
    assert len(NAMES) == 7
    assert sorted(path.stem for path in build.FOLDER.glob("*.ipynb")) == NAMES
    assert (build.FOLDER / "README.md").read_text() == build.index()


@pytest.mark.parametrize("name", NAMES)
def test_the_notebook_is_that_of_its_source(name):
    """Else: python -m colab.build NAME --execute"""
    made, stored = build.compose(name), build.read(name)
    assert [(c.cell_type, c.id, c.source) for c in stored.cells] == [(c.cell_type, c.id, c.source) for c in made.cells]
    assert stored.metadata["kernelspec"] == made.metadata["kernelspec"]
    assert set(stored.metadata) == {"kernelspec", build.OWN} and not any(c.metadata for c in stored.cells)


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_whole_clean_and_small(name):
    stored = build.read(name)
    codes = [cell for cell in stored.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in codes] == list(range(1, len(codes) + 1))
    outputs = [output for cell in codes for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    for output in outputs:
        assert output.output_type != "error" and output.get("name") != "stderr", output
        texts = [output.get("text", ""), *(t for k, t in output.get("data", {}).items() if not k.startswith("image/"))]
        assert not any(VOLATILE.search(text) for text in texts), texts
    assert build.place_of(name).stat().st_size <= build.MAX_BYTES
    assert stored.metadata[build.OWN]["seconds"] > 0 and stored.metadata[build.OWN]["cpu_seconds"] > 0


@pytest.mark.parametrize("name", NAMES)
def test_prose_has_no_figure_that_no_cell_computed(name):
    """Decimal fractions and percentages in prose are settings, in backticks."""
    prose = "\n".join(cell.source for cell in build.compose(name).cells if cell.cell_type == "markdown")
    plain = re.sub(r"```.*?```|`[^`]*`", "", prose, flags=re.S)
    assert not re.findall(r"\d+\.\d+|\d+ ?%", plain)


def first_cell(monkeypatch, folder: Path) -> list[list[str]]:
    """Run the first setup cell in `folder`; the commands it would run."""
    commands = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: commands.append(command))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(folder)
    exec(compile(build.setup()[0].source, "setup", "exec"), {})
    return commands


@pytest.mark.parametrize("folder", [build.ROOT, build.FOLDER])
def test_setup_in_the_repository_goes_to_its_root_and_does_nothing(folder, monkeypatch):
    assert first_cell(monkeypatch, folder) == []
    assert Path.cwd() == build.ROOT and str(build.ROOT) in sys.path


def test_setup_elsewhere_clones_and_installs(tmp_path, monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    (tmp_path / "structmat").mkdir()
    clone, install = first_cell(monkeypatch, tmp_path)
    assert clone[:2] == ["git", "clone"] and clone[-2:] == [REPOSITORY, str(tmp_path / "structmat")]
    assert install[1:4] == ["-m", "pip", "install"] and install[-1].startswith(".")
    assert Path.cwd() == tmp_path / "structmat"
    (tmp_path / "structmat" / "experiments").mkdir()
    (tmp_path / "structmat" / "experiments" / "train.py").touch()
    assert first_cell(monkeypatch, tmp_path) == [install]  # the clone is there, as after a restart of the kernel
    assert Path.cwd() == tmp_path / "structmat"


SOURCE = "# %% [markdown]\n# # Title\n#\n# What it shows.\n\n# %%\n# setup\n\n# %%\nprint(1)\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "setup_cells.py").write_text((build.FOLDER / "setup_cells.py").read_text())
    monkeypatch.setattr(build, "FOLDER", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (SOURCE.replace("# setup", "x = 1"), "0 cells are '# setup'"),
        (SOURCE + "\n# %%\n# setup\n", "2 cells are '# setup'"),
        (SOURCE.replace("# # Title", "# Title"), "must be Markdown that starts with '# '"),
    ],
)
def test_sources_that_are_no_notebook_are_refused(source, said, folder):
    (folder / "1_x.py").write_text(source)
    with pytest.raises(build.NotebookError, match=re.escape(said)):
        build.compose("1_x")


def test_outputs_stay_while_only_prose_changes(folder):
    (folder / "1_x.py").write_text(SOURCE)
    old = build.compose("1_x")
    old.metadata[build.OWN] = {"seconds": 1.0}
    old.cells[-1].outputs = [nbformat.v4.new_output("stream", text="1\n")]
    (folder / "1_x.py").write_text(SOURCE.replace("What it shows", "What it says"))
    kept = build.with_outputs(build.compose("1_x"), old)
    assert kept.cells[-1].outputs and build.OWN in kept.metadata and "What it says" in kept.cells[0].source
    (folder / "1_x.py").write_text(SOURCE.replace("print(1)", "print(2)"))
    gone = build.with_outputs(build.compose("1_x"), old)
    assert not gone.cells[-1].outputs and build.OWN not in gone.metadata


def test_large_notebooks_are_refused(folder):
    (folder / "1_x.py").write_text(SOURCE)
    made = build.compose("1_x")
    build.write("1_x", made)
    made.cells[-1].outputs = [nbformat.v4.new_output("stream", text="x" * build.MAX_BYTES)]
    with pytest.raises(build.NotebookError, match="the limit is 400"):
        build.write("1_x", made)


def cells(code: str) -> nbformat.NotebookNode:
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    made.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return made


@pytest.mark.notebooks
def test_a_cell_that_fails_and_one_that_hangs_end_the_execution():
    with pytest.raises(CellExecutionError, match="division by zero"):
        build.execute(cells("1 / 0"), limit=60)
    with pytest.raises(TimeoutError):
        build.execute(cells("import time; time.sleep(60)"), limit=8)


@pytest.mark.notebooks
@pytest.mark.parametrize("name", NAMES)
def test_the_notebook_runs(name):
    """In a fresh kernel; TimeoutError after 180 s."""
    made = build.execute(build.compose(name))
    assert all(cell.execution_count for cell in made.cells if cell.cell_type == "code")
