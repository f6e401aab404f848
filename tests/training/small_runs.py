"""Runs small enough to be trained in a test."""

from structmat.training.config import default

TEXT = "the quick brown fox jumps over the lazy dog. "


def write_corpus(folder):
    """A folder of twelve repetitive text files."""
    folder.mkdir(parents=True)
    for i in range(12):
        (folder / f"{i}.txt").write_text(TEXT * 20 + str(i))
    return folder


def small_lm(corpus, **fields):
    """A one-layer byte GPT of width 16 on `corpus`."""
    config = default("lm")
    config.update(steps=12, batch=8, log_every=1)
    config.model.update(layers=1, width=16, heads=2, context=16)
    config.data.root = str(corpus)
    config.mup.base_width = 16
    config.checkpoint.every = 5
    config.eval.batches = 2
    config.update(fields)
    return config


def small_digits(**fields):
    """A one-layer perceptron of width 16 on the digits."""
    config = default("digits")
    config.update(steps=12, batch=32, log_every=1)
    config.model.update(layers=1, width=16)
    config.mup.base_width = 16
    config.checkpoint.every = 5
    config.eval.batches = 4
    config.update(fields)
    return config


def small_teacher(**fields):
    """A two-layer perceptron of width 16 on a random network of width 32."""
    config = default("teacher")
    config.update(steps=12, batch=32, log_every=1)
    config.model.update(layers=2, width=16)
    config.data.update(width=32, depth=3)
    config.mup.base_width = 16
    config.checkpoint.every = 5
    config.eval.batches = 4
    config.update(fields)
    return config


def small_images(**fields):
    """A one-layer ViT of width 16 on the digits."""
    config = default("images")
    config.update(steps=12, batch=32, log_every=1)
    config.model.update(layers=1, width=16, heads=2)
    config.mup.base_width = 16
    config.checkpoint.every = 5
    config.eval.batches = 4
    config.update(fields)
    return config
