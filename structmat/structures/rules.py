"""Which site of a model gets which structure: an ordered list of (regex, structure), or one structure for all."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping, Sequence

from structmat.structures.dense import Dense
from structmat.structures.errors import StructureError
from structmat.structures.recipe import Structure
from structmat.structures.text import parse

RuleSpec = str | Structure | Sequence[tuple[str, str | Structure]]


@dataclasses.dataclass(frozen=True)
class Rules:
    """An ordered list of (regex, structure); the regex None stands for every site of kind `linear`.

    The first rule whose regex fully matches a site's slash path (layer index included, `layers_7/mlp/up`) wins;
    unmatched sites are dense.

    Examples:
      >>> rules = Rules.of("layers_0/.* -> low_rank(rank=8); .*/up -> monarch(blocks=4)")
      >>> found = rules.resolve(dict.fromkeys(["layers_0/up", "layers_1/up", "layers_1/down"], "linear"))
      >>> {path: structure.short() for path, structure in found.items()}
      {'layers_0/up': 'low_rank(rank=8)', 'layers_1/up': 'monarch(blocks=4)', 'layers_1/down': 'dense()'}
    """

    rules: tuple[tuple[str | None, Structure], ...] = ()

    @staticmethod
    def of(spec: RuleSpec | Rules) -> Rules:
        """Read a structure, its text, a list of pairs, or the text `regex -> structure; regex -> structure`.

        Raises:
          StructureError: an invalid structure or regular expression.
        """
        if isinstance(spec, Rules):
            return spec
        if isinstance(spec, Structure):
            return Rules(((None, spec),))
        if isinstance(spec, str):
            if "->" not in spec:
                return Rules(((None, parse(spec)),))
            spec = [_split(part) for part in re.split(r"[;\n]", spec) if part.strip()]
        rules = []
        for pattern, structure in spec:
            try:
                re.compile(pattern)
            except re.error as error:
                raise StructureError(f"rule {pattern!r} is not a regular expression: {error}") from None
            rules.append((pattern, parse(structure)))
        return Rules(tuple(rules))

    def resolve(self, sites: Mapping[str, str]) -> dict[str, Structure]:
        """Assign a structure to every site: that of `matched`, else dense."""
        chosen = self.matched(sites)
        return {p: chosen.get(p, Dense()) for p in sites}

    def matched(self, sites: Mapping[str, str]) -> dict[str, Structure]:
        """The structure of every site that some rule matches.

        Args:
          sites: slash path -> kind (`linear`, `conv`, `embed`, `head`).

        Raises:
          StructureError: a rule that matches nothing, or only what earlier rules took.
        """
        chosen: dict[str, Structure] = {}
        for pattern, structure in self.rules:
            if pattern is None:
                hits = [p for p, kind in sites.items() if kind == "linear"]
            else:
                hits = [p for p in sites if re.fullmatch(pattern, p)]
            fresh = [p for p in hits if p not in chosen]
            if pattern is None and not hits and structure == Dense():
                continue  # what a model without linear sites is anyway
            if not fresh:
                raise StructureError(_no_match(pattern, structure, hits, sites))
            chosen.update(dict.fromkeys(fresh, structure))
        return chosen

    def __str__(self) -> str:
        return "; ".join(str(s) if p is None else f"{p} -> {s}" for p, s in self.rules)


def _split(part: str) -> tuple[str, str]:
    pattern, arrow, structure = part.partition("->")
    if not arrow:
        raise StructureError(f"rule {part.strip()!r} must read 'regex -> structure'")
    return pattern.strip(), structure.strip()


def _no_match(pattern: str | None, structure: Structure, hits: list[str], sites: Mapping[str, str]) -> str:
    if pattern is None:
        return (
            f"{structure.short()} applies to sites of kind 'linear', and the model has none; sites: {', '.join(sites)}"
        )
    if hits:
        return f"rule {pattern!r} matches only sites that earlier rules took: {', '.join(hits[:6])}"
    return f"rule {pattern!r} matches no site; {_near(pattern, sites)}"


def matching(pattern: str, paths: Iterable[str]) -> list[str]:
    """The paths that `pattern` fully matches, in their order.

    Raises:
      StructureError: it is not a regular expression, or matches none; lists near paths.
    """
    paths = list(paths)
    try:
        hits = [p for p in paths if re.fullmatch(pattern, p)]
    except re.error as error:
        raise StructureError(f"{pattern!r} is not a regular expression: {error}") from None
    if not hits:
        raise StructureError(f"{pattern!r} matches no path; {_near(pattern, paths)}")
    return hits


def _near(pattern: str, paths: Iterable[str]) -> str:
    paths, plain = list(paths), re.sub(r"[\\.*+?()\[\]|^$]", "", pattern)
    near = difflib.get_close_matches(plain, paths, n=4, cutoff=0.2) or paths[:4]
    return f"near: {', '.join(near) or 'there is none'} (the whole path must match, try '.*')"
