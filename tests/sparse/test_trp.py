"""Trained rank pruning: the rank rule, truncation, the sub-gradient, and what a step of training does with them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from structmat.nn import StructuredConv, StructuredDense, sites
from structmat.sparse import TRP, Truncate, polar_factor
from structmat.sparse import truncate as plain_truncate
from structmat.sparse.trp import Kernel, find_kernels, kept
from structmat.structures import StructureError, parse
from structmat.structures.convolution import matrix_of, view_of, view_shapes
from structmat.training import loop
from structmat.training.config import validate
from structmat.training.errors import ConfigError
from structmat.training.load import load_run
from structmat.training.state import TrainState
from tests.marks import mostly_long
from tests.training.small_runs import small_digits, small_lm

RNG = np.random.default_rng(0)
truncate = jax.jit(plain_truncate)


def matrices(*shape, decay=0.7):
    """Random matrices whose singular values fall by `decay` each."""
    u, _, vt = np.linalg.svd(RNG.normal(size=shape), full_matrices=False)
    return jnp.asarray((u * decay ** np.arange(u.shape[-1])) @ vt, jnp.float32)


def test_the_rank_is_the_smallest_that_holds_the_energy():
    spectra = np.sort(RNG.gamma(0.3, size=(50, 12)))[:, ::-1].astype(np.float32)
    count = jax.jit(kept)
    for energy in (0.3, 0.9, 0.999):
        for s, keep in zip(spectra.astype(np.float64), np.asarray(count(spectra, energy))):
            smallest = next(k for k in range(1, 13) if (s[:k] ** 2).sum() >= energy * (s**2).sum())
            assert keep.tolist() == [i < smallest for i in range(12)]
    assert not count(np.zeros_like(spectra), 0.9).any()


def test_truncation_keeps_its_bound_and_its_subspaces():
    w = matrices(2, 16, 10)
    for energy in (0.5, 0.9):
        cut = truncate(w, energy)
        lost, whole = (np.sum(np.square(a), (-2, -1)) for a in (w - cut, w))
        assert np.all(lost <= (1 - energy) * whole) and np.all(lost > 0)
        for one, before in zip(np.asarray(cut), np.asarray(w)):
            u, s, vt = np.linalg.svd(before)
            k = np.linalg.matrix_rank(one)
            assert k == np.argmax(np.cumsum(s**2) >= energy * np.sum(s**2)) + 1 < 10
            np.testing.assert_allclose(one, (u[:, :k] * s[:k]) @ vt[:k], atol=1e-6)
    np.testing.assert_allclose(truncate(w, 1 - 1e-7), w, atol=1e-6)


def test_truncating_twice_at_one_rank_is_truncating_once():
    w = matrices(12, 12, decay=0.5)  # 0.75 of the energy left is always in the first value
    once = truncate(w, 0.9)
    np.testing.assert_allclose(truncate(once, 0.9), once, atol=1e-6)
    assert np.linalg.matrix_rank(np.asarray(once)) == 2


def test_the_polar_factor_is_a_subgradient_of_the_nuclear_norm():
    w = matrices(9, 6)
    p, nuclear = np.asarray(polar_factor(w), np.float64), lambda a: np.linalg.svd(a, compute_uv=False).sum()
    assert np.linalg.norm(p, 2) == pytest.approx(1, abs=1e-5)
    exact = np.asarray(w, np.float64)
    assert (exact * p).sum() == pytest.approx(nuclear(exact), rel=1e-5)
    direction = RNG.normal(size=w.shape)
    slope = (nuclear(exact + 1e-5 * direction) - nuclear(exact - 1e-5 * direction)) / 2e-5
    assert (p * direction).sum() == pytest.approx(slope, rel=1e-4)
    low = truncate(w, 0.9)
    u, _, vt = np.linalg.svd(np.asarray(low, np.float64))
    k = np.linalg.matrix_rank(np.asarray(low))
    np.testing.assert_allclose(polar_factor(low), u[:, :k] @ vt[:k], atol=1e-5)


SCHEMES = {
    "channel": lambda k, cout: f"low_rank(rank={k})",
    "spatial": lambda k, cout: f"low_rank(rank={k})",
    "decoupled": lambda k, cout: f"block_low_rank(in_blocks=1, out_blocks={cout}, rank={k})",
}


@pytest.mark.parametrize("view", mostly_long([*SCHEMES], ["decoupled"]))
def test_a_truncated_convolution_is_one_of_its_factored_form(view):
    """Of the lowest rank that has it, by the same geometry and to rounding."""
    cin, cout, window = 6, 5, (3, 2)
    matrix = matrix_of(jnp.asarray(RNG.normal(size=(*window, cin, cout)), jnp.float32), view)
    layer = lambda text: StructuredConv(cout, window, text, view, use_bias=False, path="factored")
    x = jnp.asarray(RNG.normal(size=(2, 6, 7, cin)), jnp.float32)
    table = {"conv": sites(layer("dense()"), x)[""]}
    (kernel,) = find_kernels(table, "trp")
    state = TrainState(jnp.int32(5), {"conv": {"kernel": matrix}}, {}, (), {}, jnp.zeros(2, jnp.int32))
    act = jax.jit(Truncate((kernel,), 5, 0.8).update)
    cut = act(jax.random.key(0), state.step, {}, state).params["conv"]["kernel"]
    assert kernel.blocks == (cout if view == "decoupled" else 1)
    slices = np.asarray(cut).reshape(len(cut), kernel.blocks, -1).swapaxes(0, 1)
    ranks = np.linalg.matrix_rank(slices, tol=1e-5)
    assert ranks.max() < min(slices.shape[1:])

    run = lambda text, params: jax.jit(layer(text).apply)({"params": params}, x)
    expected = run("dense()", {"kernel": cut})
    for rank, same in ((ranks.max(), True), (ranks.max() - 1, False)):
        text = SCHEMES[view](rank, cout)
        bound = parse(text).bind(*view_shapes(view, window, cin, cout))
        assert (np.abs(run(text, jax.jit(bound.project)(cut)) - expected).max() < 1e-4) == same
    assert view_of(*view_shapes(view, window, cin, cout)) == (view, window)


def test_the_penalty_pulls_by_the_polar_factor_right_after_a_truncation():
    layer, x = StructuredDense(6), jnp.ones((2, 9))
    table = {"a": sites(layer, x)[""]}
    w = truncate(matrices(9, 6), 0.9)
    value = TRP(every=4, nuclear=0.25).penalty(table, 20)
    both = jax.jit(jax.value_and_grad(lambda w, step: value({"params": {"a": {"kernel": w}}}, step)))
    for step in (0, 3, 4, 5, 8):
        amount, grad = both(w, jnp.int32(step))
        due = step in (4, 8)
        assert float(amount) == pytest.approx(0.25 * due * np.linalg.norm(w, "nuc"), rel=1e-5)
        np.testing.assert_allclose(grad, 0.25 * due * np.asarray(polar_factor(w)), atol=1e-6)
    assert TRP(energy=1.0).rule(table, 20) is None and TRP(nuclear=0.0).penalty(table, 20) is None
    assert [s for s in range(1, 10) if TRP(every=4).rule(table, 20).due(jnp.int32(s))] == [4, 8]


def test_which_weights_it_acts_on():
    conv = lambda window, text="dense()": sites(StructuredConv(8, window, text), jnp.ones((1, 5, 5, 4)))[""]
    linear = lambda text, kind="linear": sites(StructuredDense(8, text, kind=kind), jnp.ones((1, 4)))[""]
    table = {
        "one": conv(1),
        "three": conv(3),
        "factored": conv(3, "low_rank(rank=2)"),
        "linear": linear("dense()"),
        "frozen": linear("frozen(dense())"),
        "patches": linear("dense()", "conv"),
        "head": linear("dense()", "head"),
    }
    assert find_kernels(table, "trp") == (Kernel(("three",), 1), Kernel(("linear",), 1))
    assert find_kernels(table, "trp", "th.*") == (Kernel(("three",), 1),)
    with pytest.raises(StructureError, match=r"trp: only='thre' matches no path; near: three"):
        find_kernels(table, "trp", "thre")
    with pytest.raises(StructureError, match=r"model has none; its sites: head dense\(\)"):
        find_kernels({"head": table["head"]}, "trp")


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("trp(energy=0.0)", r"energy must be in \(0, 1\], got 0.0"),
        ("trp(nuclear=-1)", "nuclear must not be negative, got -1.0"),
        ("trp(energy=1, nuclear=0)", "changes nothing; lower energy, such as 0.9"),
        ("trp(every=12)", "every=12 must be below the 12 steps of the run, such as 1"),
        ("trp(only='layer_0')", "only='layer_0' matches no path; near: layers_0"),
    ],
)
def test_refused(method, message):
    with pytest.raises(ConfigError, match=message):
        validate(small_digits(method=method))


@pytest.mark.long
def test_layers_of_a_scanned_group_are_truncated_each_by_itself(tmp_path):
    config = small_lm(tmp_path, method="trp(only='.*mlp/up')")
    config.model.layers = 2
    table = validate(config).table
    (kernel,) = find_kernels(table, "trp", ".*mlp/up")
    assert kernel == Kernel(("layers_0to1", "mlp", "up"), 1)
    both = jnp.stack([matrices(16, 64, decay=0.5), matrices(16, 64, decay=0.9)])
    params = {"layers_0to1": {"mlp": {"up": {"kernel": both}}}}
    state = TrainState(jnp.int32(5), params, {}, (), {}, jnp.zeros(2, jnp.int32))
    after = Truncate((kernel,), 5, 0.9).update(None, state.step, {}, state).params["layers_0to1"]["mlp"]["up"]["kernel"]
    for got, w in zip(after, both):
        np.testing.assert_allclose(got, truncate(w, 0.9), atol=1e-6)
    low, high = np.linalg.matrix_rank(np.asarray(after))
    assert low < high < 16
    found = TRP(only=".*mlp/up").report(table, {"params": {"layers_0to1": {"mlp": {"up": {"kernel": after}}}}})
    wanted = [int(np.sum(np.asarray(kept(jnp.linalg.svd(w, compute_uv=False), 0.9)))) for w in after]
    assert found == {"ranks": dict(zip(("layers_0/mlp/up", "layers_1/mlp/up"), wanted)), "energy": 0.9}
    assert wanted[0] <= low and wanted[1] <= high
    with pytest.raises(StructureError, match=r"picks layers_0/mlp/up and not layers_1/mlp/up, .* model.scan=False"):
        find_kernels(table, "trp", "layers_0/mlp/up")


@pytest.mark.long
def test_a_run_ends_at_a_low_rank_and_its_projection_loses_nothing(tmp_path):
    config = small_digits(method="trp(every=3, energy=0.9)", steps=12)
    record = loop.train(config, tmp_path / "plain")
    run = load_run(tmp_path / "plain")
    w = np.asarray(run.variables["params"]["layers_0"]["kernel"])
    k = int(np.linalg.matrix_rank(w))
    assert 1 <= record.metrics["method_report"]["ranks"]["layers_0"] <= k
    assert k < 16 and run.variables["params"]["head"]["kernel"].shape == (16, 10)
    config.switch = f"end: low_rank(rank={k})"
    (row,) = loop.train(config, tmp_path / "cut").metrics["switches"]
    assert row["worst_error"] < 1e-5 and k > 1
    config.switch = f"end: low_rank(rank={k - 1})"
    (row,) = loop.train(config, tmp_path / "less").metrics["switches"]
    assert row["worst_error"] > 1e-3
