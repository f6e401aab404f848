"""Named configs and their parameter trees are what the dumps say, and models have their published sizes."""

import difflib

import pytest

from structmat.training.config import default
from tests.golden.dumps import DEFAULTS, FOLDER, NAMED, config_of, dump, task_of
from tests.marks import mostly_long

PUBLISHED = {
    "llama_60m": 58_073_600,
    "llama_130m": 134_105_856,
    "llama_350m": 367_969_280,
    "llama_1b": 1_339_082_752,
    "llama_7b": 6_738_415_616,
    "gpt2_small": 124_439_808,
    "gpt2_medium": 354_823_168,
    "gpt2_large": 774_030_080,
    "vit_s": 22_050_664,
    "vit_b": 86_567_656,
    "vit_s768": 48_772_840,
    "mixer_s": 18_528_264,
    "mixer_b": 59_880_472,
    "resnet_18": 11_689_512,
    "resnet_50": 25_557_032,
    "resnet_20": 272_474,
    "resnet_32": 466_906,
    "vgg_19": 20_035_018,
}
"""LLaMA 60M to 1B: 58.1M, 134.1M, 368M, 1339M in SLTrain's memory model; vit_s768: 48.8M in Dao et al. 2022; resnet_20 and _32:
0.27M and 0.46M in He et al. 2016, and 2,752 of shortcuts; vgg_19: of its layers, `tests/models/test_resnet_v1.py`; the others:
of the released weights."""
SINGLE = ("resnet_20", "resnet_32", "vgg_19")
"""Of these in float32: for images of side 32."""
QUICK = (
    "demo",
    "demo_lm_monarch",
    "digits",
    "default_llama",
    "digits_vit",
    "llama_60m",
    "llama_7b",
    "gpt2_small",
    "vit_b",
)


@pytest.mark.parametrize("name", mostly_long([*NAMED, *DEFAULTS], QUICK))
def test_dump_and_size(name):
    config = config_of(name)
    task = task_of(config)
    stored, now = (FOLDER / f"{name}.txt").read_text().splitlines(), dump(config, task).splitlines()
    changes = "\n".join(difflib.unified_diff(stored, now, f"tests/golden/{name}.txt", "now", n=1, lineterm=""))
    assert not changes, f"{changes}\nif this is meant: python -m tests.golden.dumps, and commit the diff"
    assert task.params == PUBLISHED.get(name, task.params)
    paper = name in PUBLISHED
    assert (config.mup.enabled, config.model.get("dtype", "float32")) == (
        (not paper, "bfloat16" if paper and name not in SINGLE else "float32")
    )


def test_every_dump_has_its_config():
    assert {path.stem for path in FOLDER.glob("*.txt")} == {*NAMED, *DEFAULTS} >= set(PUBLISHED)


def test_a_changed_field_shows():
    config = default("digits")
    before = dump(config, task_of(config)).splitlines()
    config.model.width = 96
    changed = [line for line in difflib.ndiff(before, dump(config, task_of(config)).splitlines()) if line[0] in "+-"]
    assert "+ model.width = 96" in changed and "+ params/layers_0/kernel: float32 (64, 96) (features, mlp)" in changed
