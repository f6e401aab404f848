"""Imports flow one way, and importing the package computes nothing."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
MIDDLE = {"parallel", "data", "optim", "sparse", "adapters", "compress", "surgery", "analysis"}
ALLOWED = {
    "pallas_kernels": set(),
    "structures": {"pallas_kernels"},
    "nn": {"structures", "pallas_kernels"},
    "models": {"nn", "structures", "pallas_kernels"},
    "data": set(),
    **{
        m: {"structures", "nn", "models"} | MIDDLE
        for m in MIDDLE - {"data", "optim", "sparse", "adapters", "compress", "parallel", "surgery"}
    },
    **{m: {"structures", "nn"} for m in ("optim", "sparse", "adapters", "compress", "parallel", "surgery")},
    "training": {"structures", "nn", "models", "training"} | MIDDLE,
    "exchange": {"structures", "nn", "models", "training"} | MIDDLE,
}


def area(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[1] if parts[0] == "structmat" else parts[0]


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [f"{node.module}.{a.name}" for a in node.names]
        elif isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "structmat" and len(parts) > 1:
                found.add(parts[1])
            elif parts[0] in ("experiments", "configs", "tests", "pallas_kernels"):
                found.add(parts[0])
    return found


def test_no_back_arrow():
    files = [p for p in (ROOT / "structmat").rglob("*.py") if p.parent != ROOT / "structmat"]
    files += list((ROOT / "pallas_kernels").rglob("*.py"))
    assert len(files) > 30
    wrong = []
    for path in files:
        own = area(path)
        for target in imported(path) - {own}:
            if (target in ALLOWED and target not in ALLOWED[own]) or target in ("experiments", "configs", "tests"):
                wrong.append(f"{path.relative_to(ROOT)} imports {target}")
    assert not wrong, wrong


def test_configs_are_data_only():
    for path in (ROOT / "configs").glob("*.py"):
        assert imported(path) <= {"training", "configs"}, path


def test_structures_do_not_import_flax():
    for path in (ROOT / "structmat" / "structures").glob("*.py"):
        assert "flax" not in path.read_text(), path


def test_import_starts_no_backend():
    code = "import structmat, structmat.nn, structmat.models, structmat.optim; from jax._src import xla_bridge as x; assert not x._backends"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
