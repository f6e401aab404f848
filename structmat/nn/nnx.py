"""The modules of `structmat.nn` for flax.nnx: the same names, arrays and outputs, kept as attributes of the module.

    layer = StructuredDense(64, 32, structure="low_rank(rank=8)", rngs=nnx.Rngs(0))
    layer(x)                                    # and nnx.jit, nnx.grad, nnx.split, nnx.vmap as of any nnx module
    variables = to_linen(layer)                 # {"params": {"a": ..., "b": ..., "bias": ...}}
    from_linen(layer, variables)                # and back

A module holds the Linen one as its static part and calls it, so what this computes is decided in one place. Trainable leaves
are `nnx.Param`, all others `Frozen`, at the paths that they have in Linen's collections `params` and `frozen`. Each has its
logical axis names as metadata `axes`; `flax.nnx.bridge.ToNNX` would hand them to a mesh, which knows no logical names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx, traverse_util

from structmat.nn import conv, linear, monarch_transform, spectral_conv
from structmat.nn.linear import check_auxiliary
from structmat.nn.sites import sites
from structmat.structures import Bound, StructureError
from structmat.structures.errors import suggest


class Frozen(nnx.Variable):
    """A leaf that does not train, such as an index, a mask or a frozen term; `nnx.grad` leaves it out, as it is no Param."""


class Branch(nnx.Module):
    """The leaves of one part of a structure, such as a term of a sum. (An `nnx.Dict` can hold none called `values`.)"""


KINDS: dict[str, type[nnx.Variable]] = {"params": nnx.Param, "frozen": Frozen}
"""Collection of Linen -> what holds its leaves here."""


class Structured(nnx.Module):
    """A Linen module of one site, its leaves as attributes; the base of those below.

    Attributes:
      face: the Linen module.
      site: its structure with sizes, kind and logical axes.
    """

    def __init__(self, face: nn.Module, example: jax.ShapeDtypeStruct, rngs: nnx.Rngs) -> None:
        """Draw what `face.init(rngs.params(), x)` draws for an x like `example`.

        Raises:
          StructureError: as the Linen module does; and a structure that adds to the loss, for which nnx has no collection.
        """
        (site,) = sites(face, example).values()
        try:
            check_auxiliary(site.bound.structure, allowed=False)
        except StructureError:
            raise StructureError(
                f"{site.bound.structure.short()} adds to the loss, which only structmat.nn's Linen modules hand on; "
                "balance=0.0 leaves it out"
            ) from None
        self.face, self.site = face, site
        held = face.init(rngs.params(), jnp.zeros(example.shape, example.dtype))
        is_box = lambda node: isinstance(node, nn.meta.AxisMetadata)
        for collection, kind in KINDS.items():
            leaves = traverse_util.flatten_dict(held.get(collection, {}), is_leaf=lambda _, node: is_box(node))
            for path, box in leaves.items():
                node: Any = self
                for part in path[:-1]:
                    if not hasattr(node, part):
                        setattr(node, part, Branch())
                    node = getattr(node, part)
                if hasattr(node, path[-1]):
                    raise ValueError(f"{site.bound!r}: leaf name {path[-1]!r} is an attribute of the module already")
                setattr(node, path[-1], kind(box.unbox(apply_constraint=False), axes=box.names))

    @property
    def bound(self) -> Bound:
        """Its structure with sizes."""
        return self.site.bound

    def __call__(self, x: jax.Array) -> jax.Array:
        """What the Linen module gives."""
        return self.face.apply(to_linen(self), x)


class StructuredDenseGeneral(Structured):
    """x `(..., *in_shape)` -> `(..., *features)`: `structmat.nn.StructuredDenseGeneral`."""

    def __init__(self, in_shape: int | Sequence[int], features: int | Sequence[int], *, rngs: nnx.Rngs, **fields: Any):
        """`fields` are those of the Linen module but `axis`: the axes of `in_shape` are the last ones of x."""
        shape = _sizes(in_shape)
        own = dict(features=_hashable(features), axis=tuple(range(-len(shape), 0)))
        super().__init__(linear.StructuredDenseGeneral(**own, **fields), _example(shape), rngs)


class StructuredDense(Structured):
    """x `(..., in_features)` -> `(..., features)`: `structmat.nn.StructuredDense`."""

    def __init__(self, in_features: int, features: int, *, rngs: nnx.Rngs, **fields: Any):
        """`fields` are those of the Linen module."""
        super().__init__(linear.StructuredDense(features, **fields), _example((in_features,)), rngs)


class StructuredConv(Structured):
    """x `(..., *space, in_features)` -> `(..., *space', features)`: `structmat.nn.StructuredConv`."""

    def __init__(
        self, in_features: int, features: int, kernel_size: int | Sequence[int], *, rngs: nnx.Rngs, **fields: Any
    ):
        """`fields` are those of the Linen module."""
        window = _sizes(kernel_size)
        dilation = _sizes(fields.get("kernel_dilation", 1))
        reach = [(k - 1) * d + 1 for k, d in zip(window, dilation * len(window))]
        face = conv.StructuredConv(features, window, **{name: _hashable(value) for name, value in fields.items()})
        super().__init__(face, _example((*reach, in_features)), rngs)


class StructuredEmbed(Structured):
    """ids `(...)` -> `(..., features)`: `structmat.nn.StructuredEmbed`."""

    def __init__(self, num_embeddings: int, features: int, *, rngs: nnx.Rngs, **fields: Any):
        """`fields` are those of the Linen module."""
        super().__init__(linear.StructuredEmbed(num_embeddings, features, **fields), _example((), jnp.int32), rngs)

    def attend(self, x: jax.Array) -> jax.Array:
        """x `(..., features)` -> logits `(..., num_embeddings)`."""
        return self.face.apply(to_linen(self), x, method="attend")


class SpectralConv(Structured):
    """x real `(..., *space, in_features)`, periodic -> `(..., *space, features)`: `structmat.nn.SpectralConv`."""

    def __init__(self, in_features: int, features: int, modes: Sequence[int], *, rngs: nnx.Rngs, **fields: Any):
        """`fields` are those of the Linen module."""
        face = spectral_conv.SpectralConv(features, tuple(modes), **fields)
        super().__init__(face, _example((*modes, in_features)), rngs)


class MonarchTransform(Structured):
    """x `(..., length)` -> `(..., length)` complex: `structmat.nn.MonarchTransform`."""

    def __init__(self, length: int, *, rngs: nnx.Rngs, **fields: Any):
        """`fields` are those of the Linen module."""
        super().__init__(monarch_transform.MonarchTransform(length, **fields), _example((length,)), rngs)


def to_linen(module: nnx.Module) -> dict[str, Any]:
    """Variables of Linen, `{"params": ..., "frozen": ...}`, of a structured module or of one that holds several: plain nested
    dicts of arrays by attribute, without a collection that would be empty. No array is copied."""
    found = {collection: _leaves(module, collection) for collection in KINDS}
    return {
        collection: traverse_util.unflatten_dict({path: leaf.get_value() for path, leaf in leaves.items()}, sep="/")
        for collection, leaves in found.items()
        if leaves
    }


def from_linen(module: nnx.Module, variables: Mapping[str, Any]) -> None:
    """Put variables of Linen, with or without their boxes, into `module`; collections other than KINDS are left out.

    Raises:
      ValueError: a leaf that only one side has, or of another shape or dtype; names it. Nothing has changed then.
    """
    plan = []
    for collection in KINDS:
        leaves = _leaves(module, collection)
        given = traverse_util.flatten_dict(nn.unbox(dict(variables.get(collection, {}))), sep="/")
        for path in sorted({*leaves, *given}):
            where = f"{collection}/{path}"
            if path not in leaves:
                raise ValueError(f"{where} is no leaf of the module" + suggest(path, leaves))
            if path not in given:
                raise ValueError(f"{where} of the module is not among the variables" + suggest(path, given))
            old, new = leaves[path].get_value(), jnp.asarray(given[path])
            if (old.shape, old.dtype) != (new.shape, new.dtype):
                raise ValueError(f"{where} is {old.dtype} {old.shape}, and the variables have {new.dtype} {new.shape}")
            plan.append((leaves[path], new))
    for leaf, new in plan:
        leaf.set_value(new)


def _leaves(module: nnx.Module, collection: str) -> dict[str, nnx.Variable]:
    """Slash path -> what holds the leaf."""
    held = nnx.to_flat_state(nnx.state(module, KINDS[collection]))
    return {"/".join(map(str, path)): leaf for path, leaf in held}


def _example(shape: Sequence[int], dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, *shape), dtype)


def _sizes(value: int | Sequence[int]) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)


def _hashable(value: Any) -> Any:
    """Lists as tuples: what is static in a module is compared and hashed."""
    return tuple(_hashable(v) for v in value) if isinstance(value, list | tuple) else value
