"""The home machine at Coiled: always on, `up` at work on it, as the `deploy` block of an env file says.

`coiled run --detach` makes it, with the project as it is in this folder. What was deployed last is told by
services/deployed.json under the root, and whether it works by the heartbeat of its `up`. Of both nothing is asked by
HTTP: no port has to be open.
"""

import hashlib
import io
import json
import os
import shlex
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import etl
from etl import secrets
from etl.params import Project, nearest
from etl.params.stages import seconds
from etl.runs import machines, releases
from etl.serve import heartbeat
from etl.serve.health import SILENT_S
from etl.serve.services import API_HOST, PORTS
from etl.serve.web import TOKEN
from etl.storage import PROJECT, LocalRoot, Root

DEPLOYED = "services/deployed.json"
SCRIPT = """\
set -euo pipefail
mkdir project && tar --extract --gzip --file="$1" --directory=project && cd project
export PYTHONPATH=$PWD  # before the wheel that Coiled makes of the engine
until python orchestrate.py up --env "$2" --root "$3"; do sleep 10; done
"""
OF_RUN = ("workspace", "software", "vm_type", "region", "disk_size", "subdomain", "allow_ssh_from")  # of `coiled run`
OURS = ("name", "port", "tags", "secrets", "boot")
BOOT_S = 900.0  # until `up` beats: a machine, the packages, a first release
GONE_S = 180.0  # until a machine that was given back has gone
LOOK_S = 2.0
FOR_EVER = "520 weeks"  # its keepalive: it ends when it is told to


class NotDeployed(RuntimeError):
    """What went wrong, in a sentence; a machine may be left over."""


@dataclass(frozen=True)
class Home:
    """What is to be deployed. `block` is the env file's, `secrets` the names of those that go with it."""

    project: Project
    folder: Path
    block: dict[str, Any]
    boot_s: float
    secrets: tuple[str, ...]

    @property
    def root(self) -> Root:
        return Root.at(self.project.environment.root)

    @property
    def name(self) -> str:
        return str(self.block.get("name") or f"etl-{self.project.environment.name}")

    def files(self) -> dict[str, Path]:
        """What `up` needs of the project: what a release holds, and what reads what it writes."""
        app = self.folder / "app" if (self.folder / "app").is_dir() else Path(etl.__file__).parents[1] / "app"
        chosen = releases.contents(self.folder) | releases.files_below(app, "app")
        return chosen | {"orchestrate.py": self.folder / "orchestrate.py"}

    def digest(self) -> str:
        """Of the code and of the arguments; not of the values of secrets."""
        files = {rel: hashlib.sha256(releases.content(path)).hexdigest() for rel, path in self.files().items()}
        asked = [
            SCRIPT,
            sorted(files.items()),
            self.project.environment.name,
            self.root.url,
            self.block,
            sorted(self.secrets),
        ]
        return hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class State:
    """`cluster`: Coiled's number of the machine, None when there is none; `told`: what was deployed last."""

    cluster: int | None
    told: dict[str, Any] | None
    beat: dict[str, Any] | None
    is_beating: bool

    @property
    def is_ours(self) -> bool:
        """Whether the machine is the one that was deployed last."""
        return self.cluster is not None and bool(self.told) and self.told["cluster"] == self.cluster  # type: ignore[index]

    def why_again(self, digest: str) -> str:
        """Why it has to be deployed; "" when it is there, is well and is what it should be."""
        if not self.is_ours:
            return "there is no such machine" if self.cluster is None else "it is not the one that was deployed last"
        assert self.told
        if self.told["digest"] != digest:
            return "the code or the arguments have changed"
        return "" if self.is_beating else "`up` does not beat there"


def read(project: Project, folder: Path = PROJECT) -> Home:
    """Raises ValueError: a sentence."""
    environment = project.environment
    block = environment.deploy
    if not block:
        raise ValueError(f"params/env/{environment.name}.yml has no `deploy` block, which says on what machine")
    for name in block:
        if name not in (*OF_RUN, *OURS):
            raise ValueError(f"deploy: unknown key {name!r}{nearest(name, [*OF_RUN, *OURS])}")
    for name in {"name", "subdomain", "workspace", "software", "region", "allow_ssh_from"} & block.keys():
        if not isinstance(block[name], str) or not block[name]:
            raise ValueError(f"deploy: {name}: expected text, got {block[name]!r}")
    try:
        boot_s = seconds(block["boot"]) if "boot" in block else BOOT_S
    except ValueError:
        raise ValueError('deploy: boot: expected a duration such as "15 minutes"') from None
    size, kinds = block.get("disk_size", 1), block.get("vm_type", "any")
    if type(size) is not int or size < 1:
        raise ValueError(f"deploy: disk_size: expected a whole number of GB, got {size!r}")
    named = kinds if isinstance(kinds, list) else [kinds]
    if not named or not all(isinstance(kind, str) and kind for kind in named):
        raise ValueError(f"deploy: vm_type: expected a name such as t3.medium, or a list of them, got {kinds!r}")
    tags, names, port = block.get("tags") or {}, block.get("secrets") or [], block.get("port")
    if not isinstance(tags, dict) or any(isinstance(value, dict | list) for value in tags.values()):
        raise ValueError("deploy: tags: expected name: value lines, such as {project: etl}")
    if not isinstance(names, list) or not all(isinstance(name, str) and secrets.NAME.fullmatch(name) for name in names):
        raise ValueError("deploy: secrets: expected the names of secrets, such as [ETL_API_TOKEN]")
    if port is not None and (port != PORTS["api"] or not block.get("subdomain") or TOKEN not in names):
        raise ValueError(
            f"deploy: port: the API's, {PORTS['api']}, is the only one that may be open to all, with a subdomain and "
            f"{TOKEN} among the secrets"
        )
    if port is None and "subdomain" in block:
        raise ValueError(f"deploy: subdomain: is for the API's port alone: port: {PORTS['api']} is missing")
    told = environment.alerts.to if environment.alerts else []
    handed = {*names, *(name for stage in project.stages.values() for name in stage.secrets)}
    handed |= {name for name in told if secrets.NAME.fullmatch(name)}
    return Home(project, folder, block, boot_s, tuple(sorted(handed)))


def problems(home: Home) -> list[str]:
    """What keeps it from being had or of use, as far as can be known before it is asked for: a sentence each."""
    told = unreachable(home) or _of_region(home)
    for name in home.secrets:
        try:
            secrets.read(name)
        except (LookupError, ValueError, OSError) as error:
            told.append(str(error))
    return told


def unreachable(home: Home, needs_root: bool = True) -> list[str]:
    """Why nothing can be known or, whatever became of the root, ended: a sentence, or none."""
    if isinstance(home.root, LocalRoot):
        return [f"the root {home.root.url} is on this machine, and home on another; use an s3:// root"]
    return (machines.root_problems(home.root) if needs_root else []) or machines.coiled_problems()


def _of_region(home: Home) -> list[str]:
    asked, has = home.block.get("region"), home.root.region()
    if asked and has and asked != has:
        return [f"deploy: region: {asked} is not the bucket's, {has}: what goes between regions is slow and costs"]
    return []


def look(home: Home) -> State:
    """Raises what a root or Coiled's service does that cannot be read."""
    told = home.root.read_json(DEPLOYED)
    beat = heartbeat.read(home.root)
    is_beating = False
    if beat and not beat.get("ended_at"):
        is_beating = (datetime.now(UTC) - datetime.fromisoformat(beat["at"])).total_seconds() < SILENT_S
    return State(_cluster(home), told, beat, is_beating)


def deploy(home: Home, say: Callable[[str], None]) -> bool:
    """Have it at work; False when it was, as it is to be. Raises NotDeployed."""
    state, digest = look(home), home.digest()
    why = state.why_again(digest)
    if not why:
        return False
    if state.cluster is None and state.is_beating:
        assert state.beat
        raise NotDeployed(f"`up` is at work on {home.root.url} already, on {state.beat['host']}: end that first")
    say(f"deploying {home.name}: {why}")
    if state.cluster is not None:
        stop(home)
    asked_at = datetime.now(UTC).isoformat(timespec="seconds")
    cluster = _begin(home, digest)
    document = {"name": home.name, "cluster": cluster, "digest": digest, "page": page(home), "at": asked_at}
    home.root.write(DEPLOYED, json.dumps(document).encode())
    _wait_until_it_beats(home, cluster, state.beat)
    return True


def stop(home: Home) -> bool:
    """Give the machine back, and wait until it has gone; False when there is none. Raises NotDeployed.

    Also when the root cannot be read any more: the machine costs all the same.
    """
    state = None
    with suppress(Exception):  # of Coiled's service: it is asked again
        state = look(home)
    if (cluster := state.cluster if state else _cluster(home)) is None:
        return False
    with _coiled(home) as cloud:
        cloud.delete_cluster(cluster, workspace=home.block.get("workspace"), reason="etl deploy")
    until = time.monotonic() + GONE_S
    while _cluster(home) is not None:
        if time.monotonic() > until:
            raise NotDeployed(f"the machine {home.name} was told to end, and has not within {GONE_S:g} s")
        time.sleep(LOOK_S)
    if state and state.is_ours and state.beat:
        heartbeat.end(home.root)
    return True


def page(home: Home) -> str | None:
    """Where its API is asked from elsewhere."""
    if not home.block.get("port"):
        return None
    with _coiled(home) as cloud:
        workspace = home.block.get("workspace") or cloud.default_workspace
    return f"http://{home.block['subdomain']}.{workspace}.dask.host:{home.block['port']}"


def _begin(home: Home, digest: str) -> int:
    """The number of the machine, on which the command has begun."""
    variables = {name: secrets.read(name) for name in home.secrets}
    if address := page(home):
        variables |= {API_HOST: "0.0.0.0", "ETL_API_URL": address}
    asked = {name: home.block[name] for name in OF_RUN if name in home.block}
    asked["vm_type"] = [asked["vm_type"]] if isinstance(asked.get("vm_type"), str) else asked.get("vm_type")
    asked.setdefault("region", home.root.region())
    tags = {"project": "etl", "env": home.project.environment.name} | (home.block.get("tags") or {})
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        archive = folder / f"project-{digest}.tar.gz"
        with tarfile.open(archive, "w:gz", compresslevel=6) as tar:
            for rel, path in sorted(home.files().items()):
                content = releases.content(path)
                entry = tarfile.TarInfo(rel)
                entry.size, entry.mode = len(content), 0o755 if os.access(path, os.X_OK) else 0o644
                tar.addfile(entry, io.BytesIO(content))
        script = folder / "begin.sh"
        script.write_text(SCRIPT)
        command = ["bash", str(script), str(archive), home.project.environment.name, home.root.url]
        from coiled.cli.run import start_run

        with redirect_stdout(sys.stderr):
            told = start_run(
                command,
                name=home.name,
                # they become words of a command line there
                env=[f"{name}={shlex.quote(value)}" for name, value in variables.items()],
                tag=[f"{name}={value}" for name, value in tags.items()],
                open_extra_ports=[home.block["port"]] if home.block.get("port") else None,
                keepalive=FOR_EVER,
                detach=True,
                no_credential_forwarding=True,  # what a person has runs out: the machine's own role, or `secrets`
                **asked,
            )
    if told["exit_code"]:
        with suppress(Exception):  # what there is of it; if that cannot be either, the next time does it
            stop(home)
        raise NotDeployed("Coiled could not begin it, as told above")
    return int(told["cluster_id"])


@contextmanager
def _coiled(home: Home) -> Iterator[Any]:
    import coiled

    with coiled.Cloud(workspace=home.block.get("workspace")) as cloud:
        yield cloud


def _cluster(home: Home) -> int | None:
    """Coiled's number of the machine; None when there is none."""
    import coiled

    with _coiled(home) as cloud:
        try:
            return int(cloud.get_cluster_by_name(home.name, workspace=home.block.get("workspace")))
        except coiled.errors.DoesNotExist:
            return None


def _wait_until_it_beats(home: Home, cluster: int, before: dict[str, Any] | None) -> None:
    until = time.monotonic() + home.boot_s
    while not _has_begun(heartbeat.read(home.root), before):
        if _cluster(home) != cluster:
            raise NotDeployed(f"the machine {home.name} has gone before `up` was at work: see `coiled logs {cluster}`")
        if time.monotonic() > until:
            raise NotDeployed(
                f"`up` does not beat on {home.name} after {home.boot_s:g} s: `coiled logs {cluster}` says why, "
                "`deploy --stop` gives the machine back"
            )
        time.sleep(LOOK_S)


def _has_begun(beat: dict[str, Any] | None, before: dict[str, Any] | None) -> bool:
    same = ("machine", "pid", "since")
    return bool(beat) and (not before or any(beat.get(name) != before.get(name) for name in same))  # type: ignore[union-attr]
