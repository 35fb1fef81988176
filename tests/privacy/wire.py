# SPDX-License-Identifier: Apache-2.0
"""Mistakes with what travels: counts beside a release, words from inside a site, bytes that run.

Replies are read as the coordinator gets them, from the site's own ClientApp.
"""

from __future__ import annotations

import io
import tempfile
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.common.serde import recorddict_to_proto
from flwr.supercore.task_identity import TaskIdentity
from tests.privacy.scene import drawn, evaluated, numbers, plan, replaced, request, silent, stage
from tests.statistical.checks import check_scale

from veil.client import app, release
from veil.client.release import evaluation_update
from veil.client.site import Site
from veil.client.units import Units
from veil.common.conversion import converted
from veil.common.errors import WeightsError
from veil.common.exchange import RoundReply, RoundRequest
from veil.common.noise import NoiseSource, OSNoise
from veil.common.plan import RunPlan
from veil.common.privacy import Mechanism
from veil.common.schedule import ReleaseKind, schedule
from veil.common.update import Adapter, Update
from veil.common.weights import fingerprint
from veil.common.wire import METRICS, WireError, decode_adapter, encode_reply, encode_request


def _reply(site: Site, asked: RoundRequest) -> RecordDict:
    """What goes back to the coordinator."""
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1
    context = Context(run_id=1, node_id=2, node_config={}, state=RecordDict(), run_config={})
    message = Message(encode_request(asked), 2, "train")
    return app.client_app(lambda _: site)(message=message, context=context).content


def guard_weight_is_constant() -> None:
    """But for the noised points and the ledger's head, sites of 3 and of 300 units send the same."""
    sent = []
    for count in (3, 300):
        with stage() as scene:
            content = _reply(scene.site(drawn(count)), request(plan(), 1, 6))
        config = {name: value for name, value in content.config_records["config"].items() if name != "head"}
        sent.append((config, dict(content.metric_records[METRICS]), sorted(content)))
    assert sent[0] == sent[1], f"sites of 3 and 300 units differ in {sent}"


def weighted_by_count() -> AbstractContextManager[None]:
    """Each update comes with the number of records behind it, for a weighted mean."""
    counts: list[int] = []
    ours = Site._reply

    def counting(self: Site, asked: RoundRequest, **told: Any) -> RoundReply:
        counts.append(self.units(asked.plan).count)
        return ours(self, asked, **told)

    def variant(reply: RoundReply) -> RecordDict:
        content = encode_reply(reply)
        content[METRICS] = MetricRecord({"num-examples": counts[-1]})
        return content

    return replaced((Site, "_reply", counting), (app, "encode_reply", variant))


def guard_evaluation() -> None:
    """What an evaluation says of held-out records carries the noise that its line in the schedule names."""
    of = evaluated()
    step = schedule(of)[-1]
    assert step.kind is ReleaseKind.EVALUATION, "the plan's evaluation is no release"
    records, asked = replace(drawn(20), held=drawn(30, seed=1)), request(of, step.round, 6)
    scale = step.mechanism.noise_multiplier * step.mechanism.max_grad_norm
    clean = numbers(release.draw(asked, step, records, silent()))
    sent = [numbers(release.draw(asked, step, records, OSNoise())) for _ in range(400)]
    check_scale((np.concatenate(sent) - np.tile(clean, len(sent))) / scale)


def exact_metrics() -> AbstractContextManager[None]:
    """Accuracy and loss are sent as they were measured."""

    def variant(held: Units, adapter: Adapter, paid: Mechanism, noise: NoiseSource, **how: Any) -> Update:
        return evaluation_update(held, adapter, paid, silent(), **how)

    return replaced((release, "evaluation_update", variant))


NAME = "Erika Mustermann"


def guard_error_is_a_code() -> None:
    """An error that quotes a record leaves as one word."""

    def unreadable(_: RunPlan) -> Units:
        raise ValueError(f"cannot read the age of {NAME}")

    with stage() as scene:
        content = _reply(scene.site(unreadable), request(plan(), 1, 6))
    sent = recorddict_to_proto(content).SerializeToString()
    assert NAME.encode() not in sent, f"{NAME} left the site"
    assert content.config_records["config"]["refusal"] == "internal"


def error_sent() -> AbstractContextManager[None]:
    """The exception's text is the answer, so that the coordinator can help."""
    ours = Site._release

    def variant(self: Site, asked: RoundRequest) -> RoundReply:
        try:
            return self._reply(asked, released=ours(self, asked))
        except Exception as error:
            word: Any = str(error)
            return RoundReply(site=self.policy.name, job=asked.job, round=asked.round, refusal=word)

    return replaced((Site, "answer", variant))


class Payload:
    """A pickle that runs code when it is read."""

    ran = False

    def __reduce__(self) -> tuple[Any, ...]:
        return setattr, (Payload, "ran", True)


def guard_weights_do_not_run() -> None:
    """A weights file that is a hostile pickle is refused, and nothing in it runs."""
    Payload.ran = False
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "efficientnet-lite0-hostile.pth"
        torch.save({"_fc.bias": Payload()}, file)
        with suppress(WeightsError):
            converted(fingerprint(f"path:{folder}", base=Path()))
    assert not Payload.ran, "code in a weights file ran"


def full_load() -> AbstractContextManager[None]:
    """`torch.load` without `weights_only`."""
    return replaced((torch, "load", _full_load))


_torch_load = torch.load


def _full_load(file: Path, **_: Any) -> Any:
    return _torch_load(file, weights_only=False)


def guard_arrays_do_not_run() -> None:
    """An array in a message that is a pickle is refused, and nothing in it runs."""
    Payload.ran = False
    buffer = io.BytesIO()
    np.save(buffer, np.array([Payload()], dtype=object), allow_pickle=True)
    hostile = Array(dtype="object", shape=(1,), stype="numpy.ndarray", data=buffer.getvalue())
    with suppress(WireError):
        decode_adapter(ArrayRecord({"head.weight": hostile}))
    assert not Payload.ran, "code in a message ran"


def pickled_arrays() -> AbstractContextManager[None]:
    """Arrays are read with `allow_pickle`."""
    ours = np.load

    def variant(file: Any, **_: Any) -> Any:
        return ours(file, allow_pickle=True)

    return replaced((np, "load", variant))
