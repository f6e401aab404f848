"""What papers' models have in parameters and memory, counted without running them: `python -m experiments.accounting`.

Every model at its full size with the structure its paper gives it: parameters, bytes of training, FLOPs of a forward pass,
beside the paper's own figures. Writes a Record to `--out` and a table beside it.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import app
from ml_collections import ConfigDict
from rich import box
from rich.console import Console
from rich.table import Table

from experiments.own_flags import OwnFlags
from structmat.analysis.pages import page_of
from structmat.training.config import validate
from structmat.training.record import Record

flags = OwnFlags()
_OUT = flags.DEFINE_string("out", "results/tables/accounting.json", "Record JSON to write, with the .md beside it")

MONARCH = "monarch(blocks=4, order='blocked')"
CHANNELS = f"layers_.*/mlp/.* -> {MONARCH}"
DAO = "Dao et al. 2022"
HAN = "Han et al. 2024"


@dataclasses.dataclass(frozen=True)
class Entry:
    """A model of a paper.

    Attributes:
      config: a file of `configs` with its size. structure: of all linear sites.
      source: paper and place of its figures. params: the paper's, in millions; None where it gives none. memory: GB of
        weights and optimiser in bf16, where the paper has it.
    """

    config: str
    structure: str
    source: str
    params: float | None = None
    memory: float | None = None


def _sltrain() -> list[Entry]:
    """Ranks and densities of the scripts in the paper's repository."""
    found = []
    for size, rank, density in (
        ("60m", 128, 0.03),
        ("130m", 256, 0.03),
        ("350m", 256, 0.03),
        ("1b", 512, 0.03),
        ("7b", 1024, 0.05),
    ):
        read = {"1b": (8.0, 3.7, 4.1)}.get(size, (None, None, None))
        source = f"{HAN}, Figure 1, read off" if read[0] else f"{HAN}, scripts"
        texts = ("dense()", f"low_rank(rank={rank})", f"low_rank(rank={rank}) + random_sparse(density={density})")
        found += [Entry(f"configs/llama.py:{size}", text, source, memory=memory) for text, memory in zip(texts, read)]
    return found


ENTRIES = (
    Entry("configs/gpt2.py:small", "dense()", f"{DAO}, Table 2", 124),
    Entry("configs/gpt2.py:small", MONARCH, f"{DAO}, Table 2", 72),
    Entry("configs/gpt2.py:medium", "dense()", f"{DAO}, Table 2", 355),
    Entry("configs/gpt2.py:medium", MONARCH, f"{DAO}, Table 2", 165),
    Entry("configs/mixer.py:s", "dense()", f"{DAO}, Table 1", 18.5),
    Entry("configs/mixer.py:s", CHANNELS, f"{DAO}, Table 1", 7.0),
    Entry("configs/mixer.py:b", "dense()", f"{DAO}, Table 1", 59.9),
    Entry("configs/mixer.py:b", CHANNELS, f"{DAO}, Table 1", 20.9),
    Entry("configs/vit.py:s768", "dense()", f"{DAO}, Table 1", 48.8),
    Entry("configs/vit.py:s768", MONARCH, f"{DAO}, Table 1", 19.6),
    Entry("configs/vit.py:b", "dense()", f"{DAO}, Table 1", 86.6),
    Entry("configs/vit.py:b", MONARCH, f"{DAO}, Table 1", 33.0),
    *_sltrain(),
)


def counted(entry: Entry) -> dict[str, Any]:
    """A row: parameters, FLOPs per unit, and bytes of weights, moments and indices in training."""
    module, size = entry.config.split(".py:")
    config: ConfigDict = importlib.import_module(module.replace("/", ".")).get_config(size)
    config.structure = entry.structure
    config.mesh.update(replica=1, data=1, fsdp=1, tensor=1)
    task = validate(config, devices=1)
    shapes = jax.tree.leaves(jax.eval_shape(task.model.init, jax.random.key(0), *task.example))
    indices = sum(leaf.size for leaf in shapes if jnp.issubdtype(leaf.dtype, jnp.integer))
    return {
        "config": entry.config,
        "structure": entry.structure,
        "source": entry.source,
        "paper_params": entry.params,
        "paper_memory": entry.memory,
        "params": task.params,
        "flops": task.flops(),
        "unit": task.unit,
        "indices": indices,
        "bf16_bytes": 6 * task.params + 4 * indices,
        "moments_8bit_bytes": 4 * task.params + 4 * indices,
        "long_index_bytes": 6 * task.params + 8 * indices,
    }


def table(rows: list[dict[str, Any]], style: box.Box) -> Table:
    """One line per model, each beside its dense form."""
    made = Table("model", "structure", "params M", "of dense", "paper: params M", "FLOPs per unit", "of dense",
                 "bf16 GB", "8-bit moments GB", "8-byte indices GB", "paper: bf16 GB", "paper", box=style)  # fmt: skip
    for column in made.columns[2:-1]:
        column.justify = "right"
    dense = {r["config"]: r for r in rows if r["structure"] == "dense()"}
    shown = lambda value: "" if value is None else f"{value:g}"
    for r in rows:
        own = dense[r["config"]]
        made.add_row(
            r["config"].removeprefix("configs/").replace(".py:", " "),
            r["structure"],
            f"{r['params'] / 1e6:.1f}",
            f"{r['params'] / own['params']:.3f}",
            shown(r["paper_params"]),
            f"{r['flops'] / 1e6:,.1f} M",
            f"{r['flops'] / own['flops']:.3f}",
            *[f"{r[name] / 1e9:.2f}" for name in ("bf16_bytes", "moments_8bit_bytes", "long_index_bytes")],
            shown(r["paper_memory"]),
            r["source"],
        )
    return made


def report(rows: list[dict[str, Any]], out: Path, record: Record) -> None:
    """Print the table, and write it as Markdown beside the Record."""
    about = (
        f"Counted, not run: jax {record.versions['jax']}, {record.date}, `{record.command}`. Parameters of the whole model; "
        "the structure is that of every linear layer, or of those named; embeddings and heads stay dense. FLOPs: forward, per token or image, "
        "2 per multiply-add, by the structure's algorithm. GB: 10^9 bytes of weights, two moments and indices (none of "
        "gradients or activations): all in bf16 with 4-byte indices; moments in 8 bits; bf16 with 8-byte indices as the "
        "code of SLTrain keeps them. Figures read off a picture are good to about 0.1 GB."
    )
    Console(width=None if sys.stdout.isatty() else 230).print(table(rows, box.ROUNDED))
    with out.with_suffix(".md").open("w") as file:
        page = page_of(file, 300)
        page.print(f"# Models of papers, counted\n\n{about}\n", soft_wrap=True, markup=False)
        page.print(table(rows, box.MARKDOWN))


def main(argv: list[str]) -> None:
    """Count, write, print."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; options start with --")
    out, began = Path(_OUT.value), time.perf_counter()
    rows = [counted(entry) for entry in ENTRIES]
    record = Record.create(
        name="accounting",
        kind="tables",
        config={},
        structures={f"{e.config}, {e.structure}": e.structure for e in ENTRIES},
        seed=0,
        data_hash="",
        seconds=time.perf_counter() - began,
        metrics={"rows": rows},
    )
    record.write(out)
    report(rows, out, record)
    print(f"written: {out}, {out.with_suffix('.md')}")


if __name__ == "__main__":
    flags.run(main)
