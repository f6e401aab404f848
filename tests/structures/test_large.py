"""Stacks, compilation once, memory refused before it is spent, and the randomised SVD."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import structmat
from structmat import StructureError
from structmat.structures import large, project_stack, stacks, svd_method
from structmat.structures.linalg import current_svd, truncated_svd
from structmat.structures.low_rank import BoundLowRank

RNG = np.random.default_rng(0)
STACK = RNG.normal(size=(2, 3, 16, 12)).astype(np.float32)
COMPILED = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: COMPILED.append(event) if event.endswith("backend_compile_duration") else None
)


def compiles(act):
    """How many programs `act` compiles."""
    before = len(COMPILED)
    jax.block_until_ready(act())
    return len(COMPILED) - before


def same(actual, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-5), actual, expected)


# -- stacks ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["low_rank(rank=3)", "monarch(blocks=2)", "n_m_sparse(2, 4)", "frozen(block_diagonal(blocks=2))"]
)
@pytest.mark.parametrize("how", ["at once", "mapped", "streamed"])
def test_a_stack_is_what_a_loop_gives(text, how, monkeypatch):
    ran = []
    run = stacks._run
    monkeypatch.setattr(stacks, "_run", Spy(run, ran))
    if how != "at once":
        monkeypatch.setattr(stacks, "_need", lambda b, m, mode, *_: (True, 10**12 if mode == "vmap" else 0))
    w = STACK if how == "streamed" else jnp.asarray(STACK)
    bound, params = project_stack(w, text)
    assert ran == {"at once": ["vmap"], "mapped": ["map"], "streamed": ["one"] * 6}[how]
    for at in np.ndindex(2, 3):
        one = structmat.project(STACK[at], text)
        assert one.bound == bound
        same(jax.tree.map(lambda p, at=at: p[at], params), one.params)


class Spy:
    """`_run` that notes the mode of every call."""

    def __init__(self, run, ran):
        self.run, self.ran, self.trace = run, ran, run.trace

    def __call__(self, bound, method, mode, arrays):
        self.ran.append(mode)
        return self.run(bound, method, mode, arrays)


def test_a_memory_mapped_stack_is_streamed(tmp_path):
    np.save(tmp_path / "w.npy", STACK)
    mapped = np.load(tmp_path / "w.npy", mmap_mode="r")
    bound, params = project_stack(mapped, "low_rank(rank=3)", limit=7000)
    assert 7000 < large.least_bytes(trace(bound, "vmap", jnp.asarray(STACK.reshape(6, 16, 12))))
    same(params, project_stack(STACK, "low_rank(rank=3)")[1])


def test_everything_else_is_stacked_too():
    """Keys differ per matrix; `like` and grams go with their matrix."""
    text = "random_sparse(density=0.25)"
    bound, drawn = project_stack(STACK, text, key=jax.random.key(3))
    assert len({rows.tobytes() for rows in np.asarray(drawn["rows"]).reshape(6, -1)}) == 6
    again = project_stack(STACK, text, like=drawn)[1]
    same(again, drawn)
    grams = RNG.uniform(0.1, 3, size=(2, 3, 16)).astype(np.float32)
    weighted = project_stack(STACK, "low_rank(rank=3)", in_gram=grams)[1]
    one = structmat.project(STACK[1, 2], "low_rank(rank=3)", in_gram=grams[1, 2])
    same(weighted["a"][1, 2], one.params["a"])
    assert bound == structmat.parse(text).bind(16, 12)


def test_under_a_trace():
    errors = jax.jit(
        lambda w: jnp.sum((w - jax.vmap(jax.vmap(bound.materialize))(project_stack(w, bound.structure)[1])) ** 2)
    )
    bound = structmat.parse("low_rank(rank=3)").bind(16, 12)
    tails = np.linalg.svd(STACK, compute_uv=False)[..., 3:]
    assert float(errors(STACK)) == pytest.approx(np.sum(tails**2), rel=1e-5)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: project_stack(STACK[0, 0], "diagonal()"), r"needs a stack \(..., d_in, d_out\), got .* \(16, 12\)"),
        (lambda: project_stack(STACK[:0], "low_rank(rank=1)"), r"got an array of shape \(0, 3, 16, 12\)"),
        (lambda: structmat.project(STACK, "low_rank(rank=1)"), "project_stack projects every matrix of a stack"),
        (lambda: project_stack(STACK, "low_rank(rank=3)", in_gram=np.ones(16)), r"in_gram must have the leading axes \(2, 3\)"),
        (lambda: project_stack(STACK, "low_rank(rank=3)", out_gram=-np.ones((2, 3, 12))), "smallest is -1"),
        (lambda: structmat.project(STACK[0, 0], "low_rank(rank=3)", in_gram=-np.ones(16)), "smallest is -1"),
        (lambda: structmat.project(STACK[0, 0], "low_rank(rank=3)", like={"a": 0}), "like does not hold the parameters of low_rank"),
        (lambda: structmat.project(STACK[0, 0], "low_rank(rank=3)", like={"a": np.ones((3, 12)), "b": np.ones((3, 12))}),
         r"shape \(3, 12\) where \(3, 16\) is expected"),
    ],
)  # fmt: skip
def test_refusals(act, message):
    with pytest.raises(StructureError, match=message):
        act()


# -- compilation -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["low_rank(rank=2)", "low_rank(rank=2) + diagonal()"])
def test_compiled_once_per_structure_and_shape(text, monkeypatch):
    traced = []
    own = BoundLowRank.project
    monkeypatch.setattr(BoundLowRank, "project", lambda self, w, **k: traced.append(1) or own(self, w, **k))
    ws = [jnp.asarray(RNG.normal(size=(14, 14)).astype(np.float32)) for _ in range(3)]
    assert compiles(lambda: structmat.project(ws[0], text).params) == 1
    count = len(traced)
    assert compiles(lambda: [structmat.project(w, text).params for w in ws]) == 0 and len(traced) == count
    assert compiles(lambda: structmat.project(np.eye(14, dtype=np.float32), text).params) == 0
    assert len(traced) == count
    stack = jnp.stack(ws)
    assert compiles(lambda: project_stack(stack, text)[1]) <= 2  # the projection, and the split keys of a sum
    count = len(traced)
    assert compiles(lambda: project_stack(stack + 1, text)[1]) <= 1 and len(traced) == count  # the sum


# -- memory ----------------------------------------------------------------------------------------------------------------


def trace(bound, mode, w):
    return stacks._run.trace(bound, current_svd(), mode, {"w": w})


def test_what_does_not_fit_is_refused_before_it_is_compiled():
    w = jnp.asarray(RNG.normal(size=(512, 512)).astype(np.float32))
    refused = lambda: structmat.project(w, "low_rank(rank=2)", limit=4 * 2**20)

    def act():
        with pytest.raises(
            StructureError,
            match=r"projecting a matrix \(512, 512\) float32 onto low_rank\(rank=2\) needs at least 7 MiB, and the limit is "
            r"4 MiB; inside `with structmat.svd_method\('randomized'\):` it needs at least .*; or allow more with limit=",
        ):
            refused()

    assert compiles(act) == 0
    with svd_method("randomized"):
        assert refused().shape == (512, 512)


def test_between_the_lower_bound_and_the_need_the_program_itself_is_asked():
    w = jnp.ones((64, 48))
    bound = structmat.parse("low_rank(rank=4)").bind(64, 48)
    traced = trace(bound, "one", w)
    least, need = large.least_bytes(traced), large.compiled_bytes(traced)
    assert least < need
    with pytest.raises(StructureError, match=r"needs [\d.]+ KiB, and"):
        structmat.project(w, "low_rank(rank=4)", limit=(least + need) // 2)
    structmat.project(w, "low_rank(rank=4)", limit=need)


def test_a_device_stack_that_cannot_be_mapped_names_the_way_out():
    with pytest.raises(StructureError, match=r"a stack \(6, 16, 12\) .* pass w as a numpy array, which is moved"):
        project_stack(jnp.asarray(STACK), "low_rank(rank=3)", limit=5000)


def test_the_estimate_counts_what_lapack_takes():
    """Economy SVD of (m, n) with k = min: U, s, V^T and 4 k^2 of workspace, whatever wraps it."""
    bound = structmat.parse("low_rank(rank=4)").bind(64, 48)
    expected = 4 * (64 * 48 + (64 * 48 + 48 + 48 * 48) + 4 * 48**2)
    assert large.least_bytes(trace(bound, "one", jnp.ones((64, 48)))) == expected
    outer = structmat.parse("frozen(scaled(low_rank(rank=4), s=2.0))").bind(64, 48)
    assert large.least_bytes(trace(outer, "one", jnp.ones((64, 48)))) == expected
    sums = structmat.parse("low_rank(rank=4) + diagonal()").bind(48, 48)  # inside a while loop
    assert large.least_bytes(trace(sums, "one", jnp.ones((48, 48)))) == 4 * (48 * 48 + (2 * 48 * 48 + 48) + 4 * 48**2)


def test_free_memory_is_that_of_the_device_or_the_host(monkeypatch, tmp_path):
    w = jnp.ones((8, 8))
    host = large.free_bytes({})
    assert 2**20 < host < 2**50
    monkeypatch.setattr(large, "_system_bytes", lambda: 10**9)
    monkeypatch.setattr(large, "_CGROUP", tmp_path)
    assert large.free_bytes({"w": np.ones((8, 8))}) == 10**9
    assert large.free_bytes({"w": w}) == 10**9 + 256
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.stat").write_text("anon 500\nfile 400\n")
    assert large.free_bytes({}) == 500
    (tmp_path / "memory.max").write_text("max\n")
    assert large.free_bytes({}) == 10**9

    class Device:
        id = 0
        memory_stats = staticmethod(lambda: {"bytes_limit": 1000, "bytes_in_use": 300})

    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    assert large.free_bytes({}) == 700


# -- randomised SVD --------------------------------------------------------------------------------------------------------


def decaying(n, m, power=-1.0):
    rng = np.random.default_rng(4)
    k = min(n, m)
    u, v = (np.linalg.qr(rng.normal(size=(d, k)))[0] for d in (n, m))
    return ((u * np.arange(1, k + 1) ** power) @ v.T).astype(np.float32)


@pytest.mark.long
@pytest.mark.parametrize(("shape", "dtype"), [((256, 320), np.float32), ((320, 256), np.complex64)])
def test_randomized_is_near_the_optimum(shape, dtype):
    w = decaying(*shape).astype(dtype)
    w = w * np.exp(1j * np.arange(shape[1])).astype(dtype) if dtype == np.complex64 else w
    with svd_method("randomized"):
        u, s, vt = truncated_svd(jnp.stack([w, 2 * w]), 4)
    singular = np.linalg.svd(w, compute_uv=False)
    np.testing.assert_allclose(s, [singular[:4], 2 * singular[:4]], rtol=1e-5)
    for i in range(2):
        error = np.linalg.norm((1 + i) * w - np.asarray((u[i] * s[i]) @ vt[i]))
        assert error <= (1 + i) * np.linalg.norm(singular[4:]) * (1 + 1e-5)
        np.testing.assert_allclose(u[i].T.conj() @ u[i], np.eye(4), atol=1e-5)
        np.testing.assert_allclose(vt[i] @ vt[i].T.conj(), np.eye(4), atol=1e-5)
    peaks = np.take_along_axis(np.asarray(u), np.abs(u).argmax(1)[:, None], 1)
    assert np.all(peaks.real > 0) and np.all(np.abs(peaks.imag) < 1e-6)


def test_more_iterations_are_nearer_on_a_flat_spectrum():
    w = RNG.normal(size=(400, 300)).astype(np.float32)
    best = np.linalg.norm(np.linalg.svd(w, compute_uv=False)[3:])
    ratios = []
    for iterations in (0, 2, 6):
        with svd_method("randomized", iterations=iterations):
            ratios.append(float(jnp.linalg.norm(w - structmat.project(w, "low_rank(rank=3)").materialize()) / best))
    assert ratios[0] > ratios[1] > ratios[2] > 1 + 1e-6
    assert ratios[2] < 1 + 2e-3


def test_it_is_taken_only_where_asked_and_where_it_pays():
    names = lambda n, rank: str(jax.make_jaxpr(lambda w: truncated_svd(w, rank))(jnp.ones((n, n))))
    exact = names(300, 3)
    assert current_svd().name == "exact"
    with svd_method("randomized"):
        assert "qr" in names(300, 3) and "qr" not in names(100, 3) and "qr" not in names(300, 20)
        with svd_method("exact"):
            assert names(300, 3) == exact
    assert current_svd().name == "exact" and names(300, 3) == exact


@pytest.mark.long
@pytest.mark.parametrize("text", ["low_rank(rank=2)", "low_rank(rank=2) + diagonal()"])
def test_methods_are_compiled_apart(text):
    """What was projected exactly before is projected anew, also the inner loop of a sum (alone at work from zeros)."""
    w = RNG.normal(size=(192, 192)).astype(np.float32)
    shapes = jax.eval_shape(structmat.parse(text).bind(192, 192).init, jax.random.key(0))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    exact = structmat.project(w, text, like=zeros).materialize()
    with svd_method("randomized", iterations=1, seed=1):
        first = structmat.project(w, text, like=zeros).materialize()
    with svd_method("randomized", iterations=1, seed=2):
        second = structmat.project(w, text, like=zeros).materialize()
    for a, b in ((exact, first), (first, second)):
        assert np.linalg.norm(a - b) > 1e-3 * np.linalg.norm(a)
    np.testing.assert_array_equal(structmat.project(w, text, like=zeros).materialize(), exact)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "randomised"}, "svd_method: no method 'randomised'; did you mean 'randomized'"),
        ({"name": "randomized", "iterations": -1}, "iterations must not be negative, got -1"),
    ],
)
def test_bad_methods(arguments, message):
    with pytest.raises(StructureError, match=message):
        svd_method(**arguments)
