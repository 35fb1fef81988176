# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.server.supervisor`: what is lost or hangs is replaced, and one folder has one coordinator."""

from __future__ import annotations

import logging
import math
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from fastapi import FastAPI, Response

from veil.common.errors import InputError
from veil.common.plan import RunPlan
from veil.common.supervision import Child
from veil.server.home import PULSE_PATH, Home
from veil.server.jobs import Job, Phase
from veil.server.pki import make_authority
from veil.server.supervisor import MOST_LOSSES, MOST_RUNNERS, Supervisor

EVERYWHERE = "0.0.0.0"  # noqa: S104
LINK, RUNNER = "veil.server.link_server", "veil.server.runner"
Serve = Callable[[FastAPI, tuple[Path, Path]], str]
Submit = Callable[[], Job]


class FakeChild(Child):
    """A child without a process; it started long ago, so that nothing waits before it is replaced."""

    def __init__(self, module: str, arguments: Sequence[str]) -> None:
        self.module, self.arguments = module, list(arguments)
        self.started_at = -math.inf
        self.code: int | None = None

    @property
    def exit_code(self) -> int | None:
        return self.code

    def end(self) -> int:
        self.code = -15 if self.code is None else self.code
        return self.code

    def kill(self) -> int:
        self.code = -9
        return self.code


class Script(threading.Event):
    """What happens between two looks of the supervisor, one step after the other; then it is to stop."""

    def __init__(self, *steps: Callable[[], object]) -> None:
        super().__init__()
        self._steps = list(steps)

    def wait(self, timeout: float | None = None) -> bool:
        if self._steps:
            self._steps.pop(0)()
        else:
            self.set()
        return self.is_set()


class Stage:
    """A supervisor whose children are fakes."""

    def __init__(self, home: Home) -> None:
        self.children: list[FakeChild] = []
        self.supervisor = Supervisor(home=home, spawn=self._spawn)

    def _spawn(self, module: str, arguments: Sequence[str]) -> Child:
        self.children.append(FakeChild(module, arguments))
        return self.children[-1]

    def play(self, *steps: Callable[[], object]) -> None:
        self.supervisor.run(Script(*steps))

    def of(self, module: str) -> list[FakeChild]:
        return [child for child in self.children if child.module == module]

    def lose(self, module: str = RUNNER) -> None:
        """The newest child of a kind dies."""
        self.of(module)[-1].code = 1

    def runs(self) -> list[str]:
        """Names of the runs in the order in which runners were started for them."""
        return [child.arguments[1] for child in self.of(RUNNER)]


@pytest.fixture
def stage(home: Home) -> Stage:
    return Stage(home)


@pytest.fixture
def submit(home: Home, make_plan: Callable[..., RunPlan]) -> Submit:
    return lambda: Job.submit(home.runs, make_plan(), ())


def nothing() -> None:
    """One look more."""


def age(path: Path, seconds: float) -> None:
    os.utime(path, (path.stat().st_atime, path.stat().st_mtime - seconds))


def test_the_link_and_a_runner_for_each_run_under_way(home: Home, stage: Stage, submit: Submit) -> None:
    submitted, training, finished, failed, stopped = [submit() for _ in range(5)]
    training.note(phase=Phase.TRAINING)
    for job, phase in ((finished, Phase.FINISHED), (failed, Phase.FAILED), (stopped, Phase.STOPPED)):
        job.note(phase=phase)
    stage.play(nothing, nothing)
    assert [child.arguments for child in stage.of(LINK)] == [[str(home.folder)]]
    assert sorted(stage.runs()) == sorted([submitted.name, training.name])
    assert all(child.arguments[0] == str(home.folder) for child in stage.children)


def test_a_link_begun_is_the_one_that_is_kept_and_ended(stage: Stage) -> None:
    stage.supervisor.begin()
    (link,) = stage.of(LINK)
    assert link.exit_code is None
    stage.play(nothing)
    assert stage.of(LINK) == [link]
    assert link.exit_code is not None


def test_a_run_that_is_submitted_later_is_started(stage: Stage, submit: Submit) -> None:
    jobs: list[Job] = []
    stage.play(lambda: jobs.append(submit()), nothing)
    assert stage.runs() == [job.name for job in jobs]


def test_a_run_waits_while_enough_are_under_way(stage: Stage, submit: Submit) -> None:
    jobs = {job.name: job for job in (submit() for _ in range(MOST_RUNNERS + 1))}

    def finish() -> None:
        assert len(stage.runs()) == MOST_RUNNERS
        jobs[stage.runs()[-1]].note(phase=Phase.FINISHED)
        stage.lose()

    stage.play(finish, nothing, nothing)
    assert set(stage.runs()) == set(jobs)
    assert len(stage.runs()) == MOST_RUNNERS + 1


@pytest.mark.parametrize("phase", [Phase.FINISHED, Phase.FAILED, Phase.STOPPED])
def test_a_runner_that_ended_its_run_is_not_replaced(stage: Stage, submit: Submit, phase: Phase) -> None:
    job = submit()

    def end() -> None:
        job.note(phase=phase, message="as it ended")
        stage.lose()

    stage.play(end, nothing, nothing)
    assert (len(stage.runs()), job.status.phase, job.status.message) == (1, phase, "as it ended")


def test_a_lost_runner_is_replaced_for_the_same_run(stage: Stage, submit: Submit) -> None:
    job = submit()
    stage.play(stage.lose, nothing)
    assert stage.runs() == [job.name, job.name]
    assert not job.status.phase.over


def test_a_run_whose_runner_is_lost_again_and_again_is_given_up(stage: Stage, submit: Submit) -> None:
    job = submit()
    stage.play(*[stage.lose] * (MOST_LOSSES + 1), nothing, nothing)
    assert stage.runs() == [job.name] * (MOST_LOSSES + 1)
    assert job.status.phase is Phase.FAILED
    assert f"lost {MOST_LOSSES + 1} times" in job.status.message


def test_a_run_that_gets_on_between_losses_is_not_given_up(stage: Stage, submit: Submit) -> None:
    job, losses = submit(), 3 * MOST_LOSSES

    def lose_after_a_round() -> None:
        job.note(rounds_done=job.status.rounds_done + 1)
        stage.lose()

    stage.play(*[lose_after_a_round] * losses, nothing)
    assert len(stage.runs()) == losses + 1
    assert not job.status.phase.over


def test_losses_count_from_the_last_round_on(stage: Stage, submit: Submit) -> None:
    job = submit()

    def lose_after_a_round() -> None:
        job.note(rounds_done=1)
        stage.lose()

    stage.play(*[stage.lose] * MOST_LOSSES, lose_after_a_round, *[stage.lose] * (MOST_LOSSES - 1), nothing)
    assert not job.status.phase.over
    stage.play(*[stage.lose] * (MOST_LOSSES + 1), nothing)
    assert job.status.phase is Phase.FAILED


def test_a_run_that_was_given_up_can_be_resumed(stage: Stage, submit: Submit) -> None:
    job = submit()
    stage.play(*[stage.lose] * (MOST_LOSSES + 1), nothing, job.resume, nothing, stage.lose, nothing)
    assert len(stage.runs()) == MOST_LOSSES + 3
    assert not job.status.phase.over


def test_a_runner_that_hangs_is_killed_and_replaced(stage: Stage, submit: Submit) -> None:
    job = submit()
    stage.play(lambda: age(job.folder / "beat", 290), nothing, lambda: age(job.folder / "beat", 20), nothing, nothing)
    assert [child.code for child in stage.of(RUNNER)] == [-9, -15]
    assert stage.runs() == [job.name, job.name]


def test_another_runner_is_left_alone(stage: Stage, submit: Submit) -> None:
    hung, fine = submit(), submit()
    stage.play(lambda: age(hung.folder / "beat", 301), nothing, nothing)
    assert sorted(stage.runs()) == sorted([hung.name, hung.name, fine.name])


def test_runs_work_while_every_runner_does_something(stage: Stage, submit: Submit) -> None:
    idle, job = submit(), submit()
    idle.note(phase=Phase.FINISHED)
    seen = [stage.supervisor.runs_work()]

    def look() -> None:
        seen.append(stage.supervisor.runs_work())

    stage.play(look, lambda: age(job.folder / "beat", 301), look)
    assert seen == [True, True, False]


def test_a_lost_link_is_replaced(stage: Stage) -> None:
    stage.play(lambda: stage.lose(LINK), nothing, lambda: stage.lose(LINK), nothing)
    assert len(stage.of(LINK)) == 3


@pytest.mark.parametrize("answers", [True, False])
def test_a_link_that_does_not_answer_is_replaced(stage: Stage, monkeypatch: pytest.MonkeyPatch, answers: bool) -> None:
    monkeypatch.setattr("veil.server.supervisor._ASK_LINK_S", 0.0)
    monkeypatch.setattr("veil.server.supervisor.HUNG_LINK_S", 0.0)
    monkeypatch.setattr(Supervisor, "_link_answers", lambda self, context: answers)
    stage.play(nothing, nothing)
    assert (stage.of(LINK)[0].exit_code, len(stage.of(LINK)) == 1) == ((-15, True) if answers else (-9, False))


def test_the_link_starts_anew_with_a_new_certificate(home: Home, stage: Stage) -> None:
    certificate = home.path(home.settings.certificate)
    alive: list[bool] = []
    stage.play(
        nothing,
        lambda: alive.append(stage.of(LINK)[0].exit_code is None),
        lambda: age(certificate, -5),
        nothing,
        lambda: alive.append(stage.of(LINK)[-1].exit_code is None),
    )
    assert alive == [True, True]
    assert len(stage.of(LINK)) == 2
    assert stage.of(LINK)[0].exit_code == -15


def test_an_exchanged_certificate_is_no_error_and_a_lost_link_is_one(
    home: Home, stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "veil.server.supervisor")
    stage.play(nothing, lambda: age(home.path(home.settings.certificate), -5), nothing)
    assert [(one.levelname, "certificate was exchanged" in one.message) for one in caplog.records] == [("INFO", True)]
    stage.play(lambda: stage.lose(LINK), nothing)
    assert (caplog.records[-1].levelname, caplog.records[-1].message) == ("ERROR", "the link ended with code 1")


def test_a_certificate_in_the_midst_of_its_exchange_ends_nothing(home: Home, stage: Stage) -> None:
    certificate = home.path(home.settings.certificate)
    aside = certificate.with_suffix(".aside")

    def back() -> None:
        assert len(stage.of(LINK)) == 1
        aside.rename(certificate)

    stage.play(lambda: certificate.rename(aside), nothing, back, nothing)
    assert len(stage.of(LINK)) == 1


def test_all_children_end_with_the_supervisor(stage: Stage, submit: Submit) -> None:
    submit()
    stage.play(nothing)
    assert [child.code for child in stage.children] == [-15, -15]


def test_all_children_end_when_something_breaks(stage: Stage, submit: Submit) -> None:
    submit()

    def break_() -> None:
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        stage.play(break_)
    assert [child.code for child in stage.children] == [-15, -15]


def test_one_folder_has_one_coordinator(home: Home) -> None:
    with Supervisor(home=home).exclusive():
        assert home.pid_file.read_text(encoding="ascii") == str(os.getpid())
        with (
            pytest.raises(InputError, match=f"in use by process {os.getpid()}"),
            Supervisor(home=home).exclusive(),
        ):
            raise AssertionError("two coordinators")
        assert home.pid_file.read_text(encoding="ascii") == str(os.getpid())
    with Supervisor(home=home).exclusive():
        pass


def test_a_pid_left_by_a_crash_locks_nothing(home: Home) -> None:
    home.pid_file.write_text("4194304999", encoding="ascii")
    with Supervisor(home=home).exclusive():
        assert home.pid_file.read_text(encoding="ascii") == str(os.getpid())


def test_the_right_to_the_folder_ends_with_an_error(home: Home) -> None:
    with pytest.raises(RuntimeError), Supervisor(home=home).exclusive():
        raise RuntimeError
    with Supervisor(home=home).exclusive():
        pass


def pulsing(home: Home, serve: Serve, status: int = 204, listen: str = EVERYWHERE) -> Home:
    """The folder of a coordinator whose link answers with a status."""
    app = FastAPI()
    app.add_api_route(PULSE_PATH, lambda: Response(status_code=status))
    url = serve(app, (home.path(home.settings.certificate), home.path(home.settings.key)))
    port = int(url.rpartition(":")[2])
    return Home(folder=home.folder, settings=home.settings.model_copy(update={"port": port, "listen": listen}))


@pytest.mark.parametrize("listen", [EVERYWHERE, "127.0.0.1", "localhost"])
def test_a_link_that_answers_works(home: Home, serve: Serve, listen: str) -> None:
    assert Supervisor(home=pulsing(home, serve, listen=listen)).link_works()


@pytest.mark.parametrize("listen", ["::", "::1"])
def test_an_address_of_version_six_can_be_asked(home: Home, serve: Serve, listen: str) -> None:
    """Nothing listens there; it is asked and found out."""
    assert not Supervisor(home=pulsing(home, serve, listen=listen)).link_works()


def test_a_link_that_cannot_read_its_database_does_not_work(home: Home, serve: Serve) -> None:
    assert not Supervisor(home=pulsing(home, serve, status=500)).link_works()


def test_a_stranger_on_the_port_is_not_the_link(home: Home, serve: Serve, tmp_path: Path) -> None:
    found = pulsing(home, serve)
    other = make_authority(tmp_path / "other", "Another")
    ca = found.settings.model_copy(update={"ca": str(other)})
    assert not Supervisor(home=Home(folder=found.folder, settings=ca)).link_works()
