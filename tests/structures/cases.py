"""What the contract suite runs on: one line per (text, in_shape, out_shape). Add a line for every new structure.

A fourth entry names what the suite cannot state for the structure, whose own test then does: `untraced` (its product is
more than GEMMs, multiplications and FFTs, so operations are not counted), `unstated` (at initialisation the size of the
output is not the product of std^2 fan_in over the leaves).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import structmat
from structmat.structures import Bound
from structmat.structures.algebra import BoundProduct, BoundSum
from structmat.structures.elementwise import BoundElementwise
from structmat.structures.wrappers import Wrapper

CASES = [
    ("dense()", 12, 20),
    ("dense()", (3, 4), (2, 5)),
    ("low_rank(rank=3)", 24, 36),
    ("low_rank(rank=2, init='paper')", 16, 12),
    ("spectral(rank=4)", 24, 36),
    ("spectral()", 12, 10),
    ("diagonal()", 16, 16),
    ("block_diagonal(blocks=4)", 24, 36),
    ("block_low_rank(in_blocks=4, out_blocks=6, rank=2)", 24, 36),
    ("block_low_rank(in_blocks=3, out_blocks=1, rank=3)", 18, 8),
    ("monarch(blocks=4)", 16, 32),
    ("monarch(blocks=2, order='blocked')", 24, 16),
    ("kronecker()", 24, 36),
    ("kronecker(terms=3)", (5, 7), (3, 12)),
    ("kronecker(in_factors=(2, 12), out_factors=(9, 4))", 24, 36),
    ("kronecker(terms=2, in_factors=(2, 12), out_factors=(9, 4))", 24, 36),
    ("kronecker(terms=2, in_factors=(7, 1), out_factors=(3, 4))", 7, 12),
    ("tensor_train(rank=3)", 24, 36),
    ("tensor_train(rank=3, cores=3)", 24, 36),
    ("tensor_train(rank=5, cores=4)", 16, 24),
    ("block_tensor_train(rank=2)", 24, 36),
    ("block_tensor_train(rank=3, cores=3)", (4, 6), 36),
    ("block_tensor_train(rank=2, cores=3, order='blocked')", 12, 16),
    ("random_sparse(density=0.25)", 24, 36),
    ("n_m_sparse(2, 4)", 24, 18),
    ("n_m_sparse(1, 3, axis='out')", 12, 24),
    ("block_sparse(block=4, density=0.5)", 24, 36),
    ("block_sparse(block=(3, 4), density=0.5, pattern='butterfly')", 24, 32),
    ("block_sparse(block=(2, 3), density=0.5, pattern='banded')", (6, 4), 9),
    ("transpose(block_sparse(block=2, density=0.25, pattern='magnitude'))", 12, 16),
    ("masked(dense(), block_sparse(block=4, density=0.5))", 16, 12),
    ("channel_sparse(density=0.25)", 24, 36),
    ("channel_sparse(density=0.2, axis='out', select='norm')", 12, 20, "unstated"),
    ("transpose(channel_sparse(density=0.25, select='norm'))", 16, 12, "unstated"),
    ("masked(dense(), channel_sparse(density=0.25, select='norm'))", 16, 12),
    ("dictionary(atoms=6, nonzeros=2)", 24, 36, "untraced"),
    ("dictionary(atoms=9, nonzeros=3)", 8, 20, "untraced"),
    ("quantized(bits=4, group=8)", 24, 36, "untraced unstated"),
    ("quantized(bits=3, group=6, axis='out', symmetric=False)", (3, 5), 12, "untraced unstated"),
    ("quantized(bits=4, group=4, grid='normal', train=('scales',))", 12, 10, "untraced unstated"),
    ("einsum(in_factors=(3, 2, 4), out_factors=(3, 4, 3), rank=2)", 24, 36),
    ("einsum(theta=(0.5, 0.0, 0.5, 0.0, 0.5, 0.5, 0.2))", 24, 36),
    ("einsum(in_factors=(1, 6, 4), out_factors=(3, 1, 4), rank=2)", (4, 6), 12),
    ("blast(blocks=3, rank=4)", 24, 36),
    ("blast(blocks=2, rank=9)", (4, 3), 16),
    ("tensor_ring(rank=3, cores=2)", 24, 36),
    ("tensor_ring(rank=2)", (2, 3, 5), 27),
    ("transpose(tensor_ring(rank=2, cores=4))", 24, 16),
    ("tucker(rank=3)", 24, 36),
    ("tucker(rank=4, modes=1)", 24, 18),
    ("tucker(rank=(2, 3, 3, 3, 2))", (2, 3, 4), 12),
    ("cp(rank=5)", 24, 36),
    ("cp(rank=4, modes=1)", 24, 18),
    ("transpose(cp(rank=6))", (3, 4), (12, 2, 3)),
    ("frozen(monarch(blocks=2))", 16, 16),
    ("scaled(low_rank(rank=2), s=-0.5)", 12, 20),
    ("transpose(block_low_rank(in_blocks=3, out_blocks=2, rank=2))", 16, 24),
    ("transpose(kronecker(terms=2))", 24, 36),
    ("frozen(dense()) + low_rank(rank=2)", 16, 24),
    ("low_rank(rank=2) + monarch(blocks=2) + tensor_train(rank=1)", 16, 24),
    ("diagonal() @ low_rank(rank=2) @ frozen(diagonal())", 16, 24),
    ("product(block_diagonal(blocks=3), spectral(rank=2), inner=9)", 12, 20),
    ("low_rank(rank=2) * low_rank(rank=3)", 16, 24),
    ("dense() * monarch(blocks=2, order='blocked')", 16, 12),
    ("frozen(dense()) * transpose(spectral(rank=2)) + low_rank(rank=1)", 16, 24),
    ("diagonal() * (dense() + low_rank(rank=2))", 12, 12),
    ("fit(low_rank() + kronecker(), params=0.5)", 16, 24),
    ("low_rank(rank=4, init='paper') + random_sparse(density=0.125, init='paper')", 24, 16),
    ("transpose(random_sparse(density=0.25, select='magnitude'))", 24, 16),
    ("masked(dense(), n_m_sparse(2, 4))", 12, 10),
    ("masked(monarch(blocks=2), random_sparse(density=0.5), rule='ste')", 16, 12),
    ("weight_norm(frozen(dense()) + low_rank(rank=2))", 16, 12),
    ("fake_quantized(low_rank(rank=3), 4, group=16)", 12, 20),
    ("dora(frozen(dense()) + low_rank(rank=2))", 12, 16),
    ("fourier()", 12, (3, 4)),
    ("fourier(inverse=True)", 9, 9),
    ("dct()", 16, 16),
    ("dct(kind=3)", 15, 15),
    ("dct(kind=1)", 12, 12),
    ("dct(kind=4)", 7, 7),
    ("dct(kind=4, sine=True)", 12, 12),
    ("dct(kind=1, sine=True)", 8, 8),
    ("hadamard()", 16, 16),
    ("toeplitz()", 24, 36),
    ("toeplitz()", (3, 5), 7),
    ("transpose(toeplitz())", 9, 16),
    ("circulant()", 15, 15),
    ("circulant()", 11, 11),
    ("block_circulant(block=4)", 12, 20),
    ("diagonal() @ dct() @ circulant() @ hadamard()", 16, 16),
    ("butterfly()", 16, 16),
    ("butterfly(init='paper')", 8, 8),
    ("butterfly(increasing=False, depth=2)", 8, (2, 4)),
    ("butterfly(depth=3, field='complex', init='paper')", 4, 4),
    ("butterfly(increasing=False, field='complex')", 16, 16),
    ("permutation()", 12, 12),
    ("identity()", 12, 12),
    ("permutation() @ butterfly(field='complex') @ diagonal()", 8, 8),
    ("transpose(butterfly(increasing=False)) + identity()", 8, 8),
    ("householder(reflections=4)", 12, 20, "untraced", "unstated"),
    ("householder(reflections=9)", (3, 4), 9, "untraced", "unstated"),
    ("householder(reflections=7, init='paper')", 7, 7, "untraced", "unstated"),
    ("ordered()", 24, 36),
    ("ordered(rank=5)", (3, 4), 9, "unstated"),
]

UNTRACED: set[str] = {"random_sparse", "n_m_sparse", "masked", "weight_norm", "fake_quantized", "dora"}
"""Names that make a structure `untraced`."""
STRAIGHT_THROUGH: set[str] = {"masked", "fake_quantized"}
"""Names whose gradient is not the derivative of their value."""
UNSTATED: set[str] = {"masked", "weight_norm", "dora"}
"""Names that make a structure `unstated`."""


Case = tuple[Any, ...]


def flagged(case: Case, flag: str) -> bool:
    """Whether the case carries `untraced` or `unstated`, itself or by the name of a part."""
    by_name = {"untraced": UNTRACED, "unstated": UNSTATED}[flag]
    return flag in " ".join(case[3:]) or bool(names(bind(case).structure) & by_name)


def label(case: Case) -> str:
    """Test id of a case."""
    return f"{case[0]}-{case[1]}-{case[2]}".replace(" ", "")


def names(structure: structmat.Structure) -> set[str]:
    """Names of a structure and of all its parts."""
    parts = structure.parts() if hasattr(structure, "parts") else ()
    return {structure.name}.union(*(names(p) for p in parts))


def with_long(cases: list[Case], every: int = 1) -> list[Any]:
    """Parameters for the costlier tests: the first case of every structure name, or of every second or third one, at once, the
    others among the long tests."""
    seen: set[str] = set()
    marks = []
    for case in cases:
        name = bind(case).structure.name
        quick = name not in seen and len(seen) % every == 0
        marks.append(pytest.param(case, marks=[] if quick else [pytest.mark.long], id=label(case)))
        seen.add(name)
    return marks


@functools.cache
def bind(case: Case) -> Bound:
    """The Bound of a case."""
    text, in_shape, out_shape = case[:3]
    return structmat.parse(text).bind(in_shape, out_shape)


def draw(case: Case, seed: int = 0) -> dict[str, Any]:
    """Parameters of a case with independent normal entries (std 1/2), also where its init is zero or one."""
    return _draw(case, seed)


@functools.cache
def _draw(case: Case, seed: int) -> dict[str, Any]:
    bound, rng = bind(case), np.random.default_rng(seed)
    shapes = jax.eval_shape(bound.init, jax.random.key(seed))
    if not all(is_float(s) for s in jax.tree.leaves(shapes)):
        shapes = jax.jit(bound.init)(jax.random.key(seed))
    real = lambda s: rng.normal(size=s.shape) / 2
    normal = lambda s: np.asarray(real(s) + 1j * real(s) if is_complex(s) else real(s), s.dtype)
    return jax.tree.map(lambda s: jnp.asarray(normal(s)) if is_float(s) else s, shapes)


def dense(case: Case, seed: int = 0) -> np.ndarray:
    """The matrix of `draw`, computed by `materialize`."""
    return _dense(case, seed)


@functools.cache
def _dense(case: Case, seed: int) -> np.ndarray:
    return np.asarray(jax.jit(bind(case).materialize)(draw(case, seed)))


def is_float(value: jax.Array) -> bool:
    """Whether a leaf is differentiable."""
    return jnp.issubdtype(value.dtype, jnp.inexact)


def is_complex(value: jax.Array) -> bool:
    """Whether a leaf has complex entries."""
    return jnp.issubdtype(value.dtype, jnp.complexfloating)


def split(params: dict[str, Any]) -> tuple[list[jax.Array], Any]:
    """The differentiable leaves, and a function that puts them back."""
    leaves, tree = jax.tree.flatten(params)
    at = [i for i, p in enumerate(leaves) if is_float(p)]

    def join(values: list[jax.Array]) -> dict[str, Any]:
        full = list(leaves)
        for i, v in zip(at, values):
            full[i] = v
        return jax.tree.unflatten(tree, full)

    return [leaves[i] for i in at], join


def projects(bound: Bound) -> bool:
    """Whether the family has a projection: all but the products of two structures."""
    parts = bound.terms if isinstance(bound, BoundSum) else (bound.inner,) if isinstance(bound, Wrapper) else ()
    return not isinstance(bound, BoundProduct | BoundElementwise) and all(map(projects, parts))


def rows(case: Case, *leading: int, seed: int = 7) -> jax.Array:
    """Random inputs (*leading, d_in)."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=(*leading, bind(case).d_in)), jnp.float32)


def outside(case: Case, seed: int = 3) -> np.ndarray:
    """A dense matrix of the case's shape outside every structured class."""
    bound = bind(case)
    return np.random.default_rng(seed).normal(size=(bound.d_in, bound.d_out)).astype(np.float32)
