"""One Record per run: what was run, on what, and what came out; train, compare, bench and tables all write it."""

import dataclasses
import datetime
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from structmat.structures.errors import suggest
from structmat.training import environment
from structmat.training.plain_json import canonical, plain

SCHEMA = 1
KINDS = ("train", "compare", "bench", "tables", "pod", "choose", "torture", "convert", "evaluate")


class RecordError(ValueError):
    """A record cannot be read, written or compared; the text names the field and the file."""


@dataclass(frozen=True)
class Record:
    """The JSON schema of a run; every value is plain JSON, and non-finite floats are "NaN", "Infinity", "-Infinity".

    name: what tables show. kind: one of KINDS. config: all of it. structures: site path (or arm) -> canonical text.
    data_hash: sha256 of the data. versions, device: see `environment`. date: ISO 8601, UTC. command: a shell line.
    seconds: wall time. memory_bytes: peak of the process, None if not measured. metrics: what came out, may be nested.
    """

    name: str
    kind: str
    config: dict[str, Any]
    structures: dict[str, str]
    seed: int
    data_hash: str
    versions: dict[str, str]
    device: dict[str, Any]
    date: str
    command: str
    seconds: float
    memory_bytes: int | None
    metrics: dict[str, Any]
    schema: int = SCHEMA

    @classmethod
    def create(
        cls,
        *,
        name: str,
        kind: str,
        config: Mapping[str, Any],
        structures: Mapping[str, Any],
        seed: int,
        data_hash: str,
        seconds: float,
        metrics: Mapping[str, Any],
    ) -> "Record":
        """A Record of now, here and this command; structures may be objects (their `str` is stored)."""
        try:
            record = cls(
                name=name,
                kind=kind,
                config=plain(config, "config"),
                structures={path: str(s) for path, s in structures.items()},
                seed=int(seed),
                data_hash=data_hash,
                versions=environment.versions(),
                device=environment.device(),
                date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                command=environment.command(),
                seconds=float(seconds),
                memory_bytes=environment.peak_memory_bytes(),
                metrics=plain(metrics, "metrics"),
            )
        except TypeError as e:
            raise RecordError(f"record {name!r}: {e}") from e
        return _checked(dataclasses.asdict(record), f"record {name!r}")

    @property
    def key(self) -> str:
        """See `content_key`."""
        return content_key(self.config, self.structures, self.data_hash)

    def write(self, path: str | Path) -> Path:
        """Writes the JSON beside `path` and renames it there, so that a reader never sees half a record."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        beside.write_text(json.dumps(dataclasses.asdict(self), indent=1, allow_nan=False) + "\n")
        beside.replace(path)
        return path

    @classmethod
    def read(cls, path: str | Path) -> "Record":
        """Reads and checks; raises RecordError naming the file and the field that is missing, unknown or ill-typed."""
        try:
            fields = json.loads(Path(path).read_text())
        except (OSError, ValueError) as e:
            raise RecordError(f"{path}: not a readable record: {e}") from e
        if not isinstance(fields, dict):
            raise RecordError(f"{path}: a record is a JSON object, found {type(fields).__name__}")
        return _checked(fields, str(path))


def load_records(folder: str | Path) -> list[Record]:
    """All `*.json` below `folder` in path order; raises RecordError if there is no such folder or one is not a record."""
    folder = Path(folder)
    if not folder.is_dir():
        raise RecordError(f"no records at {str(folder)!r}: not a folder")
    return [Record.read(path) for path in sorted(folder.rglob("*.json")) if not path.name.startswith(".")]


def content_key(config: Mapping[str, Any], structures: Mapping[str, Any], data_hash: str) -> str:
    """12 hex digits of the sha256 of what determines a run; equal for equal content whatever the order of keys."""
    content = {"config": config, "structures": {k: str(v) for k, v in structures.items()}, "data_hash": data_hash}
    return hashlib.sha256(canonical(content).encode()).hexdigest()[:12]


def same_data(records: Iterable[Record]) -> str:
    """The one data hash of all records; raises RecordError naming two that differ, or if there are none."""
    records = list(records)
    if not records:
        raise RecordError("no records to compare")
    for other in records[1:]:
        first = records[0]
        if other.data_hash != first.data_hash:
            raise RecordError(
                f"records {first.name!r} and {other.name!r} were made on different data "
                f"({first.data_hash[:12]} and {other.data_hash[:12]}) and cannot be compared; rerun one of them"
            )
    return records[0].data_hash


_TYPES = {
    "name": str,
    "kind": str,
    "config": dict,
    "structures": dict,
    "seed": int,
    "data_hash": str,
    "versions": dict,
    "device": dict,
    "date": str,
    "command": str,
    "seconds": (int, float),
    "memory_bytes": (int, type(None)),
    "metrics": dict,
    "schema": int,
}


def _checked(fields: Mapping[str, Any], place: str) -> Record:
    if fields.get("schema", SCHEMA) != SCHEMA:
        raise RecordError(f"{place}: field 'schema' is {fields['schema']!r}; this version reads {SCHEMA}")
    for field in fields:
        if field not in _TYPES:
            raise RecordError(f"{place}: unknown field {field!r}{suggest(field, _TYPES)}")
    for field, kind in _TYPES.items():
        if field not in fields:
            raise RecordError(f"{place}: field {field!r} is missing")
        value = fields[field]
        if not isinstance(value, kind) or isinstance(value, bool):
            names = " or ".join(t.__name__ for t in (kind if isinstance(kind, tuple) else (kind,)))
            raise RecordError(f"{place}: field {field!r} is {value!r:.60}; it must be {names}")
    for field in ("structures", "versions"):
        for key, text in fields[field].items():
            if not isinstance(text, str):
                raise RecordError(f"{place}: field {field!r}, entry {key!r} is {text!r:.60}; it must be str")
    if fields["kind"] not in KINDS:
        raise RecordError(f"{place}: field 'kind' is {fields['kind']!r}{suggest(fields['kind'], KINDS)}")
    try:
        datetime.datetime.fromisoformat(fields["date"])
    except ValueError as e:
        raise RecordError(f"{place}: field 'date' is {fields['date']!r}; it must be an ISO 8601 date") from e
    return Record(**fields)
