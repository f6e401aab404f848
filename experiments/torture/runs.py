"""Tiny runs of the digits task, the same in every process."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from structmat.structures import FAMILIES, parse
from structmat.training.config import default
from structmat.training.loop import train
from structmat.training.manifest import NAME
from structmat.training.metrics import FILE


def examples() -> list[str]:
    """The example of every family whose products are real, as the model's are."""
    texts = [family.about.example for family in FAMILIES.values()]
    return [text for text in texts if not parse(text).bind(64, 64).is_complex]


@dataclasses.dataclass(frozen=True)
class Tiny:
    """A run that takes seconds, most of them to compile.

    Attributes:
      structure: of the hidden layer. rule: train with `Drift`. every: steps between checkpoints.
      pace: seconds to wait after each step, so that signals find the run at all its steps.
    """

    structure: str = "dense()"
    rule: bool = False
    steps: int = 20
    every: int = 10
    width: int = 64
    seed: int = 0
    pace: float = 0.0

    def config(self) -> ConfigDict:
        """The config, with dropout, so that every step draws."""
        config = default("digits")
        config.update(steps=self.steps, batch=32, log_every=1, structure=self.structure, seed=self.seed)
        config.model.update(layers=1, width=self.width, dropout=0.1)
        config.mup.base_width = self.width
        config.checkpoint.every = self.every
        config.eval.batches = 2
        return config


@dataclasses.dataclass(frozen=True)
class Drift:
    """A Rule with state of every kind: a count, a random walk, sums of dense gradients that scale the parameters."""

    every: int = 3
    needs_dense_gradients: bool = True

    def init(self, sites: Any, state: Any) -> dict[str, Any]:
        """Zeros."""
        shapes = {path.replace("/", "."): (site.bound.d_in, site.bound.d_out) for path, site in sites.items()}
        seen = {name: jnp.zeros(shape) for name, shape in shapes.items()}
        return {"count": jnp.zeros((), jnp.int32), "walk": jnp.zeros(()), "seen": seen}

    def due(self, step: jax.Array) -> jax.Array:
        """Every few steps."""
        return step % self.every == 0

    def update(self, key: jax.Array, step: jax.Array, dense_grads: dict[str, jax.Array], state: Any) -> Any:
        """Shrink every parameter by what was seen so far."""
        old = state.rule_state
        added = {name.replace("/", "."): jnp.abs(g) for name, g in dense_grads.items()}
        seen = jax.tree.map(jnp.add, old["seen"], added)
        walk = old["walk"] + jax.random.normal(key)
        total = sum(jnp.mean(leaf) for leaf in jax.tree.leaves(seen))
        scale = 1 - 1e-3 * jnp.tanh(total + jnp.abs(walk))
        params = jax.tree.map(lambda leaf: leaf * scale.astype(leaf.dtype), state.params)
        return state.replace(params=params, rule_state={"count": old["count"] + 1, "walk": walk, "seen": seen})


def run(report: Callable[[Any], None], tiny: Tiny, folder: Path) -> None:
    """Train in `folder`; reports (step, loss in hexadecimal) of every step."""

    def on_step(step: int, row: dict[str, float]) -> None:
        report((step, float(row["loss"]).hex()))
        time.sleep(tiny.pace)

    train(tiny.config(), folder, rule=Drift() if tiny.rule else None, on_step=on_step)


def saved(folder: Path) -> list[int]:
    """The steps saved in a run's folder."""
    found = folder / "checkpoints"
    return sorted(int(p.name) for p in found.iterdir() if p.name.isdigit()) if found.is_dir() else []


def checksums(folder: Path) -> dict[str, str]:
    """Checksum of every array of the newest checkpoint."""
    text = (folder / "checkpoints" / str(saved(folder)[-1]) / NAME).read_text()
    return {name: array["checksum"] for name, array in json.loads(text)["body"]["arrays"].items()}


def bits(folder: Path) -> str:
    """SHA-256 of the final state's checksums and of every row of metrics."""
    content = json.dumps(checksums(folder), sort_keys=True).encode() + (folder / FILE).read_bytes()
    return hashlib.sha256(content).hexdigest()
