"""The README tells the truth: its examples run, its commands exist, its table names every family."""

import doctest
import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import structure_pictures, structures
from structmat.structures import CONSTRUCTORS, FAMILIES, StructureError, parse
from structmat.training.config import validate

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


@pytest.mark.long
def test_launch_commands_run_dry_and_their_configs_fit():
    blocks = "".join(re.findall(r"```bash\n(.*?)```", TEXT, re.S)).replace("\\\n", " ")
    commands = [shlex.split(line) for line in blocks.splitlines() if line.startswith("python -m experiments.launch")]
    devices = {"experiments.launch.local": 4, "experiments.launch.slurm": 32, "experiments.launch.tpu_pod": 64}
    assert [words[2] for words in commands] == list(devices)
    for _, *own in commands:
        inner = own[own.index("--") + 1 :]
        dry = [sys.executable, *own[:2], "--dry_run", *own[2:]]
        done = subprocess.run(dry, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and shlex.join(inner) in done.stdout, done.stderr
        assert inner[:3] == ["python", "-m", "experiments.train"]
        given = dict(re.match(r"--([\w.]+)=(.*)", word).groups() for word in inner[3:])
        assert given.pop("workdir")
        path, _, argument = given.pop("config").partition(":")
        config = importlib.import_module(path.removesuffix(".py").replace("/", ".")).get_config(argument or None)
        for field, value in given.items():
            config.update_from_flattened_dict({field.removeprefix("config."): int(value)})
        validate(config, devices[own[1]])


def test_switches_fit_their_configs():
    commands = TEXT.replace("\\\n", " ")
    written = re.findall(r"--config=configs/(\w+)\.py:?(\w*) .*--config\.switch=\"(.*)\"", commands)
    assert len(written) >= 2
    for name, argument, text in written:
        config = importlib.import_module(f"configs.{name}").get_config(argument or None)
        config.switch = text
        validate(config, 1)


def test_every_structure_is_explained():
    assert all(f"`{name}(" in TEXT for name in CONSTRUCTORS)
    rows = re.findall(r"^\| `(\w+)\(", TEXT, re.M)
    assert set(FAMILIES) <= set(rows)


def test_tables_of_structures_are_up_to_date():
    """`python -m experiments.structures --write` brings them so."""
    assert structures.PAGE.read_text() == structures.page()
    assert TEXT == structures.readme(TEXT)


def test_every_structure_has_a_section_and_a_picture_of_the_member_named():
    """`python -m experiments.structures --write` draws them."""
    page, names = structures.PAGE.read_text(), structures.pictured()
    assert set(FAMILIES) < set(names) and set(CONSTRUCTORS) | {"sum"} == set(names)
    files = {path.stem: path for path in structures.PICTURES.glob("*.png")}
    assert set(files) == set(names)
    assert sum(path.stat().st_size for path in files.values()) < 1.5 * 2**20
    for name, text in names.items():
        drawn = str(parse(text).bind(structure_pictures.SIZE, structure_pictures.SIZE).structure)
        assert structure_pictures.noted(files[name])["Title"] == drawn, name
        heading = "a + b" if name == "sum" else name
        section = page.split(f"\n## {heading}\n")[1].split("\n## ")[0]
        assert f"](images/structures/{name}.png)" in section and f"`{text}`" in section and "**" in section, name


@pytest.mark.long
def test_pictures_show_the_matrices_of_today():
    for name, text in structures.pictured().items():
        found = structure_pictures.noted(structures.PICTURES / f"{name}.png")
        assert found == structure_pictures.note(text), name


@pytest.mark.parametrize("name", FAMILIES)
def test_families_describe_themselves(name):
    about = FAMILIES[name].about
    for n in (64, 256, 1024, 4096):
        assert (parse(about.example).bind(n, n).d_in, about.example.split("(")[0]) == (n, name)
    assert all(getattr(about, field) for field in about.__dataclass_fields__)


def test_structures_written_in_prose_parse():
    """Every call in backticks that names a structure and gives values, such as `fit(monarch(), params=0.3)`."""
    written = [
        t
        for t in re.findall(r"`([a-z_]+\([^`]*\))`", TEXT)
        if t.split("(")[0] in CONSTRUCTORS and "=" in t and "..." not in t
    ]
    for text in set(written) - {structures.signature(name) for name in FAMILIES}:
        try:
            parse(re.sub(r"\b[ab]\b(?=[,)])", "dense()", text).replace("{n8}", "8"))
        except StructureError as error:
            raise AssertionError(text) from error
