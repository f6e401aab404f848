"""What a chip can do, and which one a program is being compiled for."""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import jax

MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device as jax sees it (of a TPU v4 or v7x chip jax sees two), dense bf16.

    Attributes:
      name: short name, `v5e`.
      platform: `tpu`, `gpu` or `cpu`.
      flops: peak bf16 FLOP/s; 0 where unknown.
      bandwidth: HBM bytes/s; 0 where unknown.
      lanes: width of a matrix unit, 0 where there is none.
      vmem: bytes of on-chip memory a kernel may ask for, on a GPU the shared memory of a block.
      cores: tensor cores one device splits its parallel grid axes over.
      sms: streaming multiprocessors of a GPU.
    """

    name: str
    platform: Literal["tpu", "gpu", "cpu"]
    flops: float = 0.0
    bandwidth: float = 0.0
    lanes: int = 0
    vmem: int = 0
    cores: int = 1
    sms: int = 0

    @property
    def ridge(self) -> float:
        """FLOP per byte from which a product is bound by arithmetic."""
        return self.flops / self.bandwidth if self.bandwidth else float("inf")

    def bound(self, d_in: int, d_out: int) -> float:
        """The most any structure can gain over dense, many tokens, bf16: it still reads x and writes y once.

        Dense takes 2 M K N / P, moving x and y takes 2 M (K + N) / B: (K N / (K + N)) / ridge, or n / (2 ridge) for a
        square product. A smaller gain than 1 means that dense is bound by memory itself.
        """
        return d_in * d_out / (d_in + d_out) / self.ridge


CHIPS: dict[str, Chip] = {
    "v4": Chip("v4", "tpu", 137.5e12, 615e9, 128, 16 * MIB),
    "v5e": Chip("v5e", "tpu", 197e12, 820e9, 128, 128 * MIB),
    "v5p": Chip("v5p", "tpu", 459e12, 2460e9, 128, 64 * MIB, cores=2),
    "v6e": Chip("v6e", "tpu", 920e12, 1640e9, 256, 128 * MIB),
    "v7x": Chip("v7x", "tpu", 1155e12, 3700e9, 256, 64 * MIB),
    "h100": Chip("h100", "gpu", 989e12, 3350e9, 0, 227 * 1024, sms=132),
    "h200": Chip("h200", "gpu", 989e12, 4800e9, 0, 227 * 1024, sms=132),
    "cpu": Chip("cpu", "cpu"),
}
"""Peak figures per device: of TPUs as `jax.experimental.pallas.tpu.get_tpu_info_for_chip` gives them per core; of GPUs
(SXM, dense) from NVIDIA's data sheets, used only for the bound printed beside measurements."""

_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "v7x",
    "TPU v7x": "v7x",
}


def chip_of(kind: str, platform: str, cores: int = 1) -> Chip:
    """The chip of a jax device kind; an unknown one of a known platform has no figures, and no kernel is chosen on it.

    `cores` is the device's own count: a v4 configured as megacore is one device of two cores.
    """
    if kind in _KINDS:
        chip = CHIPS[_KINDS[kind]]
        more = cores / chip.cores
        return (
            chip
            if more <= 1
            else dataclasses.replace(chip, flops=chip.flops * more, bandwidth=chip.bandwidth * more, cores=cores)
        )
    for name in ("h100", "h200"):
        if name in kind.lower():
            return CHIPS[name]
    return CHIPS["cpu"] if platform == "cpu" else Chip(kind, "gpu" if platform in ("gpu", "cuda", "rocm") else "tpu")


def current_chip() -> Chip:
    """The chip the program being traced is for: of the ambient mesh, abstract ones included, else of the default backend.

    The mesh comes first because a program compiled ahead of time for a TPU is traced on a machine without one.
    """
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if device is not None:
        return chip_of(device.device_kind, device.platform, device.num_cores or 1)
    return _default_chip()


@functools.cache
def _default_chip() -> Chip:
    device = jax.devices()[0]
    return chip_of(device.device_kind, device.platform)
