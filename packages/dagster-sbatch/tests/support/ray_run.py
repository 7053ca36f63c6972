"""A Ray job of a test on the simulated site: started in the background, disturbed, and looked at as a user would."""

import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dagster_sbatch.launchers import RayLauncher
from dagster_sbatch.slurm import SlurmRequest
from slurm_in_a_box import CERTIFICATE_USER, SimulatedSite, wait_until
from slurm_in_a_box.layout import COMPUTE_NODES
from support.background import Background
from support.workload_asset import PIPES, Outcome, materialize

NODES = ("n4001", "n4002")
ALL_NODES = tuple(node.hostname for node in COMPUTE_NODES)
PAIRS = (NODES, ("n4003", "n4004"))


def place(nodes: Sequence[str]) -> dict[str, Any]:
    """Fields of the request of a job on these nodes; the first is the head."""
    return {"nodes": len(nodes), "nodelist": ",".join(nodes)}


PLACE = place(NODES)
NO_DASHBOARD = RayLauncher(ray_start_args=["--include-dashboard=false"])
ON_THE_SECOND = '[ "$SLURM_PROCID" = 0 ] || '
"""Begins a pre-start command for the node that is not the head."""
FEW_CPUS = 1
"""Per node. Ray starts a process for each."""
STARTUP_SECONDS = 300
"""For the nodes to join, unless a launcher says it. `ray start` gives up after 30 s, and is started a second time;
where ten processes wait for each CPU, both take more than the 120 s that are the launcher's default."""
CONNECT = (
    PIPES
    + """
    import os, pathlib, socket, time
    import ray
    ray.init(log_to_driver=False, logging_level="ERROR")
    home = pathlib.Path.home()

    @ray.remote(num_cpus=1, scheduling_strategy="SPREAD")
    def where():
        time.sleep(0.1)
        return socket.gethostname()

    def hosts():
        '''The nodes that take tasks, once all of them do.'''
        found = set()
        while len(found) < len(ray.nodes()):
            found |= set(ray.get([where.remote() for _ in range(2 * len(ray.nodes()))]))
        return sorted(found)

    def say_ready():
        part = home / (pipes.extras["name"] + ".part")  # jobs that share the home do this at once
        part.write_text(os.environ["SLURM_JOB_ID"])
        part.rename(home / pipes.extras["name"])

    def wait_for(name):
        while not (home / name).exists():
            time.sleep(0.1)
"""
)
"""Beginning of a workload that has connected to its cluster; what follows is indented by four spaces."""
HANG = (
    CONNECT
    + """
    hosts()
    say_ready()
    wait_for("go-" + pipes.extras["name"])
    pipes.report_asset_materialization(metadata={"hosts": hosts()})
"""
)
"""Says that all nodes have worked, and waits for `RayRun.go_on`."""


class RayRun:
    """A run under way."""

    def __init__(
        self, site: SimulatedSite, folder: Path, workload: str, *, name: str = "ready",
        launcher: RayLauncher | None = None, env: Any = None, **request: Any,
    ) -> None:  # fmt: skip
        """Start it.

        Args:
            site: where it runs.
            folder: for the workload.
            workload: its text.
            name: of the file in the user's home that says that the workload runs.
            launcher: default: one without fields.
            env: variables of the workload.
            request: fields of SlurmRequest.
        """
        self._site, self._name = site, name
        folder = folder / name
        folder.mkdir()
        wanted = SlurmRequest(**{"cpus_per_task": FEW_CPUS, "mem": "3G", "time_limit": "10", **request})
        ray = launcher or RayLauncher()
        if "startup_time_limit" not in ray.model_fields_set:
            ray = ray.model_copy(update={"startup_time_limit": STARTUP_SECONDS})
        self._run = Background(
            lambda: materialize(workload, folder, launcher=ray, request=wanted, extras={"name": name}, env=env)
        )

    @property
    def _word(self) -> Path:
        return self.home / self._name

    @property
    def home(self) -> Path:
        """The user's home, as the host sees it."""
        return self._site.layout.home / CERTIFICATE_USER.name

    @property
    def is_ready(self) -> bool:
        """Whether the workload has said that it runs."""
        return self._word.exists()

    def wait_until_ready(self) -> None:
        """Wait for the workload's word."""
        wait_until(lambda: self.is_ready or self._run.ended, f"the workload of {self._name} runs", STARTUP_SECONDS + 60)
        assert self.is_ready, self.finish().error

    @property
    def job(self) -> int:
        """The id of its job, once it is ready."""
        return int(self._word.read_text())

    def go_on(self) -> None:
        """Let a workload HANG end."""
        (self.home / f"go-{self._name}").touch()

    def finish(self) -> Outcome:
        """Wait for its end."""
        return self._run.outcome(STARTUP_SECONDS + 60)


def share_out(cases: Mapping[str, Callable[[tuple[str, ...]], None]]) -> None:
    """Play cases on both pairs of nodes at once; a pair that is free takes the next case.

    Raises:
        Exception: the first failure on a pair, when the other pair has played the other cases.
    """
    waiting = iter(list(cases))  # of a list, which several threads may share

    def work(nodes: tuple[str, ...]) -> None:
        for name in waiting:
            try:
                cases[name](nodes)
            except Exception as error:
                error.add_note(f"in the case {name!r}, on {' and '.join(nodes)}")
                raise

    with ThreadPoolExecutor(len(PAIRS)) as pool:
        list(pool.map(work, PAIRS))


def cause_of(text: str) -> str:
    """The first line of a failure's text, be the step tried again or not."""
    found = re.search(r"Failure: probe: (.*)", text)
    assert found, text
    return found[1]


def leftovers(site: SimulatedSite, *nodes: str) -> str:
    """What is left of Ray, or of anything else of the user, on some nodes; on all of them if none is named."""
    look = f"ps -u {CERTIFICATE_USER.uid} -o pid=,args=; find /tmp /local /dev/shm -mindepth 1"
    return "".join(site.run_on_node(node, look, check=False).stdout for node in nodes or ALL_NODES)


def nothing_is_left(site: SimulatedSite, *nodes: str, seconds: float = 60) -> None:
    """Wait for the nodes, by default all of them, to be as clean as before the job."""
    try:
        wait_until(lambda: not leftovers(site, *nodes), "clean nodes", seconds)
    except Exception as error:
        raise AssertionError(f"left: {leftovers(site, *nodes)}") from error
