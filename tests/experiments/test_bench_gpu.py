"""The GPU benchmark, run on a tiny suite where there is no GPU."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich import box

from experiments import bench_gpu, bench_torch
from experiments.bench_gpu_table import DIRECTIONS, rates, table
from experiments.bench_loop import comparison, looped, operands, worst
from experiments.products import OPS, Product

TINY = bench_gpu.Suite(
    widths=(64,),
    tokens=(8,),
    cases=(("low_rank", {"rank": 4}), ("block_sparse", {"block": 16, "density": 0.5})),
    repeats=(2, 2),
    samples=1,
)


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "tiny.json"
    bench_gpu.run(out, 5.0, "", False, TINY)
    return out, json.loads(out.read_text())


def test_rows_of_both_directions_with_the_reason_for_every_empty_column(record):
    out, held = record
    rows = held["metrics"]["rows"]
    assert [(r["case"], r["direction"]) for r in rows] == [
        (case, d) for case in ("low_rank rank=4", "block_sparse block=16,density=0.5") for d in DIRECTIONS
    ]
    for r in rows:
        assert set(r["seconds"]) >= {"xla", "dense"} and r["error"]["xla"] < 2e-2 and r["n"] == 64 and r["tokens"] == 8
        assert "no kernel on cpu" in r["notes"]["pallas"] and r["notes"]["torch"] == bench_torch.missing()
    assert rows[0]["flop_reduction"] == 8 and rows[0]["bound"] == 0
    page = out.with_suffix(".md").read_text()
    assert "medians of several" in page and page.count("low_rank rank=4") == 2
    assert table(rows, box.MARKDOWN).row_count == 4


def test_it_goes_on_where_it_stopped_and_measures_the_chosen_cases(record, monkeypatch, capsys):
    out, held = record
    kept = {**held, "metrics": {"numerics": {}, "rows": held["metrics"]["rows"][:2]}}
    out.write_text(json.dumps(kept))
    seen = []
    monkeypatch.setattr(
        bench_gpu, "measure", lambda product, *_: seen.append(product.op) or held["metrics"]["rows"][:2]
    )
    bench_gpu.run(out, 5.0, "low_rank", False, TINY)
    assert seen == []
    bench_gpu.run(out, 0.0, "", False, TINY)
    assert seen == [] and "stopped after 0 minutes with 1 products to go" in capsys.readouterr().out
    bench_gpu.run(out, 5.0, "", False, TINY)
    assert seen == ["block_sparse"]
    bench_gpu.run(out, 5.0, "", True, TINY)
    assert seen == ["block_sparse", "low_rank", "block_sparse"]


def test_a_loop_does_its_product_every_turn():
    """It stays inside the compiled loop although the values of its operands never change."""
    a = jnp.asarray(np.random.default_rng(0).normal(size=(8, 8)), jnp.float32)
    run = looped(lambda x, y: x @ y, 7)
    text = jax.jit(run).lower(a, a).compile().as_text()
    body = re.search(r"body=(%[\w.-]+)", text)[1]
    inside = text[text.index(f"\n{body} (") :].split("\n}\n")[0]
    assert "dot_general" in inside
    assert jax.tree.map(float, run(a, a)) == [float(a[0, 0])] * 2


def test_errors_are_those_of_the_worst_entry():
    product = Product("block_sparse", 8, 64, {"block": 16, "density": 0.5})
    x, g, weights = operands(product)
    found = worst(jax.jit(comparison(product, "xla"))(x, g, *weights))
    assert 0 < found["forward"] <= found["both"] < 2e-2
    assert x.shape == g.shape == (8, 64) and x.dtype == jnp.bfloat16 and not np.array_equal(x, g)
    assert [(w.shape, w.dtype) for w in weights] == [(w.shape, w.dtype) for w in product.weights()]
    assert all(len(set(column)) == 2 and max(column) < 4 for column in weights[1].tolist())


def test_rates():
    product = Product("low_rank", 1000, 4096, {"rank": 128})
    found = rates({"pallas": 2e-3, "xla": 1e-3, "dense": 4e-3}, product, "both", 16.0, 8.0)
    assert found["speedup"] == 4 and found["reached"] == 0.5
    assert found["tflops"] == pytest.approx(3 * product.flops / 1e9) and found["gbs"] > 0
    assert rates({"dense": 1.0}, product, "forward", 16.0, 8.0) == {}


def test_without_a_gpu_it_says_so_in_one_sentence(tmp_path):
    with pytest.raises(SystemExit, match=r"^error: --suite=gpu needs a GPU that jax sees; here it sees 'cpu'$"):
        bench_gpu.main(str(tmp_path / "none.json"), 1.0, "", False)
    assert not list(tmp_path.iterdir())


def test_an_unknown_case_is_named(tmp_path, monkeypatch):
    from pallas_kernels import CHIPS

    monkeypatch.setattr(bench_gpu, "current_chip", lambda: CHIPS["h100"])
    with pytest.raises(
        SystemExit, match=r"--only='monarh' is in none of: block_sparse block=128,density=0\.25, monarch"
    ):
        bench_gpu.main(str(tmp_path / "none.json"), 1.0, "monarh", False)


def test_every_product_of_the_suite_can_be_built_and_every_operation_is_in_it():
    from pallas_kernels import CHIPS

    made = list(bench_gpu.products(bench_gpu.Suite()))
    assert {p.op for _, p in made} == set(OPS) and len({(case, p.n, p.tokens) for case, p in made}) == len(made)
    for _, product in made:
        choice = product.choice(CHIPS["h100"])
        assert choice.implementation == "xla" and choice.flop_reduction > 1 and product.weights()
    assert str(made[0][1]) == "block_sparse n 4096, 4096 tokens, block 128, density 0.25"
