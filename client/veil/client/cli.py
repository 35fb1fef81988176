# SPDX-License-Identifier: Apache-2.0
"""`veil site …`: the words of the site's operator; every deed is elsewhere.

Promises that a word which only looks changes nothing, and that no secret is taken from or put on a command line.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from veil.client.approvals import Asked
    from veil.client.ledger import Entry
    from veil.client.site_file import SiteFile

app = typer.Typer(no_args_is_help=True, help="The site's side: set limits, serve rounds, see the cost.")
ledger = typer.Typer(no_args_is_help=True, help="What was done to this site's records, line by line.")
app.add_typer(ledger, name="ledger")

HomeOption = Annotated[Path, typer.Option("--home", envvar="VEIL_SITE_HOME", help="The site's folder.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="The run's name, or its beginning.")]
_HOME = Path("site")


@app.command()
def init(
    invitation: Annotated[Path, typer.Argument(help="The file that the coordinator's operator gave.")],
    home: HomeOption = _HOME,
    table: Annotated[str | None, typer.Option(help="CSV, TSV or Parquet file, or a SQLAlchemy URL.")] = None,
    query: Annotated[str | None, typer.Option(help="Database: the SELECT statement.")] = None,
    password_file: Annotated[Path | None, typer.Option(help="Database: file with the password.")] = None,
    label: Annotated[str | None, typer.Option(help="Column with the label.")] = None,
    label_map: Annotated[
        list[str] | None, typer.Option("--map", metavar="RAW=LABEL", help="A raw label and the plan's; several.")
    ] = None,
    text: Annotated[str | None, typer.Option(help="Column with the text.")] = None,
    image: Annotated[str | None, typer.Option(help="Column with image paths.")] = None,
    audio: Annotated[str | None, typer.Option(help="Column with paths of sound files.")] = None,
    feature: Annotated[list[str] | None, typer.Option(help="A numeric column; several.")] = None,
    patient: Annotated[str | None, typer.Option(help="Column with the patient id.")] = None,
    epsilon_per_run: Annotated[float | None, typer.Option(help="Most ε of one run.")] = None,
    epsilon_lifetime: Annotated[float | None, typer.Option(help="Most ε of everything, for ever.")] = None,
    delta: Annotated[float | None, typer.Option(help="δ of the ledger.")] = None,
    unit: Annotated[str | None, typer.Option(help="record or patient.")] = None,
    approval: Annotated[str | None, typer.Option(help="ask or auto-within-limits.")] = None,
    release_counts: Annotated[bool, typer.Option(help="Tell coordinators the number of units.")] = False,
    accept_backbone: Annotated[bool, typer.Option(help="Take pinned weights from the coordinator.")] = True,
    mirror: Annotated[Path | None, typer.Option(help="Folder of weights of your own.")] = None,
    health_address: Annotated[str | None, typer.Option(help='host:port of gRPC health; "" for none.')] = None,
    metrics_address: Annotated[str | None, typer.Option(help='host:port of metrics; "" for none.')] = None,
) -> None:
    """Make the site's folder with its key, and enrol. Asks for what no option says and writes it into site.toml."""
    from veil.client.joining import join
    from veil.client.questions import answered, as_map, as_table
    from veil.client.site_file import SITE_FILE
    from veil.common.invitation import Invitation

    given: dict[str, dict[str, Any]] = {
        "data": {
            "table": as_table(table),
            "query": query,
            "password_file": password_file and str(password_file.absolute()),
            "label": label,
            "labels": as_map(label_map or []),
            "text": text,
            "image": image,
            "audio": audio,
            "features": feature or None,
            "patient": patient,
        },
        "limits": {
            "epsilon_per_run": epsilon_per_run,
            "epsilon_lifetime": epsilon_lifetime,
            "delta": delta,
            "unit": unit,
            "approval": approval,
            "release_counts": release_counts,
            "accept_backbone": accept_backbone,
        },
        "agent": {
            "mirror": mirror and str(mirror.absolute()),
            "health_address": health_address,
            "metrics_address": metrics_address,
        },
    }
    file = join(Invitation.read(invitation), home, lambda: answered(given))
    typer.echo(f"{file.name} is enrolled at {file.coordinator.url}; its settings are in {home / SITE_FILE}")
    typer.echo(f"next: veil site doctor --home {home}, then veil site start --home {home}")


@app.command()
def doctor(
    home: HomeOption = _HOME,
    plan: Annotated[Path | None, typer.Option(help="A plan: its weights are looked for, its ε price is told.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Look at all that a run would need, and what it would cost."""
    from dataclasses import asdict

    from veil.client.doctor import examine_site
    from veil.common.errors import RunError
    from veil.common.plan import parse_plan

    findings = []
    for finding in examine_site(_read(home), None if plan is None else parse_plan(plan)):
        findings.append(finding)
        if not as_json:
            first, *others = finding.lines
            typer.echo(f"{'ok ' if finding.fine else 'BAD'}  {finding.name}: {first}")
            for line in others:
                typer.echo(f"       {line}")
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
    bad = [finding.name for finding in findings if not finding.fine]
    if bad:
        raise RunError(f"not in order: {', '.join(bad)}", "all in order", "do as the lines above say")


@app.command()
def start(home: HomeOption = _HOME) -> None:
    """Serve rounds until interrupted."""
    from veil.client.service import serve_site
    from veil.client.site_file import SITE_FILE
    from veil.common.logs import log_json_lines

    file, stop = _read(home), threading.Event()
    _stop_on_signals(stop)
    log_json_lines()
    serve_site(home / SITE_FILE, file, stop)


@app.command()
def approve(
    run_name: Annotated[
        str | None, typer.Argument(metavar="RUN", help="The run's name, or its beginning; without it, what waits.")
    ] = None,
    home: HomeOption = _HOME,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Show a run in plain words, and let it use this site."""
    from veil.client.approvals import Approvals, Decision

    file = _read(home)
    approvals = Approvals(file.agent.runs)
    if run_name is None:
        asks = file.limits.approval == "ask"
        waiting = [asked for asked in approvals.runs() if asks and asked.decision is Decision.PENDING]
        for asked in waiting:
            typer.echo(f"{asked.job}  asked {asked.first_seen}")
        typer.echo(f"{len(waiting)} waiting; veil site approve RUN --home {home} shows one and asks")
        return
    asked = _find(approvals.runs(), run_name)
    _show(asked, file)
    if not yes and not typer.confirm("Let this run use this site?"):
        typer.echo(f"{asked.job} goes on waiting; veil site refuse {asked.job} --home {home} answers it with no")
        return
    approvals.decide(asked.job, approve=True, plan_sha256=asked.plan_sha256)
    typer.echo(f"approved {asked.job}")


@app.command()
def refuse(run_name: RunArgument, home: HomeOption = _HOME) -> None:
    """Refuse a run, also one that is under way."""
    from veil.client.approvals import Approvals
    from veil.client.ledger import total

    file = _read(home)
    approvals = Approvals(file.agent.runs)
    asked = _find(approvals.runs(), run_name)
    approvals.decide(asked.job, approve=False, plan_sha256=asked.plan_sha256)
    cost = total(_entries(file), file.limits.delta, asked.job).epsilon
    spent = f"; ε {cost:.4g} was spent on it before, and stays spent" if cost else ""
    typer.echo(f"refused {asked.job}{spent}")


@app.command()
def status(home: HomeOption = _HOME, as_json: JsonOption = False) -> None:
    """Show how the site stands. Whether the agent works, what waits, what was refused and why, what everything cost."""
    from veil.client.standing import standing

    found = standing(_read(home))
    if as_json:
        typer.echo(json.dumps(found.document(), indent=2))
        return
    for line in found.lines():
        typer.echo(line)


@app.command()
def peers(home: HomeOption = _HOME, as_json: JsonOption = False) -> None:
    """Print this site's fingerprint, which the others pin, and those of the sites that it may share noise with."""
    from veil.common.keys import NodeKey
    from veil.common.statement import key_fingerprint

    file = _read(home)
    own = key_fingerprint(NodeKey.load(file.agent.key).public_pem)
    if as_json:
        typer.echo(json.dumps({"site": file.name, "fingerprint": own, "peers": file.peers}, indent=2))
        return
    typer.echo(f'to be pinned by the others, under [peers] in their site.toml:\n"{file.name}" = "{own}"')
    for name, pinned in file.peers.items():
        typer.echo(f"pinned here: {name}  {pinned}")
    if not file.peers:
        typer.echo("none pinned here: this site takes no part in runs with distributed noise")


@app.command()
def compare(
    run_name: RunArgument,
    model: Annotated[Path, typer.Option(help="The run's final model: the folder `model` of its result, or its head.")],
    home: HomeOption = _HOME,
    keep: Annotated[bool, typer.Option("--keep", help="Store the chosen head in the site's state folder.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Compare a run's model with one of the site alone, on its own records. Nothing of it leaves the site."""
    from veil.client.approvals import Approvals
    from veil.client.kept_head import compare_heads, keep_head

    file = _read(home)
    compared = compare_heads(file, _find(Approvals(file.agent.runs).runs(), run_name), model)
    kept = keep_head(file, compared) if keep else None
    if as_json:
        typer.echo(json.dumps({**compared.document(), "file": kept and str(kept)}, indent=2))
        return
    for line in compared.lines():
        typer.echo(line)
    if kept is not None:
        typer.echo(f"wrote {kept}")


@ledger.command("show")
def show_ledger(home: HomeOption = _HOME, as_json: JsonOption = False) -> None:
    """Print what was done, and what ε stood at after each line."""
    from veil.client.ledger import total, total_alone

    file = _read(home)
    entries, delta = _entries(file), file.limits.delta
    rows = [
        {
            "run": one.job,
            "round": one.round,
            **one.mechanism.to_record(),
            "noise": one.noise,
            "plan": one.plan,
            "sharing_sites": one.shares and one.shares.sites,
        }
        for one in entries
    ]
    if as_json:
        document = {
            "entries": rows,
            "epsilon": total(entries, delta).finite_epsilon,
            "epsilon_alone": total_alone(entries, delta).finite_epsilon,
            "delta": delta,
        }
        typer.echo(json.dumps(document, indent=2))
        return
    for number, (row, one) in enumerate(zip(rows, entries, strict=True), start=1):
        after = total(entries[:number], delta).epsilon
        typer.echo(f"{row['run']}  round {row['round']}  σ {one.mechanism.noise_multiplier:.4g}  ε so far {after:.4g}")
    typer.echo(f"{len(rows)} lines; ε {total(entries, delta).epsilon:.4g} at δ = {delta:g}")
    if any(one.shares for one in entries):
        typer.echo(f"if all masks were taken off: ε {total_alone(entries, delta).epsilon:.4g}")


@ledger.command("verify")
def verify_ledger(home: HomeOption = _HOME, as_json: JsonOption = False) -> None:
    """Check every line, signature and answer. None may be missing."""
    from veil.client.verification import verify
    from veil.common.errors import RunError
    from veil.common.keys import NodeKey

    file = _read(home)
    if not file.agent.ledger.exists() and not file.agent.anchor.exists():
        none = json.dumps({"lines": 0, "head": None, "findings": []}, indent=2)
        typer.echo(none if as_json else "0 lines; the ledger is made with the agent's first start")
        return
    key = NodeKey.load(file.agent.key)
    found = verify(file.agent.ledger, file.name, key.public_pem, anchor=file.agent.anchor)
    if as_json:
        document = {"lines": found.lines, "head": found.head, "findings": [str(one) for one in found.findings]}
        typer.echo(json.dumps(document, indent=2))
    else:
        for finding in found.findings:
            typer.echo(str(finding))
        order = "" if found.findings else "; chain, signatures, answers and anchor in order"
        typer.echo(f"{found.lines} lines, head {found.head}{order}")
    if found.findings:
        raise RunError(f"{len(found.findings)} findings", "an untouched ledger", "restore the newest copy")


@ledger.command("write-off")
def write_off(
    epsilon: Annotated[float, typer.Option(help="The most that the lost lines can have cost.")],
    reason: Annotated[str, typer.Option(help="What happened, for whoever reads the ledger.")],
    home: HomeOption = _HOME,
    covers: Annotated[
        list[str] | None, typer.Option(metavar="HASH", help="A lost line that the coordinator remembers; several.")
    ] = None,
) -> None:
    """Go on after lines were lost for good. What they may have cost is counted; the agent must not run."""
    from contextlib import closing

    from veil.client.ledger import Ledger
    from veil.common.keys import NodeKey

    file = _read(home)
    key, path = NodeKey.load(file.agent.key), file.agent.ledger
    with closing(Ledger(path, file.name, key, anchor=file.agent.anchor, recovering=True)) as book:
        book.write_off(epsilon, file.limits.delta, reason, unit=file.limits.unit, covers=covers or [])
    typer.echo(f"ε {epsilon:g} was written off; veil site ledger show tells what is left")


@app.command("export-log")
def export_log(
    output: Annotated[Path, typer.Argument(help="JSON file to write; must not exist.")], home: HomeOption = _HOME
) -> None:
    """Write every ledger line and decision into one file. It is for a data-protection officer."""
    from veil.client.audit_log import build_log
    from veil.common.durable import PUBLIC, write_new
    from veil.common.errors import InputError

    document = build_log(_read(home))
    try:
        write_new(output, (json.dumps(document, indent=2) + "\n").encode(), PUBLIC)
    except FileExistsError:
        raise InputError(f"{output} exists", "a new file", "choose another name") from None
    typer.echo(f"wrote {output}: {len(document['ledger']['lines'])} lines, {len(document['decisions'])} decisions")


def _read(home: Path) -> SiteFile:
    from veil.client.site_file import SITE_FILE, read_site_file
    from veil.common.errors import InputError

    if not (home / SITE_FILE).is_file():
        raise InputError(f"{home} has no {SITE_FILE}", "a site's folder", "veil site init makes one; --home names it")
    return read_site_file(home / SITE_FILE)


def _entries(file: SiteFile) -> tuple[Entry, ...]:
    from veil.client.ledger import entries_of

    path = file.agent.ledger
    return entries_of(path, file.name) if path.exists() else ()


def _find(runs: tuple[Asked, ...], name: str) -> Asked:
    from veil.common.errors import InputError

    found = [one for one in runs if one.job == name] or [one for one in runs if one.job.startswith(name)]
    if len(found) != 1:
        known = ", ".join(one.job for one in runs) or "none"
        raise InputError(f"{len(found)} runs named {name!r}", f"one of: {known}", "veil site approve lists what waits")
    return found[0]


def _show(asked: Asked, file: SiteFile) -> None:
    from veil.client.wording import describe_plan

    for line in describe_plan(asked.plan, asked.job, file, _entries(file)):
        typer.echo(line)


def _stop_on_signals(stop: threading.Event) -> None:
    """The first signal ends the agent after the message it is at; a second one at once."""

    def wanted(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            os._exit(130)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, wanted)
