"""The tasks tables train on, by scale: small enough for 45 s on 2 CPU cores, for minutes on one GPU, or the paper's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from ml_collections import ConfigDict

from configs import gpt2, llama, mixer, mri, navier_stokes, resnet, vgg, vit
from experiments.tables.schema import SCALES, TableError
from structmat.structures.errors import suggest
from structmat.training.config import default


@dataclasses.dataclass(frozen=True)
class Base:
    """A task to train arms on.

    Attributes:
      make: () -> its config, dense.
      metric: held-out figure arms are compared by, and its heading. lower: whether less is better.
      others: further held-out figures to show, by name.
      seeds: how many. reseeded: fields of the config that are set to the seed as well, as where so few examples are trained
        on that which ones matters.
      rates: multiples of the config's learning rate that are tried when an arm is tuned, ascending; a single one is not
        tried but taken.
      further: how many more are tried, one after another, as long as the best is at an end.
      part: a rate is tried in a run of one in so many of the steps. A shorter run favours higher rates.
      pod: topology its configs are compiled for by `python -m experiments.tables check`.
    """

    make: Callable[[], ConfigDict]
    metric: str
    lower: bool = True
    others: tuple[str, ...] = ()
    seeds: int = 3
    reseeded: tuple[str, ...] = ()
    rates: tuple[float, ...] = (0.5, 1.0, 2.0)
    further: int = 3
    part: int = 3
    pod: str = ""


def digits() -> ConfigDict:
    """Three hidden layers on scikit-learn's digits."""
    config = default("digits")
    config.update(steps=400, batch=64)
    config.model.update(width=256, layers=3)
    config.optim.lr = 6e-3
    config.mup.base_width = 256
    return config


def _digits_images(model: str, steps: int, base_width: int) -> ConfigDict:
    config = default("images", model)
    config.update(steps=steps, batch=64)
    config.optim.lr = 8e-3
    config.mup.base_width = base_width
    return config


def digits_resnet() -> ConfigDict:
    """Two residual blocks on the same digits, as images."""
    return _digits_images("resnet", 400, 16)


def digits_vit() -> ConfigDict:
    """A vision transformer of two layers on the same, which reads the mean over patches."""
    config = _digits_images("vit", 900, 64)
    config.model.pool = "mean"
    return config


def digits_mixer() -> ConfigDict:
    """A mixer of two layers on the same."""
    return _digits_images("mixer", 600, 64)


def bytes_cpu() -> ConfigDict:
    """The demo's GPT on bytes of the standard library, fewer steps."""
    config = default("lm")
    config.update(steps=450)
    config.eval.batches = 200
    return config


def bytes_short() -> ConfigDict:
    """The same for models whose steps are slow."""
    config = bytes_cpu()
    config.steps = 200
    config.eval.batches = 100
    return config


def bytes_gpu() -> ConfigDict:
    """A GPT of GPT-2 small's width and depth on bytes, 33 million tokens."""
    config = default("lm")
    config.update(steps=1000, batch=64)
    config.model.update(width=768, layers=12, heads=12, context=512, dtype="bfloat16")
    config.optim.lr = 6e-4
    config.mup.base_width = 768
    config.eval.batches = 50
    return config


def teacher() -> ConfigDict:
    """Three hidden layers on a random network, fresh points at every step."""
    config = default("teacher")
    config.update(steps=500, batch=512)
    config.model.width = 256
    config.optim.update(lr=4e-3, weight_decay=0.0)
    config.mup.base_width = 256
    return config


def flow() -> ConfigDict:
    """A Fourier neural operator on forced flow, 240 samples at 32 x 32."""
    return navier_stokes.get_config("fno")


def flow_gpu() -> ConfigDict:
    """The same on 1000 samples at 64 x 64, from time 10 to 50 as in the papers, 200 epochs."""
    config = navier_stokes.get_config("fno")
    config.update(steps=10_000, batch=20)
    config.model.width = config.mup.base_width = 32
    config.data.update(
        resolution=64, solve_resolution=128, fine=0, train=1000, test=200, start=10.0, time=50.0, dt=5e-3
    )
    return config


def rough_flow_gpu() -> ConfigDict:
    """The same at a tenth of the viscosity, to time 30."""
    config = flow_gpu()
    config.data.update(viscosity=1e-4, time=30.0)
    return config


SLICES = 16
"""Images of a scan, which is a volume."""


def scans() -> ConfigDict:
    """mSENSE with full matrices on five scans of SLICES images."""
    config = mri.get_config("msense")
    config.update(structure="dense()", steps=200, batch=8)
    config.data.train = 5 * SLICES
    return config


def scans_gpu() -> ConfigDict:
    """The same at side 256."""
    config = scans()
    config.steps = 1000
    config.data.size = 256
    return config


def wikitext103() -> ConfigDict:
    """GPT-2 small on WikiText-103: the rate, decay, batch and 100 epochs of the Monarch paper's repository, an epoch being
    taken as 118 million tokens of GPT-2's vocabulary."""
    config = gpt2.get_config("small")
    config.update(steps=100 * 118_000_000 // (512 * 1024))
    config.optim.update(lr=6e-4, weight_decay=0.1, warmup=0.01, clip=1.0)
    config.data.root = "data/wikitext103/tokens"
    return config


def openwebtext() -> ConfigDict:
    """GPT-2 medium on OpenWebText, with the schedule of `configs/gpt2.py`: the paper's own is not known to us."""
    config = gpt2.get_config("medium")
    config.data.root = "data/openwebtext/tokens"
    return config


def openwebtext_bytes() -> ConfigDict:
    """A GPT of 6 layers on the text of OpenWebText as bytes, with the context, batch, steps and rate of the einsum paper."""
    config = default("lm")
    config.update(steps=100_000, batch=512)
    config.model.update(width=1024, layers=6, heads=32, context=128, dtype="bfloat16", remat="full")
    config.optim.lr = 3e-3
    config.mup.base_width = 1024
    config.eval.update(every=1000, batches=20)
    config.checkpoint.every = 1000
    config.data.root = "data/openwebtext/text"
    return config


def openwebtext_small() -> ConfigDict:
    """GPT-2 small on OpenWebText for 600 thousand steps at the rate of the repository of "Compute Better Spent"."""
    config = gpt2.get_config("small")
    config.update(steps=600_000, batch=480)
    config.model.update(vocab=50304, tie=False)
    config.optim.lr = 2e-3
    config.mup.update(enabled=True, base_width=768)
    config.data.root = "data/openwebtext/tokens"
    return config


def openwebtext_epochs() -> ConfigDict:
    """GPT-2 small, of the size of OPT-125M, on the 19.7 billion tokens of the SST paper."""
    config = gpt2.get_config("small")
    config.update(steps=19_700_000_000 // (512 * 1024))
    config.data.root = "data/openwebtext/tokens"
    return config


def c4_60m() -> ConfigDict:
    """LLaMA 60M on C4 with the schedule of SLTrain's scripts."""
    config = llama.get_config("60m")
    config.data.root = "data/c4/tokens"
    return config


def imagenet_vit() -> ConfigDict:
    """ViT-B on ImageNet-1k with the schedule of `configs/vit.py`."""
    config = vit.get_config("b")
    config.data.root = "data/imagenet/arrays"
    return config


def imagenet_mixer() -> ConfigDict:
    """Mixer-B on ImageNet-1k with the schedule of `configs/mixer.py`."""
    config = mixer.get_config("b")
    config.data.root = "data/imagenet/arrays"
    return config


def resnet_images(size: str, folder: str) -> Callable[[], ConfigDict]:
    """A ResNet of `configs/resnet.py` on the images of a folder."""

    def make() -> ConfigDict:
        config = resnet.get_config(size)
        config.data.root = f"data/{folder}/arrays"
        return config

    return make


def cifar10_vgg() -> ConfigDict:
    """VGG-19 on CIFAR-10 with the schedule of Maestro's code."""
    config = vgg.get_config("19")
    config.data.root = "data/cifar10/arrays"
    return config


def _published_images(make: Callable[[], ConfigDict]) -> Base:
    return Base(make, "accuracy", lower=False, others=("loss",), rates=(1.0,), pod="v5e:4x4")


def _scans(make: Callable[[], ConfigDict]) -> Base:
    others = ("psnr_2", "ssim_1", "ssim_2")
    return Base(make, "psnr_1", lower=False, others=others, reseeded=("data.seed",), rates=(0.3, 1.0, 3.0))


BASES: dict[tuple[str, str], Base] = {
    ("cpu", "digits"): Base(digits, "loss", others=("accuracy",), seeds=5, part=1),
    ("cpu", "digits_resnet"): Base(digits_resnet, "accuracy", lower=False, others=("loss",), seeds=5, part=1),
    ("cpu", "digits_vit"): Base(
        digits_vit, "accuracy", lower=False, others=("loss",), seeds=5, rates=(1.0, 2.0, 4.0), part=1
    ),
    ("cpu", "digits_mixer"): Base(digits_mixer, "accuracy", lower=False, others=("loss",), seeds=5, part=1),
    ("cpu", "teacher"): Base(teacher, "mse", part=1),
    ("cpu", "bytes"): Base(bytes_cpu, "bits_per_byte", part=1),
    ("cpu", "bytes_short"): Base(bytes_short, "bits_per_byte", part=1),
    ("cpu", "flow"): Base(flow, "l2", others=("h1", "l2_fine")),
    ("cpu", "scans"): _scans(scans),
    ("gpu", "bytes"): Base(bytes_gpu, "bits_per_byte"),
    ("gpu", "flow"): Base(flow_gpu, "l2", others=("h1",)),
    ("gpu", "rough_flow"): Base(rough_flow_gpu, "l2", others=("h1",)),
    ("gpu", "scans"): _scans(scans_gpu),
    ("paper", "wikitext103"): Base(wikitext103, "bits_per_token", rates=(1.0,), pod="v5e:4x4"),
    ("paper", "openwebtext"): Base(openwebtext, "bits_per_token", rates=(1.0,), pod="v5e:4x4"),
    ("paper", "openwebtext_small"): Base(openwebtext_small, "bits_per_token", rates=(1.0,), pod="v5e:4x4"),
    ("paper", "openwebtext_epochs"): Base(openwebtext_epochs, "bits_per_token", pod="v5e:4x4"),
    ("paper", "openwebtext_bytes"): Base(openwebtext_bytes, "bits_per_byte", pod="v5e:4x4"),
    ("paper", "imagenet_vit"): _published_images(imagenet_vit),
    ("paper", "imagenet_mixer"): _published_images(imagenet_mixer),
    ("paper", "imagenet_resnet18"): _published_images(resnet_images("18", "imagenet")),
    ("paper", "imagenet_resnet50"): _published_images(resnet_images("50", "imagenet")),
    ("paper", "cifar10_resnet20"): _published_images(resnet_images("20", "cifar10")),
    ("paper", "cifar10_vgg19"): _published_images(cifar10_vgg),
    ("paper", "c4_60m"): Base(c4_60m, "bits_per_token", rates=(0.33, 1.0), further=0, pod="v5e:4x4"),
}
"""(scale, name) -> Base."""


def base_of(scale: str, name: str) -> Base:
    """The base of that name at a scale.

    Raises:
      TableError: no such scale, or no such base there.
    """
    if scale not in SCALES:
        raise TableError(f"no scale {scale!r}" + suggest(scale, SCALES))
    if (scale, name) not in BASES:
        raise TableError(f"scale {scale}: no base {name!r}" + suggest(name, [n for s, n in BASES if s == scale]))
    return BASES[scale, name]
