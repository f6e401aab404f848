"""The facts about this machine and this code that a Record keeps."""

import contextlib
import importlib.metadata
import os
import platform
import resource
import shlex
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import jax

import structmat

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
OPTIONAL = ("libtpu",)
# bf16 peak of one device, dense, in FLOP/s, by what jax calls it (first match wins); makers' data sheets
PEAKS = (
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5", 459e12),
    ("TPU v6", 918e12),
    ("H100 PCIe", 756e12),
    ("H100", 989e12),
    ("H200", 989e12),
    ("A100", 312e12),
)


def command() -> str:
    """The shell line that started this process, without machine paths: `python -m experiments.train --config=...`."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    module = spec.name.removesuffix(".__main__") if spec else ""
    return shlex.join(["python", *(["-m", module] if module else [Path(sys.argv[0]).name]), *sys.argv[1:]])


@lru_cache(maxsize=1)
def versions() -> dict[str, str]:
    """Python, the packages that matter, structmat, and the git commit of structmat if it runs from a clone."""
    found = {"python": platform.python_version(), "structmat": structmat.__version__}
    found |= {name: importlib.metadata.version(name) for name in PACKAGES}
    for name in OPTIONAL:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    commit = git_commit(Path(structmat.__file__).parent)
    return found | ({"git": commit} if commit else {})


def git_commit(folder: Path) -> str | None:
    """HEAD of the repository that tracks `folder/__init__.py`, with "+changes" if tracked files differ; else None."""

    def git(*args: str) -> str:
        command = ["git", "-C", str(folder), *args]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def device() -> dict[str, str | int]:
    """platform, kind and count of jax's devices (of all processes); the host's CPU model and usable cores."""
    first = jax.devices()[0]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "platform": first.platform,
        "kind": first.device_kind,
        "count": jax.device_count(),
        "cpu": _cpu_model(),
        "cores": cores,
    }


def peak_flops(kind: str | None = None) -> float | None:
    """bf16 FLOP/s of one device of this kind (default: jax's first); None where no peak is known, as on a CPU."""
    kind = jax.devices()[0].device_kind if kind is None else kind
    return next((peak for name, peak in PEAKS if name in kind), None)


def peak_memory_bytes() -> int:
    """Most memory in use so far by this process: of its fullest device if it keeps count, else of the host."""
    stats = [d.memory_stats() or {} for d in jax.local_devices()]
    device_peak = max((s.get("peak_bytes_in_use", 0) for s in stats), default=0)
    host_unit = 1 if sys.platform == "darwin" else 1024
    return device_peak or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * host_unit


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
