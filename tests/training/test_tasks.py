"""Tasks as pure functions: shapes, metrics, held-out data, the stored site table."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from structmat.data.errors import DataError
from structmat.structures import StructureError
from structmat.training.config import validate
from structmat.training.task import dump_table, mean_metrics, with_table
from structmat.training.tasks import TASKS, digits, lm
from tests.training.small_runs import small_digits, small_images, small_lm, small_teacher, write_corpus
from tests.training.test_mri_task import small as small_mri
from tests.training.test_navier_stokes_task import small as small_flow


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("text") / "corpus")


def zeros(task):
    shapes = jax.eval_shape(
        lambda: task.model.init(jax.random.key(0), *[jnp.zeros(e.shape, e.dtype) for e in task.example])
    )
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


@pytest.mark.parametrize("name", TASKS)
def test_batches_have_the_declared_shapes_and_follow_seed_and_step(name, corpus, tmp_path):
    small = {
        "lm": lambda: small_lm(corpus),
        "digits": small_digits,
        "images": small_images,
        "teacher": small_teacher,
        "mri": small_mri,
        "navier_stokes": lambda: small_flow(tmp_path),
    }
    task = validate(small[name]())
    source = task.load()
    batch, again, later = source.batch(3, None), source.batch(3, None), source.batch(4, None)
    assert {n: (a.shape, a.dtype) for n, a in batch.items()} == {n: (s.shape, s.dtype) for n, s in task.batch.items()}
    part = source.batch(3, range(2, 5))
    assert any(not np.array_equal(array, later[field]) for field, array in batch.items())
    for field, array in batch.items():
        assert np.array_equal(array, again[field])
        assert np.array_equal(array[2:5], part[field])
    for one, two in zip(source.heldout(), source.heldout(), strict=True):
        assert all(
            np.array_equal(one[f], two[f], equal_nan=one[f].dtype.kind == "f") and one[f].shape == task.batch[f].shape
            for f in one
        )
    assert len(source.sha256) == 64


def test_lm_loss_of_a_uniform_model_is_eight_bits_per_byte(corpus):
    task = validate(small_lm(corpus))
    score = jax.jit(lambda variables, batch: task.loss(task.model, variables, batch, None, False))
    loss, metrics = score(zeros(task), task.load().batch(0, None))
    assert float(loss) == pytest.approx(math.log(256), rel=1e-5)
    assert float(metrics["bits_per_byte"]) == pytest.approx(8, rel=1e-5)
    assert float(metrics["count"]) == 8 * 16
    assert 0 < task.load().reference["byte_bigram"] < 2


def test_lm_refuses_tokens_beyond_its_vocabulary(tmp_path):
    np.save(tmp_path / "ids.npy", np.arange(2000, dtype=np.uint16) % 300)
    config = small_lm(tmp_path / "ids.npy")
    with pytest.raises(DataError, match=r"reach 299, but model.vocab=256"):
        validate(config).load()
    config.model.vocab = 300
    source = validate(config).load()
    assert source.reference == {} and validate(config).metric == "bits_per_token"


def test_digits_padding_counts_for_nothing():
    config = small_digits(batch=128)
    task, whole = validate(config), digits.digits.heldout_set()
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), zeros(task))
    score = jax.jit(lambda batch: digits.loss(task.model, variables, batch, None, False)[1])
    parts = [score(b) for b in task.load().heldout()]
    expected = score(whole)
    assert sum(float(p["count"]) for p in parts) == len(whole["labels"]) != 128 * len(parts)
    for name, value in mean_metrics(parts).items():
        assert value == pytest.approx(float(expected[name]), rel=1e-5)


def test_flops_count_sites_heads_and_attention(corpus):
    config = small_lm(corpus)
    dense = validate(config).flops()
    attention = 4 * 16 * 16
    assert dense == 2 * (4 * 16 * 16 + 2 * 16 * 64 + 16 * 256) + attention
    config.structure = "low_rank(rank=2)"
    assert validate(config).flops() == 2 * 2 * (4 * 32 + 2 * 80) + 2 * 16 * 256 + attention
    config.model.tie = True
    assert validate(config).flops() == 2 * 2 * (4 * 32 + 2 * 80) + 2 * 16 * 256 + attention


def test_flops_of_images_count_patches_tokens_and_one_head():
    config = small_images()
    tokens, cut, head = 17, 16 * 2 * 4 * 16, 2 * 16 * 10
    block = 2 * (4 * 16 * 16 + 2 * 16 * 64)
    assert validate(config).flops() == cut + tokens * block + head + 4 * tokens**2 * 16
    assert validate(config).flops(executed=True) == validate(config).flops()
    config.model.pool = "mean"
    assert validate(config).flops() == cut + 16 * block + head + 4 * 16**2 * 16


def test_stored_table_overrides_the_rules_and_must_fit(corpus):
    config = small_lm(corpus, structure="fit(low_rank(), params=0.5)")
    stored = dump_table(validate(config).table)
    config.structure = "dense()"
    rebuilt = with_table(validate(config), stored)
    assert dump_table(rebuilt.table) == stored
    assert stored["layers_0/mlp/up"]["structure"].startswith("low_rank(rank=")
    config.model.mlp_ratio = 2
    with pytest.raises(StructureError, match=r"site layers_0/mlp/down: the checkpoint has .*64.*32"):
        with_table(validate(config), stored)
    config.model.mlp_ratio, config.model.layers = 4, 2
    with pytest.raises(StructureError, match=r"layers_1/\S+: the checkpoint has no such site"):
        with_table(validate(config), stored)


def test_mean_metrics_weights_by_count():
    parts = [{"loss": np.float32(1), "count": np.float32(3)}, {"loss": np.float32(5), "count": np.float32(1)}]
    assert mean_metrics(parts) == {"loss": 2.0}


def test_loading_is_lazy_and_shared(corpus):
    assert lm._corpus(str(corpus), "**/*.txt") is lm._corpus(str(corpus), "**/*.txt")
