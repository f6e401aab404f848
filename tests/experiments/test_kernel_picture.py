"""The break-even picture: which rows it draws, and that it draws them."""

import pytest
from absl import app

from experiments import tpu_static
from experiments.kernel_picture import curves, draw
from experiments.products import Product, bound_of
from pallas_kernels import CHIPS


def row(case, speedup, tokens=1024, n=4096, chip="v5e", direction="forward"):
    return {"case": case, "speedup": speedup, "tokens": tokens, "n": n, "chip": chip, "direction": direction}


def test_points_of_one_width_and_direction_the_best_of_several_blocks():
    rows = [
        row("block_sparse block=128,density=0.25", 2.0),
        row("block_sparse block=256,density=0.25", 3.0),
        row("block_sparse block=128,density=0.125", 4.0),
        row("block_sparse block=128,density=0.5", 9.0, n=1024),
        row("block_sparse block=128,density=0.5", 9.0, direction="both"),
        row("kronecker major=8,terms=2", 9.0),
        row("low_rank rank=128", None),
        row("monarch blocks=4", 1.5, tokens=64),
        row("monarch blocks=4", 1.2, tokens=4096),
        row("monarch blocks=4", 1.1, chip="v6e"),
    ]
    assert curves(rows, 4096, "forward") == {
        "block_sparse: density": {"v5e": [(0.125, 4.0), (0.25, 3.0)]},
        "monarch: blocks": {"v5e": [(4.0, 1.2)], "v6e": [(4.0, 1.1)]},
    }


@pytest.mark.parametrize("direction", ["forward", "both"])
def test_the_bound_is_dense_arithmetic_over_what_a_layer_without_weights_moves(direction):
    product, chip = Product("low_rank", 2**20, 4096, {"rank": 1}), CHIPS["v5e"]
    gain = product.gemm_flops("dense", direction) / chip.flops / product.floor(chip.bandwidth, direction)
    assert bound_of(chip, 4096, direction) == pytest.approx(gain, rel=1e-3)


def test_the_picture_is_written(tmp_path):
    static = tmp_path / "t.json"
    rows = [row("monarch blocks=4", 1.5), row("monarch blocks=4", 1.4, direction="both"), row("low_rank rank=8", 3.0)]
    tpu_static.record_of(rows, 1.0).write(static)
    out = draw(static, tmp_path / "none.json", tmp_path / "images" / "k.png", 4096)
    assert out.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(app.UsageError, match="n=7 in"):
        draw(static, tmp_path / "none.json", tmp_path / "k.png", 7)
