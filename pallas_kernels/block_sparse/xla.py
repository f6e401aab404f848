"""The product with a matrix kept as k dense blocks per block column (blocked ELL), as batched GEMMs over gathered blocks.

`values` (columns, k, p, s) and `rows` (columns, k) int32 stand for W `(d_in, columns s)` whose block column c holds
values[c, j] in the block row rows[c, j]: the layout block-sparse kernels read, here multiplied without one.

A step serves up to `TOGETHER` block columns, spread evenly over the matrix so that a mesh that splits the columns up to
that many ways splits every step; it gathers density * TOGETHER copies of the activations, transposed so that a block
row is contiguous. Step and product are rematerialised: the backward pass keeps x, values and rows and nothing else. On
CPU this beats one step per slot (k passes over the output), one gather of everything (k copies of the activations) and
rebuilding the dense matrix; one step per block column is faster still, but a mesh would have to send every column round.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

TOGETHER = 8


@jax.checkpoint
def block_product(x: jax.Array, values: jax.Array, rows: jax.Array) -> jax.Array:
    """x `(b, d_in)` -> x @ W `(b, columns s)`; the gradient of x is summed in f32 or wider."""
    columns, k, p, s = values.shape
    together = next(g for g in range(min(TOGETHER, columns), 0, -1) if columns % g == 0)
    dtype = jnp.result_type(x, values)
    xt = x.astype(jnp.promote_types(dtype, jnp.float32)).T.reshape(-1, p, x.shape[0])
    split = lambda a: a.reshape(together, columns // together, *a.shape[1:]).swapaxes(0, 1)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def step(carry: None, blocks: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
        value, row = blocks
        gathered = xt[row].astype(dtype).reshape(together, k * p, -1)
        return carry, lax.dot_general(value, gathered, (((1,), (1,)), ((0,), (0,))))

    panels = values.astype(dtype).reshape(columns, k * p, s)
    y = lax.scan(step, None, (split(panels), split(rows)))[1]
    return y.swapaxes(0, 1).reshape(columns * s, -1).T
