"""Alternating projection onto sums: monotone, no worse than the plain reference, weighted by grams."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import structmat
from structmat import StructureError
from structmat.structures import algebra
from structmat.structures.low_rank import BoundLowRank
from tests.structures.test_projection import psd, weighted

N, M, RANK, KEPT = 48, 64, 4, 3
SPARSE = f"low_rank(rank={RANK}) + random_sparse(density={KEPT / N}, select='magnitude')"


def matrices():
    rng = np.random.default_rng(0)
    i, j = np.arange(N)[:, None], np.arange(M)
    return {
        "normal": rng.normal(size=(N, M)),
        "heavy tail": rng.normal(size=(N, M)) * np.exp(rng.normal(size=M)),
        "AR(1)": 0.5 ** np.abs(i - j),
        "Hilbert": 1 / (i + j + 1),
    }


def svd_term(w):
    u, s, vt = np.linalg.svd(w, full_matrices=False)
    return (u[:, :RANK] * s[:RANK]) @ vt[:RANK]


def sparse_term(w):
    rows = np.argsort(-np.abs(w), axis=0, kind="stable")[:KEPT]
    kept = np.zeros_like(w)
    np.put_along_axis(kept, rows, np.take_along_axis(w, rows, 0), 0)
    return kept


def godec(w, sweeps):
    """Errors of GoDec (Zhou and Tao 2011) with exact SVDs in double precision, sparse per column: start and every sweep."""
    low = svd_term(w)
    sparse = sparse_term(w - low)
    found = [np.linalg.norm(w - low - sparse)]
    for _ in range(sweeps):
        low = svd_term(w - sparse)
        sparse = sparse_term(w - low)
        found.append(np.linalg.norm(w - low - sparse))
    return found


@pytest.mark.parametrize("name", matrices())
def test_low_rank_plus_sparse_is_no_worse_than_godec(name):
    w = matrices()[name].astype(np.float32)
    reference = godec(w.astype(np.float64), algebra.SWEEPS)
    ours = np.linalg.norm(w - structmat.project(w, SPARSE).materialize())
    assert ours <= reference[-1] * (1 + 1e-5) + 1e-6 * np.linalg.norm(w)
    assert ours < 0.999 * reference[0], "no better than the greedy start"


@pytest.mark.long
def test_every_sweep_lowers_the_error(monkeypatch):
    """Sweep by sweep the errors are those of the reference, and fall."""
    w = matrices()["heavy tail"].astype(np.float32)
    reference = godec(w.astype(np.float64), 6)
    bound = structmat.parse(SPARSE).bind(N, M)
    monkeypatch.setattr(algebra, "SWEEPS", 1)
    params = None
    for expected in reference[1:]:
        params = bound.project(w, like=params)
        assert np.linalg.norm(w - bound.materialize(params)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("spoiled", [0, 1])
def test_a_worse_step_is_rejected(spoiled, monkeypatch):
    """A term whose projection returns noise changes nothing; the other terms go on."""
    own = BoundLowRank.project
    which = []

    def noise(self, w, **kwargs):
        found = own(self, w, **kwargs)
        bad = self.structure.rank == 2 + spoiled
        which.append(bad)
        key = jax.random.key(5)
        return {n: 10 * jax.random.normal(key, p.shape, p.dtype) if bad else p for n, p in found.items()}

    monkeypatch.setattr(BoundLowRank, "project", noise)
    bound = structmat.parse("low_rank(rank=2) + low_rank(rank=3)").bind(12, 16 + spoiled)  # compiled anew
    w = jnp.asarray(np.random.default_rng(1).normal(size=(12, 16 + spoiled)), jnp.float32)
    like = bound.init(jax.random.key(0))
    found = bound.project(w, like=like)
    assert any(which)
    jax.tree.map(np.testing.assert_array_equal, found[str(spoiled)], like[str(spoiled)])
    error = lambda p: float(jnp.linalg.norm(w - bound.materialize(p)))
    rest = np.asarray(w - bound.terms[spoiled].materialize(like[str(spoiled)]))
    tail = np.linalg.svd(rest, compute_uv=False)[bound.terms[1 - spoiled].structure.rank :]
    assert error(found) == pytest.approx(np.linalg.norm(tail), rel=1e-5) and error(found) < error(like)


def test_the_support_of_a_random_term_is_kept():
    w = matrices()["normal"].astype(np.float32)
    bound = structmat.parse(f"low_rank(rank={RANK}) + random_sparse(density=0.1)").bind(N, M)
    first = bound.project(w, key=jax.random.key(1))
    second = bound.project(w, key=jax.random.key(2), like=first)
    np.testing.assert_array_equal(first["1"]["rows"], second["1"]["rows"])
    errors = [np.linalg.norm(w - bound.materialize(p)) for p in (first, second)]
    assert errors[1] <= errors[0] * (1 + 1e-6)


@pytest.mark.long
@pytest.mark.parametrize(
    ("text", "level"),
    [
        ("dense() + low_rank(rank=2)", "full"),
        ("frozen(low_rank(rank=2)) + spectral(rank=3)", "full"),
        ("low_rank(rank=2) + diagonal()", "diagonal"),
        ("low_rank(rank=2) + kronecker()", "none"),
    ],
)
def test_a_sum_takes_the_grams_of_its_weakest_term(text, level):
    rng = np.random.default_rng(2)
    bound = structmat.parse(text).bind(12, 12)
    w = rng.normal(size=(12, 12)).astype(np.float32)
    assert bound.grams == level
    for kind, gram in (("diagonal", rng.uniform(0.1, 3, 12).astype(np.float32)), ("full", psd(12, rng))):
        for side in ("in_gram", "out_gram"):
            if algebra._LEVELS.index(kind) <= algebra._LEVELS.index(level):
                bound.project(w, **{side: gram})
                continue
            with pytest.raises(StructureError, match=f"no closed form with a {kind} {side}, so neither has the sum"):
                bound.project(w, **{side: gram})


def test_the_weighted_error_falls_too():
    """Weighted alternation ends below the unweighted one, below the weighted greedy start, and never above `like`."""
    rng = np.random.default_rng(3)
    bound = structmat.parse("low_rank(rank=3) + diagonal()").bind(16, 16)
    w = rng.normal(size=(16, 16)).astype(np.float32)
    grams = {side: np.exp(rng.normal(size=16)).astype(np.float32) for side in ("in_gram", "out_gram")}
    size = lambda p: weighted(w - bound.materialize(p), **grams)
    first = bound.terms[0].project(w, **grams)
    greedy = {"0": first, "1": bound.terms[1].project(w - bound.terms[0].materialize(first), **grams)}
    found = bound.project(w, **grams)
    assert size(found) < 0.99 * size(greedy) and size(found) < 0.9 * size(bound.project(w))
    for seed in range(3):
        like = jax.tree.map(
            lambda p, seed=seed: p + 0.01 * np.random.default_rng(seed).normal(size=p.shape).astype(np.float32), found
        )
        assert size(bound.project(w, like=like, **grams)) <= size(like)


def test_bfloat16_sums_are_projected_in_float32():
    w = matrices()["heavy tail"].astype(np.float32)
    bound = structmat.parse(SPARSE).bind(N, M)
    narrow = bound.project(jnp.asarray(w, jnp.bfloat16))
    assert {p.dtype for p in jax.tree.leaves(narrow)} == {jnp.dtype("bfloat16"), jnp.dtype("int32")}
    again = bound.project(jnp.asarray(w, jnp.bfloat16), like=narrow)
    best = np.linalg.norm(w - bound.materialize(bound.project(w)))
    for found in (narrow, again):
        assert np.linalg.norm(w - np.asarray(bound.materialize(found), np.float32)) < best * 1.02


@pytest.mark.long
def test_the_order_of_the_terms_does_not_matter():
    """Both greedy orders are descended from: greedy 4-bit rounding first would leave low rank its rounding errors only."""
    rng = np.random.default_rng(11)
    w = jnp.asarray(rng.normal(size=(32, 4)) @ rng.normal(size=(4, 32)) + 0.1 * rng.normal(size=(32, 32)), jnp.float32)
    terms = ["quantized(4, group=32)", "low_rank(rank=4)"]
    errors = [float(structmat.project(w, " + ".join(order)).error(w)) for order in (terms, terms[::-1])]
    np.testing.assert_allclose(errors[0], errors[1], rtol=1e-4)
    alone = float(structmat.project(w, terms[0]).error(w))
    assert errors[0] < 0.5 * alone
