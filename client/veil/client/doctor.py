# SPDX-License-Identifier: Apache-2.0
"""`veil site doctor`: everything a run would need, looked at beforehand.

Promises that nothing of what it finds leaves the site, that it spends nothing, and that one failed check keeps none of
the others from being made.
"""

from __future__ import annotations

import shutil
import ssl
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path

import httpx
from cryptography.x509 import load_der_x509_certificate

from veil.client.backbone_store import BackboneStore
from veil.client.cohort import review_sharing
from veil.client.deployed import backbone_store
from veil.client.ledger import entries_of
from veil.client.records import SiteRecords, look
from veil.client.selftest import examine_step
from veil.client.site_file import SiteFile
from veil.client.units import Units
from veil.client.verification import verify
from veil.client.wording import describe_plan
from veil.common.errors import InputError, RunError, VeilError
from veil.common.keys import NodeKey
from veil.common.plan import RunPlan

_MEMORY_BYTES = 1 << 30
_DISK_BYTES = 1 << 30
_CLOCK_S = 60.0
_CERTIFICATE_DAYS = 14
_WAIT_S = 10.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What one check found.

    Attributes:
        name: what was looked at.
        fine: whether a run can go on.
        lines: what was seen, or what is wrong and what to do.
    """

    name: str
    fine: bool
    lines: tuple[str, ...]


def examine_site(file: SiteFile, plan: RunPlan | None) -> Iterator[Finding]:
    """All checks, one after the other.

    Args:
        file: the operator's file.
        plan: a run to look at; without one, weights and price are left out.
    """
    store = backbone_store(file)
    checks: list[tuple[str, Callable[[], Sequence[str]]]] = [
        ("key", lambda: _key(file)),
        ("data", lambda: _data(file)),
        ("ledger", lambda: _ledger(file)),
        ("disk", lambda: _disk(file)),
        ("memory", _memory),
        ("coordinator", lambda: _coordinator(file)),
    ]
    if plan is not None and plan.transfer.deep:
        checks += [("memory plan", lambda: _memory_plan(file, plan, store))]
    if plan is not None:
        checks += [("weights", lambda: _weights(plan, store)), ("price", lambda: _price(file, plan))]
    checks += [("private step", lambda: _step(file, plan, store))]
    for name, check in checks:
        yield _made(name, check)


def _made(name: str, check: Callable[[], Sequence[str]]) -> Finding:
    try:
        return Finding(name=name, fine=True, lines=tuple(check()))
    except VeilError as error:
        return Finding(name=name, fine=False, lines=(_printable(str(error)),))
    except Exception as error:  # a check must not keep the others from being made
        defect = RunError(f"{type(error).__name__}: {error}", "a check that can be made", "report this defect of Veil")
        return Finding(name=name, fine=False, lines=(_printable(str(defect)),))


def _key(file: SiteFile) -> Sequence[str]:
    NodeKey.load(file.agent.key)
    return [f"{file.agent.key}"]


def _data(file: SiteFile) -> Sequence[str]:
    seen = look(file)
    lines = [f"{seen.records} records of {seen.units} {file.limits.unit}s from {file.data.shown_table}"]
    lines += [f"label {_short(label)}: {count}" for label, count in seen.labels.items()]
    if seen.numbers is not None:
        lines.append(f"numbers to be learnt from {seen.numbers[0]:g} to {seen.numbers[1]:g}")
    for column, cells in seen.first.items():
        absent = f" ({seen.missing[column]} without a value)" if seen.missing[column] else ""
        lines.append(f"column {_short(column)}{absent}: {' | '.join(_short(cell) for cell in cells)}")
    return lines


def _ledger(file: SiteFile) -> Sequence[str]:
    path = file.agent.ledger
    if not path.exists() and file.agent.anchor.exists():
        raise RunError(
            f"{path} is missing, and {file.agent.anchor} remembers one",
            "the ledger that belongs to the anchor",
            "restore its newest copy; without one, count what is lost with veil site ledger write-off",
        )
    if not path.exists():
        return ["none yet; it is made with the first start"]
    found = verify(path, file.name, NodeKey.load(file.agent.key).public_pem, anchor=file.agent.anchor)
    if found.findings:
        raise RunError("; ".join(map(str, found.findings)), "a ledger as this site wrote it", "restore the newest copy")
    return [f"{found.lines} lines, chain, signatures and anchor in order"]


def _disk(file: SiteFile) -> Sequence[str]:
    folder = next(one for one in (file.agent.state, *file.agent.state.parents) if one.exists())
    free = shutil.disk_usage(folder).free
    if free < _DISK_BYTES:
        raise RunError(f"{free >> 20} MiB free in {folder}", f"{_DISK_BYTES >> 20} MiB", "make room there")
    return [f"{free >> 30} GiB free in {folder}"]


def _available() -> int | None:
    """Bytes of memory that programs can have; None where the system does not say it."""
    if not Path("/proc/meminfo").exists():
        return None
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), 0)


def _memory_plan(file: SiteFile, plan: RunPlan, store: BackboneStore) -> Sequence[str]:
    """What a round of a model that is tuned below its head would take; no record is read for it."""
    if plan.backbone is None or not store.has(plan.backbone):
        return ["not known before the weights are here"]
    from veil.common.memory import site_memory  # late: torch takes seconds to load

    needed = site_memory(plan, SiteRecords(file, store.find_backbone).model(plan).footprint()).needed
    available = _available()
    if available is not None and needed > available:
        raise RunError(
            f"a round takes {needed >> 20} MiB", f"at most the {available >> 20} MiB available", "end other programs"
        )
    return [f"a round takes {needed >> 20} MiB, and what is remembered of records"]


def _memory() -> Sequence[str]:
    available = _available()
    if available is None:
        return ["not known on this system"]
    if available < _MEMORY_BYTES:
        raise RunError(f"{available >> 20} MiB of memory", f"{_MEMORY_BYTES >> 20} MiB", "end other programs")
    return [f"{available >> 20} MiB available"]


def _coordinator(file: SiteFile) -> Sequence[str]:
    """Reach the coordinator over TLS, with the site's own list of authorities; compare the clocks."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(cafile=file.coordinator.ca)
    except OSError as error:
        raise InputError(
            f"coordinator.ca = {file.coordinator.ca} ({error.strerror})",
            "the PEM file with the coordinator's authority",
            "veil site init takes it from the invitation",
        ) from None
    url = f"https://{file.coordinator.address}"
    try:
        with (
            httpx.Client(verify=context, trust_env=False, timeout=_WAIT_S) as client,
            client.stream("GET", url) as response,
        ):
            their_time = parsedate_to_datetime(response.headers["date"])
            der = response.extensions["network_stream"].get_extra_info("ssl_object").getpeercert(True)
    except (httpx.HTTPError, KeyError, ValueError) as error:
        raise RunError(
            f"{url} ({error})", "a coordinator with a certificate from coordinator.ca", "check address and firewall"
        ) from None
    off = abs(their_time.timestamp() - time.time())
    if off > _CLOCK_S:
        raise RunError(f"the clocks differ by {off:.0f} s", f"at most {_CLOCK_S:.0f} s", "set this machine's clock")
    days = (load_der_x509_certificate(der).not_valid_after_utc - datetime.now(UTC)).days
    soon = "; it ends soon, tell the coordinator's operator" if days < _CERTIFICATE_DAYS else ""
    return [f"{url} answers; its certificate lasts {days} days{soon}; the clocks agree"]


def _weights(plan: RunPlan, store: BackboneStore) -> Sequence[str]:
    if plan.backbone is None:
        return ["the plan needs none"]
    if not store.has(plan.backbone):
        return [f"{plan.backbone.source}: not here; the coordinator will be asked for them"]
    return [f"{plan.backbone.source}: here, with the pinned SHA-256"]


def _price(file: SiteFile, plan: RunPlan) -> Sequence[str]:
    path = file.agent.ledger
    entries = entries_of(path, file.name) if path.exists() else ()
    review_sharing(plan, file.policy)
    return describe_plan(plan, "(not submitted)", file, entries)


def _step(file: SiteFile, plan: RunPlan | None, store: BackboneStore) -> Sequence[str]:
    """On the site's own records where a plan says how to read them, else on made-up ones."""
    ready = plan is not None and (plan.backbone is None or store.has(plan.backbone))
    found = SiteRecords(file, store.find_backbone)(plan) if plan is not None and ready else None
    units = found if isinstance(found, Units) else None  # a tuned model was examined when it was loaded
    return [*examine_step(units), "on your records" if units is not None else "on made-up records"]


def _short(cell: str) -> str:
    shown = _printable(cell)
    return shown if len(shown) <= 40 else f"{shown[:39]}…"


def _printable(text: str) -> str:
    """A cell may hold what would paint the screen."""
    return "".join(one if one.isprintable() else " " for one in text)
