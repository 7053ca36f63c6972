"""The environments on the supercomputer: which exist, which one production runs; make, publish and remove them."""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dagster_sbatch.environments.code import Code, read_code
from dagster_sbatch.environments.groups import DEFAULT, find_groups, read_group
from dagster_sbatch.environments.lockfile import NEWEST, OLDEST, VERIFIED, Interpreter, LockFile
from dagster_sbatch.environments.wheels import Wheel, gather_wheels
from dagster_sbatch.project import Project
from dagster_sbatch.settings import Settings
from dagster_sbatch.slurm import Site
from dagster_sbatch.slurm.gateway import Gateway, send_file
from dagster_sbatch.slurm.units import count_of

MOST_NAMES = 5  # files that a refusal lists by name
LOG_SECONDS = 10.0  # between two lines about bytes that were sent


@dataclass(frozen=True)
class Environment:
    """An environment that exists on the supercomputer, or that would."""

    name: str  # hash of all that it consists of, and the name of its folder
    # `wheelhouse`: made from wheels that were sent; `path`: an interpreter that existed, with the user's code
    kind: str
    python: str  # path of the interpreter for workloads
    workloads: str  # path of the user's code there
    interpreter: Interpreter  # the Python that it is made for
    asked: str | None  # SLURM_PYTHON, if it was set, or the interpreter that an asset named
    lock: str | None  # digest of the lock file; None for the kind `path`
    code: Mapping[str, str]  # digest by file; see `Code.digests`

    @classmethod
    def parse(cls, answer: Mapping[str, Any]) -> "Environment":
        """Read what the agent answers."""
        about = {name: answer["interpreter"][name] for name in ("executable", "version", "machine", "glibc")}
        same = {name: answer[name] for name in ("name", "kind", "python", "workloads", "asked", "lock", "code")}
        return cls(**same, interpreter=Interpreter(**about))


@dataclass(frozen=True)
class Published:
    """What production runs."""

    environment: Environment
    revision: str  # of the repository, as git described it; may be empty
    at: datetime  # when it was published


@dataclass(frozen=True)
class EnvironmentListing:
    """An environment that exists, with its use."""

    environment: Environment
    used: datetime  # when it was used last
    # `current`: production runs it; `before`: a rollback returns to it; else empty. The name of the group stands behind
    # it, if it is not `cluster`
    published: str


@dataclass(frozen=True)
class EnvironmentSpec:
    """What an environment consists of."""

    code: Code  # the workloads
    lock: LockFile | None  # the packages; None: an asset has named the interpreter, which has them
    # SLURM_PYTHON or what an asset names: an interpreter that has the packages, or the folder with its `bin/python`;
    # None: the packages are sent
    python: str | None = None

    @property
    def modules(self) -> list[str]:
        """Modules that the environment must be able to import."""
        return self.lock.modules if self.lock else [VERIFIED["dagster-pipes"]]

    def differences_from(self, published: Environment) -> list[str]:
        """Return which of lock file, interpreter and code differ from those of a published environment.

        Of an interpreter that an asset names, only the code is compared.
        """
        found = []
        if self.lock and published.asked != self.python:
            found.append(f"SLURM_PYTHON: {self.python or 'not set'}, was {published.asked or 'not set'}")
        elif self.lock and published.lock not in (None, self.lock.digest):
            found.append(f"{self.lock.path.name}: other packages")
        here, there = self.code.digests, published.code
        names = [name for name in sorted({*here, *there}) if here.get(name) != there.get(name)]
        for name in names[:MOST_NAMES]:
            how = "is new" if name not in there else "is gone" if name not in here else "is changed"
            found.append(f"{self.code.folder / name} {how}")
        if len(names) > MOST_NAMES:
            found.append(f"and {count_of(len(names) - MOST_NAMES, 'more file')}")
        return found


def read_specs(project: Project, settings: Settings) -> dict[str, EnvironmentSpec]:
    """Return what the environment of each group of a project consists of now.

    Raises ConfigurationError: see `read_code` and `read_group`.
    """
    groups, code = (DEFAULT, *find_groups(project.root)), read_code(project.workloads)
    return {group: make_spec(project, settings, code, group) for group in groups}


def make_spec(project: Project, settings: Settings, code: Code, group: str | None) -> EnvironmentSpec:
    """Return what the environment of a group consists of; see `read_group`."""
    python = None if group else settings.python
    return EnvironmentSpec(code, read_group(project, group, python), python)


class Progress:
    """Shows the user how far it is: here, as lines of a log."""

    def __init__(self, log: Callable[[str], object]) -> None:
        self._log = log
        self._last: tuple[float, int] | None = None  # time and bytes of the last line, or of the begin

    def step(self, text: str) -> None:
        """Show what is done now."""
        self._log(f"environment: {text}")

    def sent(self, done: int, total: int) -> None:
        """Show how many bytes of how many are on the supercomputer; as a line at most every ten seconds."""
        now = time.monotonic()
        since, before = self._last = self._last or (now, done)
        if done < total and now - since < LOG_SECONDS:
            return
        self._last = now, done
        rate = (done - before) / max(now - since, 1e-3)
        self._log(f"environment: sent {100 * done // total} % of {total / 1e6:.1f} MB, {rate / 1e6:.1f} MB/s")


@dataclass(frozen=True)
class Comparison:
    """What has to be sent for an environment."""

    environment: Environment
    ready: bool  # whether it exists
    wheels: Sequence[Wheel] = ()  # all its wheels; empty if its packages are installed
    missing: Sequence[Wheel] = ()  # those of the wheels that are not on the supercomputer


class Environments:
    """All environments of a deployment; methods raise what `Gateway` and `gather_wheels` raise."""

    def __init__(self, gateway: Gateway, base: str, site: Site) -> None:
        """`base`: SLURM_DEPLOYMENT_BASE_PATH."""
        self._gateway, self._site = gateway, site
        self._folder = f"{base}/environments"

    def check_interpreter(self, spec: EnvironmentSpec) -> None:
        """Check that SLURM_PYTHON, or the interpreter that an asset names, can run workloads; make nothing.

        Raises RefusedError: it does not run on the login node, is too old, or cannot import `spec.modules`.
        """
        self._ask("building.check_interpreter", **self._describe(spec))

    def request_find(self, spec: EnvironmentSpec) -> dict[str, Any]:
        """Return the request of `compare`."""
        return self._request("building.find", **self._describe(spec))

    def compare(
        self, spec: EnvironmentSpec, folder: Path, progress: Progress, answer: Mapping[str, Any] | None = None
    ) -> Comparison:
        """Find out whether an environment exists; if not, gather its wheels in an empty folder.

        `answer`: to `request_find`, if the login node has already answered that.
        """
        answer = answer or self._gateway.ask(**self.request_find(spec))
        environment = Environment.parse(answer["environment"])
        if answer["ready"] or answer["installed"]:
            return Comparison(environment, answer["ready"])
        assert spec.lock  # else nothing has to be installed
        interpreter = environment.interpreter
        wanted = f"Python {interpreter.version}, {interpreter.machine}"
        progress.step(f"fetching the wheels of {spec.lock.path.name} for {wanted}")
        wheels = gather_wheels(spec.lock, interpreter, folder, self._gateway.ping)
        lacking = set(self._ask("building.missing", wheels=[wheel.place for wheel in wheels])["missing"])
        return Comparison(
            environment, ready=False, wheels=wheels, missing=[wheel for wheel in wheels if wheel.place in lacking]
        )

    def ensure(self, spec: EnvironmentSpec, progress: Progress, answer: Mapping[str, Any] | None = None) -> Environment:
        """Make an environment, unless it exists; send only wheels that are missing there. `answer`: see `compare`."""
        with tempfile.TemporaryDirectory(prefix="wheels-") as folder:
            found = self.compare(spec, Path(folder), progress, answer)
            if found.ready:
                return found.environment
            self._send(found.missing, progress)
            wheels = {wheel.place: wheel.digest for wheel in found.wheels}
            about = {**self._describe(spec), "wheels": wheels, "files": spec.code.encoded}
            built = self._ask("building.build", progress.step, **about)
        return Environment.parse(built["environment"])

    def _send(self, wheels: Sequence[Wheel], progress: Progress) -> None:
        total, before = sum(wheel.size for wheel in wheels), 0
        for wheel in sorted(wheels, key=lambda wheel: wheel.size):

            def report(done: int, _: int, before: int = before) -> None:
                progress.sent(before + done, total)

            send_file(self._gateway, wheel.path, f"{self._folder}/wheels/{wheel.place}", report)
            before += wheel.size

    def request_published(self, group: str) -> dict[str, Any]:
        """Return the request of `published`."""
        return self._request("releases.published", group=group)

    def published(self, group: str = DEFAULT, answer: Mapping[str, Any] | None = None) -> Published | None:
        """Return what production runs for a group; None if nothing was published.

        `answer`: to `request_published`, if the login node has already answered that.
        """
        answer = answer or self._gateway.ask(**self.request_published(group))
        if answer["environment"] is None:
            return None
        entry = answer["entry"]
        at = datetime.fromtimestamp(entry["at"], UTC)
        return Published(Environment.parse(answer["environment"]), entry["revision"], at)

    def publish(self, environments: Mapping[str, Environment], revision: str) -> bool:
        """Let production run some environments, at once; return False if it does already.

        `environments`: by group, with that of DEFAULT.
        """
        groups = {group: environment.name for group, environment in environments.items()}
        return bool(self._ask("releases.publish", groups=groups, about={"revision": revision})["new"])

    def roll_back(self) -> Mapping[str, Any]:
        """Let production run what was published before; return its `groups` and `revision`."""
        entry: Mapping[str, Any] = self._ask("releases.roll_back")["entry"]
        return entry

    def inventory(self) -> list[EnvironmentListing]:
        """Return all environments that exist, the one used last first."""
        answer = self._ask("releases.inventory")
        marks: dict[str, str] = {}
        for mark, groups in zip(("before", "current"), answer["published"], strict=True):
            marks |= {name: f"{mark} {group}".strip() for group, name in groups.items()}
        found = [
            EnvironmentListing(environment, datetime.fromtimestamp(each["used"], UTC), marks.get(environment.name, ""))
            for each in answer["found"]
            for environment in [Environment.parse(each["environment"])]
        ]
        return sorted(found, key=lambda each: each.used, reverse=True)

    def remove(self, names: Sequence[str]) -> Sequence[str]:
        """Remove environments, then packages and wheels that no other needs; return the names that were removed.

        An environment stays if production runs it or can go back to it, or if it was used within the last hour.
        """
        removed: Sequence[str] = self._ask("releases.remove", names=list(names))["removed"]
        return removed

    # Requests to the agent

    def _describe(self, spec: EnvironmentSpec) -> dict[str, Any]:
        return {
            "setup": list(self._site.setup_commands),
            "candidates": list(self._site.python_candidates),
            "oldest": list(OLDEST),
            "newest": list(NEWEST),
            "asked": spec.python,  # as it is written: the name of the environment must not depend on a user's home
            "python": spec.python,  # the agent replaces ~ and variables in it
            "asked_by": "SLURM_PYTHON" if spec.lock else "environment",
            "lock": spec.lock.digest if spec.lock else None,
            "modules": spec.modules,
            "code": spec.code.digests,
        }

    def _ask(self, verb: str, on_progress: Callable[[str], None] = lambda _: None, **fields: Any) -> Mapping[str, Any]:
        return self._gateway.ask(on_progress, **self._request(verb, **fields))

    def _request(self, verb: str, **fields: Any) -> dict[str, Any]:
        return {"do": verb, "folder": self._folder, **fields}
