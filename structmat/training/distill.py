"""Distillation after a switch: the model in its new structures learns from what it was before, beside the data.

Edalati et al., "Kronecker Decomposition for GPT Compression" (KnGPT2), ACL 2022, arXiv 2110.08152: after the projection of a
model its own outputs are the targets, of inner layers too. Of the paper's terms this has the outputs of the MLPs; the logits
take the place of the embeddings and attention maps, by the divergence of Hinton et al., "Distilling the Knowledge in a Neural
Network", arXiv 1503.02531.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax

from structmat.nn import Site
from structmat.nn.method import Lesson, Method, Outputs
from structmat.structures import StructureError

MLP = "mlp"
"""Name of the MLP within a transformer block."""
SMALL = 1e-12
"""Below it a mean square is taken as this."""


@dataclasses.dataclass(frozen=True, repr=False)
class Distill(Method):
    """`distill(weight=1.0, temperature=1.0, features=1.0)`, from the first switch in the middle of the run on.

    The loss is that of the data + weight * temperature^2 * KL(teacher || model) of the softmax of logits / temperature, the mean
    over tokens or images, + features * the mean over MLP blocks of the mean squared difference of their outputs, relative to
    the mean square of the teacher's, so that a weight means the same at every depth and width. The teacher is the model just
    before the switch, without dropout. Metrics have both terms as they are added: `distill_logits`, `distill_features`. A term
    of weight 0 is not computed; without both no teacher is kept.
    """

    weight: float = 1.0
    temperature: float = 1.0
    features: float = 1.0
    name: ClassVar[str] = "distill"
    has_teacher: ClassVar[bool] = True

    def check(self) -> None:
        for name in ("weight", "features"):
            if getattr(self, name) < 0:
                raise StructureError(f"{self.name}: {name} must not be negative, got {getattr(self, name)}")
        if self.temperature <= 0:
            raise StructureError(f"{self.name}: temperature must be above 0, got {self.temperature}; 1.0 is common")

    def teacher(self, sites: Mapping[str, Site], steps: int) -> Lesson | None:
        blocks = mlp_blocks(sites) if self.features else ()
        if self.features and not blocks:
            raise StructureError(
                f"{self.name}: features={self.features} compares the outputs of MLP blocks, and this model has none; its "
                f"sites: {', '.join(sites)}; features=0.0 compares logits alone"
            )
        return Lesson(blocks, self.terms) if self.weight or self.features else None

    def terms(self, own: Outputs, taught: Outputs) -> dict[str, jax.Array]:
        """f32 () of each term as it is added to the loss."""
        found: dict[str, jax.Array] = {}
        if self.weight:
            softness = self.weight * self.temperature**2
            found["distill_logits"] = softness * divergence(own[0], taught[0], self.temperature)
        if self.features:
            found["distill_features"] = self.features * difference(own[1], taught[1])
        return found


def mlp_blocks(sites: Mapping[str, Any]) -> tuple[str, ...]:
    """Layer paths of the modules named `mlp` that hold sites, in order: `layers_0/mlp`, `layers_1/mlp`, ..."""
    return tuple(dict.fromkeys(path.rpartition("/")[0] for path in sites if path.split("/")[-2:-1] == [MLP]))


def divergence(logits: jax.Array, targets: jax.Array, temperature: float) -> jax.Array:
    """f32 (): KL of softmax(logits / temperature) from softmax(targets / temperature), both (..., classes), the mean over `...`."""
    log_p, log_q = (jax.nn.log_softmax(a.astype(jnp.float32) / temperature) for a in (logits, targets))
    return optax.losses.kl_divergence_with_log_targets(log_p, log_q).mean()


def difference(own: Mapping[str, jax.Array], taught: Mapping[str, jax.Array]) -> jax.Array:
    """f32 (): mean over names of the mean squared difference of two arrays of equal shape, over the mean square of the
    second."""
    each = []
    for name, target in taught.items():
        target = target.astype(jnp.float32)
        size = jnp.maximum(jnp.square(target).mean(), SMALL)
        each.append(jnp.square(own[name].astype(jnp.float32) - target).mean() / size)
    return sum(each) / len(each)
