# SPDX-License-Identifier: Apache-2.0
"""Where pretrained weights are found, and the check that they are the pinned ones.

No byte of a weights file is parsed before its SHA-256 is the pinned one, the configuration and tokenizer beside it
are the pinned ones where a plan pins them, and no code that lies there is ever imported; whatever is missing, damaged
or ambiguous is a `WeightsError`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from veil.common import pickled
from veil.common.errors import WeightsError
from veil.common.plan_sections import Backbone

WEIGHTS_NAME: Final = "model.safetensors"
COMPANIONS: Final = (
    "config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
)
"""Every file that is read beside the weights: configuration and tokenizer, never code or pickles."""

_INDEX_NAME: Final = "model.safetensors.index.json"
_HUB_SOURCE: Final = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)@(?P<revision>\w[\w.-]*(?:/\w[\w.-]*)*)", re.ASCII)
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_HUB_TIMEOUT_S: Final = 5.0
_CHUNK_BYTES: Final = 1 << 20
_MAX_HEADER_BYTES: Final = 100_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class PinnedWeights:
    """Weights on this machine, known by their hash.

    Attributes:
        folder: where configuration and tokenizer lie.
        weights_file: the one file with the tensors.
        sha256: SHA-256 of `weights_file`, as it was found, 64 hex digits.
        files_sha256: `files_digest` of the configuration and tokenizer that are read with it.
        source: the source it was found by, as written in the plan.
        licence: SPDX name as written in the plan, "" when not given.
    """

    folder: Path
    weights_file: Path
    sha256: str
    files_sha256: str
    source: str
    licence: str


def locate(backbone: Backbone, *, base: Path, network: bool = True) -> PinnedWeights:
    """Find a plan's weights and check that they are the pinned ones.

    Args:
        backbone: source and hashes, from the plan.
        base: folder that a relative `path:` source starts from.
        network: whether a `hub:` source may be fetched; without, only the local cache is looked at.

    Raises:
        WeightsError: nothing or too much found, another hash than a pinned one, or a damaged file.
    """
    found = _hashed(backbone.source, base, network)
    if found.sha256 != backbone.sha256:
        raise WeightsError(
            f"{found.weights_file} has SHA-256 {found.sha256}",
            f"the pinned SHA-256 {backbone.sha256}",
            "obtain the pinned file again, or pin the found hash if these are the weights you mean",
        )
    if backbone.files_sha256 not in (None, found.files_sha256):
        raise WeightsError(
            f"the configuration and tokenizer files in {found.folder} have SHA-256 {found.files_sha256}",
            f"the pinned files_sha256 {backbone.files_sha256}",
            "obtain the pinned files again, or pin the found hash if these are the files you mean",
        )
    _check_layout(found.weights_file)
    return replace(found, licence=backbone.licence)


def fingerprint(source: str, *, base: Path) -> PinnedWeights:
    """Find weights for a plan's author, whose plan will pin the hash found here.

    Args:
        source: `package:NAME[/FOLDER]`, `path:FOLDER` or `hub:ORG/NAME@REVISION`.
        base: folder that a relative `path:` source starts from.

    Raises:
        WeightsError: nothing or too much found, or a damaged file.
    """
    found = _hashed(source, base, network=True)
    _check_layout(found.weights_file)
    return found


def as_safetensors(backbone: Backbone) -> Backbone:
    """The hashes of the form in which a backbone can travel: its own, or those of a pickled one's conversion."""
    kind = pickled.converted_from(backbone.sha256)
    if kind is None:
        return backbone
    files = backbone.files_sha256 or files_digest(kind.files)
    return backbone.model_copy(update={"sha256": kind.safetensors[backbone.sha256], "files_sha256": files})


def files_digest(digests: Mapping[str, str]) -> str:
    """One hash over files: that of the lines `sha256sum` prints for them, sorted by name, as 64 hex digits."""
    lines = "".join(f"{digests[name]}  {name}\n" for name in sorted(digests))
    return hashlib.sha256(lines.encode()).hexdigest()


def companion_digests(folder: Path) -> dict[str, str]:
    """Name and SHA-256 of every configuration and tokenizer file in a model folder.

    Raises:
        WeightsError: a file cannot be read.
    """
    return {name: sha256_of(folder / name) for name in COMPANIONS if (folder / name).is_file()}


def sha256_of(file: Path) -> str:
    """SHA-256 of a file's bytes, as 64 hex digits.

    Raises:
        WeightsError: the file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with file.open("rb") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                digest.update(chunk)
    except OSError as error:
        raise WeightsError(
            f"{file}: {error.strerror}", "a readable file", "check the path and its permissions"
        ) from None
    return digest.hexdigest()


def cache_folder() -> Path:
    """Folder for what Veil can compute again: `$VEIL_CACHE`, or the platform's own place for caches."""
    if chosen := os.environ.get("VEIL_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "veil"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "veil" / "cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "veil"


def _hashed(source: str, base: Path, network: bool) -> PinnedWeights:
    file = _weights_file(_folder(source, base, network), source)
    kind = pickled.kind_of(file)
    beside = companion_digests(file.parent) if kind is None else kind.files
    return PinnedWeights(
        folder=file.parent,
        weights_file=file,
        sha256=sha256_of(file),
        files_sha256=files_digest(beside),
        source=source,
        licence="",
    )


def _folder(source: str, base: Path, network: bool) -> Path:
    kind, _, rest = source.partition(":")
    if not rest or kind not in ("package", "path", "hub"):
        raise WeightsError(
            f"backbone source {source!r}",
            "package:NAME[/FOLDER], path:FOLDER or hub:ORG/NAME@REVISION",
            "write the source in one of these forms",
        )
    if kind == "package":
        folder = _package_folder(rest)
    elif kind == "path":
        folder = base / Path(rest).expanduser()
    else:
        folder = _hub_folder(rest, network)
    if not folder.is_dir():
        raise WeightsError(f"{source}: no folder {folder}", "a folder with the weights", "check the source")
    return folder


def _package_folder(rest: str) -> Path:
    name, _, inside = rest.partition("/")
    if not name.isidentifier() or Path(inside).is_absolute() or ".." in Path(inside).parts:
        raise WeightsError(
            f"backbone source package:{rest}",
            "an importable name, then a folder inside that package",
            "write package:NAME or package:NAME/FOLDER",
        )
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise WeightsError(
            f"no package {name} is installed in {sys.prefix}",
            "an installed package that carries the weights",
            f"install the distribution that provides {name}, or use a path: source",
        )
    return Path(next(iter(spec.submodule_search_locations))) / inside


def _hub_folder(rest: str, network: bool) -> Path:
    named = _HUB_SOURCE.fullmatch(rest)
    if named is None:
        raise WeightsError(
            f"backbone source hub:{rest}",
            "hub:ORG/NAME@REVISION with the revision written out",
            "add @ and the commit hash of the model repository",
        )
    try:
        return _snapshot(named["repo"], named["revision"], network)
    except Exception as error:  # the hub client, its HTTP library and the disk each raise their own kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise WeightsError(
            f"hub:{rest} could not be had: {reason}",
            "a snapshot in the local Hugging Face cache, or a reachable hub",
            "use a path: or package: source, or point HF_HUB_CACHE at a cache that holds this revision",
        ) from None


def _snapshot(repo: str, revision: str, network: bool) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    wanted = [WEIGHTS_NAME, _INDEX_NAME, *COMPANIONS]
    fetch = partial(snapshot_download, repo, allow_patterns=wanted, etag_timeout=_HUB_TIMEOUT_S)
    if not network:
        return Path(fetch(revision=revision, local_files_only=True))
    if _COMMIT.fullmatch(revision):
        try:
            return Path(fetch(revision=revision, local_files_only=True))
        except FileNotFoundError:
            pass
    try:
        # One quick question first: without a network, snapshot_download alone retries for half a minute.
        commit = HfApi().model_info(repo, revision=revision, timeout=_HUB_TIMEOUT_S).sha
    except Exception as unreachable:
        try:
            return Path(fetch(revision=revision, local_files_only=True))
        except FileNotFoundError:
            raise unreachable from None
    return Path(fetch(revision=commit or revision))


def _weights_file(folder: Path, source: str) -> Path:
    found = sorted(folder.glob("*.safetensors"))
    if (folder / _INDEX_NAME).exists() or any(re.search(r"-\d{5}-of-\d{5}\.", one.name) for one in found):
        raise WeightsError(
            f"{source}: a checkpoint in several shards in {folder}",
            f"one file {WEIGHTS_NAME}; shards are not supported yet",
            "save the model again as one file, with a shard size above its own",
        )
    found += sorted({one for kind in pickled.KINDS for pattern in kind.patterns for one in folder.glob(pattern)})
    if len(found) == 1 and (found[0].name == WEIGHTS_NAME or pickled.kind_of(found[0])):
        return found[0]
    raise WeightsError(
        f"{source}: {', '.join(one.name for one in found) or 'no weights'} in {folder}",
        f"exactly one weights file, {WEIGHTS_NAME}",
        "name the folder that holds this one file; save pickled weights (.bin, .pt) as safetensors first",
    )


def _check_layout(file: Path) -> None:
    """Refuse a safetensors file that its tensors do not fill exactly; conversion.py checks pickled ones."""
    if file.suffix != ".safetensors":
        return
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
            raise _damaged(file, f"{size} bytes, too few for its header of {length} bytes")
        header = stream.read(length)
    expected = 8 + length + _data_bytes(file, header)
    if size != expected:
        raise _damaged(file, f"{size} bytes, but its header describes {expected}")


def _data_bytes(file: Path, header: bytes) -> int:
    """Bytes the header's tensors take, which must lie one after the other without gap or overlap."""
    try:
        document: dict[str, Any] = json.loads(header)
        spans = sorted(_span(entry) for name, entry in document.items() if name != "__metadata__")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise _damaged(file, "a header that is not a table of tensors") from None
    end = 0
    for begin, stop in spans:
        if begin != end or stop < begin:
            raise _damaged(file, f"a tensor at bytes {begin} to {stop} where {end} should begin the next")
        end = stop
    return end


def _span(entry: dict[str, Any]) -> tuple[int, int]:
    begin, stop = entry["data_offsets"]
    if type(begin) is not int or type(stop) is not int:
        raise TypeError
    return begin, stop


def _damaged(file: Path, found: str) -> WeightsError:
    return WeightsError(
        f"{file}: {found}", "a complete safetensors file", "obtain the file again; it was cut or altered"
    )
