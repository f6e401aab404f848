"""The GPU benchmark, run on a tiny suite where there is no GPU."""

import json
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich import box

from experiments import bench_gpu, bench_gpu_measure, bench_torch
from experiments.bench_gpu_measure import Suite, healthy, measure
from experiments.bench_gpu_table import DIRECTIONS, rates, table
from experiments.bench_loop import comparison, looped, operands, worst
from experiments.products import OPS, Product
from pallas_kernels import CHIPS
from pallas_kernels.dispatch import Choice

TINY = Suite(
    widths=(64,),
    tokens=(8,),
    cases=(("low_rank", {"rank": 4}), ("block_sparse", {"block": 16, "density": 0.5})),
    repeats=(2, 2),
    samples=1,
)
ROWS = [
    {"direction": d, "n": 64, "tokens": 8, "seconds": {}, "error": {}, "notes": {}, "flop_reduction": 2.0, "bound": 1.0}
    for d in DIRECTIONS
]


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "tiny.json"
    bench_gpu.run(out, 5.0, "low_rank", False, TINY)
    return out, json.loads(out.read_text())


def test_rows_of_both_directions_with_the_reason_for_every_empty_column(record):
    out, held = record
    rows = held["metrics"]["rows"]
    assert [(r["case"], r["direction"]) for r in rows] == [("low_rank rank=4", d) for d in DIRECTIONS]
    for r in rows:
        assert set(r["seconds"]) >= {"xla", "dense"} and r["error"]["xla"] < 2e-2 and r["n"] == 64 and r["tokens"] == 8
        assert "no kernel on cpu" in r["notes"]["pallas"] and r["notes"]["torch"] == bench_torch.missing()
    assert rows[0]["flop_reduction"] == 8 and rows[0]["bound"] == 0
    page = out.with_suffix(".md").read_text()
    assert "medians of several" in page and page.count("low_rank rank=4") == 2
    assert table(rows, box.MARKDOWN).row_count == 2


def test_it_goes_on_where_it_stopped_and_measures_the_chosen_cases(record, monkeypatch, capsys):
    out, _ = record
    seen = []
    monkeypatch.setattr(bench_gpu, "measure", lambda product, *_: seen.append(product.op) or ROWS)
    bench_gpu.run(out, 5.0, "low_rank", False, TINY)
    assert seen == []
    bench_gpu.run(out, 0.0, "", False, TINY)
    assert seen == [] and "stopped after 0 minutes with 1 products to go" in capsys.readouterr().out
    bench_gpu.run(out, 5.0, "", False, TINY)
    assert seen == ["block_sparse"]
    bench_gpu.run(out, 5.0, "", True, TINY)
    assert seen == ["block_sparse", "low_rank", "block_sparse"]


def test_numbers_come_first_and_decide_what_is_timed(tmp_path, monkeypatch):
    """A kernel whose numbers are wrong or cannot be had is not timed; the rest of its row is."""
    said = []
    monkeypatch.setattr(Product, "choice", lambda self, chip: Choice("xla", ""))
    monkeypatch.setattr(bench_gpu, "measure", lambda product, chip, suite, dense, without: said.append(without) or ROWS)
    bench_gpu.run(tmp_path / "a.json", 5.0, "low_rank", False, TINY)
    [row] = json.loads((tmp_path / "a.json").read_text())["metrics"]["numerics"].values()
    assert row["tokens"] == 100 and row["error"]["xla"]["both"] < 2e-2 and "no kernel on cpu" in row["notes"]["pallas"]
    for both in (0.5, 1e-3):
        found = {"error": {"pallas": {"forward": 1e-3, "both": both}}, "notes": {}}
        monkeypatch.setattr(bench_gpu, "numbers", lambda product, found=found: found)
        bench_gpu.run(tmp_path / f"{both}.json", 5.0, "low_rank", False, TINY)
    assert said[0].startswith("not timed: low_rank: no kernel on cpu")
    assert said[1:] == ["not timed: its numbers are wrong by 5.0e-01", ""]


def test_the_kernel_runs_last_or_is_noted_as_left_out(monkeypatch):
    """Dense is timed once for all products of a size."""
    ran, product = [], Product("low_rank", 8, 64, {"rank": 4})
    monkeypatch.setattr(bench_gpu_measure._One, "time", lambda self, names: ran.append(names))
    seen = {(64, 8, d): 1.0 for d in DIRECTIONS}
    measure(product, CHIPS["h100"], TINY, {})
    rows = measure(product, CHIPS["h100"], TINY, seen, "no")
    assert ran == [["xla", "dense"], ["pallas"], ["xla"]]
    assert all(row["notes"]["pallas"] == "no" and row["seconds"] == {"dense": 1.0} for row in rows)


def test_what_took_the_process_with_it_is_noted_and_passed_by(tmp_path, monkeypatch):
    out, seen = tmp_path / "a.json", []

    def dies(product, *_):
        seen.append(product.op)
        raise KeyboardInterrupt

    monkeypatch.setattr(bench_gpu, "measure", dies)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            bench_gpu.run(out, 5.0, "", False, TINY)
    bench_gpu.run(out, 5.0, "", False, TINY)
    rows = json.loads(out.read_text())["metrics"]["rows"]
    assert seen == ["low_rank", "block_sparse"] and len(rows) == 4
    assert all(r["notes"] == {"pallas": "the process ended while it ran"} for r in rows)


def test_what_never_ends_ends_the_process(tmp_path, monkeypatch, capsys):
    codes = []
    monkeypatch.setattr(bench_gpu.os, "_exit", codes.append)
    monkeypatch.setattr(bench_gpu, "LIMIT", 0.01)
    monkeypatch.setattr(bench_gpu, "measure", lambda *_: time.sleep(0.2) or ROWS)
    bench_gpu.run(tmp_path / "a.json", 5.0, "low_rank", False, TINY)
    assert codes == [3] and "low_rank n 64, 8 tokens, rank 4 took more than 0.01 s" in capsys.readouterr().out


def test_it_stops_when_the_gpu_is_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_gpu, "measure", lambda *_: ROWS)
    monkeypatch.setattr(bench_gpu, "healthy", lambda: False)
    with pytest.raises(
        SystemExit, match=r"does not answer any more after low_rank n 64, 8 tokens, rank 4; its row says"
    ):
        bench_gpu.run(tmp_path / "a.json", 5.0, "", False, TINY)
    assert len(json.loads((tmp_path / "a.json").read_text())["metrics"]["rows"]) == 2 and healthy()


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
    monkeypatch.setattr(bench_gpu, "current_chip", lambda: CHIPS["h100"])
    with pytest.raises(
        SystemExit, match=r"--only='monarh' is in none of: block_sparse block=128,density=0\.25, monarch"
    ):
        bench_gpu.main(str(tmp_path / "none.json"), 1.0, "monarh", False)


def test_every_product_of_the_suite_can_be_built_and_every_operation_is_in_it():
    made = list(bench_gpu.products(Suite()))
    assert {p.op for _, p in made} == set(OPS) and len({(case, p.n, p.tokens) for case, p in made}) == len(made)
    for _, product in made:
        choice = product.choice(CHIPS["h100"])
        assert choice.implementation == "xla" and choice.flop_reduction > 1 and product.weights()
    assert str(made[0][1]) == "block_sparse n 4096, 4096 tokens, block 128, density 0.25"
