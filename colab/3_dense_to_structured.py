# %% [markdown]
# # 3. From dense to structured, and back
#
# Give a trained model other structures: what each layer loses, which changes leave the function as it was to rounding, and
# how further training heals the rest.
#
# The papers call it D2S (dense to sparse or structured: train dense, project, fine-tune) and S2D (reverse
# sparsification: train structured, end dense). Here both are the same call, `structmat.surgery.restructure`: every changed
# weight is materialised and projected, all other parameters keep their bits.

# %%
# setup

# %%
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from IPython.display import Markdown, display
from matplotlib.figure import Figure

from colab.live import Curves
from structmat.surgery import restructured
from structmat.training.config import default
from structmat.training.load import load_run
from structmat.training.task import mean_metrics

# %% [markdown]
# ## A dense model to start from
#
# Three hidden layers that read digits, trained for some seconds. `load_run` reads its newest checkpoint: config, model and
# parameters.

# %%
config = default("digits")
config.steps = 200
config.model.update(width=64, layers=3)

folder = tempfile.mkdtemp()
curves = Curves(config.steps, "loss, nats")
curves.train(config, "dense", folder)
dense = load_run(folder)
batches = list(dense.task.load().heldout())
batch = batches[0]
print(f"{dense.task.params:,} parameters;", "sites:", ", ".join(dense.task.table))


# %% [markdown]
# ## What each layer loses
#
# `restructured` gives the model with other structures at the sites that a rule matches, and its parameters. Look at the
# bars: the relative error |W - W'| / |W| of every weight in the structures below. Then at the losses: an error per layer says
# little about the function, so always look at both.
#
# **Try:** another family, another budget, or only some layers: `"layers_1 -> fit(monarch(), params=0.3)"`.


# %%
def changed(run, rules):
    """(model, variables, changes): the run's model with other structures."""
    return restructured(run.task.model, rules, run.variables, *run.task.example, key=jax.random.key(0))


def held_out(run, model, variables):
    """Held-out loss and accuracy."""
    score = jax.jit(lambda v, batch: run.task.loss(model, v, batch, None, False)[1])
    return mean_metrics([jax.device_get(score(variables, batch)) for batch in batches])


rules = {
    "low rank": "fit(low_rank(), params=0.3)",
    "Monarch": "fit(monarch(order='blocked'), params=0.3)",
    "Kronecker": "fit(kronecker(), params=0.3)",
    "low rank + sparse": "fit(low_rank() + random_sparse(select='magnitude'), params=0.3)",
}
projected = {label: changed(dense, rule) for label, rule in rules.items()}

figure = Figure(figsize=(8, 3.6), layout="constrained")
panel = figure.subplots()
for number, (label, (_, _, changes)) in enumerate(projected.items()):
    places = np.arange(len(changes)) + 0.2 * number
    panel.bar(places, [change.error for change in changes.values()], 0.2, label=label)
panel.set_xticks(np.arange(len(changes)) + 0.3, changes, fontsize=8)
panel.set_ylabel("relative error")
panel.legend(fontsize=8, ncols=4, loc="lower left")
display(figure)

lines = ["| weights | held-out loss, no further training | accuracy |", "|---|---|---|"]
models = {"dense": (dense.task.model, dense.variables)} | {label: found[:2] for label, found in projected.items()}
for label, (model, variables) in models.items():
    metrics = held_out(dense, model, variables)
    lines.append(f"| {label} | {metrics['loss']:.3f} | {metrics['accuracy']:.1%} |")
display(Markdown("\n".join(lines)))

# %% [markdown]
# ## Changes that preserve the function
#
# Where the new structure can be the old matrix, the model stays the same function. A matrix is its own singular value
# decomposition, so `spectral()` of full rank loses nothing, and everything that is structured can be made dense. Look at the
# last column: logits differ by the rounding of float32, not by more, but for the last row, where Monarch cannot be that matrix.
#
# **Try:** `spectral(rank=32)`: most of the triplets are gone, and so is the equality.


# %%
def logits(model, variables):
    """Of the held-out batch."""
    return jax.jit(lambda v: model.apply(v, batch["images"]))(variables)


def compare(name, before, after):
    """A row: the largest difference of logits over the largest logit."""
    off = float(jnp.abs(after - before).max() / jnp.abs(before).max())
    return f"| {name} | {off:.1e} | {off / np.finfo(np.float32).eps:.0f} |"


lines = ["| change | difference of logits | in units of float32's epsilon |", "|---|---|---|"]
start = logits(dense.task.model, dense.variables)
model, variables, _ = changed(dense, "spectral()")
lines.append(compare("dense to spectral, all singular values", start, logits(model, variables)))
model, variables, _ = changed(dense, "block_tensor_train(rank=8)")
lines.append(compare("dense to block tensor train of full rank", start, logits(model, variables)))
monarch, variables, _ = projected["Monarch"]
structured = type(dense)(dense.config, dense.task.with_model(monarch), variables, dense.step)
model, variables, _ = changed(structured, "dense()")
lines.append(compare("Monarch to dense", logits(monarch, structured.variables), logits(model, variables)))
lines.append(compare("dense to Monarch", start, logits(monarch, structured.variables)))
display(Markdown("\n".join(lines)))

# %% [markdown]
# ## In the middle of a run
#
# `config.switch` does this during training, optimiser state included. D2S: dense until half of the steps, then Monarch. S2D:
# Monarch for most of the steps, then dense. The learning rate stays constant, so that what is new has a rate left to learn
# with. Look for the jump of the first and its healing; the second has none, as dense can be any Monarch matrix.
#
# **Try:** `0.5: fit(low_rank(), params=0.3)`, one layer only, `0.5: layers_1 -> monarch(blocks=4)`, or the cosine schedule.

# %%
MONARCH = "fit(monarch(order='blocked'), params=0.3)"
runs = {
    "D2S: dense, then Monarch": {"structure": "dense()", "switch": f"0.5: {MONARCH}"},
    "S2D: Monarch, then dense": {"structure": MONARCH, "switch": "0.7: dense()"},
}
curves = Curves(config.steps, "loss, nats", smooth=0.85)
records = {}
for label, fields in runs.items():
    own = config.copy_and_resolve_references()
    own.update(fields)
    own.optim.schedule = "constant"
    records[label] = curves.train(own, label)

for label, record in records.items():
    row = record.metrics["switches"][0]
    print(
        f"{label}: at step {row['step']} parameters {row['params_before']:,} -> {row['params_after']:,}, worst relative error of a "
        f"weight {row['worst_error']:.1e}; held-out accuracy {record.metrics['heldout']['accuracy']:.1%}"
    )

# %% [markdown]
# ## Going on
#
# ```bash
# python -m experiments.train --config=configs/demo_lm.py --workdir=runs/d2s --config.switch="0.5: monarch(blocks=4)"
# python -m experiments.tables show monarch_d2s    # the same over seeds, beside low rank of equal size
# ```
