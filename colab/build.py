"""Makes the notebooks of this folder out of their .py files.

    python -m colab.build [1_structures ...] [--execute] [--limit=180]

A .py file in jupytext's percent format is the source. In its notebook a badge stands under the title, and the code of
setup_cells.py in place of the cell `# setup`. `--execute` runs it in a fresh kernel in the repository's root and keeps the
outputs; without it outputs are kept as long as no code changed. README.md is the index, with the CPU time each took. Ends with code 1
where a cell fails, the time is up or a notebook is too large.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import copy
import datetime
import io
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbformat import NotebookNode
from PIL import Image

from colab.address import REPOSITORY
from structmat.structures.errors import suggest
from structmat.training import environment

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent
PLACE = "# setup"
MAX_BYTES = 400 * 1024
"""Of an .ipynb file."""
COLORS = 96
"""Of a picture."""
LIMIT = 180.0
"""Seconds one notebook may take."""
OWN = "structmat"
"""Key of the notebook's metadata that holds what executing it took."""


class NotebookError(ValueError):
    """A notebook that cannot be made; the text names it, and what is wrong."""


def names() -> list[str]:
    """The notebooks, in order."""
    return sorted(path.stem for path in FOLDER.glob("[0-9]*_*.py"))


def badge(name: str) -> str:
    """Markdown that opens the notebook in Colab."""
    where = REPOSITORY.removeprefix("https://github.com/")
    link = f"https://colab.research.google.com/github/{where}/blob/main/colab/{name}.ipynb"
    return f"[![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)]({link})"


def setup() -> list[NotebookNode]:
    """The cells that stand in place of `# setup`."""
    text = (FOLDER / "setup_cells.py").read_text().replace("@REPOSITORY@", REPOSITORY)
    _, _, code = text.partition("\n")  # the first line is for the linter
    return jupytext.reads(code, fmt="py:percent").cells


def compose(name: str) -> NotebookNode:
    """The notebook of `name`.py, not executed.

    Raises:
      NotebookError: it does not start with a title, or has not exactly one cell `# setup`.
    """
    read = jupytext.reads((FOLDER / f"{name}.py").read_text(), fmt="py:percent")
    places = [cell for cell in read.cells if cell.source.strip() == PLACE]
    if len(places) != 1:
        raise NotebookError(f"{name}.py: {len(places)} cells are {PLACE!r}; exactly one must be")
    title, _, rest = read.cells[0].source.partition("\n")
    if read.cells[0].cell_type != "markdown" or not title.startswith("# "):
        raise NotebookError(f"{name}.py: the first cell must be Markdown that starts with '# ', found {title!r}")
    read.cells[0].source = f"{title}\n\n{badge(name)}\n{rest}"
    at = read.cells.index(places[0])
    read.cells[at : at + 1] = setup()
    made = nbformat.v4.new_notebook()
    made.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    for number, cell in enumerate(read.cells):
        new = nbformat.v4.new_code_cell if cell.cell_type == "code" else nbformat.v4.new_markdown_cell
        made.cells.append(new(cell.source, id=f"cell-{number}"))
    return made


def execute(notebook: NotebookNode, limit: float = LIMIT) -> NotebookNode:
    """The notebook with its outputs, from a fresh kernel in the repository's root, and in its metadata what that took.

    Raises:
      CellExecutionError, DeadKernelError: a cell failed. TimeoutError: it took longer than `limit` seconds.
    """
    made, before, began = copy.deepcopy(notebook), _child_seconds(), time.perf_counter()
    where, quiet = {"metadata": {"path": str(ROOT)}}, ["--IPKernelApp.log_level=ERROR"]
    client = NotebookClient(
        made,
        timeout=None,
        kernel_name="python3",
        resources=where,
        record_timing=False,
        extra_arguments=quiet,
        coalesce_streams=True,
    )
    try:
        asyncio.run(asyncio.wait_for(client.async_execute(), limit))
    except DeadKernelError:  # also what a client says whose kernel was shut down when the time was up
        if time.perf_counter() - began < limit:
            raise
        raise TimeoutError(f"not done after {limit:g} s") from None
    seconds, cpu_seconds = time.perf_counter() - began, _child_seconds() - before
    device, versions = environment.device(), environment.versions()
    made.metadata = {
        "kernelspec": notebook.metadata["kernelspec"],
        OWN: {
            "seconds": round(seconds, 1),
            "cpu_seconds": round(cpu_seconds, 1),
            "machine": f"{device['cpu']}, {device['cores']} cores, {device['platform']}, jax {versions['jax']}",
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        },
    }
    for cell in made.cells:
        cell.metadata = {}
        for output in cell.get("outputs", ()):
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = smaller(output.data["image/png"])
    return made


def smaller(png: str) -> str:
    """A picture, base64 of a PNG, in at most COLORS colours."""
    image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    page = io.BytesIO()
    image.quantize(COLORS, dither=Image.Dither.NONE).save(page, "PNG", optimize=True)
    return base64.b64encode(page.getvalue()).decode()


def with_outputs(notebook: NotebookNode, old: NotebookNode) -> NotebookNode:
    """The notebook with the outputs of an older one where no code cell differs; without any elsewhere."""
    codes = [[cell for cell in nb.cells if cell.cell_type == "code"] for nb in (notebook, old)]
    if [cell.source for cell in codes[0]] == [cell.source for cell in codes[1]]:
        for new, was in zip(*codes):
            new.outputs, new.execution_count = was.outputs, was.execution_count
        notebook.metadata = old.metadata
    return notebook


def place_of(name: str) -> Path:
    """The .ipynb file of a notebook."""
    return FOLDER / f"{name}.ipynb"


def read(name: str) -> NotebookNode:
    """The notebook as it is on disk."""
    return nbformat.read(place_of(name), as_version=4)


def write(name: str, notebook: NotebookNode) -> Path:
    """Write the notebook.

    Raises:
      NotebookError: it is larger than MAX_BYTES.
    """
    text = nbformat.writes(notebook) + "\n"
    if len(text.encode()) > MAX_BYTES:
        raise NotebookError(
            f"{name}.ipynb has {len(text.encode()) / 1024:.0f} KiB, the limit is {MAX_BYTES // 1024}; smaller or fewer pictures help"
        )
    place_of(name).write_text(text)
    return place_of(name)


def index() -> str:
    """README.md: every notebook with its title, first paragraph and the CPU time it took."""
    rows, machines = [], set()
    for name in names():
        notebook = read(name)
        title, _, first, *_ = notebook.cells[0].source.split("\n\n")
        took: dict[str, Any] = notebook.metadata.get(OWN, {})
        machines |= {f"{took['machine']}, {took['date']}"} if took else set()
        seconds = f"{took['cpu_seconds']:.0f} s" if took else "not executed"
        said = " ".join(first.split())
        rows.append(f"| [{title.removeprefix('# ')}]({name}.ipynb) | {said} | {seconds} | {badge(name)} |")
    head = [
        "# Notebooks",
        "",
        "Written by `python -m colab.build --execute` from the .py files beside them, which are what to edit. CPU time of the whole",
        f"notebook, imports and compiling included: {'; '.join(sorted(machines))}.",
        "",
        "| notebook | shows | CPU time | |",
        "|---|---|---|---|",
    ]
    return "\n".join([*head, *rows]) + "\n"


def build(name: str, run: bool, limit: float) -> None:
    """Make one notebook.

    Raises:
      NotebookError, CellExecutionError, TimeoutError: as `compose`, `execute` and `write`.
    """
    made = compose(name)
    if run:
        made = execute(made, limit)
    elif place_of(name).exists():
        made = with_outputs(made, read(name))
    path, took = write(name, made), made.metadata.get(OWN)
    print(
        f"{path.name}: {path.stat().st_size / 1024:.0f} KiB, "
        + (f"{took['seconds']} s, {took['cpu_seconds']} s of CPU" if took else "no outputs; --execute makes them"),
        flush=True,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Build the notebooks named, or all, and the index; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m colab.build", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"default all: {', '.join(names())}")
    parser.add_argument("--execute", action="store_true", help="run the cells and keep their outputs")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds one notebook may take")
    given = parser.parse_args(argv)
    for name in given.names:
        if name not in names():
            parser.error(f"no notebook {name!r}{suggest(name, names())}")
    failed = 0
    for name in given.names or names():
        try:
            build(name, given.execute, given.limit)
        except (NotebookError, CellExecutionError, DeadKernelError) as error:
            failed = 1
            print(f"error: {name}: {error}", file=sys.stderr)
        except TimeoutError:
            failed = 1
            print(f"error: {name}: not done after {given.limit:g} s", file=sys.stderr)
    if all(place_of(name).exists() for name in names()):
        (FOLDER / "README.md").write_text(index())
    return failed


def _child_seconds() -> float:
    """CPU time of the processes this one started and waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    sys.exit(main())
