"""Residual networks as first published (He et al. 2016, "Deep Residual Learning"), and VGG: batch normalisation after every
structured convolution.

In training the statistics are those of the batch over all devices; running means of them are in the collection
`batch_stats`, and are what evaluation uses.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from structmat.models.attention import Structures
from structmat.models.head import logits
from structmat.nn import StructuredConv
from structmat.nn.sites import pick, scope
from structmat.structures.convolution import View

MOMENTUM = 0.9
"""Share of running statistics that stays in a step."""
VGG_STAGES: dict[int, tuple[int, ...]] = {
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}
"""Depth -> convolutions of each stage."""


def stages_of(depth: int) -> tuple[tuple[int, ...], bool]:
    """(blocks of each stage, whether they are bottlenecks) of a published depth: 18, 34, 50, 101 or 152 for large images,
    6n + 2 (20, 32, 44, 56, 110, ...) for those of CIFAR.

    Raises:
      ValueError: no such depth.
    """
    published = {
        18: ((2, 2, 2, 2), False),
        34: ((3, 4, 6, 3), False),
        50: ((3, 4, 6, 3), True),
        101: ((3, 4, 23, 3), True),
        152: ((3, 8, 36, 3), True),
    }
    if depth in published:
        return published[depth]
    if depth < 8 or depth % 6 != 2:
        raise ValueError("must be one of 18, 34, 50, 101, 152, or 6n + 2 such as 8, 20, 32, 44, 56, 110")
    return ((depth - 2) // 6,) * 3, False


class NormedConv(nn.Module):
    """x `(batch, h, w, channels)` -> `(batch, h / stride, w / stride, features)`: a convolution without bias, zeros around it,
    and batch normalisation. Site conv."""

    features: int
    size: int
    stride: int
    view: View
    dtype: Any
    structures: Structures
    axes: tuple[str, str]

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        conv = StructuredConv(
            self.features,
            (self.size, self.size),
            structure=pick(self.structures, "conv"),
            strides=self.stride,
            padding=self.size // 2,
            view="channel" if self.stride > 1 else self.view,
            use_bias=False,
            dtype=self.dtype,
            in_axes=self.axes[0],
            out_axes=self.axes[1],
            name="conv",
        )
        norm = nn.BatchNorm(
            use_running_average=not train, momentum=MOMENTUM, epsilon=1e-5, dtype=self.dtype, name="norm"
        )
        return norm(conv(x))


class BlockV1(nn.Module):
    """x `(batch, h, w, channels)` -> `(batch, h / stride, w / stride, features)`: two convolutions of 3 x 3, or as a bottleneck
    of a quarter of the features 1 x 1, 3 x 3, 1 x 1; then the sum with x, then ReLU. Sites conv1/conv, conv2/conv,
    conv3/conv and, where the shape changes, shortcut/conv of 1 x 1."""

    features: int
    stride: int
    bottleneck: bool
    view: View
    dtype: Any
    structures: Structures

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        def apply(name: str, y: jax.Array, features: int, size: int, stride: int, axes: tuple[str, str]) -> jax.Array:
            own = scope(self.structures, name)
            return NormedConv(features, size, stride, self.view, self.dtype, own, axes, name=name)(y, train)

        if self.bottleneck:
            y = nn.relu(apply("conv1", x, self.features // 4, 1, 1, ("embed", "mlp")))
            y = nn.relu(apply("conv2", y, self.features // 4, 3, self.stride, ("mlp", "mlp")))
            y = apply("conv3", y, self.features, 1, 1, ("mlp", "embed"))
        else:
            y = nn.relu(apply("conv1", x, self.features, 3, self.stride, ("embed", "mlp")))
            y = apply("conv2", y, self.features, 3, 1, ("mlp", "embed"))
        if x.shape != y.shape:
            x = apply("shortcut", x, self.features, 1, self.stride, ("embed", "embed"))
        return nn.relu(x + y)


class ResNetV1(nn.Module):
    """images `(batch, size, size, channels)` -> logits `(batch, classes)` f32.

    Sites of kind `conv`: stem/conv, layers_i/{conv1, conv2, conv3, shortcut}/conv; and head.

    Attributes:
      classes: of images. width: channels of the first stage (four times as many come out of a bottleneck); every later
        stage has twice as many at half the side.
      blocks: in each stage. bottleneck: whether they are, as from depth 50 on. See `stages_of`.
      large: a stem of 7 x 7 at half the side and a maximum over 3 x 3 at half that, for images of 224; else 3 x 3.
      view: which matrix of a kernel is structured, see structmat.structures.convolution; where a convolution halves the side
        `channel`, whose factors all work at the resolution of the output.
      structures: layer path -> structure, from `structmat.nn.assign`.
      dtype: compute dtype; parameters and running statistics stay f32.
    """

    classes: int = 10
    width: int = 16
    blocks: tuple[int, ...] = (3, 3, 3)
    bottleneck: bool = False
    large: bool = False
    view: View = "channel"
    structures: Structures = ()
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        own = dict(view=self.view, dtype=self.dtype)
        stem = NormedConv(
            self.width,
            7 if self.large else 3,
            2 if self.large else 1,
            structures=scope(self.structures, "stem"),
            axes=("features", "embed"),
            name="stem",
            **own,
        )
        x = nn.relu(stem(images, train))
        if self.large:
            x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        order = [(stage, first == 0) for stage, count in enumerate(self.blocks) for first in range(count)]
        for i, (stage, first) in enumerate(order):
            name = f"layers_{i}"
            block = BlockV1(
                self.width * 2**stage * (4 if self.bottleneck else 1),
                stride=2 if stage and first else 1,
                bottleneck=self.bottleneck,
                structures=scope(self.structures, name),
                name=name,
                **own,
            )
            x = block(x, train)
        return logits(x.mean((1, 2)), self.classes, self.structures, self.dtype, "classes")

    def positions(self, path: str, size: int) -> int:
        """Of the output of the convolution at a site, for images of this side."""
        layer, name, *_ = path.split("/")
        if layer == "stem":
            return (size // (2 if self.large else 1)) ** 2
        stage_of = [stage for stage, count in enumerate(self.blocks) for _ in range(count)]
        i = int(layer.removeprefix("layers_"))
        halvings = stage_of[i] + 2 * self.large
        before_stride = self.bottleneck and name == "conv1" and stage_of[i] > stage_of[max(i - 1, 0)]
        return (size // 2 ** (halvings - before_stride)) ** 2


class VGG(nn.Module):
    """images `(batch, size, size, channels)` -> logits `(batch, classes)` f32: stages of 3 x 3 convolutions with batch
    normalisation and ReLU, each stage ending in a maximum over 2 x 2, then one linear layer (Simonyan and Zisserman 2015, as
    it is used on CIFAR).

    Sites of kind `conv`: layers_i/conv; and head. The side must divide by 2 ** stages.

    Attributes:
      classes: of images. width: channels of the first stage, twice as many in each later one up to eight times.
      convs: of each stage, see VGG_STAGES.
      view: which matrix of a kernel is structured, see structmat.structures.convolution.
      structures: layer path -> structure, from `structmat.nn.assign`.
      dtype: compute dtype; parameters and running statistics stay f32.
    """

    classes: int = 10
    width: int = 64
    convs: tuple[int, ...] = VGG_STAGES[19]
    view: View = "channel"
    structures: Structures = ()
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        if any(side % 2 ** len(self.convs) for side in images.shape[1:3]):
            raise ValueError(
                f"{len(self.convs)} stages halve the side as often, and {images.shape[1:3]} is not divisible so"
            )
        x, i = images, 0
        for stage, count in enumerate(self.convs):
            for _ in range(count):
                own, axes = scope(self.structures, f"layers_{i}"), ("embed" if i else "features", "embed")
                features = self.width * min(2**stage, 8)
                x = nn.relu(NormedConv(features, 3, 1, self.view, self.dtype, own, axes, name=f"layers_{i}")(x, train))
                i += 1
            x = nn.max_pool(x, (2, 2), (2, 2))
        return logits(x.mean((1, 2)), self.classes, self.structures, self.dtype, "classes")

    def positions(self, path: str, size: int) -> int:
        """Of the output of the convolution at a site, for images of this side."""
        stage_of = [stage for stage, count in enumerate(self.convs) for _ in range(count)]
        return (size // 2 ** stage_of[int(path.split("/")[0].removeprefix("layers_"))]) ** 2
