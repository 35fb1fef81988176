# SPDX-License-Identifier: Apache-2.0
"""The Invitation an operator of the coordinator hands to a site's operator, and the site's Application that answers it.

Promises that the secret is 256 random bits, stands in no `repr` and in no error message, and that an application proves
possession of the private key it asks to enrol, for this one secret.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import tomllib
from datetime import datetime
from pathlib import Path
from typing import Annotated, Self
from urllib.parse import urlsplit

from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import load_pem_x509_certificates
from pydantic import AfterValidator, AwareDatetime, ConfigDict, Field, ValidationError

from veil.common.durable import write_new
from veil.common.errors import InputError
from veil.common.keys import NodeKey, verify
from veil.common.plan_sections import Name, Section

ENROL_PATH = "/v1/enrol"
"""Where the coordinator takes applications."""

_CONTEXT = b"veil enrolment, version 1\0"
_TEMPLATE = """\
# An invitation to enrol one site. Whoever holds this file first becomes that site: hand it over in confidence.
site = "{site}"
url = "{url}"
secret = "{secret}"
expires = {expires}
ca = '''
{ca}'''
"""


def _address(url: str) -> str:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise ValueError("is no address") from None
    if not parts.hostname or not port or url != f"https://{parts.netloc}" or "@" in url:
        raise ValueError("is not of the form https://host:port")
    return url


def _certificates(pem: str) -> str:
    try:
        found = load_pem_x509_certificates(pem.encode())
    except ValueError:
        raise ValueError("holds no certificate in PEM") from None
    return "".join(one.public_bytes(Encoding.PEM).decode("ascii") for one in found)


Url = Annotated[str, Field(pattern=r"^https://[A-Za-z0-9.:\[\]_-]+$", max_length=300), AfterValidator(_address)]
Certificates = Annotated[str, AfterValidator(_certificates)]
Secret = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{43}$", repr=False)]


class Invitation(Section):
    """The right to enrol one site, once."""

    model_config = ConfigDict(hide_input_in_errors=True)

    site: Name = Field(description="the name the site will have")
    url: Url = Field(description="the coordinator, as https://host:port")
    secret: Secret = Field(description="the one-time secret: 256 bits, base64url")
    expires: AwareDatetime = Field(description="when the invitation ends")
    ca: Certificates = Field(description="the certificates that may vouch for the coordinator, PEM")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read the text of an invitation file.

        Raises:
            InputError: when it is no invitation; what it holds is not quoted.
        """
        try:
            return cls.model_validate(tomllib.loads(text))
        except tomllib.TOMLDecodeError as error:
            found = str(error)
        except ValidationError as error:
            found = problems(error)
        raise InputError(
            f"the invitation cannot be read ({found})",
            "the file as the coordinator's operator wrote it",
            "ask for the file again, unchanged",
        )

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read an invitation file.

        Raises:
            InputError: when it is missing or no invitation.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"{path} cannot be read ({type(error).__name__})",
                "an invitation file",
                "ask the coordinator's operator for one",
            ) from None
        return cls.parse(text)

    def write(self, path: Path) -> None:
        """Write the invitation to a new file of mode 0600.

        Raises:
            InputError: when the file is there already.
        """
        expires = self.expires.isoformat(timespec="seconds")
        text = _TEMPLATE.format(site=self.site, url=self.url, secret=self.secret, expires=expires, ca=self.ca)
        try:
            write_new(path, text.encode("utf-8"))
        except FileExistsError:
            raise InputError(f"{path} exists", "a new file", "choose another name or remove it") from None

    def expired(self, at: datetime) -> bool:
        """Whether it has ended at that time."""
        return at >= self.expires


class Application(Section):
    """A site's request to be enrolled."""

    model_config = ConfigDict(hide_input_in_errors=True)

    secret: Secret = Field(description="the invitation's")
    public_key: str = Field(max_length=4096, description="the site's public key, PEM")
    signature: str = Field(max_length=1024, repr=False, description="proof of possession, base64")

    @classmethod
    def sign(cls, secret: str, key: NodeKey) -> Self:
        """Apply with the secret of an invitation for a key one holds."""
        signature = key.sign(_statement(secret, key.public_pem))
        return cls(
            secret=secret,
            public_key=key.public_pem.decode("ascii"),
            signature=base64.b64encode(signature).decode("ascii"),
        )

    def is_proven(self) -> bool:
        """Whether the applicant holds the private half of the key."""
        public_pem = self.public_key.encode("utf-8", "replace")
        try:
            signature = base64.b64decode(self.signature, validate=True)
        except (ValueError, binascii.Error):
            return False
        return verify(public_pem, signature, _statement(self.secret, public_pem))


def problems(error: ValidationError) -> str:
    """What is wrong, key by key, without quoting any value."""
    return "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())


def digest(secret: str) -> bytes:
    """SHA-256 of a secret: all that the coordinator keeps of it."""
    return hashlib.sha256(secret.encode("utf-8")).digest()


def _statement(secret: str, public_pem: bytes) -> bytes:
    return _CONTEXT + digest(secret) + public_pem
