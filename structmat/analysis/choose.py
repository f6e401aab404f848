"""Which structure for these weights? Every candidate at equal budget, projected from each dense weight in turn."""

from __future__ import annotations

import dataclasses
import functools
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from structmat.analysis.choices import Choice, Choices
from structmat.structures import FAMILIES, Bound, Fit, Structure, StructureError, Sum, parse, project
from structmat.structures.arguments import hints
from structmat.structures.errors import suggest
from structmat.structures.leaf import Cost

METRICS = ("bits", "params", "flops")
SUMS = (
    "low_rank() + random_sparse(select='magnitude')",
    "low_rank() + block_sparse(block=16, pattern='magnitude')",
    "quantized() + low_rank()",
    "block_diagonal() + low_rank()",
)
"""Sums among the default candidates; `fit` halves the budget, so a term of coarse steps comes first and low rank takes
what it leaves."""

Source = Any
"""A dense `(d_in, d_out)` array, or a callable without arguments that reads one."""


_SQUARE = ((256,), (256,))  # every family's example binds there


def candidates() -> tuple[Structure, ...]:
    """What `choose` tries: every family of the registry with something left to choose, then SUMS.

    A family is taken with its defaults, or where it needs an argument (`n_m_sparse` its m) as its example with one
    argument left open. A family whose support can follow the size of the weight's entries (`magnitude`,
    `norm`) does.
    """
    opened = (_opened(family) for family in FAMILIES.values())
    return (*(_by_size(s) for s in opened if s is not None), *(parse(text) for text in SUMS))


def _opened(family: type[Structure]) -> Structure | None:
    """The family with something left for `fit` to choose, or None where nothing ever is."""
    example = parse(family.about.example)
    fields = [f.name for f in family.own_fields()]
    trials = [lambda: family(), *(functools.partial(dataclasses.replace, example, **{n: None}) for n in fields)]
    for trial in trials:
        try:
            structure = trial()
            if structure.candidates(*_SQUARE):
                return structure
        except (StructureError, TypeError):  # an argument that is needed, or never None
            continue
    return None


def _by_size(structure: Structure) -> Structure:
    """The structure whose support follows the size of the weight's entries, where it has that choice."""
    options = {n: get_args(hint) for n, hint in hints(type(structure)).items()}
    wanted = {n: by for n, given in options.items() for by in ("magnitude", "norm") if by in given}
    return dataclasses.replace(structure, **wanted)


def choose(
    dense_matrices: Source | Mapping[str, Source],
    budget: float | Sequence[float],
    *,
    metric: Literal["bits", "params", "flops"] = "bits",
    structures: Sequence[str | Structure] | None = None,
    in_grams: Source | Mapping[str, Source] | None = None,
    key: jax.Array | None = None,
    progress: Callable[[Choice], None] | None = None,
) -> Choices:
    """Project every weight onto the largest member of every candidate within the budget, and rank them by error.

    One weight is in memory at a time: a callable is called once, and its array dropped before the next one is read.

    Examples:
      >>> found = choose({"w": jnp.kron(jnp.eye(4), jnp.ones((4, 4)))}, budget=0.25, structures=["block_diagonal()", "diagonal()"])
      >>> found.best("w").candidate, round(found.best("w").error, 3)
      ('block_diagonal()', 0.0)

    Args:
      dense_matrices: one array (d_in, d_out), or path -> array or callable returning one. Half precision is read as f32.
      budget: fraction of the dense matrix in (0, 1], or several of them for curves of error against budget.
      metric: what is budgeted: stored `bits` (float32 values, int32 indices), `params` or `flops` per row.
      structures: instead of `candidates()`; one with nothing left to choose is taken as it is, if within the budget.
      in_grams: E[x xᵀ] of each weight's input, (d_in, d_in) or its diagonal (d_in,), path -> array or callable. Errors
        are then weighted, |A^(1/2) (w - M)| / |A^(1/2) w|; a family without a closed form for the gram is projected
        with its diagonal or without it, which `Choice.gram` says.
      key: of the random parts of projections; default key 0. Every (path, candidate) folds its own.
      progress: called with every Choice as it is made.

    Raises:
      StructureError: a budget, metric, structure, weight or gram that is not valid. A candidate that does not fit, or
        whose projection is refused, is a Choice with a reason.
    """
    if metric not in METRICS:
        raise StructureError(f"choose: metric {metric!r}{suggest(str(metric), METRICS)}")
    budgets = _budgets(budget)
    tried = candidates() if structures is None else tuple(parse(s) for s in structures)
    weights, grams = _named(dense_matrices), _named(in_grams)
    if not weights or not tried:
        raise StructureError(f"choose: no {'structures' if weights else 'weights'} were given")
    if in_grams is not None and (odd := sorted(set(weights) ^ set(grams))):
        raise StructureError(
            f"choose: in_grams must have the paths of the weights; only on one side: {', '.join(odd[:6])}"
        )
    key = jax.random.key(0) if key is None else key
    rows: list[Choice] = []
    for path, source in weights.items():
        rows += _rank(path, source, grams.get(path), tried, budgets, metric, key, progress or (lambda choice: None))
    return Choices(tuple(rows), metric, budgets)


def _budgets(budget: float | Sequence[float]) -> tuple[float, ...]:
    values = tuple(budget) if isinstance(budget, Sequence) else (budget,)
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
            raise StructureError(f"choose: budget {value!r} must be a fraction of dense in (0, 1]")
    if not values:
        raise StructureError("choose: no budget was given")
    return tuple(sorted({float(v) for v in values}))


def _named(sources: Any) -> Mapping[str, Source]:
    if sources is None:
        return {}
    return sources if isinstance(sources, Mapping) else {"weight": sources}


def _rank(
    path: str,
    source: Source,
    gram_source: Source,
    tried: tuple[Structure, ...],
    budgets: tuple[float, ...],
    metric: str,
    key: jax.Array,
    progress: Callable[[Choice], None],
) -> list[Choice]:
    """All Choices of one weight, which lives only inside this call."""
    w, gram = _read(path, source), None
    if gram_source is not None:
        gram = jnp.asarray(gram_source() if callable(gram_source) else gram_source, w.dtype)
        if gram.shape not in ((w.shape[0],), (w.shape[0],) * 2):
            raise StructureError(f"choose: the gram of {path!r} has shape {gram.shape}, its weight {w.shape}")
    if not _norm(w, gram) > 0:
        raise StructureError(
            f"choose: weight {path!r} is zero{'' if gram is None else ' under its gram'}; leave it out"
        )
    key = jax.random.fold_in(key, zlib.crc32(path.encode()))
    rows = []
    for structure in tried:
        measured: dict[Bound, dict[str, Any]] = {}
        own = jax.random.fold_in(key, zlib.crc32(str(structure).encode()))
        for budget in budgets:
            about = dict(path=path, shape=w.shape, candidate=structure.short(), budget=budget)
            try:
                bound = _member(structure, w.shape, metric, budget)
                if bound not in measured:
                    measured[bound] = _measure(bound, w, gram, own)
                choice = Choice(**about, **measured[bound])
            except StructureError as error:
                choice = Choice(**about, reason=str(error))
            progress(choice)
            rows.append(choice)
    return rows


def _read(path: str, source: Source) -> jax.Array:
    w = jnp.asarray(source() if callable(source) else source)
    if w.ndim != 2:
        raise StructureError(f"choose: weight {path!r} has shape {w.shape}; give one matrix (d_in, d_out) per path")
    if jnp.issubdtype(w.dtype, jnp.complexfloating):
        raise StructureError(f"choose: weight {path!r} is {w.dtype}; budgets are fractions of a real matrix")
    w = w.astype(jnp.promote_types(w.dtype, jnp.float32))
    if not jnp.isfinite(w).all():
        raise StructureError(f"choose: weight {path!r} has entries that are not finite")
    return w


def _member(structure: Structure, shape: tuple[int, int], metric: str, budget: float) -> Bound:
    """The largest member within the budget; the structure itself where nothing is left to choose."""
    sizes = (shape[0],), (shape[1],)
    terms = structure.terms if isinstance(structure, Sum) else (structure,)
    free = any(t.candidates(*sizes) for t in terms)
    bound = (Fit(structure, **{metric: budget}) if free else structure).bind(*sizes)
    share = getattr(_shares(bound), metric)
    if share > budget * (1 + 1e-9):
        raise StructureError(f"{bound.structure.short()} needs {share:.4f} of dense {metric}, the budget is {budget:g}")
    return bound


def _shares(bound: Bound) -> Cost:
    """Cost per row as fractions of dense."""
    cost, dense = bound.cost(1), parse("dense()").bind(bound.in_shape, bound.out_shape).cost(1)
    return Cost(**{f.name: getattr(cost, f.name) / getattr(dense, f.name) for f in dataclasses.fields(Cost)})


def _measure(bound: Bound, w: jax.Array, gram: jax.Array | None, key: jax.Array) -> dict[str, Any]:
    """The fields of a Choice that a projection decides."""
    used = _usable(bound, gram)
    start = time.perf_counter()
    matrix = jax.block_until_ready(project(w, bound.structure, key=key, in_gram=used))
    seconds = time.perf_counter() - start
    error = float(_norm(w - matrix.materialize(), gram) / _norm(w, gram))
    if not error < float("inf"):
        raise StructureError(f"the projection onto {bound.structure.short()} is not finite")
    shares = _shares(bound)
    told = "" if gram is None else "none" if used is None else ("diagonal", "full")[used.ndim - 1]
    return dict(
        structure=str(bound.structure),
        error=error,
        bits=shares.bits,
        params=shares.params,
        flops=shares.flops,
        seconds=seconds,
        gram=told,
        optimal=bound.exact and used is gram,
    )


def _usable(bound: Bound, gram: jax.Array | None) -> jax.Array | None:
    """As much of the gram as the family's projection has a closed form for."""
    if gram is None or bound.grams == "none":
        return None
    return jnp.diagonal(gram) if gram.ndim == 2 and bound.grams == "diagonal" else gram


@functools.partial(jax.jit)
def _norm(w: jax.Array, gram: jax.Array | None) -> jax.Array:
    """|A^(1/2) w| in Frobenius norm."""
    if gram is None:
        return jnp.linalg.norm(w)
    weighted = gram[:, None] * w if gram.ndim == 1 else gram @ w
    return jnp.sqrt(jnp.maximum(jnp.sum((w.conj() * weighted).real), 0))
