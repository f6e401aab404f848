"""The potential of small clusters, the network that learns it, its symmetries, and what is said of them."""

import math
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich import box

from experiments import tdn_potential
from experiments.tdn_clusters import ANGLE, CLOSEST, CUTOFF, MORSE, clusters, energy
from experiments.tdn_network import Network, harmonics
from experiments.tdn_potential import (
    SEPARATE,
    SHARED,
    Scale,
    claims,
    cp,
    loss,
    make_errors,
    time_claims,
)
from experiments.tensor_product import rotations
from structmat.structures.clebsch_gordan import block, wigner
from structmat.structures.path_factors import PathFactors
from structmat.training.record import Record

ROOT = Path(__file__).parents[2]
TURN = rotations(jax.random.key(5), 1)[0]
DATA = clusters(0, 4)


def by_hand(x):
    """The energy of atoms (n, 3), loop by loop."""
    n, total = len(x), 0.0
    near = lambda r: (1 + math.cos(math.pi * r / CUTOFF)) / 2 if r < CUTOFF else 0.0
    away = lambda i, j: np.linalg.norm(x[i] - x[j])
    for i in range(n):
        for j in range(i + 1, n):
            r = away(i, j)
            total += ((1 - math.exp(-MORSE * (r - 1))) ** 2 - 1) * near(r)
    for i in range(n):
        others = [j for j in range(n) if j != i]
        for a, j in enumerate(others):
            for k in others[a + 1 :]:
                cosine = (x[j] - x[i]) @ (x[k] - x[i]) / (away(i, j) * away(i, k))
                total += ANGLE * (cosine + 1 / 3) ** 2 * near(away(i, j)) * near(away(i, k))
    return total


def test_energies_and_forces_are_those_of_the_potential():
    assert {a.dtype for a in DATA.arrays} == {np.dtype("float32")} and len(set(DATA.here.sum(1))) > 1
    for x, here, value, forces in zip(*DATA.arrays):
        x, forces, atoms = x.astype(float), forces.astype(float), int(here.sum())
        own = x[:atoms]
        assert value == pytest.approx(by_hand(own), rel=1e-5)
        assert min(np.linalg.norm(a - b) for i, a in enumerate(own) for b in own[:i]) > CLOSEST
        np.testing.assert_allclose(forces[:atoms].sum(0), 0, atol=1e-5)
        np.testing.assert_allclose(np.cross(own, forces[:atoms]).sum(0), 0, atol=1e-5)
        assert not forces[atoms:].any() and not x[atoms:].any()
    step = np.zeros_like(own)
    step[1, 2] = 1e-5
    assert forces[1, 2] == pytest.approx((by_hand(own - step) - by_hand(own + step)) / 2e-5, abs=1e-5)
    more = clusters(0, 6)
    assert all(np.array_equal(a, b) for a, b in zip(more[:4].arrays, DATA.arrays)) and more.digest != DATA.digest


def test_harmonics_turn_by_wigner_matrices():
    x = np.random.default_rng(0).normal(size=(20, 3))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    with jax.enable_x64(True):
        found, turned = (np.asarray(harmonics(jnp.asarray(v), 4)) for v in (x, x @ TURN.T))
    np.testing.assert_allclose(turned, found @ wigner(4, TURN).T, atol=1e-12)
    for l in range(5):
        np.testing.assert_allclose((found[:, block(l)] ** 2).sum(1), 2 * l + 1, rtol=1e-12)
    np.testing.assert_allclose(found[:, 1:4], math.sqrt(3) * x[:, [1, 2, 0]], rtol=1e-12)
    np.testing.assert_allclose(found[:, 6], math.sqrt(5) * (3 * x[:, 2] ** 2 - 1) / 2, atol=1e-12)


@pytest.mark.long
def test_the_network_keeps_symmetries_and_factors_miss_them_by_their_error():
    """A cluster turned and moved, with its atoms in another order, and with other numbers in its padding."""
    x, here = DATA.positions, DATA.here
    moved = (x @ TURN.T.astype(np.float32) + 0.3) * here[..., None]
    noise = x + np.random.default_rng(0).normal(size=x.shape).astype(np.float32) * (1 - here[..., None])
    both = np.concatenate([x, moved, x[:, ::-1], noise]), np.concatenate([here, here, here[:, ::-1], here])
    fields = dict(layers=1, channels=3)
    start = lambda model: jax.jit(model.init)(jax.random.key(0), x[0], here[0])
    variables = start(Network(**fields))

    def energies(model):
        held = start(model) | {"params": variables["params"]}
        return np.asarray(jax.jit(jax.vmap(lambda x, here: model.apply(held, x, here)))(*both)).reshape(4, -1)

    whole = energies(Network(**fields))
    scale = np.ptp(whole[0])
    assert scale > 1e-2
    np.testing.assert_allclose(whole, np.broadcast_to(whole[0], whole.shape), atol=2e-5 * scale)
    exact = PathFactors.exact(2, 2, 2)
    cut = PathFactors(exact.degrees, tuple(core[:, ::2] for core in exact.cores))
    for factors, low, high in ((exact, 0, 2e-5), (cut, 1e-4, 10)):
        found = energies(Network(**fields, factors=factors))
        np.testing.assert_allclose(found[2:], np.broadcast_to(found[0], found[2:].shape), atol=2e-5 * scale)
        assert low <= np.abs(found[1] - found[0]).max() / scale < high
        assert low <= np.abs(found - whole).max() / scale < high


class Truth(nn.Module):
    """The potential itself, times a number, and bent along x."""

    @nn.compact
    def __call__(self, x, here):
        times, bent = (self.param(name, nn.initializers.zeros_init(), ()) for name in ("times", "bent"))
        return times * energy(x, here) + bent * jnp.sum(x[:, 0] * here)


def test_errors_are_relative_and_turned_with_the_clusters():
    turns, scale = rotations(jax.random.key(1), 3), Scale(1.0, 0.0)
    of, held = make_errors(Truth(), DATA, scale, turns), lambda **v: {"params": {"times": 1.0, "bent": 0.0} | v}
    errors = lambda **values: of(held(**values))
    assert max(errors().values()) < 1e-5
    twice = errors(times=1.25)
    assert twice["force"] == pytest.approx(0.25, rel=1e-4) == twice["turned"] and twice["equivariance"] < 1e-5
    assert twice["energy"] == pytest.approx(0.25 * np.mean(np.abs(DATA.energies) / DATA.here.sum(1)), rel=1e-4)
    bent = errors(bent=0.1)
    off = np.sqrt(0.01 * DATA.here.sum() / np.sum(DATA.forces**2))
    assert bent["force"] == pytest.approx(off, rel=1e-4) == bent["turned"] and bent["equivariance"] > 0.5 * off
    scale = Scale.of(DATA)
    value = jax.jit(lambda v: loss(Truth(), v, DATA.arrays, Scale(scale.force, 0.0)))(held(times=0.0))
    energies = 0.1 * np.mean((DATA.energies / DATA.here.sum(1)) ** 2)
    assert float(value) == pytest.approx(1 + energies, rel=1e-5)
    assert scale.energy == pytest.approx(DATA.energies.sum() / DATA.here.sum())


def run(arm, rank, force, equivariance=(0.1, 0.11, 0.09), fit_error=0.0):
    return {"arm": arm, "rank": rank, "fit_error": fit_error, "params": 10, "force": list(force),
            "turned": list(force), "equivariance": list(equivariance), "energy": [0.01] * 3}  # fmt: skip


def test_claims_are_judged_on_seeds():
    runs = [
        run(SEPARATE, None, (0.10, 0.11, 0.12)),
        run(SHARED, None, (0.101, 0.111, 0.12), (1e-6,) * 3),
        run(cp(14), 14, (0.20, 0.22, 0.23), (0.3, 0.31, 0.29), 0.5),
        run(cp(28), 28, (0.09, 0.14, 0.11), (0.01, 0.012, 0.011), 0.014),
    ]
    found = {text: verdict.status for text, verdict in claims(runs)}
    assert [*found.values()] == ["holds", "does not hold", "not decided", "holds"]
    assert any(
        "CP rank 14, of fit error 0.5, has at most 10% more force error than one weight" in text for text in found
    )
    times = [
        {"lmax": l, "arm": arm, "rank": rank, "seconds": seconds}
        for l, arm, rank, seconds in (
            (1, SHARED, None, [1.0, 1.1, 1.0]),
            (1, cp(7), 7, [1.2, 1.3, 1.2]),
            (4, SHARED, None, [4.0, 4.1, 4.0]),
            (4, cp(28), 28, [1.0, 1.1, 1.0]),
        )
    ]
    assert [v.status for _, v in time_claims(times)] == ["does not hold", "holds"]
    assert tdn_potential.time_table(times, box.MARKDOWN).row_count == 4
    assert tdn_potential.run_table(runs, box.MARKDOWN).row_count == 4


@pytest.mark.long
def test_the_command_trains_times_and_writes_one_page(tmp_path):
    line = [sys.executable, "-m", "experiments.tdn_potential", f"--out={tmp_path}", "--lmax=1", "--channels=4"]
    small = ["--ranks=5", "--seeds=2", "--steps=60", "--train=40", "--test=10"]
    for more in (small, ["--times", "--degrees=1", "--repeats=2", "--separate=1"]):
        subprocess.run([*line, *more], cwd=ROOT, check=True, capture_output=True)
    record, times = (Record.read(tmp_path / f"potential{end}.json") for end in ("", "_times"))
    runs = {row["arm"]: row for row in record.metrics["runs"]}
    assert list(runs) == [SEPARATE, SHARED, cp(5)] and all(len(row["force"]) == 2 for row in runs.values())
    assert max(runs[SHARED]["equivariance"]) < 1e-4 < min(runs[cp(5)]["equivariance"])
    assert max(runs[SHARED]["force"]) < 0.9 and runs[SHARED]["force"][0] != runs[SHARED]["force"][1]
    assert runs[SEPARATE]["params"] > runs[SHARED]["params"] == runs[cp(5)]["params"]
    assert [row["arm"] for row in times.metrics["times"]] == [SEPARATE, SHARED, cp(7)]
    text = (tmp_path / "potential.md").read_text()
    assert text.count("CP rank 5 ") == 1 and text.count("| CP rank 7 ") == 1 and text.count("95% interval") >= 4
    wrong = subprocess.run([*line, "--degrees=7"], cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode and "7 is above 6" in wrong.stderr + wrong.stdout
