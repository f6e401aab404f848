"""Weights that come in one at a time: what is in memory, and what is written."""

import weakref

import jax
import numpy as np
import pytest

from structmat.data.errors import DataError
from structmat.exchange import bring_in, run_config
from structmat.training.load import stored_weights
from tests.exchange.theirs import write_ids

WIDTH, HIDDEN = 64, 96


class Counted:
    """A LLaMA of random weights that counts what is alive of what it gave."""

    description, model, kept = "random", "llama", ()
    fields = dict(
        vocab=96, context=8, layers=3, width=WIDTH, heads=2, kv_heads=2, hidden=HIDDEN, theta=1e4, eps=1e-6, tie=True
    )

    def __init__(self, left=False):
        self.given, self.alive, self.on_device, self.left = [], [], [], left

    def rules(self, given):
        return given

    def holds(self, path, site):
        return False

    def matrix(self, path, site):
        self.alive.append(sum(ref() is not None for ref in self.given))
        self.on_device.append(sum(a.nbytes for a in jax.live_arrays()))
        w = self.of(path, site.bound.d_in, site.bound.d_out)
        self.given.append(weakref.ref(w))
        return w

    @staticmethod
    def of(path, d_in, d_out):
        return np.random.default_rng(list(path.encode())).normal(size=(d_in, d_out)).astype(np.float32)

    def array(self, path, shape):
        return np.ones(shape, np.float32)

    def refuse_left(self):
        if self.left:
            raise DataError("1 tensors have no place")


def config_of(source, folder):
    from configs import finetune

    base = finetune.get_config()
    base.data.root, base.batch = str(write_ids(folder / "ids.npy")), 4
    return run_config(source, base, "layers_.*/mlp/(gate|up) -> low_rank(rank=3)")


def test_one_matrix_is_in_memory_at_a_time(tmp_path):
    source = Counted()
    before = sum(a.nbytes for a in jax.live_arrays())
    found = bring_in(source, config_of(source, tmp_path), tmp_path / "run")
    assert len(source.alive) == 3 * 7 + 1 == len(found.rows) and set(source.alive) == {0}
    assert max(source.on_device) - before < 4 * WIDTH * HIDDEN, "what was projected is gone before the next is read"
    assert not (tmp_path / "run/.arriving").exists()
    stored = stored_weights(tmp_path / "run", ".*")
    assert stored.step == 0
    for path, read in stored.readers.items():
        site, row = stored.table[path], next(r for r in found.rows if r.path == path)
        w, own = source.of(path, site.bound.d_in, site.bound.d_out), np.asarray(read())
        assert row.error == pytest.approx(np.linalg.norm(w - own) / np.linalg.norm(w), abs=1e-6)
        assert (row.error > 0.5) == ("gate" in path or "up" in path)


@pytest.mark.long
def test_nothing_is_left_where_the_weights_do_not_fit(tmp_path):
    source = Counted(left=True)
    config = config_of(source, tmp_path)
    with pytest.raises(DataError, match="have no place"):
        bring_in(source, config, tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []
    source.left = False
    assert bring_in(source, config, tmp_path / "run").rows
    with pytest.raises(DataError, match="is not empty"):
        bring_in(source, config, tmp_path / "run")
