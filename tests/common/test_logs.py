# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.common.logs`: one JSON document a line, with what was said and nothing more."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest

from veil.common.logs import JsonLines, log_json_lines

QUIET = ("flwr", "uvicorn", "httpx", "alembic", "sqlalchemy")


@pytest.fixture
def loggers() -> Iterator[None]:
    """Gives the process its loggers back as they were."""
    kept = [(one, one.level, one.handlers[:], one.propagate) for one in map(logging.getLogger, (None, *QUIET))]
    yield
    for logger, level, handlers, propagate in kept:
        logger.setLevel(level)
        logger.handlers[:] = handlers
        logger.propagate = propagate


def record(message: str, *values: object, **fields: Any) -> logging.LogRecord:
    made = logging.LogRecord("veil.site", logging.WARNING, __file__, 1, message, values, None)
    made.__dict__.update(fields)
    return made


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_a_line_says_when_how_grave_who_and_what() -> None:
    moment = datetime(2030, 5, 1, 12, 0, 0, 250_000, UTC)
    line = json.loads(JsonLines().format(record("round %d of %s", 3, "heart", created=moment.timestamp())))
    assert line == {
        "at": "2030-05-01T12:00:00.250+00:00",
        "level": "warning",
        "logger": "veil.site",
        "pid": os.getpid(),
        "message": "round 3 of heart",
    }


def test_fields_that_a_caller_hangs_on_a_record_are_not_written() -> None:
    assert "mrn" not in json.loads(JsonLines().format(record("a line", mrn="4711")))


@pytest.mark.parametrize("text", ["two\nlines", "a\r\ttab", '"quoted" \\', "\x1b[31mred\x00", "Müller 🏥", "\ud800"])
def test_any_text_is_one_line(text: str) -> None:
    line = JsonLines().format(record("%s", text))
    assert "\n" not in line and "\r" not in line and "\x1b" not in line
    assert json.loads(line)["message"] == text


def test_an_exception_is_a_field_of_its_line() -> None:
    try:
        raise ValueError("no such column")
    except ValueError:
        line = JsonLines().format(record("failed", exc_info=sys.exc_info()))
    assert "\n" not in line
    found = json.loads(line)
    assert found["message"] == "failed"
    assert found["exception"].startswith("Traceback")
    assert found["exception"].endswith("ValueError: no such column")


@pytest.mark.usefixtures("loggers")
def test_the_whole_process_logs_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    log_json_lines()
    logging.getLogger("veil.any").info("at work")
    logging.getLogger("veil.any").debug("not shown")
    captured = capsys.readouterr()
    assert [(line["logger"], line["message"]) for line in lines(captured.err)] == [("veil.any", "at work")]
    assert captured.out == ""


@pytest.mark.usefixtures("loggers")
def test_a_level_can_be_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    log_json_lines(logging.DEBUG)
    logging.getLogger("veil.any").debug("shown")
    assert [line["level"] for line in lines(capsys.readouterr().err)] == ["debug"]


@pytest.mark.usefixtures("loggers")
@pytest.mark.parametrize("name", QUIET)
def test_others_are_heard_from_warnings_on_and_once(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Flower and uvicorn bring handlers of their own."""
    logging.getLogger(name).addHandler(logging.StreamHandler(sys.stderr))
    logging.getLogger(name).propagate = False
    log_json_lines()
    logging.getLogger(name).info("chatter")
    logging.getLogger(f"{name}.inner").warning("trouble")
    assert [line["message"] for line in lines(capsys.readouterr().err)] == ["trouble"]


@pytest.mark.usefixtures("loggers")
def test_doing_it_again_does_not_double_the_lines(capsys: pytest.CaptureFixture[str]) -> None:
    log_json_lines()
    log_json_lines()
    logging.getLogger("veil.any").info("once")
    assert len(lines(capsys.readouterr().err)) == 1
