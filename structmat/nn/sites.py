"""Sites: the one table of a model's structured weights, found by tracing shapes only.

Paths speak of single layers (`layers_7/mlp/up`) even where equal adjacent layers are stacked and scanned; `Stack` says
where the arrays are.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import flax.linen as nn
import jax

from structmat.structures import Bound, Rules, Structure, StructureError

Kind = Literal["linear", "conv", "embed", "head", "spectral"]
KINDS = ("linear", "conv", "embed", "head")
"""What a matrix may be; `spectral` is the kind of a Fourier layer's tensor."""

_records: contextvars.ContextVar[dict[str, Any] | None] = contextvars.ContextVar("sites", default=None)


@dataclasses.dataclass(frozen=True)
class Stack:
    """Where a layer of a scanned group is kept: slice `index` of `size` along axis 0 of the arrays at `path`."""

    path: str
    index: int
    size: int


@dataclasses.dataclass(frozen=True)
class Site:
    """One structured weight of a model.

    Attributes:
      bound: its structure with sizes.
      kind: `linear`, `conv`, `embed`, `head` or `spectral`.
      stack: None for a weight of its own, else its place in a scanned group.
      in_axes, out_axes: logical axis names of its input and output.
    """

    bound: Bound
    kind: Kind
    stack: Stack | None = None
    in_axes: tuple[str | None, ...] = ()
    out_axes: tuple[str | None, ...] = ()


def group_name(prefix: str, start: int, stop: int) -> str:
    """Module name of layers start..stop-1: `layers_7`, or `layers_0to3` for a scanned group."""
    return f"{prefix}_{start}" if stop == start + 1 else f"{prefix}_{start}to{stop - 1}"


_GROUP = re.compile(r"(?P<prefix>\w+)_(?P<start>\d+)to(?P<last>\d+)")


def layer_paths(path: str) -> list[str]:
    """The layer paths of one path of arrays: `layers_0to1/mlp/up` is `layers_0/mlp/up` and `layers_1/mlp/up`; any other
    path is its own."""
    parts = path.split("/")
    groups = [(i, m) for i, part in enumerate(parts) if (m := _GROUP.fullmatch(part))]
    if not groups:
        return [path]
    (i, match), *rest = groups
    if rest:
        raise StructureError(f"site {path}: nested scanned groups are not supported")
    layers = range(int(match["start"]), int(match["last"]) + 1)
    return ["/".join([*parts[:i], f"{match['prefix']}_{layer}", *parts[i + 1 :]]) for layer in layers]


def record(path: tuple[str, ...], bound: Bound, kind: Kind, in_axes: Any, out_axes: Any) -> None:
    """Called by modules; notes a site when `sites` is listening."""
    records = _records.get()
    if records is not None:
        as_tuple = lambda a: (a,) if a is None or isinstance(a, str) else tuple(a)
        records["/".join(path)] = Site(bound, kind, None, as_tuple(in_axes), as_tuple(out_axes))


@contextlib.contextmanager
def _listening() -> Iterator[dict[str, Site]]:
    token = _records.set({})
    try:
        yield _records.get()
    finally:
        _records.reset(token)


def sites(model: nn.Module, *example: Any) -> dict[str, Site]:
    """Every structured weight of `model` by layer path, naturally sorted; nothing is computed.

    Args:
      model: a Linen module built from structmat.nn.
      example: arrays or ShapeDtypeStructs of one call's positional arguments.

    Examples:
      >>> from structmat.nn import StructuredDense
      >>> model = nn.Sequential([StructuredDense(32, structure="low_rank(rank=4)"), nn.relu, StructuredDense(10)])
      >>> found = sites(model, jax.ShapeDtypeStruct((3, 64), "float32"))
      >>> {path: site.bound for path, site in found.items()}
      {'layers_0': low_rank(rank=4): (64,) -> (32,), 'layers_2': dense(): (32,) -> (10,)}
    """
    with _listening() as found:
        jax.eval_shape(lambda *args: model.init(jax.random.key(0), *args), *example)
    table: dict[str, Site] = {}
    for path, site in found.items():
        layers = layer_paths(path)
        for i, layer in enumerate(layers):
            stack = None if layer == path else Stack(path, i, len(layers))
            table[layer] = dataclasses.replace(site, stack=stack)
    return dict(sorted(table.items(), key=lambda item: _natural(item[0])))


def _natural(path: str) -> list[tuple[int, str]]:
    return [(int(t), "") if t.isdigit() else (-1, t) for t in re.split(r"(\d+)", path)]


def array_path(path: str, site: Site) -> tuple[str, ...]:
    """Where the site's leaves lie in the variable tree (without the collection)."""
    return tuple((site.stack.path if site.stack else path).split("/"))


def leaf_groups(table: Mapping[str, Site]) -> dict[tuple[str, ...], tuple[str, Site]]:
    """Distinct places of arrays -> (first layer path, site): stacked layers appear once."""
    groups: dict[tuple[str, ...], tuple[str, Site]] = {}
    for path, site in table.items():
        groups.setdefault(array_path(path, site), (path, site))
    return groups


def site_params(variables: Mapping[str, Any], path: str, site: Site) -> dict[str, Any]:
    """The site's own parameters (trainable and frozen merged) out of a model's variables."""
    leaves = site.bound.leaves()
    found = branches(leaves)
    for collection in ("params", "frozen"):
        node: Any = variables.get(collection, {})
        for part in array_path(path, site):
            node = node.get(part, {})
        found = merge(found, {n: v for n, v in node.items() if n in leaves})
    if site.stack is not None:
        found = jax.tree.map(lambda a: a[site.stack.index], found)
    return found


def branches(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The nesting of `leaves` without its arrays: collections hold no part that has none (a fixed transform in a
    product), while the structure looks for its branch."""
    return {name: branches(leaf) for name, leaf in leaves.items() if isinstance(leaf, Mapping)}


def merge(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """Union of two nested dicts with disjoint leaves."""
    out = dict(a)
    for name, value in b.items():
        out[name] = merge(out[name], value) if isinstance(out.get(name), Mapping) else value
    return out


def assign(model: nn.Module, rules: Any, *example: Any) -> nn.Module:
    """The model with its structures chosen by rules, all budgets resolved.

    Args:
      model: a module with a field `structures` (and `scan`, where it stacks layers).
      rules: anything `Rules.of` reads.

    Raises:
      StructureError: a rule matches nothing, or a structure does not fit a site; names the site.
    """
    plain = {"structures": ()} | ({"scan": False} if hasattr(model, "scan") else {})
    table = sites(model.clone(**plain), *example)
    chosen = Rules.of(rules).resolve({path: site.kind for path, site in table.items()})
    return model.clone(structures=tuple((path, bind(path, table[path], s).structure) for path, s in chosen.items()))


def bind(path: str, site: Site, structure: Structure) -> Bound:
    """Another structure with the sizes of a site.

    Raises:
      StructureError: it does not fit them; names the site.
    """
    try:
        return site.bound.rebind(structure)
    except StructureError as error:
        raise StructureError(f"site {path}: {error}") from None


def scope(structures: tuple[tuple[str, Any], ...], prefix: str) -> tuple[tuple[str, Any], ...]:
    """The part of an assignment under `prefix/`, with the prefix removed."""
    return tuple((p[len(prefix) + 1 :], s) for p, s in structures if p.startswith(prefix + "/"))


def pick(structures: tuple[tuple[str, Any], ...], path: str) -> Any:
    """The structure assigned to `path`, or dense."""
    return dict(structures).get(path, "dense()")
