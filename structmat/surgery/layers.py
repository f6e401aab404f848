"""Trees of arrays by layer: stacks of scanned groups taken apart, and put together in other groups."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from structmat.nn.sites import layer_paths

Piece = tuple[jax.Array, int | None]
"""An array, or slice i of its leading axis."""


def by_layer(tree: Any) -> dict[str, Piece]:
    """Every leaf by its layer path: `1/mu/layers_0to1/mlp/up/kernel` is there as slice 0 and 1 under `layers_0` and
    `layers_1`. No array is copied."""
    pieces: dict[str, Piece] = {}
    for path, leaf in named(tree).items():
        layers = layer_paths(path)
        pieces |= {layer: (leaf, None if layer == path else i) for i, layer in enumerate(layers)}
    return pieces


def rebuild(old: Any, template: Any, given: Mapping[str, Piece]) -> Any:
    """The tree of `template`, from the pieces `given` and else from the leaves of `old`, whatever groups these lie in.

    A leaf of which nothing is given and whose group is the same is the old array itself; the others are copies, made in
    one program where they will live.

    Args:
      template: tree of ShapeDtypeStructs, either all with a sharding or none.
      given: layer path -> piece; paths that the template lacks are not used.

    Raises:
      ValueError: a leaf of the template is in neither, or has another shape or dtype; names it.
    """
    wanted, whole, pieces = named(template), named(old), {**by_layer(old), **given}
    found: dict[str, Any] = {}
    parts: dict[str, list[Piece]] = {}
    for path, leaf in wanted.items():
        layers = layer_paths(path)
        if path in whole and given.keys().isdisjoint(layers):
            found[path] = whole[path]
            _check(path, leaf, leaf.shape, whole[path].shape, whole[path].dtype)
            continue
        if missing := [layer for layer in layers if layer not in pieces]:
            raise ValueError(f"surgery: no array for {missing[0]}, which the new tree has in {path}")
        parts[path] = [pieces[layer] for layer in layers]
        for array, i in parts[path]:
            shape = leaf.shape if layers == [path] else leaf.shape[1:]
            _check(path, leaf, shape, array.shape if i is None else array.shape[1:], array.dtype)

    def build(arrays: dict[str, list[jax.Array]]) -> dict[str, jax.Array]:
        out = {}
        for path, held in arrays.items():
            own = [a if i is None else a[i] for a, (_, i) in zip(held, parts[path])]
            out[path] = own[0] if layer_paths(path) == [path] else jnp.stack(own)
        return out

    if parts:
        places = {path: wanted[path].sharding for path in parts}
        placed = jax.jit(build, out_shardings=None if None in places.values() else places)
        found |= placed({path: [array for array, _ in held] for path, held in parts.items()})
    return jax.tree.unflatten(jax.tree.structure(template), [found[path] for path in wanted])


def named(tree: Any) -> dict[str, Any]:
    """Slash path -> leaf, in flattening order."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _check(path: str, leaf: Any, wanted: Any, shape: Any, dtype: Any) -> None:
    if wanted != shape or leaf.dtype != dtype:
        raise ValueError(f"surgery: {path} needs {leaf.dtype} {wanted} of a layer, and was given {dtype} {shape}")
