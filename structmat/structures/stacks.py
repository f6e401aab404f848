"""Projection as people call it: compiled once per structure and shape, checked for memory, over stacks of matrices."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from structmat.structures import large
from structmat.structures.base import Bound
from structmat.structures.errors import StructureError
from structmat.structures.leaf import Params
from structmat.structures.linalg import SVDMethod, check_gram, current_svd, svd_method, using
from structmat.structures.recipe import Structure
from structmat.structures.text import parse

_NEEDS: dict[Any, tuple[bool, int]] = {}
"""Bytes each compiled projection needs, so that asking again costs nothing."""


def project_stack(
    w: jax.Array | np.ndarray,
    structure: str | Structure,
    *,
    key: jax.Array | None = None,
    like: Params | None = None,
    in_gram: jax.Array | None = None,
    out_gram: jax.Array | None = None,
    limit: int | None = None,
) -> tuple[Bound, dict[str, Any]]:
    """Project every matrix of a stack (layers, experts, heads): the Bound they share, and their parameters stacked.

    All at once (vmap) where that fits the memory, else one at a time: with `lax.map` for an array on the device, and
    for a numpy array, which may be an `np.memmap` larger than memory, by moving one matrix there after the other.

    Args:
      w: `(..., d_in, d_out)` with at least one leading axis; integers are projected as float32.
      key: split over the stack.
      like, in_gram, out_gram: as in `Bound.project`, every array with the leading axes of w.
      limit: bytes a program may use, arguments and results included; default what is free (see `large.free_bytes`).

    Returns:
      The Bound, and its parameters with the leading axes of w, which `jax.vmap(bound.matmul)` takes.

    Raises:
      StructureError: no leading axis, leading axes that differ, a projection the structure refuses, or a single matrix
        that needs more memory than `limit`. Under a trace memory is not checked, and vmap is taken.
    """
    w = w if isinstance(w, np.ndarray | jax.Array) else jnp.asarray(w)
    if w.ndim < 3 or 0 in w.shape:
        raise StructureError(f"project_stack needs a stack (..., d_in, d_out), got an array of shape {w.shape}")
    lead, bound = w.shape[:-2], parse(structure).bind(*w.shape[-2:])
    count = math.prod(lead)
    arrays = _arguments(bound, w, None, like, in_gram, out_gram, lead)
    arrays = jax.tree.map(lambda a: a.reshape(count, *a.shape[len(lead) :]), arrays)
    if key is not None:
        arrays["key"] = jax.random.split(key, count)
    params = _stacked(bound, arrays, count, limit)
    return bound, jax.tree.map(lambda p: p.reshape(*lead, *p.shape[1:]), params)


def solve(
    bound: Bound,
    w: jax.Array,
    *,
    key: jax.Array | None = None,
    like: Params | None = None,
    in_gram: jax.Array | None = None,
    out_gram: jax.Array | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """`bound.project` of one matrix, compiled once per (bound, shapes, SVD method), refused before it runs when it needs
    more than `limit` bytes (default: what is free)."""
    arrays = _arguments(bound, w, key, like, in_gram, out_gram, ())
    if not _traced(arrays):
        _allow(bound, "one", arrays, limit)
    return _run(bound, current_svd(), "one", arrays)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _run(bound: Bound, method: SVDMethod, mode: str, arrays: dict[str, Any]) -> dict[str, Any]:
    """One matrix (`one`), a stack at once (`vmap`) or one after the other (`map`); products in full precision."""
    one = lambda arrays: bound.project(**arrays)
    over = {"one": one, "vmap": jax.vmap(one), "map": functools.partial(jax.lax.map, one)}[mode]
    with using(method), jax.default_matmul_precision("highest"):
        return over(arrays)


def _stacked(bound: Bound, arrays: dict[str, Any], count: int, limit: int | None) -> dict[str, Any]:
    method = current_svd()
    if _traced(arrays) or _need(bound, method, "vmap", arrays, limit)[1] <= _limit(arrays, limit):
        return _run(bound, method, "vmap", arrays)
    if isinstance(arrays["w"], np.ndarray):
        each = (jax.tree.map(lambda a, i=i: a[i], arrays) for i in range(count))
        params = [solve(bound, **{**one, "w": jnp.asarray(one["w"])}, limit=limit) for one in each]
        return jax.tree.map(lambda *p: jnp.stack(p), *params)
    _allow(bound, "map", arrays, limit)
    return _run(bound, method, "map", arrays)


def _arguments(
    bound: Bound, w: Any, key: Any, like: Params | None, in_gram: Any, out_gram: Any, lead: tuple[int, ...]
) -> dict[str, Any]:
    """The arguments that are given, as arrays, their shapes checked where an error here says more than a later one."""
    if not jnp.issubdtype(w.dtype, jnp.inexact):
        w = w.astype(np.float32)
    arrays = {"w": w, "key": key}
    for what, gram, size in (("in_gram", in_gram, bound.d_in), ("out_gram", out_gram, bound.d_out)):
        if gram is not None:
            arrays[what] = jnp.asarray(gram)
            _need_lead(arrays[what].shape, lead, what)
            check_gram(arrays[what], size, what, len(lead))
    if like is not None:
        arrays["like"] = jax.tree.map(jnp.asarray, dict(like))
        declared = jax.eval_shape(bound.init, jax.random.key(0))
        if jax.tree.structure(declared) != jax.tree.structure(arrays["like"]):
            raise StructureError(f"like does not hold the parameters of {bound!r}: {', '.join(declared)}")
        for given, own in zip(jax.tree.leaves(arrays["like"]), jax.tree.leaves(declared)):
            if given.shape != lead + own.shape:
                raise StructureError(f"like holds an array of shape {given.shape} where {lead + own.shape} is expected")
    return {name: value for name, value in arrays.items() if value is not None}


def _need_lead(shape: tuple[int, ...], lead: tuple[int, ...], what: str) -> None:
    if shape[: len(lead)] != lead:
        raise StructureError(f"{what} must have the leading axes {lead} of w, got an array of shape {shape}")


def _traced(arrays: Any) -> bool:
    return any(isinstance(a, jax.core.Tracer) for a in jax.tree.leaves(arrays))


def _limit(arrays: Any, limit: int | None) -> float:
    found = large.free_bytes(arrays) if limit is None else limit
    return math.inf if found is None else found


def _need(bound: Bound, method: SVDMethod, mode: str, arrays: Any, limit: int | None) -> tuple[bool, int]:
    """Whether it is the compiled program's need or, when that is over the limit already, a lower bound; and bytes."""
    leaves, tree = jax.tree.flatten(arrays)
    known = (bound, method, mode, tree, *((a.shape, str(a.dtype)) for a in leaves))
    if known not in _NEEDS:
        traced = _run.trace(bound, method, mode, arrays)
        least = large.least_bytes(traced)
        if least > _limit(arrays, limit):
            return False, least
        _NEEDS[known] = True, large.compiled_bytes(traced)
    return _NEEDS[known]


def _allow(bound: Bound, mode: str, arrays: Any, limit: int | None) -> None:
    """Refuse what does not fit, naming what would."""
    exactly, need = _need(bound, current_svd(), mode, arrays, limit)
    allowed = _limit(arrays, limit)
    if need <= allowed:
        return
    w, instead = arrays["w"], []
    if mode == "map":
        instead.append("pass w as a numpy array, which is moved to the device one matrix at a time")
    with svd_method("randomized"):
        lean = large.least_bytes(_run.trace(bound, current_svd(), mode, arrays))
    if lean < large.least_bytes(_run.trace(bound, current_svd(), mode, arrays)):
        instead.append(f"inside `with structmat.svd_method('randomized'):` it needs at least {large._text(lean)}")
    what = f"projecting {'a matrix' if mode == 'one' else 'a stack'} {w.shape} {w.dtype} onto {bound.structure.short()}"
    raise large.over(need, int(allowed), exactly, what, instead)
