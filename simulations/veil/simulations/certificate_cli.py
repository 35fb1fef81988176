# SPDX-License-Identifier: Apache-2.0
"""`veil certificate …`: check what sites and coordinator signed, on any machine and without a network.

Promises exit codes 0 valid, 3 anything less (a finding, a site without a statement, noise that is not private), 2 a
file that cannot be read; and that no torch, Flower or transformers is imported.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from veil.common.statement_check import CheckedSite
    from veil.common.verdict import Verdict

LESS_THAN_VALID = 3

app = typer.Typer(no_args_is_help=True, help="The signed certificate of a run.")


@app.callback()
def _root() -> None:
    """A group also with few commands."""


@app.command("verify")
def verify_certificate(
    file: Annotated[Path, typer.Argument(help="The certificate.json of a run.")],
    key: Annotated[
        list[str] | None,
        typer.Option(
            "--key", metavar="NAME=FILE", help="A site's public key, PEM; coordinator=FILE for the coordinator's."
        ),
    ] = None,
    keys: Annotated[
        Path | None, typer.Option("--keys", help="A folder of public keys, each NAME.pem; coordinator.pem too.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Check every signature and recompute every ε. The certificate lists the mechanisms."""
    from veil.common.verdict import Word, judge

    named = dict(_named(one) for one in key or ())
    verdict = judge(file, {**_folder(keys), **{name: _public_key(path) for name, path in named.items()}})
    _check_names(named, verdict)
    if as_json:
        typer.echo(json.dumps(verdict.document(), indent=2))
    else:
        for line in _lines(verdict):
            typer.echo(printable(line))
    if verdict.word is not Word.VALID:
        raise typer.Exit(LESS_THAN_VALID)


@app.command("key")
def public_key(
    file: Annotated[Path, typer.Argument(help="A private key: a site's agent.key, or coordinator.key.")],
) -> None:
    """Print the public half of a key. It is for whoever checks certificates."""
    from veil.common.keys import NodeKey
    from veil.common.statement import key_fingerprint

    pem = NodeKey.load(file).public_pem
    typer.echo(pem.decode("ascii"), nl=False)
    typer.echo(f"sha256 {key_fingerprint(pem)}", err=True)


def printable(text: str) -> str:
    """A line that a terminal shows as it is: a hostile name cannot move the cursor."""
    return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in text)


def _named(option: str) -> tuple[str, Path]:
    from veil.common.errors import InputError

    name, sign, path = option.rpartition("=")
    if not (name and sign and path):
        raise InputError(f"--key {option}", "NAME=FILE", "give both, as in --key Bonn=bonn.pem")
    return name, Path(path)


def _folder(folder: Path | None) -> dict[str, bytes]:
    from veil.common.errors import InputError

    if folder is None:
        return {}
    files = sorted(folder.glob("*.pem"))
    if not files:
        raise InputError(f"--keys {folder} holds no .pem file", "a folder of public keys", "check the path")
    return {path.stem: _public_key(path) for path in files}


def _public_key(path: Path) -> bytes:
    from veil.common.errors import InputError
    from veil.common.keys import KEY_KINDS, canonical_pem

    try:
        pem = canonical_pem(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path} ({error.strerror})", "a public key", "check the path") from None
    if pem is None:
        raise InputError(
            f"{path} is no such key", f"a {KEY_KINDS} public key in PEM", "veil certificate key prints one"
        )
    return pem


def _check_names(named: dict[str, Path], verdict: Verdict) -> None:
    """A key given for nobody was meant for somebody."""
    from veil.common.errors import InputError

    signers = {one.name for one in verdict.keys}
    for name in named:
        if signers and name not in signers:
            raise InputError(f"--key {name}=…", f"one of: {', '.join(sorted(signers))}", "correct the name")


def _lines(verdict: Verdict) -> Iterator[str]:
    from veil.common.verdict import Word

    if verdict.run is not None:
        yield f"run {verdict.run.job}, {verdict.run.created}"
        if verdict.run.simulation:
            yield "SIMULATION: the sites were simulated on one machine; this vouches for no real site"
        yield from _table(verdict)
        yield from _alone(verdict)
    for site, why in sorted(verdict.missing.items()):
        yield f"{site}: no statement ({why})"
    for finding in verdict.findings:
        yield str(finding)
    yield from _key_lines(verdict)
    word = verdict.word
    explained = {
        Word.VALID: "every signature fits, and every ε is what its mechanisms cost",
        Word.INCOMPLETE: "not every site whose updates were used makes a statement",
        Word.NOT_PRIVATE: "the noise was not the operating system's; no ε limits what others learn",
        Word.INVALID: f"{len(verdict.findings)} findings",
    }[word]
    simulated = " SIMULATION" if verdict.run is not None and verdict.run.simulation else ""
    compared = "" if verdict.keys_compared or verdict.run is None else "; KEYS NOT COMPARED"
    yield f"{word.upper()}{simulated}: {explained}{compared}"


def _table(verdict: Verdict) -> Iterator[str]:
    head = ("site", "unit", "ε of this run", "limit", "ε of all runs", "limit", "δ", "noise", "rounds used")
    rows = [head, *(_row(name, site) for name, site in verdict.sites.items())]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _alone(verdict: Verdict) -> Iterator[str]:
    """What masked sums would have cost without their masks."""
    for name, site in verdict.sites.items():
        if site.this_run_alone is not None and site.lifetime_alone is not None:
            yield (
                f"{printable(name)}: noise was shared; if its masks were taken off, ε of this run "
                f"{site.this_run_alone.epsilon:.6g}, of all runs {site.lifetime_alone.epsilon:.6g}"
            )


def _row(name: str, site: CheckedSite) -> Sequence[str]:
    said = site.statement
    return (
        printable(name),
        said.unit.value,
        f"{site.this_run.epsilon:.6g}",
        "none" if said.limits.epsilon_per_run is None else f"{said.limits.epsilon_per_run:g}",
        f"{site.lifetime.epsilon:.6g}",
        "none" if said.limits.epsilon_lifetime is None else f"{said.limits.epsilon_lifetime:g}",
        f"{said.delta:g}",
        said.noise,
        str(site.rounds),
    )


def _key_lines(verdict: Verdict) -> Iterator[str]:
    unknown = [one for one in verdict.keys if not one.compared]
    if unknown:
        yield "KEYS NOT COMPARED: whoever forges a certificate forges its keys; ask each signer for its SHA-256"
    for one in unknown:
        yield f"  {one.name}  {one.fingerprint}"
