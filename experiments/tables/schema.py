"""A paper's table as data: arms, the paper's figures, and what the paper claims."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from structmat.structures.errors import suggest

Changes = Mapping[str, Any]

SCALES = ("cpu", "gpu", "paper")
DENSE, SMALL, LOW_RANK = "dense", "dense small", "low rank"
"""Arms every table has: the dense model, the widest dense one and the low-rank one with no more parameters than the
table's reference arm."""


class TableError(ValueError):
    """A table, scale, arm or run that does not exist or does not fit; the text names what would."""


@dataclasses.dataclass(frozen=True, eq=False)
class Arm:
    """One row.

    Attributes:
      name: unique in its table.
      changes: dotted config field -> value, over the table's base config; or a function from that config to these.
      tuned_with: arm whose learning rate it takes; "" if its own is tuned. Arms of one family share a rate.
      paper: column -> the paper's figure for this arm.
      note: one sentence for readers.
      at: scale -> further changes there, such as the paper's own rank at the paper's own width.
      reference: a method without a model, such as `cg_sense`, whose figures the records of these runs have beside the
        model's: the row shows it instead, at no cost where another arm has the same config.
    """

    name: str
    changes: Changes | Callable[[ConfigDict], Changes] = dataclasses.field(default_factory=dict)
    tuned_with: str = ""
    paper: Mapping[str, float] = dataclasses.field(default_factory=dict)
    note: str = ""
    at: Mapping[str, Changes] = dataclasses.field(default_factory=dict)
    reference: str = ""

    def over(self, base: ConfigDict, scale: str) -> Changes:
        """What differs from the table's base config at a scale."""
        changes = self.changes(base) if callable(self.changes) else self.changes
        return {**changes, **self.at.get(scale, {})}


def by_scale(fields: Callable[[str], Changes], scales: Sequence[str] = SCALES) -> dict[str, Any]:
    """`changes` and `at` of an arm from its fields at each of the scales, of which the first is the table's smallest."""
    first, *rest = scales
    return {"changes": fields(first), "at": {scale: fields(scale) for scale in rest}}


@dataclasses.dataclass(frozen=True)
class Claim:
    """What the paper asserts of two arms, judged over seeds.

    Attributes:
      text: the claim as a sentence. source: where the paper makes it.
      better, worse: names of arms.
      within: None for an ordering. Else the claim is that `better` is at most this much behind `worse`, in the metric's
        units.
      metric: held-out figure it is about, "" for the table's; better is the same direction.
    """

    text: str
    source: str
    better: str
    worse: str
    within: float | None = None
    metric: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
    """A table of a paper at the scales it can be run at.

    Attributes:
      name: as on the command line. title, citation: for readers.
      bases: scale -> name of a base config, see `bases`.
      arms: rows beside the baselines, in order.
      reference: arm whose parameters `dense small` and `low rank` match. share: the fraction of the dense entries of its
        structured sites that they match instead, where it holds zeros that count as parameters.
      claims: what is judged.
      columns: the paper's columns, in the order shown: key of `Arm.paper` -> heading.
      baselines_paper: baseline's name -> column -> the paper's figure.
      low_rank: structure text of the low-rank baseline with `{share}` for the fraction of the dense parameters; "" where
        arms are low rank themselves, or the reference arm is larger than dense. Either may be given by scale.
      remarks: scale -> paragraphs under the table, such as why a claim does not hold there.
      extra: (results) -> Markdown under the table, such as a fit over its runs.
    """

    name: str
    title: str
    citation: str
    bases: Mapping[str, str]
    arms: tuple[Arm, ...]
    reference: str
    claims: tuple[Claim, ...] = ()
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    baselines_paper: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)
    share: float | Mapping[str, float] | None = None
    low_rank: str | Mapping[str, str] = "fit(low_rank(), params={share})"
    remarks: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    extra: Callable[[Any], str] | None = None

    def share_at(self, scale: str) -> float | None:
        """The share at a scale."""
        return self.share[scale] if isinstance(self.share, Mapping) else self.share

    def low_rank_at(self, scale: str) -> str:
        """The low-rank baseline's structure at a scale."""
        return self.low_rank if isinstance(self.low_rank, str) else self.low_rank[scale]

    def __post_init__(self) -> None:
        names = [arm.name for arm in self.arms]
        known = [DENSE, SMALL, LOW_RANK, *names]
        if twice := {n for n in known if known.count(n) > 1}:
            raise TableError(f"table {self.name}: arm names {sorted(twice)} occur twice; give each arm its own")
        for scale in self.bases:
            if scale not in SCALES:
                raise TableError(f"table {self.name}: no scale {scale!r}" + suggest(scale, SCALES))
        if self.reference not in names:
            raise TableError(f"table {self.name}: no arm {self.reference!r}" + suggest(self.reference, names))
        for claim in self.claims:
            for name in (claim.better, claim.worse):
                if name not in known:
                    raise TableError(f"table {self.name}, claim {claim.text!r}: no arm {name!r}" + suggest(name, known))
        for arm in self.arms:
            if arm.tuned_with and arm.tuned_with not in known:
                raise TableError(
                    f"table {self.name}, arm {arm.name!r}: no arm {arm.tuned_with!r}" + suggest(arm.tuned_with, known)
                )
        for row, figures in {**{a.name: a.paper for a in self.arms}, **self.baselines_paper}.items():
            for column in figures:
                if column not in self.columns:
                    raise TableError(
                        f"table {self.name}, arm {row!r}: no column {column!r}" + suggest(column, self.columns)
                    )
