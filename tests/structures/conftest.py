"""The suite compiles hundreds of tiny programs once each: compiling them lightly halves its time."""

import jax
import pytest


@pytest.fixture(autouse=True)
def light_compiles():
    """Switch off XLA's expensive optimisations during a test of this folder."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
