"""x times a block-low-rank matrix (Monarch, block tensor train), output blocks contiguous."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.chips import MIB, Chip, current_chip
from pallas_kernels.dispatch import Choice, Implementation, KernelError, resolve
from pallas_kernels.hopper_tiles import UNMEASURED
from pallas_kernels.monarch import tpu
from pallas_kernels.monarch.configs import keeps, tiles
from pallas_kernels.monarch.xla import two_stage
from pallas_kernels.tiling import LANES, whole_sublanes, whole_tiles

OP = "monarch"
NARROWEST = 64
"""Least slice rank of the kernel: narrower groups spend more on joining lanes than XLA on its transposes."""
RESIDENT, RESIDENT_WIDE, WIDE = 4, 6, 256
"""Part of VMEM, as its denominator, up to which XLA is taken to keep activations between the stages; from slice rank WIDE
on the kernel pays earlier: at n 4096, 1,024 tokens and 4 blocks, forward and gradients, 447 k cycles against XLA's 494 k on
v5e and 153 k against 160 k on v6e, while with 8 blocks (rank 64) it is 92 k against 84 k on v6e."""
KINDS = ("forward", "backward_x", "backward_weights")


def monarch(
    x: jax.Array, right: jax.Array, left: jax.Array, *, implementation: Implementation | None = None
) -> jax.Array:
    """x `(..., k p)` -> x W `(..., l s)`.

    Args:
      right: (k, p, l, r), first stage. left: (l, k, r, s), second stage.
      implementation: None follows `choose`; "xla" or "pallas" force one.

    Raises:
      KernelError: shapes that do not fit each other, or "pallas" where the kernel does not apply.
    """
    if right.ndim != 4 or left.ndim != 4 or left.shape[:3] != (right.shape[2], right.shape[0], right.shape[3]):
        raise KernelError(f"{OP}: right must be (k, p, l, r) and left (l, k, r, s), got {right.shape} and {left.shape}")
    (k, p, l, r), s = right.shape, left.shape[3]
    if not x.ndim or x.shape[-1] != k * p:
        raise KernelError(f"{OP}: x of shape {x.shape} must end in {k * p} for right {right.shape}")
    chip, dtype = current_chip(), jnp.result_type(x, right, left)
    m = math.prod(x.shape[:-1])
    chosen = resolve(OP, implementation, choose(m, (k, p, l, s, r), dtype, chip), chip)
    flat = x.reshape(m, k * p)
    if chosen == "xla":
        y = two_stage(flat, right, left)
    else:
        flat_right, flat_left = right.reshape(k, p, l * r), left.reshape(l, k * r, s)
        y = _kernels(chip)(flat.astype(dtype), flat_right.astype(dtype), flat_left.astype(dtype), chip)
    return y.reshape(*x.shape[:-1], l * s)


def choose(m: int, sizes: tuple[int, int, int, int, int], dtype: Any, chip: Chip) -> Choice:
    """The rule: on TPU the kernel for slice ranks of at least 64, once x, y and what lies between outgrow a quarter of VMEM,
    a sixth from slice rank 256 on.

    Smaller ones XLA keeps on chip between the stages, and its transposes cost little; from there on the kernel saves
    their way to HBM and back. With narrower ranks joining lanes costs more than XLA's transposes.

    On Hopper, where the kernels take slice ranks of multiples of 16 in bfloat16, XLA until they have been measured there.

    Args:
      m: rows of x. sizes: (k, p, l, s, r).
    """
    k, p, l, s, r = sizes
    reduction = p * s / (r * (p + s))
    facts = {"flop_reduction": reduction, "bound": chip.bound(k * p, l * s)}
    said = f"{k} x {l} slices of {p} x {s}, rank {r}, bound {facts['bound']:.3g}x over dense"
    refused = _unsupported(m, sizes, dtype, chip)
    if refused:
        return Choice("xla", f"no kernel: {refused}; {said}", refused, **facts)
    if chip.platform == "gpu":
        return Choice("xla", f"{UNMEASURED}; {said}", **facts)
    between = m * (k * p + l * s + l * k * r) * jnp.dtype(dtype).itemsize
    if between < chip.vmem // (RESIDENT if r < WIDE else RESIDENT_WIDE):
        return Choice("xla", f"XLA keeps {between / MIB:.0f} MiB of activations in VMEM; {said}", **facts)
    return Choice("pallas", said, **facts)


def _unsupported(m: int, sizes: tuple[int, int, int, int, int], dtype: Any, chip: Chip) -> str:
    k, p, l, s, r = sizes
    dtype = jnp.dtype(dtype)
    if chip.platform == "gpu":
        from pallas_kernels.monarch import gpu  # half a second, and Mosaic GPU is not in every jaxlib

        return gpu.unsupported(m, sizes, dtype, chip)
    if chip.platform != "tpu" or not chip.vmem:
        return f"{chip.name} runs the XLA path"
    if dtype not in (jnp.bfloat16, jnp.float32):
        return f"dtype {dtype} is neither bfloat16 nor float32"
    if p % LANES or s % LANES:
        return f"slices of {p} x {s} are not multiples of {LANES} lanes"
    if r < NARROWEST or (r % LANES and LANES % r):
        return f"slice rank {r} is neither {NARROWEST} nor a multiple of {LANES}"
    join = max(1, LANES // r)
    if k % join or l % join:
        return f"slice rank {r} needs even numbers of blocks, got {k} x {l}"
    if m == 0:
        return "x has no rows"
    for kind in KINDS:
        if tiles(kind, chip, m, sizes, dtype.itemsize) is None:
            return f"{kind}: the weights of one output block do not fit {chip.vmem} bytes"
    return ""


def _kernels(chip: Chip) -> Callable[..., jax.Array]:
    if chip.platform == "gpu":
        from pallas_kernels.monarch import gpu

        return gpu.product
    return product


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def product(x: jax.Array, right: jax.Array, left: jax.Array, chip: Chip, interpret: Any = False) -> jax.Array:
    """The kernel and its gradients: x (M, k p), right (k, p, l r), left (l, k r, s) of one dtype -> (M, l s)."""
    return _stages("forward", x, right, left, chip, interpret)[0]


def _stages(
    kind: str, x: jax.Array, right: jax.Array, left: jax.Array, chip: Chip, interpret: Any, keep: bool = False
) -> tuple[jax.Array, jax.Array | None]:
    x, m = whole_sublanes(x)
    tile = tiles(kind, chip, x.shape[0], _sizes(right, left), x.dtype.itemsize)
    y, z = tpu.forward(x, right, left, tile, interpret, kind == "backward_x", keep)
    return y[:m], z


def _forward(x: jax.Array, right: jax.Array, left: jax.Array, chip: Chip, interpret: Any) -> tuple[jax.Array, Any]:
    keep = keeps(chip, right.shape[1], x.dtype.itemsize)
    y, z = _stages("forward", x, right, left, chip, interpret, keep)
    return y, (x, right, left, z)


def _backward(chip: Chip, interpret: Any, kept: Any, dy: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, right, left, z = kept
    m, sizes, size = x.shape[0], _sizes(right, left), x.dtype.itemsize
    together = tiles("backward", chip, m, sizes, size)
    tile = together or tiles("backward_weights", chip, m, sizes, size)
    padded = [whole_tiles(a, tile.tokens * tile.cores) for a in (x, dy)]
    if z is not None:
        z = jnp.pad(z, ((0, padded[0].shape[0] - z.shape[0]), (0, 0)))
    dx, dright, dleft = tpu.backward(*padded, right, left, tile, together is not None, interpret, z)
    if dx is None:
        dx, _ = _stages("backward_x", dy, right, left, chip, interpret)
    return dx[:m], dright, dleft


product.defvjp(_forward, _backward)


def _sizes(right: jax.Array, left: jax.Array) -> tuple[int, int, int, int, int]:
    """(k, p, l, s, r)."""
    (k, p, lr), (l, _, s) = right.shape, left.shape
    return k, p, l, s, lr // l
