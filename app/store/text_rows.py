"""Rows that are read as text, so that the database returns each of them whatever it holds.

Values that people may have changed are checked row by row: one that cannot be read must not keep
the others from being read.
"""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import ColumnElement, Dialect, Select, Table, Text, case, cast, func, select

BOOLEANS: Final = {"0": False, "1": True, "false": False, "true": True}
"""How databases write booleans as text: SQLite has only numbers."""
INVALID: Final = (ValueError, ArithmeticError, TypeError, AttributeError, LookupError)
"""What is raised where the values of a row are none that it may have."""


def select_as_text(table: Table, dialect: Dialect) -> Select[Any]:
    """Return a query of all rows, with each value as text or ``None``."""
    sqlite = dialect.name == "sqlite"
    columns = [_sqlite_text(each) if sqlite else cast(each, Text) for each in table.c]
    return select(*(column.label(each.name) for column, each in zip(columns, table.c, strict=True)))


def fault(error: Exception) -> str:
    """Return in a few words why a row is invalid."""
    return f"{type(error).__name__}: {error}"[:200]


def _sqlite_text(column: ColumnElement[Any]) -> ColumnElement[Any]:
    """Return a column as text. SQLite stores bytes in any column; they become an invalid text."""
    return case((func.typeof(column) == "blob", "bytes\n"), else_=cast(column, Text))
