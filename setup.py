"""Packaging: `pip install -e .` installs structmat and pallas_kernels; experiments run from a clone."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (ROOT / "structmat" / "__init__.py").read_text()).group(1)

CORE = [
    "jax>=0.10",
    "flax>=0.12.8",
    "opt-einsum>=3.3",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8,<1",
    "einops>=0.8",
    "ml-collections>=1.1",
    "numpy>=1.26",
    "absl-py>=2.1",
    "etils[epath]>=1.9",
    "grain>=0.2.18",
    "rich>=13",
    "matplotlib>=3.8",
    "tensorboardX>=2.6.2",
    "scikit-learn>=1.4",
]
TEST = [
    "pytest>=8",
    "pytest-xdist>=3.6",
    "hypothesis>=6.100",
    "scipy>=1.11",
    "tensorly>=0.9",
    "ruff>=0.6",
    "safetensors>=0.5",
    "tokenizers>=0.20",
    "pyyaml>=6",
]
NOTEBOOKS = ["ipykernel>=6.29", "jupytext>=1.16", "nbclient>=0.10", "nbformat>=5.10", "pillow>=10"]
DOCS = ["mkdocs>=1.6,<2", "mkdocs-material>=9.5,<10", "mkdocstrings[python]>=1"]
# torch with CUDA is several gigabytes: this version is installed from the wheel for CPUs where one is at hand
REFERENCE = ["torch==2.13.0", "transformers>=5"]

setup(
    name="structmat",
    version=VERSION,
    description="Structured-matrix experiments in JAX: one algebra of structures, trained, compressed, compared.",
    long_description=(ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["structmat", "structmat.*", "pallas_kernels", "pallas_kernels.*"]),
    install_requires=CORE,
    extras_require={
        "test": TEST + NOTEBOOKS,
        "notebooks": NOTEBOOKS,
        "tpu": ["jax[tpu]>=0.10"],
        "cuda": ["jax[cuda12]>=0.10"],
        "wandb": ["wandb"],
        "profile": ["xprof"],
        "safetensors": ["safetensors>=0.5"],
        "text": ["tokenizers>=0.20"],
        "docs": DOCS,
        "reference": REFERENCE,
    },
)
