"""`python -m experiments.pod`: what it prints, and how it ends."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.pod_step import Account, advice, kernels, too_large, useful_flops
from structmat.parallel import Sent
from structmat.training.config import default, validate
from structmat.training.record import Record

ROOT = Path(__file__).parents[2]
GIB = 2**30


def some_account(**changes):
    made = Account(
        pod="v5e:2x4", devices=8, chip="v5e", mesh={"data": 4, "fsdp": 2, "tensor": 1}, params=10, dense_params=20,
        state=2 * GIB, fits=False, hbm=16 * GIB, arguments=2 * GIB, temporaries=30 * GIB, peak=32 * GIB, model_flops=3e12,
        flops=4e12, sent=[], kernels={}, off_plan=[], compute=2.0, memory=0.5, network=1.0, lower_seconds=1.0,
        compile_seconds=1.0, program="",
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


def test_bounds_of_utilisation():
    assert some_account(fits=True).mfu == pytest.approx(
        (0.75, 0.5)
    )  # a third more FLOPs than the model's; 1 s beside 2
    assert some_account(fits=True, network=4.0).mfu == pytest.approx((0.375, 0.25))
    assert some_account().mfu is None  # what it would send is unknown


@pytest.mark.parametrize(("structure", "fewer"), [("kronecker(terms=64)", "executed"), ("low_rank(rank=8)", "same")])
def test_useful_flops_are_no_more_than_those_of_the_path_taken(structure, fewer):
    """A sum of many Kronecker terms is multiplied as one matrix, with fewer FLOPs than by its algorithm."""
    config = default("lm")
    config.structure = structure
    task = validate(config, 1)
    assert (task.flops(executed=True) < task.flops()) == (fewer == "executed")
    assert useful_flops(task) == task.flops(executed=True)


def test_rows_are_json():
    sent = [Sent("all-gather", ("fsdp",), 2, 1, 8, 4)]
    row = some_account(fits=True, sent=sent).row()
    assert row == json.loads(json.dumps(row)) and row["mfu"] == pytest.approx([0.75, 0.5])
    assert row["sent"][0]["axes"] == ["fsdp"] and some_account().row()["mfu"] is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, ["remat=full", "--config.batch", "tensor=4"]),
        ({"state": 12 * GIB}, ["fsdp=-1 spreads it over all 8", "remat=full"]),
        ({"state": 12 * GIB, "mesh": {"data": 1, "fsdp": 8, "tensor": 1}}, ["needs about 10 chips"]),
        ({"mesh": {"data": 1, "fsdp": 2, "tensor": 4}}, ["remat=full", "--config.batch"]),
    ],
)
def test_advice_names_what_helps(changes, said):
    found = "; ".join(advice(some_account(**changes), default("lm").to_dict()))
    assert all(part in found for part in said)
    assert ("tensor=4" in found) == (changes.get("mesh", {}).get("tensor", 1) == 1)


@pytest.mark.parametrize(
    ("mesh", "slices", "said"),
    [
        (
            {"replica": 2, "data": 4, "fsdp": 2, "tensor": 1},
            2,
            "mesh.data=1 --config.mesh.fsdp=-1 spreads it over the 8 ",
        ),
        (
            {"data": 8, "fsdp": 2, "tensor": 1},
            2,
            "mesh.data=2 --config.mesh.fsdp=-1 spreads it over the 8 of a replica",
        ),
        ({"data": 4, "fsdp": 4, "tensor": 1}, 4, "needs about 5 chips"),
        ({"data": 8, "fsdp": 2, "tensor": 1}, 1, "mesh.data=1 --config.mesh.fsdp=-1 spreads it over all 16"),
    ],
)
def test_advice_keeps_replicas_on_their_slices(mesh, slices, said):
    found = some_account(devices=16, mesh=mesh, state=10 * GIB)
    assert said in "; ".join(advice(found, default("lm").to_dict() | {"batch": 16}, slices))


@pytest.mark.parametrize(
    ("message", "need"),
    [
        ("XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm.", 20.5),
        ("the total memory required for HLO temporaries (30.50G) exceeds available HBM (15.75G).", 32.5),
        ("the total memory required for arguments (18.00G) exceeds available HBM (15.75G).", 18.0),
    ],
)
def test_refusals_of_the_compiler(message, need):
    assert too_large(message, 2 * GIB) == (need * GIB, 15.75 * GIB)


def test_other_errors_are_not_swallowed():
    with pytest.raises(RuntimeError, match="internal"):
        too_large("INTERNAL: internal error", 0)


def test_kernels_are_counted_by_name():
    call = '%{} = bf16[8]{{0}} custom-call(%x), custom_call_target="tpu_custom_call", backend_config={{}}'
    text = "\n".join(call.format(name) for name in ("monarch_forward.1", "monarch_forward.12", "block_sparse_forward"))
    other = '%y = f32[8] custom-call(%x), custom_call_target="Sharding"'
    assert kernels(text + "\n" + other) == {"monarch_forward": 2, "block_sparse_forward": 1}


def pod(*flags):
    command = [sys.executable, "-m", "experiments.pod", *flags]
    return subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=300)


@pytest.mark.long
def test_flags_that_are_missing():
    for flags, said in (((), "--config is needed"), (("--config=configs/demo_lm.py",), "--topology is needed")):
        ended = pod(*flags)
        assert ended.returncode == 2 and ended.stderr.strip().splitlines()[-1].startswith(f"error: {said}")


@pytest.mark.tpu_aot
def test_a_step_that_fits_and_one_that_does_not(tmp_path):
    fields = [
        "--config=configs/demo_lm.py:monarch",
        "--topology=v5e:2x4",
        "--config.mesh.fsdp=2",
        "--config.mesh.tensor=2",
    ]
    ended = pod(*fields, f"--out={tmp_path / 'pod.json'}")
    assert ended.returncode == 0 and "MFU bound" in ended.stdout and "as planned" in ended.stdout
    record = Record.read(tmp_path / "pod.json")
    found = record.metrics
    assert record.kind == "pod" and found["fits"] and found["devices"] == 8 and 0 < found["peak"] < found["hbm"]
    assert found["params"] < found["dense_params"] and found["off_plan"] == []
    over = {axis for s in found["sent"] for axis in s["axes"]}
    assert over == {"data", "fsdp", "tensor"} and all(s["wire"] > 0 for s in found["sent"] if s["axes"])
    assert 0 < found["mfu"][1] < found["mfu"][0] <= 1
    large = pod(*fields, "--config.structure=dense()", "--config.model.width=8192", "--config.model.layers=8")
    assert large.returncode == 1 and "fits" in large.stdout and "NO: " in large.stdout
    assert large.stderr.strip().splitlines()[-1].startswith("error: the step does not fit; ")


@pytest.mark.tpu_aot
def test_a_topology_that_does_not_exist():
    ended = pod("--config=configs/demo_lm.py", "--topology=v5e:3x3")
    assert ended.returncode == 2 and "names that work" in ended.stderr
