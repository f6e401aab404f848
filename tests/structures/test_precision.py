"""Projections in single against double precision, on inputs that punish lost digits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import structmat
from tests.structures.cases import CASES, bind, is_float, label, projects

CLOSED = [c for c in CASES if projects(bind(c)) and (bind(c).exact or bind(c).structure.name.endswith("tensor_train"))]
PER_NAME = {c[0].partition("(")[0]: c for c in CLOSED}.values()
EPS = np.finfo(np.float32).eps


def orthonormal(rng, n, k):
    return np.linalg.qr(rng.normal(size=(n, k)))[0]


def hard(n, m):
    """Matrices rounded to single precision: nearly singular, singular values or rows over six decades, rank one."""
    rng, k = np.random.default_rng(0), min(n, m)
    found = {
        "hilbert": 1 / (np.arange(n)[:, None] + np.arange(m) + 1),
        "graded spectrum": (orthonormal(rng, n, k) * np.logspace(0, -6, k)) @ orthonormal(rng, m, k).T,
        "graded rows": np.logspace(0, -6, n)[:, None] * rng.normal(size=(n, m)),
        "rank one": np.outer(np.linspace(1, 2, n), np.linspace(1, 3, m)),
    }
    return {name: rounded(w) for name, w in found.items()}


def rounded(w):
    return w.astype(np.float32).astype(np.float64)


def wide(params):
    to = lambda p: np.asarray(p, np.complex128 if np.iscomplexobj(p) else np.float64)
    return jax.tree.map(lambda p: to(p) if is_float(p) else p, params)


def weighted(d, in_gram, out_gram):
    full = lambda g, n: np.eye(n) if g is None else np.diag(g) if g.ndim == 1 else np.asarray(g, np.float64)
    return np.sqrt(max(0.0, np.trace(d.T @ full(in_gram, d.shape[0]) @ d @ full(out_gram, d.shape[1])).real))


def errors(bound, ws, **grams):
    """Per matrix the error of the projection in f32 and in f64, both measured in f64."""
    found = []
    for dtype in (jnp.float32, jnp.float64):
        given = {k: jnp.asarray(g, dtype) for k, g in grams.items()}
        project = jax.jit(lambda w, given=given: bound.project(w, key=jax.random.key(1), **given))
        each = [project(jnp.asarray(w, dtype)) for w in ws]
        assert {jnp.finfo(p.dtype).bits for p in jax.tree.leaves(each) if is_float(p)} <= {jnp.finfo(dtype).bits}
        differences = [w - np.asarray(bound.materialize(wide(p))) for w, p in zip(ws, each)]
        found.append([weighted(d, grams.get("in_gram"), grams.get("out_gram")) for d in differences])
    return zip(*found)


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[pytest.mark.long] * (i % 6 > 0), id=label(c)) for i, c in enumerate(PER_NAME)]
)
def test_single_precision_loses_only_its_rounding(case):
    """The error in f32 exceeds that in f64 by less than 8 eps |w|, however small the error is itself."""
    bound = bind(case)
    with jax.enable_x64(True):
        inputs = hard(bound.d_in, bound.d_out)
        for (name, w), (single, double) in zip(inputs.items(), errors(bound, inputs.values())):
            assert single - double < 8 * EPS * np.linalg.norm(w), name


@pytest.mark.long
@pytest.mark.parametrize("text", ["low_rank(rank=6)", "low_rank(rank=12)", "spectral(rank=12)"])
@pytest.mark.parametrize("sides", ["in", "out", "both"])
def test_ill_conditioned_grams_cost_no_digits(text, sides):
    """With full grams of condition 1e8 the excess is within 16 eps of the weighted size of w."""
    n, m, rng = 24, 36, np.random.default_rng(0)
    grams = {}
    for side, k in (("in", n), ("out", m)):
        if sides in (side, "both"):
            q = orthonormal(rng, k, k)
            grams[f"{side}_gram"] = rounded((q * np.logspace(0, -8, k)) @ q.T)
    bound = structmat.parse(text).bind(n, m)
    with jax.enable_x64(True):
        inputs = hard(n, m)
        for (name, w), (single, double) in zip(inputs.items(), errors(bound, inputs.values(), **grams)):
            assert single - double < 16 * EPS * weighted(w, grams.get("in_gram"), grams.get("out_gram")), name


def test_a_small_tail_keeps_its_digits():
    """Rank 20 of singular values from 1 to 1e-4: the f32 error, 1e-3 of |w|, is the optimum to 1e-5 of itself."""
    rng = np.random.default_rng(1)
    w = (orthonormal(rng, 60, 40) * np.logspace(0, -4, 40)) @ orthonormal(rng, 50, 40).T
    w = w.astype(np.float32)
    best = np.linalg.norm(np.linalg.svd(w.astype(np.float64), compute_uv=False)[20:])
    for text in ("low_rank(rank=20)", "spectral(rank=20)"):
        m = structmat.project(w, text)
        error = np.linalg.norm(w - np.asarray(m.bound.materialize(wide(m.params))))
        assert best * (1 - 1e-6) <= error <= best * (1 + 1e-5)
