"""Clebsch-Gordan products by CP factors at work: a small potential of atoms is learnt, `python -m experiments.tdn_potential`.

Networks that differ in their products alone learn energies and forces of random clusters (`experiments.tdn_clusters`): weights
of each path's own, one weight for all paths, and CP factors of that at every rank of `--ranks`, on the seeds of `--seeds`. With
`--times`, trains nothing and times a training step instead, at several degrees: do it on an idle machine. Each writes a Record,
potential.json or potential_times.json, and potential.md from both. Lin et al. 2025, arXiv 2507.01131.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app
from rich import box
from rich.console import Console
from rich.table import Table

from experiments.own_flags import OwnFlags
from experiments.tables.judge import Verdict, interval, judge
from experiments.tdn_clusters import Clusters, clusters
from experiments.tdn_network import Network
from experiments.tensor_product import rotations
from structmat.analysis.pages import page_of
from structmat.analysis.timing import interleaved, median_ratio
from structmat.structures.clebsch_gordan import LARGEST, width
from structmat.structures.path_factors import PathFactors
from structmat.training.record import Record

flags = OwnFlags()
_RANKS = flags.DEFINE_multi_integer(
    "ranks", [14, 20, 28], "ranks of the CP factors that are trained with", lower_bound=1
)
_LMAX = flags.DEFINE_integer("lmax", 2, "highest degree of the networks trained", lower_bound=1, upper_bound=LARGEST)
_SEEDS = flags.DEFINE_integer("seeds", 3, "runs of each arm", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 600, "of training", lower_bound=1)
_CHANNELS = flags.DEFINE_integer("channels", 16, "of every degree", lower_bound=1)
_TRAIN = flags.DEFINE_integer("train", 300, "clusters to train on", lower_bound=1)
_TEST = flags.DEFINE_integer("test", 100, "clusters held out", lower_bound=1)
_TIMES = flags.DEFINE_boolean("times", False, "time a training step, and train nothing")
_DEGREES = flags.DEFINE_multi_integer("degrees", [1, 2, 3, 4], "highest degrees that are timed", lower_bound=1)
_SEPARATE = flags.DEFINE_integer("separate", 2, "highest degree at which weights per path are timed", lower_bound=0)
_REPEATS = flags.DEFINE_integer("repeats", 20, "timed steps of each function", lower_bound=2)
_OUT = flags.DEFINE_string("out", "results/tdn", "folder of the Records and the table")

BATCH, RATE, CLIP, ENERGY = 8, 5e-3, 1.0, 0.1
"""Clusters of a step, Adam's first learning rate (falling as a cosine), bound of the gradient's norm, weight of the energy."""
SLACK = 0.1
"""Accuracy counts as kept where the force error is at most this fraction above the other arm's."""
TURNS = 4
"""Random rotations of the test set."""
SEPARATE, SHARED = "weight per path", "one weight"

Variables = dict[str, Any]


def cp(rank: int) -> str:
    """The name of an arm."""
    return f"CP rank {rank}"


@dataclasses.dataclass(frozen=True)
class Scale:
    """What is divided by: root mean square of a force component, and the mean energy per atom that is taken off; of what
    is trained on."""

    force: float
    energy: float

    @classmethod
    def of(cls, data: Clusters) -> Scale:
        """Of the atoms of `data`."""
        atoms = float(data.here.sum())
        return cls(float(np.sqrt(np.sum(data.forces**2) / (3 * atoms))), float(data.energies.sum() / atoms))


def energies_and_forces(model: Network, variables: Variables, positions: Any, here: Any) -> tuple[jax.Array, jax.Array]:
    """Of every cluster, less the mean energy: (count,), (count, n, 3)."""
    one = jax.value_and_grad(lambda x, h: model.apply(variables, x, h))
    energies, gradients = jax.vmap(one)(positions, here)
    return energies, -gradients


def loss(model: Network, variables: Variables, batch: Sequence[jax.Array], scale: Scale) -> jax.Array:
    """Mean square error of force components over the data's own, and ENERGY times that of the energy per atom."""
    positions, here, energies, forces = batch
    found, own = energies_and_forces(model, variables, positions, here)
    atoms = here.sum(1)
    of_forces = jnp.sum((own - forces) ** 2) / (3 * atoms.sum() * scale.force**2)
    return of_forces + ENERGY * jnp.mean(((found + scale.energy * atoms - energies) / atoms) ** 2)


def optimiser(steps: int) -> optax.GradientTransformation:
    """Adam under a falling rate."""
    return optax.chain(optax.clip_by_global_norm(CLIP), optax.adam(optax.cosine_decay_schedule(RATE, steps)))


def make_step(model: Network, scale: Scale, tx: optax.GradientTransformation) -> Callable[..., Any]:
    """(params, frozen, optimiser state, batch) -> the params and state after it."""

    def step(params: Any, frozen: Any, state: Any, batch: Sequence[jax.Array]) -> tuple[Any, Any]:
        gradient = jax.grad(lambda p: loss(model, {"params": p, **frozen}, batch, scale))(params)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    return step


def split(variables: Variables) -> tuple[Any, Variables]:
    """(params, the other collections)."""
    return variables["params"], {name: held for name, held in variables.items() if name != "params"}


def make_training(model: Network, data: Clusters, steps: int) -> Callable[[jax.Array], Variables]:
    """seed -> variables after `steps` batches drawn with replacement; compiled once for all seeds."""
    arrays = [jnp.asarray(array) for array in data.arrays]
    tx = optimiser(steps)
    step = make_step(model, Scale.of(data), tx)

    @jax.jit
    def train(seed: jax.Array) -> Variables:
        start, order = jax.random.split(jax.random.key(seed))
        params, frozen = split(model.init(start, arrays[0][0], arrays[1][0]))

        def one(held: tuple[Any, Any], count: jax.Array) -> tuple[tuple[Any, Any], None]:
            rows = jax.random.randint(jax.random.fold_in(order, count), (BATCH,), 0, len(data.here))
            return step(held[0], frozen, held[1], [array[rows] for array in arrays]), None

        (params, _), _ = jax.lax.scan(one, (params, tx.init(params)), jnp.arange(steps))
        return {"params": params, **frozen}

    return train


def make_errors(
    model: Network, test: Clusters, scale: Scale, turns: np.ndarray
) -> Callable[[Variables], dict[str, float]]:
    """variables -> `force`: root mean square error over that of the forces; `turned`: the same on the test set turned by
    `turns` (n, 3, 3); `equivariance`: how far forces of turned clusters are from turned forces, over the forces; `energy`:
    mean absolute error per atom, in depths of the pair potential."""
    compiled = jax.jit(lambda variables, positions: energies_and_forces(model, variables, positions, test.here))
    turns = turns.astype(np.float32)

    def errors(variables: Variables) -> dict[str, float]:
        energies, forces = (np.asarray(a) for a in compiled(variables, test.positions))
        turned = np.stack([np.asarray(compiled(variables, test.positions @ turn.T)[1]) for turn in turns])
        turn_all = lambda forces: np.einsum("txy,cny->tcnx", turns, forces)
        relative = lambda off, whole: float(np.sqrt(np.mean(off**2) / np.mean(whole**2)))
        atoms = test.here.sum(1)
        return {
            "force": relative(forces - test.forces, test.forces),
            "turned": relative(turned - turn_all(test.forces), test.forces),
            "equivariance": relative(turned - turn_all(forces), forces),
            "energy": float(np.mean(np.abs(energies + scale.energy * atoms - test.energies) / atoms)),
        }

    return errors


def arms(lmax: int, channels: int, factors: Sequence[PathFactors]) -> dict[str, Network]:
    """Name -> network: a weight per path, one weight, CP factors of that."""
    own = dict(lmax=lmax, channels=channels)
    return {SEPARATE: Network(**own, shared=False), SHARED: Network(**own)} | {
        cp(f.rank): Network(**own, factors=f) for f in factors
    }


def measure(name: str, model: Network, train: Clusters, test: Clusters, seeds: int, steps: int) -> dict[str, Any]:
    """The row of an arm: its errors, a list over seeds each."""
    training = make_training(model, train, steps)
    errors = make_errors(model, test, Scale.of(train), rotations(jax.random.key(1), TURNS))
    start, found = time.perf_counter(), []
    for seed in range(seeds):
        variables = training(seed)
        found.append(errors(variables))
        print(name, "  ".join(f"{key} {value:.4g}" for key, value in found[-1].items()), flush=True)
    return {
        "arm": name,
        "fit_error": model.factors.error() if model.factors else 0.0,
        "rank": model.factors.rank if model.factors else None,
        "params": sum(leaf.size for leaf in jax.tree.leaves(variables["params"])),
        "seconds": time.perf_counter() - start,
        **{key: [row[key] for row in found] for key in found[0]},
    }


def measure_times(lmax: int, channels: int, repeats: int, separate: bool) -> list[dict[str, Any]]:
    """Rows of one degree: seconds of every timed training step, arms in turn; CP at ranks 7 L and 7 L^2, whose factors are
    random as time does not depend on them."""
    rng, d = np.random.default_rng(0), width(lmax)
    ranks = sorted({7 * lmax, 7 * lmax**2})
    factors = [PathFactors((lmax,) * 3, tuple(rng.normal(size=(3, d, rank)) / d)) for rank in ranks]
    models = arms(lmax, channels, factors)
    if not separate:
        del models[SEPARATE]
    data = clusters(0, BATCH)
    functions, arguments = [], []
    for model in models.values():
        tx = optimiser(100)
        params, frozen = split(model.init(jax.random.key(0), data.positions[0], data.here[0]))
        functions.append(jax.jit(make_step(model, Scale.of(data), tx)))
        arguments.append((params, frozen, tx.init(params), [jnp.asarray(array) for array in data.arrays]))
    times = interleaved(functions, arguments, repeats)
    return [
        {"lmax": lmax, "arm": name, "rank": model.factors.rank if model.factors else None, "seconds": own}
        for (name, model), own in zip(models.items(), times)
    ]


# -- claims --------------------------------------------------------------------------------------------------------------


def claims(runs: Sequence[dict[str, Any]]) -> list[tuple[str, Verdict]]:
    """What the paper leads one to expect of the errors, judged on the seeds: gains are in force error."""
    by_name = {row["arm"]: row for row in runs}
    shared, separate = by_name[SHARED], by_name[SEPARATE]
    products = sorted((row for row in runs if row["rank"]), key=lambda row: row["rank"])

    def kept(better: dict[str, Any], worse: dict[str, Any]) -> Verdict:
        return judge(better["force"], worse["force"], True, within=SLACK * statistics.fmean(worse["force"]))

    made = [
        (
            f"One weight for all paths has at most {SLACK:.0%} more force error than a weight per path.",
            kept(shared, separate),
        )
    ]
    for row in products:
        text = f"{row['arm']}, of fit error {row['fit_error']:.2g}, has at most {SLACK:.0%} more force error than {SHARED}."
        made.append((text, kept(row, shared)))
    if len(products) > 1:
        least, most = products[0], products[-1]
        text = f"{most['arm']} is nearer to equivariant after training than {least['arm']}."
        made.append((text, judge(most["equivariance"], least["equivariance"], True)))
    return made


def time_claims(rows: Sequence[dict[str, Any]]) -> list[tuple[str, Verdict]]:
    """CP against the exact product with one weight, step by step: gains are in seconds."""
    made = []
    for row in rows:
        if row["rank"]:
            (exact,) = (r for r in rows if r["lmax"] == row["lmax"] and r["arm"] == SHARED)
            text = f"L = {row['lmax']}: a training step with {row['arm']} takes less time than with {SHARED}."
            made.append((text, judge(row["seconds"], exact["seconds"], True)))
    return made


def sentence(text: str, verdict: Verdict, unit: str = "") -> str:
    """A claim with what is known of it."""
    shown = (
        f"gain {verdict.gain:.3g}{unit}, 95% interval {verdict.low:.3g} to {verdict.high:.3g}, {verdict.seeds} pairs"
    )
    return f"{text} **{verdict.status.capitalize()}**: {shown}."


# -- report --------------------------------------------------------------------------------------------------------------


def run_table(runs: Sequence[dict[str, Any]], style: box.Box) -> Table:
    """A line per arm: means over seeds with half the 95% interval."""
    made = Table("products", "fit error", "force error", "turned test set", "equivariance error", "energy error per atom",
                 "parameters", box=style)  # fmt: skip
    for column in made.columns[1:]:
        column.justify = "right"

    def shown(values: Sequence[float]) -> str:
        mean = statistics.fmean(values)
        return f"{mean:.2g}" if len(values) < 2 else f"{mean:.3g} ± {interval(values)[1] - mean:.1g}"

    for row in runs:
        errors = [shown(row[key]) for key in ("force", "turned", "equivariance", "energy")]
        made.add_row(row["arm"], f"{row['fit_error']:.2g}", *errors, f"{row['params']:,}")
    return made


def time_table(rows: Sequence[dict[str, Any]], style: box.Box) -> Table:
    """A line per degree and arm."""
    made = Table("L", "products", "ms per step", "time of one weight", box=style)
    for column in (made.columns[0], *made.columns[2:]):
        column.justify = "right"
    for row in rows:
        (exact,) = (r for r in rows if r["lmax"] == row["lmax"] and r["arm"] == SHARED)
        ms = 1e3 * statistics.median(row["seconds"])
        made.add_row(str(row["lmax"]), row["arm"], f"{ms:.1f}", f"{median_ratio(row['seconds'], exact['seconds']):.2f}")
    return made


def made_on(record: Record) -> str:
    """Hardware, software, date and command."""
    device = record.device
    where = f"{device['cpu']}, {device['cores']} cores, {device['platform']}, jax {record.versions['jax']}"
    return f"{where}, {record.date}, `{record.command}`."


def pages(folder: Path) -> list[tuple[str, Callable[[box.Box], Table], list[str]]]:
    """(text, table, claims) of every Record there is."""
    found: list[tuple[str, Callable[[box.Box], Table], list[str]]] = []
    if (folder / "potential.json").exists():
        record = Record.read(folder / "potential.json")
        config, runs = record.config, record.metrics["runs"]
        text = (
            f"{made_on(record)} {config['train']} clusters of 5 to 8 atoms to train on and {config['test']} held out, Morse pairs "
            f"and a three-body term; 2 layers of messages, degrees up to {config['lmax']}, {config['channels']} channels, "
            f"{config['steps']} steps of {BATCH} clusters, {config['seeds']} seeds; ± is half the 95% interval over them. Fit error: "
            "of the factors. Force error: root mean square over that of the forces, held out; on the same turned at random; and "
            "how far forces of turned clusters are from turned forces. Energies are in depths of the pair potential."
        )
        found.append((text, lambda style: run_table(runs, style), [sentence(*claim) for claim in claims(runs)]))
    if (folder / "potential_times.json").exists():
        times = Record.read(folder / "potential_times.json")
        rows = times.metrics["times"]
        text = (
            f"{made_on(times)} A training step of {BATCH} clusters, {times.config['channels']} channels, f32: medians of "
            f"{times.config['repeats']} steps, all arms of a degree in turn, and the median ratio to the exact product with one weight."
        )
        said = [sentence(*claim, " s") for claim in time_claims(rows)]
        found.append((text, lambda style: time_table(rows, style), said))
    return found


def report(folder: Path) -> None:
    """Print what there is, and write it to potential.md."""
    screen = Console(width=None if sys.stdout.isatty() else 160)
    with (folder / "potential.md").open("w") as file:
        page = page_of(file, 200)
        page.print("# A potential of atoms by tensor products\n")
        for text, table, said in pages(folder):
            screen.print(table(box.ROUNDED))
            print("\n".join(said))
            page.print(f"{text}\n", soft_wrap=True, markup=False)
            page.print(table(box.MARKDOWN))
            page.print("\n" + "\n".join(f"- {line}" for line in said) + "\n", soft_wrap=True, markup=False)
    print(f"written: {folder / 'potential.md'}")


def train_all() -> Record:
    """Every arm on every seed."""
    start, lmax = time.perf_counter(), _LMAX.value
    data = clusters(0, _TEST.value + _TRAIN.value)
    test, train = data[: _TEST.value], data[_TEST.value :]
    factors = [PathFactors.fit(lmax, lmax, lmax, rank) for rank in sorted(set(_RANKS.value))]
    models = arms(lmax, _CHANNELS.value, factors)
    runs = [measure(name, model, train, test, _SEEDS.value, _STEPS.value) for name, model in models.items()]
    names = ("lmax", "seeds", "steps", "channels", "train", "test")
    config = {name: flags.FLAGS[name].value for name in names} | {"ranks": [f.rank for f in factors]}
    return Record.create(
        name="tdn_potential",
        kind="bench",
        config=config,
        structures={cp(f.rank): f"cp(rank={f.rank})" for f in factors},
        seed=0,
        data_hash=data.digest,
        seconds=time.perf_counter() - start,
        metrics={"runs": runs},
    )


def time_all() -> Record:
    """A training step of every arm at every degree."""
    start, rows = time.perf_counter(), []
    for lmax in sorted(set(_DEGREES.value)):
        rows += measure_times(lmax, _CHANNELS.value, _REPEATS.value, lmax <= _SEPARATE.value)
        print(f"L = {lmax}: timed", flush=True)
    return Record.create(
        name="tdn_potential_times",
        kind="bench",
        config={name: flags.FLAGS[name].value for name in ("degrees", "separate", "channels", "repeats")},
        structures={f"L = {row['lmax']}, R = {row['rank']}": f"cp(rank={row['rank']})" for row in rows if row["rank"]},
        seed=0,
        data_hash="",
        seconds=time.perf_counter() - start,
        metrics={"times": rows},
    )


def main(argv: list[str]) -> None:
    """Train, or time; write, print."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; options start with --")
    if max(_DEGREES.value) > LARGEST:
        raise app.UsageError(f"--degrees: {max(_DEGREES.value)} is above {LARGEST}")
    record, name = (time_all(), "potential_times") if _TIMES.value else (train_all(), "potential")
    folder = Path(_OUT.value)
    record.write(folder / f"{name}.json")
    report(folder)


if __name__ == "__main__":
    flags.run(main)
