"""Weights in and out: Hugging Face's GPT-2 and LLaMA family, and safetensors files of our own.

    python -m experiments.convert --from=path/to/gpt2 --out=runs/gpt2
    python -m experiments.convert --from=path/to/gpt2 --out=runs/gpt2_small \\
        --rules="layers_.*/mlp/.* -> fit(low_rank(), params=0.3); layers_.*/attn/.* -> monarch(blocks=4)"
    python -m experiments.convert --to=huggingface --workdir=runs/gpt2_small --out=path/to/new
    python -m experiments.convert --to=safetensors --workdir=runs/gpt2_small --out=path/to/saved [--densify]

`--from` is a folder with config.json and safetensors, in shards or whole (model_type gpt2, llama or mistral), or one that
`--to=safetensors` wrote. Each matrix is read, projected onto the structure that the rules name for its site, and written,
one at a time; `--out` is then a run at step 0, for experiments.train, evaluate, sample and choose. How it is to be trained
is `--config`, configs/finetune.py by default. convert.json and convert.md beside it have the error of every site.

`--to=huggingface` writes a run as dense weights that transformers' `from_pretrained` reads.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from configs import finetune
from experiments import cli
from experiments.own_flags import OwnFlags
from structmat.analysis.pages import page_of
from structmat.exchange import (
    Incoming,
    Row,
    Source,
    bring_in,
    export_huggingface,
    run_config,
    save_run,
    source_at,
)
from structmat.exchange.outgoing import FLOATS
from structmat.structures.linalg import svd_method
from structmat.training.record import Record

flags = OwnFlags()
FROM = flags.DEFINE_string("from", None, "Folder with the weights to bring in.")
RULES = flags.DEFINE_string(
    "rules", "", "Structures: one for all linear weights, or 'regex -> structure; regex -> structure'. Default: theirs."
)
CONTEXT = flags.DEFINE_integer("context", None, "Tokens of context, where fewer than theirs will do.", lower_bound=1)
SVD = flags.DEFINE_enum("svd", "exact", ["exact", "randomized"], "How truncated SVDs are taken.")
TO = flags.DEFINE_enum("to", None, ["huggingface", "safetensors"], "What to write of --workdir.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run to write.")
DENSIFY = flags.DEFINE_bool("densify", False, "With --to=safetensors: every weight as its dense matrix.")
DTYPE = flags.DEFINE_enum("dtype", "float32", FLOATS, "With --to=huggingface: of the tensors.")
OUT = flags.DEFINE_string("out", None, "New or empty folder to write to.")

NAMES = ("convert.json", "convert.md")


def bring(source: Source, out: Path) -> tuple[Record, Incoming]:
    """Make the run, and write the report."""
    base = finetune.get_config() if cli.CONFIG.value is None else cli.CONFIG.value
    config = run_config(source, base, RULES.value, CONTEXT.value)
    print(f"from {source.description}")
    with svd_method(SVD.value):
        found = bring_in(source, config, out, _told())
    record = record_of(found, source, config.to_dict(), out.name)
    record.write(out / NAMES[0])
    write_report(record, found, out / NAMES[1])
    return record, found


def _told() -> Callable[[Row, int], None]:
    """Prints every weight that got another structure than dense."""
    number = 0

    def told(row: Row, of: int) -> None:
        nonlocal number
        number += 1
        if not row.structure.startswith("dense("):
            print(f"[{number}/{of}] {row.path}  {row.error:.4f}  {row.short}", flush=True)

    return told


def record_of(found: Incoming, source: Source, config: dict, name: str) -> Record:
    """The Record of a conversion."""
    rows = [{k: v for k, v in vars(row).items() if k != "squared"} for row in found.rows]
    return Record.create(
        name=name,
        kind="convert",
        config=config,
        structures={row.path: row.structure for row in found.rows},
        seed=config["seed"],
        data_hash=found.weights_sha256,
        seconds=found.seconds,
        metrics={
            "source": source.description,
            "rows": rows,
            "error": total_error(found.rows),
            "params": found.task.params,
            "dense_params": found.task.params + sum(r.dense_params - r.params for r in found.rows),
            "svd": SVD.value,
        },
    )


def total_error(rows: Iterable[Row]) -> float:
    """Relative Frobenius error of all matrices together."""
    rows = list(rows)
    off, size = sum(r.squared[0] for r in rows), sum(r.squared[1] for r in rows)
    return (off / size) ** 0.5 if size else off**0.5


def site_table(rows: Iterable[Row], style: box.Box) -> Table:
    """One row per site."""
    table = Table("weight", "shape", "structure", "params", "error", box=style)
    for row in rows:
        shape = "x".join(map(str, row.shape))
        table.add_row(row.path, shape, row.short, _kept(row.params, row.dense_params), f"{row.error:.4f}")
    return table


def group_table(rows: Iterable[Row], style: box.Box) -> Table:
    """One row for the weights of one name and structure in all layers."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((re.sub(r"_\d+/", "_*/", row.path), row.short), []).append(row)
    table = Table("weights", "number", "structure", "params", "mean error", "worst", box=style)
    for (name, short), own in groups.items():
        kept = _kept(sum(r.params for r in own), sum(r.dense_params for r in own))
        errors = [r.error for r in own]
        table.add_row(name, str(len(own)), short, kept, f"{sum(errors) / len(own):.4f}", f"{max(errors):.4f}")
    return table


def _kept(params: int, dense: int) -> str:
    return f"{params / dense:.1%}"


def write_report(record: Record, found: Incoming, path: Path) -> None:
    """The tables and conditions as Markdown."""
    device, versions = record.device, record.versions
    with path.open("w") as file:
        console = page_of(file, 220)
        line = functools.partial(console.print, soft_wrap=True, markup=False)
        line(
            f"# {record.name}\n\nFrom {record.metrics['source']}. {summary(record)} {device['cpu']}, {device['cores']} "
            f"cores, {device['platform']}, jax {versions['jax']}, {record.date}, {record.seconds:.0f} s, "
            f"`{record.command}`.\n\nErrors are |W - W'| / |W| in Frobenius norm.\n"
        )
        console.print(group_table(found.rows, box.MARKDOWN))
        line("\n## Every weight\n")
        console.print(site_table(found.rows, box.MARKDOWN))


def summary(record: Record) -> str:
    """Parameters and error of all in a sentence."""
    held = record.metrics
    kept = held["params"] / held["dense_params"]
    return (
        f"{held['params']:,} parameters, {kept:.1%} of the dense {held['dense_params']:,}; relative error of all matrices "
        f"together {held['error']:.4f}."
    )


def main() -> None:
    """Bring in or write out, as the flags say."""
    if (FROM.value is None) == (TO.value is None):
        cli.fail("give either --from=FOLDER, to bring weights in, or --to=huggingface|safetensors with --workdir=RUN")
    if not OUT.value:
        cli.fail("--out is needed: a new or empty folder")
    given = {name for name in ("rules", "context", "svd", "workdir", "densify", "dtype") if flags.FLAGS[name].present}
    given |= {"config"} if cli.CONFIG.value is not None else set()
    taken = {"rules", "context", "svd", "config"} if TO.value is None else {"workdir"}
    taken |= {"safetensors": {"densify"}, "huggingface": {"dtype"}}.get(TO.value or "", set())
    if wrong := sorted(given - taken):
        what = f"--to={TO.value}" if TO.value else "--from"
        hint = "; it writes dense weights anyway" if wrong[0] == "densify" and TO.value else ""
        cli.fail(f"--{wrong[0]} does not go with {what}{hint}")
    out = Path(OUT.value)
    if TO.value:
        if not WORKDIR.value:
            cli.fail("--workdir is needed: the run to write, such as --workdir=runs/gpt2")
        if TO.value == "huggingface":
            config = export_huggingface(WORKDIR.value, out, DTYPE.value)
            print(f"written: {out}, a {config['model_type']} of {DTYPE.value} for transformers' from_pretrained")
        else:
            save_run(WORKDIR.value, out, DENSIFY.value)
            print(f"written: {out / 'weights.safetensors'}, {out / 'structmat.json'}")
        return
    source = source_at(FROM.value)
    record, found = bring(source, out)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(group_table(found.rows, box.ROUNDED))
    print(summary(record))
    root, vocab = record.config["data"]["root"], record.config["model"]["vocab"]
    if not root and vocab != 256:
        print(
            "note: the data of this run are bytes, not tokens of these weights: before training, convert with "
            "--config=configs/finetune.py --config.data.root=TOKENS, a folder of experiments.tokenize"
        )
    print(f"written: {out}, a run at step 0; {out / NAMES[1]} has every weight")
    print(f"train:   python -m experiments.train --config=configs/stored.py:{out} --workdir={out}")


if __name__ == "__main__":
    cli.run(main, flags)
