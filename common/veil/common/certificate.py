# SPDX-License-Identifier: Apache-2.0
"""A run's certificate: what was run, each site's signed statement, and the coordinator's signature over all of it.

Promises one written form with an entry a line, in which a changed byte is found and its entry named: also where the
change leaves a file that is no JSON any more.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from veil.common.errors import InputError
from veil.common.keys import NodeKey, verify
from veil.common.plan import RunPlan
from veil.common.plan_sections import Section
from veil.common.statement import Digest, SignedStatement, canonical

MOST_BYTES = 64 * 2**20
"""The largest file that is read."""

COORDINATOR = "coordinator"
"""The name under which the coordinator's public key is given."""

_PURPOSE = b"veil certificate\n"
_SIGNATURE, _STATEMENTS = "signature", "statements"
_ENTRY = re.compile(r'"((?:[^"\\]|\\.)*)":')


class RoundSites(Section):
    """Whose updates were used in a round."""

    round: int = Field(ge=0)
    kind: str
    sites: tuple[str, ...]


class RunFacts(Section):
    """What was run."""

    plan: dict[str, Any] = Field(description="the public plan in full, with backbone, licence and budget")
    plan_sha256: Digest
    job: str = Field(description="the run's name")
    created: str = Field(description="when the certificate was made, UTC")
    veil_version: str
    simulation: bool = Field(description="whether the sites are simulated")
    adapter_sha256: Digest = Field(description="of model/head/head.safetensors")
    anomaly_sha256: Digest | None = Field(
        default=None, description="of model/head/anomaly.safetensors, which one-shot's one message also gives"
    )
    rounds: tuple[RoundSites, ...]


class Vouched(Section):
    """A site's statement with what it is checked by."""

    statement: str
    signature: str = Field(description="the site's, hexadecimal")
    public_key: str = Field(description="the site's, PEM")

    @classmethod
    def of(cls, signed: SignedStatement) -> Vouched:
        """The same as text."""
        return cls(
            statement=signed.text,
            signature=signed.signature.hex(),
            public_key=signed.public_pem.decode("ascii", "replace"),
        )

    @property
    def signed(self) -> SignedStatement:
        """The inverse of `of`; what is not in its one form gets a signature that fits nothing."""
        return SignedStatement(text=self.statement, signature=_bytes(self.signature), public_pem=_pem(self.public_key))


class Certificate(Section):
    """The document."""

    veil_certificate: Literal[1] = Field(default=1, description="the form's number")
    run: RunFacts
    statements: dict[str, Vouched] = Field(description="by site")
    missing: dict[str, str] = Field(description="sites without a statement, and why")
    public_key: str = Field(description="the coordinator's, PEM")
    signature: str = Field(default="", description="the coordinator's of all else, hexadecimal")

    def sealed(self, key: NodeKey) -> Certificate:
        """The same, signed by the coordinator."""
        named = self.model_copy(update={"public_key": key.public_pem.decode("ascii")})
        return named.model_copy(update={"signature": key.sign(named._message()).hex()})

    @property
    def genuine(self) -> bool:
        """Whether the coordinator's signature fits."""
        return verify(_pem(self.public_key), _bytes(self.signature), self._message())

    def encode(self) -> bytes:
        """The one written form: JSON with sorted keys, each entry and each statement on a line of its own."""
        return _laid_out(self.model_dump(mode="json")).encode("ascii")

    def _message(self) -> bytes:
        return _PURPOSE + canonical(self.model_dump(mode="json", exclude={_SIGNATURE})).encode("ascii")


def assemble(
    plan: RunPlan,
    job: str,
    *,
    rounds: Sequence[RoundSites],
    statements: Mapping[str, SignedStatement],
    missing: Mapping[str, str],
    adapter_sha256: str,
    anomaly_sha256: str | None = None,
    created: str,
    veil_version: str,
    simulation: bool,
    key: NodeKey,
) -> Certificate:
    """Put a run's certificate together and sign it.

    Args:
        plan: what was run.
        job: the run's name.
        rounds: whose updates were used.
        statements: by site.
        missing: sites without one, and why.
        adapter_sha256: of the tuned part's file.
        anomaly_sha256: of the file that anomaly scores are made with, where there is one.
        created: UTC.
        veil_version: the coordinator's.
        simulation: whether the sites are simulated.
        key: the coordinator's.
    """
    facts = RunFacts(
        plan=json.loads(plan.public().to_json()),
        plan_sha256=plan.sha256,
        job=job,
        created=created,
        veil_version=veil_version,
        simulation=simulation,
        adapter_sha256=adapter_sha256,
        anomaly_sha256=anomaly_sha256,
        rounds=tuple(rounds),
    )
    vouched = {site: Vouched.of(signed) for site, signed in statements.items()}
    return Certificate(run=facts, statements=vouched, missing=dict(missing), public_key="").sealed(key)


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        entry: which part of the certificate: file, run, coordinator, or a site's statement.
        what: what is wrong with it.
    """

    entry: str
    what: str

    def __str__(self) -> str:
        return f"{self.entry}: {self.what}"


def entry_of(site: str) -> str:
    """What the statement of a site is called in findings."""
    return f"statement of {site}"


def read_certificate(path: Path) -> tuple[Certificate | None, tuple[Finding, ...]]:
    """Read a certificate.

    Returns:
        the certificate, None where it is damaged beyond reading; and what is wrong with its form.

    Raises:
        InputError: when the file cannot be read, or is nothing like a certificate.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path} ({error.strerror})", "a certificate", "check the path") from None
    text = content.decode("latin-1")
    if len(content) > MOST_BYTES or not any(_intact(line) for line in text.split("\n")):
        raise InputError(f"{path} is no certificate", "the certificate.json of a run", "give that file")
    try:
        certificate = Certificate.model_validate(_parsed(text))
    except ValidationError as error:
        return None, tuple(_misshapen(error))
    except (ValueError, RecursionError) as error:
        return None, tuple(_damaged(text)) or (Finding(entry="file", what=f"no JSON ({error})"),)
    if certificate.encode() != content:
        return certificate, (Finding(entry="file", what="not in canonical form"),)
    return certificate, ()


def _laid_out(document: Mapping[str, Any]) -> str:
    entries = []
    for name, value in sorted(document.items()):
        if name == _STATEMENTS and value:
            lines = ",\n".join(f"{canonical(site)}:{canonical(one)}" for site, one in sorted(value.items()))
            entries.append(f'"{name}":{{\n{lines}\n}}')
        else:
            entries.append(f"{canonical(name)}:{canonical(value)}")
    return "{\n" + ",\n".join(entries) + "\n}\n"


def _parsed(text: str) -> Any:
    """JSON as the standard has it, without NaN and infinity.

    Raises:
        ValueError: for anything else.
    """

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is no number of JSON")

    return json.loads(text, parse_constant=refuse)


def _read_line(line: str) -> dict[str, Any]:
    """The entry of a line.

    Raises:
        ValueError: when it is none.
    """
    entry = _parsed("{" + line.removesuffix(",") + "}")
    if not isinstance(entry, dict):
        raise ValueError("no entry")
    return entry


def _intact(line: str) -> bool:
    """Whether a line is an entry as a certificate has them."""
    try:
        entry = _read_line(line)
    except (ValueError, RecursionError):
        return False
    return any(name in Certificate.model_fields or _looks_vouched(value) for name, value in entry.items())


def _looks_vouched(value: object) -> bool:
    return isinstance(value, dict) and set(value) == set(Vouched.model_fields)


def _damaged(text: str) -> Iterator[Finding]:
    """The lines of a file that is no JSON which are no entries."""
    inside = False
    for number, line in enumerate(text.split("\n"), start=1):
        if line == f'"{_STATEMENTS}":{{':
            inside = True
        elif line in ("{", "}", "},", ""):
            inside = inside and line in ("{", "")
        else:
            yield from _damaged_line(number, line, inside=inside)


def _damaged_line(number: int, line: str, *, inside: bool) -> Iterator[Finding]:
    try:
        _read_line(line)
    except (ValueError, RecursionError) as error:
        named = _ENTRY.match(line)
        name = "file" if named is None else entry_of(_shown(named[1])) if inside else _shown(named[1])
        entry = COORDINATOR if name in (_SIGNATURE, "public_key") else name
        yield Finding(entry=entry, what=f"line {number} is damaged ({error})")


def _shown(written: str) -> str:
    """A name as it was before it was written as JSON."""
    try:
        return str(json.loads(f'"{written}"'))
    except ValueError:
        return written


def _misshapen(error: ValidationError) -> Iterator[Finding]:
    """What a document of another shape has wrong, by entry."""
    for one in error.errors(include_url=False, include_input=False):
        where = [str(part) for part in one["loc"]] or ["file"]
        if where[0] == _STATEMENTS and len(where) > 1:
            entry, rest = entry_of(where[1]), where[2:]
        elif where[0] in Certificate.model_fields:
            entry, rest = COORDINATOR if where[0] in (_SIGNATURE, "public_key") else where[0], where[1:]
        else:
            entry, rest = "file", where
        yield Finding(entry=entry, what=": ".join([*rest, one["msg"].lower()]))


def _bytes(digits: str) -> bytes:
    """Lower-case hexadecimal digits; nothing for any other text."""
    try:
        read = bytes.fromhex(digits)
    except ValueError:
        return b""
    return read if read.hex() == digits else b""


def _pem(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
