"""Two processes save one checkpoint, restore it together, skip a damaged step together; one process restores it alone."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest

SCRIPT = """
import json, os, sys
import jax
pid, n, port, workdir = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"127.0.0.1:{port}", n, pid, initialization_timeout=60, heartbeat_timeout_seconds=10)
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from structmat.training.checkpoint import Checkpointer
mesh = jax.make_mesh((n, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
def state(k):
    rows = np.arange(32, dtype=np.float32).reshape(4, 8) * k
    make = lambda a, *spec: jax.make_array_from_callback(a.shape, NamedSharding(mesh, P(*spec)), lambda i: a[i])
    return {"w": make(rows, "data", "model"), "n": make(np.int32(k))}
with Checkpointer(workdir) as c:
    assert c.latest() is None
    c.save(1, state(1), {"k": 1})
    c.save(2, state(2), {"k": 2})
seen = []
with Checkpointer(workdir) as c:
    for damage in (False, True):
        if damage and pid == 0:
            path = os.path.join(workdir, "checkpoints", "2", "_CHECKPOINT_METADATA")
            data = bytearray(open(path, "rb").read())
            data[5] ^= 1
            open(path, "wb").write(data)
        multihost_utils.sync_global_devices("damaged")
        r = c.restore(state(0))
        w = multihost_utils.process_allgather(r.state["w"], tiled=True)
        seen.append([r.step, r.extra["k"], float(w.sum()), len(r.skipped)])
print(json.dumps(seen))
jax.distributed.shutdown()
"""


@pytest.mark.multiprocess
def test_two_processes(tmp_path):
    import jax
    import jax.numpy as jnp

    from structmat.training.checkpoint import Checkpointer

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    workdir = tmp_path / "run"
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", SCRIPT]
    started = [
        subprocess.Popen([*command, str(i), "2", str(port), str(workdir)], stdout=-1, stderr=-1, text=True, env=env)
        for i in range(2)
    ]
    try:
        results = [p.communicate(timeout=120) for p in started]
    finally:
        for p in started:
            p.kill()
    total = float(np.arange(32).sum())
    for out, err in results:
        assert out, err
        assert json.loads(out.splitlines()[-1]) == [[2, 2, 2 * total, 0], [1, 1, total, 1]]
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    template = {
        "w": jax.ShapeDtypeStruct((4, 8), jnp.float32, sharding=here),
        "n": jax.ShapeDtypeStruct((), jnp.int32, sharding=here),
    }
    with Checkpointer(workdir) as c:
        restored = c.restore(template)
    assert restored.step == 1 and [step for step, _ in restored.skipped] == [2]
    np.testing.assert_array_equal(restored.state["w"], np.arange(32).reshape(4, 8))
