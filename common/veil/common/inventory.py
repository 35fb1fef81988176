# SPDX-License-Identifier: Apache-2.0
"""Everything that leaves a site, field by field, and what each field may tell about its records.

Promises that a reply with a field that is not listed here does not leave: `check_outgoing` stands before the line.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from flwr.app import RecordDict

from veil.common.wire import ARRAYS, CHUNK, CONFIG, KEYS, MANIFEST, MASKED, METRICS, OFFER, STATEMENT, WireError

TRAIN = "train"
"""The action of a round's message."""


class Mark(StrEnum):
    """What a field may tell; a record-free one follows from plan, request, policy, ledger and operator alone."""

    NOISED = "noised"
    DECLARED = "declared public by the site"
    RECORD_FREE = "record-free"
    WITHHELD = "withheld"


@dataclass(frozen=True, kw_only=True, slots=True)
class Field:
    """One field.

    Attributes:
        action: of the question that it answers.
        name: in the reply; `arrays` stands for all tensors.
        value: what in the program it is.
        mark: what it may tell.
        what: the same for a person.
    """

    action: str
    name: str
    value: str
    mark: Mark
    what: str


def _round(name: str, value: str, mark: Mark, what: str) -> Field:
    return Field(action=TRAIN, name=name, value=value, mark=mark, what=what)


def _free(action: str, name: str, value: str, what: str) -> Field:
    return Field(action=action, name=name, value=value, mark=Mark.RECORD_FREE, what=what)


def _delivery(action: str) -> tuple[Field, ...]:
    return (
        _free(action, "manifest", "Progress.manifest", "digest of the list of files, as the coordinator sent it"),
        _free(action, "standing", "Progress.standing", "whether the site receives, has all, or refused"),
        _free(action, "name", "Progress.next", "file of the next piece"),
        _free(action, "offset", "Progress.next", "where the next piece begins"),
        _free(action, "refusal", "Progress.refusal", "one word of RefusalCode"),
    )


FIELDS: tuple[Field, ...] = (
    _round(
        "arrays",
        "RoundReply.update",
        Mark.NOISED,
        "lattice points (int8, int16 or int32) of a noised sum (`centre`, `head.weight`, `gradient` below the "
        "head, `statistics` or `evaluation`), shape and width fixed by the plan; its mechanism is in the ledger",
    ),
    _round(
        "spacing",
        "RoundReply.update",
        Mark.NOISED,
        "distance of lattice points: the plan's, doubled as often as the noised numbers need to fit",
    ),
    _round(
        "masked",
        "RoundReply.masked",
        Mark.NOISED,
        "instead of `arrays`, with distributed noise: the same numbers with the site's share of the noise, behind "
        "masks that cancel only in the sum over the cohort (three uint16 a number)",
    ),
    _round("site", "RoundReply.site", Mark.DECLARED, "the site's name, chosen by its operator"),
    _round("job", "RoundReply.job", Mark.RECORD_FREE, "copied from the request"),
    _round("round", "RoundReply.round", Mark.RECORD_FREE, "copied from the request"),
    _round("num-examples", "the constant 1", Mark.RECORD_FREE, "the constant 1, because Flower asks for a weight"),
    _round("head", "RoundReply.head", Mark.RECORD_FREE, "hash of the ledger's last line, which holds a random salt"),
    _round("units", "RoundReply.units", Mark.DECLARED, "exact number of units, only with limits.release_counts = true"),
    _round("refusal", "RoundReply.refusal", Mark.RECORD_FREE, "one word of RefusalCode instead of an update"),
    _free(OFFER, "job", "OfferReply.job", "copied from the offer"),
    _free(OFFER, "willingness", "OfferReply.willingness", "ready, pending, lacks-backbone or refused"),
    _free(OFFER, "refusal", "OfferReply.refusal", "one word of RefusalCode"),
    *_delivery(MANIFEST),
    *_delivery(CHUNK),
    _free(KEYS, "job", "KeyReply.job", "copied from the question"),
    _free(KEYS, "members", "KeyReply.member", "the site's name"),
    _free(KEYS, "masking-keys", "KeyReply.member", "the site's public masking key"),
    _free(KEYS, "signatures", "KeyReply.member", "the site's, of name and masking key"),
    _free(KEYS, "public-keys", "KeyReply.member", "the site's public key"),
    _free(KEYS, "refusal", "KeyReply.refusal", "one word of RefusalCode"),
    _free(STATEMENT, "job", "StatementReply.job", "copied from the question"),
    _free(STATEMENT, "statement", "StatementReply.signed", "mechanisms, limits, versions and hashes, with their ε"),
    _free(STATEMENT, "signature", "StatementReply.signed", "the site's, of the statement"),
    _free(STATEMENT, "public-key", "StatementReply.signed", "the site's public key"),
    _free(STATEMENT, "refusal", "StatementReply.refusal", "one word of RefusalCode"),
)
"""The content of every reply. Flower's envelope around it is in `ENVELOPE`."""


ENVELOPE: dict[str, dict[str, str]] = {
    "ActivateNodeRequest": {"public_key": "the site's", "heartbeat_interval": "a constant"},
    "DeactivateNodeRequest": {"node_id": "given by the coordinator"},
    "SendNodeHeartbeatRequest": {"node": "given by the coordinator", "heartbeat_interval": "a constant"},
    "PullMessagesRequest": {"node": "given by the coordinator", "message_ids": "not sent"},
    "PullObjectRequest": {
        "node": "given by the coordinator",
        "run_id": "given by the coordinator",
        "object_id": "given by the coordinator",
    },
    "ConfirmMessageReceivedRequest": {
        "node": "given by the coordinator",
        "run_id": "given by the coordinator",
        "message_object_id": "given by the coordinator",
    },
    "GetRunRequest": {"node": "given by the coordinator", "run_id": "given by the coordinator"},
    "PushMessagesRequest": {
        "node": "given by the coordinator",
        "messages_list": "the reply's metadata",
        "message_object_trees": "digests of the reply's fields",
        "clientapp_runtime_list": "not sent: how long training took",
    },
    "PushObjectRequest": {
        "node": "given by the coordinator",
        "run_id": "given by the coordinator",
        "object_id": "digest of the field",
        "object_content": "the reply's fields, those above",
        "session_id": "given by the coordinator",
    },
    "Message": {"metadata": "see Metadata", "content": "the reply's fields, those above", "error": "not sent"},
    "Metadata": {
        "run_id": "given by the coordinator",
        "message_id": "digest of the reply",
        "src_node_id": "given by the coordinator",
        "dst_node_id": "given by the coordinator",
        "reply_to_message_id": "given by the coordinator",
        "group_id": "given by the coordinator",
        "ttl": "what is left of the question's time, so that it tells when the answer was ready",
        "message_type": "of the question",
        "created_at": "when the answer was ready",
        "src_task_id": "not sent",
        "dst_task_id": "given by the coordinator",
    },
    "ObjectTree": {"object_id": "digest of a field", "children": "digests of its parts"},
}
"""Flower's messages from a site and their fields: none holds anything of a record but the time that a reply took."""


WITHHELD: tuple[str, ...] = (
    "number of records and units (without limits.release_counts)",
    "losses, accuracies and label counts, but for those in a noised evaluation",
    "sizes of samples and which units were drawn",
    "error texts and log lines",
    "features, their mean and scale, but for the noised centre or statistics",
    "gradients before clipping and noise",
    "buffers and every tensor that is not trained",
    "which records of a patient take part, which units are held out, and the key that decides it",
    "how long a step took, but for when the reply comes",
)
"""What a training program commonly sends, and this one does not."""


def known(action: str) -> dict[str, Field]:
    """The fields of the replies to one kind of question, by name."""
    return {field.name: field for field in FIELDS if field.action == action}


def check_outgoing(content: RecordDict, action: str, *, counts: bool) -> None:
    """Let a reply pass only if every field of it is listed.

    Args:
        content: what would leave.
        action: of the question.
        counts: whether the site's owner declares the number of units public.

    Raises:
        WireError: names the field that is not.
    """
    allowed = known(action)
    for name in _names(content):
        if name not in allowed:
            raise WireError(f"a reply to {action} with {name}, which no inventory lists")
        if name == "units" and not counts:
            raise WireError("a reply with the number of units, which limits.release_counts withholds")
    for record, arrays in content.array_records.items():
        widths = ("uint16",) if record == MASKED else ("int8", "int16", "int32")
        for name, array in arrays.items():
            if array.dtype not in widths:
                raise WireError(f"tensor {name} of {array.dtype} in {record}; expected {' or '.join(widths)}")
    if any(value != 1 for record in content.metric_records.values() for value in record.values()):
        raise WireError("a weight other than the constant 1")


def _names(content: RecordDict) -> Iterator[str]:
    for record in content:
        if record not in (ARRAYS, CONFIG, METRICS):  # MASKED among them: it is listed under its own name
            yield record
    if ARRAYS in content.array_records:
        yield "arrays"
    yield from content.config_records.get(CONFIG, {})
    yield from content.metric_records.get(METRICS, {})


def table() -> list[str]:
    """The fields as rows of a Markdown table; PRIVACY.md holds them, and a test compares."""
    rows = [f"| {one.action} | `{one.name}` | {one.what} | {one.mark.value} |" for one in FIELDS]
    return ["| answer to | field | what | status |", "|---|---|---|---|", *rows]


if __name__ == "__main__":
    sys.stdout.write("\n".join(table()) + "\n")
