"""The documentation tells the truth: examples run, what is public is documented, pages can be built, papers agree."""

from __future__ import annotations

import ast
import doctest
import importlib
import importlib.util
import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import structmat
from colab.address import REPOSITORY
from experiments import site_pages
from structmat.structures import CONSTRUCTORS, parse
from structmat.training.methods import METHODS
from structmat.training.tasks import TASKS

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
PAPERS = [ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"]
PACKAGES = ("structmat", "pallas_kernels", "experiments")
FLAGS = doctest.ELLIPSIS
SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text())


def sources() -> list[Path]:
    return [p for package in PACKAGES for p in sorted((ROOT / package).rglob("*.py"))]


# -- examples --------------------------------------------------------------------------------------------------------------


def with_examples() -> list[str]:
    files = [p for p in sources() if p.is_relative_to(ROOT / "structmat") or p.is_relative_to(ROOT / "pallas_kernels")]
    return [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in files if ">>>" in p.read_text()]


@pytest.mark.parametrize("name", with_examples())
def test_examples_in_docstrings_run(name):
    module = importlib.import_module(name.removesuffix(".__init__"))
    said = io.StringIO()
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    for test in doctest.DocTestFinder().find(module):
        runner.run(test, out=said.write)
    assert runner.tries and not runner.failures, said.getvalue()


@pytest.mark.parametrize("page", [p for p in PAGES if re.search(r"^>>> ", p.read_text(), re.M)], ids=lambda p: p.name)
def test_examples_in_pages_run(page):
    found = doctest.testfile(str(page), module_relative=False, optionflags=FLAGS)
    assert found.attempted and not found.failed


def test_the_most_used_names_have_examples():
    used = [structmat.parse, structmat.project, structmat.Matrix, structmat.Rules, structmat.choose]
    assert all(">>>" in name.__doc__ for name in used)
    for name in (
        "structmat.nn.linear",
        "structmat.nn.sites",
        "structmat.surgery.restructure",
        "structmat.training.load",
    ):
        assert name in with_examples()


# -- docstrings ------------------------------------------------------------------------------------------------------------


def documented(node: ast.ClassDef) -> Iterator[str]:
    """Methods with a docstring, and attributes followed by one."""
    for item, after in zip(node.body, [*node.body[1:], None]):
        if isinstance(item, ast.FunctionDef) and ast.get_docstring(item):
            yield item.name
        elif isinstance(item, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            yield item.target.id


def inherited(name: str, classes: dict[str, tuple[set[str], set[str]]], seen: frozenset[str] = frozenset()) -> set[str]:
    """What the bases of a class document, found by their names."""
    bases = classes.get(name, (set(), set()))[0] - seen
    return {m for b in bases for m in classes.get(b, (set(), set()))[1] | inherited(b, classes, seen | {name})}


def undocumented(trees: dict[str, ast.Module]) -> list[str]:
    """Public modules, classes, functions and methods without a docstring.

    Public is what has no leading underscore. Not asked for: functions within functions, overrides of what a base class of
    ours documents, and `setup` of Flax modules, which Flax documents.
    """
    classes: dict[str, tuple[set[str], set[str]]] = {}
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                bases, own = classes.setdefault(node.name, (set(), set()))
                bases |= {ast.unparse(base).split("[")[0].split(".")[-1] for base in node.bases}
                own |= set(documented(node))

    def within(body: list[ast.stmt], where: str, owner: str = "") -> Iterator[str]:
        excused = inherited(owner, classes) | {"setup"} if owner else set()
        for node in body:
            if isinstance(node, ast.If | ast.Try | ast.With):
                yield from within(node.body, where, owner)
            elif isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                if not ast.get_docstring(node) and node.name not in excused:
                    yield f"{where}:{node.lineno} {node.name}"
                if isinstance(node, ast.ClassDef):
                    yield from within(node.body, where, node.name)

    found = [f"{where}: the module" for where, tree in trees.items() if not ast.get_docstring(tree)]
    return found + [name for where, tree in trees.items() for name in within(tree.body, where)]


def test_everything_public_has_a_docstring():
    trees = {str(p.relative_to(ROOT)): ast.parse(p.read_text()) for p in sources()}
    assert len(trees) > 200
    assert not (found := undocumented(trees)), "\n".join(found)


def test_missing_docstrings_are_found():
    text = '''
class Base:
    """Documented."""
    last: str = ""
    """Documented."""
    def a(self):
        """Documented."""
class Child(Base):
    """Documented."""
    def a(self): ...
    def last(self): ...
    def b(self): ...
    def _c(self): ...
class _Hidden:
    def a(self): ...
def f():
    """Documented."""
    def inner(): ...
def g(): ...
'''
    assert undocumented({"x": ast.parse(text)}) == ["x: the module", "x:12 b", "x:19 g"]


# -- pages -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [*PAGES, *PAPERS], ids=lambda p: p.name)
def test_pages_name_what_there_is(page):
    """Commands, config files, paths in links, and structures with values in backticks."""
    text = page.read_text()
    filled = site_pages.fill(text)
    assert "<!-- generated" not in filled
    for module in set(re.findall(r"python -m ((?:experiments|tests)[\w.]*)", text)):
        assert importlib.util.find_spec(module), module
    for path in set(re.findall(r"\b(?:configs|structmat|pallas_kernels|experiments|tests)/[\w./]+\.py\b", text)):
        assert (ROOT / path).exists(), path
    for link in re.findall(r"\]\(((?:\.\.?/)*[\w./-]+\.\w+)(?:#[\w-]*)?\)", filled):
        assert (page.parent / link).exists(), link
    for written in re.findall(r"`([a-z_]+\([^`\n]*\))`", text):
        if (
            written.split("(")[0] in CONSTRUCTORS
            and "=" in written
            and "..." not in written
            and page.name != "structures.md"
        ):
            if not re.search(r"\b(a|b|family)\b[(,)]", written):
                parse(written)


def test_sections_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="did you mean 'fields'"):
        site_pages.fill("<!-- generated: feilds -->")
    with pytest.raises(ValueError, match="did you mean 'sltrain'"):
        site_pages.fill("<!-- generated: tables sltrian -->")


def test_every_field_of_a_config_has_a_meaning():
    """A field's meaning is the comment on the line that declares it, or an entry of MEANINGS."""
    used, without = set(), []
    for task, module in TASKS.items():
        for model in module.MODELS:
            rows = site_pages.described(task, model)
            without += [f"{task}/{model}: {name}" for name, _, meaning in rows if not meaning]
            used |= {name for name, _, meaning in rows if meaning == site_pages.MEANINGS.get(name)}
    assert not without, without
    assert used == set(site_pages.MEANINGS), set(site_pages.MEANINGS) - used
    meanings = {name: meaning for name, _, meaning in site_pages.described("images", "vit")}
    assert "cropped" not in meanings and meanings["model.patch"] == "side of a patch"
    assert "stage" not in meanings["model.width"]  # that is the ResNet's


def test_every_method_and_table_is_on_its_page():
    page = site_pages.fill((DOCS / "methods.md").read_text())
    assert all(f"`{method()}`" in page for method in METHODS.values())
    assert all(f"Table `{name}`" in page for name in site_pages.TABLES)


def test_every_page_is_in_the_navigation():
    assert {name for entry in SITE["nav"] for name in entry.values()} == {page.name for page in PAGES}


def test_nothing_is_fetched_from_elsewhere():
    assert SITE["theme"]["font"] is False and "extra_javascript" not in SITE
    css = (DOCS / "extra.css").read_text()
    assert "http" not in css and "@import" not in css


def test_every_public_module_has_a_reference_page():
    modules = site_pages.modules()
    assert {"structmat", "structmat.structures.monarch", "pallas_kernels.low_rank.api"} <= set(modules)
    assert all(importlib.util.find_spec(name) for name in list(modules)[::20])


@pytest.mark.long
def test_the_site_builds_strictly(tmp_path):
    """Without network: proxies that lead nowhere fail whatever asks."""
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    pytest.importorskip("material")
    nowhere = {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **nowhere})
    assert done.returncode == 0, done.stderr[-4000:]
    built = {p.relative_to(tmp_path / "site").as_posix() for p in (tmp_path / "site").rglob("*.html")}
    assert {"index.html", "structures.html", "reference/structmat.structures.monarch.html"} <= built
    home = (tmp_path / "site" / "index.html").read_text()
    assert not re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="(?:https?:)?//[^"]*"', home)
    assert "low_rank(rank)" in (tmp_path / "site" / "structures.html").read_text()


# -- papers of the repository ----------------------------------------------------------------------------------------------


def test_one_address():
    """colab/address.py has it; whatever else names a repository of this name agrees."""
    assert SITE["repo_url"] == REPOSITORY
    files = [*PAGES, *PAPERS, ROOT / "README.md", ROOT / "CITATION.cff", *(ROOT / ".github").rglob("*.*")]
    for file in files:
        for found in re.findall(r"https?://github\.com/[\w-]+/structmat\b", file.read_text()):
            assert found == REPOSITORY, (file, found)
        assert "badge" not in file.read_text().lower() or file.suffix == ".py", file


def test_citation_is_valid():
    """The required keys of the Citation File Format 1.2.0 and those we give."""
    cite = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(cite)
    assert cite["cff-version"] == "1.2.0" and cite["type"] == "software" and cite["license"] == "Apache-2.0"
    assert cite["authors"] == [{"name": "The structmat authors"}]
    assert cite["version"] == structmat.__version__ and cite["repository-code"] == REPOSITORY
    assert not set(cite) - {
        *("cff-version", "message", "title", "type", "authors", "version", "license", "repository-code", "keywords"),
    }


def test_changelog_has_this_version():
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert headings[:2] == ["Unreleased", structmat.__version__]


def test_hooks_are_local():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert [repo["repo"] for repo in hooks["repos"]] == ["local"]
    assert all(hook["language"] == "system" for repo in hooks["repos"] for hook in repo["hooks"])


@pytest.mark.parametrize("name", ["bug", "structure", "table"])
def test_issue_templates_are_forms(name):
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml").read_text())
    assert form["name"] and form["description"] and form["body"]
    ids = [part["id"] for part in form["body"]]
    assert len(set(ids)) == len(ids) and all(part["attributes"]["label"] for part in form["body"])
    assert {part["type"] for part in form["body"]} <= {"input", "textarea", "dropdown", "markdown", "checkboxes"}
