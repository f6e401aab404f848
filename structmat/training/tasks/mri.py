"""Multi-coil MRI from undersampled k-space (Dao et al. 2022), on phantoms made from seeds.

The default `structure`, dense(), makes mSENSE learn full matrices; `monarch(blocks=8)` are the factors of the paper for
images of side 64.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from structmat.analysis.image_quality import GAUSSIAN, psnr, ssim
from structmat.data.mri import dataset
from structmat.data.mri.acquisition import PATTERNS
from structmat.data.mri.phantoms import ECHOES
from structmat.models.sense import sense, zero_filled
from structmat.structures.errors import suggest
from structmat.training.applied import with_auxiliary
from structmat.training.errors import ConfigError
from structmat.training.task import Batch, Source, Task, Variables
from structmat.training.tasks.mri_models import MODELS, ReconstructionModel

FASTEST = 12.0
"""Acceleration that the fully sampled centre of every pattern leaves room for at every size."""
WEIGHTS = (0.0, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
ITERATIONS = (1, 2, 3, 5, 8, 15, 30)
"""Tikhonov weight and iterations that CG-SENSE may have: the best pair of each echo on the first TUNING training scans, in
mean pSNR. Stopping early regularises as well, and does not darken the image."""
TUNING = 8


def defaults(model: str = "msense") -> dict[str, Any]:
    """The fields of `config.model` and `config.data`."""
    return dict(
        model=dict(name=model, **MODELS[model].fields),
        data=dict(
            seed=0,  # of phantoms, coils, mask and noise
            size=64,  # side of the images, in pixels
            coils=8,
            acceleration=2.0,  # samples of the full grid per sample taken
            pattern="poisson_disc",  # poisson_disc | random | regular: points, or lines
            snr_1=20.0,  # of the first echo in dB, were all sampled
            snr_2=20.0,  # of the second
            train=5,  # scans to learn from
            test=32,  # other scans, held out
            fresh_noise=False,  # measure every training scan anew in each step; else its noise is always the same
        ),
    )


def check(config: Any) -> None:
    """Refuse scans that cannot be made, and sizes no model of this task can have."""
    d = config.data
    for name, least, most in (
        ("seed", 0, 2**31 - 1),
        ("size", GAUSSIAN, None),
        ("coils", 1, None),
        ("acceleration", 1.0, FASTEST),
        ("snr_1", 0.0, 200.0),
        ("snr_2", 0.0, 200.0),
        ("train", 1, dataset.MOST),
        ("test", 1, dataset.MOST),
    ):
        if d[name] < least:
            raise ConfigError(f"data.{name}", d[name], f"must be at least {least}", f"{least} is")
        if most is not None and d[name] > most:
            raise ConfigError(f"data.{name}", d[name], f"must be at most {most}", f"{most} is")
    if d.pattern not in PATTERNS:
        raise ConfigError("data.pattern", d.pattern, "no such pattern" + suggest(d.pattern, PATTERNS))
    MODELS[config.model.name].check(config)


def build(config: Any) -> Task:
    """The task of a checked config, all sites still dense."""
    choice, d = MODELS[config.model.name], config.data
    rows = choice.rows(config)
    of = lambda dtype, *shape: jax.ShapeDtypeStruct((config.batch, *shape, d.size, d.size), dtype)
    return Task(
        name="mri",
        model=choice.build(config),
        base=choice.base(config),
        example=choice.example(config),
        batch={
            "kspace": of(jnp.complex64, ECHOES, d.coils),
            "maps": of(jnp.complex64, d.coils),
            "mask": of(jnp.bool_),
            "image": of(jnp.float32, ECHOES),
        },
        loss=functools.partial(loss, choice),
        metric="psnr_1",
        unit="scan",
        units=config.batch,
        other_flops=choice.other_flops(config),
        load=lambda: load(config),
        rows=lambda path: config.batch * rows(path),
        generated=f"scans {dataset.VERSION}",
    )


def loss(
    choice: ReconstructionModel,
    model: nn.Module,
    variables: Variables,
    batch: Batch,
    rng: jax.Array | None,
    train: bool,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Squared error of the complex image over the image's energy, mean of scans and echoes; empty scans do not count.

    Of the complex image, as its true phase is known here, the error is then smooth, for mSENSE quadratic in each factor, and
    no less than that of the magnitude. Relative, so that the darker second echo weighs as much as the first.

    Metrics: psnr_k, and in evaluation ssim_k, of the magnitudes of echo k, for every image against its own largest value.
    """
    found, extra = choice.image(model, variables, batch, rng, train)
    image = batch["image"]
    here = (image > 0).any((1, 2, 3))
    count = here.sum().astype(jnp.float32)
    mean = lambda each: jnp.where(here, each, 0).sum() / count
    error = found - image
    square = (jnp.square(error.real) + jnp.square(error.imag)).sum((-2, -1))
    energy = jnp.where(here[:, None], jnp.square(image).sum((-2, -1)), 1)
    value = mean((square / energy).mean(-1))
    metrics = {name: mean(each) for name, each in scores(found, image, not train).items()}
    return with_auxiliary(value, {"loss": value, **metrics, "count": count}, extra)


def scores(found: jax.Array, image: jax.Array, similarity: bool = True) -> dict[str, jax.Array]:
    """psnr_k and ssim_k `(...)` of the magnitudes of images `(..., ECHOES, h, w)`, the latter only where asked for."""
    magnitude = jnp.abs(found)
    each = {"psnr": psnr(magnitude, image)} | ({"ssim": ssim(magnitude, image)} if similarity else {})
    return {f"{name}_{echo + 1}": values[..., echo] for name, values in each.items() for echo in range(ECHOES)}


def load(config: Any) -> Source:
    """Make the scans."""
    d = config.data
    snr = (float(d.snr_1), float(d.snr_2))
    key = (d.size, d.coils, float(d.acceleration), d.pattern, snr, d.train, d.test, d.seed)
    data = dataset.load(*key)
    return Source(
        batch=lambda step, rows=None: dataset.scan_batch(data, config.seed, step, config.batch, d.fresh_noise, rows),
        heldout=lambda: dataset.heldout_batches(data, config.batch, config.eval.batches or None),
        sha256=data.sha256,
        description=data.description,
        reference=reference(data),
    )


@functools.lru_cache(maxsize=2)
def reference(data: dataset.Dataset) -> dict[str, float]:
    """cg_sense_... and zero_filled_... with the mean scores of both on all held-out scans.

    zero_filled is one step of SENSE; cg_sense the regularised least squares solution, tuned as WEIGHTS and ITERATIONS say.
    """
    maps, mask, count = data.machine.maps, data.machine.mask, len(data.test["image"])

    def quality(part: dict[str, np.ndarray], scans: int, method: Callable[[np.ndarray], Any]) -> dict[str, float]:
        rows = [scores(method(k), x) for k, x in zip(part["kspace"][:scans], part["image"])]
        return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}

    echoes = lambda k, by_echo: np.stack([sense(k[echo], maps, mask, *by_echo[echo]) for echo in range(ECHOES)])
    choices = list(itertools.product(WEIGHTS, ITERATIONS))
    tried = [quality(data.train, TUNING, lambda k: echoes(k, [choice] * ECHOES)) for choice in choices]  # noqa: B023
    best = [choices[np.argmax([row[f"psnr_{echo + 1}"] for row in tried])] for echo in range(ECHOES)]
    found = {
        "cg_sense": quality(data.test, count, lambda k: echoes(k, best)),
        "zero_filled": quality(data.test, count, lambda k: zero_filled(k, maps, mask)),
    }
    return {f"{method}_{name}": value for method, row in found.items() for name, value in row.items()}
