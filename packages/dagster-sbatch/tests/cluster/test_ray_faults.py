"""Ray jobs that cannot work, are ended, or lose something under way: told with the cause, and nothing is left.

Jobs of one test run on two pairs of nodes at once.
"""

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dagster_sbatch.launchers import RayLauncher
from slurm_in_a_box import CERTIFICATE_USER, SimulatedSite
from slurm_in_a_box.machines import MEMORY_CGROUPS
from support.background import kill_on_node
from support.ray_run import (
    CONNECT,
    HANG,
    NO_DASHBOARD,
    ON_THE_SECOND,
    RayRun,
    cause_of,
    nothing_is_left,
    place,
    share_out,
)

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("on_supercomputer")]
SHAM = "d=$(mktemp -d ~/sham.XXXX); "
OTHER_RAY = (
    SHAM + 'mkdir "$d/ray-2.53.0.dist-info"; '
    'printf "Name: ray\\nVersion: 2.53.0\\n" >"$d/ray-2.53.0.dist-info/METADATA"'
)
# Below the ports that the launcher reserves.
LISTENER = "python3 -m http.server 19761 >/dev/null 2>&1"
LISTENS = "until (: </dev/tcp/127.0.0.1/19761) 2>/dev/null; do sleep 0.1; done"
HEAD, BOTH = 1, 2
GPU_IS_BROKEN = "a GPU is broken"
# By name: fields of the launcher, how many nodes of the pair the job has, and what its failure says.
BAD_STARTS: dict[str, tuple[dict[str, Any], int, list[str]]] = {
    "a node does not join in time": (
        {"startup_time_limit": 60, "pre_start_commands": [f"{ON_THE_SECOND}{{ echo dawdling; sleep 300; }}"]},
        BOTH,
        [
            "Ray: after 60 s, 1 of 2 nodes have joined; missing: {second}",
            "The last lines of `ray start` on {second}:\n(nothing)",
            "dawdling",
        ],
    ),
    "the environment is missing on a node": (
        {"pre_start_commands": ["export PYTHON=/nowhere/python"]},
        HEAD,
        ["Ray on {head}: there is no /nowhere/python"],
    ),
    "Ray is missing on a node": (
        {"pre_start_commands": ["export PYTHON=/usr/bin/python3"]},
        HEAD,
        ["Ray on {head}: there is no Ray in the environment of /usr/bin/python3"],
    ),
    "another Ray on a node": (
        {"pre_start_commands": [f'{ON_THE_SECOND}{{ {OTHER_RAY}; export PYTHONPATH="$d"; }}']},
        BOTH,
        ["Ray on {second}: Ray 2.53.0 (", "on the head, {head}"],
    ),
    "a port is taken": (
        {"ray_start_args": ["--node-manager-port=19761"], "pre_start_commands": [f"{LISTENER} & {LISTENS}"]},
        HEAD,
        ["Ray on {head}: cannot use the port of --node-manager-port=19761: Address already in use"],
    ),
    "Ray does not know an argument": (
        {"ray_start_args": ["--bogus=1"]},
        HEAD,
        ["Ray on {head}: `ray start` ended with exit code 2: Error: No such option '--bogus'"],
    ),
    "a node has no words": (
        {"pre_start_commands": ["exit 3"]},
        HEAD,
        ["Ray: srun ended with exit code 3, and no node has reported why"],
    ),
    "no such interface": (
        {"network_interface": "ib7"},
        BOTH,
        ["network_interface='ib7' has no address that Ray could use: No such device. This node has lo", "Ray on n400"],
    ),
    "nowhere to write": (
        {"temp_dir": "/proc"},
        HEAD,
        ["Ray on {head}: cannot make a folder in /proc (", "set RayLauncher's temp_dir"],
    ),
    GPU_IS_BROKEN: (
        {
            "pre_start_commands": [
                SHAM + 'printf "#!/bin/sh\\necho GPU 0: H100; echo GPU 1 has fallen off the bus >&2" >"$d/nvidia-smi"'
                ' && chmod +x "$d/nvidia-smi" && PATH=$d:$PATH'
            ]
        },
        HEAD,
        ["Ray on {head}: nvidia-smi lists 1 of the 2 GPUs that the job requested here. It says: GPU 0: H100; "
         "GPU 1 has fallen off the bus. Exclude this node"],
    ),
}  # fmt: skip


def start_badly(name: str, site: SimulatedSite, folder: Path, nodes: tuple[str, ...]) -> None:
    fields, which, texts = BAD_STARTS[name]
    nodes = ("g4001",) if name == GPU_IS_BROKEN else nodes[:which]
    gpus = {"gpus_per_node": 2, "cpus_per_task": 2} if name == GPU_IS_BROKEN else {}
    run = RayRun(
        site, folder, HANG, name=name.replace(" ", "-"), launcher=RayLauncher(**fields), **place(nodes), **gpus
    )
    outcome = run.finish()
    texts = [text.format(head=nodes[0], second=nodes[-1]) for text in texts]
    assert not outcome.success
    assert texts[0] in cause_of(outcome.error)
    for text in texts:
        assert text in outcome.error
    nothing_is_left(site, *nodes)
    assert not run.is_ready


def start_slowly(site: SimulatedSite, folder: Path, nodes: tuple[str, ...]) -> None:
    """The raylet waits no longer than 15 s for its agents. The second start is quicker, from files in memory."""
    slow = (
        "echo \"import os, sys, time; agent = any(word.endswith('agent.py') for word in sys.orig_argv); "
        "time.sleep(20 * (agent and not os.path.exists('$d/ended'))); agent and open('$d/ended', 'w').close()\""
    )
    launcher = RayLauncher(
        pre_start_commands=[
            "ulimit -n 2000000000",
            f'{SHAM}{slow} >"$d/sitecustomize.py"; export PYTHONPATH=$PYTHONPATH:$d',
        ],
        ray_start_args=["--include-dashboard=false"],
    )
    workload = (
        CONNECT + "    import resource\n    limits = ray.remote(lambda: resource.getrlimit(resource.RLIMIT_NOFILE))\n"
    )
    workload += "    pipes.report_asset_materialization(metadata={'limits': ray.get(limits.remote())})\n"
    outcome = RayRun(site, folder, workload, launcher=launcher, **place(nodes[:HEAD])).finish()
    assert outcome.error == ""
    soft, hard = outcome.materializations[None][0]["limits"]
    assert soft == hard
    nothing_is_left(site, *nodes[:HEAD])


def test_starts_that_fail_and_one_under_difficulties(
    site: SimulatedSite, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cases = {name: partial(start_badly, name, site, tmp_path) for name in BAD_STARTS}
    share_out({"under difficulties": partial(start_slowly, site, tmp_path), **cases})
    assert re.search(r"ulimit -n 2000000000: failed on n400[13]; the job continues", capfd.readouterr().err)


@dataclass(frozen=True)
class Failing:
    """A job that fails under way.

    Attributes:
        cause: of its failure.
        workload: of the job.
        nodes: how many of the pair the job has.
        time_limit: of the job, in minutes.
        mem: memory of the job per node.
        victims: a command that prints the processes to kill when the workload runs.
        second: whether these are on the second node.
    """

    cause: str
    workload: str = HANG
    nodes: int = BOTH
    time_limit: str = "5"
    mem: str = "3G"
    victims: str = ""
    second: bool = False

    def play(self, name: str, site: SimulatedSite, folder: Path, nodes: tuple[str, ...]) -> None:
        nodes, request = nodes[: self.nodes], {"time_limit": self.time_limit, "mem": self.mem}
        run = RayRun(
            site, folder, self.workload, name=name.replace(" ", "-"), launcher=NO_DASHBOARD, **place(nodes), **request
        )
        if self.victims:
            run.wait_until_ready()
            kill_on_node(site, nodes[self.second], self.victims)
        outcome = run.finish()
        assert not outcome.success
        assert self.cause.format(head=nodes[0], second=nodes[-1]) in cause_of(outcome.error)
        assert outcome.retries == []
        nothing_is_left(site, *nodes)


HANDLES_WARNING = (
    CONNECT.replace(
        "    ray.init",
        "    import signal; signal.signal(signal.SIGUSR1, warned)\n    ray.init",
    ).replace(
        "    import ray\n",
        """    import ray
    home_of = pathlib.Path.home()
    def warned(*_):
        (home_of / 'saved').touch()
        raise TimeoutError
    def ends(*_):
        time.sleep(1)
        (home_of / 'saved again').touch()
""",
        1,
    )
    + """    hosts()
    signal.signal(signal.SIGTERM, ends)  # after ray.init(), which sets a handler that raises SystemExit
    try:
        ray.get(ray.remote(lambda: time.sleep(600)).remote())
    except TimeoutError:
        time.sleep(600)
"""
)
"""Gets the warning before the time limit in the middle of its waiting for Ray, and SIGTERM at the limit."""
FAILING = {
    "a time limit": Failing("it reached its time limit (Slurm: TIMEOUT)", HANDLES_WARNING, time_limit="2"),
    "the raylet of a worker is killed": Failing(
        "Ray on {second}: raylet was killed by signal 9", victims="pgrep -x raylet", second=True
    ),
    "the control service of the head is killed": Failing(
        "Ray on {head}: gcs_server was killed by signal 9", nodes=HEAD, victims="pgrep -x gcs_server"
    ),
    "the batch shell is killed": Failing("and Slurm reports FAILED 0:9", nodes=HEAD, victims="pgrep -f [s]lurm_script"),
    "exits 7": Failing("probe workload.py ended with exit code 7", f"{CONNECT}    os._exit(7)", HEAD),
    "raises": Failing("probe workload.py raised KeyError: 'why'", f"{CONNECT}    raise KeyError('why')", HEAD),
    "raises in a task": Failing(
        "probe workload.py raised ray.exceptions.RayTaskError(ZeroDivisionError): ",
        f"{CONNECT}    ray.get(ray.remote(lambda: 1 // 0).remote())",
        HEAD,
    ),
}


def test_jobs_that_fail_under_way(site: SimulatedSite, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    share_out({name: partial(failing.play, name, site, tmp_path) for name, failing in FAILING.items()})
    assert all((site.layout.home / CERTIFICATE_USER.name / name).exists() for name in ("saved", "saved again"))
    assert "time limit: 12 s left" in capfd.readouterr().err


EAT = (
    CONNECT
    + """
    class Hungry:
        def eat(self):
            ballast = []
            while True:
                ballast.append(b"x" * (50 << 20))
"""
)
ON_ANOTHER_NODE = """
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
    here = ray.get_runtime_context().get_node_id()
    (there,) = (node["NodeID"] for node in ray.nodes() if node["NodeID"] != here)
    strategy = NodeAffinitySchedulingStrategy(there, soft=False)
    ray.get(ray.remote(Hungry).options(scheduling_strategy=strategy).remote().eat.remote())
"""
ADVICE = ". It had mem='2G'. Request more, for instance mem='3G'"
OUT_OF_MEMORY = {
    "the driver": Failing(
        f"it ran out of memory (Slurm: OUT_OF_MEMORY){ADVICE}", f"{EAT}    Hungry().eat()\n", HEAD, mem="2G"
    ),
    "an actor on the second node": Failing(
        f"it ran out of memory on {{second}}, and the system killed some of its processes{ADVICE}. "
        "Then probe workload.py raised ray.exceptions.ActorDiedError: ",
        EAT + ON_ANOTHER_NODE,
        mem="2G",
    ),
}


@pytest.mark.skipif(not MEMORY_CGROUPS, reason="this machine cannot enforce a job's memory")
def test_jobs_that_run_out_of_memory(site: SimulatedSite, tmp_path: Path) -> None:
    """Slurm calls the second one FAILED, and Ray says only that the actor has died."""
    share_out({name: partial(failing.play, name, site, tmp_path) for name, failing in OUT_OF_MEMORY.items()})
