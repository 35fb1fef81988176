# SPDX-License-Identifier: Apache-2.0
"""site.toml: what the operator says about the site's records, limits, coordinator and agent, parsed into frozen values.

Promises that an unknown key or a contradiction is an error that names it without a password, and that every path is
relative to the file's folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, PrivateAttr, ValidationError, ValidationInfo, model_validator

from veil.client.database import Query, masked, parse_url, require_select, shown_url
from veil.client.policy import Limits, SitePolicy
from veil.common.errors import InputError
from veil.common.plan import plan_error, read_toml
from veil.common.plan_sections import CachePrecision, Columns, Device, Section
from veil.common.privacy import PrivacyUnit

SITE_FILE = "site.toml"
"""The site's file within its folder."""


def _beside_the_file(path: Path, info: ValidationInfo) -> Path:
    folder: Path = info.context["folder"] if info.context else Path()
    return folder / path


LocalPath = Annotated[Path, AfterValidator(_beside_the_file)]
Address = Annotated[str, Field(pattern=r"^(([A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\]):[0-9]{1,5})?$")]


class Data(Columns):
    """Where the site's records are, and which columns hold what."""

    table: str = Field(
        min_length=1,
        repr=False,
        description="CSV, TSV or Parquet file (relative to this file), or a SQLAlchemy URL such as postgresql://u@host/db",
    )
    query: str | None = Field(default=None, description="database: one SELECT statement that returns the table")
    password_file: LocalPath | None = Field(default=None, description="database: file with the password of the URL")

    @model_validator(mode="after")
    def _own_labels(self) -> Self:
        """With the labels in this file, no plan can find out by a refusal which ones the records have."""
        if self.form in ("regression", "answers", "generation"):
            if self.labels:
                raise ValueError(f'[data.labels] with form = "{self.form}"; the label column holds none, leave it out')
            return self
        if not self.labels:
            raise ValueError('[data.labels] is missing; name each value of the label column, as in "1" = "ill"')
        return self

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if "://" not in self.table:
            if self.query is not None or self.password_file is not None:
                raise ValueError("query or password_file with a file as table; leave them out, or give a URL")
            return self
        try:
            has_password = parse_url(self.table).password is not None
        except ValueError as error:
            raise ValueError(f"table: {error}") from None
        if self.query is None:
            raise ValueError("table is a SQLAlchemy URL without query; give the SELECT statement")
        if has_password and self.password_file is not None:
            raise ValueError("a password in table and password_file; leave one of them out")
        try:
            require_select(self.query)
        except ValueError as error:
            raise ValueError(f"query: {error}") from None
        return self

    @property
    def shown_table(self) -> str:
        """The table for the screen: a path, or a URL without its password."""
        return shown_url(parse_url(self.table)) if "://" in self.table else self.table


class Coordinator(Section):
    """Whom the site answers to."""

    url: str = Field(description="https://HOST or https://HOST:PORT of the coordinator")
    ca: LocalPath = Field(description="PEM file with the certificates that may vouch for the coordinator")

    @model_validator(mode="after")
    def _https(self) -> Self:
        try:
            parts = urlsplit(self.url)
            usable = parts.scheme == "https" and parts.hostname and parts.port != 0
        except ValueError:
            usable = False
        if not usable or "@" in parts.netloc or parts.path not in {"", "/"} or parts.query or parts.fragment:
            raise ValueError(f'url = "{masked(self.url)}" is not https://HOST or https://HOST:PORT; give one of these')
        return self

    @property
    def address(self) -> str:
        """host:port."""
        parts = urlsplit(self.url)
        host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
        return f"{host}:{parts.port or 443}"


class Agent(Section):
    """The site's own process."""

    state: LocalPath = Field(
        default=Path("state"),
        validate_default=True,
        description="folder of the ledger, approvals, received backbones and caches: as confidential as the records",
    )
    key: LocalPath = Field(
        default=Path("keys/node.key"), validate_default=True, description="the site's private key, PEM, mode 0600"
    )
    anchor: LocalPath = Field(
        default=Path("keys/ledger.anchor"),
        validate_default=True,
        description="what shows that the ledger is not an old copy; not within state, and on another disk if possible",
    )
    health_address: Address = Field(default="127.0.0.1:9301", description='gRPC health, host:port; "" for none')
    metrics_address: Address = Field(default="127.0.0.1:9302", description='Prometheus metrics, host:port; "" for none')
    round_timeout_s: float = Field(
        default=600.0, gt=0, description="seconds that a round may take; a longer one is stopped and refused"
    )
    mirror: LocalPath | None = Field(
        default=None, description="folder of weights, searched before the coordinator is asked for them"
    )
    cache_precision: CachePrecision = Field(
        default="float32", description="how features are kept on disk: float32, or float16 scaled by row, half as large"
    )
    cache_max_gb: float = Field(
        default=20.0, gt=0, description="gigabytes that all kept features may take; a run that needs more is stopped"
    )
    max_memory_gb: float | None = Field(
        default=None,
        gt=0,
        description="gigabytes that a round of a model tuned below its head may take, by its memory plan; a run that "
        "needs more is refused before a record is read, and less is remembered of records (none: no limit)",
    )
    device: Device = Field(
        default="auto", description="where features are computed: auto (cuda where torch has one), cpu or cuda"
    )

    @property
    def ledger(self) -> Path:
        """The ledger's file."""
        return self.state / "ledger.sqlite"

    @property
    def runs(self) -> Path:
        """Folder of what the operator said about which run."""
        return self.state / "runs"

    @property
    def backbones(self) -> Path:
        """Folder of received backbones."""
        return self.state / "backbones"

    @property
    def cache(self) -> Path:
        """Folder of kept features."""
        return self.state / "cache"

    @property
    def status(self) -> Path:
        """Where the agent says how it is."""
        return self.state / "status.json"

    @property
    def node(self) -> Path:
        """Where the agent keeps its node's number."""
        return self.state / "node"

    @model_validator(mode="after")
    def _apart(self) -> Self:
        if self.anchor.resolve().is_relative_to(self.state.resolve()):
            raise ValueError(
                f"anchor = {self.anchor} is within state = {self.state}; keep the anchor apart from the ledger"
            )
        return self


class SiteFile(Section):
    """The whole of site.toml.

    Attributes:
        folder: the file's own folder, absolute; every relative path starts there.
    """

    name: str = Field(min_length=1, max_length=80, description="the site's name, as others see it")
    data: Data
    limits: Limits
    coordinator: Coordinator
    agent: Agent
    peers: dict[str, Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]] = Field(
        default_factory=dict,
        description="distributed noise: each site that may share noise with this one, and the SHA-256 of its key",
    )
    _folder: Path = PrivateAttr(default_factory=Path.cwd)

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, document: Any) -> Any:
        """[agent] may be left out; where a patient column is named and no unit is, the patient is the unit."""
        if not isinstance(document, dict):
            return document
        document = {"agent": {}, **document}
        data, limits = document.get("data"), document.get("limits")
        if isinstance(data, dict) and isinstance(limits, dict) and data.get("patient"):
            return {**document, "limits": {"unit": PrivacyUnit.PATIENT.value, **limits}}
        return document

    @model_validator(mode="after")
    def _others_pinned(self) -> Self:
        if self.name in self.peers:
            raise ValueError(f"peers.{self.name} is this site itself; pin the others only")
        return self

    @model_validator(mode="after")
    def _patients_known(self) -> Self:
        if self.limits.unit is PrivacyUnit.PATIENT and self.data.patient is None:
            raise ValueError('limits.unit = "patient" without data.patient; name the patient column')
        return self

    def model_post_init(self, context: Any) -> None:
        """Remember the folder that paths were relative to."""
        if context:
            self._folder = context["folder"]

    @property
    def folder(self) -> Path:
        """The file's own folder, absolute."""
        return self._folder

    @property
    def policy(self) -> SitePolicy:
        """What rounds are reviewed against."""
        return SitePolicy(name=self.name, limits=self.limits, peers=self.peers)

    @property
    def source(self) -> Path | Query:
        """Where the records are read from."""
        if self.data.query is None:
            return self._folder / self.data.table
        return Query(
            url=parse_url(self.data.table),
            statement=self.data.query,
            folder=self._folder,
            password_file=self.data.password_file,
        )


def read_site_file(path: Path) -> SiteFile:
    """Read and check a site's file.

    Raises:
        InputError: naming every wrong key.
    """
    return parse_site(read_toml(path), path)


def parse_site(document: Mapping[str, Any], path: Path) -> SiteFile:
    """Check what a site's file says.

    Args:
        document: the file's tables and keys.
        path: the file; it need not be there.

    Raises:
        InputError: naming every wrong key, and no password.
    """
    try:
        return SiteFile.model_validate(dict(document), context={"folder": path.absolute().parent})
    except ValidationError as error:
        raise InputError(
            masked(plan_error(str(path), error, SiteFile).value),
            "the keys and ranges of site.toml in client/README.md",
            "correct them",
        ) from None
