"""Train one config; run again it resumes.

    python -m experiments.train --config=configs/demo_lm.py[:argument] --workdir=DIR [--config.field=value] [--dry_run]

The same command on every host of a TPU pod, or under `srun`, is one run; `experiments.launch` starts such runs.
`--dry_run` prints parameters, sharding, FLOPs and memory of the compiled step, of every stage where `config.switch` has
some, and touches no data and no workdir.
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from experiments import cli
from experiments.hosts import HostFlags
from experiments.own_flags import OwnFlags
from structmat.training.dry_run import dry_run
from structmat.training.loop import train
from structmat.training.workdir import RECORD

flags = OwnFlags()
hosts = HostFlags(flags)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, metrics, record. One run each.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print what would be trained, and stop.")


def main() -> None:
    """Train or describe the config of the flags."""
    if cli.CONFIG.value is None:
        cli.fail("--config is needed, such as --config=configs/demo_lm.py")
    if DRY_RUN.value:
        dry_run(cli.CONFIG.value, Console())
        return
    if not WORKDIR.value:
        cli.fail("--workdir is needed, such as --workdir=runs/first; or --dry_run")
    prints = hosts.join()
    record = train(cli.CONFIG.value, WORKDIR.value)
    if not prints:
        return
    metric = record.metrics["metric"]
    reference = ", ".join(f"{name} {value:.4f}" for name, value in record.metrics["reference"].items())
    print(f"{metric} {record.metrics['heldout'][metric]:.4f} held-out ({reference or 'no reference'})")
    print(f"record: {Path(WORKDIR.value) / RECORD}")


if __name__ == "__main__":
    cli.run(main, flags)
