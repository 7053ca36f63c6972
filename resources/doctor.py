"""Walks the chain from the settings to the jobs on the supercomputer, and stops at the first broken link."""

import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from resources.auth import AccessError, check_health, clock, ensure_certificate
from resources.environments import Environments
from resources.errors import ConfigurationError
from resources.runs import open_runs
from resources.settings import Settings, load_settings
from resources.slurm import Site, load_site
from resources.slurm.gateway import RefusedError
from resources.ssh import AuthenticationError, HostKeyError, SshError, connect
from resources.survey import Answer, take_survey

if TYPE_CHECKING:
    import fabric

TCP_SECONDS = 10.0
LEAST_FREE_KIB, LEAST_FREE_FILES = 1 << 20, 10_000
OLDEST_PYTHON = (3, 6)
"""For what runs on the login node; workloads have an environment of their own."""
LONGEST_TEMPORARY = 40
"""Characters. Ray puts sockets below it, whose paths may have 107 (unix(7))."""
WANTED_FILES = 65536
RUNS_SECONDS = 60.0
"""For the agent on the login node to tell of all runs."""


@dataclass(frozen=True)
class Link:
    """One link of the chain.

    Attributes:
        name: what was looked at.
        state: `ok`; `warning`: jobs run all the same; `broken`: nothing behind it was looked at.
        found: in words.
        mend: what to do; empty if it is ok.
    """

    name: str
    state: Literal["ok", "warning", "broken"]
    found: str
    mend: str = ""


def examine(site_overrides: Mapping[str, Any], knows_run: Callable[[str], bool]) -> Iterator[Link]:
    """Look at one link after the other, and stop behind the first broken one.

    Args:
        site_overrides: SUPERCOMPUTER_SITE_OVERRIDES.
        knows_run: whether this Dagster has a run of that id.
    """
    with ExitStack() as open_until_the_end:
        for link in _Examination(site_overrides, knows_run, open_until_the_end).links():
            yield link
            if link.state == "broken":
                return


class _Examination:
    """What is known so far; each link needs those before it."""

    settings: Settings
    site: Site
    connection: "fabric.Connection"
    survey: dict[str, Answer]

    def __init__(self, site_overrides: Mapping[str, Any], knows_run: Callable[[str], bool], stack: ExitStack) -> None:
        self._site_overrides = site_overrides
        self._knows_run = knows_run
        self._stack = stack

    def links(self) -> Iterator[Link]:
        looks: dict[str, Callable[[str], Link]] = {
            "settings": self._settings,
            "credentials": self._credentials,
            "certificate": self._certificate,
            "name": self._name,
            "port": self._port,
            "login": self._login,
            "Slurm": self._slurm,
            "partitions": self._partitions,
            "account and QoS": self._account,
            "deployment folder": self._folder,
            "Python": self._python,
            "temporary folder": self._temporary,
            "open files": self._files,
            "jobs": self._jobs,
            "environment": self._environment,
        }
        for name, look in looks.items():
            yield look(name)

    # Here

    def _settings(self, name: str) -> Link:
        try:
            self.settings = load_settings(self._site_overrides, supercomputer=True)
            self.site = load_site(self._site_overrides, self.settings.supercomputer_site or "")
        except ConfigurationError as error:
            return Link(name, "broken", str(error), "correct the settings; docs/settings.md has all of them")
        settings = self.settings
        return Link(name, "ok", f"{settings.deployment}, {settings.supercomputer_site}, {settings.edge_node_user}")

    def _credentials(self, name: str) -> Link:
        health = check_health(self.settings)
        if health.verdict == "broken":
            return Link(name, "broken", "there is no access", health.summary)
        state = {"ok": "ok", "due": "ok", "failing": "warning"}[health.verdict]
        mend = "scripts/refresh_step_auth.py --status" if state == "warning" else ""
        return Link(name, state, health.summary, mend)  # type: ignore[arg-type]

    def _certificate(self, name: str) -> Link:
        try:
            certificate = ensure_certificate(self.settings)
        except AccessError as error:
            return Link(name, "broken", str(error), "scripts/refresh_step_auth.py, when that is put right")
        if certificate is None:
            return Link(name, "ok", "none: a plain key")
        until = clock.written(certificate.valid_before)
        return Link(name, "ok", f"for {', '.join(certificate.principals)}, until {until}")

    # On the way

    def _name(self, name: str) -> Link:
        try:
            host, port = self._first_hop()
        except ConfigurationError as error:
            return Link(name, "broken", str(error), "correct ~/.ssh/config; docs/ssh.md tells what of it is read")
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as error:
            mend = "look at SLURM_EDGE_NODE_HOST, and whether this machine is in the network"
            return Link(name, "broken", f"{host}: {error.strerror}", mend)
        addresses = sorted({str(address[4][0]) for address in found})
        return Link(name, "ok", f"{host} is {', '.join(addresses)}")

    def _port(self, name: str) -> Link:
        host, port = self._first_hop()
        try:
            with socket.create_connection((host, port), TCP_SECONDS) as connection:
                greeting = connection.recv(64).decode(errors="replace").strip()
        except OSError as error:
            mend = (
                "ask the centre whether it is in maintenance, and whether it takes connections from your network (VPN)"
            )
            return Link(name, "broken", f"{host} port {port}: {error.strerror or error}", mend)
        if not greeting.startswith("SSH-"):
            return Link(name, "broken", f"{host} port {port} is not SSH: {greeting!r}", "look at SLURM_EDGE_NODE_PORT")
        return Link(name, "ok", f"{host} port {port} answers: {greeting}")

    def _first_hop(self) -> tuple[str, int]:
        from resources.ssh.client_config import read_route

        login, jump = read_route(self.settings)
        first = jump or login
        return first.host, first.port

    def _login(self, name: str) -> Link:
        try:
            self.connection = self._stack.enter_context(connect(self.settings, ensure_certificate))
        except HostKeyError as error:
            return Link("host key", "broken", str(error), "docs/ssh.md: What you have to do once")
        except (AuthenticationError, SshError) as error:
            return Link(name, "broken", str(error), "scripts/refresh_step_auth.py --status tells of the certificate")
        try:
            base = str(self.settings.deployment_base_path)
            self.survey = take_survey(self.connection, base, self.site.python_candidates)
        except OSError as error:
            return Link(name, "broken", str(error), "try again; look at what your login shell does on the login node")
        return Link(name, "ok", f"{self.settings.edge_node_user} at {self.settings.edge_node_host}")

    # There

    def _slurm(self, name: str) -> Link:
        missing = self.survey["commands"].text.split()
        if missing:
            mend = "ask the centre; is a module to be loaded in your login shell's profile?"
            return Link(name, "broken", f"not on PATH of the login node: {', '.join(missing)}", mend)
        controller = self.survey["controller"]
        if controller.code or " UP" not in controller.text.upper().replace(" IS", " "):
            return Link(name, "broken", controller.text, "slurmctld is away: wait, or ask the centre")
        return Link(name, "ok", controller.text.splitlines()[0])

    def _partitions(self, name: str) -> Link:
        there = _parse_partitions(self.survey["partitions"].text)
        for partition, wanted in self.site.partitions.items():
            if partition not in there:
                mend = f"correct SUPERCOMPUTER_SITE_OVERRIDES; the cluster has {', '.join(sorted(there))}"
                return Link(name, "broken", f"there is no partition {partition}", mend)
            allowed = there[partition].get("AllowQos", "ALL").split(",")
            refused = [qos for qos in wanted.qos if allowed != ["ALL"] and qos not in allowed]
            if refused:
                mend = f"correct SUPERCOMPUTER_SITE_OVERRIDES; it takes {', '.join(allowed)}"
                return Link(name, "broken", f"partition {partition} does not take QoS {', '.join(refused)}", mend)
        down = [partition for partition in self.site.partitions if there[partition].get("State") != "UP"]
        if down:
            return Link(name, "warning", f"not UP: {', '.join(down)}", "jobs wait until the centre opens it")
        return Link(name, "ok", ", ".join(self.site.partitions))

    def _account(self, name: str) -> Link:
        answer = self.survey["associations"]
        if answer.code:
            return Link(name, "warning", f"accounting does not answer: {answer.text}", "try again later")
        rows = [line.split("|") for line in answer.text.splitlines() if line.count("|") >= 2]
        if not rows:
            return Link(
                name, "broken", f"{self.settings.edge_node_user} has no account", "ask the centre for a project"
            )
        mine = {qos for row in rows for qos in row[2].split(",") if qos}
        wanted = {qos for partition in self.site.partitions.values() for qos in partition.qos}
        preferred = self.settings.qos
        if preferred and mine and preferred not in mine:
            return Link(name, "broken", f"SLURM_QOS={preferred} is not yours", f"yours are {', '.join(sorted(mine))}")
        accounts = ", ".join(sorted({row[0] for row in rows}))
        lacking = sorted(wanted - mine) if mine else []
        if lacking:
            return Link(name, "warning", f"{accounts}, without QoS {', '.join(lacking)}", "assets cannot ask for those")
        return Link(name, "ok", accounts)

    def _folder(self, name: str) -> Link:
        base, above = self.settings.deployment_base_path, self.survey["folder"].text
        write, space = self.survey["write"], self.survey["space"]
        if write.code:
            mend = "choose another SLURM_DEPLOYMENT_BASE_PATH, or make room (your quota?)"
            return Link(name, "broken", f"{above} cannot be written to: {write.text}", mend)
        kib, files = (int(word) if word.isdecimal() else LEAST_FREE_FILES for word in space.text.split())
        if kib < LEAST_FREE_KIB or files < LEAST_FREE_FILES:
            return Link(name, "warning", f"{above} has {kib >> 10} MB and {files} files left", "make room there")
        there = "" if above == base else " is made by the first run;"
        return Link(name, "ok", f"{base}{there} {kib >> 20} GB free")

    def _python(self, name: str) -> Link:
        said = {each: self.survey[f"python {each}"] for each in self.site.python_candidates}
        for candidate, answer in said.items():
            if answer.code == 0 and tuple(map(int, answer.text.split("."))) >= OLDEST_PYTHON:
                return Link(name, "ok", f"{candidate} is {answer.text}")
        oldest = ".".join(map(str, OLDEST_PYTHON))
        mend = f"name one of at least {oldest} in python_candidates of SUPERCOMPUTER_SITE_OVERRIDES"
        return Link(name, "broken", f"none of {', '.join(said)} is there on the login node", mend)

    def _temporary(self, name: str) -> Link:
        path = self.survey["temporary"].text
        if len(path) > LONGEST_TEMPORARY:
            mend = f"let TMPDIR have {LONGEST_TEMPORARY} characters at most: Ray's sockets lie below it"
            return Link(name, "warning", f"{path} has {len(path)} characters", mend)
        return Link(name, "ok", path)

    def _files(self, name: str) -> Link:
        limit = self.survey["files"].text
        if limit.isdecimal() and int(limit) < WANTED_FILES:
            found = f"{limit} on the login node, less than the {WANTED_FILES} that Ray wants"
            return Link(name, "warning", found, "compute nodes may give more; jobs raise theirs as far as they may")
        return Link(name, "ok", limit)

    def _jobs(self, name: str) -> Link:
        try:
            with open_runs(self.settings, self._site_overrides, RUNS_SECONDS) as runs:
                going = [run for run in runs.all() if run.job and not run.end and runs.look(run)[0]]
        except (AccessError, SshError, RefusedError) as error:
            return Link(name, "broken", str(error), "try again; scripts/job lists what is there")
        strange = [f"{run.job} ({run.about.asset})" for run in going if not self._knows_run(run.about.run)]
        if strange:
            mend = "leave them to the other Dagster that submitted them; if there is none: scripts/job JOB cancel"
            return Link(name, "warning", f"of runs that this Dagster does not know: {', '.join(strange)}", mend)
        return Link(name, "ok", f"{len(going)} waiting or running")

    def _environment(self, name: str) -> Link:
        if self.settings.deployment != "production_supercomputer":
            return Link(name, "ok", f"a run on {self.settings.deployment} makes its own")
        try:
            with open_runs(self.settings, self._site_overrides, RUNS_SECONDS) as runs:
                base = str(self.settings.deployment_base_path)
                published = Environments(runs.gateway, base, self.site).published()
        except (AccessError, SshError, RefusedError) as error:
            return Link(name, "broken", str(error), "try again")
        if published is None:
            return Link(name, "broken", "nothing has been published: runs are refused", "scripts/deploy_environment.py")
        revision = f", revision {published.revision}" if published.revision else ""
        return Link(name, "ok", f"published at {published.at:%Y-%m-%d %H:%M} UTC{revision}")


def _parse_partitions(text: str) -> dict[str, dict[str, str]]:
    """What `scontrol --oneliner show partition` says, by partition."""
    rows = [dict(word.split("=", 1) for word in line.split() if "=" in word) for line in text.splitlines()]
    return {row["PartitionName"]: row for row in rows if "PartitionName" in row}
