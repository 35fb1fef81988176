# SPDX-License-Identifier: Apache-2.0
"""What deploy/ says is what the code says: commands, options, variables, ports, paths, versions; and it is tight."""

from __future__ import annotations

import ast
import configparser
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any, Protocol

import click
import pytest
import typer
import yaml  # type: ignore[import-untyped]
from packaging.utils import canonicalize_name

from veil.client import joining
from veil.client.site_file import Agent, read_site_file
from veil.client.wording import REFUSALS
from veil.common.errors import RefusalCode
from veil.common.invitation import Invitation
from veil.common.plan import parse_plan
from veil.server.home import Settings
from veil.server.pki import make_authority
from veil.simulations.cli import app

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
RUNBOOK = (DEPLOY / "README.md").read_text(encoding="utf-8")
SOURCES = sorted(one for root in ("common", "client", "server", "simulations") for one in (ROOT / root).rglob("*.py"))
TEXTS = sorted(one for one in DEPLOY.rglob("*") if one.is_file())
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
COMPOSED = sorted((DEPLOY / "compose").glob("*.yaml"))
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
NONROOT = 10001

OTHERS = {
    "cat",
    "cd",
    "chown",
    "cp",
    "docker",
    "done",
    "echo",
    "export",
    "grep",
    "install",
    "journalctl",
    "kill",
    "kubectl",
    "make",
    "mkdir",
    "rm",
    "sleep",
    "systemctl",
    "systemd-sysusers",
    "wait",
}
"""Programs besides `veil` that the runbook may use."""


class ShellBlock(Protocol):
    """A block of the runbook."""

    @property
    def section(self) -> str: ...
    @property
    def lines(self) -> tuple[str, ...]: ...


def root_command() -> click.Group:
    command = typer.main.get_command(app)
    assert isinstance(command, click.Group)
    return command


def check_words(words: Sequence[str]) -> None:
    """Parse a command line behind `veil` as the program would, and run nothing.

    Raises:
        click.ClickException: when it is none.
    """
    command: click.Command = root_command()
    rest = list(words)
    while isinstance(command, click.Group):
        if not rest or rest[0] not in command.commands:
            raise click.UsageError(f"no command {rest[:1]} in {command.name}")
        command = command.commands[rest.pop(0)]
    command.make_context(command.name, rest)


def commands_of(line: str) -> Iterator[list[str]]:
    """The simple commands of a line of shell, without keywords, assignments and redirections."""
    line = re.sub(r"\d?>>? *\S+", "", line)
    for part in re.split(r"\|\||&&|[;&|]", re.sub(r"\w+=\$\((.*)\)", r"\1", line)):
        words = shlex.split(part)
        while words and (words[0] in {"until", "do"} or re.fullmatch(r"\w+=.*", words[0])):
            words.pop(0)
        if words:
            yield words


def veil_words(words: list[str]) -> list[str] | None:
    """What stands behind `veil` in a command, also within a container; None for another program."""
    if words[0] == "sudo":
        words = words[3:] if words[1] == "-u" else words[1:]
    if words[:2] == ["docker", "compose"] and "run" in words:
        service = next(index for index, word in enumerate(words) if word in {"coordinator", "site"})
        return words[service:]
    if words[0] in {"docker", "kubectl"}:
        inside = words.index("exec") if "exec" in words else len(words)
        return words[words.index("veil") + 1 :] if "veil" in words[inside:] else None
    return words[1:] if Path(words[0]).name == "veil" else None


def test_every_veil_command_of_the_runbook_is_one(blocks: Sequence[ShellBlock]) -> None:
    seen = set()
    for words in (words for block in blocks for line in block.lines for words in commands_of(line)):
        behind = veil_words(list(words))
        if behind is None:
            program = words[3] if words[:2] == ["sudo", "-u"] else words[words[0] == "sudo"]
            assert program in OTHERS, f"{' '.join(words)}: neither veil nor a program that the runbook may use"
            continue
        try:
            check_words(behind)
        except click.ClickException as error:
            pytest.fail(f"{' '.join(words)}: {error.format_message()}")
        seen.add(tuple(word for word in behind[:2] if not word.startswith(("-", "$"))))
    needed = {"init", "start", "invite", "certify", "run", "status", "revoke"}
    assert {second for first, *rest in seen for second in rest if first == "coordinator"} >= needed
    needed = {"init", "doctor", "start", "approve", "status", "ledger", "export-log"}
    assert {second for first, *rest in seen for second in rest if first == "site"} >= needed


def test_a_wrong_command_is_noticed() -> None:
    for line in ("veil site init", "veil site inti x", "veil site status --jsn", "veil coordinator init --port 99999"):
        (words,) = commands_of(line)
        with pytest.raises(click.ClickException):
            check_words(veil_words(words) or [])


def test_every_command_in_the_runbook_s_text_is_one() -> None:
    prose = re.sub(r"^```.*?^```$", "", RUNBOOK, flags=re.DOTALL | re.MULTILINE)
    named = re.findall(r"`veil ([a-z -]+?)`", prose)
    assert len(named) > 5
    for words in named:
        command: click.Command = root_command()
        for word in words.split():
            assert isinstance(command, click.Group) and word in command.commands, f"`veil {words}` in the runbook"
            command = command.commands[word]
    for option in re.findall(r"`(--[a-z-]+)", prose):
        assert option in all_options() | {"--target", "--build-arg"}, option


def walk(command: click.Command) -> Iterator[click.Command]:
    yield command
    if isinstance(command, click.Group):
        for inner in command.commands.values():
            yield from walk(inner)


def all_options() -> set[str]:
    parameters = [one for command in walk(root_command()) for one in command.params]
    return {word for one in parameters for word in (*one.opts, *one.secondary_opts)}


def variables() -> set[str]:
    """Environment variables that options read."""
    found = set()
    for parameter in (one for command in walk(root_command()) for one in command.params):
        named = parameter.envvar or ()
        found |= {named} if isinstance(named, str) else set(named)
    return found


def test_every_variable_is_one_that_the_program_reads() -> None:
    for path in TEXTS:
        named = set(re.findall(r"\bVEIL_[A-Z_]+", path.read_text(encoding="utf-8")))
        assert named <= variables(), f"{path.name} sets {named - variables()}"


def port_of(address: str) -> int:
    return int(address.rpartition(":")[2])


def default(model: type[Settings] | type[Agent], key: str) -> Any:
    return model.model_fields[key].default


PORTS = {
    "coordinator": {
        "link": default(Settings, "port"),
        "page": port_of(default(Settings, "page_address")),
        "health": port_of(default(Settings, "health_address")),
    },
    "site": {
        "health": port_of(default(Agent, "health_address")),
        "metrics": port_of(default(Agent, "metrics_address")),
    },
}


def test_the_runbook_s_table_of_ports_is_the_code_s() -> None:
    shown = dict(re.findall(r"^\| (\w+: [\w ]+?) \| `([\w.:]+)` \|", RUNBOOK, re.MULTILINE))
    assert shown == {
        "coordinator: link": f"{default(Settings, 'listen')}:{default(Settings, 'port')}",
        "coordinator: page and metrics": default(Settings, "page_address"),
        "coordinator: gRPC health": default(Settings, "health_address"),
        "site: gRPC health": default(Agent, "health_address"),
        "site: metrics": default(Agent, "metrics_address"),
    }


def test_the_runbook_explains_every_refusal() -> None:
    shown = set(re.findall(r"^\| `([a-z-]+)` \|", RUNBOOK, re.MULTILINE))
    assert shown == {code.value for code in RefusalCode}
    assert set(REFUSALS) >= shown


def test_a_prepared_site_file_is_joined_without_writing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container: settings on a read-only mount, keys on a volume."""
    enrolled = list[str]()
    monkeypatch.setattr(joining, "enrol", lambda invitation, key: enrolled.append(invitation.site))
    text = (DEPLOY / "example" / "site.toml").read_text(encoding="utf-8")
    settings, volumes = tmp_path / "etc", tmp_path / "volumes"
    settings.mkdir()
    (settings / "site.toml").write_text(text.replace("/var/lib/veil", str(volumes)), encoding="utf-8")
    pem = make_authority(tmp_path / "pki", "Veil coordinator veil.example.org").read_text(encoding="ascii")
    invitation = Invitation(
        site="north", url=invited_url(), secret="s" * 43, expires=datetime.now(UTC) + timedelta(days=1), ca=pem
    )
    joining.join(invitation, settings, dict)
    assert enrolled == ["north"]
    assert {path.name for path in (volumes / "keys").iterdir()} == {"node.key", "coordinator.pem"}
    assert [path.name for path in settings.iterdir()] == ["site.toml"]


def invited_url() -> str:
    """What a coordinator made as the runbook says tells its sites."""
    hosts = set(
        re.findall(r"--host ((?!127)\S+)", RUNBOOK + (DEPLOY / "kubernetes" / "coordinator.yaml").read_text("utf-8"))
    )
    (host,) = hosts
    return f"https://{host}:{default(Settings, 'port')}"


def test_the_example_files_are_read_by_the_code() -> None:
    plan, site = parse_plan(DEPLOY / "example" / "plan.toml"), read_site_file(DEPLOY / "example" / "site.toml")
    assert site.data.features is not None and plan.task.width == len(site.data.features)
    assert site.coordinator.url == invited_url()
    assert set(plan.task.bounds) == set(site.data.features)
    assert set(site.data.labels.values()) == set(plan.task.labels)
    assert plan.privacy.target_epsilon <= site.limits.epsilon_per_run and site.limits.approval == "ask"
    state, anchor = str(site.agent.state), str(site.agent.anchor)
    assert (state, anchor) == ("/var/lib/veil/state", "/var/lib/veil/keys/ledger.anchor")
    assert str(site.agent.key).startswith("/var/lib/veil/keys/")
    assert {site.agent.health_address, site.agent.metrics_address} == {
        f"0.0.0.0:{port}" for port in PORTS["site"].values()
    }


def version() -> str:
    return str(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"])


Instruction = tuple[str, str]


def dockerfile() -> list[Instruction]:
    """Instructions with their arguments, comments left out and lines joined."""
    text = (DEPLOY / "docker" / "Dockerfile").read_text(encoding="utf-8")
    kept = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    lines = [line.split(None, 1) for line in kept.replace("\\\n", " ").splitlines() if line.strip()]
    return [(name, " ".join(rest.split())) for name, rest in lines]


def stages() -> dict[str, list[Instruction]]:
    """Stage → its instructions, with those of the stages of this file that it starts from."""
    found: dict[str, list[Instruction]] = {}
    current = ""
    for name, rest in dockerfile():
        if name == "FROM":
            base, _, current = rest.partition(" AS ")
            found[current] = list(found.get(base, []))
        if current:
            found[current].append((name, rest))
    return found


def test_the_base_is_pinned_and_nothing_is_the_latest() -> None:
    (base,) = (rest for name, rest in dockerfile() if name == "ARG")
    assert re.fullmatch(r"BASE=python:3\.11\.\d+-slim-(bookworm|trixie)(@sha256:[0-9a-f]{64})?", base)
    for name, rest in dockerfile():
        if name == "FROM":
            image, _, stage = rest.partition(" AS ")
            assert stage and (image == "${BASE}" or image in stages()), rest
    assert not [path for path in TEXTS if ":latest" in path.read_text(encoding="utf-8")]


def test_the_dockerfile_adds_nothing_unseen_and_holds_no_secret() -> None:
    assert not [rest for name, rest in dockerfile() if name in {"ADD", "MAINTAINER", "ONBUILD", "SHELL"}]
    for name, rest in dockerfile():
        if name in {"ENV", "ARG"}:
            assert not re.search(r"(?i)secret|password|token|credential|\w*_key\b", rest), rest
        assert not re.search(r"curl|wget|chmod 777|sudo|--trusted-host|apt-get", rest), rest


def test_packages_are_installed_from_the_lock_alone() -> None:
    installs = [one for name, rest in dockerfile() if name == "RUN" for one in rest.split("&&") if "pip install" in one]
    assert len(installs) == 3
    for one in installs:
        assert "--no-deps" in one and "--no-cache-dir" in one
        assert re.search(r"-r (torch|requirements)\.lock$|--no-build-isolation \.$", one.strip()), one
    torch = next(one for one in installs if "torch.lock" in one)
    assert "--index-url https://download.pytorch.org/whl/cpu" in torch and "extra-index" not in " ".join(installs)


def test_the_lock_has_everything_that_the_sources_import() -> None:
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    locked = {canonicalize_name(name) for name in re.findall(r"^([\w.-]+)==", lock, re.MULTILINE)}
    known = packages_distributions()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [one for name, extra in project["optional-dependencies"].items() if name != "dev" for one in extra]
    extras = {re.split(r"[<>=~\[ ]", one)[0] for one in wanted} | {"ray"}
    for path in SOURCES:
        for name in imported(path) - set(sys.stdlib_module_names) - {"veil", "__future__"} - extras:
            assert {canonicalize_name(one) for one in known[name]} & locked, f"{path.name} imports {name}"


def imported(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    found = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    found |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    return {name.partition(".")[0] for name in found}


@pytest.mark.parametrize("role", PORTS)
def test_an_image_is_non_root_and_says_how_it_is(role: str) -> None:
    stage = stages()[role]
    assert [rest for name, rest in stage if name == "USER"] == [f"{NONROOT}:{NONROOT}"]
    (health,) = (rest for name, rest in stage if name == "HEALTHCHECK")
    words = yaml.safe_load(health.partition("CMD ")[2])
    assert words == ["veil", "health", f"127.0.0.1:{PORTS[role]['health']}"]
    check_words(words[1:])
    exposed = next(rest for name, rest in stage if name == "EXPOSE")
    assert set(map(int, exposed.split())) == set(PORTS[role].values())
    (entry,), (words,) = (
        [yaml.safe_load(rest) for name, rest in stage if name == kind] for kind in ("ENTRYPOINT", "CMD")
    )
    assert entry == ["veil", role]
    check_words([*entry[1:], *words])


def test_the_build_sees_what_it_copies_and_nothing_else() -> None:
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert "*" in ignored
    for source in (one for row in copied() for one in row):
        assert (ROOT / source).exists()
        assert f"!{source}" in ignored or f"!{source}/veil" in ignored, source


def test_what_the_build_copies_makes_a_whole_wheel(tmp_path: Path) -> None:
    source = tmp_path / "src"
    source.mkdir()
    for name in (one for row in copied() for one in row):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=source, capture_output=True, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    for path in (
        one for root in ("common", "client", "server", "simulations") for one in (ROOT / root / "veil").rglob("*")
    ):
        name = "/".join(path.relative_to(ROOT).parts[1:])
        assert path.is_dir() or "__pycache__" in name or name in held, name


def copied() -> list[list[str]]:
    """Sources of each COPY from the build's own folder."""
    return [rest.split()[:-1] for name, rest in dockerfile() if name == "COPY" and not rest.startswith("--from")]


@pytest.mark.parametrize("path", COMPOSED, ids=lambda path: path.name)
def test_a_composed_service_is_tight_and_keeps_its_state(path: Path) -> None:
    ((role, service),) = (document := yaml.safe_load(path.read_text(encoding="utf-8")))["services"].items()
    assert service["image"] == f"veil-{role}:{version()}"
    assert service["build"] == {"context": "../..", "dockerfile": "deploy/docker/Dockerfile", "target": role}
    assert (path.parent / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
    check_words([role, *service["command"]])
    assert service["user"] == f"{NONROOT}:{NONROOT}" and service["read_only"] is True and service["init"] is True
    assert service["cap_drop"] == ["ALL"] and service["security_opt"] == ["no-new-privileges:true"]
    assert service["restart"] == "always" and service["mem_limit"] and service["pids_limit"]
    assert not {"privileged", "network_mode", "cap_add", "environment", "env_file", "pid", "devices"} & set(service)
    mounts = [mount.removesuffix(":ro").rpartition(":") for mount in service["volumes"]]
    named = {source for source, _, _ in mounts if re.fullmatch(r"\w+", source)}
    assert named == set(document["volumes"])
    check_writable(role, {target for (_, _, target), mount in zip(mounts, service["volumes"], strict=True)
                          if not mount.endswith(":ro")})  # fmt: skip
    for published in service["ports"]:
        address, _, inner = published.rpartition(":")
        assert int(inner) in PORTS[role].values() and int(address.rpartition(":")[2]) == int(inner)
        assert address.startswith("127.0.0.1:") or int(inner) == PORTS["coordinator"]["link"]


def check_writable(role: str, targets: set[str]) -> None:
    """State is on volumes; a site's ledger and its anchor on two."""
    if role == "coordinator":
        (home,) = targets
        variable = next(rest for name, rest in stages()[role] if name == "ENV" and "VEIL_" in rest)
        assert variable == f"VEIL_COORDINATOR_HOME={home}/home"
    else:
        site = read_site_file(DEPLOY / "example" / "site.toml")
        assert targets == {str(site.agent.state), str(site.agent.anchor.parent)}


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_a_unit_starts_what_there_is_and_is_hardened(path: Path) -> None:
    service = read_unit(path)["Service"]
    program, *words = service["ExecStart"].split()
    assert program == "/opt/veil/bin/veil"
    check_words(words)
    role = words[0]
    assert path.name == f"veil-{role}.service"
    users = re.findall(r"^u (\S+)", (DEPLOY / "systemd" / "veil.conf").read_text(encoding="utf-8"), re.MULTILINE)
    assert service["User"] == service["Group"] == f"veil-{role}" in users
    assert service["Restart"] == "always" and service["KillMode"] == "mixed"
    assert service["ProtectSystem"] == "strict" and service["ProtectHome"] == "yes" and service["UMask"] == "0077"
    assert service["CapabilityBoundingSet"] == "" and service["StateDirectoryMode"] == "0700"
    for key in ("NoNewPrivileges", "PrivateTmp", "PrivateDevices", "RestrictNamespaces", "RestrictSUIDSGID"):
        assert service[key] == "yes", key
    folders = {f"/var/lib/{one}" for one in service["StateDirectory"].split()}
    if role == "coordinator":
        assert service["Environment"] == "VEIL_COORDINATOR_HOME=/var/lib/veil/coordinator/home"
    check_writable(role, folders)


def read_unit(path: Path) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=False, interpolation=None, delimiters=("=",))
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(path.read_text(encoding="utf-8"))
    assert set(parser.sections()) == {"Unit", "Service", "Install"}
    return parser


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not on this machine")
@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_systemd_accepts_a_unit(path: Path, tmp_path: Path) -> None:
    unit = tmp_path / path.name
    installed = Path(sys.executable).with_name("veil")
    unit.write_text(path.read_text(encoding="utf-8").replace("/opt/veil/bin/veil", str(installed)), encoding="utf-8")
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False)
    about = [line for line in done.stderr.splitlines() if path.name in line]
    assert done.returncode == 0 and not about, done.stderr


def documents() -> list[dict[str, Any]]:
    found = [one for path in MANIFESTS for one in yaml.safe_load_all(path.read_text(encoding="utf-8"))]
    assert len(found) > 5
    return found


def of_kind(*kinds: str) -> list[dict[str, Any]]:
    return [one for one in documents() if one["kind"] in kinds]


WORKLOADS = of_kind("StatefulSet", "Job", "Deployment")


def role_of(workload: dict[str, Any]) -> str:
    role = str(workload["spec"]["template"]["metadata"]["labels"]["app.kubernetes.io/name"]).removeprefix("veil-")
    assert role in PORTS
    return role


def containers(workload: dict[str, Any]) -> list[dict[str, Any]]:
    pod = workload["spec"]["template"]["spec"]
    return [*pod.get("initContainers", []), *pod["containers"]]


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda one: one["metadata"]["name"])
def test_a_pod_is_tight(workload: dict[str, Any]) -> None:
    pod = workload["spec"]["template"]["spec"]
    assert pod["automountServiceAccountToken"] is False
    security = pod["securityContext"]
    assert security["runAsNonRoot"] is True and security["runAsUser"] == security["fsGroup"] == NONROOT
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    assert security["fsGroupChangePolicy"] == "OnRootMismatch", "keys must stay closed to the group"
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
    for container in containers(workload):
        assert container["image"] == f"veil-{role_of(workload)}:{version()}"
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert container["resources"]["limits"]["memory"] and "env" not in container
        claimed = {one["metadata"]["name"] for one in workload["spec"].get("volumeClaimTemplates", [])}
        volumes = {volume["name"] for volume in pod["volumes"]} | claimed
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda one: one["metadata"]["name"])
def test_a_container_runs_words_that_there_are(workload: dict[str, Any]) -> None:
    for container in containers(workload):
        if container.get("command") == ["sh", "-c"]:
            for words in commands_of(container["args"][0]):
                if words[0] == "veil":
                    check_words(words[1:])
                    assert f"0.0.0.0:{PORTS['coordinator']['health']}" in words
                else:
                    assert words == ["test", "-f", "$VEIL_COORDINATOR_HOME/coordinator.toml"]
        else:
            check_words([role_of(workload), *container["args"]])


@pytest.mark.parametrize("workload", of_kind("StatefulSet"), ids=lambda one: one["metadata"]["name"])
def test_probes_ask_the_health_service_for_parts_it_knows(workload: dict[str, Any]) -> None:
    ports, literals = PORTS[role_of(workload)], quoted_in_sources()
    (container,) = workload["spec"]["template"]["spec"]["containers"]
    assert {port["name"]: port["containerPort"] for port in container["ports"]} == ports
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container[probe]["grpc"]["port"] == ports["health"]
        assert container[probe]["grpc"].get("service", "veil.site.disk") in literals
    assert "connection" not in container["livenessProbe"]["grpc"].get("service", "connection")


def quoted_in_sources() -> set[str]:
    return {name for path in SOURCES for name in re.findall(r'"(veil\.\w+\.\w+)"', path.read_text(encoding="utf-8"))}


def test_state_is_on_claims_and_the_ledger_and_its_anchor_on_two() -> None:
    claims = {one["metadata"]["name"] for one in of_kind("PersistentVolumeClaim")}
    for workload in WORKLOADS:
        pod = workload["spec"]["template"]["spec"]
        kept = {one["metadata"]["name"] for one in workload["spec"].get("volumeClaimTemplates", [])}
        for volume in pod["volumes"]:
            claim = volume.get("persistentVolumeClaim")
            if claim and not claim.get("readOnly"):
                assert claim["claimName"] in claims
                kept.add(volume["name"])
        for container in containers(workload):
            mounts = [one for one in container["volumeMounts"] if not one.get("readOnly") and one["name"] != "tmp"]
            assert {mount["name"] for mount in mounts} == kept
            check_writable(role_of(workload), {mount["mountPath"] for mount in mounts})


@pytest.mark.parametrize("role", PORTS)
def test_a_network_policy_selects_the_pods_and_opens_known_ports(role: str) -> None:
    labels = {"app.kubernetes.io/name": f"veil-{role}"}
    (policy,) = (one["spec"] for one in of_kind("NetworkPolicy") if one["metadata"]["name"] == f"veil-{role}")
    assert policy["podSelector"]["matchLabels"] == labels
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
    open_to_all = [one["port"] for rule in policy["ingress"] if "from" not in rule for one in rule["ports"]]
    assert open_to_all == ([PORTS["coordinator"]["link"]] if role == "coordinator" else [])
    assert {one["port"] for rule in policy["ingress"] for one in rule["ports"]} <= set(PORTS[role].values())
    out = {one["port"] for rule in policy["egress"] for one in rule["ports"]}
    assert out == (set() if role == "coordinator" else {53, PORTS["coordinator"]["link"]})
    (service,) = (one["spec"] for one in of_kind("Service") if one["metadata"]["name"] == f"veil-{role}")
    assert service["selector"] == labels
    (workload,) = (one["spec"] for one in of_kind("StatefulSet") if one["spec"]["serviceName"] == f"veil-{role}")
    assert workload["selector"]["matchLabels"] == workload["template"]["metadata"]["labels"] == labels
    assert workload["replicas"] == 1


def test_every_file_that_the_runbook_names_is_there() -> None:
    named = re.findall(r"(?:/opt/veil-source/)?(deploy/[\w./-]+\.(?:yaml|toml|csv|conf|service))", RUNBOOK)
    assert len(set(named)) > 8
    for path in named:
        assert (ROOT / path).is_file(), path
    reached = set(named) | {f"deploy/{link}" for link in re.findall(r"\]\(([\w/.-]+)\)", RUNBOOK)}
    missing = [one for one in TEXTS if str(one.relative_to(ROOT)) not in reached and one.name != "README.md"]
    assert not missing, f"the runbook does not mention {missing}"
