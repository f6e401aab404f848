"""The table of all structures: `python -m experiments.structures` prints it, `--write` puts it into the documentation.

Every row and every section comes from the family's own `about`, so that a new family appears here by itself, with its picture.
"""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

from absl import app
from rich import box
from rich.console import Console
from rich.table import Table

from experiments.own_flags import OwnFlags
from experiments.structure_pictures import SIZE, draw, gallery
from structmat.structures import CONSTRUCTORS, FAMILIES, Sum

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "structures.md"
PICTURES = PAGE.parent / "images" / "structures"
README = ROOT / "README.md"
BEGIN, END = "<!-- structures: begin -->", "<!-- structures: end -->"

flags = OwnFlags()
_WRITE = flags.DEFINE_bool("write", False, f"write {PAGE.relative_to(ROOT)} and the table in README.md")

INTRODUCTION = f"""# All structures

n = d_in, m = d_out; y = x W; FLOPs are per row of x, 2 per multiply-add. Every structure multiplies, transposes, takes
rows, materialises, projects from a dense matrix, and counts its cost; the contract tests run over all of them.
`nearest` is what `structmat.project` guarantees in Frobenius norm; where grams are named the weighted problem is solved
too. `kernel` is the operation of `pallas_kernels`, "-" where the product is left to XLA.

A sum is projected by alternating minimisation: monotone, no worse than where it starts, not a proven optimum. What is
not a matrix, at the end of this page, stands where a structure does, and refuses to be materialised, transposed or
projected.

Pictures show a small member as it is drawn at initialisation: at the left its {SIZE} x {SIZE} entries, red above zero, white
at it and blue below, at the right the arrays it stores; axes beyond two are tiles, integers and masks are grey.

Written by `python -m experiments.structures --write` from what the families say of themselves.

"""

SMALL = {
    "low_rank": "low_rank(rank=4)",
    "spectral": "spectral(rank=4)",
    "block_sparse": "block_sparse(block=4, density=0.25)",
    "quantized": "quantized(bits=3, group=8)",
}
"""Families whose own example does not fit the pictures' size, or shows little there."""

COMBINED: dict[str, tuple[str, str]] = {
    "a + b": ("A + B", "low_rank(rank=2) + random_sparse(density=0.125)"),
    "product": ("A B", "block_diagonal(blocks=4) @ hadamard()"),
    "elementwise": ("W[i, j] = A[i, j] B[i, j]", "low_rank(rank=2) * toeplitz()"),
    "frozen": ("A, no leaf of which trains", "frozen(dense()) + low_rank(rank=4)"),
    "transpose": ("Aᵀ", "transpose(channel_sparse(density=0.125))"),
    "scaled": ("s A", "scaled(low_rank(rank=4), s=0.25)"),
    "masked": ("M ∘ A, M of zeros and ones", "masked(dense(), n_m_sparse(2, 4), rule='sr_ste')"),
    "unstructured": ("M ∘ A, M with round(d n m) ones", "masked(dense(), unstructured(density=0.1))"),
    "weight_norm": ("every leaf M as γ M / max(1, RMS(M) / σ)", "weight_norm(monarch(blocks=4))"),
    "dora": ("mⱼ V[:, j] / |V[:, j]|", "dora(low_rank(rank=4))"),
    "fake_quantized": ("A of rounded leaves", "fake_quantized(low_rank(rank=4), bits=3, group=8)"),
    "rebuilt": ("A, as one GEMM", "rebuilt(low_rank(rank=2) + random_sparse(density=0.125))"),
    "fit": ("the largest A within a share of dense", "fit(monarch(), params=0.5)"),
    "bottleneck": ("y = φ(x A) B", "bottleneck(dense(), dense(), inner=8)"),
    "parallel": ("y = Σᵢ φ(x Aᵢ)", "parallel(block_diagonal(blocks=8), count=4)"),
    "lost": ("y = γ φ(x A) B + (1 − γ) x[index] V", "lost(rank=4, density=0.125)"),
    "btt_moe": ("y = Σₑ gₑ(x) (x Rₑ) Lₑ over the experts that act", "btt_moe(experts=4)"),
    "ordered": ("A[:, :w] B[:w], the first w components", "ordered(rank=8)"),
    "sst": ("U diag(s) Vᵀ, s and a few triplets train", "sst(rank=4)"),
}
"""What has no row of its own: formula, and the example of its picture."""


def signature(name: str) -> str:
    """`low_rank(rank)`: the call as the first words of the family's docstring give it."""
    found = re.match(r"`([^`]+)`", FAMILIES[name].__doc__ or "")
    if found is None:
        raise ValueError(f"the docstring of {name} must start with its call in backticks")
    return found[1]


def rows(columns: list[str]) -> list[list[str]]:
    """One list of cells per family, the call first."""
    about = {name: family.about for name, family in FAMILIES.items()}
    return [[f"`{signature(name)}`", *(getattr(a, c) for c in columns)] for name, a in about.items()]


def markdown(columns: dict[str, str]) -> str:
    """The table as Markdown; `columns` maps headings to attributes of `About`."""
    cell = lambda text: text.replace("|", "\\|")
    lines = [["structure", *columns], ["---"] * (len(columns) + 1), *rows(list(columns.values()))]
    return "\n".join("| " + " | ".join(map(cell, line)) + " |" for line in lines)


DETAILS = {
    "parameters": "params",
    "FLOPs": "flops",
    "nearest": "nearest",
    "sharding": "sharding",
    "kernel": "kernel",
    "paper": "paper",
    "when": "when",
}
SHORT = {"W": "formula", "parameters": "params", "nearest from dense": "nearest", "when": "when"}


def pictured() -> dict[str, str]:
    """Name -> the text whose picture is `docs/images/structures/<name>.png`."""
    families = {name: SMALL.get(name, family.about.example) for name, family in FAMILIES.items()}
    return families | {_file(name): text for name, (_, text) in COMBINED.items()}


def _file(name: str) -> str:
    return "sum" if name == "a + b" else name


def _section(heading: str, file: str, formula: str, lines: list[str]) -> str:
    picture = f"![{formula}](images/{PICTURES.name}/{file}.png)"
    return "\n".join(
        [f"## {heading}\n", f"**{formula}**\n", f"{picture}\n", f"Drawn: `{pictured()[file]}`\n", *lines, ""]
    )


def _family(name: str) -> str:
    about = FAMILIES[name].about
    cells = [f"- {title}: {getattr(about, field)}" for title, field in DETAILS.items() if getattr(about, field) != "-"]
    return _section(name, name, f"W = {about.formula}", [f"- call: `{signature(name)}`", *cells])


def _combined(name: str) -> str:
    formula = COMBINED[name][0]
    whole = formula if "=" in formula else f"W = {formula}"
    described = inspect.getdoc(Sum if name == "a + b" else CONSTRUCTORS[name]).split("\n\n")[0]
    return _section(name, _file(name), whole, [described])


def page() -> str:
    """The text of docs/structures.md."""
    sections = [*map(_family, FAMILIES), *map(_combined, COMBINED)]
    table = re.sub(r"^\| `(\w+)(\(.*?\))` ", r"| [`\1\2`](#\1) ", markdown(SHORT), flags=re.M)
    return INTRODUCTION + table + "\n\n" + "\n".join(sections)


def readme(text: str) -> str:
    """README with the table between its marks brought up to date."""
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    return f"{before}{BEGIN}\n{markdown(SHORT)}\n{END}{after}"


def main(argv: list[str]) -> None:
    """Print the table, or write both files."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; options start with --")
    if not _WRITE.value:
        table = Table("structure", *SHORT, box=box.ROUNDED)
        for row in rows(list(SHORT.values())):
            table.add_row(*row)
        Console(width=None if sys.stdout.isatty() else 160, markup=False).print(table)
        return
    for name, text in pictured().items():
        draw(text, PICTURES / f"{name}.png")
    gallery(PICTURES.parent / "gallery.png")
    PAGE.write_text(page())
    README.write_text(readme(README.read_text()))
    print(f"written: {PAGE.relative_to(ROOT)}, {README.name}, {PICTURES.relative_to(ROOT)}")


if __name__ == "__main__":
    flags.run(main)
