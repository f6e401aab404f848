"""Every table by name: one file per paper, one line here."""

from __future__ import annotations

from experiments.tables import (
    btt_moe,
    householder,
    kronecker,
    lost,
    maestro,
    mg_tfno,
    monarch,
    monarch_flow,
    monarch_images,
    monarch_mri,
    rates,
    rigl,
    scaling,
    sltrain,
    sparse_ift,
    sst,
    trp,
)
from experiments.tables.schema import Table, TableError
from structmat.structures.errors import suggest

_PAPERS = (
    *(monarch, monarch_images, rates, sltrain, lost, rigl, trp, scaling, sst),
    *(maestro, sparse_ift, kronecker, householder, btt_moe),
    *(monarch_flow, monarch_mri, mg_tfno),
)
TABLES: dict[str, Table] = {table.name: table for paper in _PAPERS for table in paper.TABLES}


def table_of(name: str) -> Table:
    """The table of that name.

    Raises:
      TableError: there is none.
    """
    if name not in TABLES:
        raise TableError(f"no table {name!r}" + suggest(name, TABLES))
    return TABLES[name]
