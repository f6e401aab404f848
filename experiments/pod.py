"""Does a config run on a pod? Compile its real training step for a TPU topology, with no TPU at hand.

    python -m experiments.pod --config=configs/llama.py:7b --config.structure="..." --topology=v5p:8x8x8 [--slices=2]

Prints memory of one chip against its HBM, FLOPs, collectives by kind and mesh axis, the Pallas kernels in the program,
the time to compile, and bounds of the model-FLOPs utilisation. Ends with code 1 where the step does not fit, and says
what to change. Needs libtpu: pip install 'structmat[tpu]'.
"""

from __future__ import annotations

import json
import sys

import jax
from rich.console import Console
from rich.table import Table

from experiments import cli
from experiments.own_flags import OwnFlags
from experiments.pod_step import Account, Pod, account, advice, lower
from structmat.parallel.aot import EXAMPLES
from structmat.training.record import Record

flags = OwnFlags()
TOPOLOGY = flags.DEFINE_string("topology", None, f"TPU topology to compile for, such as {EXAMPLES}")
SLICES = flags.DEFINE_integer(
    "slices", 1, "slices of that topology; mesh axis replica crosses them, or data", lower_bound=1
)
OUT = flags.DEFINE_string("out", "", "Record JSON to write, if any")


def main() -> None:
    """Compile, print, and end with code 1 where the step does not fit."""
    jax.config.update("jax_platforms", "cpu")  # the topology is compiled for, not run on
    if cli.CONFIG.value is None:
        cli.fail("--config is needed, such as --config=configs/llama.py:7b")
    if not TOPOLOGY.value:
        cli.fail(f"--topology is needed, such as {EXAMPLES}")
    config, console = cli.CONFIG.value, Console()
    step = lower(config, Pod(TOPOLOGY.value, SLICES.value))
    found = account(step)
    show(found, console)
    if OUT.value:
        structures = {path: site.bound.structure for path, site in step.task.table.items()}
        record(found, config.to_dict(), structures).write(OUT.value)
        console.print(f"written: {OUT.value}")
    if not found.fits:
        print(
            "error: the step does not fit; " + "; ".join(advice(found, config.to_dict(), SLICES.value)), file=sys.stderr
        )
        raise SystemExit(1)


def record(found: Account, config: dict, structures: dict) -> Record:
    """The Record of an account."""
    return Record.create(
        name=f"pod {found.pod}",
        kind="pod",
        config=json.loads(json.dumps(config)),
        structures=structures,
        seed=config["seed"],
        data_hash="",
        seconds=found.lower_seconds + found.compile_seconds,
        metrics=found.row(),
    )


def show(found: Account, console: Console) -> None:
    """Print an account."""
    shape = ", ".join(f"{name}={size}" for name, size in found.mesh.items())
    table = Table(title=f"{found.pod}: {found.devices} devices ({shape})", show_header=False)
    row = lambda name, text: table.add_row(name, text)
    row("parameters", f"{found.params:,}; dense {found.dense_params:,} ({found.dense_params / found.params:.2f}x)")
    row("fits", f"{'yes' if found.fits else 'NO'}: {gib(found.peak)} of {gib(found.hbm)} HBM per chip")
    row(
        "memory per chip",
        f"arguments {gib(found.arguments)} (state {gib(found.state)}), temporaries {gib(found.temporaries)}",
    )
    model, done = found.model_flops, found.flops
    row("FLOPs per step", f"{model:.3g} by the structures' algorithms, {done:.3g} executed, over all devices")
    if found.fits:
        for s in found.sent:
            over = ("+".join(s.axes) or "none") + " between slices" * s.dcn
            row(f"{s.kind} over {over}", f"{s.count} per step, {gib(s.bytes)} of results, {gib(s.wire)} sent per chip")
        if not found.sent:
            row("collectives", "none")
        names = ", ".join(f"{name} x {n}" for name, n in sorted(found.kernels.items()))
        row("Pallas kernels", names or "none")
        row(
            "sharding",
            "as planned" if not found.off_plan else f"{len(found.off_plan)} leaves off the plan: {found.off_plan[0]}",
        )
        times = f"arithmetic {ms(found.compute)}, arguments through HBM {ms(found.memory)}, links {ms(found.network)}"
        row("least time per step", times)
        if found.mfu:
            best, worst = found.mfu
            row("MFU bound", f"{best:.0%} with all communication hidden, {worst:.0%} with none")
    row(
        "compiled in",
        f"{found.lower_seconds:.0f} s to trace, {found.compile_seconds:.0f} s to compile; program {found.program}",
    )
    console.print(table)
    console.print("Memory and collectives are the compiler's; times are bounds from peak figures, not measurements.")


def gib(size: float) -> str:
    """Bytes as GiB or MiB."""
    return f"{size / 2**30:.2f} GiB" if abs(size) >= 2**29 else f"{size / 2**20:.1f} MiB"


def ms(seconds: float) -> str:
    """Seconds as ms."""
    return f"{seconds * 1e3:.3g} ms"


if __name__ == "__main__":
    cli.run(main, flags)
