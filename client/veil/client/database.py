# SPDX-License-Identifier: Apache-2.0
"""A table in a database: what one SELECT statement returns, read through SQLAlchemy.

Promises that a password is never shown, that the transaction is rolled back whatever the statement did, and that
SQLAlchemy and pandas are loaded only by who has a database.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from veil.client.template import require_columns
from veil.common.errors import TableError

if TYPE_CHECKING:
    import pandas as pd
    from sqlalchemy import URL, Connection

_READ_ONLY = {"sqlite": "PRAGMA query_only = ON", "postgresql": "SET TRANSACTION READ ONLY"}
"""Said first where the database knows it: Python's sqlite3 commits a DELETE behind a WITH by itself."""

_SECRET = re.compile(r"(://[^:/@\s]*:)[^@\"]*(@|\.\.\.)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Query:
    """The records of a database; printing it shows nothing secret.

    Attributes:
        url: SQLAlchemy URL, perhaps with its password; an SQLite path in it is relative to `folder`.
        statement: one SELECT statement.
        folder: what relative paths start from, those of images among them.
        password_file: the password's own file, when it does not stand in the URL.

    Raises:
        ValueError: for anything but one SELECT statement.
    """

    url: URL = field(repr=False)
    statement: str
    folder: Path
    password_file: Path | None = None

    def __post_init__(self) -> None:
        require_select(self.statement)

    def __str__(self) -> str:
        return shown_url(self.url)

    def read(self, names: Sequence[str]) -> pd.DataFrame:
        """The named columns of what the statement returns, values typed as the driver gives them.

        Raises:
            TableError: when the database cannot be reached, refuses the statement, or gives other columns.
        """
        import pandas as pd

        with self._connection() as connection:
            if read_only := _READ_ONLY.get(connection.dialect.name):
                connection.exec_driver_sql(read_only)
            result = connection.execution_options(no_parameters=True).exec_driver_sql(self.statement)
            header = list(result.keys())
            require_columns(names, header, str(self))
            rows = [tuple(row) for row in result]
        frame = pd.DataFrame(rows, columns=header, dtype=object)
        return frame[list(names)]

    @contextmanager
    def _connection(self) -> Iterator[Connection]:
        """A connection of its own whose transaction is rolled back."""
        from sqlalchemy import NullPool, create_engine
        from sqlalchemy.exc import SQLAlchemyError

        try:
            engine = create_engine(self._complete_url(), poolclass=NullPool)
            with engine.connect() as connection:
                try:
                    yield connection
                finally:
                    connection.rollback()
        except ModuleNotFoundError as error:
            remedy = f"install {error.name} into the environment of Veil"
            raise TableError(f"{self}: no module {error.name}", "an installed database driver", remedy) from None
        except SQLAlchemyError as error:
            reason = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
            raise TableError(
                f"{self}: {masked(reason)}",
                "a database that answers the query of the site file",
                "check table, query and password_file, and that the account may read",
            ) from None

    def _complete_url(self) -> URL:
        url = self.url
        if self.password_file is not None:
            url = url.set(password=_password(self.password_file))
        file = url.database or ""
        if url.get_backend_name() != "sqlite" or file in {"", ":memory:"} or file.startswith("file:"):
            return url
        path = self.folder / file
        if not path.is_file():
            raise TableError(f"{path}: no such file", "an SQLite database", "check the path in table")
        return url.set(database=str(path))


def parse_url(text: str) -> URL:
    """Parse a SQLAlchemy URL.

    Raises:
        ValueError: when it is none; the message does not quote it.
    """
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        return make_url(text)
    except (ArgumentError, ValueError):
        raise ValueError("it is no SQLAlchemy URL; write it as driver://user@host:port/database") from None


def require_select(statement: str) -> None:
    """Check that a statement only reads.

    Raises:
        ValueError: when it does not begin with SELECT or WITH, or holds a semicolon before its end.
    """
    words = statement.strip().removesuffix(";").split()
    if not words or words[0].upper() not in {"SELECT", "WITH"} or any(";" in word for word in words):
        raise ValueError("it is not one SELECT statement; name a view where more is needed")


def shown_url(url: URL) -> str:
    """A URL for the screen: without its password and its options, which may hold one."""
    return url.set(query={}).render_as_string(hide_password=True)


def masked(text: str) -> str:
    """`text` with the password of every URL in it made unreadable, also of one that is cut off."""
    return _SECRET.sub(r"\1***\2", text)


def _password(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip("\r\n")
    except (OSError, UnicodeDecodeError):
        raise TableError(
            f"{path} cannot be read", "a file with the database's password", "check password_file"
        ) from None
