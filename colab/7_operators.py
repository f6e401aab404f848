# %% [markdown]
# # 7. Operators
#
# Learn where a flow leads to, with Fourier layers whose weights are dense, Tucker tensors, or whose transforms are themselves
# learned Monarch factors: truth and prediction side by side, spectra, a finer grid, and compression after training.
#
# A Fourier neural operator multiplies the low frequencies of a field by one matrix per frequency. These matrices form a tensor
# (frequencies x channels x channels), most of the parameters, and any structure can hold it. The data comes from the repository's
# own pseudo-spectral solver of the Navier-Stokes equations on a torus. Grids here are small: two cores are enough.

# %%
# setup

# %%
import tempfile
from pathlib import Path

import jax
import numpy as np
from IPython.display import Markdown, display
from matplotlib.figure import Figure

from colab.live import Curves
from configs import navier_stokes
from structmat.analysis.field_pictures import field_spectra, predicted_fields
from structmat.nn import sites
from structmat.parallel import unbox
from structmat.surgery import reassign, restructure
from structmat.training.load import load_run
from structmat.training.task import mean_metrics

# %% [markdown]
# ## Three operators
#
# From the vorticity at time 0 to the vorticity at time 4. `fno` has dense spectral weights, `tfno` Tucker tensors of a tenth of
# their parameters, and `monarch` learns its Fourier transforms too: products of two sparse factors that start as the exact FFT.
# Samples are solved at 32 x 32 points; the operators train on every second point.
#
# **Try:** more steps or samples, `time=8.0` (harder), or the argument `"layers_.*/spectral -> cp(rank=20)"`.

# %%
data = Path(tempfile.mkdtemp())


def config_of(name):
    """The repository's config, with small sizes."""
    config = navier_stokes.get_config(name)
    config.steps = 120
    config.model.update(width=12, layers=1, modes=8)
    config.mup.base_width = 12
    config.optim.lr = 8e-3
    fine = 0 if name == "monarch" else 32
    config.data.update(resolution=16, solve_resolution=32, fine=fine, time=4.0, dt=0.04, train=80, test=20)
    config.data.folder = str(data)
    return config


names = ("fno", "tfno", "monarch")
curves = Curves(config_of("fno").steps, "relative L2 error on training fields")
records = {name: curves.train(config_of(name), name, data / "runs" / name) for name in names}

# %% [markdown]
# ## How far off
#
# Held-out errors, relative to the size of the field: L2, H1 (which counts gradients) and L2 on the grid twice as fine, which the
# operators never trained on. Look at `tfno` beside `fno`: parameters against errors. The Monarch operator is bound to its grid.

# %%
lines = ["| operator | parameters | L2 | H1 | L2 on the finer grid |", "|---|---|---|---|---|"]
for name, record in records.items():
    m = record.metrics
    fine = f"{m['heldout']['l2_fine']:.3f}" if "l2_fine" in m["heldout"] else "-"
    lines.append(f"| {name} | {m['params']:,} | {m['heldout']['l2']:.3f} | {m['heldout']['h1']:.3f} | {fine} |")
lines.append(
    f"| the mean field, whatever the input | - | {records['fno'].metrics['reference']['mean_field']:.3f} | - | - |"
)
display(Markdown("\n".join(lines)))
print(records["fno"].metrics["data"])

# %% [markdown]
# ## Truth and prediction
#
# One held-out flow for each operator; the difference has its own colour scale. Look at the scale of the
# differences, and at the smoothness of the predictions.
#
# **Try:** another `sample`, 0 to 9.

# %%
sample = 0
runs = {name: load_run(data / "runs" / name) for name in names}
batch = next(runs["fno"].task.load().heldout())


def predict(run, x):
    """(samples, n, n)."""
    return np.asarray(jax.jit(lambda v, x: run.task.model.apply(v, x))(run.variables, x)[..., 0])


predictions = {name: predict(run, batch["x"]) for name, run in runs.items()}
truth = np.stack([batch["y"][sample]] * len(names))
figure = predicted_fields(truth, np.stack([predictions[name][sample] for name in names]), names)
figure.set_size_inches(8, 2.3 * len(names))
display(figure)

# %% [markdown]
# ## Scales
#
# Energy against wavenumber, for the truth and the predictions. Look at the right end: the flow has next to nothing there, and
# operators trained so briefly leave noise. The last curve is the same `fno` applied on the finer grid, with twice the
# wavenumbers and no training for them.
#
# **Try:** `modes=4` in `config_of`.

# %%
fields = {"truth": batch["y_fine"][:10], **predictions, "fno on the finer grid": predict(runs["fno"], batch["x_fine"])}
display(field_spectra({name: field[:10] for name, field in fields.items()}))

# %% [markdown]
# ## Compression after training
#
# The spectral weights of the trained `fno` are projected onto Tucker tensors of less and less parameters, with no further
# training. Look at the distance to the cross: `tfno`, trained with a tenth of the parameters from the start.
#
# **Try:** `cp()` or `tensor_train()` in place of `tucker()`.

# %%
run = runs["fno"]
held_out = list(run.task.load().heldout())
budgets = [0.1, 0.4]
errors = []
for budget in budgets:
    model = reassign(run.task.model, f"layers_.*/spectral -> fit(tucker(), params={budget})", *run.task.example)
    template = unbox(jax.eval_shape(model.init, jax.random.key(0), *run.task.example))
    variables, _ = restructure(run.task.table, sites(model, *run.task.example), run.variables, template)
    score = jax.jit(lambda v, batch, model=model: run.task.loss(model, v, batch, None, False)[1])
    errors.append(mean_metrics([jax.device_get(score(variables, batch)) for batch in held_out])["l2"])

figure = Figure(figsize=(6.5, 3.6), layout="constrained")
panel = figure.subplots()
panel.plot(budgets, errors, "o-", label="fno, projected after training")
panel.plot(0.1, records["tfno"].metrics["heldout"]["l2"], "C1X", ms=10, label="tfno, trained so")
panel.axhline(records["fno"].metrics["heldout"]["l2"], ls=":", color="0.4", label="fno, dense")
panel.set(
    xscale="log", xlabel="parameters of the spectral weights, fraction of dense", ylabel="held-out relative L2 error"
)
panel.set_xticks(budgets, [f"{b:g}" for b in budgets])
panel.grid(alpha=0.3)
panel.legend(fontsize=8)
display(figure)

# %% [markdown]
# ## Going on
#
# ```bash
# python -m experiments.train --config=configs/navier_stokes.py:tfno --workdir=runs/tfno   # 32 x 32, or fno, monarch, unet
# ```
