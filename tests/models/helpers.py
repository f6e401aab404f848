"""What the tests of several models share."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from structmat.nn import site_params, sites


def shaken(model: nn.Module, example: jax.Array) -> Any:
    """Variables drawn anew, f32, those that start at zero too; scales stay near 1."""
    rng = np.random.default_rng(0)
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), example))
    near = lambda path: 1 if path[-1].key == "scale" else 0
    draw = lambda path, s: (near(path) + rng.normal(0, 0.4, s.shape)).astype(np.float32)
    return jax.tree_util.tree_map_with_path(draw, shapes)


class PlainImageModel:
    """The layers of an image model in float64 numpy; weights only as dense matrices."""

    def __init__(self, model: nn.Module, variables: Any, example: jax.ShapeDtypeStruct):
        self._model, self._variables, self._sites = model, variables, sites(model, example)

    def own(self, path: str) -> Any:
        """Parameters at a path, where layers are named one by one and kept stacked."""
        name, *rest = path.split("/")
        layer = int(name.removeprefix("layers_")) if name.startswith("layers_") else None
        node = self._variables["params"][name if layer is None else f"layers_0to{self._model.layers - 1}"]
        for part in rest:
            node = node[part]
        return jax.tree.map(lambda a: np.asarray(a if layer is None else a[layer], np.float64), node)

    def linear(self, x: np.ndarray, path: str) -> np.ndarray:
        params = site_params(self._variables, path, self._sites[path])
        return x @ np.asarray(self._sites[path].bound.materialize(params), np.float64) + self.own(path)["bias"].ravel()

    def norm(self, x: np.ndarray, path: str) -> np.ndarray:
        centred, own = x - x.mean(-1, keepdims=True), self.own(path)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * own["scale"] + own["bias"]

    def mlp(self, x: np.ndarray, path: str) -> np.ndarray:
        hidden = self.linear(x, f"{path}/up")
        gelu = 0.5 * hidden * (1 + np.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
        return self.linear(gelu, f"{path}/down")

    def patches(self, image: np.ndarray) -> np.ndarray:
        """`(patches, width)` of an image `(size, size, channels)`, row by row."""
        step = self._model.patch
        starts = range(0, self._model.size, step)
        cut = [np.asarray(image, np.float64)[i : i + step, j : j + step].ravel() for i in starts for j in starts]
        return self.linear(np.stack(cut), "patches")


def decoded(model: nn.Module, held: Any, tokens: jax.Array, prompt: int = 5) -> tuple[jax.Array, Any]:
    """Logits `(batch, length, vocab)` of tokens given with the cache, the first `prompt` at once, and the last cache."""
    shapes = nn.unbox(jax.eval_shape(lambda: model.init(jax.random.key(0), tokens[:, :1], False, True)))["cache"]
    cache = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    step = jax.jit(lambda c, t: model.apply(held | {"cache": c}, t, False, True, mutable=["cache"]))
    pieces = []
    for new in (tokens[:, :prompt], *jnp.split(tokens[:, prompt:], tokens.shape[1] - prompt, 1)):
        logits, mutated = step(cache, new)
        cache = mutated["cache"]
        pieces.append(logits)
    return jnp.concatenate(pieces, 1), cache
