# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.client.database`, and of `read_examples` with it, on SQLite files in a temporary folder."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from veil.client.database import Query, masked, parse_url, require_select, shown_url
from veil.client.examples import read_examples
from veil.common.errors import TableError
from veil.common.plan_sections import Columns, Task
from veil.common.privacy import PrivacyUnit

ROWS = [("fever", 1, "7", 36.5, "a.png"), ("none; 100 % :well", 0, "8", 37.0, "b.png"), (None, 0, "8", None, "c.png")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with closing(sqlite3.connect(tmp_path / "a.db")) as database, database:
        database.execute("CREATE TABLE t (body TEXT, label INTEGER, mrn TEXT, t REAL, path TEXT)")
        database.executemany("INSERT INTO t VALUES (?, ?, ?, ?, ?)", ROWS)
    return tmp_path


def query(folder: Path, statement: str = "SELECT * FROM t", url: str = "sqlite:///a.db", **more: Any) -> Query:
    return Query(url=parse_url(url), statement=statement, folder=folder, **more)


def rows_left(folder: Path) -> int:
    with closing(sqlite3.connect(folder / "a.db")) as database:
        return int(database.execute("SELECT count(*) FROM t").fetchone()[0])


def test_the_named_columns_come_typed_and_in_order(folder: Path) -> None:
    frame = query(folder).read(["label", "body", "t"])
    assert frame.columns.tolist() == ["label", "body", "t"]
    assert frame["label"].tolist() == [1, 0, 0]
    assert frame["body"].tolist() == [row[0] for row in ROWS]
    assert frame["t"].tolist()[:2] == [36.5, 37.0]


def test_a_statement_is_passed_on_as_it_is_written(folder: Path) -> None:
    statement = "WITH w AS (SELECT * FROM t) SELECT body FROM w WHERE body LIKE '%% :w%' OR body LIKE '% % :w%';"
    assert query(folder, statement).read(["body"])["body"].tolist() == ["none; 100 % :well"]


def test_examples_come_out_of_a_database_as_out_of_a_file(folder: Path) -> None:
    columns = Columns(text="body", label="label", labels={"1": "ill", "0": "well"}, patient="mrn")
    task = Task(kind="text-classification", labels=("well", "ill"))
    statement = "SELECT * FROM t WHERE body IS NOT NULL"
    examples = read_examples(query(folder, statement), columns, task, unit=PrivacyUnit.PATIENT)
    assert examples.inputs == ("fever", "none; 100 % :well")
    assert examples.labels.tolist() == [1, 0]
    assert examples.units.tolist() == ["7", "8"]
    with pytest.raises(TableError, match=r"row 3.*no text"):
        read_examples(query(folder), columns, task, unit=PrivacyUnit.PATIENT)


def test_image_paths_are_relative_to_the_site_file(folder: Path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        (folder / name).touch()
    columns = Columns(image="path", label="label", labels={"1": "ill", "0": "well"})
    task = Task(kind="image-classification", labels=("well", "ill"))
    examples = read_examples(query(folder), columns, task, unit=PrivacyUnit.RECORD)
    assert examples.inputs == (folder / "a.png", folder / "b.png", folder / "c.png")


def test_a_missing_number_is_named(folder: Path) -> None:
    columns = Columns(features=("t",), label="label", labels={"1": "ill", "0": "well"})
    task = Task(kind="tabular-classification", labels=("well", "ill"))
    with pytest.raises(TableError, match='column "t", row 3'):
        read_examples(query(folder), columns, task, unit=PrivacyUnit.RECORD)


@pytest.mark.parametrize("statement", ["WITH w AS (SELECT 1) DELETE FROM t", "WITH w AS (SELECT 1) UPDATE t SET t = 0"])
def test_a_statement_that_writes_changes_nothing(statement: str, folder: Path) -> None:
    with pytest.raises(TableError, match="readonly"):
        query(folder, statement).read(["body"])
    assert rows_left(folder) == len(ROWS)
    assert query(folder).read(["t"])["t"].tolist()[0] == 36.5


@pytest.mark.parametrize(
    "statement",
    ["", ";", "DELETE FROM t", "SELECT 1; DELETE FROM t", "DROP TABLE t", "SELECT';'", "SELECTED", "--\nSELECT 1"],
)
def test_anything_but_one_select_is_refused(statement: str, folder: Path) -> None:
    with pytest.raises(ValueError, match="one SELECT"):
        query(folder, statement)


@pytest.mark.parametrize("statement", ["SELECT 1", " select 1 ; ", "SELECT\n1", "with w as (select 1) select * from w"])
def test_one_select_is_taken(statement: str) -> None:
    require_select(statement)


@pytest.mark.parametrize(
    ("statement", "url", "message"),
    [
        ("SELECT body FROM nowhere", "sqlite:///a.db", "no such table"),
        ("SELECT label FROM t", "sqlite:///a.db", 'no column "body"'),
        ("SELECT 1", "sqlite:///b.db", "b.db: no such file"),
        ("SELECT 1", "nosuch://u:hush@h/db", "nosuch://u:***@h/db"),
        ("SELECT 1", "mssql+aioodbc://u:hush@h/db", "aioodbc"),
    ],
)
def test_an_error_names_its_cause_and_no_password(statement: str, url: str, message: str, folder: Path) -> None:
    with pytest.raises(TableError) as caught:
        query(folder, statement, url).read(["body"])
    assert message in str(caught.value)
    assert "hush" not in str(caught.value)
    assert not (folder / "b.db").exists()


def test_an_empty_result_is_an_error(folder: Path) -> None:
    columns = Columns(text="body", label="label")
    task = Task(kind="text-classification", labels=("0", "1"))
    with pytest.raises(TableError, match="no records"):
        read_examples(query(folder, "SELECT * FROM t WHERE 0"), columns, task, unit=PrivacyUnit.RECORD)


def test_the_password_of_a_file_is_used_and_not_shown(folder: Path) -> None:
    (folder / "password").write_text("hu sh\n", encoding="utf-8")
    given = query(folder, url="nosuch://u@h/db", password_file=folder / "password")
    assert given._complete_url() == parse_url("nosuch://u:hu sh@h/db")
    with pytest.raises(TableError) as caught:
        given.read(["body"])
    assert "hu sh" not in f"{given} {given!r} {caught.value}"
    with pytest.raises(TableError, match="absent cannot be read"):
        query(folder, password_file=folder / "absent").read(["body"])


def test_a_url_is_shown_without_password_and_options() -> None:
    assert shown_url(parse_url("mysql+x://u:hush@h:1/db?password=hush")) == "mysql+x://u:***@h:1/db"
    with pytest.raises(ValueError, match="no SQLAlchemy URL") as caught:
        parse_url("postgresql://u:hush@h:port/db")
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ('table = "a://u:hush@h"; x', 'table = "a://u:***@h"; x'),
        ('table = "a://u:hu/s:h@h"', 'table = "a://u:***@h"'),
        ('"a://u:hus...', '"a://u:***...'),
        ('"https://host:9300"', '"https://host:9300"'),
    ],
)
def test_passwords_in_a_text_are_masked(text: str, shown: str) -> None:
    assert masked(text) == shown
