"""What a checkpoint folder must hold: size and SHA-256 of every file, checksum of every array, and the run's extra.

One JSON file inside the folder, itself covered by a hash, so that a flipped byte in it is found too.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from etils import epath

NAME = "MANIFEST.json"
SCHEMA = 1
_CHUNK = 1 << 22


class ManifestError(ValueError):
    """A checkpoint folder is not what its manifest says, or has none; the text names the file and the difference."""


@dataclass(frozen=True)
class Manifest:
    """`files`: relative path -> [size, sha256 or None]; `arrays`: slash path -> {shape, dtype, checksum}."""

    step: int
    files: Mapping[str, list]
    arrays: Mapping[str, Mapping[str, Any]]
    extra: Mapping[str, Any]
    schema: int = SCHEMA


def write(folder: epath.Path, step: int, arrays: Mapping[str, Any], extra: Mapping[str, Any], hash_limit: int) -> None:
    """Lists the finished `folder` and writes its manifest; files are hashed only if they total <= hash_limit bytes."""
    sizes = {name: path.stat().length for name, path in _files(folder)}
    hashed = sum(sizes.values()) <= hash_limit
    files = {name: [size, _sha256(folder / name) if hashed else None] for name, size in sizes.items()}
    body = _canonical(asdict(Manifest(step, files, dict(arrays), dict(extra))))
    text = json.dumps({"sha256": hashlib.sha256(body.encode()).hexdigest(), "body": json.loads(body)}, indent=1)
    (folder / NAME).write_text(text)


def read(folder: epath.Path) -> Manifest:
    """The manifest of `folder` after checking its own hash; raises ManifestError."""
    path = folder / NAME
    if not folder.is_dir():
        raise ManifestError("not a folder")
    if not path.exists():
        raise ManifestError(f"no {NAME}")
    try:
        document = json.loads(path.read_bytes())
        body, expected = document["body"], document["sha256"]
        intact = hashlib.sha256(_canonical(body).encode()).hexdigest() == expected
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise ManifestError(f"{NAME} is not readable ({type(e).__name__}: {e})") from e
    if not intact:
        raise ManifestError(f"{NAME} does not match its own hash")
    if body.get("schema") != SCHEMA:
        raise ManifestError(f"{NAME} has schema {body.get('schema')}; this version reads {SCHEMA}")
    return Manifest(**body)


def verify(folder: epath.Path, hashes: bool = True) -> Manifest:
    """Reads the manifest and checks every listed file's size and (with `hashes`) SHA-256; raises ManifestError."""
    manifest = read(folder)
    if folder.name != str(manifest.step):
        raise ManifestError(f"{NAME} is of step {manifest.step}: the folder was renamed or its content replaced")
    for name, (size, _) in manifest.files.items():
        path = folder / name
        if not path.exists():
            raise ManifestError(f"{name} is missing")
        if (found := path.stat().length) != size:
            raise ManifestError(f"{name} has {found} bytes, not {size}")
    for name, (_, sha256) in manifest.files.items():
        if hashes and sha256 is not None and _sha256(folder / name) != sha256:
            raise ManifestError(f"{name} differs from its SHA-256")
    return manifest


def _canonical(body: Any) -> str:
    return json.dumps(body, sort_keys=True, separators=(",", ":"))


def _files(folder: epath.Path, prefix: str = "") -> Iterator[tuple[str, epath.Path]]:
    for path in sorted(folder.iterdir(), key=lambda p: p.name):
        if path.is_dir():
            yield from _files(path, f"{prefix}{path.name}/")
        elif prefix or path.name != NAME:
            yield prefix + path.name, path


def _sha256(path: epath.Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
