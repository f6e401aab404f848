"""A table on the screen or as Markdown: ours beside the paper's, costs, and what became of its claims."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from rich import box
from rich.table import Table as Grid

from experiments.tables.bases import Base
from experiments.tables.judge import Verdict, interval
from experiments.tables.plan import CLOSE
from experiments.tables.results import Cost, Line, Results, cost_of
from experiments.tables.schema import DENSE, Claim


def grid(results: Results, style: box.Box) -> Grid:
    """One line per arm; the paper's figures in columns of their own."""
    plan = results.plan
    base, columns = plan.base, plan.table.columns
    heads = [base.metric.replace("_", " "), *(name.replace("_", " ") for name in base.others)]
    made = Grid("", *heads, "seeds", "rate", "params", "Mbit", "FLOPs", "memory", "step", "path",
                *[f"paper: {heading}" for heading in columns.values()], box=style)  # fmt: skip
    for column in made.columns[1:]:
        column.justify = "right"
    dense = cost_of(results.line(DENSE).row.config)
    for line in results.lines:
        made.add_row(
            line.row.arm.name,
            *[figure(line.figures(name)) for name in (base.metric, *base.others)],
            _seeds(line),
            *(["-"] * 7 if line.row.arm.reference else _costs(line, results, dense)),
            *[f"{line.row.arm.paper[c]:g}" if c in line.row.arm.paper else "" for c in columns],
        )
    return made


def _costs(line: Line, results: Results, dense: Cost) -> list[str]:
    """Rate, parameters, bits, FLOPs, memory, time of a step and path."""
    cost, memory = cost_of(line.row.config), line.memory
    time = results.times and results.times.over_dense.get(line.row.arm.name)
    return [
        _rate(line),
        f"{cost.params:,} ({cost.params / dense.params:.2f}x)",
        f"{cost.bits / 1e6:.2f}",
        f"{cost.flops:,}",
        f"{memory / 2**20:.1f} MiB" if memory else "-",
        f"{time:.2f}x" if time else "-",
        cost.path,
    ]


def figure(values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds."""
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4f}{spread}"


def _seeds(line: Line) -> str:
    ended = sum(r is not None and not r.failed for r in line.results)
    return str(ended) + (f", {line.diverged} diverged" if line.diverged else "")


def _rate(line: Line) -> str:
    """The multiple of the base rate; ! where it is the first or last that was tried."""
    return "-" if line.row.rate is None else f"x{line.row.rate:g}{'!' * line.row.edge}"


def sentence(claim: Claim, verdict: Verdict | None) -> str:
    """A claim and its verdict in words."""
    where = f"{claim.text} ({claim.source})"
    if verdict is None:
        return f"{where}: **not decided**, no runs yet."
    bar = "" if claim.within is None else f", to be above {-claim.within:g}"
    if verdict.seeds < 2:
        return f"{where}: **not decided**; gain {verdict.gain:+.4f} on one seed{bar}."
    return (
        f"{where}: **{verdict.status}**; gain {verdict.gain:+.4f}, 95% interval {verdict.low:+.4f} to {verdict.high:+.4f}"
        f"{bar}, {verdict.seeds} seeds."
    )


def conditions(results: Results) -> str:
    """Where and how the figures were made."""
    records = [r.record for line in results.lines for r in line.results if r]
    if not records:
        return "No runs yet."
    dates = sorted(r.date for r in records)
    machines = sorted({_machine(r.device) for r in records})
    versions = sorted({r.versions["jax"] for r in records})
    slowest = max(r.seconds for r in records)
    data = sorted({r.metrics["data"] for r in records if "data" in r.metrics})
    plan = results.plan
    row = plan.rows[0]
    return (
        f"Scale {plan.scale}: {row.config.steps} steps of {row.config.batch} examples; {'; '.join(data)}. Mean ± standard "
        f"deviation over seeds 0 to {plan.base.seeds - 1}. Rate: {tuning(plan.base, row.config.optim.lr)}. "
        f"Step: its time over dense's, {_timed(results)}. Parameters, "
        "bits and FLOPs: of the model that is evaluated. Memory: of the compiled step, state and temporaries. "
        f"{'; '.join(machines)}, jax {', '.join(versions)}, {dates[0][:10]} to {dates[-1][:10]}, {len(records)} runs, the "
        f"longest {slowest:.0f} s. `python -m experiments.tables run {plan.table.name} --scale={plan.scale}`"
    )


def tuning(base: Base, lr: float) -> str:
    """How the rate of an arm whose base rate is `lr` was chosen."""
    if len(base.rates) == 1:
        return f"{lr * base.rates[0]:g}"
    beyond = f", and up to {base.further} beyond as long as the best is at an end," if base.further else ""
    length = "all of the steps" if base.part == 1 else f"1/{base.part} of the steps"
    return (
        f"multiple of {lr:g} best of {', '.join(f'{r:g}' for r in base.rates)}{beyond} in a run of {length} with "
        f"another seed, per family, and of those within {CLOSE:.1%} of the best the lowest; ! is at the end of what was tried"
    )


def _timed(results: Results) -> str:
    plan, times = results.plan, results.times
    if times is None:
        return "not timed yet"
    record = times.record
    return (
        f"median of {record.metrics['repeats']} pairs of steps, all arms in turn, so without what a method does on fewer than "
        f"half of them ({_machine(record.device)}, jax {record.versions['jax']}, {record.date[:10]}, `python -m experiments.tables time {plan.table.name} --scale={plan.scale}`)"
    )


def _machine(device: dict) -> str:
    kind = device.get("kind", device.get("device_kind", ""))
    return f"{device['cpu']}, {device['cores']} cores" + (f", {kind}" if kind and kind != "cpu" else "")


def verdicts(results: Results) -> list[tuple[Claim, Verdict | None]]:
    """Every claim with its verdict."""
    return [(claim, results.verdict(claim)) for claim in results.plan.table.claims]


def caption(results: Results) -> list[str]:
    """Paragraphs under the table: claims, notes, conditions."""
    table = results.plan.table
    said = [f"- {sentence(claim, verdict)}" for claim, verdict in verdicts(results)]
    notes = [f"- {line.row.arm.name}: {line.row.arm.note}" for line in results.lines if line.row.arm.note]
    gap = interval(results.line(DENSE).figures(results.plan.base.metric))
    said += notes
    if gap[1] < float("inf"):
        said.append(f"- 95% interval of dense alone: {gap[0]:.4f} to {gap[1]:.4f}.")
    return [*said, *table.remarks.get(results.plan.scale, ()), conditions(results)]
