# SPDX-License-Identifier: Apache-2.0
"""The coordinator's folder: its settings, where everything in it lies, and what it is to the outside.

Promises that whoever may open this folder is the coordinator, and that nobody else needs to be believed.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, ValidationError

from veil.common.durable import sync_folder
from veil.common.errors import InputError
from veil.common.keys import NodeKey
from veil.common.plan import plan_error, read_toml
from veil.common.plan_sections import Section
from veil.server.tls_certificate import general_name

SETTINGS_NAME = "coordinator.toml"

PULSE_PATH = "/v1/pulse"
"""Where the link answers 204 when the link state's database can be read."""


def _host(host: str) -> str:
    general_name(host)
    return host


def _address(address: str) -> str:
    host, _, port = address.rpartition(":")
    if address and not (host and port.isdecimal() and int(port) < 2**16):
        raise InputError(f"address {address!r}", 'host:port, or "" for none', "name both, as in 127.0.0.1:8480")
    return address


Host = Annotated[str, AfterValidator(_host)]
Address = Annotated[str, AfterValidator(_address)]


class Settings(Section):
    """coordinator.toml."""

    hosts: tuple[Host, ...] = Field(min_length=1, description="names or addresses by which sites reach the link")
    listen: str = Field(default="0.0.0.0", description="address that the link listens on")  # noqa: S104 - sites are elsewhere
    port: int = Field(default=8443, ge=1, le=65535, description="port that the link listens on")
    page_address: Address = Field(
        default="127.0.0.1:8480", description='host:port of the status page and the Prometheus metrics; "" for none'
    )
    health_address: Address = Field(
        default="127.0.0.1:8481", description='host:port of the gRPC health service; "" for none'
    )
    certificate: str = Field(default="pki/link.pem", description="the link's certificate chain, PEM")
    key: str = Field(default="pki/link.key", description="its private key, PEM")
    ca: str = Field(default="pki/ca.pem", description="the certificate that sites are to trust, PEM")


@dataclass(frozen=True, kw_only=True, slots=True)
class Home:
    """A coordinator's folder.

    Attributes:
        folder: where it is.
        settings: its coordinator.toml.
    """

    folder: Path
    settings: Settings

    @classmethod
    def open(cls, folder: Path) -> Home:
        """Read a coordinator's folder.

        Raises:
            InputError: when it is none, or its settings are not usable.
        """
        path = folder / SETTINGS_NAME
        if not path.is_file():
            raise InputError(
                f"{folder} has no {SETTINGS_NAME}",
                "a coordinator's folder",
                "veil coordinator init makes one; --home names it",
            )
        try:
            settings = Settings.model_validate(read_toml(path))
        except ValidationError as error:
            raise InputError(
                plan_error(str(path), error, Settings).value,
                "the keys and ranges of coordinator.toml in server/README.md",
                "correct the named keys",
            ) from None
        return cls(folder=folder.resolve(), settings=settings)

    @classmethod
    def create(cls, folder: Path, settings: Settings) -> Home:
        """Make a coordinator's folder, readable by its owner alone.

        Raises:
            InputError: when there is one already.
        """
        cls.refuse_existing(folder)
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        (folder / "runs").mkdir(exist_ok=True)
        (folder / SETTINGS_NAME).write_text(_settings_text(settings), encoding="utf-8")
        return cls.open(folder)

    @staticmethod
    def refuse_existing(folder: Path) -> None:
        """Look whether a folder is free.

        Raises:
            InputError: when there is a coordinator in it.
        """
        path = folder / SETTINGS_NAME
        if path.exists():
            raise InputError(f"{path} exists", "a folder without a coordinator", "choose another, or edit the file")

    @property
    def url(self) -> str:
        """What a site connects to."""
        host = self.settings.hosts[0]
        return f"https://{f'[{host}]' if ':' in host else host}:{self.settings.port}"

    @property
    def database(self) -> Path:
        """Flower's state of nodes, runs and messages."""
        return self.folder / "link.sqlite"

    @property
    def roster(self) -> Path:
        """Enrolled sites and invitations."""
        return self.folder / "roster.sqlite"

    @property
    def runs(self) -> Path:
        """One folder for each run."""
        return self.folder / "runs"

    @property
    def shelf(self) -> Path:
        """Backbones that the coordinator gives to sites."""
        return self.folder / "backbones"

    @property
    def pid_file(self) -> Path:
        """Locked by the coordinator that runs on this folder; holds its process id."""
        return self.folder / "coordinator.pid"

    @property
    def key_file(self) -> Path:
        """What the coordinator signs certificates with; not what the link proves itself with."""
        return self.folder / "coordinator.key"

    def signing_key(self) -> NodeKey:
        """The coordinator's key, made at first use and never over another one.

        Raises:
            InputError: when the file is not one, or others may read it.
        """
        if not self.key_file.exists():
            _make_key(self.key_file)
        return NodeKey.load(self.key_file)

    def path(self, relative: str) -> Path:
        """A path of the settings, relative to the folder."""
        return self.folder / relative


def _make_key(path: Path) -> None:
    """A new key, whole or not at all; that of whoever was first stays."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.unlink(missing_ok=True)
    NodeKey.generate().save(partial)
    with contextlib.suppress(FileExistsError):
        path.hardlink_to(partial)
    partial.unlink()
    sync_folder(path.parent)


def _settings_text(settings: Settings) -> str:
    """coordinator.toml with a comment on every key."""
    lines = ["# The settings of a Veil coordinator; relative paths start from this folder.", ""]
    for name, field in Settings.model_fields.items():
        written = json.dumps(getattr(settings, name), ensure_ascii=False)
        lines.append(f"{name} = {written}  # {field.description}")
    return "\n".join(lines) + "\n"
