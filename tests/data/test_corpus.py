"""The embedded corpus, a user's own folder, jsonl and npy: content, split, hash and errors."""

import hashlib
import json
import platform
import re

import numpy as np
import pytest

from structmat.data import bytes_text, own
from structmat.data.corpus import content_hash, from_documents, is_heldout
from structmat.data.errors import DataError


@pytest.fixture
def folder(tmp_path):
    for i in range(40):
        sub = tmp_path / f"part{i % 3}"
        sub.mkdir(exist_ok=True)
        (sub / f"{i:02d}.txt").write_bytes(f"file {i}\n".encode() * (i + 1))
    (tmp_path / "notes.md").write_bytes(b"not text for us")
    (tmp_path / "empty.txt").write_bytes(b"")
    return tmp_path


def test_standard_library_is_the_default():
    corpus = bytes_text.load()
    assert platform.python_version() in corpus.description
    assert corpus.train.dtype == corpus.heldout.dtype == np.uint8 and corpus.vocab_size == 256
    assert len(corpus.train) > 3_000_000 and 0.03 < len(corpus.heldout) / len(corpus.train) < 0.3
    text = corpus.train.tobytes() + corpus.heldout.tobytes()
    assert b"def dataclass(" in text  # dataclasses.py is in
    assert b"from test.support import" not in text  # tests are out
    assert bytes_text.load().sha256 == corpus.sha256


@pytest.mark.parametrize(
    ("name", "out"),
    [
        ("dataclasses.py", False),
        ("json/decoder.py", False),
        ("unittest/mock.py", False),
        ("test/test_re.py", True),
        ("site-packages/x/y.py", True),
        ("lib2to3/tests/a.py", True),
        ("_sysconfigdata__linux_.py", True),
        ("config-3.11-x86_64-linux-gnu/python-config.py", True),
    ],
)
def test_excluded(name, out):
    assert bytes_text._excluded(name) is out


def test_folder_splits_whole_files_by_a_stable_hash(folder):
    corpus = bytes_text.load(folder, "**/*.txt")
    names = sorted(p.relative_to(folder).as_posix() for p in folder.glob("**/*.txt") if p.stat().st_size)
    held = [n for n in names if int(hashlib.sha256(n.encode()).hexdigest(), 16) % 10 == 0]
    assert held  # the split is by file here
    expected = b"".join((folder / n).read_bytes() + b"\0" for n in held)
    assert corpus.heldout.tobytes() == expected
    assert len(corpus.train) == sum((folder / n).stat().st_size + 1 for n in names if n not in held)
    assert "40 files" in corpus.description and b"not text for us" not in corpus.train.tobytes()


def test_hash_sees_content_and_split(folder):
    before = bytes_text.load(folder, "**/*.txt").sha256
    victim = folder / "part0" / "00.txt"
    victim.write_bytes(b"F" + victim.read_bytes()[1:])
    assert bytes_text.load(folder, "**/*.txt").sha256 != before
    a = np.arange(6, dtype=np.uint8)
    assert content_hash(a[:2], a[2:]) != content_hash(a[:3], a[3:])
    assert content_hash(a) != content_hash(a.astype(np.uint16))
    assert (
        content_hash(a.astype(">u2")) == content_hash(a.astype("<u2")) == content_hash(a.astype("<u2").repeat(2)[::2])
    )


def test_known_split_never_changes():
    assert [n for n in map(str, range(60)) if is_heldout(n)] == KNOWN_HELDOUT


KNOWN_HELDOUT = ["18"]


def test_a_single_file_is_split_at_its_tail():
    corpus = from_documents([("only.txt", b"0123456789" * 10)], "one")
    assert corpus.train.tobytes() == b"0123456789" * 9 + b"\0" and corpus.heldout.tobytes() == b"0123456789\0"
    assert "last tenth" in corpus.description


@pytest.mark.parametrize("make", ["missing", "file", "empty", "no match"])
def test_no_data_is_one_clear_error(tmp_path, make):
    root = tmp_path / "corpus"
    if make == "file":
        root.write_text("x")
    elif make != "missing":
        root.mkdir()
    if make == "no match":
        (root / "a.md").write_text("text")
    with pytest.raises(DataError, match=re.escape(str(root))) as e:
        bytes_text.load(root, "**/*.rst")
    assert "**/*.rst" in str(e.value) and "root=None" in str(e.value)


def test_jsonl(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{"text": f"document {i} é"} for i in range(50)] + [{"text": ""}]
    path.write_text("\n".join(json.dumps(r) for r in rows) + "\n\n")
    corpus = own.load_tokens(path)
    text = (corpus.train.tobytes() + corpus.heldout.tobytes()).split(b"\0")
    assert sorted(text[:-1]) == sorted(r["text"].encode() for r in rows[:-1])
    assert len(corpus.heldout) and "50 documents" in corpus.description


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\nnot json\n', "line 2 is not JSON"),
        (b'{"body": "a"}\n', "line 1 has no string field"),
        (b'{"text": 3}\n', "line 1 has no string field"),
        (b"[1]\n", "found list"),
        (b'\xff\xfe{"text"', "line 1 is not JSON"),
        (b"\n\n", "no document"),
    ],
)
def test_bad_jsonl(tmp_path, content, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as e:
        own.load_tokens(path)
    assert str(path) in str(e.value)


@pytest.mark.parametrize("dtype", own.NPY_DTYPES)
def test_npy(tmp_path, dtype):
    path = tmp_path / "a.npy"
    np.save(path, np.arange(200, dtype=dtype))
    corpus = own.load_tokens(path)
    assert corpus.vocab_size == 200 and corpus.train.dtype == dtype
    np.testing.assert_array_equal(corpus.train, np.arange(180))
    np.testing.assert_array_equal(corpus.heldout, np.arange(180, 200))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(9, np.float32), "float32"),
        (np.zeros((3, 3), np.uint8), r"\(3, 3\)"),
        (np.zeros(1, np.uint8), "1 tokens"),
        (np.array([1, -4, 2], np.int32), "id -4"),
    ],
)
def test_bad_npy(tmp_path, array, message):
    path = tmp_path / "a.npy"
    np.save(path, array)
    with pytest.raises(DataError, match=message):
        own.load_tokens(path)


def test_bad_paths(tmp_path, folder):
    (tmp_path / "junk.npy").write_bytes(b"junk")
    (tmp_path / "none.npy").write_bytes(b"")
    (tmp_path / "x.csv").write_text("a,b")
    for name, message in (
        ("x.csv", "valid: a folder"),
        ("x.npy", "does not exist"),
        ("x", "does not exist"),
        ("junk.npy", "not a readable"),
        ("none.npy", "not a readable"),
    ):
        with pytest.raises(DataError, match=message):
            own.load_tokens(tmp_path / name)
    assert own.load_tokens(folder).sha256 == bytes_text.load(folder, "**/*.txt").sha256
