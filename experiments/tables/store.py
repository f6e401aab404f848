"""Results of runs on disk, one Record per content key, shared by all tables of a scale."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from structmat.training.record import Record


@dataclasses.dataclass(frozen=True)
class Result:
    """What came out of a run. `failed` is why it stopped, "" where it ended; a failed run has no held-out figures."""

    record: Record

    @property
    def failed(self) -> str:
        """The error of a run that diverged."""
        return self.record.metrics.get("failed", "")

    @property
    def heldout(self) -> dict[str, float]:
        """Held-out figure by name."""
        return self.record.metrics["heldout"]


@dataclasses.dataclass
class Store:
    """The results of one scale under `folder`/<scale>/runs."""

    folder: Path
    scale: str

    def __post_init__(self) -> None:
        self._held: dict[str, Result] = {}

    def path(self, key: str) -> Path:
        """Where the run of this content is kept."""
        return self.folder / self.scale / "runs" / f"{key}.json"

    def empty(self) -> bool:
        """Whether no run of this scale has a result, so that nothing has to be planned to say so."""
        return not any(self.path("x").parent.glob("*.json"))

    def read(self, key: str) -> Result | None:
        """The result, or None if there is none yet; RecordError if the file is damaged."""
        if key not in self._held and self.path(key).exists():
            self._held[key] = Result(Record.read(self.path(key)))
        return self._held.get(key)

    def write(self, key: str, record: Record) -> Result:
        """Keep a result."""
        record.write(self.path(key))
        self._held[key] = Result(record)
        return self._held[key]
