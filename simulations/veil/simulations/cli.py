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
from veil.server.export_target import Target
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
    told = ("accuracy", shown.accuracy) if shown.accuracy is not None else ("variance explained", shown.r2)
    typer.echo(f"{told[0]} on held-out records {told[1]:.3f}")
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
        typer.Argument(
            metavar="INPUT",
            help="A text, an image, a sound (.wav), a folder of images or sounds, a .txt (a text a line), or a .csv or "
            ".parquet table.",
        ),
    ],
    column: Annotated[
        list[str] | None,
        typer.Option("--column", help="Table: the input column; several for numeric features."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="CSV file to write besides; must not exist.")
    ] = None,
    anomaly: Annotated[
        bool,
        typer.Option(
            "--anomaly",
            help="Also how unlike the training records each is: 1 as one of them on average (one-shot only).",
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Ask a tuned model."""
    from veil.common.plan_sections import STRUCTURED
    from veil.server.model import TunedModel
    from veil.simulations import answers
    from veil.simulations.inputs import read_inputs

    if output is not None:
        answers.check_new(output)
    tuned = TunedModel.load(model)
    task = tuned.plan.task
    usual = tuned.distribution() if anomaly else None
    inputs = read_inputs(source, task, column or [])
    if inputs.passed_over:
        typer.echo(f"{source}: passed over {inputs.passed_over} files not known as {task.modality}", err=True)
    if isinstance(inputs.records, tuple) and task.form in STRUCTURED:
        told = answers.structured(inputs.names, tuned.say(inputs.records))
    elif usual is not None:
        features = tuned.features(inputs.records)
        told = answers.document(task, inputs.names, tuned.predict(features))
        told = answers.with_anomaly(told, usual.scores(features))
    else:
        told = answers.document(task, inputs.names, tuned.predict(inputs.records))
    if output is not None:
        answers.write_csv(output, told)
    typer.echo(json.dumps(told, indent=2) if as_json else "\n".join(answers.lines(told)))


@app.command()
def explain(
    model: Annotated[Path, typer.Argument(help="The folder `model` of a finished run.")],
    source: Annotated[
        str,
        typer.Argument(
            metavar="INPUT", help="A text, an image, a folder of images, a .txt (a text a line), or a table."
        ),
    ],
    column: Annotated[
        list[str] | None,
        typer.Option("--column", help="Table: the input column; several for numeric features."),
    ] = None,
    label: Annotated[str | None, typer.Option(help="The answer to explain; the model's own by default.")] = None,
    most: Annotated[int, typer.Option(min=1, help="How many records to explain, from the first.")] = 10,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder to write, with images coloured; must not exist. Else nothing is."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what each word, place or column adds to an answer. Nothing leaves this machine."""
    from rich.console import Console

    from veil.server.model import TunedModel
    from veil.simulations import explain_screen
    from veil.simulations.explain import explain_inputs
    from veil.simulations.folders import fresh_folder
    from veil.simulations.inputs import read_inputs

    tuned = TunedModel.load(model)
    inputs = read_inputs(source, tuned.plan.task, column or [])
    names, told = inputs.names[:most], explain_inputs(tuned, inputs.records[:most], tuple(column or ()), label)
    if output is not None:
        with fresh_folder(output) as folder:
            explain_screen.write(folder, names, told, inputs.records[:most])
    if as_json:
        typer.echo(json.dumps(explain_screen.document(names, told), indent=2))
        return
    for name, one in zip(names, told, strict=True):
        explain_screen.show(name, one, Console())
    if len(names) < len(inputs.names):
        typer.echo(f"explained the first {len(names)} of {len(inputs.names)}; --most explains more", err=True)


@app.command()
def retention(
    model: Annotated[Path, typer.Argument(help="The folder `model` of a finished run.")],
    table: Annotated[Path, typer.Argument(help="Public records: a .csv, .tsv or .parquet table.")],
    text: Annotated[str | None, typer.Option(metavar="COLUMN", help="The column with the texts.")] = None,
    image: Annotated[str | None, typer.Option(metavar="COLUMN", help="The column with paths of images.")] = None,
    audio: Annotated[str | None, typer.Option(metavar="COLUMN", help="The column with paths of sounds.")] = None,
    limit: Annotated[int, typer.Option(min=3, max=10_000, help="How many records to draw, at most.")] = 200,
    as_json: JsonOption = False,
) -> None:
    """Say how much of what the pretrained model knew is left after tuning, by public records."""
    from veil.server.model import TunedModel
    from veil.simulations import retention_command
    from veil.simulations.screen import Screen

    tuned, columns = TunedModel.load(model), {"text": text, "image": image, "audio": audio}
    with Screen(quiet=as_json) as screen:
        left = retention_command.measure(tuned, table, columns, limit=limit, stage=screen.stage)
    document = json.dumps(retention_command.document(left), indent=2)
    typer.echo(document if as_json else "\n".join(retention_command.lines(left)))


@app.command()
def export(
    model: Annotated[Path, typer.Argument(help="The folder `model` of a finished run.")],
    to: Annotated[
        Target,
        typer.Option(
            help="hf (a Hugging Face folder), safetensors (the tuned part alone) or onnx (the head; with numeric "
            "columns the whole model)."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; must not exist.")],
    column: Annotated[
        list[str] | None,
        typer.Option(
            "--column", help="Numeric features: each column, in the order of training; as report.json says by default."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write a tuned model for other programs, with a model card and the lines of Python that use it."""
    from veil.server.export import export as run
    from veil.server.export import missing_part
    from veil.server.model import TunedModel
    from veil.simulations.folders import fresh_folder

    with fresh_folder(output) as folder:
        files = run(model, to, folder, columns=column or ())
    missing = missing_part(TunedModel.load(model).plan, to)
    if as_json:
        document = {"output": str(output), "to": to.value, "files": files, "missing": missing or None}
        typer.echo(json.dumps(document, indent=2))
    else:
        typer.echo(f"wrote {output}: {', '.join(files)}")
        typer.echo(missing, nl=bool(missing))


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
        f'files_sha256 = "{pinned.files_sha256}"\nlicence = ""  # its SPDX name\n'
        'trained_on = ""  # what it was pretrained on, in words or as a URL\n'
        'citation = ""  # how its makers ask to be cited'
    )


@app.command()
def backbones(
    plan: Annotated[Path, typer.Argument(help="Plan file; its own backbone is the first candidate.")],
    candidate: Annotated[
        list[Path],
        typer.Option(help="File with another [backbone]: what `veil backbone` prints, or a plan; can be repeated."),
    ],
    public: Annotated[
        bool, typer.Option("--public", help="I declare the records of the plan's table public; refused without.")
    ] = False,
    records: Annotated[int, typer.Option(min=20, max=10_000, help="How many records to draw, at most.")] = 300,
    data: Annotated[
        Path | None, typer.Option(help="Folder that the plan's relative paths start from; its own by default.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare pinned backbones on public records: LogME, a linear probe, size and speed."""
    from veil.common.plan import parse_plan
    from veil.simulations import backbone_table
    from veil.simulations.backbone_choice import compare
    from veil.simulations.screen import Screen

    chosen, base = parse_plan(plan), data or plan.resolve().parent
    with Screen(quiet=as_json) as screen:
        compared = compare(chosen, candidate, base=base, public=public, records=records, stage=screen.stage)
    document = json.dumps(backbone_table.document(compared), indent=2)
    typer.echo(document if as_json else "\n".join(backbone_table.lines(compared)))


@app.command(name="plan")
def forecast_plan(
    plan: Annotated[Path, typer.Argument(help="Plan file.")],
    units: Annotated[
        int | None, typer.Option(min=1, max=1_000_000, help="Units per site; the plan's nominal_units by default.")
    ] = None,
    sites: Annotated[
        int | None,
        typer.Option(
            min=1, max=100_000, help="How many sites; by default the plan's simulation.sites, or its min_sites."
        ),
    ] = None,
    expected: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Public guess: accuracy of all in one place, not private; 0.6 from majority to 1 if unsaid.",
        ),
    ] = None,
    share: Annotated[
        list[float] | None,
        typer.Option(min=0, max=1, help="Share of a class, one for each label in the plan's order; equal by default."),
    ] = None,
    width: Annotated[
        int | None, typer.Option(min=1, max=100_000, help="Features of a record; the backbone's by default.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, max=100, help="Draws of made-up records and noise.")] = 5,
    memory: Annotated[
        bool,
        typer.Option(
            "--memory", help="Say what the processes hold at most instead, on the loaded backbone; always below a head."
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Forecast what a plan's noise will cost, from sizes alone. Exit code 3 when it says don't."""
    from veil.common.plan import parse_plan
    from veil.simulations import forecast_command
    from veil.simulations.forecast import forecast

    chosen, base = parse_plan(plan), plan.resolve().parent
    if memory or chosen.transfer.deep:
        from veil.simulations import memory_command

        if share or expected is not None or width is not None:
            raise InputError("--share, --expected or --width with a memory plan", "none of them", "leave them out")
        held = memory_command.run_memory(chosen, sites=sites, units=units, base=base)
        told = json.dumps(memory_command.document(held), indent=2)
        typer.echo(told if as_json else "\n".join(memory_command.lines(held)))
        return
    sizes = forecast_command.sizes_of(
        chosen, sites=sites, units=units, width=width, shares=share or (), expected=expected, base=base
    )
    found = forecast(chosen, sizes, seeds=seeds)
    document = json.dumps(forecast_command.document(found), indent=2)
    typer.echo(document if as_json else "\n".join(forecast_command.lines(found)))
    found.check()


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
