"""Batches are functions of (seed, step): order, coverage, rows, held-out windows, digits and the n-gram references."""

import itertools
import math

import numpy as np
import pytest

from structmat.data import bigram, digits
from structmat.data.batches import heldout_batches, lm_batch, shuffled_indices
from structmat.data.errors import DataError

TOKENS = np.random.default_rng(0).integers(0, 256, 1000).astype(np.uint8)


def test_batch_is_a_function_of_seed_and_step():
    late = lm_batch(TOKENS, 3, 41, 4, 16)["tokens"]
    for step in (0, 7):
        lm_batch(TOKENS, 3, step, 4, 16)
    again = lm_batch(TOKENS, 3, 41, 4, 16)["tokens"]
    assert late.dtype == np.int32 and late.shape == (4, 17)
    np.testing.assert_array_equal(late, again)
    assert (lm_batch(TOKENS, 4, 41, 4, 16)["tokens"] != late).any()
    assert (lm_batch(TOKENS, 3, 42, 4, 16)["tokens"] != late).any()


def test_windows_are_text_and_every_position_is_used_once_an_epoch():
    tokens = np.arange(64 + 8, dtype=np.int32)  # a token is its own position
    rows = np.concatenate([lm_batch(tokens, 0, s, 8, 8)["tokens"] for s in range(16)])
    np.testing.assert_array_equal(rows - rows[:, :1], np.tile(np.arange(9), (128, 1)))
    for epoch in (rows[:64, 0], rows[64:, 0]):
        np.testing.assert_array_equal(np.sort(epoch), np.arange(64))
    assert (rows[:64, 0] != rows[64:, 0]).any()


def test_seeds_do_not_share_epochs():
    first = [shuffled_indices(50, seed, step, 50).tolist() for seed in range(4) for step in range(4)]
    assert len(set(map(tuple, first))) == 16


def test_the_order_never_changes():
    """Golden: a run that resumes under another grain must still see the same data."""
    assert shuffled_indices(1000, 0, 0, 6).tolist() == GOLDEN_0
    assert shuffled_indices(8_000_000, 1, 12345, 3).tolist() == GOLDEN_1


GOLDEN_0 = [297, 371, 706, 141, 935, 215]
GOLDEN_1 = [654199, 153855, 129048]


def test_processes_take_rows_of_one_global_batch():
    whole = lm_batch(TOKENS, 5, 9, 8, 16)["tokens"]
    parts = [lm_batch(TOKENS, 5, 9, 8, 16, rows=range(i, i + 4))["tokens"] for i in (0, 4)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": TOKENS[:16]}, "at least 17"),
        ({"tokens": TOKENS.reshape(10, 100)}, "1-d"),
        ({"context": 0}, "context is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**32}, "seed is 4294967296"),
        ({"step": -1}, "step is -1"),
        ({"batch": 0}, "batch 0"),
        ({"rows": range(2, 9)}, "batch of 8"),
    ],
)
def test_bad_arguments(change, message):
    good = {"tokens": TOKENS, "seed": 0, "step": 0, "batch": 8, "context": 16}
    with pytest.raises(DataError, match=message):
        lm_batch(**(good | change))


def test_heldout_scores_every_target_once():
    tokens = np.arange(101, dtype=np.int32)
    batches = [b["tokens"] for b in heldout_batches(tokens, 5, 10)]
    np.testing.assert_array_equal(np.concatenate(batches)[:, 1:].ravel(), np.arange(1, 101))
    first = list(heldout_batches(tokens, 5, 10, limit=1))
    assert len(first) == 1 and (first[0]["tokens"] == batches[0]).all()
    assert len(list(heldout_batches(tokens[:100], 3, 10))) == 3  # 9 windows
    with pytest.raises(DataError, match="batch <= 10"):
        heldout_batches(tokens, 11, 10)
    with pytest.raises(DataError, match="limit 0"):
        heldout_batches(tokens, 5, 10, limit=0)


def test_digits():
    data = digits.load()
    assert data.train_images.shape == (1438, 64) and data.test_images.shape == (359, 64)
    assert data.train_images.dtype == np.float32 and data.train_labels.dtype == np.int32
    assert abs(data.train_images.mean()) < 1e-4 and abs(data.train_images.std() - 1) < 1e-4
    shares = np.bincount(data.train_labels) / 1438 - np.bincount(data.test_labels) / 359
    assert np.abs(shares).max() < 0.01
    assert data.sha256 == GOLDEN_DIGITS
    epoch = np.concatenate([digits.digits_batch(0, s, 719)["images"] for s in range(2)])
    assert {i.tobytes() for i in epoch} == {i.tobytes() for i in data.train_images}
    one = digits.digits_batch(2, 5, 32, rows=range(8, 16))
    whole = digits.digits_batch(2, 5, 32)
    np.testing.assert_array_equal(one["labels"], whole["labels"][8:16])
    assert digits.heldout_set()["images"].shape == (359, 64)


GOLDEN_DIGITS = "728c979c46c43e225f06737d315dd133702bd3159b5ec5328719c972484a9fb0"


def test_bigram_of_a_known_chain():
    """Tokens drawn from a two-state chain: the reference must reach its entropy rate, the unigram its marginal entropy."""
    stay, rng = 0.9, np.random.default_rng(1)
    flips = rng.random(200_000) > stay
    chain = (np.cumsum(flips) % 2).astype(np.uint8)
    train, heldout = chain[:150_000], chain[150_000:]
    rate = -(stay * math.log2(stay) + (1 - stay) * math.log2(1 - stay))
    assert abs(bigram.bigram_bits_per_byte(train, heldout) - rate) < 0.02
    assert abs(bigram.unigram_bits_per_byte(train, heldout) - 1) < 0.01


def test_bigram_is_a_distribution_and_handles_the_unseen():
    train = np.array([0, 1, 0, 1, 2], np.uint8)
    for previous in range(4):  # row 3 was never seen
        bits = [bigram.bigram_bits_per_byte(train, np.array([previous, b]), 0.5, 4) for b in range(4)]
        assert abs(sum(2.0**-b for b in bits) - 1) < 1e-12
    # by hand: count(0,1)=2, count(0)=2, p1(1)=3/9, smoothing*vocab=2
    by_hand = -math.log2((2 + 2 * 3 / 9) / (2 + 2))
    assert bigram.bigram_bits_per_byte(train, np.array([0, 1]), 0.5, 4) == pytest.approx(by_hand, abs=1e-12)


def test_smoothing_is_chosen_on_train_alone():
    train = TOKENS[:600]
    chosen = bigram.choose_smoothing(train)
    assert chosen in bigram.CANDIDATES
    loss = {s: bigram.bigram_bits_per_byte(train[:540], train[540:], s) for s in bigram.CANDIDATES}
    assert loss[chosen] == min(loss.values())
    for heldout in (TOKENS[600:], np.zeros(50, np.uint8)):
        expected = bigram.bigram_bits_per_byte(train, heldout, chosen)
        assert bigram.bigram_bits_per_byte(train, heldout) == expected


def test_bad_bigram():
    for smoothing, train in itertools.product((0.0, -1.0, math.nan), (TOKENS,)):
        with pytest.raises(DataError, match="must be > 0"):
            bigram.bigram_bits_per_byte(train, train, smoothing)
    with pytest.raises(DataError, match="at least 2 tokens"):
        bigram.bigram_bits_per_byte(TOKENS, TOKENS[:1], 1.0)
