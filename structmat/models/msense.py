"""mSENSE: SENSE with a learnable inverse Fourier transform (Dao et al. 2022).

The transform is replaced in one step of SENSE; whether the SENSE of the paper's tables iterates is not known to us.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from structmat.models.attention import Structures
from structmat.models.sense import zero_filled
from structmat.nn.monarch_transform import MonarchTransform


class MSense(nn.Module):
    """kspace and maps `(..., coils, h, w)`, mask (h, w) or broadcast to kspace -> image `(..., h, w)` complex.

    Of every coil the masked k-space goes through two learnable transforms, along columns and along rows, which all coils
    share; then coils are combined as in SENSE. At initialisation it is `sense.zero_filled`. Linear in k-space, with
    2 (h (P_h + K_h) + w (P_w + K_w)) real parameters, K the largest divisor not above the root and P its cofactor.

    Sites of kind `linear`: rows (length h) and columns (length w). Gradients are complex, see `MonarchTransform`.

    Attributes:
      structures: site -> structure, from `structmat.nn.assign`, which makes dense(), a full matrix, of sites that no rule
        matches. A site left out here, as in MSense() itself, is a Monarch factor pair.
      param_dtype: complex64 or complex128.
    """

    structures: Structures = ()
    param_dtype: Any = jnp.complex64

    @nn.compact
    def __call__(self, kspace: jax.Array, maps: jax.Array, mask: jax.Array) -> jax.Array:
        chosen = dict(self.structures)

        def transform(x: jax.Array, name: str) -> jax.Array:
            own = dict(structure=chosen.get(name), param_dtype=self.param_dtype, name=name)
            return MonarchTransform(x.shape[-1], inverse=True, norm="ortho", **own)(x)

        def inverse(k: jax.Array) -> jax.Array:
            return transform(transform(k, "columns").swapaxes(-1, -2), "rows").swapaxes(-1, -2)

        return zero_filled(kspace, maps, mask, inverse)
