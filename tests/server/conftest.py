# SPDX-License-Identifier: Apache-2.0
"""Plans, a coordinator's folder, Flower's link state and a site's end of it for the tests of `veil.server`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.constant import NOOP_ACCOUNT_NAME, NOOP_FLWR_AID
from flwr.server.superlink.linkstate import LinkState
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.object_store import NoObjectInStoreError

from veil.common.keys import NodeKey
from veil.common.plan import RunPlan
from veil.server.home import Home, Settings
from veil.server.link import open_link_state
from veil.server.pki import issue_certificate, make_authority


@pytest.fixture
def make_plan() -> Callable[..., RunPlan]:
    """A plan of two classes and numeric features; keywords are further tables or keys of it."""

    def make(**sections: Any) -> RunPlan:
        return RunPlan.model_validate(
            {
                "name": "server",
                "task": {"kind": "tabular-classification", "labels": ["a", "b"]},
                "training": {"rounds": 3},
                "privacy": {"target_epsilon": 3.0},
                **sections,
            }
        )

    return make


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """A coordinator's folder with an authority and a certificate for this machine."""
    made = Home.create(tmp_path / "coordinator", Settings(hosts=("localhost",)))
    make_authority(made.folder / "pki", "Study 7")
    issue_certificate(made.folder / "pki", ["localhost", "127.0.0.1", "::1"])
    return made


@pytest.fixture(scope="session")
def link_state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LinkState]:
    """Flower's own state of nodes, shared by all tests: keys are fresh, so that no test meets another's."""
    yield open_link_state(tmp_path_factory.mktemp("link") / "link.sqlite").state()


class SiteEnd:
    """A site's end of the link: what Flower's fleet handlers do for it, without the network."""

    def __init__(self, state: LinkState, node_id: int) -> None:
        self.state, self.node_id = state, node_id

    def connect(self) -> None:
        assert self.state.activate_node(self.node_id, 30)

    def disconnect(self) -> None:
        assert self.state.deactivate_node(self.node_id)

    def reconnect(self) -> None:
        self.disconnect()
        self.connect()

    def receive(self) -> Message | None:
        """The next message, or None when there is none, or when it was withdrawn on its way."""
        found = self.state.get_message_ins(node_id=self.node_id, limit=1)
        if not found:
            return None
        message_id = found[0].metadata.message_id
        try:
            contents = self._fetch(message_id, found[0].metadata.run_id)
        except NoObjectInStoreError:
            return None
        message = inflate_object_from_contents(message_id, contents)
        assert isinstance(message, Message)
        message.metadata.__dict__["_message_id"] = message_id
        self.state.object_store.delete(message_id)
        return message

    def _fetch(self, message_id: str, run_id: int) -> dict[str, bytes]:
        contents: dict[str, bytes] = {}
        for one in iterate_object_tree(self.state.object_store.get_object_tree(message_id)):
            while not contents.get(one.object_id):  # it is registered before it is there
                content = self.state.get_object(run_id, one.object_id)
                if content is None:
                    raise NoObjectInStoreError(one.object_id)
                contents[one.object_id] = content
        return contents

    def question(self) -> Message:
        """The message that is there."""
        message = self.receive()
        assert message is not None
        return message

    def send(self, reply: Message, *, withheld: Collection[str] = ()) -> Callable[[], None]:
        """Push a reply, without the objects that are withheld; what is returned pushes those."""
        reply.metadata.__dict__["_message_id"] = reply.object_id
        run_id = reply.metadata.run_id
        session = self.state.start_session(run_id)
        with no_object_id_recompute():
            objects = get_all_nested_objects(reply) if reply.has_content() else {}
            bare = remove_content_from_message(reply)
            stored, missing = self.state.store_message_and_object_tree(bare, get_object_tree(reply), session)
            contents = {one: objects[one].deflate() for one in missing if one in objects} if stored else {}
        for one in contents.keys() - set(withheld):
            self.state.store_object(run_id, session, one, contents[one])

        def push_the_rest() -> None:
            for one in contents.keys() & set(withheld):
                self.state.store_object(run_id, session, one, contents[one])

        return push_the_rest

    def answer(self, content: RecordDict) -> None:
        """Reply to the message that is there."""
        self.send(Message(content=content, reply_to=self.question()))


@pytest.fixture
def make_site_end() -> Callable[..., SiteEnd]:
    """A site's end of a link state, of a node of its own unless one is given; it is not connected yet."""

    def make(state: LinkState, node_id: int | None = None) -> SiteEnd:
        if node_id is None:
            key = NodeKey.generate().public_pem
            node_id = state.create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, key, 30)
        return SiteEnd(state, node_id)

    return make
