"""Ways to damage a saved step; each takes the step's folder and a random.Random, and returns the files it touched."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

from structmat.training import manifest

Damage = Callable[[Path, random.Random], list[str]]
GARBAGE = (b"", b"{", b"[]", b"null", b'{"body": 3, "sha256": "x"}', b"\xff\xfe", b"[" * 100_000, b"\0" * 4096)


def files(folder: Path) -> list[Path]:
    """All files below, sorted."""
    return sorted(p for p in folder.rglob("*") if p.is_file())


def _pick(folder: Path, rng: random.Random, count: int = 1) -> list[Path]:
    return rng.sample([p for p in files(folder) if p.stat().st_size], count)


def _named(folder: Path, *paths: Path) -> list[str]:
    return [str(p.relative_to(folder)) for p in paths]


def flip(folder: Path, rng: random.Random) -> list[str]:
    """One bit of one file."""
    [victim] = _pick(folder, rng)
    data = bytearray(victim.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    victim.write_bytes(data)
    return _named(folder, victim)


def flip_largest(folder: Path, rng: random.Random) -> list[str]:
    """One bit of the largest file, where the numbers are."""
    victim = max(files(folder), key=lambda p: p.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    victim.write_bytes(data)
    return _named(folder, victim)


def truncate(folder: Path, rng: random.Random) -> list[str]:
    """A file cut short."""
    [victim] = _pick(folder, rng)
    victim.write_bytes(victim.read_bytes()[: rng.randrange(victim.stat().st_size)])
    return _named(folder, victim)


def empty(folder: Path, rng: random.Random) -> list[str]:
    """A file of no bytes."""
    [victim] = _pick(folder, rng)
    victim.write_bytes(b"")
    return _named(folder, victim)


def delete(folder: Path, rng: random.Random) -> list[str]:
    """A file gone."""
    victim = rng.choice(files(folder))
    victim.unlink()
    return _named(folder, victim)


def grow(folder: Path, rng: random.Random) -> list[str]:
    """Bytes at the end of a file."""
    victim = rng.choice(files(folder))
    with victim.open("ab") as file:
        file.write(b"\0garbage")
    return _named(folder, victim)


def swap(folder: Path, rng: random.Random) -> list[str]:
    """The contents of two files, exchanged."""
    while True:
        a, b = _pick(folder, rng, 2)
        x, y = a.read_bytes(), b.read_bytes()
        if x != y:
            break
    a.write_bytes(y)
    b.write_bytes(x)
    return _named(folder, a, b)


def garbage_json(folder: Path, rng: random.Random) -> list[str]:
    """Something else in the manifest or another JSON file."""
    victim = folder / rng.choice([manifest.NAME, "_CHECKPOINT_METADATA"])
    victim.write_bytes(rng.choice(GARBAGE))
    return _named(folder, victim)


def edited_manifest(folder: Path, rng: random.Random) -> list[str]:
    """A manifest that is still JSON, with another checksum."""
    path = folder / manifest.NAME
    document = json.loads(path.read_text())
    rng.choice(list(document["body"]["arrays"].values()))["checksum"] = "0" * 16
    path.write_text(json.dumps(document))
    return _named(folder, path)


def from_older(folder: Path, rng: random.Random) -> list[str]:
    """A file of the step before, of the same name."""
    older = _before(folder)
    common = [p for p in files(older) if (folder / p.relative_to(older)).is_file()]
    differing = [p for p in common if (folder / p.relative_to(older)).read_bytes() != p.read_bytes()]
    victim = rng.choice(differing)
    shutil.copy(victim, folder / victim.relative_to(older))
    return _named(older, victim)


def older_renamed(folder: Path, rng: random.Random) -> list[str]:
    """The step before, under this one's name."""
    shutil.rmtree(folder)
    shutil.copytree(_before(folder), folder)
    return [manifest.NAME]


def emptied_folder(folder: Path, rng: random.Random) -> list[str]:
    """The folder without its files."""
    shutil.rmtree(folder)
    folder.mkdir()
    return [manifest.NAME]


def a_file(folder: Path, rng: random.Random) -> list[str]:
    """A file where the folder was."""
    shutil.rmtree(folder)
    folder.write_text(folder.name)
    return ["not a folder"]


def _before(folder: Path) -> Path:
    steps = sorted(int(p.name) for p in folder.parent.iterdir() if p.name.isdigit() and p.is_dir())
    older = [step for step in steps if step < int(folder.name)]
    return folder.parent / str(older[-1] if older else steps[-1])


DAMAGES: dict[str, Damage] = {
    d.__name__: d
    for d in (flip, flip_largest, truncate, empty, delete, grow, swap, garbage_json, edited_manifest, from_older)
} | {d.__name__: d for d in (older_renamed, emptied_folder, a_file)}
"""By name."""
