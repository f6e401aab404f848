"""Two processes make only their own rows of a batch; the global array and a product of it are those of one process."""

import json
import os
import socket
import subprocess
import sys

import pytest

SCRIPT = """
import json, sys
import jax
pid, port = int(sys.argv[1]), sys.argv[2]
jax.config.update("jax_num_cpu_devices", 4)
jax.distributed.initialize(f"127.0.0.1:{port}", 2, pid, initialization_timeout=60, heartbeat_timeout_seconds=10)
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from structmat.parallel import local_rows, make_mesh, on_mesh, shard_batch
whole = np.arange(48, dtype=np.float32).reshape(16, 3)
seen = []
for spec in ({"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 8}, {"tensor": 8}):
    mesh = make_mesh(spec)
    rows = local_rows(mesh, 16)
    batch = shard_batch(mesh, {"x": whole[rows.start : rows.stop]}, 16)
    with on_mesh(mesh):
        total = jax.jit(lambda x: x.sum())(batch["x"])
    same = np.array_equal(multihost_utils.process_allgather(batch["x"], tiled=True), whole)
    seen.append([rows.start, rows.stop, float(total), same])
print(json.dumps(seen))
jax.distributed.shutdown()
"""


@pytest.mark.multiprocess
def test_two_processes():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-c", SCRIPT]
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": env}
    started = [subprocess.Popen([*command, str(i), str(port)], **pipes) for i in range(2)]
    try:
        results = [p.communicate(timeout=120) for p in started]
    finally:
        for p in started:
            p.kill()
    total = float(sum(range(48)))
    for i, (out, err) in enumerate(results):
        assert started[i].returncode == 0, err[-3000:]
        half = [8 * i, 8 * i + 8, total, True]
        assert json.loads(out.splitlines()[-1]) == [half, half, [0, 16, total, True]]
