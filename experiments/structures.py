"""The table of all structures: `python -m experiments.structures` prints it, `--write` puts it into the documentation.

Every row comes from the family's own `about`, so that a new family appears here by itself.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from absl import app
from rich import box
from rich.console import Console
from rich.table import Table

from experiments.own_flags import OwnFlags
from structmat.structures import FAMILIES

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "structures.md"
README = ROOT / "README.md"
BEGIN, END = "<!-- structures: begin -->", "<!-- structures: end -->"

flags = OwnFlags()
_WRITE = flags.DEFINE_bool("write", False, f"write {PAGE.relative_to(ROOT)} and the table in README.md")

INTRODUCTION = """# All structures

n = d_in, m = d_out; y = x W; FLOPs are per row of x, 2 per multiply-add. Every structure multiplies, transposes, takes
rows, materialises, projects from a dense matrix, and counts its cost; the contract tests run over all of them.
`nearest` is what `structmat.project` guarantees in Frobenius norm; where grams are named the weighted problem is solved
too. `kernel` is the operation of `pallas_kernels`, "-" where the product is left to XLA.

Combined with `a + b`, `a @ b` (or `product(a, b, inner=64)`), `a * b` (elementwise), `frozen(a)`, `transpose(a)`,
`scaled(a, s)`, `masked(a, pattern)`, `weight_norm(a)`, `dora(a)`, `fake_quantized(a, bits)`, `rebuilt(a)`, `fit(a, params=0.3)`. A sum is
projected by alternating minimisation: monotone, no worse than where it starts, not a proven optimum.
`bottleneck(a, b, inner=64)` and `lost(rank=64, density=0.01)` are nonlinear: they stand where a structure does, and refuse
to be materialised, transposed or projected. `sst(rank=16)` is any matrix as its singular triplets, for the method `sst`.

Written by `python -m experiments.structures --write` from what the families say of themselves.

"""


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


FULL = {
    "W": "formula",
    "parameters": "params",
    "FLOPs": "flops",
    "nearest": "nearest",
    "kernel": "kernel",
    "sharding": "sharding",
    "paper": "paper",
    "when": "when",
}
SHORT = {"W": "formula", "parameters": "params", "nearest from dense": "nearest", "when": "when"}


def page() -> str:
    """The text of docs/structures.md."""
    return INTRODUCTION + markdown(FULL) + "\n"


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
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page())
    README.write_text(readme(README.read_text()))
    print(f"written: {PAGE.relative_to(ROOT)}, {README.name}")


if __name__ == "__main__":
    flags.run(main)
