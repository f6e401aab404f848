"""What `mkdocs build` calls: pages filled in, results and reference added, links into the repository made good.

Nothing it makes is kept in the repository. Links are written as they work in the repository, `../results/demo/table.md`;
here they lead to the page of that file, or where the site has none to the repository's address.
"""

from __future__ import annotations

import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # mkdocs loads this file by its path, from wherever it is called

from colab.address import REPOSITORY  # noqa: E402
from experiments import site_pages  # noqa: E402

PAPERS = ("CHANGELOG.md", "CONTRIBUTING.md")
_LINK = re.compile(r"(!?\[(?:[^\[\]]|\[[^\]]*\])*\]\()([^)\s]+)(\))")


def results() -> list[Path]:
    """Pages and pictures of measured results, as committed."""
    found = [*(ROOT / "results").rglob("*.md"), *(ROOT / "results").rglob("*.png")]
    return sorted(path for path in found if "runs" not in path.relative_to(ROOT).parts)


def on_config(config: Any) -> Any:
    """Check the address and add what has no page of its own file to the navigation."""
    if config.repo_url != REPOSITORY:
        raise PluginError(f"mkdocs.yml: repo_url is {config.repo_url!r}; colab/address.py has {REPOSITORY!r}")
    config.nav += [{"Results": _named([path for path in results() if path.suffix == ".md"])}]
    config.nav += [{"Reference": _tree(list(site_pages.modules()))}]
    config.nav += [{"Contributing": "CONTRIBUTING.md"}, {"Changelog": "CHANGELOG.md"}]
    return config


def _named(pages: list[Path]) -> list[dict[str, str]]:
    """Pages under their headings; under their paths where there is none, or another has the same."""
    headings = [re.match(r"# (.+)", page.read_text()) for page in pages]
    titles = [found[1] if found else "" for found in headings]
    paths = [page.relative_to(ROOT).as_posix() for page in pages]
    return [{t if t and titles.count(t) == 1 else p.removeprefix("results/"): p} for t, p in zip(titles, paths)]


def _tree(names: list[str], prefix: str = "") -> list[Any]:
    """Nested navigation: a package holds its own page and its modules."""
    within = [name for name in names if name.startswith(prefix)]
    found: list[Any] = []
    for name in within:
        if "." in name[len(prefix) :]:
            continue
        short = name[len(prefix) :]
        below = _tree(names, f"{name}.")
        page = _page(name)
        found.append({short: [{f"{short} itself": page}, *below]} if below else {short: page})
    return found


def _page(module: str) -> str:
    return f"reference/{module}.md"


def on_files(files: Files, config: Any) -> Files:
    """Add results, papers of the repository and one page per module."""
    for path in [*results(), *(ROOT / name for name in PAPERS)]:
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    for name in site_pages.modules():
        files.append(File.generated(config, _page(name), content=site_pages.reference(name)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Fill in what the page asks for, then lead its links to where they are on the site."""
    source = page.file.src_uri
    if source.startswith("reference/"):
        return markdown
    try:
        filled = site_pages.fill(markdown)
    except ValueError as error:
        raise PluginError(f"{source}: {error}") from None
    return _LINK.sub(lambda found: found[1] + _target(found[2], source, files) + found[3], filled)


def _target(link: str, source: str, files: Files) -> str:
    """A link of a page, relative to its place in the repository, as one that works on the site."""
    path, hash_, anchor = link.partition("#")
    if not path or re.match(r"[a-z]+:", path):
        return link
    here = source if source in PAPERS or source.startswith("results/") else f"docs/{source}"
    wanted = posixpath.normpath(posixpath.join(posixpath.dirname(here), path))
    on_site = wanted.removeprefix("docs/")
    if files.get_file_from_path(on_site) is not None:
        return posixpath.relpath(on_site, posixpath.dirname(source) or ".") + hash_ + anchor
    if (ROOT / wanted).exists():
        kind = "tree" if (ROOT / wanted).is_dir() else "blob"
        return f"{REPOSITORY}/{kind}/main/{wanted}{hash_}{anchor}"
    raise PluginError(f"{source}: the link {link!r} leads to no file of the repository")
