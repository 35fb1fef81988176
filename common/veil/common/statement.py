# SPDX-License-Identifier: Apache-2.0
"""A site's signed statement of one run: what it did, what all it ever did cost, and what it did it with.

Promises that a statement has exactly one written form, that a signature covers every character of it, and that nothing
in it is computed from a record: it follows from plan, ledger, limits and the installed software.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import repeat
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PlainSerializer, PlainValidator, ValidationError, model_validator

from veil.common.keys import NodeKey, canonical_pem, verify
from veil.common.noise import OSNoise
from veil.common.plan import plan_error
from veil.common.plan_sections import Section
from veil.common.privacy import Mechanism, NeighboringRelation, NoiseShares, PrivacySpent, PrivacyUnit

MAX_RELEASES = 1_000_000
"""The most releases that a statement lists: more would be meant to exhaust who checks it."""

MOST_SHARING = 100
"""Sites of a masked sum; see `veil.common.masking`."""

_PURPOSE = b"veil statement\n"
"""What a statement's signature begins with: the key signs other things too."""


def canonical(value: Any) -> str:
    """The one JSON form of a value: keys sorted, no blanks, ASCII.

    Raises:
        ValueError: for an infinite number, which JSON has no word for.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def _mechanism(value: object) -> Mechanism:
    """A mechanism from its record, in the record's one form."""
    if isinstance(value, Mechanism):
        return value
    try:
        mechanism = Mechanism.from_record(value)  # type: ignore[arg-type]  # a value of another form raises here
    except (LookupError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"no mechanism ({type(error).__name__})") from None
    if mechanism.to_record() != value:
        raise ValueError("a mechanism in another form than to_record gives")
    return mechanism


Recorded = Annotated[Mechanism, PlainValidator(_mechanism), PlainSerializer(Mechanism.to_record)]
"""A mechanism as its record, floats in hexadecimal."""

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Shared(Section):
    """How the noise of a masked sum was shared: over how many sites, and how many of them were not counted on."""

    sites: int = Field(ge=2, le=MOST_SHARING)
    colluding: int = Field(ge=0)

    @model_validator(mode="after")
    def _somebody_honest(self) -> Self:
        if self.colluding >= self.sites:
            raise ValueError(f"{self.colluding} colluding sites of {self.sites}; expected fewer than all")
        return self

    @classmethod
    def of(cls, shares: NoiseShares | None) -> Shared | None:
        """The same as a section."""
        return None if shares is None else cls(sites=shares.sites, colluding=shares.colluding)

    @property
    def shares(self) -> NoiseShares:
        """The same as a value."""
        return NoiseShares(sites=self.sites, colluding=self.colluding)


class Repeated(Section):
    """One mechanism, how often it ran, and how its noise was shared; null where the site added all of it."""

    mechanism: Recorded
    count: int = Field(ge=1, le=MAX_RELEASES)
    shared: Shared | None = None

    @property
    def alone(self) -> Mechanism:
        """What it was for whoever took the site's mask off."""
        return self.mechanism if self.shared is None else self.shared.shares.unmasked(self.mechanism)


class Releases(Repeated):
    """Releases of one kind and mechanism in every round from `first` to `last`; more than rounds were repeated."""

    first: int = Field(ge=0)
    last: int = Field(ge=0)
    kind: str

    @model_validator(mode="after")
    def _each_round_once_or_more(self) -> Self:
        if not 0 < self.last - self.first + 1 <= self.count:
            raise ValueError(f"{self.count} releases in rounds {self.first} to {self.last}; expected one a round")
        return self


class LedgerRun(Section):
    """All that the ledger holds of one run, without its name."""

    this_run: bool
    noise: str
    mechanisms: tuple[Repeated, ...]


class Cost(Section):
    """What mechanisms cost one unit at the statement's δ; an infinite ε is null."""

    epsilon: float | None
    by_accountant: dict[str, float | None]

    @classmethod
    def of(cls, spent: PrivacySpent) -> Cost:
        """The same without infinities."""
        figures = {name: _finite(figure) for name, figure in spent.by_accountant.items()}
        return cls(epsilon=spent.finite_epsilon, by_accountant=figures)


class StatedLimits(Section):
    """What the site's owner allowed when the statement was made; null in a simulation without limits."""

    epsilon_per_run: float | None
    epsilon_lifetime: float | None
    unit: PrivacyUnit


class Statement(Section):
    """What one site states about one run."""

    veil_statement: Literal[2] = Field(default=2, description="the form's number")
    simulation: bool = Field(description="whether the site is a simulated one")
    site: str = Field(min_length=1, max_length=80, description="its name")
    job: str = Field(description="the run's name")
    plan_sha256: Digest = Field(description="of the run's plan")
    unit: PrivacyUnit = Field(description="whom the promise protects")
    relation: NeighboringRelation = Field(description="what neighbouring collections of records are")
    sampler: str = Field(description="full-batch, or poisson with its rates")
    noise: str = Field(description="where the run's noise came from; only os is private")
    releases: tuple[Releases, ...] = Field(description="what left the site in this run, in order")
    ledger: tuple[LedgerRun, ...] = Field(description="all runs ever, this one marked")
    ledger_head: Digest = Field(description="hash of the ledger's last line")
    ledger_lines: int = Field(ge=1, description="number of the ledger's lines")
    delta: float = Field(gt=0, lt=1, description="the δ of all costs")
    this_run: Cost = Field(description="what this run cost one unit")
    lifetime: Cost = Field(description="what all runs cost one unit")
    this_run_alone: Cost | None = Field(
        default=None, description="what this run cost if its masks were taken off; null without masked sums"
    )
    lifetime_alone: Cost | None = Field(default=None, description="the same of all runs")
    limits: StatedLimits = Field(description="what the owner allows")
    backbone_sha256: Digest | None = Field(description="of the pretrained weights")
    code_sha256: Digest = Field(description="over the installed source files of Veil")
    versions: dict[str, str] = Field(description="of Veil and of what computes ε")
    audit: dict[str, Any] | None = Field(description="the site's last empirical audit")
    time: str = Field(description="when it was made, UTC")

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        listed = sum(one.count for run in self.ledger for one in run.mechanisms)
        if max(listed, sum(one.count for one in self.releases)) > MAX_RELEASES:
            raise ValueError(f"more than {MAX_RELEASES} releases")
        return self

    @property
    def text(self) -> str:
        """The one written form, which is signed."""
        return canonical(self.model_dump(mode="json"))

    @classmethod
    def from_text(cls, text: str) -> Statement:
        """The inverse of `text`.

        Raises:
            ValueError: when it is no statement, or not in its one form.
        """
        try:
            statement = cls.model_validate(json.loads(text))
        except ValidationError as error:
            raise ValueError(plan_error("statement", error).value) from None
        except RecursionError:
            raise ValueError("nested too deep") from None
        if statement.text != text:
            raise ValueError("not in canonical form")
        return statement

    @property
    def private(self) -> bool:
        """Whether all noise of this run was the operating system's."""
        return self.noise == OSNoise.name

    def mechanisms(self) -> Iterator[Mechanism]:
        """Each release's of this run, repeated ones as often as they ran."""
        return expanded(self.releases)


def expanded(listed: Iterable[Repeated]) -> Iterator[Mechanism]:
    """Each mechanism as often as it ran."""
    return (mechanism for one in listed for mechanism in repeat(one.mechanism, one.count))


def expanded_alone(listed: Iterable[Repeated]) -> Iterator[Mechanism]:
    """The same for whoever took every mask off."""
    return (mechanism for one in listed for mechanism in repeat(one.alone, one.count))


def sampler_of(mechanisms: Iterable[Mechanism]) -> str:
    """How units came into steps, in words."""
    rates = sorted({mechanism.sample_rate for mechanism in mechanisms})
    return "full-batch" if rates in ([], [1.0]) else "poisson " + ", ".join(f"{rate:g}" for rate in rates)


def noise_of(sources: Iterable[str]) -> str:
    """The names of noise sources as one word."""
    return ", ".join(sorted(set(sources)))


@dataclass(frozen=True, kw_only=True, slots=True)
class SignedStatement:
    """A statement as it travels and is kept.

    Attributes:
        text: its one written form.
        signature: the site's.
        public_pem: the key that it is to be checked with, PEM.
    """

    text: str
    signature: bytes
    public_pem: bytes

    @classmethod
    def sign(cls, statement: Statement, key: NodeKey) -> SignedStatement:
        """Sign with a site's key."""
        text = statement.text
        return cls(text=text, signature=key.sign(_message(text)), public_pem=key.public_pem)

    @property
    def genuine(self) -> bool:
        """Whether the signature is that key's of that text."""
        return verify(self.public_pem, self.signature, _message(self.text))


@lru_cache(maxsize=4096)
def key_fingerprint(pem: bytes) -> str:
    """SHA-256 of a public key in its one PEM form, as `sha256sum` of the file gives it."""
    return hashlib.sha256(canonical_pem(pem) or pem).hexdigest()


def summed_up(mechanisms: Sequence[tuple[Mechanism, NoiseShares | None]]) -> tuple[Repeated, ...]:
    """A run's mechanisms, and how their noise was shared, with their counts, in order of first use."""
    counts = dict.fromkeys(mechanisms, 0)
    for one in mechanisms:
        counts[one] += 1
    return tuple(
        Repeated(mechanism=mechanism, count=count, shared=Shared.of(shares))
        for (mechanism, shares), count in counts.items()
    )


def _message(text: str) -> bytes:
    return _PURPOSE + text.encode("utf-8", "surrogatepass")


def _finite(figure: float) -> float | None:
    return figure if math.isfinite(figure) else None
