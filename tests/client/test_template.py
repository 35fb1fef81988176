# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.client.template`: what a sentence says for which row, and which templates are refused.

Every expected text is written out by hand.
"""

from __future__ import annotations

import time
from decimal import Decimal
from typing import Any

import numpy as np
import pandas as pd
import pytest

from veil.client.template import Template, canonical, require_columns
from veil.common.errors import TableError
from veil.common.plan_sections import Columns


def template(text: str, **more: Any) -> Template:
    return Template.parse(Columns(text_template=text, label="label", **more))


def rendered(text: str, rows: dict[str, list[object]], **more: Any) -> list[str]:
    return list(template(text, **more).render(pd.DataFrame({k: pd.Series(v, dtype=object) for k, v in rows.items()})))


@pytest.mark.parametrize("raw", [1, 1.0, "1", "1.0", " 1.00 ", "+1", "1.", np.int64(1), np.float32(1), Decimal("1.0")])
def test_one_is_found_however_it_is_written(raw: object) -> None:
    assert canonical(raw) == "1"


@pytest.mark.parametrize("raw", [True, "TRUE", "true", "True", np.True_])
def test_true_is_found_however_it_is_written_and_is_not_one(raw: object) -> None:
    assert canonical(raw) == "true"


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("-0.0", "0"),
        (-0.5, "-0.5"),
        ("2.50", "2.5"),
        ("0.10", "0.1"),
        ("100", "100"),
        ("007", "007"),
        ("1e3", "1e3"),
        ("12345678901234567891.0", "12345678901234567891"),
        ("Fixed Defect ", "Fixed Defect"),
        ("١", "١"),
        (None, "None"),
    ],
)
def test_other_values_keep_what_tells_them_apart(raw: object, expected: str) -> None:
    assert canonical(raw) == expected


def test_a_sentence_with_formats_and_words() -> None:
    texts = rendered(
        "{age:.0f} year old {sex}, ST depression {oldpeak:g}, {n:d} vessels, {pct:.1%} of {who:s}",
        {
            "age": [63.4, "57"],
            "sex": [1.0, "0"],
            "oldpeak": ["2.30", 0.0],
            "n": ["3.0", 0],
            "pct": [0.5, 1],
            "who": ["a", "b"],
        },
        values={"sex": {"1": "man", "0": "woman"}},
    )
    assert texts == [
        "63 year old man, ST depression 2.3, 3 vessels, 50.0% of a",
        "57 year old woman, ST depression 0, 0 vessels, 100.0% of b",
    ]


@pytest.mark.parametrize("blank", [None, float("nan"), "", "  ", "NaN", "nan", "NA", pd.NA, pd.NaT])
def test_a_clause_with_a_missing_value_is_left_out_whole(blank: object) -> None:
    text = "{age:.0f} year old {sex}, cholesterol {chol:.0f}, {thal}"
    rows: dict[str, list[object]] = {
        "age": [63, blank, 41],
        "sex": ["man"] * 3,
        "chol": [200, 210, blank],
        "thal": ["ok"] * 3,
    }
    assert rendered(text, rows) == [
        "63 year old man, cholesterol 200, ok",
        "cholesterol 210, ok",
        "41 year old man, ok",
    ]


def test_declared_missing_values_match_however_they_are_written() -> None:
    texts = rendered(
        "pressure {p:.0f}, chest {c}",
        {"p": [0, "0.0", 0.0, 120], "c": ["?", "x", "?", "?"]},
        missing_values={"p": [0], "c": ["?"]},
    )
    assert texts == ["", "chest x", "", "pressure 120"]


def test_a_declared_word_wins_over_the_customary_reading_as_missing() -> None:
    assert (
        rendered("allergies {a}", {"a": ["None", None]}, values={"a": {"None": "none known"}})
        == ["allergies none known"] * 2
    )
    assert rendered("allergies {a}", {"a": ["None", ""]}, values={"a": {"None": "none known"}}) == [
        "allergies none known",
        "",
    ]


def test_when_every_clause_is_missing_the_text_is_empty() -> None:
    assert rendered("{a}, {b}", {"a": [None, 1], "b": [None, None]}) == ["", "1"]


def test_true_and_one_in_the_same_column_are_two_values() -> None:
    words = {"x": {"True": "yes", "1": "one"}}
    assert rendered("{x}", {"x": [True, 1, 1.0, "TRUE", "1.0"]}, values=words) == [
        "yes",
        "one",
        "one",
        "yes",
        "one",
    ]


def test_one_record_gives_one_text_whatever_the_file_kept_of_its_types() -> None:
    text = "{a}, {b:.1f}, {c}"
    typed = rendered(text, {"a": [63.0], "b": [2], "c": [True]})
    assert typed == rendered(text, {"a": ["63"], "b": ["2.0"], "c": ["TRUE"]}) == ["63, 2.0, true"]


def test_commas_in_a_format_or_in_a_value_do_not_divide_clauses() -> None:
    assert rendered("income {x:,.0f}, {who}", {"x": [12345.0, 1], "who": [None, "Doe, Jane"]}) == [
        "income 12,345",
        "income 1, Doe, Jane",
    ]


def test_a_clause_without_places_always_stands_and_double_braces_are_text() -> None:
    assert rendered("patient, {{age}} {age}", {"age": [None, 5]}) == ["patient", "patient, {age} 5"]


def test_columns_are_named_once_in_the_order_of_the_sentence() -> None:
    assert template("{b}, {a:.0f} {b}").columns == ("b", "a")


@pytest.mark.parametrize(
    "text",
    [
        "{a.b}",
        "{a[0]}",
        "{}",
        "{a!r}",
        "{a:{b}}",
        "{a:{b}d}",
        "{a:.3}",
        "{a:,}",
        "{a:Q}",
        "{a:.1d}",
        "{a:>5.2s}{a:+s}",
        "{a",
        "a}",
        "{a}}",
    ],
)
def test_a_place_that_is_not_a_column_with_a_format_is_refused(text: str) -> None:
    with pytest.raises(TableError, match="text_template") as caught:
        template(text)
    assert caught.value.expectation
    assert caught.value.remedy


@pytest.mark.parametrize("text", ["no place at all", "", "{{age}}"])
def test_a_template_that_names_no_column_is_refused(text: str) -> None:
    with pytest.raises(TableError, match="names no column"):
        template(text)


def test_a_number_format_for_a_column_with_words_is_refused() -> None:
    with pytest.raises(TableError, match=r"\{sex:\.0f\}"):
        template("{sex:.0f}", values={"sex": {"1": "man"}})


@pytest.mark.parametrize("key", ["values", "missing_values"])
def test_words_or_missing_values_of_a_column_the_template_does_not_name_are_refused(key: str) -> None:
    given: dict[str, Any] = {key: {"thalac": {"1": "x"} if key == "values" else [0]}}
    with pytest.raises(TableError, match=rf'^{key}\.thalac.*did you mean "thalach"\?'):
        template("{thalach}", **given)


def test_two_words_for_one_value_are_refused() -> None:
    with pytest.raises(TableError, match=r'values\.a\."1\.0" = "uno" and elsewhere "one"'):
        template("{a}", values={"a": {"1": "one", "1.0": "uno"}})


def test_a_value_without_a_word_is_named_with_its_row() -> None:
    with pytest.raises(TableError, match=r'column "thal", row 2: no word for the value "reversable".*normal'):
        rendered("{thal}", {"thal": ["normal", "reversable"]}, values={"thal": {"normal": "normal scan"}})


@pytest.mark.parametrize(
    ("spec", "value", "expectation"),
    [
        (".0f", "high", "finite number"),
        (".0f", "inf", "finite number"),
        ("d", 2.5, "whole number"),
        ("d", "inf", "whole number"),
    ],
)
def test_a_value_that_its_format_cannot_show_is_named(spec: str, value: object, expectation: str) -> None:
    with pytest.raises(TableError, match=rf'row 2: the value "{value}"') as caught:
        rendered(f"{{a:{spec}}}", {"a": [1, value]})
    assert expectation in caught.value.expectation


def test_a_column_that_the_table_lacks_is_named_with_its_neighbour() -> None:
    with pytest.raises(TableError, match=r'no column "thalach".*"age", "thalch".*did you mean "thalch"\?'):
        rendered("{age}, {thalach}", {"age": [1], "thalch": [150]})


def test_a_long_header_is_listed_in_part() -> None:
    with pytest.raises(TableError) as caught:
        require_columns(["nothing alike"], [f"c{n}" for n in range(100)], "t.csv")
    assert caught.value.expectation.endswith('"c39" and 60 more')


def test_twenty_thousand_rows_render_in_seconds() -> None:
    rng = np.random.default_rng(0)
    table = pd.DataFrame(rng.normal(100, 20, size=(20_000, 12)), columns=[f"c{n}" for n in range(12)])
    parsed = template(", ".join(f"value {{c{n}:.1f}}" for n in range(12)))
    start = time.perf_counter()
    texts = parsed.render(table)
    assert time.perf_counter() - start < 10, "some 1.5 s on an idle core; ten leave room for a busy one"
    assert texts[0].startswith(f"value {table.c0[0]:.1f}, value ")
