"""Every table by name: one file per paper, one line here."""

from __future__ import annotations

from experiments.tables import monarch
from experiments.tables.schema import Table, TableError
from structmat.structures.errors import suggest

TABLES: dict[str, Table] = {table.name: table for table in (*monarch.TABLES,)}


def table_of(name: str) -> Table:
    """The table of that name.

    Raises:
      TableError: there is none.
    """
    if name not in TABLES:
        raise TableError(f"no table {name!r}" + suggest(name, TABLES))
    return TABLES[name]
