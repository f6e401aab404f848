"""The race test sees a planted bug: a sum carried along an axis that is declared parallel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tests.kernels.races import races, strict


@pytest.mark.parametrize("planted", [False, True])
def test_a_sum_along_a_parallel_axis_is_caught(planted, capsys):
    def kernel(x_ref, y_ref, total):
        @pl.when(pl.program_id(0) == 0)
        def _():
            total[...] = jnp.zeros_like(total)

        total[...] += x_ref[...]
        y_ref[...] = total[...]

    x = jnp.ones((32, 128))
    call = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((8, 128), x.dtype),
        grid=(4,),
        in_specs=[pl.BlockSpec((8, 128), lambda i: (i, 0))],
        out_specs=pl.BlockSpec((8, 128), lambda i: (0, 0)),
        scratch_shapes=[pltpu.VMEM((8, 128), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel" if planted else "arbitrary",)),
        interpret=strict(2),
    )
    try:
        wrong = not np.array_equal(call(x), np.full((8, 128), 4.0)) or races(capsys) > 0
    except jax.errors.JaxRuntimeError as error:  # from jax 0.12.0.1 on a race ends the call
        if "RACE DETECTED" not in str(error):
            raise
        wrong = True
    assert wrong == planted
