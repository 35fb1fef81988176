# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil site …` word by word: what is asked, what is decided, what is printed, and what never is."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import typer
from fastapi import FastAPI

from veil.client.approvals import Approvals, Decision
from veil.client.deployed import assemble
from veil.client.ledger import Ledger
from veil.client.site_file import SiteFile, read_site_file
from veil.common.exchange import RoundRequest
from veil.common.invitation import ENROL_PATH, Invitation
from veil.common.keys import NodeKey
from veil.common.plan import RunPlan
from veil.simulations.cli import run_command

MakePlan = Callable[..., RunPlan]
MakeRequest = Callable[..., RoundRequest]
MakeHome = Callable[..., Path]
Serve = Callable[[FastAPI, tuple[Path, Path]], str]
Captured = pytest.CaptureFixture[str]

SECRET = "s3cret_" + "A" * 36
OPTIONS = {
    "--table": "table.csv",
    "--label": "ill",
    "--map": "1=yes",
    "--text": "body",
    "--epsilon-per-run": "4",
    "--epsilon-lifetime": "8",
}


class Site:
    """`veil site … --home HOME` with what it printed."""

    def __init__(self, home: Path, capsys: Captured) -> None:
        self.home, self._capsys = home, capsys
        self.printed = ""

    def __call__(self, *words: str) -> tuple[int, str, str]:
        code = run_command(["site", *words, "--home", str(self.home)])
        out, err = self._capsys.readouterr()
        self.printed += out + err
        return code, out, err

    @property
    def file(self) -> SiteFile:
        return read_site_file(self.home / "site.toml")

    @property
    def approvals(self) -> Approvals:
        return Approvals(self.file.agent.runs)

    def decision(self, job: str = "job") -> Decision:
        return next(asked.decision for asked in self.approvals.runs() if asked.job == job)

    def answer(self, requests: list[RoundRequest]) -> None:
        """What an agent would do: answer rounds, whatever was approved."""
        limits = self.file.limits.model_copy(update={"approval": "auto-within-limits"})
        site = assemble(self.file.model_copy(update={"limits": limits}))
        with closing(site.ledger):
            for request in requests:
                assert site.answer(request).update is not None


@pytest.fixture
def site(make_home: MakeHome, capsys: Captured) -> Site:
    return Site(make_home(), capsys)


@pytest.fixture
def waiting(site: Site, make_plan: MakePlan) -> Site:
    """A site with a run that waits."""
    site.approvals.note("job", make_plan())
    return site


class Terminal(io.StringIO):
    """A standard input with a person before it."""

    def isatty(self) -> bool:
        return True


def typed(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal("".join(f"{line}\n" for line in lines)))


@pytest.fixture
def invitation(serve: Serve, authority: Path, tmp_path: Path) -> Path:
    """An invitation file of a coordinator that enrols whoever comes."""
    app = FastAPI()
    app.add_api_route(ENROL_PATH, lambda: {"site": "Ulm"}, methods=["POST"])
    url = serve(app, (authority / "link.pem", authority / "link.key"))
    ca = (authority / "ca.pem").read_text(encoding="ascii")
    expires = datetime.now(UTC) + timedelta(days=1)
    Invitation(site="Ulm", url=url, secret=SECRET, expires=expires, ca=ca).write(tmp_path / "invitation.toml")
    return tmp_path / "invitation.toml"


@pytest.fixture
def joining(invitation: Path, tmp_path: Path, capsys: Captured) -> Site:
    """A site that is not there yet."""
    return Site(tmp_path / "joined", capsys)


def contents(home: Path) -> dict[str, bytes]:
    """All files but those that SQLite keeps beside its own while it reads."""
    files = (path for path in home.rglob("*") if path.is_file() and not path.name.endswith(("-shm", "-wal")))
    return {str(path.relative_to(home)): path.read_bytes() for path in files}


def words(**without: Any) -> list[str]:
    return [word for option, value in OPTIONS.items() if option not in without.values() for word in (option, value)]


def test_init_makes_a_site_from_options_alone(joining: Site, invitation: Path) -> None:
    options = ["--map", "0=no", "--approval", "auto-within-limits", "--release-counts"]
    code, out, err = joining("init", str(invitation), *words(), *options, "--health-address", "")
    assert (code, err) == (0, "")
    assert "Ulm is enrolled" in out
    file = joining.file
    assert (file.data.text, file.data.label, dict(file.data.labels)) == ("body", "ill", {"1": "yes", "0": "no"})
    assert Path(file.data.table) == Path.cwd() / "table.csv"
    assert (file.limits.epsilon_per_run, file.limits.epsilon_lifetime) == (4.0, 8.0)
    assert (file.limits.approval, file.limits.release_counts) == ("auto-within-limits", True)
    assert file.agent.health_address == ""


def test_init_twice_is_harmless(joining: Site, invitation: Path) -> None:
    """The second time without any option: nothing is asked."""
    assert joining("init", str(invitation), *words())[0] == 0
    before = contents(joining.home)
    code, out, _ = joining("init", str(invitation))
    assert (code, "Ulm is enrolled" in out) == (0, True)
    assert contents(joining.home) == before


@pytest.mark.parametrize("missing", OPTIONS)
def test_init_asks_nothing_without_a_terminal(missing: str, joining: Site, invitation: Path) -> None:
    code, _, err = joining("init", str(invitation), *words(without=missing))
    assert code == 2
    assert missing in err
    assert "Remedy: " in err
    assert not joining.home.exists()


def test_init_asks_at_a_terminal_for_what_is_missing(
    joining: Site, invitation: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed(monkeypatch, "t.csv", "ill", "1=yes, 0=no", "features", "age, weight", "4", "8")
    assert joining("init", str(invitation))[0] == 0
    file = joining.file
    assert (Path(file.data.table).name, file.data.label) == ("t.csv", "ill")
    assert file.data.features == ("age", "weight")
    assert dict(file.data.labels) == {"1": "yes", "0": "no"}
    assert (file.limits.epsilon_per_run, file.limits.epsilon_lifetime) == (4.0, 8.0)


@pytest.mark.parametrize(
    ("answers", "named"),
    [
        (["t.csv", "ill", "1=y", "sound"], "sound"),
        (["t.csv", "ill", "1=y", "text", "body", "much"], "epsilon_per_run = much"),
    ],
)
def test_init_says_which_answer_is_not_usable(
    answers: list[str], named: str, joining: Site, invitation: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed(monkeypatch, *answers)
    code, _, err = joining("init", str(invitation))
    assert (code, named in err) == (2, True)
    assert not joining.home.exists()


def test_init_names_a_map_without_a_label(joining: Site, invitation: Path) -> None:
    code, _, err = joining("init", str(invitation), *words(), "--map", "1")
    assert (code, "--map 1" in err) == (2, True)


def test_a_database_s_address_is_no_path(joining: Site, invitation: Path) -> None:
    url, query = "sqlite:///a.db", "SELECT body, ill FROM t"
    assert joining("init", str(invitation), *words(without="--table"), "--table", url, "--query", query)[0] == 0
    assert joining.file.data.table == url


def test_the_secret_of_an_invitation_goes_nowhere(joining: Site, invitation: Path) -> None:
    joining("init", str(invitation))
    joining("init", str(invitation), *words())
    joining("init", str(invitation))
    invitation.write_text(invitation.read_text(encoding="utf-8").replace('site = "Ulm"', "site = 7"), encoding="utf-8")
    assert joining("init", str(invitation))[0] == 2
    assert SECRET not in joining.printed
    for path in joining.home.rglob("*"):
        assert path.is_dir() or SECRET.encode() not in path.read_bytes()


def test_without_a_site_every_word_names_the_folder(tmp_path: Path, capsys: Captured) -> None:
    site = Site(tmp_path / "nowhere", capsys)
    export = str(tmp_path / "log.json")
    for line in (["doctor"], ["start"], ["approve"], ["refuse", "x"], ["status"], ["export-log", export]):
        code, _, err = site(*line)
        assert (code, "has no site.toml" in err) == (2, True)
    for word in ("show", "verify"):
        assert site("ledger", word)[0] == 2
    assert list(tmp_path.iterdir()) == []


def test_doctor_says_what_is_bad_and_ends_with_4(site: Site) -> None:
    code, out, err = site("doctor")
    assert code == 4
    assert "ok   data: 40 records" in out
    assert "BAD  coordinator: https://127.0.0.1:1" in out
    assert "Remedy: " in out
    assert "ok   private step: one step" in out
    assert "not in order: coordinator" in err


def test_doctor_in_order_ends_with_0(make_home: MakeHome, serve: Serve, authority: Path, capsys: Captured) -> None:
    url = serve(FastAPI(), (authority / "link.pem", authority / "link.key"))
    code, out, err = Site(make_home(url=url), capsys)("doctor")
    assert (code, err) == (0, "")
    assert "BAD" not in out


def test_doctor_as_json_is_one_document(site: Site, make_plan: MakePlan, tmp_path: Path) -> None:
    plan = tmp_path / "plan.toml"
    plan.write_text(
        'name = "p"\n[task]\nkind = "tabular-classification"\nlabels = ["no", "yes", "maybe"]\n'
        "[training]\nrounds = 3\n[privacy]\ntarget_epsilon = 3.0\n",
        encoding="utf-8",
    )
    code, out, _ = site("doctor", "--json", "--plan", str(plan))
    found = {one["name"]: one for one in json.loads(out)}
    assert code == 4
    assert [name for name, one in found.items() if not one["fine"]] == ["coordinator"]
    assert any("Price" in line for line in found["price"]["lines"])


def test_approve_lists_what_waits(waiting: Site) -> None:
    code, out, _ = waiting("approve")
    assert code == 0
    assert out.startswith("job  asked ")
    assert "1 waiting" in out
    assert waiting.decision() is Decision.PENDING


def test_approve_lists_nothing_where_nobody_is_asked(
    make_home: MakeHome, capsys: Captured, make_plan: MakePlan
) -> None:
    site = Site(make_home(limits={"approval": "auto-within-limits"}), capsys)
    site.approvals.note("job", make_plan())
    assert site("approve")[1].startswith("0 waiting")


def test_approve_shows_the_price_before_it_asks(waiting: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    typed(monkeypatch, "y")
    code, out, _ = waiting("approve", "job")
    assert code == 0
    price, question, done = (out.index(part) for part in ("Price at δ", "Let this run use this site?", "approved job"))
    assert price < question < done
    assert waiting.decision() is Decision.APPROVED


@pytest.mark.parametrize(
    ("answers", "expected", "said"),
    [(["n"], 0, "veil site refuse job"), ([""], 0, "veil site refuse job"), ([], 130, "")],
    ids=["no", "nothing said", "end of input"],
)
def test_without_a_yes_nothing_is_decided(
    answers: list[str], expected: int, said: str, waiting: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed(monkeypatch, *answers)
    code, out, _ = waiting("approve", "job")
    assert (code, said in out) == (expected, True)
    assert "approved" not in out
    assert waiting.decision() is Decision.PENDING


def test_approve_with_yes_asks_nothing(waiting: Site) -> None:
    code, out, _ = waiting("approve", "job", "--yes")
    assert (code, "Price at δ" in out) == (0, True)
    assert waiting.decision() is Decision.APPROVED


def test_approve_decides_for_the_plan_that_was_shown(
    waiting: Site, make_plan: MakePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the operator reads, the run comes with another plan."""

    def another_plan_comes(*_: object, **__: object) -> bool:
        waiting.approvals.note("job", make_plan(target_epsilon=7.0))
        return True

    monkeypatch.setattr(typer, "confirm", another_plan_comes)
    assert waiting("approve", "job")[0] == 2
    assert waiting.decision() is Decision.PENDING
    assert [asked.plan.privacy.target_epsilon for asked in waiting.approvals.runs()] == [7.0]


def test_a_run_is_found_by_its_beginning_and_only_if_there_is_one(waiting: Site, make_plan: MakePlan) -> None:
    for job in ("joke", "study 7"):
        waiting.approvals.note(job, make_plan())
    assert waiting("approve", "study", "--yes")[0] == 0
    assert waiting.decision("study 7") is Decision.APPROVED
    for name, count in (("jo", 2), ("x", 0)):
        code, _, err = waiting("approve", name, "--yes")
        assert (code, f"{count} runs named" in err) == (2, True)
    assert waiting("approve", "job", "--yes")[0] == 0


def test_refuse_takes_an_approval_back(waiting: Site) -> None:
    waiting("approve", "job", "--yes")
    assert waiting("refuse", "job")[:2] == (0, "refused job\n")
    assert waiting.decision() is Decision.REFUSED


def test_refusing_what_ran_says_what_stays_spent(waiting: Site, make_plan: MakePlan, make_request: MakeRequest) -> None:
    waiting("approve", "job", "--yes")
    waiting.answer([make_request(make_plan(), 0)])
    code, out, _ = waiting("refuse", "job")
    assert (code, out.startswith("refused job; ε "), "stays spent" in out) == (0, True, True)


def test_status_tells_what_waits_and_what_was_spent(
    waiting: Site, make_plan: MakePlan, make_request: MakeRequest
) -> None:
    waiting.answer([make_request(make_plan(), 0, job="other")])
    _, out, _ = waiting("status")
    assert "agent stopped" in out
    assert "waits for your word: job" in out
    assert "run other: ε" in out
    document = json.loads(waiting("status", "--json")[1])
    assert document["waiting"] == ["job", "other"]
    assert document["epsilon"] > 0


def test_the_ledger_is_shown_line_by_line(site: Site, make_plan: MakePlan, make_request: MakeRequest) -> None:
    assert site("ledger", "show")[1] == "0 lines; ε 0 at δ = 1e-05\n"
    site.answer([make_request(make_plan(), round_) for round_ in range(3)])
    *lines, last = site("ledger", "show")[1].splitlines()
    assert [line.split("  ")[:2] for line in lines] == [["job", f"round {number}"] for number in range(3)]
    assert last.startswith("3 lines; ε ")
    document = json.loads(site("ledger", "show", "--json")[1])
    assert [row["round"] for row in document["entries"]] == [0, 1, 2]
    assert 0 < document["epsilon"] < 3.0


def test_a_ledger_is_verified(site: Site, make_plan: MakePlan, make_request: MakeRequest) -> None:
    code, out, _ = site("ledger", "verify")
    assert (code, out) == (0, "0 lines; the ledger is made with the agent's first start\n")
    assert json.loads(site("ledger", "verify", "--json")[1]) == {"lines": 0, "head": None, "findings": []}
    site.answer([make_request(make_plan(), round_) for round_ in range(2)])
    code, out, _ = site("ledger", "verify")
    assert (code, out.startswith("4 lines, head ")) == (0, True)
    anchor = site.file.agent.anchor
    anchor.write_bytes(anchor.read_bytes().replace(b'"', b"'"))
    assert site("ledger", "verify")[0] == 3


def test_an_older_copy_is_found_and_written_off(
    site: Site, make_plan: MakePlan, make_request: MakeRequest, key: NodeKey, tmp_path: Path
) -> None:
    site.answer([make_request(make_plan(), 0)])
    agent = site.file.agent
    with closing(Ledger(agent.ledger, "Ulm", key, anchor=agent.anchor)) as ledger:
        ledger.copy_to(tmp_path / "older")
    site.answer([make_request(make_plan(), 1)])
    for path in agent.state.glob("ledger.sqlite*"):
        path.unlink()
    (tmp_path / "older").rename(agent.ledger)
    code, out, _ = site("ledger", "verify")
    assert (code, "anchor" in out) == (4, True)
    document = json.loads(site("ledger", "verify", "--json")[1])
    assert (document["lines"], len(document["findings"])) == (2, 1)
    code, out, _ = site("ledger", "write-off", "--epsilon", "3", "--reason", "disk lost")
    assert (code, "ε 3 was written off" in out) == (0, True)
    assert site("ledger", "verify")[0] == 0
    assert json.loads(site("status", "--json")[1])["epsilon"] > 3.0


def test_a_write_off_waits_for_the_agent_to_end(site: Site, key: NodeKey) -> None:
    agent = site.file.agent
    agent.state.mkdir()
    with closing(Ledger(agent.ledger, "Ulm", key, anchor=agent.anchor)):
        code, _, err = site("ledger", "write-off", "--epsilon", "3", "--reason", "x")
    assert (code, "in use by process" in err) == (2, True)


def test_a_log_is_written_once(site: Site, make_plan: MakePlan, make_request: MakeRequest, tmp_path: Path) -> None:
    site.answer([make_request(make_plan(), 0)])
    target = tmp_path / "log.json"
    code, out, _ = site("export-log", str(target))
    assert (code, out) == (0, f"wrote {target}: 2 lines, 1 decisions\n")
    first = target.read_bytes()
    assert len(json.loads(first)["ledger"]["lines"]) == 2
    code, _, err = site("export-log", str(target))
    assert (code, "exists" in err) == (2, True)
    assert target.read_bytes() == first


def test_looking_changes_nothing(waiting: Site, make_plan: MakePlan, make_request: MakeRequest) -> None:
    waiting.answer([make_request(make_plan(), 0)])
    before = contents(waiting.home)
    for line in (["approve"], ["status"], ["status", "--json"], ["ledger", "show"], ["ledger", "verify"]):
        assert waiting(*line)[0] == 0
    waiting("doctor")
    assert contents(waiting.home) == before


def test_the_private_key_is_never_printed(
    waiting: Site, make_plan: MakePlan, make_request: MakeRequest, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    key = waiting.file.agent.key
    private = key.read_text(encoding="ascii").splitlines()[1:-1]
    waiting.answer([make_request(make_plan(), 0)])
    log = tmp_path / "log.json"
    for line in (["approve", "job", "--yes"], ["status"], ["doctor"], ["ledger", "verify"], ["export-log", str(log)]):
        waiting(*line)
    key.chmod(0o644)
    waiting("doctor")
    waiting("export-log", str(tmp_path / "second.json"))
    key.chmod(0o600)
    key.write_text("\n".join(["-----BEGIN EC PRIVATE KEY-----", *private, "-----END EC PRIVATE KEY-----"]))
    waiting("ledger", "verify")
    said = waiting.printed + caplog.text + log.read_text(encoding="utf-8")
    assert "Remedy: " in said
    for part in private:
        assert part not in said


LOOK = """
import sys
from veil.simulations.cli import run_command
assert run_command(sys.argv[1:]) == 0
heavy = {"torch", "flwr", "opacus", "transformers", "pandas", "pyarrow", "sqlalchemy", "sklearn", "httpx", "grpc"}
loaded = (heavy | ({"rich", "pydantic", "numpy"} if "--help" in sys.argv else set())) & set(sys.modules)
sys.exit(f"brings {sorted(loaded)}" if loaded else 0)
"""


@pytest.mark.parametrize(
    "line",
    [["--help"], ["site", "--help"], ["status"], ["approve"], ["approve", "job", "--yes"], ["ledger", "show"]],
    ids=" ".join,
)
def test_a_word_that_only_looks_brings_no_framework(
    line: list[str], waiting: Site, make_plan: MakePlan, make_request: MakeRequest
) -> None:
    waiting.answer([make_request(make_plan(), 0, job="other")])
    words = line if "--help" in line else ["site", *line, "--home", str(waiting.home)]
    done = subprocess.run([sys.executable, "-c", LOOK, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


STOP = """
import sys, threading
from veil.client.cli import _stop_on_signals
stop, ended = threading.Event(), threading.Event()
_stop_on_signals(stop)
print("ready", flush=True)
stop.wait()
print("stopping", flush=True)
(ended.wait if sys.argv[1] == "hung" else lambda: None)()
"""


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(("how", "second", "code"), [("prompt", False, 0), ("hung", True, 130)])
def test_the_first_signal_asks_and_a_second_ends_at_once(
    first: signal.Signals, how: str, second: bool, code: int
) -> None:
    with subprocess.Popen([sys.executable, "-c", STOP, how], stdout=subprocess.PIPE) as agent:
        assert agent.stdout is not None
        try:
            assert agent.stdout.readline() == b"ready\n"
            os.kill(agent.pid, first)
            assert agent.stdout.readline() == b"stopping\n"
            if second:
                os.kill(agent.pid, signal.SIGTERM)
            assert agent.wait(20) == code
        finally:
            agent.kill()


def test_start_serves_until_told_to_stop(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is started is the site of the folder; signals reach its stop."""
    from veil.client import service
    from veil.common import logs

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    seen: list[Path] = []

    def serve_site(path: Path, file: SiteFile, stop: Any) -> None:
        seen.append(path)
        signal.raise_signal(signal.SIGTERM)
        assert stop.wait(20)

    monkeypatch.setattr(service, "serve_site", serve_site)
    monkeypatch.setattr(logs, "log_json_lines", lambda: None)
    try:
        assert site("start")[0] == 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert seen == [site.home / "site.toml"]
