"""Counts floating point operations in a traced function, independently of the cost formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def count_flops(fn: Callable[..., Any], *args: Any) -> int:
    """FLOPs of `fn(*args)`: 2 per multiply-add of a `dot_general`, 1 per entry of a product of two arrays, 5 N log2 N per
    complex FFT of length N and half of it per real one.

    Additions and multiplications by a scalar are left out, as in `Cost`. A scan counts its body `length` times; a
    `while`, whose length is unknown, and convolutions are refused.
    """
    return _count(jax.make_jaxpr(fn)(*args).jaxpr)


def _count(jaxpr: Any) -> int:
    total = 0
    for eqn in jaxpr.eqns:
        name, out = eqn.primitive.name, eqn.outvars[0].aval if eqn.outvars else None
        if name in ("while", "conv_general_dilated", "cond"):
            raise NotImplementedError(f"cannot count {name}")
        if name == "dot_general":
            (contract, _), _ = eqn.params["dimension_numbers"]
            total += 2 * math.prod(out.shape) * math.prod(eqn.invars[0].aval.shape[d] for d in contract)
        elif name == "mul" and jnp.issubdtype(out.dtype, jnp.inexact) and all(v.aval.shape for v in eqn.invars):
            total += math.prod(out.shape)
        elif name == "fft":
            total += _fft(eqn)
        times = eqn.params.get("length", 1) if name == "scan" else 1
        total += times * sum(_count(inner) for inner in _inner(eqn.params))
    return total


def _fft(eqn: Any) -> int:
    lengths, kind = eqn.params["fft_lengths"], eqn.params["fft_type"].name
    size = math.prod(lengths)
    whole = eqn.outvars[0].aval if "IRFFT" in kind else eqn.invars[0].aval
    transforms = math.prod(whole.shape) // size
    per = 5 * size * math.log2(size) / (2 if "RFFT" in kind else 1)
    return round(transforms * per)


def _inner(params: dict[str, Any]) -> list[Any]:
    values = [v for value in params.values() for v in (value if isinstance(value, tuple | list) else (value,))]
    values = [v.jaxpr if hasattr(v, "jaxpr") else v for v in values]
    return [v for v in values if hasattr(v, "eqns")]
