# %% [markdown]
# # 6. Reproduce a table
#
# A paper's table row by row: what is run, what has been measured and kept, whether the claims hold, and one row trained again
# in front of you.
#
# A table is a small file of data, such as `experiments/tables/maestro.py`: arms (changes of a base config), the paper's own
# figures, and claims. Every table has three baselines by itself: dense, a smaller dense model and low rank of equal size. Runs are
# known by their content, so a run of one table counts in all, and what was stopped goes on.

# %%
# setup

# %%
import io
import tempfile
import textwrap
from pathlib import Path

from IPython.display import Markdown, display
from matplotlib.figure import Figure
from rich import box
from rich.console import Console

from colab.live import quietly
from experiments.tables.plan import Run, changed, key_of, plan
from experiments.tables.registry import TABLES, table_of
from experiments.tables.results import cost_of, results_of
from experiments.tables.runner import execute
from experiments.tables.show import conditions, grid, sentence, verdicts
from experiments.tables.store import Store

# %% [markdown]
# ## The tables
#
# **Try:** another `NAME`: `rigl`, `householder` and `sparse_ift` train on the same digits. Tables on bytes read the standard
# library of the running Python, so under another Python they are other runs, and none of those kept counts.

# %%
NAME, SCALE = "maestro", "cpu"
print("\n".join(f"{name}: {table.title}" for name, table in TABLES.items() if SCALE in table.bases))
table = table_of(NAME)
store = Store(Path("results/tables"), SCALE)
made = plan(table, SCALE, store)
results = results_of(made, store)
done = sum(store.read(run.key) is not None for run in made.runs())
print(
    f"\n{NAME}: {len(made.rows)} arms, {done} of {len(made.runs())} runs are kept in results/tables\n{table.citation}"
)

# %% [markdown]
# ## What has been measured
#
# A row per arm: mean and standard deviation over seeds. `rate` is the multiple of the learning rate that was best in short runs
# of that family (an exclamation mark: the largest or smallest tried). Columns that start with `paper:` are the paper's, on
# its data and models. Look at the loss beside the parameters: it is the pair that counts.

# %%
page = io.StringIO()
Console(file=page, width=400, force_jupyter=False, color_system=None).print(grid(results, box.MARKDOWN))
display(Markdown("\n".join(line.strip() for line in page.getvalue().splitlines() if line.strip())))
print(textwrap.fill(conditions(results), 120))

# %% [markdown]
# ## Do the claims hold?
#
# A claim compares two arms seed by seed. The dot is the mean gain, the bar its interval of confidence, at `0.95`. It holds where the whole bar is right
# of the line, does not where it is left of it, and is not decided else. The axis is linear around 0 and logarithmic further out. Look at the bars that touch the line: more seeds would
# narrow them, and nothing else may decide.

# %%
colors = {"holds": "C2", "does not hold": "C3", "not decided": "0.5"}
judged = [(claim, verdict) for claim, verdict in verdicts(results) if verdict]
figure = Figure(figsize=(9, 0.42 * len(judged) + 0.9), layout="constrained")
panel = figure.subplots()
for place, (claim, verdict) in enumerate(judged):
    color, bar = colors[verdict.status], -(claim.within or 0.0)
    panel.plot([verdict.low - bar, verdict.high - bar], [place, place], "-", color=color, lw=2.5)
    panel.plot(verdict.gain - bar, place, "o", color=color)
panel.axvline(0, color="0.3", lw=1)
panel.set_yticks(range(len(judged)), [claim.text for claim, _ in judged], fontsize=8)
panel.invert_yaxis()
panel.set_xscale("symlog", linthresh=0.1)
panel.set_xlabel(f"gain in {made.base.metric.replace('_', ' ')}, beyond what the claim allows")
panel.grid(alpha=0.3, axis="x")
for status, color in colors.items():
    panel.plot([], [], "o-", color=color, label=status)
figure.legend(fontsize=8, ncols=3, loc="outside upper right")
display(figure)
for claim, verdict in judged:
    print(sentence(claim, verdict).replace("**", ""))

# %% [markdown]
# ## One row, for real
#
# The first seed of one arm is trained again, with nothing of it kept before, and set beside the figure in the repository.
# Look at the difference: on the machine it was made on it is zero, elsewhere float32 rounds in another order and training
# amplifies that.
#
# **Try:** another arm of the table above, or another seed `row.runs[1]`.

# %%
ARM = "low rank"
row = made.row(ARM)
kept = store.read(row.runs[0].key)
with tempfile.TemporaryDirectory() as folder:
    fresh = Store(Path(folder), SCALE)
    with quietly():
        execute(row.runs[0], fresh, Path(folder), seconds=150)
    again = fresh.read(row.runs[0].key)
for name in (made.base.metric, *made.base.others):
    here, there = again.heldout[name], kept.heldout[name]
    print(f"{row.runs[0].label}, {name}: {here:.6f} here, {there:.6f} kept, difference {here - there:.1e}")
record = kept.record
print(f"kept: {record.date[:10]}, {record.device['cpu']}, jax {record.versions['jax']}, {record.seconds:.1f} s")
print(f"here: {again.record.date[:10]}, {again.record.device['cpu']}, {again.record.seconds:.1f} s")

# %% [markdown]
# ## A row of your own
#
# An arm is a few changes of the base config. This one is Monarch, which the table does not have, with a third of the
# steps, so it is a first look and no row of the table yet. A file in `experiments/tables` and a line in its registry would make
# it one, with a learning rate of its own and seeds.
#
# **Try:** another structure, another rate, `"steps": 400` for all steps.

# %%
dense = made.row("dense")
own = changed(dense.runs[0].config, {"structure": "fit(monarch(order='blocked'), params=0.3)", "steps": 133}, "my arm")
with tempfile.TemporaryDirectory() as folder:
    fresh = Store(Path(folder), SCALE)
    with quietly():
        execute(Run("Monarch, a third of the steps", key_of(own), own), fresh, Path(folder), seconds=150)
    mine = fresh.read(key_of(own))
metric = made.base.metric
lines = [f"| arm | {metric} | parameters |", "|---|---|---|"]
for name, value, config in (
    ("Monarch, a third of the steps", mine.heldout[metric], own),
    ("dense, all steps, first seed", store.read(dense.runs[0].key).heldout[metric], dense.config),
):
    lines.append(f"| {name} | {value:.4f} | {cost_of(config).params:,} |")
display(Markdown("\n".join(lines)))

# %% [markdown]
# ## All of it
#
# ```bash
# python -m experiments.tables list                                  # every table, and what has been run of it
# python -m experiments.tables run maestro --scale=cpu --budget=30m  # train what is missing; run again to go on
# python -m experiments.tables run all --scale=gpu --sweep=commands  # one command per missing run, for a cluster
# python -m experiments.tables report                                # results/tables/report.md
# ```
