"""Before any test uses jax: the CPU platform, seen as 8 devices. Unsharded work stays on the first, at no cost.

Programs are compiled without optimisation unless XLA_FLAGS says otherwise (`make test-long` does for runs that are killed
or spread over processes): the suite is mostly compile time, and this halves it.
"""

import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")

import jax
import pytest

DEVICES = 8
MAPS = 30_000
"""Memory maps of a process, each program has some: Linux allows 65,530, and a process that asks for more dies."""

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", DEVICES)
# what one worker or an earlier run has compiled need not be compiled again; the key has the program, flags and version
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parent.parent / ".jax_cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture(autouse=True, scope="module")
def few_maps():
    """Forget compiled programs before there are too many."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > MAPS:
        jax.clear_caches()
