# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.server.page`: it shows every value, escaped, and has nothing that writes."""

from __future__ import annotations

import asyncio
import copy
import html
import socket
from html.parser import HTMLParser
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from veil.common.errors import InputError, RefusalCode
from veil.server.overview import Overview
from veil.server.page import PageServer, page_app, render

HOSTILE = '<script>alert("x")</script>&\'\n}'
DOCUMENT: dict[str, Any] = {
    "url": "https://veil.example:8443",
    "certificate": {"not_after": "2030-05-01T12:00:00+00:00", "days_left": 41},
    "sites": [
        {"name": "Ulm", "connected": True, "enrolled_at": "2030-04-01T08:00:00+00:00", "revoked_at": None},
        {"name": "Bonn", "connected": False, "enrolled_at": "2030-04-02T08:00:00+00:00", "revoked_at": None},
        {"name": "Kiel", "connected": False, "enrolled_at": "2030-04-03", "revoked_at": "2030-04-04"},
    ],
    "runs": [
        {
            "name": "heart-0a1b2c",
            "phase": "training",
            "rounds_done": 3,
            "rounds": 31,
            "sites": {"Ulm": "replied", "Bonn": "budget"},
            "message": "",
            "updated": 1.0,
        },
        {
            "name": "lung-3d4e5f",
            "phase": "failed",
            "rounds_done": 0,
            "rounds": 31,
            "sites": {},
            "message": "1 sites take part. Expected: at least cohort.min_sites = 2",
            "updated": 2.0,
        },
    ],
}


class FakeOverview(Overview):
    """A document, whatever the folder holds."""

    def __init__(self, document: dict[str, Any]) -> None:
        self._document = document

    def document(self) -> dict[str, Any]:
        return self._document


class Tags(HTMLParser):
    """The tags and the text of a page, as a browser takes it."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text += data


def ask(method: str, path: str, document: dict[str, Any] = DOCUMENT) -> httpx.Response:
    async def get() -> httpx.Response:
        transport = httpx.ASGITransport(page_app(FakeOverview(document)))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.request(method, path)

    return asyncio.run(get())


def hostile() -> dict[str, Any]:
    """Every text of the document is an attack."""

    def spoil(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: spoil(one) for key, one in value.items()}
        if isinstance(value, list):
            return [spoil(one) for one in value]
        return HOSTILE if isinstance(value, str) else value

    document = spoil(copy.deepcopy(DOCUMENT))
    document["runs"][0]["sites"] = {HOSTILE: HOSTILE}
    return dict(document)


def metrics(document: dict[str, Any]) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    text = ask("GET", "/metrics", document).text
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_the_page_shows_sites_runs_and_what_sites_said() -> None:
    text = Tags(ask("GET", "/").text).text
    for shown in (
        "https://veil.example:8443",
        "certificate until 2030-05-01",
        "Ulmconnected2030-04-01",
        "Bonnnot connected",
        "Kielrevoked",
        "heart-0a1b2ctraining3 of 31Bonn: refused (budget: the run would pass its budget), Ulm: replied",
        "lung-3d4e5ffailed0 of 31",
        "at least cohort.min_sites = 2",
    ):
        assert shown in text
    assert text.index("lung") < text.index("heart"), "the newest run comes first"


@pytest.mark.parametrize("code", RefusalCode)
def test_a_refusal_of_any_kind_is_shown_everywhere(code: RefusalCode) -> None:
    document = copy.deepcopy(DOCUMENT)
    document["runs"][0]["sites"] = {"Ulm": code.value}
    assert f"Ulm: refused ({code.value}: " in Tags(ask("GET", "/", document).text).text
    assert ask("GET", "/status.json", document).json()["runs"][0]["sites"] == {"Ulm": code.value}
    labels = (("run", "heart-0a1b2c"), ("said", code.value), ("site", "Ulm"))
    assert metrics(document)["veil_run_site_said", labels] == 1.0


def test_hostile_values_are_text_and_nothing_else() -> None:
    page = render(hostile())
    harmless = Tags(render(DOCUMENT))
    attacked = Tags(page)
    assert (attacked.tags, attacked.attributes) == (harmless.tags, harmless.attributes)
    assert HOSTILE not in page
    address_and_end, sites, runs, said = 2, 3 * 2, 2 * 3, 2
    assert page.count(html.escape(HOSTILE)) == address_and_end + sites + runs + said
    assert HOSTILE in attacked.text


def test_the_page_has_no_form_and_no_script() -> None:
    assert not Tags(render(DOCUMENT)).tags & {"form", "input", "button", "script", "a", "iframe", "link", "img"}


def test_the_document_is_given_as_it_is() -> None:
    response = ask("GET", "/status.json", hostile())
    assert response.json() == hostile()
    assert response.headers["content-type"] == "application/json"


def test_the_metrics() -> None:
    found = metrics(DOCUMENT)
    assert found["veil_site_connected", (("site", "Ulm"),)] == 1.0
    assert found["veil_site_connected", (("site", "Bonn"),)] == 0.0
    assert found["veil_run_rounds_done", (("phase", "training"), ("run", "heart-0a1b2c"))] == 3.0
    assert found["veil_certificate_days_left", ()] == 41.0
    assert len(found) == 3 + 2 + 2 + 1
    assert ask("GET", "/metrics").headers["content-type"].startswith("text/plain; version=0.0.4")


def test_hostile_names_stay_within_their_label() -> None:
    document = hostile()
    document["sites"] = document["sites"][:1]
    assert metrics(document)["veil_site_connected", (("site", HOSTILE),)] == 1.0


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
@pytest.mark.parametrize("path", ["/", "/status.json", "/metrics"])
def test_nothing_can_be_written(method: str, path: str) -> None:
    assert ask(method, path).status_code == 405


@pytest.mark.parametrize("path", ["/docs", "/redoc", "/openapi.json", "/stop", "/runs", "/v1/enrol"])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_there_is_nothing_else(method: str, path: str) -> None:
    assert ask(method, path).status_code == 404


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def test_the_page_is_served_until_the_block_ends() -> None:
    address = f"127.0.0.1:{free_port()}"
    with PageServer(address, page_app(FakeOverview(DOCUMENT))), httpx.Client(trust_env=False) as client:
        assert client.get(f"http://{address}/status.json").json() == DOCUMENT
    with httpx.Client(trust_env=False) as client, pytest.raises(httpx.ConnectError):
        client.get(f"http://{address}/")


def test_an_address_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with (
            pytest.raises(InputError, match=f"page_address = {address}"),
            PageServer(address, page_app(FakeOverview(DOCUMENT))),
        ):
            raise AssertionError("it was served")
