"""Solvers against solutions in closed form and independent solvers, fields against their spectrum, sets against damage."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import sparse
from scipy.sparse.linalg import spsolve

from structmat.data import pde
from structmat.data.errors import DataError
from structmat.data.pde import store

TAU = 2 * np.pi


def plane(n):
    """x and y, broadcasting to (n, n)."""
    x = np.arange(n) / n
    return x[:, None], x[None, :]


def largest(a):
    return float(np.max(np.abs(np.asarray(a))))


# -- random fields -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dimensions", "size", "modes"), [(1, 32, 16), (2, 16, 9)])
def test_torus_fields_have_the_spectrum_they_claim(dimensions, size, modes):
    """Every mode's variance within 5.5 standard errors of the formula, those beyond `modes` zero, like the mean."""
    draws = 4000
    draw = jax.jit(
        jax.vmap(lambda key: pde.torus_field(key, size, dimensions, alpha=2.0, tau=5.0, sigma=25.0, modes=modes))
    )
    fields = np.asarray(draw(jax.random.split(jax.random.key(0), draws)), np.float64)
    power = np.mean(np.abs(np.fft.fftn(fields, axes=range(1, dimensions + 1), norm="forward")) ** 2, 0)
    k = np.stack(np.meshgrid(*[np.fft.fftfreq(size, 1 / size)] * dimensions, indexing="ij"))
    expected = 625 * (4 * np.pi**2 * (k**2).sum(0) + 25) ** -2.0
    inside = (2 * np.abs(k) < modes).all(0) & (k != 0).any(0)
    assert inside.sum() == (2 * ((modes - 1) // 2) + 1) ** dimensions - 1
    np.testing.assert_allclose(power[inside], expected[inside], rtol=5.5 / math.sqrt(draws))
    assert power[~inside].max() < 1e-12 * power.max()


@pytest.mark.long
def test_a_random_field_is_the_same_function_on_every_grid():
    with jax.enable_x64(True):
        f64 = {"modes": 16, "dtype": jnp.float64}
        key = jax.random.key(1)
        torus = [pde.torus_field(key, n, 2, **f64) for n in (16, 48)]
        np.testing.assert_allclose(torus[0], torus[1][::3, ::3], atol=1e-13)
        box = [pde.neumann_field(key, n, **f64) for n in (17, 33)]
        np.testing.assert_allclose(box[0], box[1][::2, ::2], atol=1e-13)
    with pytest.raises(DataError, match="16 modes a side needs a grid as fine, got 8"):
        pde.torus_field(key, 8, modes=16)


def test_neumann_fields_are_sums_of_cosines_with_the_right_variance():
    draws, modes = 4000, 6
    draw = jax.jit(jax.vmap(lambda key: pde.neumann_field(key, 9, alpha=2.0, tau=3.0, modes=modes)))
    fields = np.asarray(draw(jax.random.split(jax.random.key(2), draws)), np.float64)
    k = np.arange(modes)
    variance = 9.0 * (np.pi**2 * (k[:, None] ** 2 + k**2) + 9) ** -2.0
    variance[0, 0] = 0
    waves = np.cos(np.pi * np.outer(np.linspace(0, 1, 9), k)) ** 2 * np.where(k > 0, 2, 1)
    np.testing.assert_allclose((fields**2).mean(0), waves @ variance @ waves.T, rtol=0.12)
    back = np.linalg.pinv(np.cos(np.pi * np.outer(np.linspace(0, 1, 9), k)))
    assert largest(np.einsum("kx,nxy,ly->nkl", back, fields, back)[:, 0, 0]) < 1e-5, "mean of zero over the square"


# -- Navier-Stokes -------------------------------------------------------------------------------------------------------


def test_taylor_green_decays_as_it_must():
    """exp(-8 pi^2 nu t), and the discrete factor of Crank-Nicolson to rounding."""
    x, y = plane(16)
    vortex, nu, time, steps = np.cos(TAU * x) * np.cos(TAU * y), 0.01, 1.0, 200
    with jax.enable_x64(True):
        got = np.asarray(pde.solve_navier_stokes(jnp.asarray(vortex), nu, time, time / steps, snapshots=2))
    rate = 8 * np.pi**2 * nu
    for w, t in zip(got, (0.5, 1.0)):
        np.testing.assert_allclose(w, vortex * math.exp(-rate * t), atol=2e-6)
        half = rate * time / steps / 2
        np.testing.assert_allclose(w, vortex * ((1 - half) / (1 + half)) ** round(steps * t), atol=1e-13)


def test_one_step_is_transport_and_forcing():
    """u . grad w worked out by hand: w = cos 2 pi x + cos 4 pi y has psi_y w_x - psi_x w_y = -1.5 sin 2 pi x sin 4 pi y."""
    x, y = plane(16)
    dt = 1e-3
    with jax.enable_x64(True):
        start = jnp.asarray(np.cos(TAU * x) + np.cos(2 * TAU * y))
        got = pde.solve_navier_stokes(start, 0.0, dt, dt, forcing=pde.standard_forcing(16, dtype=jnp.float64))[0]
        push = 0.1 * (np.sin(TAU * (x + y)) + np.cos(TAU * (x + y)))
        np.testing.assert_allclose((got - start) / dt, 1.5 * np.sin(TAU * x) * np.sin(2 * TAU * y) + push, atol=1e-10)


def test_transport_conserves_enstrophy_and_diffusion_destroys_it():
    """One tiny step: the change of mean w^2 is the one of diffusion, -2 nu |grad w|^2, to first order in dt."""
    with jax.enable_x64(True):
        noise = np.random.default_rng(0).normal(size=(24, 24))
        modes = np.fft.rfft2(noise)
        kx, ky = np.fft.fftfreq(24, 1 / 24)[:, None], np.arange(13)[None]
        modes[(3 * np.abs(kx) >= 24) | (3 * ky >= 24)] = 0
        modes[0, 0] = 0
        w = np.fft.irfft2(modes)
        gradient = np.mean(np.fft.irfft2(TAU * kx * 1j * modes) ** 2 + np.fft.irfft2(TAU * ky * 1j * modes) ** 2)
        dt, start = 1e-7, np.mean(w**2)
        for nu in (0.0, 1e-3):
            after = np.asarray(pde.solve_navier_stokes(jnp.asarray(w), nu, dt, dt)[0])
            second = np.mean((after - w) ** 2)
            assert np.mean(after**2) - start == pytest.approx(second - 2 * nu * gradient * dt, abs=start * 1e-10)
        later = pde.solve_navier_stokes(jnp.asarray(w), 1e-3, 0.1, 5e-3, snapshots=5)
        enstrophy = [start, *np.mean(np.asarray(later) ** 2, (1, 2))]
        assert (np.diff(enstrophy) < -1e-3 * start).all(), enstrophy


def test_the_error_of_a_step_is_first_order():
    with jax.enable_x64(True):
        start = 5 * pde.torus_field(jax.random.key(3), 16, 2, modes=8, dtype=jnp.float64)
        push = pde.standard_forcing(16, dtype=jnp.float64)
        got = [pde.solve_navier_stokes(start, 1e-3, 0.4, 0.4 / n, forcing=push) for n in (10, 20, 40)]
        assert largest(got[0] - got[1]) > 1e-4
        assert largest(got[0] - got[1]) / largest(got[1] - got[2]) == pytest.approx(2, abs=0.1)


@pytest.mark.long
def test_a_resolved_flow_is_the_same_on_a_finer_grid():
    with jax.enable_x64(True):
        solve = lambda n: pde.solve_navier_stokes(
            pde.torus_field(jax.random.key(3), n, 2, modes=8, dtype=jnp.float64),
            1e-2,
            0.5,
            0.025,
            forcing=pde.standard_forcing(n, dtype=jnp.float64),
        )
        coarse, fine = solve(32), solve(64)
        assert largest(coarse - fine[..., ::2, ::2]) < 1e-9 < largest(coarse)


def test_steps_that_do_not_fit_are_refused():
    with pytest.raises(DataError, match=r"dt 0.3 does not divide the time 1.0 into 2 equal parts; 0.25 does"):
        pde.solve_navier_stokes(jnp.zeros((8, 8)), 0.1, 1.0, 0.3, snapshots=2)
    with pytest.raises(DataError, match="must be above 0"):
        pde.solve_burgers(jnp.zeros(8), 0.1, 1.0, 0.0)


# -- Burgers -------------------------------------------------------------------------------------------------------------


def cole_hopf(start, nu, t):
    """u = -2 nu phi_x / phi, phi of the heat equation from exp(-integral of u / 2 nu); float64 in numpy."""
    n = len(start)
    k = TAU * np.fft.fftfreq(n, 1 / n)
    modes = np.fft.fft(start)
    integral = np.fft.ifft(np.divide(modes, 1j * k, out=np.zeros_like(modes), where=k != 0)).real
    phi = np.fft.fft(np.exp(-integral / (2 * nu))) * np.exp(-nu * k**2 * t)
    return -2 * nu * np.fft.ifft(1j * k * phi).real / np.fft.ifft(phi).real


def test_burgers_is_the_cole_hopf_solution():
    n, nu = 128, 0.02
    x = np.arange(n) / n
    start = np.stack([np.sin(TAU * x), 0.5 * np.cos(2 * TAU * x) - 0.7 * np.sin(TAU * x)])
    with jax.enable_x64(True):
        got = np.asarray(pde.solve_burgers(jnp.asarray(start), nu, 0.5, 1 / 400, snapshots=2))
        rough = np.asarray(pde.solve_burgers(jnp.asarray(start), nu, 0.5, 1 / 200, snapshots=2))
    assert got.shape == (2, 2, n)
    expected = np.stack([[cole_hopf(u, nu, t) for t in (0.25, 0.5)] for u in start])
    np.testing.assert_allclose(got, expected, atol=2e-6)
    assert largest(rough - expected) / largest(got - expected) == pytest.approx(16, rel=0.25)


# -- Darcy ---------------------------------------------------------------------------------------------------------------


def direct(a, source):
    """The five-point scheme as a sparse matrix, face by face, solved by elimination."""
    n = len(a)
    number = lambda i, j: i * n + j
    rows, columns, values = [], [], []
    for i in range(n):
        for j in range(n):
            if i in (0, n - 1) or j in (0, n - 1):
                rows.append(number(i, j)), columns.append(number(i, j)), values.append(1.0)
                continue
            for p, q in ((i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)):
                face = (a[i, j] + a[p, q]) / 2 * (n - 1) ** 2
                rows.extend([number(i, j)] * 2)
                columns.extend([number(i, j), number(p, q)])
                values.extend([face, -face])
    matrix = sparse.csr_matrix((values, (rows, columns)), (n * n, n * n))
    right = source.copy()
    right[[0, -1]] = right[:, [0, -1]] = 0
    return spsolve(matrix, right.ravel()).reshape(n, n)


def test_darcy_solves_the_five_point_scheme():
    rng = np.random.default_rng(0)
    a, source = np.where(rng.normal(size=(14, 14)) > 0, 12.0, 3.0), rng.normal(size=(14, 14))
    expected = direct(a, source)
    with jax.enable_x64(True):
        np.testing.assert_allclose(pde.solve_darcy(jnp.asarray(a), jnp.asarray(source)), expected, atol=1e-12)
    single = pde.solve_darcy(jnp.asarray(a, jnp.float32), jnp.asarray(source, jnp.float32))
    assert single.dtype == jnp.float32 and largest(single - expected) < 1e-4 * largest(expected)


@pytest.mark.long
def test_darcy_converges_to_a_manufactured_solution():
    """u = sin(pi x) sin(2 pi y) with a = 1 + x + y^2 / 2: errors fall by four as the grid is halved."""
    errors = []
    for n in (17, 33):
        x, y = (np.linspace(0, 1, n)[s] for s in ((slice(None), None), (None, slice(None))))
        a = 1 + x + y**2 / 2
        sx, sy, cx, cy = np.sin(np.pi * x), np.sin(TAU * y), np.cos(np.pi * x), np.cos(TAU * y)
        source = 5 * np.pi**2 * a * sx * sy - np.pi * cx * sy - y * TAU * sx * cy
        with jax.enable_x64(True):
            errors.append(largest(pde.solve_darcy(jnp.asarray(a), jnp.asarray(source)) - sx * sy))
    assert errors[1] < 5e-3 and errors[0] / errors[1] == pytest.approx(4, rel=0.1)


# -- coarser grids -------------------------------------------------------------------------------------------------------


def test_coarser_grids_have_the_same_function():
    x, y = plane(24)
    low = np.cos(TAU * (2 * x - 3 * y)) + np.sin(TAU * x)
    high = np.cos(TAU * 5 * x) * np.sin(TAU * 9 * y)
    a, b = plane(8)
    expected = np.cos(TAU * (2 * a - 3 * b)) + np.sin(TAU * a)
    np.testing.assert_allclose(pde.truncated((low + high)[None], 8, 2)[0], expected, atol=1e-13)
    np.testing.assert_allclose(pde.strided(low, 8, 2), expected, atol=1e-14)
    assert largest(pde.strided(low + high, 8, 2) - expected) > 0.1, "strides alias"
    edges = np.linspace(0, 1, 13)
    np.testing.assert_allclose(pde.strided(np.outer(edges, edges), 5, 2, periodic=False)[-1], np.linspace(0, 1, 5))
    assert pde.truncated(low.astype(np.float32), 8, 2).dtype == np.float32
    with pytest.raises(
        DataError, match=r"24 points a side do not contain a grid of 7; valid are \[3, 4, 6, 8, 12, 24\]"
    ):
        pde.strided(low, 7, 2)


# -- sets on disk --------------------------------------------------------------------------------------------------------

FLOW = {"seed": 5, "samples": 5, "resolution": 4, "viscosity": 1e-2, "time": 0.2, "dt": 0.1, "solve_resolution": 8}


def test_a_set_is_the_solutions_of_its_seed_and_is_made_once(tmp_path, monkeypatch):
    made = pde.navier_stokes_set(**FLOW, snapshots=2, folder=tmp_path, batch=2)
    assert made.inputs.shape == (5, 4, 4) and made.outputs.shape == (5, 2, 4, 4)
    assert made.inputs.dtype == np.float32 and made.times.tolist() == [0.1, 0.2]
    key = jax.random.fold_in(jax.random.key(5), 3)
    start = pde.torus_field(key, 8, 2, alpha=2.5, tau=7.0)
    np.testing.assert_allclose(made.inputs[3], start[::2, ::2], atol=1e-6)
    later = pde.solve_navier_stokes(start, 1e-2, 0.2, 0.1, 2, pde.standard_forcing(8))
    np.testing.assert_allclose(made.outputs[3], later[:, ::2, ::2], atol=1e-6)

    monkeypatch.setattr(store, "_solver", lambda *_: pytest.fail("solved for again"))
    again = pde.load(pde.NavierStokes(**FLOW | {"viscosity": 0.01}, snapshots=2, modes=8), tmp_path)
    assert again.sha256 == made.sha256 and [p.suffix for p in tmp_path.iterdir()] == [".npz"]
    np.testing.assert_array_equal(again.outputs, made.outputs)
    assert "viscosity 0.01" in made.description and "5 samples at 4x4, solved at 8, seed 5" in made.description
    coarse = made.at(2)
    np.testing.assert_array_equal(coarse.outputs, made.outputs[..., ::2, ::2])
    assert coarse.sha256 != made.sha256 and made.at(2, "spectral").resolution == 2


def test_a_spec_names_every_choice():
    base = pde.NavierStokes(**FLOW)
    changed = {"seed": 6, "samples": 6, "resolution": 8, "viscosity": 0.02, "time": 0.4, "dt": 0.05, "snapshots": 2}
    changed |= {"solve_resolution": 16, "forcing": 0.0, "alpha": 3.0, "tau": 6.0, "modes": 4, "dtype": "float64"}
    names = {pde.NavierStokes(**FLOW | {name: value}).name for name, value in changed.items()}
    assert len(names | {base.name}) == 1 + len(changed) == 1 + len(dataclasses.fields(base))


def test_damage_is_found(tmp_path):
    small = {"seed": 0, "samples": 3, "resolution": 5, "folder": tmp_path}
    made = pde.darcy_set(**small)
    assert set(np.unique(made.inputs)) <= {3.0, 12.0} and made.outputs.shape == (3, 1, 5, 5)
    assert largest(made.outputs[..., 0]) == 0 and (made.outputs[..., 1:-1, 1:-1] > 0).all()
    (path,) = tmp_path.glob("darcy-*.npz")
    whole = path.read_bytes()
    wrong = bytearray(whole)
    wrong[wrong.find(made.outputs.tobytes()) + 31] ^= 1
    for content in (bytes(wrong), whole[:-30], b""):
        path.write_bytes(content)
        with pytest.raises(DataError, match=f"{path.name}' is damaged.*delete it"):
            pde.darcy_set(**small)
    np.savez(path, inputs=made.inputs, outputs=made.outputs + 1, sha256=made.sha256, spec="{}")
    with pytest.raises(DataError, match="not that of its checksum"):
        pde.darcy_set(**small)
    path.write_bytes(whole)
    assert pde.darcy_set(**small).sha256 == made.sha256
    with pytest.raises(DataError, match="no 'spectral' grids; valid is 'strided'"):
        made.at(3, "spectral")


def test_an_interrupted_run_resumes_and_gives_the_same(tmp_path, monkeypatch):
    spec = pde.Burgers(seed=1, samples=7, resolution=8, solve_resolution=16, dt=0.05, time=0.1)
    whole = pde.load(spec, tmp_path / "whole", batch=2)
    solve, done = store._solve, []

    def stops(spec, solver, rows):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(rows)
        return solve(spec, solver, rows)

    monkeypatch.setattr(store, "_solve", stops)
    with pytest.raises(KeyboardInterrupt):
        pde.load(spec, tmp_path / "cut", batch=2)
    parts = tmp_path / "cut" / f"{spec.name}.parts"
    assert sorted(p.name for p in parts.iterdir()) == ["0-2.npz", "2-4.npz", "4-6.npz"]
    (parts / "2-4.npz").write_bytes(b"cut short")
    done.clear()
    with pytest.warns(UserWarning, match="2-4.npz' is damaged .*; it is solved for again"):
        resumed = pde.load(spec, tmp_path / "cut", batch=2)
    assert done == [range(2, 4), range(6, 7)] and not parts.exists()
    assert resumed.sha256 == whole.sha256
    np.testing.assert_array_equal(resumed.inputs, whole.inputs)
    fewer = pde.load(pde.Burgers(seed=1, samples=2, resolution=8, solve_resolution=16, dt=0.05, time=0.1), tmp_path)
    np.testing.assert_allclose(fewer.outputs, whole.outputs[:2], atol=1e-6)


def test_what_no_solver_can_do_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"sample 0 is not finite; a smaller dt"):
        pde.burgers_set(0, 1, 32, dt=1.0, time=40.0, viscosity=0.0, sigma=5e3, folder=tmp_path)
    assert not list(tmp_path.rglob("*.npz"))
    for wrong, said in (
        ({"resolution": 3}, "at least 4 points"),
        ({"samples": 0}, "0 samples"),
        ({"dtype": "float16"}, "not 'float16'"),
        ({"solve_resolution": 9}, "9 points a side do not contain a grid of 4"),
        ({"modes": 9}, "modes 9"),
        ({"dt": 0.15}, "0.15 does not divide"),
    ):
        with pytest.raises(DataError, match=said):
            pde.NavierStokes(**FLOW | wrong)
    with pytest.raises(DataError, match=r"above 0, got 12\.0 and -1\.0"):
        pde.Darcy(seed=0, samples=1, resolution=5, low=-1.0)


@pytest.mark.long
def test_double_precision_needs_no_switch(tmp_path):
    made = pde.burgers_set(0, 2, 16, dt=0.05, time=0.1, dtype="float64", folder=tmp_path)
    assert made.inputs.dtype == made.outputs.dtype == np.float64 and not jax.config.jax_enable_x64
    np.testing.assert_allclose(made.outputs[1, 0].mean(), 0, atol=1e-15)


def test_the_cache_is_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("STRUCTMAT_CACHE", str(tmp_path))
    assert pde.cache_folder() == tmp_path
    monkeypatch.delenv("STRUCTMAT_CACHE")
    monkeypatch.setattr(store.sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert str(pde.cache_folder()) == "/somewhere/structmat"
