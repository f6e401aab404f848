"""docs/kernels.md tells the truth: its examples run and its table of chips is that of the code."""

import contextlib
import doctest
import io
import re
from pathlib import Path

from pallas_kernels import CHIPS

PAGE = Path(__file__).parents[2] / "docs" / "kernels.md"
TEXT = PAGE.read_text()


def test_examples_run():
    failed, tried = doctest.testfile(str(PAGE), module_relative=False)
    assert tried >= 4 and not failed
    (code,) = re.findall(r'^python -c "(.*)"$', TEXT, re.M)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(code, {})
    assert "Choice(implementation=" in said.getvalue() and "32 x 32 kron 128 x 128" in said.getvalue()


def test_the_table_of_chips_is_that_of_the_code():
    found = {
        c[0]: [float(v) for v in c[1:]] for c in re.findall(r"^\| (\w+)" + r" \| ([\d.]+)" * 7 + r" \|$", TEXT, re.M)
    }
    assert set(found) == {name for name, chip in CHIPS.items() if chip.flops}
    for name, (flops, bandwidth, ridge, *bounds) in found.items():
        chip = CHIPS[name]
        assert (flops, bandwidth, ridge) == (chip.flops / 1e12, chip.bandwidth / 1e9, round(chip.ridge))
        assert all(abs(b - chip.bound(n, n)) <= 0.051 for b, n in zip(bounds, (1024, 4096, 8192, 16384)))


def test_every_operation_is_explained():
    for folder in PAGE.parents[1].glob("pallas_kernels/*/api.py"):
        assert f"`{folder.parent.name}(x, " in TEXT, folder
