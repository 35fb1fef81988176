# SPDX-License-Identifier: Apache-2.0
"""The coordinator's page and its Prometheus metrics, on an address of the machine itself.

Promises to show and never to change: there is no form, no script and no endpoint that writes.
"""

from __future__ import annotations

import html
import threading
import time
from collections.abc import Iterable
from types import TracebackType
from typing import Any, Self

import uvicorn
from fastapi import FastAPI, Response
from fastapi.responses import HTMLResponse, PlainTextResponse
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from veil.common.errors import InputError
from veil.server.overview import Overview
from veil.server.said import in_words

_START_S, _END_S = 10.0, 1
_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1d2733}
h1{font-size:1.4rem}h2{font-size:1.1rem;margin-top:2rem}
table{border-collapse:collapse;width:100%}th,td{text-align:left;padding:.35rem .6rem;border-bottom:1px solid #d8dee6}
.yes{color:#0a6b3d}.no{color:#a4262c}small{color:#5b6673}
"""


class _Collected(Collector):
    """Numbers of the overview; none of them comes from a site's records."""

    def __init__(self, overview: Overview) -> None:
        self._overview = overview

    def collect(self) -> Iterable[Metric]:
        document = self._overview.document()
        connected = GaugeMetricFamily("veil_site_connected", "1 when the site's agent is connected", labels=["site"])
        for site in document["sites"]:
            connected.add_metric([site["name"]], float(site["connected"]))
        rounds = GaugeMetricFamily("veil_run_rounds_done", "rounds in the checkpoint", labels=["run", "phase"])
        said = GaugeMetricFamily("veil_run_site_said", "what a site last said in a run", labels=["run", "site", "said"])
        for run in document["runs"]:
            rounds.add_metric([run["name"], run["phase"]], run["rounds_done"])
            for site, word in run["sites"].items():
                said.add_metric([run["name"], site, word], 1.0)
        days = GaugeMetricFamily("veil_certificate_days_left", "days until the link's certificate ends")
        days.add_metric([], document["certificate"]["days_left"])
        return [connected, rounds, said, days]


def page_app(overview: Overview) -> FastAPI:
    """The page at /, its data at /status.json, the metrics at /metrics."""
    app = FastAPI(title="Veil coordinator", docs_url=None, redoc_url=None, openapi_url=None)
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collected(overview))

    @app.get("/", response_class=HTMLResponse)
    def page() -> str:
        return render(overview.document())

    @app.get("/status.json")
    def status() -> dict[str, Any]:
        return overview.document()

    @app.get("/metrics", response_class=PlainTextResponse)
    def metrics() -> Response:
        return Response(generate_latest(registry), media_type="text/plain; version=0.0.4")

    return app


def render(document: dict[str, Any]) -> str:
    """The page's HTML; every value is escaped."""
    sites = "".join(
        _row(
            site["name"],
            _mark(connected=site["connected"], revoked=site["revoked_at"]),
            html.escape(site["enrolled_at"]),
        )
        for site in document["sites"]
    )
    runs = "".join(
        _row(
            run["name"],
            html.escape(run["phase"]),
            html.escape(f"{run['rounds_done']} of {run['rounds']}"),
            ", ".join(html.escape(f"{site}: {in_words(word)}") for site, word in sorted(run["sites"].items())),
            html.escape(run["message"]),
        )
        for run in reversed(document["runs"])
    )
    until = html.escape(document["certificate"]["not_after"])
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta http-equiv="refresh" content="5">'
        f"<title>Veil coordinator</title><style>{_STYLE}</style><h1>Veil coordinator</h1>"
        f"<p>{html.escape(document['url'])} <small>certificate until {until}</small></p>"
        f"<h2>Sites</h2><table><tr><th>Site</th><th>Connection</th><th>Enrolled</th></tr>{sites}</table>"
        f"<h2>Runs</h2><table><tr><th>Run</th><th>Phase</th><th>Rounds</th><th>Sites said</th><th>Message</th></tr>"
        f"{runs}</table></html>"
    )


def _mark(*, connected: bool, revoked: str | None) -> str:
    word = "revoked" if revoked else "connected" if connected else "not connected"
    return f'<span class="{"yes" if connected else "no"}">{word}</span>'


def _row(first: str, *cells: str) -> str:
    return f"<tr><td>{html.escape(first)}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


class PageServer:
    """Serves the page from a thread of this process.

    Args:
        address: host:port.
        app: what is served.
    """

    def __init__(self, address: str, app: FastAPI) -> None:
        host, _, port = address.rpartition(":")
        config = uvicorn.Config(
            app,
            host=host.strip("[]"),
            port=int(port),
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="off",
            ws="none",
            timeout_graceful_shutdown=_END_S,
        )
        self._address, self._server = address, uvicorn.Server(config)
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        """Start to serve.

        Raises:
            InputError: when the address cannot be bound.
        """
        self._thread.start()
        end = time.monotonic() + _START_S
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > end:
                raise InputError(f"page_address = {self._address}", "an address that is free", "choose another")
            time.sleep(0.02)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop."""
        self._server.should_exit = True
        self._thread.join()

    def _run(self) -> None:
        try:
            self._server.run()
        except SystemExit:
            return
