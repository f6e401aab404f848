"""Text to tokens on disk: what is written, how it is read back, and what is refused."""

import gzip
import json

import numpy as np
import pytest
import tokenizers

from experiments import tokenize
from structmat.data import own, tokens
from structmat.data.errors import DataError
from structmat.training import loop
from tests.training.small_runs import small_lm

TEXTS = [f"the quick brown fox number {i} jumps over\n\n{i % 7} lazy dogs, café.\n" * (1 + i % 3) for i in range(60)]


@pytest.fixture(scope="module")
def vocab(tmp_path_factory):
    """A folder with the files of GPT-2's tokenizer, of 300 tokens, and the same as tokenizer.json."""
    folder = tmp_path_factory.mktemp("vocab")
    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator(TEXTS, vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False)
    made.save_model(str(folder))
    made.save(str(folder / "whole.json"))
    return folder


@pytest.fixture
def lines(tmp_path):
    """Documents as C4 has them: lines of JSON in compressed shards."""
    folder = tmp_path / "c4"
    folder.mkdir()
    for shard in range(2):
        with gzip.open(folder / f"c4-train.{shard:05d}.json.gz", "wt") as file:
            file.writelines(json.dumps({"text": text, "url": "x"}) + "\n" for text in TEXTS[shard::2])
    return folder


def write(text, vocab, out, heldout=None, end="", one_in=5):
    return tokenize.run(text, heldout, vocab, out, "text", end, one_in)


def documents_of(ids, end):
    cuts = np.flatnonzero(ids == end)
    assert len(ids) and cuts[-1] == len(ids) - 1
    return [list(part) for part in np.split(ids, cuts + 1)[:-1]]


def test_what_is_read_back_decodes_to_the_text(lines, vocab, tmp_path):
    parts = write(lines, vocab, tmp_path / "out")
    corpus = own.load_tokens(tmp_path / "out")
    assert isinstance(corpus.train, np.memmap) and corpus.train.dtype == np.uint16 and corpus.vocab_size == 300
    assert (len(corpus.train), len(corpus.heldout)) == (parts["train"]["tokens"], parts["heldout"]["tokens"])
    made = tokenizers.ByteLevelBPETokenizer(str(vocab / "vocab.json"), str(vocab / "merges.txt"))
    end = made.token_to_id("<|endoftext|>")
    sides = [{made.decode(d[:-1]) for d in documents_of(ids, end)} for ids in (corpus.train, corpus.heldout)]
    assert sides[0] | sides[1] == set(TEXTS) and not sides[0] & sides[1]
    assert sides[1] == {text for text in TEXTS if tokenize.is_heldout(text, 5)} and len(corpus.sha256) == 64


def test_the_same_text_and_vocabulary_have_the_same_hash_whatever_the_form(lines, vocab, tmp_path):
    write(lines, vocab, tmp_path / "one")
    write(lines, vocab / "whole.json", tmp_path / "two")
    write(lines, vocab, tmp_path / "other", one_in=3)
    one, two, other = (own.load_tokens(tmp_path / name) for name in ("one", "two", "other"))
    assert one.sha256 == two.sha256 != other.sha256
    np.testing.assert_array_equal(one.train, two.train)


def test_own_heldout_text_and_pieces_of_a_long_file(vocab, tmp_path, monkeypatch):
    """As WikiText-103 has it: one text of many lines for each part."""
    for name, part in (("train", TEXTS[:50]), ("valid", TEXTS[50:])):
        (tmp_path / f"{name}.txt").write_text("".join(part))
    whole = write(tmp_path / "train.txt", vocab, tmp_path / "whole", heldout=tmp_path / "valid.txt")
    monkeypatch.setattr(tokenize, "PIECE", 500)
    pieces = list(tokenize.documents(tmp_path / "train.txt", "text"))
    assert "".join(piece.text for piece in pieces) == "".join(TEXTS[:50])
    assert len(pieces) > 5 and [piece.ends for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    write(tmp_path / "train.txt", vocab, tmp_path / "cut", heldout=tmp_path / "valid.txt")
    made, _ = tokenize.load_tokenizer(vocab)
    both = [own.load_tokens(tmp_path / name).train for name in ("whole", "cut")]
    assert [made.decode(ids[:-1]) for ids in both] == ["".join(TEXTS[:50])] * 2
    assert abs(len(both[0]) - len(both[1])) <= len(pieces) and whole["heldout"]["tokens"] > 100


def test_large_vocabularies_take_four_bytes(tmp_path):
    writer = tokens.TokenWriter(tmp_path, "train", np.dtype("<i4"))
    assert writer.add([70_000, 3]) == 2
    assert writer.finish()["largest"] == 70_000
    with pytest.raises(DataError, match=r"ids 1 \.\. 70000 do not fit uint16"):
        tokens.TokenWriter(tmp_path, "x", np.dtype("<u2")).add([1, 70_000])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda out: (out / "train.bin").unlink(), "train.bin' is missing"),
        (lambda out: (out / "heldout.bin").write_bytes(b"x"), "holds 1 bytes; its index says"),
        (lambda out: (out / "tokens.json").write_text("{}"), "is not an index of tokens"),
        (lambda out: (out / "tokens.json").write_text((out / "tokens.json").read_text().replace('"schema": 1', '"schema": 9')), "schema 9"),
    ],
)  # fmt: skip
def test_a_damaged_folder_is_refused(change, message, lines, vocab, tmp_path):
    write(lines, vocab, tmp_path / "out")
    change(tmp_path / "out")
    with pytest.raises(DataError, match=message):
        own.load_tokens(tmp_path / "out")


def test_what_cannot_be_tokenized_is_told(lines, vocab, tmp_path):
    with pytest.raises(DataError, match=r"no text at .*nowhere"):
        write(tmp_path / "nowhere", vocab, tmp_path / "a")
    with pytest.raises(DataError, match=r"no tokenizer at .*; needed: tokenizer.json"):
        write(lines, lines, tmp_path / "b")
    with pytest.raises(DataError, match="--end='<stop>': the tokenizer has no such token"):
        write(lines, vocab, tmp_path / "c", end="<stop>")
    with pytest.raises(DataError, match="the heldout part is empty"):
        write(lines, vocab, tmp_path / "d", one_in=10**9)
    with pytest.raises(DataError, match=r"line 1 has no string field 'body'; found fields \['text', 'url'\]"):
        tokenize.run(lines, None, vocab, tmp_path / "e", "body", "", 5)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "x"}\n{"text": \n')
    with pytest.raises(DataError, match="line 2 is not JSON"):
        write(bad, vocab, tmp_path / "f")
    write(lines, vocab, tmp_path / "g")
    with pytest.raises(DataError, match="holds tokens already"):
        write(lines, vocab, tmp_path / "g")


@pytest.mark.long
def test_a_run_on_tokens(lines, vocab, tmp_path):
    write(lines, vocab, tmp_path / "out")
    config = small_lm(tmp_path / "out")
    with pytest.raises(DataError, match=r"token ids reach 299, but model.vocab=256"):
        loop.train(config, tmp_path / "refused")
    config.model.vocab = 300
    record = loop.train(config, tmp_path / "run")
    assert (
        record.data_hash == own.load_tokens(tmp_path / "out").sha256 and "bits_per_token" in record.metrics["heldout"]
    )
