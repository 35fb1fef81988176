# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil coordinator …`: exit codes, what is printed and what never is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from veil.common.invitation import Invitation
from veil.common.keys import NodeKey
from veil.common.plan import RunPlan
from veil.server import cli
from veil.server.home import Home
from veil.server.jobs import Job, Phase
from veil.server.link import open_link_state
from veil.server.pki import issue_certificate, make_authority
from veil.server.roster import Roster
from veil.server.tls_certificate import describe
from veil.simulations.cli import run_command

Veil = Callable[..., tuple[int, str, str]]
PLAN = """
name = "study"
[task]
kind = "tabular-classification"
labels = ["a", "b"]
width = 3
[training]
rounds = 2
[privacy]
target_epsilon = 3.0
"""


@pytest.fixture
def folder(home: Home) -> Path:
    return home.folder


@pytest.fixture
def veil(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Veil:
    """Run one word of the coordinator's; exit code, stdout, stderr."""
    monkeypatch.setenv("VEIL_COORDINATOR_HOME", str(folder))
    monkeypatch.setattr(cli, "_FOLLOW_S", 0.01)

    def run(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = run_command(["coordinator", *map(str, words)])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    path = tmp_path / "plan.toml"
    path.write_text(PLAN, encoding="utf-8")
    return path


@pytest.fixture
def enrolled(home: Home) -> None:
    """Bonn and Ulm are enrolled."""
    ca = home.path(home.settings.ca).read_text(encoding="ascii")
    with closing(Roster(home.roster, open_link_state(home.database).state())) as roster:
        for name in ("Bonn", "Ulm"):
            roster.admit(roster.invite(name, home.url, ca, 1).secret, NodeKey.generate().public_pem)


@pytest.fixture
def job(home: Home, make_plan: Callable[..., RunPlan]) -> Job:
    return Job.submit(home.runs, make_plan(name="study"), ("Bonn", "Ulm"))


def refused(answer: tuple[int, str, str], *words: str, code: int = 2) -> None:
    """The last line says value, expectation and remedy; nothing else is said."""
    got, out, err = answer
    assert (got, out) == (code, ""), err
    assert err.startswith("veil: ") and "Expected: " in err and "Remedy: " in err
    assert "Traceback" not in err
    for one in words:
        assert one in err


# ---------------------------------------------------------------------------------------------------------------------
# init, certify


def test_init_makes_a_folder_that_can_be_opened(veil: Veil, tmp_path: Path) -> None:
    target = tmp_path / "new"
    code, out, _ = veil("init", "--host", "study.example.org", "--host", "10.0.0.7", "--port", 9443, "--home", target)
    made = Home.open(target)
    assert (code, made.settings.hosts, made.url) == (
        0,
        ("study.example.org", "10.0.0.7"),
        "https://study.example.org:9443",
    )
    assert made.url in out and f"veil coordinator start --home {target}" in out
    assert describe(made.path(made.settings.certificate).read_bytes()).days_left > 300
    for key in ("pki/ca.key", "pki/link.key"):
        assert (target / key).stat().st_mode & 0o077 == 0
        assert (target / key).read_text(encoding="ascii").splitlines()[1] not in out


def test_init_a_second_time_is_refused_and_changes_nothing(veil: Veil, folder: Path) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    refused(veil("init", "--host", "elsewhere.example.org", "--home", folder), "coordinator.toml exists")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "given", [["--certificate"], ["--key"], ["--ca"], ["--certificate", "--key"], ["--key", "--ca"]]
)
def test_a_brought_certificate_is_brought_whole(veil: Veil, tmp_path: Path, given: list[str]) -> None:
    words = [word for option in given for word in (option, str(tmp_path / "x.pem"))]
    refused(veil("init", "--host", "localhost", "--home", tmp_path / "new", *words), "all three")
    assert not (tmp_path / "new").exists()


def test_a_brought_certificate_is_named_in_the_settings(veil: Veil, tmp_path: Path) -> None:
    ca = make_authority(tmp_path / "own", "A hospital's own")
    chain, key = issue_certificate(tmp_path / "own", ["localhost"])
    brought = ("--certificate", chain, "--key", key, "--ca", ca)
    code, _, err = veil("init", "--host", "localhost", "--home", tmp_path / "new", *brought)
    assert code == 0, err
    made = Home.open(tmp_path / "new")
    assert made.path(made.settings.ca).read_bytes() == ca.read_bytes()
    assert not (tmp_path / "new" / "pki").exists()
    refused(veil("certify", "--home", tmp_path / "new"), "")


def test_a_brought_certificate_for_another_name_is_refused(veil: Veil, tmp_path: Path) -> None:
    ca = make_authority(tmp_path / "own", "A hospital's own")
    chain, key = issue_certificate(tmp_path / "own", ["localhost"])
    brought = ("--certificate", chain, "--key", key, "--ca", ca)
    refused(veil("init", "--host", "study.example.org", "--home", tmp_path / "new", *brought), "study.example.org")
    assert not (tmp_path / "new").exists()


def test_certify_issues_another_certificate(veil: Veil, home: Home) -> None:
    path = home.path(home.settings.certificate)
    before = path.read_bytes()
    code, out, _ = veil("certify")
    assert (code, path.read_bytes() != before) == (0, True)
    assert f"{describe(path.read_bytes()).not_after:%Y-%m-%d}" in out


@pytest.mark.parametrize("words", [["status"], ["certify"], ["revoke", "Ulm"], ["stop", "x"], ["resume", "x"]])
def test_a_folder_that_is_none_is_refused(veil: Veil, tmp_path: Path, words: list[str]) -> None:
    refused(veil(*words, "--home", tmp_path / "nowhere"), "has no coordinator.toml")
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    "words", [["init"], ["invite", "Ulm"], ["revoke"], ["run"], ["launch"], ["invite", "--secret"]]
)
def test_a_command_line_that_is_wrong_is_bad_usage(veil: Veil, words: list[str]) -> None:
    code, _, err = veil(*words)
    assert code == 2
    assert "Traceback" not in err


# ---------------------------------------------------------------------------------------------------------------------
# invite, revoke


def test_an_invitation_is_a_file_for_its_owner_and_its_secret_is_nowhere_else(
    veil: Veil, home: Home, tmp_path: Path
) -> None:
    target = tmp_path / "ulm.toml"
    code, out, err = veil("invite", "Ulm", "--output", target)
    invitation = Invitation.read(target)
    assert (code, invitation.site, invitation.url) == (0, "Ulm", home.url)
    assert target.stat().st_mode & 0o777 == 0o600
    assert str(target) in out and invitation.secret not in out + err
    kept = [path for path in home.folder.rglob("*") if path.is_file()]
    assert all(invitation.secret.encode() not in path.read_bytes() for path in kept)


def test_an_invitation_that_cannot_be_written_withdraws_none(veil: Veil, home: Home, tmp_path: Path) -> None:
    target = tmp_path / "ulm.toml"
    veil("invite", "Ulm", "--output", target)
    refused(veil("invite", "Ulm", "--output", target), "ulm.toml")
    refused(veil("invite", "Ulm", "--output", tmp_path / "none" / "ulm.toml"), "folder")
    with closing(Roster(home.roster, open_link_state(home.database).state())) as roster:
        assert roster.admit(Invitation.read(target).secret, NodeKey.generate().public_pem) == "Ulm"


@pytest.mark.usefixtures("enrolled")
def test_an_enrolled_site_is_not_invited(veil: Veil, tmp_path: Path) -> None:
    refused(veil("invite", "Ulm", "--output", tmp_path / "ulm.toml"), "Ulm is enrolled")
    assert not (tmp_path / "ulm.toml").exists()


@pytest.mark.parametrize("name", ["", "a\nb", "x" * 200])
def test_a_name_that_is_none_is_refused(veil: Veil, tmp_path: Path, name: str) -> None:
    refused(veil("invite", name, "--output", tmp_path / "ulm.toml"), "no invitation")


@pytest.mark.usefixtures("enrolled")
def test_revoke_turns_a_site_out(veil: Veil) -> None:
    assert veil("revoke", "Ulm")[:2] == (0, "revoked Ulm\n")
    said = {one["name"]: one["revoked_at"] is not None for one in json.loads(veil("status", "--json")[1])["sites"]}
    assert said == {"Bonn": False, "Ulm": True}
    assert "site Ulm  revoked" in veil("status")[1]


def test_revoke_of_a_stranger_is_refused(veil: Veil) -> None:
    refused(veil("revoke", "Ulm"), "Ulm")


def test_no_option_takes_a_secret() -> None:
    """A command line is everybody's to read."""
    import typer

    command: Any = typer.main.get_command(cli.app)
    options = {name for one in command.commands.values() for option in one.params for name in option.opts}
    assert {"--host", "--output", "--site"} <= options
    assert not [name for name in options if any(word in name for word in ("secret", "password", "token"))]


# ---------------------------------------------------------------------------------------------------------------------
# run, status, stop, resume


@pytest.mark.usefixtures("enrolled")
def test_a_detached_run_is_submitted_and_left_alone(veil: Veil, home: Home, plan: Path) -> None:
    code, out, _ = veil("run", plan, "--detach")
    (job,) = Job.all(home.runs)
    assert (code, out) == (0, f"{job.name}\n")
    assert (job.sites, job.status.phase) == (("Bonn", "Ulm"), Phase.SUBMITTED)
    code, out, _ = veil("run", plan, "--detach", "--json")
    assert json.loads(out)["run"] in {one.name for one in Job.all(home.runs)} - {job.name}


@pytest.mark.usefixtures("enrolled")
def test_a_run_asks_the_sites_that_are_named(veil: Veil, home: Home, plan: Path) -> None:
    plan.write_text(PLAN + "[cohort]\nmin_sites = 1\n", encoding="utf-8")
    assert veil("run", plan, "--site", "Ulm", "--detach")[0] == 0
    assert Job.all(home.runs)[0].sites == ("Ulm",)


@pytest.mark.usefixtures("enrolled")
def test_a_run_with_an_unknown_site_is_refused(veil: Veil, home: Home, plan: Path) -> None:
    refused(veil("run", plan, "--site", "Ulm", "--site", "Verl"), "Verl: not enrolled")
    assert Job.all(home.runs) == []


@pytest.mark.parametrize("text", ["", "name =", PLAN.replace("rounds", "roundz"), PLAN.replace("3.0", "-1")])
def test_a_plan_that_is_none_is_refused(veil: Veil, home: Home, plan: Path, text: str) -> None:
    plan.write_text(text, encoding="utf-8")
    refused(veil("run", plan), "")
    assert Job.all(home.runs) == []


def test_a_plan_that_is_not_there_is_refused(veil: Veil, tmp_path: Path) -> None:
    refused(veil("run", tmp_path / "nowhere.toml"), "nowhere.toml")


class Coordinator:
    """What the runner of a run does, seen from the command line: it notes how the run goes on."""

    def __init__(self, home: Home, *notes: dict[str, object]) -> None:
        self._home, self._notes, self._stop = home, notes, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Coordinator:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(0.01):
            for job in Job.all(self._home.runs):
                if job.status.phase is Phase.SUBMITTED:
                    (job.folder / "result").mkdir(exist_ok=True)
                    (job.folder / "result" / "report.json").write_text('{"job": "it"}', encoding="utf-8")
                    for note in self._notes:
                        job.note(**note)
                        self._stop.wait(0.3)


ON = {"phase": Phase.TRAINING, "rounds": 3, "rounds_done": 1, "sites": {"Ulm": "replied", "Bonn": "budget"}}


@pytest.mark.usefixtures("enrolled")
def test_a_run_is_followed_to_its_end(veil: Veil, home: Home, plan: Path) -> None:
    with Coordinator(home, ON, {"phase": Phase.FINISHED, "rounds_done": 3}):
        code, out, _ = veil("run", plan)
    (job,) = Job.all(home.runs)
    lines = out.splitlines()
    assert (code, lines[0], lines[-1]) == (0, f"run {job.name}", f"finished: {job.folder / 'result'}")
    assert lines.count("training  1/3  Bonn: refused (budget: the run would pass its budget), Ulm: replied") == 1


@pytest.mark.usefixtures("enrolled")
def test_as_json_a_run_is_its_report_and_nothing_else(veil: Veil, home: Home, plan: Path) -> None:
    with Coordinator(home, ON, {"phase": Phase.FINISHED}):
        code, out, _ = veil("run", plan, "--json")
    assert (code, json.loads(out)) == (0, {"job": "it"})


@pytest.mark.usefixtures("enrolled")
def test_a_run_that_fails_is_exit_code_four_with_its_reason(veil: Veil, home: Home, plan: Path) -> None:
    with Coordinator(home, {"phase": Phase.FAILED, "message": "1 sites take part (Bonn: budget)"}):
        answer = veil("run", plan, "--json")
    refused(answer, "Bonn: budget", f"veil coordinator resume {Job.all(home.runs)[0].name}", code=4)


@pytest.mark.usefixtures("enrolled")
def test_status_shows_sites_and_runs(veil: Veil, home: Home, job: Job) -> None:
    job.note(**ON)
    code, out, _ = veil("status")
    not_after = describe(home.path(home.settings.certificate).read_bytes()).not_after
    assert code == 0
    assert out.splitlines() == [
        f"{home.url}  certificate until {not_after.isoformat(timespec='seconds')}",
        "site Bonn  not connected",
        "site Ulm  not connected",
        f"run {job.name}  training  1/3  Bonn: refused (budget: the run would pass its budget), Ulm: replied",
    ]
    job.note(phase=Phase.FAILED, message="no more")
    assert veil("status")[1].splitlines()[-1] == "  no more"


@pytest.mark.usefixtures("enrolled")
def test_status_as_json_is_one_document_and_changes_nothing(veil: Veil, home: Home, job: Job) -> None:
    job.note(**ON)
    before = {path: path.read_bytes() for path in job.folder.rglob("*")}
    code, out, _ = veil("status", "--json")
    document = json.loads(out)
    assert (code, document["url"]) == (0, home.url)
    assert [(one["name"], one["phase"], one["rounds_done"]) for one in document["runs"]] == [(job.name, "training", 1)]
    assert [one["name"] for one in document["sites"]] == ["Bonn", "Ulm"]
    assert {path: path.read_bytes() for path in job.folder.rglob("*")} == before


@pytest.mark.parametrize("word", ["stop", "resume"])
def test_a_run_that_is_unknown_is_refused(veil: Veil, job: Job, word: str) -> None:
    refused(veil(word, "another"), "0 runs named another", job.name)


@pytest.mark.parametrize("word", ["stop", "resume"])
def test_a_name_that_fits_two_runs_is_refused(veil: Veil, home: Home, job: Job, word: str) -> None:
    Job.submit(home.runs, job.plan, ("Ulm",))
    refused(veil(word, "study"), "2 runs named study")


def test_a_run_is_stopped_by_the_beginning_of_its_name(veil: Veil, job: Job) -> None:
    job.note(phase=Phase.TRAINING)
    assert veil("stop", "stu")[:2] == (0, f"{job.name} will stop\n")
    assert job.stop_wanted


@pytest.mark.parametrize(
    ("word", "phase"),
    [
        ("stop", Phase.FINISHED),
        ("stop", Phase.FAILED),
        ("stop", Phase.STOPPED),
        ("resume", Phase.FINISHED),
        ("resume", Phase.TRAINING),
        ("resume", Phase.SUBMITTED),
    ],
)
def test_what_is_over_is_not_stopped_and_what_is_under_way_not_resumed(
    veil: Veil, job: Job, word: str, phase: Phase
) -> None:
    job.note(phase=phase)
    refused(veil(word, job.name), f"is {phase}")
    assert (job.status.phase, job.stop_wanted) == (phase, False)


def test_a_run_that_was_stopped_is_resumed_and_followed(veil: Veil, home: Home, job: Job) -> None:
    job.note(phase=Phase.TRAINING)
    job.stop()
    job.note(phase=Phase.STOPPED, message="the run was stopped")
    with Coordinator(home, {"phase": Phase.FINISHED}):
        code, out, _ = veil("resume", job.name)
    assert (code, out.splitlines()[-1]) == (0, f"finished: {job.folder / 'result'}")
    assert not job.stop_wanted


# ---------------------------------------------------------------------------------------------------------------------
# What a word brings in

PROBE = """
import sys
from veil.simulations.cli import run_command
code = run_command(sys.argv[1:])
heavy = {"torch", "transformers", "pandas", "opacus", "dp_accounting", "flwr", "sqlalchemy", "fastapi", "httpx", "grpc"}
heavy |= {"rich", "pydantic", "numpy"} if "--help" in sys.argv else set()
print(sorted(heavy & set(sys.modules)), file=sys.stderr)
sys.exit(code)
"""


@pytest.mark.parametrize("words", [["--help"], ["run", "--help"], ["status"]])
def test_a_word_that_only_looks_brings_no_framework(folder: Path, words: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROBE, "coordinator", *words],
        env={**os.environ, "VEIL_COORDINATOR_HOME": str(folder)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr.splitlines()[-1] == "[]"
