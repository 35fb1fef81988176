# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.server.home`: what is written into a coordinator's folder is what is read from it."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from veil.common.errors import InputError
from veil.common.keys import NodeKey
from veil.server import home as module
from veil.server.home import SETTINGS_NAME, Home, Settings

ODD = Settings(
    hosts=("veil.example", "10.0.0.1", "::1"),
    listen="::",
    port=443,
    page_address="",
    health_address="[::1]:8481",
    certificate='/etc/veil "new"/link.pem',
    key="C:\\keys\\link.key",
    ca="/etc/Krankenhäuser/🏥.pem",
)


@pytest.mark.parametrize("settings", [Settings(hosts=("localhost",)), ODD], ids=["defaults", "odd"])
def test_settings_are_read_as_they_were_written(tmp_path: Path, settings: Settings) -> None:
    Home.create(tmp_path / "home", settings)
    assert Home.open(tmp_path / "home").settings == settings


def test_every_key_is_written_with_what_it_means(tmp_path: Path) -> None:
    home = Home.create(tmp_path / "home", Settings(hosts=("localhost",)))
    text = (home.folder / SETTINGS_NAME).read_text(encoding="utf-8")
    for name, field in Settings.model_fields.items():
        assert any(
            line.startswith(f"{name} = ") and line.endswith(f"# {field.description}") for line in text.split("\n")
        )


def test_the_folder_is_its_owners(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir(mode=0o755)
    home = Home.create(tmp_path / "home", Settings(hosts=("localhost",)))
    assert stat.S_IMODE(home.folder.stat().st_mode) == 0o700
    assert home.runs.is_dir()


def test_the_signing_key_is_made_once_whole_and_readable_by_its_owner_alone(home: Home) -> None:
    first = home.signing_key()
    assert stat.S_IMODE(home.key_file.stat().st_mode) == 0o600
    assert home.signing_key().public_pem == NodeKey.load(home.key_file).public_pem == first.public_pem
    assert sorted(path.name for path in home.folder.iterdir() if "key" in path.name) == ["coordinator.key"]
    home.key_file.chmod(0o640)
    with pytest.raises(InputError, match="read by others"):
        home.signing_key()


def test_of_two_that_make_a_signing_key_at_once_both_get_the_first(home: Home) -> None:
    """The other one looked before this one wrote."""
    first = home.signing_key().public_pem
    module._make_key(home.key_file)
    assert home.signing_key().public_pem == first


def test_a_folder_is_not_made_twice(tmp_path: Path) -> None:
    Home.create(tmp_path, Settings(hosts=("localhost",)))
    with pytest.raises(InputError, match="exists"):
        Home.create(tmp_path, Settings(hosts=("veil.example",)))
    assert Home.open(tmp_path).settings.hosts == ("localhost",)


def test_a_folder_that_is_none_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="veil coordinator init"):
        Home.open(tmp_path)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "missing key hosts"),
        ("hosts = []", "hosts = "),
        ('hosts = ["localhost"]\nport = 0', "port = 0"),
        ('hosts = ["localhost"]\nport = "x"', "port = "),
        ('hosts = ["localhost"]\nprot = 8443', "unknown key prot"),
        ('hosts = ["https://localhost"]', "https://localhost"),
        ("hosts = [", "coordinator.toml"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path: Path, text: str, found: str) -> None:
    (tmp_path / SETTINGS_NAME).write_text(text, encoding="utf-8")
    with pytest.raises(InputError) as error:
        Home.open(tmp_path)
    assert found in str(error.value)
    assert "plan reference" not in str(error.value)


@pytest.mark.parametrize("key", ["page_address", "health_address"])
@pytest.mark.parametrize("address", ["8480", ":8480", "localhost", "127.0.0.1:", "127.0.0.1:99999", "127.0.0.1:http"])
def test_an_address_without_a_host_is_not_every_address(key: str, address: str) -> None:
    """An empty host would put the page on every address of the machine."""
    with pytest.raises(InputError, match="host:port"):
        Settings.model_validate({"hosts": ["localhost"], key: address})


@pytest.mark.parametrize(
    ("hosts", "url"),
    [
        (("veil.example", "10.0.0.1"), "https://veil.example:8443"),
        (("10.0.0.1",), "https://10.0.0.1:8443"),
        (("::1", "localhost"), "https://[::1]:8443"),
    ],
)
def test_sites_are_told_the_first_host(tmp_path: Path, hosts: tuple[str, ...], url: str) -> None:
    assert Home.create(tmp_path, Settings(hosts=hosts)).url == url


def test_paths_start_from_the_folder_wherever_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Home.create(tmp_path / "home", Settings(hosts=("localhost",)))
    monkeypatch.chdir(tmp_path)
    home = Home.open(Path("home"))
    monkeypatch.chdir("/")
    assert home.path("pki/ca.pem") == tmp_path.resolve() / "home" / "pki" / "ca.pem"
    assert home.path("/etc/ca.pem") == Path("/etc/ca.pem")
    files = {home.database, home.roster, home.runs, home.shelf, home.pid_file}
    assert len(files) == 5
    assert {path.parent for path in files} == {tmp_path.resolve() / "home"}
