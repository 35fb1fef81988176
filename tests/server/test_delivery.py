# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.server.delivery`: what is sent has the plan's hashes, and every delivery ends, whatever sites say."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from veil.client.backbone_store import BackboneStore
from veil.common import wire
from veil.common.delivery import (
    CHUNK_BYTES,
    Chunk,
    FileEntry,
    Manifest,
    Position,
    Progress,
    Standing,
    manifest_of,
    shelved,
)
from veil.common.errors import RefusalCode, RefusalError, WeightsError
from veil.common.exchange import Offer
from veil.common.pickled import GE2E, LITE0, Pickled
from veil.common.plan import RunPlan
from veil.common.plan_sections import Backbone
from veil.common.weights import WEIGHTS_NAME, files_digest
from veil.server import delivery
from veil.server.delivery import BackboneShelf, deliver

OTHER = "0" * 64
PIECE = 100
CONTENT = {
    "config.json": b'{"model_type": "bert"}',
    WEIGHTS_NAME: save({"w": np.arange(128, dtype=np.float32)}),
    "special_tokens_map.json": b"",
    "vocab.txt": b"a\nb\n" * 60,
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The folder that the plan's author names."""
    folder = tmp_path / "models" / "small"
    folder.mkdir(parents=True)
    for name, content in CONTENT.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def backbone(source: Path) -> Backbone:
    found = manifest_of(source)
    return Backbone(source="path:models/small", sha256=found.sha256, files_sha256=found.files_sha256)


@pytest.fixture
def shelf(tmp_path: Path) -> BackboneShelf:
    return BackboneShelf(tmp_path / "shelf")


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a small backbone travels in many pieces."""
    monkeypatch.setattr(delivery, "CHUNK_BYTES", PIECE)


def bytes_sent(shelf: BackboneShelf, manifest: Manifest) -> Iterator[tuple[str, bytes]]:
    """Every file of a manifest, put together from the shelf's pieces."""
    for entry in manifest.entries:
        content = b""
        while len(content) < entry.size:
            content += shelf.chunk(manifest, Position(name=entry.name, offset=len(content))).data
        yield entry.name, content


@pytest.mark.usefixtures("small_pieces")
def test_the_shelf_gives_the_pinned_files_and_nothing_beside_them(
    shelf: BackboneShelf, source: Path, backbone: Backbone, tmp_path: Path
) -> None:
    for name in ("modeling.py", "pytorch_model.bin", "README.md"):
        (source / name).write_bytes(b"import os")
    manifest = shelf.manifest(backbone, base=tmp_path)
    assert manifest == manifest_of(source)
    assert dict(bytes_sent(shelf, manifest)) == CONTENT
    assert {path.name for path in (tmp_path / "shelf").rglob("*") if path.is_file()} == set(CONTENT)


def test_the_shelf_outlives_its_source(shelf: BackboneShelf, source: Path, backbone: Backbone, tmp_path: Path) -> None:
    before = shelf.manifest(backbone, base=tmp_path)
    for path in source.iterdir():
        path.unlink()
    again = BackboneShelf(tmp_path / "shelf")
    assert again.manifest(backbone, base=tmp_path) == before
    assert dict(bytes_sent(again, before)) == CONTENT
    assert again.find(backbone).source == f"path:{shelved(tmp_path / 'shelf', backbone)}"


def test_a_shelf_that_was_altered_is_filled_again(
    shelf: BackboneShelf, source: Path, backbone: Backbone, tmp_path: Path
) -> None:
    manifest = shelf.manifest(backbone, base=tmp_path)
    folder = shelved(tmp_path / "shelf", backbone)
    (folder / "vocab.txt").write_bytes(b"b\na\n" * 60)
    with pytest.raises(WeightsError, match="not the pinned backbone"):
        shelf.find(backbone)
    assert shelf.manifest(backbone, base=tmp_path) == manifest
    assert (folder / "vocab.txt").read_bytes() == CONTENT["vocab.txt"]


def test_a_backbone_that_is_not_on_the_shelf_is_not_found(shelf: BackboneShelf, backbone: Backbone) -> None:
    with pytest.raises(WeightsError, match="not the pinned backbone"):
        shelf.find(backbone)


@pytest.mark.parametrize("change", [{"sha256": OTHER}, {"files_sha256": OTHER}, {"files_sha256": None}])
def test_nothing_unpinned_or_pinned_otherwise_is_taken(
    change: dict[str, str | None], shelf: BackboneShelf, source: Path, backbone: Backbone, tmp_path: Path
) -> None:
    with pytest.raises(WeightsError, match=r"SHA-256|without backbone\.files_sha256"):
        shelf.manifest(backbone.model_copy(update=change), base=tmp_path)
    assert not (tmp_path / "shelf").exists()


def test_pickled_weights_are_never_delivered(shelf: BackboneShelf, tmp_path: Path) -> None:
    pickled = b"\x80\x04."
    (tmp_path / "efficientnet-lite0-1.pth").write_bytes(pickled)
    sha256 = hashlib.sha256(pickled).hexdigest()
    plan = Backbone(source="path:.", sha256=sha256, files_sha256=files_digest(LITE0.files))
    with pytest.raises(WeightsError, match="pickles are never delivered"):
        shelf.manifest(plan, base=tmp_path)
    assert not (tmp_path / "shelf").exists()


@pytest.mark.parametrize("damage", ["gone", "shorter"])
def test_a_file_that_changes_under_a_delivery_is_an_error(
    damage: str, shelf: BackboneShelf, backbone: Backbone, source: Path, tmp_path: Path
) -> None:
    manifest = shelf.manifest(backbone, base=tmp_path)
    file = shelved(tmp_path / "shelf", backbone) / "vocab.txt"
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(CONTENT["vocab.txt"][:-1])
    with pytest.raises(WeightsError, match="start the run again"):
        shelf.chunk(manifest, Position(name="vocab.txt", offset=0))


def test_a_source_that_changes_while_it_is_copied_is_not_kept(
    shelf: BackboneShelf, source: Path, backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "veil.server.delivery.shutil.copyfile",
        lambda given, target: target.write_bytes(given.read_bytes().replace(b"bert", b"hurt")),
    )
    with pytest.raises(WeightsError, match="changed while it was copied"):
        shelf.manifest(backbone, base=tmp_path)
    assert not [path for path in (tmp_path / "shelf").rglob("*") if path.is_file()]


def test_a_shelf_that_cannot_be_written_says_so(source: Path, backbone: Backbone, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(WeightsError, match="make room there"):
        BackboneShelf(tmp_path / "file" / "shelf").manifest(backbone, base=tmp_path)


class FakeClock:
    """Seconds that pass by waiting only."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def pause(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds


SIZES = {"config.json": 22, WEIGHTS_NAME: 3 * CHUNK_BYTES, "vocab.txt": 5}
MANIFEST = Manifest(entries=tuple(FileEntry(name=name, size=size, sha256=OTHER) for name, size in SIZES.items()))


def chunk(manifest: Manifest, position: Position) -> Chunk:
    """A piece of no particular content."""
    return Chunk(manifest=manifest.digest, position=position, data=b"x")


def receiving(name: str = WEIGHTS_NAME, offset: int = 0) -> Progress:
    return Progress(manifest=MANIFEST.digest, standing=Standing.RECEIVING, next=Position(name=name, offset=offset))


COMPLETE = Progress(manifest=MANIFEST.digest, standing=Standing.COMPLETE)
WANTED = Progress(manifest=MANIFEST.digest, standing=Standing.MANIFEST_WANTED)


@dataclass(kw_only=True)
class FakeSites:
    """Sites that answer as a script says; the last answer for ever after, None for silence.

    Attributes:
        script: site → its answers.
        heard: what each was sent.
    """

    script: Mapping[str, list[Progress | None]]
    heard: dict[str, list[Manifest | Chunk]] = field(default_factory=dict)

    def ask(self, pieces: Mapping[str, Manifest | Chunk]) -> dict[str, Progress]:
        answers: dict[str, Progress] = {}
        for site, piece in pieces.items():
            heard = self.heard.setdefault(site, [])
            answer = self.script[site][min(len(heard), len(self.script[site]) - 1)]
            heard.append(piece)
            assert len(heard) < 1000, "this delivery never ends"
            if answer is not None:
                answers[site] = answer
        return answers


def delivered(
    timeout_s: float = 1e9, **script: list[Progress | None]
) -> tuple[dict[str, RefusalCode | None], FakeSites]:
    sites, clock = FakeSites(script=script), FakeClock()
    result = deliver(
        sites.ask, list(script), MANIFEST, chunk, timeout_s=timeout_s, clock=clock, pause=clock.pause
    )  # fmt: skip
    return result, sites


def test_a_site_is_shown_the_manifest_first_and_then_what_it_asks_for() -> None:
    result, sites = delivered(a=[receiving("vocab.txt", 3), receiving("config.json", 7), COMPLETE])
    assert result == {"a": None}
    manifest, *pieces = sites.heard["a"]
    assert manifest is MANIFEST
    assert [piece.position for piece in pieces if isinstance(piece, Chunk)] == [
        Position(name="vocab.txt", offset=3),
        Position(name="config.json", offset=7),
    ]


def test_a_site_that_has_it_already_is_sent_nothing() -> None:
    result, sites = delivered(a=[COMPLETE])
    assert result == {"a": None}
    assert sites.heard["a"] == [MANIFEST]


def test_each_site_goes_at_its_own_pace() -> None:
    fast: list[Progress | None] = [receiving("config.json"), receiving(), COMPLETE]
    slow: list[Progress | None] = [None, receiving("config.json"), None, None, receiving(), None, WANTED, COMPLETE]
    result, sites = delivered(fast=fast, slow=slow)
    assert result == {"fast": None, "slow": None}
    assert len(sites.heard["fast"]) == 3
    assert len(sites.heard["slow"]) == 8


def test_a_piece_is_read_once_for_all_sites_that_are_there() -> None:
    read: list[Position] = []

    def counted(manifest: Manifest, position: Position) -> Chunk:
        read.append(position)
        return chunk(manifest, position)

    script: list[Progress | None] = [receiving("config.json"), receiving(), COMPLETE]
    sites, clock = FakeSites(script={"a": script, "b": script}), FakeClock()
    deliver(sites.ask, ["a", "b"], MANIFEST, counted, timeout_s=9.0, clock=clock, pause=clock.pause)
    assert read == [Position(name="config.json", offset=0), Position(name=WEIGHTS_NAME, offset=0)]


def test_a_site_that_was_started_again_is_shown_the_manifest_again() -> None:
    result, sites = delivered(a=[receiving(), WANTED, receiving(offset=5), COMPLETE])
    assert result == {"a": None}
    assert [type(piece) for piece in sites.heard["a"]] == [Manifest, Chunk, Manifest, Chunk]


@pytest.mark.parametrize("answer", [receiving(), WANTED])
def test_a_site_that_gets_no_further_is_given_up(answer: Progress) -> None:
    result, sites = delivered(stuck=[receiving("config.json"), answer], good=[receiving(), COMPLETE])
    assert result == {"stuck": RefusalCode.BACKBONE, "good": None}
    assert len(sites.heard["stuck"]) < 12


def test_a_site_that_goes_back_and_forth_is_given_up() -> None:
    there_and_back: list[Progress | None] = [receiving("vocab.txt"), *[receiving("config.json"), receiving()] * 400]
    result, sites = delivered(a=there_and_back)
    assert result == {"a": RefusalCode.BACKBONE}
    assert len(sites.heard["a"]) < 12


def test_a_site_that_takes_a_byte_at_a_time_is_given_up() -> None:
    result, sites = delivered(a=[receiving(offset=at) for at in range(900)])
    assert result == {"a": RefusalCode.BACKBONE}
    assert len(sites.heard["a"]) <= 2 * 6 + 64


def test_a_silent_site_is_given_up_at_the_deadline() -> None:
    result, sites = delivered(timeout_s=20.0, silent=[None], good=[receiving(), COMPLETE])
    assert result == {"silent": RefusalCode.BACKBONE, "good": None}
    assert 2 < len(sites.heard["silent"]) <= 22


def test_nobody_is_asked_when_there_is_no_time_or_no_site() -> None:
    assert delivered(timeout_s=0.0, a=[COMPLETE]) == ({"a": RefusalCode.BACKBONE}, FakeSites(script={"a": [COMPLETE]}))
    assert delivered()[0] == {}


@pytest.mark.parametrize("code", [RefusalCode.BACKBONE, RefusalCode.APPROVAL, RefusalCode.INTERNAL])
def test_a_refusal_is_the_site_s_last_word(code: RefusalCode) -> None:
    no = Progress(manifest="", standing=Standing.REFUSED, refusal=code)
    result, sites = delivered(a=[receiving(), no], b=[no])
    assert result == {"a": code, "b": code}
    assert (len(sites.heard["a"]), len(sites.heard["b"])) == (2, 1)


@pytest.mark.parametrize(
    "answer",
    [
        Progress(manifest=OTHER, standing=Standing.COMPLETE),
        Progress(manifest=OTHER, standing=Standing.MANIFEST_WANTED),
        receiving("merges.txt"),
        receiving("config.json", SIZES["config.json"]),
        receiving(offset=SIZES[WEIGHTS_NAME]),
    ],
)
def test_an_answer_that_makes_no_sense_ends_the_delivery(answer: Progress) -> None:
    result, sites = delivered(a=[receiving(), answer])
    assert result == {"a": RefusalCode.MALFORMED}
    assert len(sites.heard["a"]) == 2


def test_a_piece_that_cannot_be_read_ends_everything() -> None:
    def unreadable(manifest: Manifest, position: Position) -> Chunk:
        raise WeightsError("vocab.txt", "as it was", "start the run again")

    sites, clock = FakeSites(script={"a": [receiving()]}), FakeClock()
    with pytest.raises(WeightsError, match="start the run again"):
        deliver(sites.ask, ["a"], MANIFEST, unreadable, timeout_s=9.0, clock=clock, pause=clock.pause)


@pytest.fixture
def open_store(tmp_path: Path) -> Callable[[str], BackboneStore]:
    """A site's own store, as a process finds it when it starts."""
    return lambda name: BackboneStore(tmp_path / name, mirror=None, accept=True)


def over_the_wire(store: BackboneStore, plan: RunPlan, piece: Manifest | Chunk) -> Progress:
    """There and back through Flower's records, as site and coordinator do it."""
    try:
        if isinstance(piece, Manifest):
            offer, manifest = wire.decode_manifest(wire.encode_manifest(piece, Offer(plan=plan, job="job")))
            assert offer.plan.backbone is not None
            progress = store.begin(manifest, offer.plan.backbone)
        else:
            progress = store.write(wire.decode_chunk(wire.encode_chunk(piece)))
    except RefusalError as error:
        progress = Progress(manifest="", standing=Standing.REFUSED, refusal=error.code)
    return wire.decode_progress(wire.encode_progress(progress))


@pytest.mark.usefixtures("small_pieces")
def test_real_stores_get_it_over_a_wire_that_fails_and_through_restarts(
    shelf: BackboneShelf,
    source: Path,
    backbone: Backbone,
    make_plan: Callable[..., RunPlan],
    open_store: Callable[[str], BackboneStore],
    tmp_path: Path,
) -> None:
    """Every third message to one site is lost, every fourth answer of the other, and one site is started again."""
    plan = make_plan(
        task={"kind": "text-classification", "labels": ["a", "b"]}, backbone=backbone.model_dump(exclude_none=True)
    )
    stores = {"a": open_store("a"), "b": open_store("b")}
    turns = 0

    def ask(pieces: Mapping[str, Manifest | Chunk]) -> dict[str, Progress]:
        nonlocal turns
        turns += 1
        if turns == 5:
            stores["b"] = open_store("b")
        answers = {}
        for name, piece in pieces.items():
            if name == "a" and turns % 3 == 0:
                continue
            answer = over_the_wire(stores[name], plan, piece)
            if name == "a" or turns % 4:
                answers[name] = answer
        return answers

    manifest, clock = shelf.manifest(backbone, base=tmp_path), FakeClock()
    result = deliver(ask, ["a", "b"], manifest, shelf.chunk, timeout_s=9.0, clock=clock, pause=clock.pause)
    assert result == {"a": None, "b": None}
    for store in stores.values():
        folder = Path(store.find(backbone).source.removeprefix("path:"))
        assert {name: (folder / name).read_bytes() for name in CONTENT} == CONTENT


@pytest.mark.usefixtures("small_pieces")
def test_bytes_that_a_wire_changed_are_refused_by_the_site(
    shelf: BackboneShelf, source: Path, backbone: Backbone, open_store: Callable[[str], BackboneStore], tmp_path: Path
) -> None:
    store, clock = open_store("a"), FakeClock()
    plan = RunPlan.model_validate(
        {
            "name": "p",
            "task": {"kind": "text-classification", "labels": ["a", "b"]},
            "privacy": {"target_epsilon": 3.0},
            "backbone": backbone.model_dump(),
        }
    )

    def ask(pieces: Mapping[str, Manifest | Chunk]) -> dict[str, Progress]:
        (piece,) = pieces.values()
        if isinstance(piece, Chunk) and piece.position == Position(name="vocab.txt", offset=PIECE):
            piece = Chunk(manifest=piece.manifest, position=piece.position, data=piece.data[::-1])
        return {"a": over_the_wire(store, plan, piece)}

    manifest = shelf.manifest(backbone, base=tmp_path)
    result = deliver(ask, ["a"], manifest, shelf.chunk, timeout_s=9.0, clock=clock, pause=clock.pause)
    assert result == {"a": RefusalCode.BACKBONE}
    assert not store.has(backbone)
    assert not [path for path in (tmp_path / "a").rglob("*") if path.is_file()]


@pytest.mark.parametrize("kind", [LITE0, GE2E], ids=lambda kind: kind.name)
def test_a_real_pickled_one_is_sent_as_safetensors_to_a_site_without_its_package(
    kind: Pickled,
    shelf: BackboneShelf,
    open_store: Callable[[str], BackboneStore],
    make_plan: Callable[..., RunPlan],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VEIL_CACHE", str(tmp_path / "cache"))
    pickled_sha256, weights_sha256 = next(iter(kind.safetensors.items()))
    pinned = Backbone(source=kind.source, sha256=pickled_sha256)
    manifest = shelf.manifest(pinned, base=tmp_path)
    assert manifest.sha256 == weights_sha256
    assert {one.name: one.sha256 for one in manifest.entries if one.name != WEIGHTS_NAME} == kind.files
    elsewhere = pinned.model_copy(update={"source": "package:a_package_that_this_site_lacks"})
    plan = make_plan(
        task={"kind": f"{kind.modality}-classification", "labels": ["a", "b"]},
        backbone=elsewhere.model_dump(exclude_none=True),
    )
    store, clock = open_store("a"), FakeClock()
    assert not store.has(elsewhere)
    result = deliver(
        lambda pieces: {name: over_the_wire(store, plan, piece) for name, piece in pieces.items()},
        ["a"],
        manifest,
        shelf.chunk,
        timeout_s=9.0,
        clock=clock,
        pause=clock.pause,
    )
    assert result == {"a": None}
    assert store.find(elsewhere).sha256 == weights_sha256
    assert shelf.find(pinned).sha256 == weights_sha256
