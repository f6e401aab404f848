# ruff: noqa: E402
# %%
# Finds the repository, or fetches and installs it (as on Colab).
import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

REPOSITORY = "@REPOSITORY@"
here = Path.cwd()
root = next((p for p in (here, here.parent, here / "structmat") if (p / "experiments" / "train.py").is_file()), None)
if root is None:
    root = here / "structmat"
    subprocess.run(["git", "clone", "--quiet", "--depth=1", REPOSITORY, str(root)], check=True)
os.chdir(root)
if str(root) not in sys.path:
    sys.path.insert(0, str(root))
try:
    importlib.metadata.version("structmat")
except importlib.metadata.PackageNotFoundError:
    tpu = [*Path("/dev").glob("accel*"), *Path("/dev/vfio").glob("[0-9]*")]
    extra = "[cuda]" if shutil.which("nvidia-smi") else "[tpu]" if tpu else ""
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--editable", f".{extra}"], check=True)

# %%
import jax
import matplotlib
from IPython import get_ipython

# Says what will compute, and shows pictures small.
get_ipython().run_line_magic("matplotlib", "inline")
matplotlib.rcParams["figure.dpi"] = 72
MEANING = {
    "cpu": "the processor of this machine, for which all cells are sized; its times are not those of an accelerator",
    "gpu": "a GPU; structured products run as XLA compiles them, or as kernels where a measured rule says they pay",
    "tpu": "a TPU; the hot products run as Pallas kernels where a measured rule says they pay",
}
print(f"jax {jax.__version__}, {jax.devices()}: {MEANING.get(jax.default_backend(), jax.default_backend())}")
