# SPDX-License-Identifier: Apache-2.0
"""`veil coordinator …`: the words of the server side; every deed is elsewhere.

Promises that a word which only looks changes nothing, and that no secret is taken from or put on a command line.
"""

from __future__ import annotations

import contextlib
import json
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from veil.server.jobs import Job
    from veil.server.supervisor import Supervisor

app = typer.Typer(no_args_is_help=True, help="The server side: enrol sites, hold the backbone, run plans.")

HomeOption = Annotated[Path, typer.Option("--home", envvar="VEIL_COORDINATOR_HOME", help="The coordinator's folder.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
_HOME = Path("coordinator")
_FOLLOW_S = 0.3


@app.command()
def init(
    host: Annotated[
        list[str],
        typer.Option("--host", help="Name or address by which sites reach the link; the first is told to them."),
    ],
    home: HomeOption = _HOME,
    port: Annotated[int, typer.Option(min=1, max=65535, help="The link's port.")] = 8443,
    listen: Annotated[str, typer.Option(help="Address the link listens on.")] = "0.0.0.0",  # noqa: S104 - sites are elsewhere
    page_address: Annotated[str, typer.Option(help="host:port of page and metrics.")] = "127.0.0.1:8480",
    health_address: Annotated[str, typer.Option(help="host:port of the gRPC health service.")] = "127.0.0.1:8481",
    certificate: Annotated[
        Path | None, typer.Option(help="A certificate chain of your own, PEM; without it, one is made.")
    ] = None,
    key: Annotated[Path | None, typer.Option(help="Its private key, PEM.")] = None,
    ca: Annotated[Path | None, typer.Option(help="The certificate that sites are to trust, PEM.")] = None,
) -> None:
    """Make a coordinator's folder. It holds settings, certificate authority and the link's certificate."""
    from veil.common.errors import InputError
    from veil.server.home import Home, Settings
    from veil.server.pki import issue_certificate, make_authority
    from veil.server.tls_certificate import check_brought

    settings = Settings(
        hosts=tuple(host), listen=listen, port=port, page_address=page_address, health_address=health_address
    )
    brought = [one for one in (certificate, key, ca) if one is not None]
    if len(brought) not in (0, 3):
        raise InputError(
            "some of --certificate, --key, --ca", "all three for certificates of your own, or none", "give all three"
        )
    if certificate is not None and key is not None and ca is not None:
        check_brought(certificate, key, host)
        named = {"certificate": certificate, "key": key, "ca": ca}
        settings = settings.model_copy(update={name: str(path.resolve()) for name, path in named.items()})
    else:
        Home.refuse_existing(home)
        if not (home / "pki" / "ca.pem").exists():  # an init that was cut off left one
            make_authority(home / "pki", f"Veil coordinator {host[0]}"[:64])
        issue_certificate(home / "pki", host)
    made = Home.create(home, settings)
    typer.echo(f"made {made.folder}; sites will reach it at {made.url}")
    typer.echo(f"next: veil coordinator start --home {home}")


@app.command()
def start(home: HomeOption = _HOME) -> None:
    """Serve sites and run what is submitted, until interrupted."""
    from veil.common.logs import log_json_lines
    from veil.server.home import Home
    from veil.server.supervisor import Supervisor

    supervisor, stop = Supervisor(home=Home.open(home)), threading.Event()
    _stop_on_signals(stop)
    log_json_lines()
    with contextlib.ExitStack() as stack:
        stack.enter_context(supervisor.exclusive())
        stack.callback(supervisor.end)
        supervisor.begin()
        _show_itself(supervisor, stack)
        supervisor.run(stop)


@app.command()
def invite(
    site: Annotated[str, typer.Argument(help="The new site's name.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The invitation file to write; hand it over in confidence.")
    ],
    home: HomeOption = _HOME,
    days: Annotated[int, typer.Option(min=1, max=90, help="How long it may be used.")] = 7,
) -> None:
    """Write an invitation with a one-time secret for one site."""
    from contextlib import closing

    from veil.common.errors import InputError
    from veil.server.home import Home
    from veil.server.link import open_link_state
    from veil.server.roster import Roster

    opened = Home.open(home)
    if output.exists() or not output.parent.is_dir():
        raise InputError(f"{output}", "a new file in a folder that is there", "choose another name or remove it")
    ca = opened.path(opened.settings.ca).read_text(encoding="ascii")
    with closing(Roster(opened.roster, open_link_state(opened.database).state())) as roster:
        roster.invite(site, opened.url, ca, days).write(output)
    typer.echo(f"wrote {output}: whoever holds it becomes {site}, once, within {days} days")


@app.command()
def revoke(site: Annotated[str, typer.Argument(help="The site's name.")], home: HomeOption = _HOME) -> None:
    """Turn a site out at once; its key is never admitted again."""
    from contextlib import closing

    from veil.server.home import Home
    from veil.server.link import open_link_state
    from veil.server.roster import Roster

    opened = Home.open(home)
    with closing(Roster(opened.roster, open_link_state(opened.database).state())) as roster:
        roster.revoke(site)
    typer.echo(f"revoked {site}")


@app.command()
def certify(home: HomeOption = _HOME) -> None:
    """Issue the link's certificate anew. A running coordinator takes it up by itself."""
    from veil.server.home import Home
    from veil.server.pki import issue_certificate
    from veil.server.tls_certificate import describe

    opened = Home.open(home)
    chain, _ = issue_certificate(opened.folder / "pki", opened.settings.hosts)
    typer.echo(f"the link's certificate lasts until {describe(chain.read_bytes()).not_after:%Y-%m-%d}")


@app.command()
def run(
    plan: Annotated[Path, typer.Argument(help="Plan file.")],
    home: HomeOption = _HOME,
    site: Annotated[
        list[str] | None, typer.Option("--site", help="A site to ask; several; without any, all that are enrolled.")
    ] = None,
    detach: Annotated[bool, typer.Option(help="Do not wait for the end.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Submit a plan to the running coordinator and follow it."""
    from veil.common.plan import parse_plan
    from veil.server.home import Home
    from veil.server.submission import submit

    opened = Home.open(home)
    job = submit(opened, parse_plan(plan), base=plan.resolve().parent, sites=tuple(site or ()))
    if detach:
        typer.echo(json.dumps({"run": job.name}) if as_json else job.name)
        return
    if not as_json:
        typer.echo(f"run {job.name}")
    _follow(job, as_json=as_json)


@app.command()
def status(home: HomeOption = _HOME, as_json: JsonOption = False) -> None:
    """Show sites and runs, and which site said what."""
    from veil.server.home import Home
    from veil.server.overview import Overview

    document = Overview(Home.open(home)).document()
    if as_json:
        typer.echo(json.dumps(document, indent=2))
        return
    typer.echo(f"{document['url']}  certificate until {document['certificate']['not_after']}")
    for one in document["sites"]:
        word = "revoked" if one["revoked_at"] else "connected" if one["connected"] else "not connected"
        typer.echo(f"site {one['name']}  {word}")
    for one in document["runs"]:
        said = _said(one["sites"])
        typer.echo(f"run {one['name']}  {one['phase']}  {one['rounds_done']}/{one['rounds']}  {said}")
        if one["message"]:
            typer.echo(f"  {one['message']}")


@app.command()
def stop(
    run_name: Annotated[str, typer.Argument(metavar="RUN", help="The run's name, or its beginning.")],
    home: HomeOption = _HOME,
) -> None:
    """End a run at once; its checkpoint stays."""
    from veil.server.home import Home
    from veil.server.jobs import Job

    job = Job.find(Home.open(home).runs, run_name)
    job.stop()
    typer.echo(f"{job.name} will stop")


@app.command()
def resume(
    run_name: Annotated[str, typer.Argument(metavar="RUN", help="The run's name, or its beginning.")],
    home: HomeOption = _HOME,
    as_json: JsonOption = False,
) -> None:
    """Let a run that failed or was stopped go on from its checkpoint."""
    from veil.server.home import Home
    from veil.server.jobs import Job

    job = Job.find(Home.open(home).runs, run_name)
    job.resume()
    _follow(job, as_json=as_json)


def _show_itself(supervisor: Supervisor, stack: contextlib.ExitStack) -> None:
    """Page, metrics and health; loaded while the link loads."""
    from veil.common.health import HealthServer
    from veil.server.overview import Overview
    from veil.server.page import PageServer, page_app

    home = supervisor.home
    if home.settings.page_address:
        stack.enter_context(PageServer(home.settings.page_address, page_app(Overview(home))))
    if home.settings.health_address:
        checks = {"veil.coordinator.link": supervisor.link_works, "veil.coordinator.runs": supervisor.runs_work}
        stack.enter_context(HealthServer(home.settings.health_address, checks))


def _said(sites: Mapping[str, str]) -> str:
    from veil.server.said import in_words

    return ", ".join(f"{site}: {in_words(word)}" for site, word in sorted(sites.items()))


def _follow(job: Job, *, as_json: bool) -> None:
    """Lines as the run goes on; its report at the end, or its error."""
    from veil.common.errors import RunError
    from veil.server.jobs import Phase

    shown = ""
    while not (now := job.status).phase.over:
        line = f"{now.phase}  {now.rounds_done}/{now.rounds}  {_said(now.sites)}"
        if line != shown and not as_json:
            typer.echo(line)
            shown = line
        time.sleep(_FOLLOW_S)
    if now.phase is not Phase.FINISHED:
        raise RunError(
            f"run {job.name} {now.phase}: {now.message}", "a run to its end", f"veil coordinator resume {job.name}"
        )
    if as_json:
        typer.echo((job.folder / "result" / "report.json").read_text(encoding="utf-8"))
    else:
        typer.echo(f"finished: {job.folder / 'result'}")


def _stop_on_signals(stop: threading.Event) -> None:
    def wanted(number: int, frame: FrameType | None) -> None:
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, wanted)
