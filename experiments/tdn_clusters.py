"""Small clusters of atoms under a Morse pair potential and a three-body term: positions, energies, forces.

Lengths are in distances of the pair's minimum, energies in its depth. The three-body term has the angle of Stillinger and Weber
1985 (cos + 1/3)^2, with a cosine cutoff in place of theirs.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from structmat.data.corpus import content_hash

ATOMS = (5, 8)
"""Fewest and most of a cluster; arrays are padded to the most."""
CUTOFF = 2.0
MORSE, ANGLE = 2.0, 0.5
"""Stiffness of the pair term, and weight of the three-body term."""
CLOSEST, NEIGHBOUR = 0.8, (0.85, 1.3)
"""No two atoms are nearer than the first; each is put at a distance in the second from one that is there."""


@dataclasses.dataclass(frozen=True)
class Clusters:
    """f32 arrays over clusters: positions and forces (count, 8, 3), here (count, 8) 1 for an atom and 0 for padding, energies
    (count,). Forces of padding are 0."""

    positions: np.ndarray
    here: np.ndarray
    energies: np.ndarray
    forces: np.ndarray

    def __getitem__(self, part: slice) -> Clusters:
        """Some of them."""
        return Clusters(*(array[part] for array in self.arrays))

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """In the order of the fields."""
        return self.positions, self.here, self.energies, self.forces

    @property
    def digest(self) -> str:
        """sha256 of all arrays."""
        return content_hash(*self.arrays)


def edges(positions: jax.Array, here: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(vectors i to j (n, n, 3), distances (n, n), cutoff function (n, n)) of positions (n, 3).

    The cutoff function is (1 + cos(pi r / CUTOFF)) / 2, and 0 beyond CUTOFF, for padding and on the diagonal; there the
    vectors are (CUTOFF, 0, 0), so that directions and derivatives exist.
    """
    n = len(positions)
    vectors = positions[None] - positions[:, None]
    pairs = (here[:, None] * here[None] * (1 - jnp.eye(n))) > 0
    away = jnp.array([CUTOFF, 0.0, 0.0], positions.dtype)
    vectors = jnp.where(pairs[..., None], vectors, away)
    lengths = jnp.sqrt(jnp.sum(vectors**2, -1))
    near = jnp.where(lengths < CUTOFF, (1 + jnp.cos(jnp.pi * lengths / CUTOFF)) / 2, 0.0)
    return vectors, lengths, near


def energy(positions: jax.Array, here: jax.Array) -> jax.Array:
    """Of one cluster: sum over pairs of the Morse potential and over angles at every atom of ANGLE (cos + 1/3)^2, with the
    cutoff function of every distance. positions (n, 3), here (n,)."""
    vectors, lengths, near = edges(positions, here)
    morse = (1 - jnp.exp(-MORSE * (lengths - 1))) ** 2 - 1
    directions = vectors / lengths[..., None]
    cosines = jnp.einsum("ijx,ikx->ijk", directions, directions)
    angles = (cosines + 1 / 3) ** 2 * near[:, :, None] * near[:, None, :] * (1 - jnp.eye(len(positions)))
    return (jnp.sum(morse * near) + ANGLE * jnp.sum(angles)) / 2


def clusters(seed: int, count: int) -> Clusters:
    """`count` clusters of 5 to 8 atoms grown at random around their centres; computed in f64. The first ones are the same for
    any count."""
    rng = np.random.default_rng(seed)
    positions, here = np.zeros((count, ATOMS[1], 3)), np.zeros((count, ATOMS[1]))
    for row in range(count):
        atoms = rng.integers(ATOMS[0], ATOMS[1] + 1)
        positions[row, :atoms], here[row, :atoms] = _grown(rng, atoms), 1
    with jax.enable_x64(True):
        both = jax.jit(jax.vmap(jax.value_and_grad(energy)))
        energies, gradients = (np.asarray(a) for a in both(jnp.asarray(positions), jnp.asarray(here)))
    return Clusters(*(a.astype(np.float32) for a in (positions, here, energies, -gradients)))


def _grown(rng: np.random.Generator, atoms: int) -> np.ndarray:
    """(atoms, 3): one after another beside one of those before, not too near to any."""
    found = np.zeros((1, 3))
    while len(found) < atoms:
        direction = rng.normal(size=3)
        step = rng.uniform(*NEIGHBOUR) * direction / np.linalg.norm(direction)
        new = found[rng.integers(len(found))] + step
        if np.linalg.norm(found - new, axis=1).min() > CLOSEST:
            found = np.vstack([found, new])
    return found - found.mean(0)
