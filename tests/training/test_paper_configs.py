"""The configs of papers' models take any structure, and text of bytes."""

import importlib
import math

import pytest

from structmat.training.config import validate
from tests.marks import mostly_long
from tests.training.small_runs import write_corpus

STRUCTURES = {
    "low_rank(rank=96) + random_sparse(density=0.03)": 0.54,
    "fit(monarch(order='blocked'), params=0.3)": 0.3,
    "fit(kronecker(), params=0.3)": 0.3,
}


def config_of(file, size):
    return importlib.import_module(f"configs.{file}").get_config(size)


@pytest.mark.parametrize("structure", mostly_long(list(STRUCTURES), [list(STRUCTURES)[1]]))
@pytest.mark.parametrize(("file", "size"), [("llama", "60m"), ("gpt2", "small"), ("vit", "s")])
def test_a_structure_takes_every_linear_site_and_no_other(file, size, structure):
    config = config_of(file, size)
    config.structure = structure
    table = validate(config, devices=8).table
    linear = [site.bound for site in table.values() if site.kind == "linear"]
    assert len(linear) == config.model.layers * (7 if file == "llama" else 6)
    assert all(bound.params <= STRUCTURES[structure] * bound.d_in * bound.d_out for bound in linear)
    assert {site.bound.structure.name for site in table.values() if site.kind != "linear"} == {"dense"}
    assert "embed" in table or table["patches"].bound.d_in == 16 * 16 * 3


def test_the_padded_hidden_size_of_1b_takes_blocks():
    config = config_of("llama", "1b")
    config.model.hidden = 5504
    config.structure = "monarch(blocks=4)"
    assert validate(config, devices=8).table["layers_23/mlp/up"].bound.d_out == 5504


def test_a_model_with_more_ids_than_bytes_reads_text(tmp_path):
    config = config_of("llama", "60m")
    config.update(batch=2)
    config.model.context = 16
    config.data.root = str(write_corpus(tmp_path / "text"))
    task = validate(config, devices=1)
    source = task.load()
    assert source.batch(0, None)["tokens"].max() < 256 < config.model.vocab
    assert task.metric == "bits_per_token" and math.isfinite(source.reference["byte_bigram"])
