# %% [markdown]
# # 1. A tour of structures
#
# Build structured matrices, multiply with them, look inside them, and find out which structure suits which matrix, up to
# the weights of a small trained network.
#
# A *structure* is a way to write a matrix with fewer numbers: `monarch(blocks=8)`, `low_rank(rank=4)`, or a sum such as
# `low_rank(rank=4) + random_sparse(density=0.03)`. All of them multiply, transpose, project from a dense matrix and count
# their cost through the same few functions.

# %%
# setup

# %%
import tempfile

import jax
import jax.numpy as jnp
from IPython.display import display

import structmat
from colab.live import quietly
from structmat.analysis import plots
from structmat.structures import random
from structmat.training.config import default
from structmat.training.load import stored_weights
from structmat.training.loop import train

# %% [markdown]
# ## One matrix, one structure
#
# `dense` couples every input to its neighbours, less the further away they are. `project` finds the Monarch matrix nearest
# to it. Look at the table: two small leaves stand for the whole matrix. `error` is the relative distance to `dense`.
#
# **Try:** other texts, such as `"monarch(blocks=8)"`, `"low_rank(rank=16)"` or `"toeplitz()"`, which is exact here. And
# `"monarch(bloks=4)"`, to see what a typo says.

# %%
n = 64
distance = jnp.abs(jnp.arange(n)[:, None] - jnp.arange(n))
dense = 0.8**distance
W = structmat.project(dense, "monarch(blocks=4)")
display(W)
print(f"relative error {W.error(dense):.4f}")

# %% [markdown]
# Vectors are rows, as in a layer: `x @ W`. The product never forms the dense matrix, yet it equals the product with it.
# Sums, products and transposes of matrices are matrices again, over the same arrays.

# %%
x = jax.random.normal(jax.random.key(0), (3, n))
print("difference to the dense product:", f"{jnp.abs(x @ W - x @ W.materialize()).max():.1e}")
V = structmat.project(dense - W.materialize(), "random_sparse(density=0.1, select='magnitude')")
both = W + V
print(both)
print("error of the sum:", f"{both.error(dense):.4f}", " of its transpose:", f"{both.T.error(dense.T):.4f}")
print("FLOPs of one row:", both.cost.flops, "instead of", 2 * n * n)

# %% [markdown]
# ## Inside: the factors
#
# The first panel is |W|, the others are the arrays it is made of. A Monarch matrix is two block-diagonal matrices with a
# fixed permutation between them. Matrices of a stack are drawn below one another.
#
# **Try:** `"kronecker(terms=2)"` or `"block_tensor_train(rank=2)"`.

# %%
display(plots.factor_images(W))

# %% [markdown]
# ## Eight structures drawn at random
#
# This is how a layer starts when it is trained from scratch. Each |W| is divided by its largest entry. Look for blocks,
# stripes, repeated patterns: they are what each structure can say. Below are the singular values: low rank falls to rounding
# error after four, Monarch has all of them.

# %%
texts = [
    "dense()",
    "low_rank(rank=4)",
    "monarch(blocks=8)",
    "kronecker(terms=1)",
    "block_diagonal(blocks=8)",
    "butterfly()",
    "toeplitz()",
    "low_rank(rank=2) + random_sparse(density=0.05)",
]
drawn = {text: random(text, n, n, jax.random.key(1)) for text in texts}
sizes = {text: jnp.abs(W.materialize()) / jnp.abs(W.materialize()).max() for text, W in drawn.items()}
display(plots.weight_image({text: sizes[text] for text in texts[:4]}))
display(plots.weight_image({text: sizes[text] for text in texts[4:]}))
display(plots.spectrum(drawn))

# %% [markdown]
# ## Which structure for which matrix?
#
# `structmat.choose` projects a matrix onto the largest member of each family within a budget, here fractions of the stored bits
# (an index counts as much as a number). Three matrices: a smooth one with its rows shuffled and a sharp diagonal, a Kronecker
# product with a little noise, and noise alone. Look at which curve is lowest for the first, and which for the second; on noise all lose
# much. A structure is an assumption; it pays where it is true.
#
# **Try:** leave the shuffle out, `smooth = bump + jnp.eye(n)`: low rank does not care, but what else does?

# %%
key = jax.random.key(2)
a, b = jax.random.normal(key, (2, 8, 8))
noise = jax.random.normal(key, (n, n))
bump = jnp.exp(-((distance / 20) ** 2))
smooth = jax.random.permutation(key, bump) + jnp.eye(n)
matrices = {"smooth and shuffled": smooth, "Kronecker and noise": jnp.kron(a, b) + 0.1 * noise, "noise": noise}
families = [
    "low_rank()",
    "monarch()",
    "kronecker()",
    "random_sparse(select='magnitude')",
    "low_rank() + random_sparse(select='magnitude')",
]
for name, matrix in matrices.items():
    choices = structmat.choose(matrix, [0.125, 0.25, 0.5], structures=families)
    figure = choices.plot()
    figure.set_size_inches(8, 3.4)
    figure.axes[0].set_title(name)
    display(figure)

# %% [markdown]
# ## Trained weights
#
# A few seconds of training give a network that reads digits. `stored_weights` reads its weights from the checkpoint, one at
# a time; `choose` ranks the families on all of them together. Look at the errors: they are large. Trained dense weights are
# not structured by themselves, so it pays more to train a structure than to cut one out afterwards (notebooks 2 and 3).
#
# **Try:** `config.steps = 5` for weights that are still close to noise, or a budget of `0.5`.

# %%
config = default("digits")
config.steps = 150
config.model.width = 64
folder = tempfile.mkdtemp()
with quietly():
    record = train(config, folder)
print("held-out accuracy:", f"{record.metrics['heldout']['accuracy']:.3f}")
weights = stored_weights(folder)
print({path: weights.table[path].bound.in_shape + weights.table[path].bound.out_shape for path in weights.readers})

# %%
choices = structmat.choose(weights.readers, 0.25, structures=families)
display(choices.table())

# %% [markdown]
# The same as rules, ready for `--config.structure` of a training run: each weight with its best structure. The command
# `python -m experiments.choose --workdir=RUN` does all this for any run, with every family there is.

# %%
print(choices.rules())
