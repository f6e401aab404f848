# %% [markdown]
# # 2. Train and compare
#
# Train one small language model with dense, Monarch and low-rank weights on the same text, watch the losses fall, and see
# what a learning rate tuned for dense weights does to structured ones.
#
# This is `make demo` in small. The text is the standard library of the running Python, byte by byte; the figure quoted is
# bits per byte on files that were held out.

# %%
# setup

# %%
import jax
import jax.numpy as jnp
from IPython.display import Markdown, display
from matplotlib.figure import Figure

from colab.live import Curves
from experiments.compare import make_arms
from structmat.nn import sites
from structmat.optim import leaf_multiplier, multipliers
from structmat.parallel import unbox
from structmat.structures import map_leaves, parse
from structmat.training.config import default

# %% [markdown]
# ## The config
#
# Everything a run needs is in one config; `structmat/training/config.py` says what each field means. `make_arms` checks all
# structures before the first one trains, and adds two baselines by itself: `dense`, and `dense small`, the widest dense
# model with no more parameters than the largest structured one. `fit(..., params=0.3)` is the largest member of a family
# within that fraction of the dense parameters.
#
# **Try:** another structure in the list, such as `"fit(kronecker(), params=0.3)"`; more steps; `config.seed = 1`.

# %%
config = default("lm")
config.steps = 80
config.eval.batches = 20
config.model.update(width=64, layers=1, heads=4, context=32)
config.mup.base_width = 64  # of the dense model that the learning rate was tuned for
structures = ["fit(monarch(order='blocked'), params=0.3)", "fit(low_rank(), params=0.3)"]

arms = make_arms(config, structures)
for arm in arms:
    print(f"{arm.label}: {arm.params:,} parameters")

# %% [markdown]
# ## Train
#
# `structmat.training.loop.train` calls `on_step` with the metrics of every step. `Curves`, in `colab/live.py`, redraws a plot
# with them: look at it while the cell runs. Losses are smoothed; all arms start alike, from noise.

# %%
curves = Curves(config.steps, "loss, nats per byte")
records = {arm.label: curves.train(arm.config, arm.label) for arm in arms}

# %% [markdown]
# ## Compare
#
# A row per arm. Look at FLOPs and bits together: fewer parameters at the same bits is what a structure is for. Runs this
# short measure how fast a model learns more than what it can hold, and one seed decides nothing; the demo trains longer, and
# `python -m experiments.tables` repeats over seeds. The byte bigram is what counting pairs of bytes reaches.


# %%
def table(records):
    """Figures of the records as a Markdown table."""
    lines = ["| weights | parameters | FLOPs a token | ms a step | held-out bits per byte |", "|---|---|---|---|---|"]
    for label, record in records.items():
        m = record.metrics
        bits = m["heldout"]["bits_per_byte"]
        step = 1e3 * m["step_seconds"]
        lines.append(f"| {label} | {m['params']:,} | {m['flops_per_unit']:,} | {step:.0f} | {bits:.3f} |")
    return Markdown("\n".join(lines))


display(table(records))
dense = records["dense"].metrics
print(dense["data"])
print(f"byte bigram: {dense['reference']['byte_bigram']:.3f} bits per byte")

# %% [markdown]
# ## The learning rate of a structured weight
#
# A factor of a structured weight has a fan-in of its own, and a step of Adam, which is about the same for every entry, moves the
# product by another amount than the same step moves a dense matrix. The library scales the rate of every leaf by the dense
# fan-in over its own (`config.mup`, on by default). The next cell takes one such step at several widths and measures how far it
# moves the output. Left: every leaf with its own rate, right: the dense rate for all. Look at the spread of the lines on the
# right: no single rate can be good for all of them.
#
# **Try:** other families, or a sum of two.

# %%
widths = [64, 128, 256]
families = ["dense()", "monarch(blocks=4)", "kronecker(terms=1)", "low_rank(rank=8)"]


def moved(text, width, base=64):
    """RMS of (W' - W) x, W' one step of Adam away from W, in units of the learning rate: with own rates, and the dense one."""
    bound = parse(text).bind(width, width)
    leaves = bound.leaves()

    @jax.jit
    def sizes(key):
        params = bound.init(key)
        x, g = jax.random.normal(jax.random.fold_in(key, 1), (2, 8, width))
        y, pull = jax.vjp(lambda params: bound.matmul(params, x), params)
        (grads,) = pull(g)
        found = []
        for rate in (lambda leaf: leaf_multiplier(leaf, "linear", base), lambda leaf: base / width):
            after = map_leaves(lambda leaf, p, d, r=rate: p - 1e-3 * r(leaf) * jnp.sign(d), leaves, params, grads)
            found.append(jnp.sqrt(jnp.mean((bound.matmul(after, x) - y) ** 2)) / 1e-3)
        return found

    return [float(size) for size in sizes(jax.random.key(0))]


moves = {text: [moved(text, width) for width in widths] for text in families}
figure = Figure(figsize=(8.5, 3.4), layout="constrained")
panels = figure.subplots(1, 2, sharey=True)
for i, (panel, title) in enumerate(zip(panels, ("structure-aware rates", "the dense rate for all"))):
    for text, pairs in moves.items():
        panel.plot(widths, [pair[i] for pair in pairs], "o-", label=text)
    panel.set(xscale="log", yscale="log", xlabel="width", title=title)
    panel.set_xticks(widths, widths)
    panel.minorticks_off()
    panel.grid(alpha=0.3)
panels[0].set_ylabel("movement of the output")
panels[1].legend(fontsize=7)
display(figure)

# %% [markdown]
# Now in training: the multipliers of one layer, and the Monarch arm again with the dense rate. Look at the first steps, which show
# the size of the moves best. Which ends lower depends on how good the rate was for dense: it is taken from longer runs.
#
# **Try:** `config.optim.lr` three times larger or smaller, at the top: which of both is hurt more?

# %%
for arm in arms:
    params = unbox(jax.eval_shape(arm.task.model.init, jax.random.key(0), *arm.task.example))["params"]
    scale = multipliers(arm.task.table, sites(arm.task.base, *arm.task.example), params)
    layer = next(value for name, value in scale.items() if name.startswith("layers"))
    print(arm.label, {name: round(x, 3) for name, x in layer["mlp"]["up"].items() if name != "bias"})

monarch = arms[2]
plain = monarch.config.copy_and_resolve_references()
plain.mup.enabled = False
both = Curves(config.steps, "loss, nats per byte")
both.losses["Monarch, structure-aware rates"] = curves.losses[monarch.label]
again = both.train(plain, "Monarch, the dense rate")
display(table({"Monarch, structure-aware rates": records[monarch.label], "Monarch, the dense rate": again}))

# %% [markdown]
# ## Going on
#
# ```bash
# make demo                                                                   # all of this, longer, with six structures
# python -m experiments.compare --config=configs/demo.py --workdir=runs/mine --structure="fit(kronecker(), params=0.3)"
# python -m experiments.sample --workdir=runs/mine/arms/dense --prompt="def "  # text from a checkpoint
# ```
