# SPDX-License-Identifier: Apache-2.0
"""The `veil` command: every command line word is here, every deed elsewhere.

Promises exit codes 0 done, 2 bad usage or input, 3 refused, 4 failed, 130 interrupted; messages on stderr; and that
`--help` imports no library but typer.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from pathlib import Path
from types import FrameType
from typing import Annotated

import click
import typer
import typer.core

from veil.client.cli import app as site
from veil.common.errors import InputError, VeilError
from veil.server.cli import app as coordinator
from veil.simulations.certificate_cli import app as certificate
from veil.simulations.engines import Engine

INTERRUPTED = 130

typer.core.HAS_RICH = False  # help in plain text: loading rich takes longer than all else of `veil --help`

app = typer.Typer(
    name="veil",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Fine-tune one pretrained model together, without sharing records.",
)


JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]

app.add_typer(coordinator, name="coordinator")
app.add_typer(site, name="site")
app.add_typer(certificate, name="certificate")


@app.callback()
def _root() -> None:
    """Quiet, offline defaults for the libraries, before any of them is imported."""
    for name, value in {
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "RAY_USAGE_STATS_ENABLED": "0",
    }.items():
        os.environ.setdefault(name, value)


@app.command()
def simulate(
    plan: Annotated[Path | None, typer.Argument(help="Plan file; without one, the embedded demo.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; must not exist.")] = Path(
        "runs/demo"
    ),
    data: Annotated[
        Path | None, typer.Option(help="Folder that the plan's relative paths start from; its own by default.")
    ] = None,
    engine: Annotated[
        Engine, typer.Option(help="inprocess, processes (one per core), or ray (Flower's own).")
    ] = Engine.INPROCESS,
    seed: Annotated[int | None, typer.Option(min=0, help="Another seed than the plan's, for another split.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Run a whole federation on this machine."""
    from veil.common.plan import parse_plan
    from veil.simulations import demo
    from veil.simulations.report import build_report
    from veil.simulations.screen import Screen, show_result
    from veil.simulations.simulate import simulate as run

    chosen = parse_plan(plan) if plan is not None else demo.demo_plan()
    if seed is not None:
        chosen = chosen.model_copy(update={"seed": seed})
    base = data or (plan.resolve().parent if plan is not None else Path.cwd())
    with Screen(quiet=as_json) as screen:
        result = run(chosen, base=base, output=output, progress=screen, engine=engine)
    if as_json:
        typer.echo(json.dumps(build_report(result), indent=2))
    else:
        show_result(result, output)


@app.command()
def rehearse(
    plan: Annotated[Path | None, typer.Argument(help="Plan file; without one, the demo's records at 3 sites.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; must not exist.")] = Path(
        "runs/federation"
    ),
    data: Annotated[
        Path | None, typer.Option(help="Folder that the plan's relative paths start from; its own by default.")
    ] = None,
    repeatable: Annotated[
        bool,
        typer.Option(help="Noise from the seed, NOT private, and a comparison with the simulation; or real noise."),
    ] = True,
    as_json: JsonOption = False,
) -> None:
    """Run coordinator and agents as processes here, over TLS."""
    from dataclasses import asdict

    from veil.common.plan import parse_plan
    from veil.simulations import demo
    from veil.simulations.rehearsal import rehearse as run
    from veil.simulations.screen import Screen

    chosen = parse_plan(plan) if plan is not None else demo.dealt_demo_plan(sites=3)
    base = data or (plan.resolve().parent if plan is not None else Path.cwd())
    with Screen(quiet=as_json) as screen:
        shown = run(chosen, base=base, output=output, progress=screen, repeatable=repeatable)
    if as_json:
        typer.echo(json.dumps(asdict(shown), indent=2))
        return
    typer.echo(
        f"{len(shown.sites)} agents and a coordinator: {shown.rounds} rounds, {shown.round_s:.2f} s each (median)"
    )
    typer.echo(f"accuracy on held-out records {shown.accuracy:.3f}")
    if shown.same_adapter is not None:
        same = "the same adapter as" if shown.same_adapter else "NOT the adapter of"
        typer.echo(f"{same} the simulation (largest difference {shown.largest_difference:g})")
        typer.echo("noise was repeatable: nothing in this folder is private")
    typer.echo(f"wrote {output}")


@app.command()
def predict(
    model: Annotated[Path, typer.Argument(help="The folder `model` of a finished run.")],
    source: Annotated[
        str,
        typer.Argument(metavar="INPUT", help="A text, an image, a .txt (a text a line), or a .csv/.parquet table."),
    ],
    column: Annotated[
        list[str] | None,
        typer.Option("--column", help="Table: the input column; several for numeric features."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Ask a tuned model."""
    from veil.server.model import TunedModel
    from veil.simulations.inputs import read_inputs

    tuned = TunedModel.load(model)
    inputs = read_inputs(source, tuned.plan.task, column or [])
    answers = tuned.predict(inputs)
    rows = [
        {
            "label": tuned.labels[int(row.argmax())],
            "probabilities": dict(zip(tuned.labels, row.tolist(), strict=True)),
        }
        for row in answers
    ]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    for row, answer in zip(rows, answers, strict=True):
        typer.echo(f"{row['label']}\t{answer.max():.4f}")


@app.command()
def audit(
    plan: Annotated[Path | None, typer.Argument(help="Plan file; without one, a plan at ε = 8.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File to write the JSON document to.")] = None,
    repeats: Annotated[
        int, typer.Option(min=1, max=1000, help="Plays of the canary audit; more make the bounds tighter.")
    ] = 8,
    as_json: JsonOption = False,
) -> None:
    """Attack what a plan would release, on made-up records. Exit code 4 when that contradicts the claimed ε."""
    from veil.common.plan import parse_plan
    from veil.simulations import audit_command
    from veil.simulations.screen import Screen

    chosen = parse_plan(plan) if plan is not None else audit_command.default_plan()
    with Screen(quiet=as_json) as screen:
        audited, membership = audit_command.run_attacks(chosen, repeats=repeats, stage=screen.stage)
    document = json.dumps(audit_command.document(audited, membership), indent=2)
    if output is not None:
        audit_command.write(output, document)
    typer.echo(document if as_json else "\n".join(audit_command.lines(audited, membership)))
    audit_command.check(audited)


@app.command()
def backbone(
    source: Annotated[str, typer.Argument(help="package:NAME[/FOLDER], path:FOLDER or hub:ORG/NAME@REVISION")],
) -> None:
    """Print the lines of a plan that pin some weights."""
    from veil.common.weights import fingerprint

    pinned = fingerprint(source, base=Path.cwd())
    typer.echo(
        f'[backbone]\nsource = "{source}"\nsha256 = "{pinned.sha256}"\n'
        f'files_sha256 = "{pinned.files_sha256}"\nlicence = ""  # its SPDX name'
    )


@app.command()
def health(
    address: Annotated[str, typer.Argument(help="host:port of a coordinator's or an agent's health service.")],
    service: Annotated[str, typer.Option(help="One check; without it, all of them together.")] = "",
) -> None:
    """Say whether a process works, as container engines ask. Exit code 4 when it does not."""
    from veil.common.errors import RunError
    from veil.common.health import serving

    if not serving(address, service):
        raise RunError(f"{address} is not serving", "a process that does its work", "read its log")
    typer.echo("serving")


@app.command()
def version() -> None:
    """Print the version."""
    from importlib.metadata import version as installed

    typer.echo(f"veil {installed('veil')}")


def _terminate(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """Run the command line and leave with its exit code."""
    signal.signal(signal.SIGTERM, _terminate)
    sys.exit(run_command(sys.argv[1:]))


def run_command(words: list[str]) -> int:
    """Run one command line.

    Args:
        words: what stands behind `veil`.

    Returns:
        the exit code; messages went to stderr.
    """
    try:
        code = int(app(words, standalone_mode=False) or 0)
    except VeilError as error:
        typer.echo(f"veil: {error}", err=True)
        return error.exit_code
    except click.ClickException as error:
        error.show()
        return InputError.exit_code
    except (KeyboardInterrupt, click.Abort):
        code = INTERRUPTED
    except Exception:
        traceback.print_exc()
        typer.echo("veil: this is a defect of Veil; please report the lines above", err=True)
        return VeilError.exit_code
    if code == INTERRUPTED:
        typer.echo("veil: interrupted", err=True)
    return code
