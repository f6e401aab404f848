"""What the documentation site says that only code can say without going stale: fields of configs, tables, methods, listings.

A page asks for it by a comment on a line of its own, `<!-- generated: fields -->`; `fill` puts it there. `mkdocs build` does
so for every page, by `experiments/site_hook.py`.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from experiments.tables.registry import TABLES
from experiments.tables.schema import Table
from structmat.optim import OPTIMIZERS, SCHEDULES
from structmat.structures.errors import suggest
from structmat.training.config import default
from structmat.training.methods import METHODS
from structmat.training.tasks import TASKS

ROOT = Path(__file__).parent.parent
PACKAGES = ("structmat", "pallas_kernels")
"""Whose modules the reference documents."""

_MARK = re.compile(r"^<!-- generated: (\w+)(.*) -->$", re.M)
_COMMENTED = re.compile(r"^\s*(\w+)=.*?(?:,|\()?\s+# (.+)$")

MEANINGS = {
    "steps": "updates of the whole run",
    "optim.name": f"the optimiser: {', '.join(OPTIMIZERS)}",
    "optim.schedule": f"of the rate: {', '.join(SCHEDULES)}",
    "optim.b1": "decay of the mean of gradients; of sgd, the momentum",
    "optim.b2": "decay of the mean of their squares",
    "optim.eps": "added to the root of the mean of squares",
    "checkpoint.every": "steps between saves",
    "checkpoint.keep": "newest saves kept",
    "mesh.replica": "whole replicas, one or several per slice of a pod",
    "mesh.data": "whole replicas within a slice; -1 is what is left",
    "mesh.fsdp": "parts into which parameters and batch are split",
    "mesh.tensor": "parts into which products are split",
    "model.name": "which of the task's models",
    "model.layers": "blocks, or hidden layers",
    "model.width": "channels of a hidden layer",
    "model.classes": "how many there are",
    "model.channels": "of an image",
    "model.heads": "of attention; a divisor of the width",
    "model.context": "tokens of an example",
    "model.mlp_ratio": "units of the MLP per channel",
    "model.stages": "between which the side of the image halves",
    "model.dropout": "fraction of activations dropped in training",
    "data.inputs": "numbers of an example",
    "data.coils": "of the scanner, each with an image of its own",
    "data.viscosity": "of the fluid",
}
"""Fields whose declaration carries no comment."""


def fill(text: str) -> str:
    """A page with everything it asks for.

    Raises:
      ValueError: a comment asks for what there is not.
    """
    return _MARK.sub(lambda found: _section(found[1], found[2].split()), text)


def _section(name: str, words: list[str]) -> str:
    if name not in SECTIONS:
        raise ValueError(f"no section {name!r}" + suggest(name, SECTIONS))
    return SECTIONS[name](*words)


# -- fields of configs -----------------------------------------------------------------------------------------------------


def flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted field, default) of a config."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def meanings(lines: list[str]) -> dict[str, str]:
    """Field -> the comment on the line that declares it; the first one of a name counts."""
    found: dict[str, str] = {}
    for line in lines:
        if match := _COMMENTED.match(line):
            found.setdefault(match[1], match[2])
    return found


def _source(module: Any) -> list[str]:
    return Path(inspect.getfile(module)).read_text().splitlines()


def _shared() -> dict[str, str]:
    """Of the fields every run has, by dotted name."""
    lines = _source(importlib.import_module("structmat.training.config"))
    body = ast.parse("\n".join(lines)).body
    (function,) = [n for n in body if isinstance(n, ast.FunctionDef) and n.name == "default"]
    found, group = {}, ""
    for line in lines[function.lineno : function.end_lineno]:
        if match := re.match(r"\s+(\w+)=dict\($", line):
            group = f"{match[1]}."
        elif re.match(r"\s+\),", line):
            group = ""
        elif match := _COMMENTED.match(line):
            found[group + match[1]] = match[2]
    return found


def _of_task(task: str, model: str) -> dict[str, str]:
    """Of the fields of one model and its data: each one's own declaration, then what it shares with others."""
    module = TASKS[task]
    data, own, shared = meanings(_source(module)), {}, {}
    for name in sorted(_imported(module)):
        lines = _source(importlib.import_module(name))
        entries = {known: _entry(lines, known) for known in module.MODELS}
        own |= meanings([lines[i] for i in entries[model]])
        taken = {i for rows in entries.values() for i in rows}
        shared |= meanings([line for i, line in enumerate(lines) if i not in taken])
    found = {f"model.{name}": text for name, text in (shared | own).items()}
    return found | {f"data.{name}": text for name, text in (shared | data).items()}


def _imported(module: Any) -> set[str]:
    """The modules of tasks that one of them imports, directly or not."""
    nodes = ast.walk(ast.parse("\n".join(_source(module))))
    names = {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    own = {name for name in names if name.startswith("structmat.training.tasks.")}
    return own.union(*(_imported(importlib.import_module(name)) for name in own))


def _entry(lines: list[str], model: str) -> range:
    """The lines, by index, of `"model": ...` in a table of models."""
    for node in ast.walk(ast.parse("\n".join(lines))):
        for key, value in zip(getattr(node, "keys", ()), getattr(node, "values", ())):
            if isinstance(key, ast.Constant) and key.value == model:
                return range(value.lineno - 1, value.end_lineno)
    return range(0)


def described(task: str, model: str) -> list[tuple[str, Any, str]]:
    """(field, default, meaning) of a whole config; the meaning is "" where none is written anywhere."""
    said = _of_task(task, model) | _shared()
    fields = flat(default(task, model).to_dict())
    return [(name, value, said.get(name) or MEANINGS.get(name, "")) for name, value in fields]


def fields() -> str:
    """Every field of every task's config as Markdown: those of all runs, then each task's own."""
    common = [row for row in described("lm", "gpt") if not row[0].startswith(("model.", "data."))]
    parts = ["### All runs\n", _rows(common)]
    for task, module in TASKS.items():
        for i, model in enumerate(module.MODELS):
            rows = [row for row in described(task, model) if row[0].startswith(("model.", "data.")[: 1 if i else 2])]
            parts += [f"\n### Task `{task}`, model `{model}`\n", _rows(rows)]
    return "\n".join(parts)


def _rows(rows: list[tuple[str, Any, str]]) -> str:
    cell = lambda text: text.replace("|", "\\|")
    lines = [f"| `{name}` | `{value!r}` | {cell(text)} |" for name, value, text in rows]
    return "\n".join(["| field | default | meaning |", "| --- | --- | --- |", *lines])


# -- methods, tables and listings ------------------------------------------------------------------------------------------


def method(name: str) -> str:
    """What a method says of itself."""
    if name not in METHODS:
        raise ValueError(f"no method {name!r}" + suggest(name, METHODS))
    return inspect.getdoc(METHODS[name])


def methods() -> str:
    """The text form of every method a config can name, and the module that defines it."""
    lines = [f"- `{cls()}`: `{cls.__module__}`" for _, cls in sorted(METHODS.items())]
    return "\n".join(lines)


def tables(*names: str) -> str:
    """Title, source and claims of tables, with a link to their results."""
    for name in names:
        if name not in TABLES:
            raise ValueError(f"no table {name!r}" + suggest(name, TABLES))
    return "\n".join(_table(TABLES[name]) for name in names)


def _table(table: Table) -> str:
    lines = [f'??? example "Table `{table.name}`: {table.title}"\n', f"    {table.citation}.\n"]
    lines += [f"    - {claim.text} ({claim.source})" for claim in table.claims]
    sections = [heading for heading in _results() if heading.startswith(f"{table.name}, ")]
    links = [f"[{heading.split(':')[0]}](../results/tables/report.md#{_anchor(heading)})" for heading in sections]
    lines += [f"\n    Measured: {', '.join(links)}." if links else "\n    Not run yet."]
    lines += [f"    `python -m experiments.tables show {table.name}`; scales {', '.join(table.bases)}.\n"]
    return "\n".join(lines)


def _anchor(heading: str) -> str:
    """As Python-Markdown names it; building the site strictly checks that it does."""
    return re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower())


def _results() -> list[str]:
    """Headings of the report, one per table and scale with results."""
    return re.findall(r"^## (.+)$", (ROOT / "results" / "tables" / "report.md").read_text(), re.M)


def other_tables() -> str:
    """The tables that the page of methods does not ask for by name."""
    page = (ROOT / "docs" / "methods.md").read_text()
    named = {word for name, words in _MARK.findall(page) if name == "tables" for word in words.split()}
    return tables(*(name for name in TABLES if name not in named)) or "None."


def listing(path: str) -> str:
    """A file of the repository as a block of code."""
    file = ROOT / path
    if not file.is_file():
        raise ValueError(f"no file {path!r} to list")
    return f'```python title="{path}"\n{file.read_text().rstrip()}\n```'


SECTIONS: dict[str, Callable[..., str]] = {
    "fields": fields,
    "method": method,
    "methods": methods,
    "tables": tables,
    "other_tables": other_tables,
    "listing": listing,
}
"""What a page can ask for."""


# -- reference -------------------------------------------------------------------------------------------------------------


def modules() -> dict[str, Path]:
    """Dotted name -> file of every public module."""
    found: dict[str, Path] = {}
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*.py")):
            parts = file.relative_to(ROOT).with_suffix("").parts
            if parts[-1] == "__init__":
                parts = parts[:-1]
            if not any(part.startswith("_") for part in parts):
                found[".".join(parts)] = file
    return found


def reference(name: str) -> str:
    """The page of a module."""
    return f"# `{name}`\n\n::: {name}\n"
