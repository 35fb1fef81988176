# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.server.link_grid`: whom it asks, what it takes for a reply, when a round ends, and what it leaves.

The link state is Flower's own; what sites do happens between two looks of the grid, so that nothing depends on speed.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.proto.message_pb2 import ObjectTree
from flwr.server.superlink.linkstate import LinkState
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_id, get_object_tree

from veil.common.errors import RunError
from veil.server import link_grid
from veil.server.link import open_link_state
from veil.server.link_grid import LinkGrid

Step = Callable[[], object]
SHORT_S, MOST_LOOKS = 0.4, 600


class Play:
    """What happens between two looks of the grid, one step after the other; then nothing, but not for ever."""

    def __init__(self) -> None:
        self.steps: Iterator[Step] = iter(())
        self.wanted = False

    def stop(self) -> None:
        self.wanted = True

    def __call__(self) -> bool:
        next(self.steps)()
        return self.wanted


@pytest.fixture
def play() -> Play:
    return Play()


@pytest.fixture
def grid(link_state: LinkState, play: Play) -> Iterator[LinkGrid]:
    with LinkGrid(link_state, stopped=play).running() as running:
        yield running


@pytest.fixture
def ask(grid: LinkGrid, play: Play) -> Callable[..., dict[int, Message]]:
    """One round: a question to each site, what happens meanwhile; the replies by node."""

    def ask(sites: list[Any], *steps: Step, timeout: float | None = None, enough: int = 1) -> dict[int, Message]:
        grid.cohort, grid.enough = [site.node_id for site in sites], enough
        play.steps = itertools.chain(steps, [nothing] * MOST_LOOKS, [too_long])
        messages = [Message(said("question"), node, "train") for node in grid.get_node_ids()]
        replies = list(grid.send_and_receive(messages, timeout=timeout))
        assert len({reply.metadata.src_node_id for reply in replies}) == len(replies)
        return {reply.metadata.src_node_id: reply for reply in replies}

    return ask


@pytest.fixture
def make_site(link_state: LinkState, make_site_end: Callable[..., Any]) -> Callable[..., Any]:
    def make(*, connected: bool = True) -> Any:
        site = make_site_end(link_state)
        site.connect()
        if not connected:
            site.disconnect()
        return site

    return make


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is waited for longer than the grid has to."""
    monkeypatch.setattr(link_grid, "ABSENCE_S", -1.0)
    monkeypatch.setattr(link_grid, "GRACE_S", 0.0)


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everybody is waited for, however long."""
    monkeypatch.setattr(link_grid, "ABSENCE_S", 1e6)
    monkeypatch.setattr(link_grid, "GRACE_S", 1e6)


def nothing() -> None:
    """One look more."""


def too_long() -> None:
    raise AssertionError(f"the round did not end within {MOST_LOOKS} looks")


def said(word: str) -> RecordDict:
    return RecordDict({"said": ConfigRecord({"word": word})})


def words(replies: dict[int, Message]) -> dict[int, object]:
    return {node: reply.content["said"]["word"] for node, reply in replies.items()}


def reply_to(question: Message, word: str = "answer") -> Message:
    return Message(content=said(word), reply_to=question)


Ask = Callable[..., dict[int, Message]]
MakeSite = Callable[..., Any]


# ---------------------------------------------------------------------------------------------------------------------
# Whom it asks, and what a reply is


@pytest.mark.usefixtures("patient")
def test_every_site_is_asked_and_its_reply_is_taken(ask: Ask, make_site: MakeSite) -> None:
    one, two = make_site(), make_site()
    replies = ask([one, two], lambda: one.answer(said("one")), nothing, lambda: two.answer(said("two")))
    assert words(replies) == {one.node_id: "one", two.node_id: "two"}


def test_a_site_gets_the_question_as_it_was_put(ask: Ask, make_site: MakeSite, grid: LinkGrid) -> None:
    site, seen = make_site(), []

    def look() -> None:
        seen.append(site.question())
        site.send(reply_to(seen[0]))

    ask([site], look)
    assert (seen[0].content, seen[0].metadata.message_type) == (said("question"), "train")
    assert (seen[0].metadata.src_node_id, seen[0].metadata.run_id) == (SUPERLINK_NODE_ID, grid.run.run_id)


def test_a_site_is_asked_once(ask: Ask, make_site: MakeSite) -> None:
    site, questions = make_site(), []

    def look() -> None:
        if (found := site.receive()) is not None:
            questions.append(found)

    ask([site], look, look, look, lambda: site.send(reply_to(questions[0])))
    assert len(questions) == 1


@pytest.mark.usefixtures("patient")
def test_a_site_that_connects_in_the_midst_is_asked_then(ask: Ask, make_site: MakeSite) -> None:
    site = make_site(connected=False)
    replies = ask([site], nothing, site.connect, nothing, lambda: site.answer(said("here")))
    assert words(replies) == {site.node_id: "here"}


def test_a_site_that_was_activated_anew_is_asked_again_and_its_first_question_is_void(
    ask: Ask, make_site: MakeSite
) -> None:
    site, questions = make_site(), []

    def fetch() -> None:
        questions.append(site.question())

    replies = ask(
        [site],
        fetch,
        site.reconnect,
        nothing,
        fetch,
        lambda: site.send(reply_to(questions[0], "to the first")),
        nothing,
        nothing,
        lambda: site.send(reply_to(questions[1], "to the second")),
    )
    assert questions[0].metadata.message_id != questions[1].metadata.message_id
    assert questions[0].content == questions[1].content
    assert words(replies) == {site.node_id: "to the second"}


def test_a_question_that_was_not_fetched_is_withdrawn_when_it_is_asked_again(ask: Ask, make_site: MakeSite) -> None:
    site, more = make_site(), []

    def answer() -> None:
        site.answer(said("once"))
        more.append(site.receive())

    replies = ask([site], site.reconnect, nothing, answer)
    assert (words(replies), more) == ({site.node_id: "once"}, [None])


def test_a_reply_to_an_earlier_round_is_never_taken(ask: Ask, make_site: MakeSite) -> None:
    site, questions = make_site(), []

    def fetch() -> None:
        questions.append(site.question())

    assert ask([site], fetch, timeout=SHORT_S) == {}
    replies = ask(
        [site],
        lambda: site.send(reply_to(questions[0], "late")),
        nothing,
        fetch,
        lambda: site.send(reply_to(questions[1], "in time")),
    )
    assert words(replies) == {site.node_id: "in time"}


def test_a_reply_counts_once_however_often_it_is_sent(ask: Ask, make_site: MakeSite) -> None:
    one, two = make_site(), make_site()

    def twice() -> None:
        question = one.question()
        one.send(reply_to(question, "first"))
        one.send(reply_to(question, "again"))

    replies = ask([one, two], twice, nothing, nothing, lambda: two.answer(said("two")), enough=2)
    assert set(replies) == {one.node_id, two.node_id}


def test_a_reply_is_taken_when_all_of_it_is_there(ask: Ask, make_site: MakeSite) -> None:
    site = make_site()
    rest: list[Step] = []

    def begin() -> None:
        reply = reply_to(site.question(), "whole")
        rest.append(site.send(reply, withheld=list(get_all_nested_objects(reply))[:1]))

    looks: list[int] = []
    replies = ask([site], begin, *[lambda: looks.append(1)] * 5, lambda: rest[0]())
    assert (words(replies), len(looks)) == ({site.node_id: "whole"}, 5)


def test_a_reply_bears_the_name_of_who_sent_it(ask: Ask, make_site: MakeSite) -> None:
    """The inner message may say what it likes."""
    site, other = make_site(), make_site()

    def forge() -> None:
        question = site.question()
        forged = reply_to(question, "forged")
        forged.metadata.__dict__["_src_node_id"] = other.node_id
        push(
            site, question, get_object_tree(forged), [one.deflate() for one in get_all_nested_objects(forged).values()]
        )

    assert words(ask([site], forge)) == {site.node_id: "forged"}


def push(site: Any, question: Message, tree: ObjectTree, contents: list[bytes]) -> None:
    """A reply in proper form around objects of any content."""
    bare = remove_content_from_message(reply_to(question))
    bare.metadata.__dict__["_message_id"] = tree.object_id
    run_id = question.metadata.run_id
    session = site.state.start_session(run_id)
    stored, _ = site.state.store_message_and_object_tree(bare, tree, session)
    assert stored
    for content in contents:
        assert site.state.store_object(run_id, session, get_object_id(content), content)


def leaf(content: bytes) -> tuple[ObjectTree, list[bytes]]:
    return ObjectTree(object_id=get_object_id(content)), [content]


def error_inside(question: Message) -> tuple[ObjectTree, list[bytes]]:
    return leaf(Message(Error(code=ErrorCode.UNKNOWN), reply_to=question).deflate())


def childless(question: Message) -> tuple[ObjectTree, list[bytes]]:
    """A message whose content is named and not part of the tree."""
    return leaf(reply_to(question).deflate())


GARBLED: dict[str, Callable[[Message], tuple[ObjectTree, list[bytes]]]] = {
    "no message": lambda question: leaf(ConfigRecord({"a": 1}).deflate()),
    "no protobuf": lambda question: leaf(b"Message  3\x00\xff\xff\xff"),
    "nothing": lambda question: leaf(b"Message  0\x00"),
    "an error inside": error_inside,
    "without its content": childless,
}


@pytest.mark.parametrize("kind", GARBLED)
def test_what_cannot_be_read_becomes_an_error_reply(ask: Ask, make_site: MakeSite, kind: str) -> None:
    one, two = make_site(), make_site()

    def garble() -> None:
        question = one.question()
        push(one, question, *GARBLED[kind](question))

    replies = ask([one, two], garble, lambda: two.answer(said("two")), enough=2)
    assert replies.keys() == {one.node_id, two.node_id}
    assert replies[one.node_id].has_error() and not replies[one.node_id].has_content()
    assert not replies[two.node_id].has_error()


def test_a_sites_own_error_is_its_reply(ask: Ask, make_site: MakeSite) -> None:
    site, more = make_site(), []

    def fail() -> None:
        site.send(Message(Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION), reply_to=site.question()))

    replies = ask([site], fail)
    more.append(site.receive())
    assert replies[site.node_id].has_error()
    assert more == [None]


# ---------------------------------------------------------------------------------------------------------------------
# When a round ends


@pytest.mark.usefixtures("patient")
def test_a_round_without_replies_ends_by_its_deadline(ask: Ask, make_site: MakeSite) -> None:
    assert ask([make_site(), make_site(connected=False)], timeout=SHORT_S) == {}


@pytest.mark.usefixtures("patient")
def test_by_the_deadline_it_has_what_came(ask: Ask, make_site: MakeSite) -> None:
    one, two = make_site(), make_site()
    assert words(ask([one, two], lambda: one.answer(said("one")), timeout=SHORT_S)) == {one.node_id: "one"}


def test_a_round_that_asks_nobody_is_over(ask: Ask) -> None:
    assert ask([]) == {}


@pytest.mark.usefixtures("impatient")
def test_with_enough_replies_an_absent_site_is_not_waited_for(ask: Ask, make_site: MakeSite) -> None:
    one, absent = make_site(), make_site(connected=False)
    assert words(ask([one, absent], lambda: one.answer(said("one")))) == {one.node_id: "one"}


@pytest.mark.usefixtures("impatient")
def test_a_site_that_left_with_its_question_is_absent(ask: Ask, make_site: MakeSite) -> None:
    one, two = make_site(), make_site()

    def leave() -> None:
        two.question()
        two.disconnect()

    assert words(ask([one, two], leave, nothing, lambda: one.answer(said("one")))) == {one.node_id: "one"}


@pytest.mark.usefixtures("patient")
def test_an_absent_site_is_waited_for_a_while(ask: Ask, make_site: MakeSite) -> None:
    one, absent = make_site(), make_site(connected=False)
    replies = ask(
        [one, absent],
        lambda: one.answer(said("one")),
        *[nothing] * 5,
        absent.connect,
        nothing,
        lambda: absent.answer(said("back")),
    )
    assert words(replies) == {one.node_id: "one", absent.node_id: "back"}


@pytest.mark.usefixtures("impatient")
def test_with_too_few_replies_an_absent_site_is_waited_for(ask: Ask, make_site: MakeSite) -> None:
    one, absent = make_site(), make_site(connected=False)
    replies = ask(
        [one, absent],
        lambda: one.answer(said("one")),
        *[nothing] * 5,
        absent.connect,
        nothing,
        lambda: absent.answer(said("back")),
        enough=2,
    )
    assert words(replies) == {one.node_id: "one", absent.node_id: "back"}


@pytest.mark.usefixtures("impatient")
def test_a_connected_site_that_was_never_late_is_waited_for(ask: Ask, make_site: MakeSite) -> None:
    one, slow = make_site(), make_site()
    replies = ask([one, slow], lambda: one.answer(said("one")), *[nothing] * 8, lambda: slow.answer(said("slow")))
    assert words(replies) == {one.node_id: "one", slow.node_id: "slow"}


@pytest.mark.usefixtures("impatient")
def test_a_site_that_was_late_is_not_waited_for_in_the_next_round(ask: Ask, make_site: MakeSite) -> None:
    one, late = make_site(), make_site()
    ask([one, late], lambda: one.answer(said("one")), timeout=SHORT_S)
    assert words(ask([one, late], lambda: one.answer(said("two")))) == {one.node_id: "two"}


def test_a_site_that_was_late_has_its_grace(ask: Ask, make_site: MakeSite, monkeypatch: pytest.MonkeyPatch) -> None:
    one, late = make_site(), make_site()
    ask([one, late], lambda: one.answer(said("one")), timeout=SHORT_S)
    monkeypatch.setattr(link_grid, "GRACE_S", 1e6)
    replies = ask([one, late], lambda: one.answer(said("two")), *[nothing] * 5, lambda: late.answer(said("late")))
    assert words(replies) == {one.node_id: "two", late.node_id: "late"}


@pytest.mark.usefixtures("impatient")
def test_a_site_that_is_in_time_again_is_late_no_more(ask: Ask, make_site: MakeSite) -> None:
    one, late = make_site(), make_site()

    def both() -> None:
        for site in (one, late):
            site.answer(said("in time"))

    ask([one, late], lambda: one.answer(said("one")), timeout=SHORT_S)
    ask([one, late], both)
    replies = ask([one, late], lambda: one.answer(said("one")), *[nothing] * 8, lambda: late.answer(said("slow")))
    assert words(replies) == {one.node_id: "one", late.node_id: "slow"}


def test_a_run_that_is_to_stop_stops_and_takes_its_questions_back(ask: Ask, make_site: MakeSite, play: Play) -> None:
    one, two = make_site(), make_site()
    with pytest.raises(RunError, match="stopped"):
        ask([one, two], lambda: one.answer(said("one")), play.stop, enough=2)
    assert two.receive() is None


def test_after_its_deadline_a_question_is_no_longer_there(ask: Ask, make_site: MakeSite) -> None:
    site = make_site()
    ask([site], timeout=SHORT_S)
    assert site.receive() is None


# ---------------------------------------------------------------------------------------------------------------------
# The run, and Flower's other words for it


def test_the_cohort_is_connected_or_not(grid: LinkGrid, make_site: MakeSite) -> None:
    here, gone = make_site(), make_site(connected=False)
    make_site()
    grid.cohort = [here.node_id, gone.node_id]
    assert set(grid.get_node_ids()) == {here.node_id, gone.node_id}
    assert grid.online() == {here.node_id}
    grid.cohort = []
    assert grid.online() == set()


def test_replies_can_be_pulled_each_once(grid: LinkGrid, make_site: MakeSite) -> None:
    site = make_site()
    message = grid.create_message(said("question"), "query.offer", site.node_id, "a group", ttl=60.0)
    ids = list(grid.push_messages([message]))
    assert list(grid.pull_messages(ids)) == []
    site.answer(said("answer"))
    (reply,) = grid.pull_messages(ids)
    assert reply.content == said("answer")
    assert list(grid.pull_messages(ids)) == []


def test_a_run_is_its_own_and_carries_no_bundle(grid: LinkGrid) -> None:
    run = grid.run
    grid.set_run(cast(Any, None))
    assert grid.run.run_id == run.run_id != 0
    assert (run.fab_id, run.fab_hash) == ("", "")


@pytest.fixture
def own_state(tmp_path: Path) -> LinkState:
    """A link state that no other test writes to."""
    return open_link_state(tmp_path / "link.sqlite").state()


def contents(state: LinkState) -> tuple[int, int, int]:
    """Questions, replies and objects in a link state."""
    return state.num_message_ins(), state.num_message_res(), len(state.object_store)


@pytest.mark.parametrize("broken", [False, True])
def test_a_run_leaves_no_message_behind(own_state: LinkState, make_site_end: Callable[..., Any], broken: bool) -> None:
    one, two = make_site_end(own_state), make_site_end(own_state)
    for site in (one, two):
        site.connect()
    with pytest.raises(OSError) if broken else nullcontext(), LinkGrid(own_state).running() as grid:
        questions = [Message(said("question"), site.node_id, "train") for site in (one, two)]
        list(grid.push_messages(questions))
        one.answer(said("answer"))
        two.send(reply := reply_to(two.question()), withheld=[reply.object_id])
        assert all(contents(own_state))
        if broken:
            raise OSError("the disk is gone")
    assert contents(own_state) == (0, 0, 0)
    details = grid.run.status
    assert (details.status, details.sub_status) == ("finished", "failed" if broken else "completed")


def test_the_messages_of_another_run_stay(own_state: LinkState, make_site_end: Callable[..., Any]) -> None:
    site = make_site_end(own_state)
    site.connect()
    with LinkGrid(own_state).running() as one:
        list(one.push_messages([Message(said("question"), site.node_id, "train")]))
        with LinkGrid(own_state).running() as two:
            list(two.push_messages([Message(said("question"), site.node_id, "train")]))
        question = site.question()
        assert (question.metadata.run_id, question.content) == (one.run.run_id, said("question"))


class Refusing:
    """A link state that grants no run."""

    def create_run(self, *_: object) -> int:
        return 0


def test_a_run_that_is_not_granted_is_an_error_for_a_person() -> None:
    grid = LinkGrid(cast(LinkState, Refusing()))
    with pytest.raises(RunError, match="did not grant"), grid.running():
        raise AssertionError("a run without a run")


@pytest.mark.usefixtures("impatient")
def test_a_slow_site_that_fell_behind_can_return(ask: Ask, make_site: MakeSite) -> None:
    """Its grace is twice its last reply, although that is longer than the others took."""
    one, slow = make_site(), make_site()

    def pause() -> None:
        time.sleep(SHORT_S)

    ask([one, slow], lambda: one.answer(said("one")), pause, lambda: slow.answer(said("slow")))
    ask([one, slow], lambda: one.answer(said("two")), timeout=SHORT_S)
    replies = ask([one, slow], lambda: one.answer(said("three")), pause, lambda: slow.answer(said("back")))
    assert words(replies) == {one.node_id: "three", slow.node_id: "back"}
