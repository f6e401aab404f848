"""experiments.evaluate: the figures of a run's checkpoint, on its own data and on other data, as the run itself has them."""

import pytest
from ml_collections import ConfigDict

from experiments.evaluate import evaluated, figures_table, with_stored
from structmat.training import loop
from structmat.training.errors import ConfigError
from structmat.training.load import load_run
from tests.training.small_runs import small_lm, write_corpus


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    corpus = write_corpus(folder / "corpus")
    record = loop.train(small_lm(corpus, structure=".*/mlp/.* -> low_rank(rank=2)", steps=5), folder / "run")
    return load_run(folder / "run"), record


def changed(config, **fields):
    copied = ConfigDict(config.to_dict())
    copied.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
    return copied


def test_figures_are_those_of_the_run(run):
    loaded, record = run
    found = evaluated(loaded, loaded.config, "again")
    assert found.metrics["heldout"] == pytest.approx(record.metrics["heldout"], rel=1e-5)
    assert (found.metrics["step"], found.data_hash, found.kind) == (5, record.data_hash, "evaluate")
    sites = [site.bound for site in loaded.task.table.values()]
    assert found.metrics["site_params"] == sum(b.params for b in sites) < found.metrics["dense_site_params"]
    assert figures_table(found).row_count == len(found.metrics["heldout"]) + len(found.metrics["reference"]) + 4


def test_other_data_in_shorter_windows(run, tmp_path):
    loaded, record = run
    corpus = write_corpus(tmp_path / "corpus")
    for path in corpus.iterdir():
        path.write_text(path.read_text()[::-1])
    found = evaluated(loaded, changed(loaded.config, data__root=str(corpus), model__context=8, batch=4), "other")
    assert found.data_hash != record.data_hash and found.config["model"]["context"] == 8
    assert found.metrics["heldout"]["loss"] != pytest.approx(record.metrics["heldout"]["loss"], rel=1e-3)


def test_the_model_is_evaluated_as_it_is(run):
    loaded, _ = run
    for fields, message in (
        ({"model__width": 32}, "model.width = 32: the run has 16"),
        ({"model__context": 32}, r"model.context = 32: must be at most that of the run: the model has learned 16"),
        ({"structure": "dense()"}, r"structure = 'dense\(\)': the run has"),
    ):
        with pytest.raises(ConfigError, match=message):
            evaluated(loaded, changed(loaded.config, **fields), "x")


def test_without_a_config_it_is_the_runs():
    assert with_stored(["p", "--workdir=runs/a", "--config.batch=4"]) == [
        "p",
        "--config=configs/stored.py:runs/a",
        "--workdir=runs/a",
        "--config.batch=4",
    ]
    for given in (["p", "--workdir=a", "--config=configs/digits.py"], ["p", "--out=x"]):
        assert with_stored(given) == given
