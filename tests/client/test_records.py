# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.client.records`: from the table that site.toml names to units, read once, with a key that stays."""

from __future__ import annotations

import logging
import sqlite3
import stat
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from veil.client.records import LoggedProgress, SiteRecords, look
from veil.client.site_file import SiteFile, parse_site
from veil.client.units import Units
from veil.common.errors import InputError, RefusalCode, RefusalError, RunError, TableError, WeightsError
from veil.common.plan import RunPlan
from veil.common.plan_sections import Backbone, Evaluation, Task, Training

TEXTS = ["cough", "fever", "no fever", "well", "cough", "none"]
LABELS = ["1", "1", "0", "0", "1", "0"]
PATIENTS = ["a", "a", "a", "b", "c", "c"]
SHA256, OTHER = "a" * 64, "b" * 64


class FakeEncoder:
    """Two features of a text: its length and its spaces; counts the texts that it read."""

    sha256 = SHA256
    preprocessing = "fake"
    width = 2

    def __init__(self) -> None:
        self.read = 0

    def encode(
        self,
        inputs: Sequence[str] | Sequence[Path],
        *,
        advance: Callable[[int], None] | None = None,
        unreadable: Callable[[int, TableError], None] | None = None,
    ) -> NDArray[np.float32]:
        self.read += len(inputs)
        return np.array([[len(str(one)), str(one).count(" ")] for one in inputs], dtype=np.float32)


class FakeStore:
    """Finds the fake encoder; counts how often."""

    def __init__(self) -> None:
        self.encoder = FakeEncoder()
        self.found: list[Backbone] = []

    def find_backbone(self, backbone: Backbone, task: Task) -> FakeEncoder:
        self.found.append(backbone)
        return self.encoder


@pytest.fixture
def store() -> FakeStore:
    return FakeStore()


def write_table(folder: Path) -> None:
    rows = [
        f"{text},{label},{patient},{number}"
        for number, (text, label, patient) in enumerate(zip(TEXTS, LABELS, PATIENTS, strict=True))
    ]
    (folder / "reports.csv").write_text("\n".join(["body,ill,mrn,age", *rows]) + "\n", encoding="utf-8")


@pytest.fixture
def make_file(tmp_path: Path) -> Callable[..., SiteFile]:
    """A site's file beside a table of six records; keywords change its [data], `limits` its limits."""
    write_table(tmp_path)

    def make(limits: dict[str, Any] | None = None, **data: Any) -> SiteFile:
        columns = {"table": "reports.csv", "text": "body", "label": "ill", "labels": {"1": "yes", "0": "no"}, **data}
        document = {
            "name": "Ulm",
            "data": {key: value for key, value in columns.items() if value is not None},
            "limits": {"epsilon_per_run": 4.0, "epsilon_lifetime": 8.0, **(limits or {})},
            "coordinator": {"url": "https://veil.example", "ca": "ca.pem"},
        }
        return parse_site(document, tmp_path / "site.toml")

    return make


MakeFile = Callable[..., SiteFile]


def head_units(records: SiteRecords, of: RunPlan) -> Units:
    """The units of a plan that tunes a head."""
    units = records(of)
    assert isinstance(units, Units)
    return units


def plan(task: dict[str, Any] | None = None, sha256: str | None = SHA256, **privacy: Any) -> RunPlan:
    kind = "text-classification" if sha256 else "tabular-classification"
    document: dict[str, Any] = {
        "name": "p",
        "task": {"kind": kind, "labels": ["no", "yes"], **(task or {})},
        "privacy": {"target_epsilon": 3.0, **privacy},
    }
    if sha256:
        document["backbone"] = {"source": "path:m", "sha256": sha256}
    return RunPlan.model_validate(document)


def test_records_come_as_units_of_the_plan_s_kind(make_file: MakeFile, store: FakeStore) -> None:
    units = head_units(SiteRecords(make_file(), store.find_backbone), plan())
    assert units.count == 6
    assert units.labels.tolist() == [1, 1, 0, 0, 1, 0]
    assert units.features.tolist() == [[len(one), one.count(" ")] for one in TEXTS]
    by_patient = head_units(SiteRecords(make_file(patient="mrn"), store.find_backbone), plan(unit="patient"))
    assert by_patient.count == 3
    assert by_patient.sizes.tolist() == [3, 1, 2]


def test_an_evaluation_holds_units_out_by_what_they_are(make_file: MakeFile, store: FakeStore, tmp_path: Path) -> None:
    """The same in another run and after a record was taken away; each unit on one side."""
    many = [f"report {number},1,p{number % 30},0" for number in range(90)]
    table, patients = tmp_path / "reports.csv", plan(unit="patient")

    def sides(rows: list[str], of: RunPlan) -> tuple[list[float], list[float]]:
        table.write_text("\n".join(["body,ill,mrn,age", *rows]) + "\n", encoding="utf-8")
        units = head_units(SiteRecords(make_file(patient="mrn" if of.privacy.unit == "patient" else None), encode), of)
        assert units.held is not None
        return units.features[:, 0].tolist(), units.held.features[:, 0].tolist()

    class Numbered(FakeEncoder):
        def encode(self, inputs: Sequence[str] | Sequence[Path], **_: Any) -> NDArray[np.float32]:
            return np.array([[int(str(one).split()[1]), 0] for one in inputs], dtype=np.float32)

    def encode(backbone: Backbone, task: Task) -> FakeEncoder:
        return Numbered()

    for judged in (plan(), patients):
        judged = judged.model_copy(update={"evaluation": Evaluation(holdout=0.4)})
        training, held = sides(many, judged)
        assert sorted(training + held) == list(range(90))
        assert min(len(training), len(held)) > 10
        longer = judged.model_copy(update={"training": Training(rounds=7)})
        assert sides(many, longer) == (training, held)
        fewer, fewer_held = sides(many[1:], judged)
        assert (set(fewer), set(fewer_held)) == (set(training) - {0}, set(held) - {0})


def test_numbers_need_no_backbone(make_file: MakeFile, store: FakeStore) -> None:
    units = head_units(SiteRecords(make_file(text=None, features=["age"]), store.find_backbone), plan(sha256=None))
    assert units.features.tolist() == [[0.0], [1.0], [2.0], [3.0], [4.0], [5.0]]
    assert store.found == []


def test_the_table_is_read_once_per_plan_and_the_backbone_loaded_once(
    make_file: MakeFile, store: FakeStore, tmp_path: Path
) -> None:
    records = SiteRecords(make_file(), store.find_backbone)
    first = records(plan())
    (tmp_path / "reports.csv").unlink()
    assert records(plan()) is first
    with pytest.raises(TableError, match="no such file"):
        records(plan(target_delta=1e-6))
    write_table(tmp_path)
    assert records(plan(target_delta=1e-6)) is not first
    assert len(store.found) == 1
    assert store.encoder.read == len(set(TEXTS))


@pytest.mark.parametrize("change", [{"sha256": OTHER}, {"files_sha256": OTHER}])
def test_another_backbone_is_loaded_anew(change: dict[str, str], make_file: MakeFile, store: FakeStore) -> None:
    records, first = SiteRecords(make_file(), store.find_backbone), plan()
    assert first.backbone is not None
    records(first)
    records(first.model_copy(update={"backbone": first.backbone.model_copy(update=change)}))
    assert len(store.found) == 2


@pytest.mark.parametrize("task", [{"max_length": 8}, {"image_size": 64}, {"max_seconds": 2.0}])
def test_another_way_to_read_a_record_loads_anew(task: dict[str, int], make_file: MakeFile, store: FakeStore) -> None:
    records = SiteRecords(make_file(), store.find_backbone)
    records(plan())
    records(plan(task))
    assert len(store.found) == 2


def test_threads_that_ask_at_once_share_one_reading(make_file: MakeFile, store: FakeStore) -> None:
    records = SiteRecords(make_file(), store.find_backbone)
    with ThreadPoolExecutor(4) as pool:
        answers = [*pool.map(records, [plan()] * 8)]
    assert all(one is answers[0] for one in answers)
    assert len(store.found) == 1


def test_a_backbone_that_is_not_to_be_had_is_asked_for_again(make_file: MakeFile, store: FakeStore) -> None:
    there: list[bool] = []

    def find(backbone: Backbone, task: Task) -> FakeEncoder:
        if not there:
            raise WeightsError("no backbone", "one", "let it be delivered")
        return store.encoder

    records = SiteRecords(make_file(), find)
    with pytest.raises(WeightsError, match="let it be delivered"):
        records(plan())
    there.append(True)
    assert records(plan()).count == 6


@pytest.mark.parametrize(
    ("data", "task", "sha256", "message"),
    [
        ({}, {}, None, "tabular-classification"),
        ({"text": None, "features": ["age"]}, {}, SHA256, "text-classification"),
        ({}, {"kind": "image-classification"}, SHA256, "image-classification"),
        ({"text": None, "features": ["age"]}, {"width": 2}, None, "task.width = 2"),
        ({}, {"labels": ["no", "perhaps"]}, SHA256, "[data.labels] names yes"),
    ],
)
def test_a_plan_that_the_columns_cannot_serve_is_refused_before_the_table_is_opened(
    data: dict[str, Any], task: dict[str, Any], sha256: str | None, message: str, make_file: MakeFile, store: FakeStore
) -> None:
    file = make_file(**data, table="absent.csv")
    with pytest.raises(RefusalError) as caught:
        SiteRecords(file, store.find_backbone)(plan(task, sha256))
    assert message in str(caught.value)
    assert caught.value.code is RefusalCode.DATA


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"labels": {"1": "yes"}}, 'label "0"'),
        ({"label": "sick"}, 'no column "sick"'),
        ({"table": "absent.csv"}, "no such file"),
    ],
)
def test_a_table_that_is_not_as_described_is_refused_before_anything_is_computed(
    data: dict[str, Any], message: str, make_file: MakeFile, store: FakeStore
) -> None:
    file = make_file(**data)
    with pytest.raises(TableError) as caught:
        SiteRecords(file, store.find_backbone)(plan({}, SHA256))
    assert message in str(caught.value)
    assert store.found == []
    assert not file.agent.state.exists()


def test_a_width_that_fits_is_taken(make_file: MakeFile, store: FakeStore) -> None:
    file = make_file(text=None, features=["age", "mrn_number"])
    (file.folder / "reports.csv").write_text("ill,age,mrn_number\n1,2,3\n0,4,5\n", encoding="utf-8")
    units = head_units(SiteRecords(file, store.find_backbone), plan({"width": 2}, None))
    assert units.features.tolist() == [[2.0, 3.0], [4.0, 5.0]]


def test_a_patient_unit_needs_a_patient_column(make_file: MakeFile, store: FakeStore) -> None:
    with pytest.raises(TableError, match="no patient column"):
        SiteRecords(make_file(), store.find_backbone)(plan(unit="patient"))


def test_which_records_of_a_patient_take_part_outlives_the_process(make_file: MakeFile, store: FakeStore) -> None:
    file = make_file(patient="mrn")
    few = plan(unit="patient", max_records_per_patient=1)
    first = head_units(SiteRecords(file, store.find_backbone), few)
    again = head_units(SiteRecords(file, store.find_backbone), few)
    assert first.sizes.tolist() == [1, 1, 1]
    assert first.features.tolist() == again.features.tolist()


def test_the_key_of_that_choice_is_the_site_s_own_and_private(make_file: MakeFile, store: FakeStore) -> None:
    file = make_file()
    SiteRecords(file, store.find_backbone)(plan())
    key = file.agent.state / "units.key"
    assert len(key.read_bytes()) == 32
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert {path.name for path in file.agent.state.iterdir()} == {"units.key", "cache"}
    before = key.read_bytes()
    SiteRecords(file, store.find_backbone)(plan())
    assert key.read_bytes() == before


def test_the_process_that_is_first_chooses_the_key(
    make_file: MakeFile, store: FakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = make_file()
    key = file.agent.state / "units.key"

    def second(count: int) -> bytes:
        key.write_bytes(b"f" * 32)
        return b"s" * count

    monkeypatch.setattr("veil.client.records.secrets.token_bytes", second)
    SiteRecords(file, store.find_backbone)(plan())
    assert key.read_bytes() == b"f" * 32


def test_processes_that_start_at_once_leave_one_key(make_file: MakeFile, store: FakeStore) -> None:
    file = make_file(text=None, features=["age"])
    few = plan(sha256=None)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: SiteRecords(file, store.find_backbone)(few), range(8)))
    assert [path.name for path in file.agent.state.iterdir()] == ["units.key"]


def test_a_damaged_key_is_not_replaced_by_another_choice(make_file: MakeFile, store: FakeStore) -> None:
    file = make_file()
    file.agent.state.mkdir()
    (file.agent.state / "units.key").write_bytes(b"short")
    with pytest.raises(InputError, match="restore it from backup"):
        SiteRecords(file, store.find_backbone)(plan())
    assert (file.agent.state / "units.key").read_bytes() == b"short"


def test_a_database_serves_as_well(make_file: MakeFile, store: FakeStore, tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "a.db")) as database, database:
        database.execute("CREATE TABLE t (body TEXT, ill INTEGER)")
        database.executemany("INSERT INTO t VALUES (?, ?)", zip(TEXTS, map(int, LABELS), strict=True))
    file = make_file(table="sqlite:///a.db", query="SELECT body, ill FROM t")
    assert head_units(SiteRecords(file, store.find_backbone), plan()).labels.tolist() == [1, 1, 0, 0, 1, 0]
    assert look(file).labels == {"yes": 3, "no": 3}


def test_the_operator_sees_the_table_before_any_run(make_file: MakeFile) -> None:
    seen = look(make_file(patient="mrn"))
    assert (seen.records, seen.units) == (6, 3)
    assert seen.labels == {"yes": 3, "no": 3}
    assert seen.missing == {"body": 0, "ill": 0, "mrn": 0}
    assert seen.first["body"] == ("cough", "fever", "no fever")
    assert look(make_file(patient="mrn", limits={"unit": "record"})).units == 6


def test_missing_cells_are_counted_by_column(make_file: MakeFile, tmp_path: Path) -> None:
    (tmp_path / "reports.csv").write_text("ill,age,sex\n1,7,w\n0,-1,\n0,NA,m\n", encoding="utf-8")
    seen = look(make_file(text=None, text_template="{age} years, {sex}", missing_values={"age": [-1]}))
    assert seen.missing == {"age": 2, "sex": 1, "ill": 0}


def test_a_label_that_looks_like_no_value_is_one_where_it_is_declared(make_file: MakeFile, tmp_path: Path) -> None:
    (tmp_path / "reports.csv").write_text("body,ill\nx,NA\ny,1\n", encoding="utf-8")
    seen = look(make_file(labels={"NA": "no", "1": "yes"}))
    assert (seen.missing["ill"], seen.labels) == (0, {"no": 1, "yes": 1})
    with pytest.raises(TableError, match="no label"):
        look(make_file(labels={"1": "yes"}))


def test_what_a_run_would_stumble_over_is_found_before(make_file: MakeFile, tmp_path: Path) -> None:
    (tmp_path / "reports.csv").write_text("body,ill\nx,1\n ,0\n", encoding="utf-8")
    with pytest.raises(TableError, match="row 2: no text"):
        look(make_file())


def test_an_image_that_cannot_be_read_counts_as_zero(make_file: MakeFile, tmp_path: Path) -> None:
    """Its error would tell the coordinator of a record; the operator reads of it in the log."""

    class Picky(FakeEncoder):
        def encode(
            self,
            inputs: Sequence[str] | Sequence[Path],
            *,
            advance: Callable[[int], None] | None = None,
            unreadable: Callable[[int, TableError], None] | None = None,
        ) -> NDArray[np.float32]:
            rows = super().encode(inputs)
            assert unreadable is not None
            unreadable(1, TableError("image 1", "an image", "replace it"))
            rows[1] = 0
            return rows

    store = FakeStore()
    store.encoder = Picky()
    units = head_units(SiteRecords(make_file(), store.find_backbone), plan())
    assert not units.features[1].any()
    assert units.features[0].any()


def test_progress_is_logged_every_ten_seconds(caplog: pytest.LogCaptureFixture) -> None:
    now = iter([0.0, 4.0, 9.0, 12.0, 13.0])
    caplog.set_level(logging.INFO)
    progress = LoggedProgress(100, clock=lambda: next(now))
    for done in (40, 5, 5, 20, 1):
        progress.advance(done)
    assert caplog.messages == ["features of 40 of 100 records are kept", "features of 70 of 100 records, 2.5 a second"]


def test_the_owner_says_how_much_is_kept_and_how(make_file: MakeFile, store: FakeStore) -> None:
    file = make_file()
    agent = file.agent.model_copy(update={"cache_precision": "float16", "cache_max_gb": 1e-7})
    with pytest.raises(RunError, match="cache_max_gb = 1e-07"):
        SiteRecords(file.model_copy(update={"agent": agent}), store.find_backbone)(plan())
    assert store.encoder.read == 0
    agent = agent.model_copy(update={"cache_max_gb": 1.0})
    SiteRecords(file.model_copy(update={"agent": agent}), store.find_backbone)(plan())
    (rows,) = agent.cache.glob("*/rows.bin")
    assert rows.stat().st_size == len(set(TEXTS)) * 8
