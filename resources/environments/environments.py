"""The environments on the supercomputer, as they are seen from here; what is done there is in keeper/."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from resources.environments.code import Code
from resources.environments.lock import Lock
from resources.environments.progress import Progress
from resources.environments.target import NEWEST, OLDEST, Target
from resources.environments.wheels import Wheel, gather_wheels
from resources.slurm import Site
from resources.slurm.gateway import Gateway
from resources.slurm.gateway.agent import disk
from resources.slurm.gateway.joined import join

_MODULES = ("files", "interpreters", "making", "shelf", "server")
_KEEPER = join(Path(disk.__file__), *(Path(__file__).with_name("keeper") / f"{name}.py" for name in _MODULES))
FOLDER = "environments"
"""Below SLURM_DEPLOYMENT_BASE_PATH."""


@dataclass(frozen=True)
class Environment:
    """An environment on the supercomputer, whether it is there or would be.

    Attributes:
        name: hash of all that it consists of; its folder has it as its name.
        kind: `wheelhouse`: made from wheels that were sent; `path`: an interpreter that was there.
        python: path of the interpreter for workloads.
        workloads: path of the own code there.
        target: the interpreter that it is made for.
        asked: SLURM_PYTHON, if it was set.
        lock: digest of the lock; None for the kind `path`.
        code: SHA-256 by file.
    """

    name: str
    kind: str
    python: str
    workloads: str
    target: Target
    asked: str | None
    lock: str | None
    code: Mapping[str, str]

    @classmethod
    def parse(cls, said: Mapping[str, Any]) -> "Environment":
        """From what the keeper says."""
        target = Target(**{name: said["interpreter"][name] for name in ("executable", "version", "machine", "glibc")})
        same = {name: said[name] for name in ("name", "kind", "python", "workloads", "asked", "lock", "code")}
        return cls(**same, target=target)


@dataclass(frozen=True)
class Published:
    """What production runs.

    Attributes:
        environment: the environment.
        revision: of the repository, as git described it; may be empty.
        at: when it was published.
    """

    environment: Environment
    revision: str
    at: datetime


@dataclass(frozen=True)
class Row:
    """An environment that is there.

    Attributes:
        environment: which.
        used: when it was used last.
        published: `current`: production runs it; `before`: it is the one to go back to; else empty.
    """

    environment: Environment
    used: datetime
    published: str


@dataclass(frozen=True)
class Wanted:
    """What an environment is to consist of.

    Attributes:
        code: the workloads.
        lock: the packages.
        python: SLURM_PYTHON: an interpreter that has the packages; None: the packages are sent.
    """

    code: Code
    lock: Lock
    python: str | None = None


@dataclass(frozen=True)
class Comparison:
    """What would have to be done for an environment.

    Attributes:
        environment: the one that is wanted.
        ready: whether it is there.
        installed: whether its packages are; for the kind `path`, they are by definition.
        wheels: those that are not there; only known after they were gathered.
    """

    environment: Environment
    ready: bool
    installed: bool
    wheels: Sequence[Wheel] = field(default=())


class Environments:
    """All environments of a deployment; methods raise what `Gateway` raises."""

    def __init__(self, gateway: Gateway, base: str, site: Site) -> None:
        """`base`: SLURM_DEPLOYMENT_BASE_PATH."""
        self._gateway, self._site = gateway, site
        self._folder = f"{base}/{FOLDER}"

    def look(self, wanted: Wanted) -> Comparison:
        """Whether an environment is there: one round trip."""
        said = self._look_up("look", **self._describe(wanted))
        return Comparison(Environment.parse(said["environment"]), said["ready"], said["installed"])

    def compare(self, wanted: Wanted, folder: Path, progress: Progress) -> tuple[Comparison, list[Wheel]]:
        """What would be sent, and all wheels of the environment, which are gathered in a folder if they are needed.

        Raises:
            ConfigurationError: see `gather_wheels`.
        """
        found = self.look(wanted)
        if found.ready or found.installed:
            return found, []
        target = found.environment.target
        progress.step(f"fetching the wheels of {wanted.lock.path.name} for Python {target.version}, {target.machine}")
        wheels = gather_wheels(wanted.lock, target, folder, self._gateway.ping)
        lacking = set(self._look_up("lacking", wheels=[wheel.place for wheel in wheels])["lacking"])
        missing = [wheel for wheel in wheels if wheel.place in lacking]
        return Comparison(found.environment, ready=False, installed=False, wheels=missing), wheels

    def ensure(self, wanted: Wanted, progress: Progress) -> Environment:
        """Make an environment, unless it is there; only what is missing is sent."""
        with tempfile.TemporaryDirectory(prefix="wheels-") as folder:
            found, wheels = self.compare(wanted, Path(folder), progress)
            if found.ready:
                return found.environment
            self._send(found.wheels, progress)
            places = {wheel.place: wheel.digest for wheel in wheels}
            describe = self._describe(wanted)
            said = self._do("publish", progress, **describe, wheels=places, files=wanted.code.encoded)
        return Environment.parse(said["environment"])

    def _send(self, wheels: Sequence[Wheel], progress: Progress) -> None:
        total, before = sum(wheel.size for wheel in wheels), 0
        for wheel in sorted(wheels, key=lambda wheel: wheel.size):
            there = before

            def tell(done: int, _: int, there: int = there) -> None:
                progress.sent(there + done, total)

            self._gateway.put(wheel.path, f"{self._folder}/wheels/{wheel.place}", tell)
            before += wheel.size

    # Production

    def published(self) -> Published | None:
        """What production runs; None if nothing was published. One round trip."""
        said = self._look_up("published")
        if said["environment"] is None:
            return None
        entry = said["entry"]
        at = datetime.fromtimestamp(entry["at"], UTC)
        return Published(Environment.parse(said["environment"]), entry["revision"], at)

    def announce(self, environment: Environment, revision: str) -> bool:
        """Let production run an environment; False if it did before."""
        return bool(self._do("announce", name=environment.name, about={"revision": revision})["new"])

    def roll_back(self) -> Mapping[str, Any]:
        """Let production run what was published before; `name` and `revision` of that."""
        entry: Mapping[str, Any] = self._do("roll_back")["entry"]
        return entry

    # What is there

    def inventory(self) -> list[Row]:
        """All environments, the one used last first."""
        said = self._look_up("inventory")
        marks = dict(zip(said["published"][-2:][::-1], ("current", "before"), strict=False))
        rows = [
            Row(environment, datetime.fromtimestamp(each["used"], UTC), marks.get(environment.name, ""))
            for each in said["found"]
            for environment in [Environment.parse(each["environment"])]
        ]
        return sorted(rows, key=lambda row: row.used, reverse=True)

    def remove(self, names: Sequence[str]) -> list[str]:
        """Remove environments, and packages and wheels that no other needs; the names of those that are gone.

        What production runs or could go back to, and what was used within the last hour, stays.
        """
        removed: list[str] = self._do("remove", names=list(names))["removed"]
        return removed

    # The keeper

    def _describe(self, wanted: Wanted) -> dict[str, Any]:
        return {
            "setup": list(self._site.setup_commands),
            "candidates": list(self._site.python_candidates),
            "oldest": list(OLDEST),
            "newest": list(NEWEST),
            "asked": wanted.python,
            "python": wanted.python,
            "lock": wanted.lock.digest,
            "modules": wanted.lock.modules,
            "code": wanted.code.digests,
        }

    def _look_up(self, verb: str, **fields: Any) -> Mapping[str, Any]:
        """The keeper's answer to what takes no time."""
        return self._gateway.consult(_KEEPER, self._document(verb, fields))

    def _do(self, verb: str, progress: Progress | None = None, **fields: Any) -> Mapping[str, Any]:
        """The keeper's answer to what may take long."""
        answer: dict[str, Any] = {}

        def take(line: str) -> None:
            said = json.loads(line)
            if "answer" in said:
                answer.update(said["answer"])
            elif progress:
                progress.step(said["progress"])

        self._gateway.perform(_KEEPER, self._document(verb, fields), take)
        return answer

    def _document(self, verb: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        return {"do": verb, "folder": self._folder, **fields}
