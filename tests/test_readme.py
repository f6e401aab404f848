"""The README tells the truth: its examples run, its commands exist, its table names every family."""

import doctest
import importlib.util
import re
from pathlib import Path

from structmat.structures import CONSTRUCTORS, FAMILIES, StructureError, parse

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()


def test_examples_run():
    failed, tried = doctest.testfile(str(ROOT / "README.md"), module_relative=False)
    assert tried > 5 and not failed


def test_commands_and_files_exist():
    modules = set(re.findall(r"python -m ([\w.]+)", TEXT))
    assert len(modules) >= 4
    assert all(importlib.util.find_spec(m) for m in modules)
    paths = set(re.findall(r"(?:configs|structmat|tests|results)/[\w./]+\w", TEXT))
    assert len(paths) > 5 and all((ROOT / p).exists() for p in paths), paths


def test_every_structure_is_explained():
    assert all(f"`{name}(" in TEXT for name in CONSTRUCTORS)
    rows = re.findall(r"^\| `(\w+)\(", TEXT, re.M)
    assert set(FAMILIES) <= set(rows)


def test_structures_written_out_parse():
    written = re.findall(r"^\| `([^`]+\))` \|", TEXT, re.M)
    letters = dict(r="2", b="2", k="2", l="2", t="1", c="2", d="0.5")
    for text in written:
        text = re.sub(r"=([rbkltcd])\b", lambda m: "=" + letters[m[1]], text)
        try:
            parse(text)
        except StructureError as error:
            raise AssertionError(text) from error
