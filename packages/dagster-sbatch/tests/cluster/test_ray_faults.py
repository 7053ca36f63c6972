"""Ray jobs that cannot work, are ended, or lose something under way: told with the cause, and nothing is left."""

from pathlib import Path
from typing import Any

import pytest

from dagster_sbatch.launchers import RayLauncher
from slurm_in_a_box import SimulatedSite
from support.ray_run import (
    CONNECT,
    HANG,
    NO_DASHBOARD,
    NODES,
    ON_THE_SECOND,
    PLACE,
    RayRun,
    cause_of,
    nothing_is_left,
)

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("on_supercomputer")]
ONE_NODE = {"nodelist": "n4001"}
SHAM = "d=$(mktemp -d ~/sham.XXXX); "
OTHER_RAY = (
    SHAM + 'mkdir "$d/ray-2.53.0.dist-info"; '
    'printf "Name: ray\\nVersion: 2.53.0\\n" >"$d/ray-2.53.0.dist-info/METADATA"'
)
LISTENER = "python3 -m http.server 28761 >/dev/null 2>&1"
LISTENS = "until (: </dev/tcp/127.0.0.1/28761) 2>/dev/null; do sleep 0.1; done"
BAD_STARTS: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "the environment is missing on a node": (
        {"pre_start_commands": [f"{ON_THE_SECOND}export PYTHON=/nowhere/python"]},
        PLACE,
        ["Ray on n4002: there is no /nowhere/python"],
    ),
    "Ray is missing on a node": (
        {"pre_start_commands": [f"{ON_THE_SECOND}export PYTHON=/usr/bin/python3"]},
        PLACE,
        ["Ray on n4002: there is no Ray in the environment of /usr/bin/python3"],
    ),
    "another Ray on a node": (
        {"pre_start_commands": [f'{ON_THE_SECOND}{{ {OTHER_RAY}; export PYTHONPATH="$d"; }}']},
        PLACE,
        ["Ray on n4002: Ray 2.53.0 (", "on the head, n4001"],
    ),
    "a port is taken": (
        {
            "ray_start_args": ["--node-manager-port=28761"],
            "pre_start_commands": [f"{ON_THE_SECOND}{{ {LISTENER} & {LISTENS}; }}"],
        },
        PLACE,
        ["Ray on n4002: cannot use the port of --node-manager-port=28761: Address already in use"],
    ),
    "Ray does not know an argument": (
        {"ray_start_args": ["--bogus=1"]},
        ONE_NODE,
        ["Ray on n4001: `ray start` ended with exit code 2: Error: No such option '--bogus'"],
    ),
    "a node has no words": (
        {"pre_start_commands": ["exit 3"]},
        ONE_NODE,
        ["Ray: srun ended with exit code 3, and no node has reported why"],
    ),
    "no such interface": (
        {"network_interface": "ib7"},
        PLACE,
        ["network_interface='ib7': No such device; there are lo, eth0", "Ray on n400"],
    ),
    "nowhere to write": (
        {"temp_dir": "/proc"},
        ONE_NODE,
        ["Ray on n4001: cannot make a folder in /proc (", "set RayLauncher's temp_dir"],
    ),
    "a GPU is broken": (
        {
            "pre_start_commands": [
                SHAM + 'printf "#!/bin/sh\\necho GPU 0: H100; echo GPU 1 has fallen off the bus >&2" >"$d/nvidia-smi"'
                ' && chmod +x "$d/nvidia-smi" && PATH=$d:$PATH'
            ]
        },
        {"gpus_per_node": 2, "nodelist": "g4001"},
        ["Ray on g4001: 1 of 2 GPUs are there; nvidia-smi says: GPU 0: H100; GPU 1 has fallen off the bus"],
    ),
    "a node does not join in time": (
        {"startup_time_limit": 15, "pre_start_commands": [f"{ON_THE_SECOND}{{ echo dawdling; sleep 300; }}"]},
        PLACE,
        [
            "Ray: after 15 s, 1 of 2 nodes have joined; missing: n4002",
            "The last lines of `ray start` on n4002:\n(nothing)",
            "dawdling",
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_STARTS)
def test_a_start_that_fails(name: str, site: SimulatedSite, tmp_path: Path) -> None:
    fields, request, texts = BAD_STARTS[name]
    run = RayRun(site, tmp_path, HANG, launcher=RayLauncher(**fields), **request)
    outcome = run.finish()
    assert not outcome.success
    assert texts[0] in cause_of(outcome.error)
    for text in texts:
        assert text in outcome.error
    nothing_is_left(site, *request["nodelist"].split(","))
    assert not (run.home / "ready").exists()


def test_a_start_under_difficulties(site: SimulatedSite, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
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
    outcome = RayRun(site, tmp_path, workload, launcher=launcher, nodelist="n4001").finish()
    assert outcome.error == ""
    soft, hard = outcome.materializations[None][0]["limits"]
    assert soft == hard
    assert "ulimit -n 2000000000: failed on n4001; the job continues" in capfd.readouterr().err


BAD_WORKLOADS = {
    "exits 7": ("    os._exit(7)", "probe workload.py ended with exit code 7"),
    "raises": ("    raise KeyError('why')", "probe workload.py raised KeyError: 'why'"),
    "raises in a task": (
        "    ray.get(ray.remote(lambda: 1 // 0).remote())",
        "probe workload.py raised RayTaskError(ZeroDivisionError): ",
    ),
}


@pytest.mark.parametrize("name", BAD_WORKLOADS)
def test_a_workload_that(name: str, site: SimulatedSite, tmp_path: Path) -> None:
    body, text = BAD_WORKLOADS[name]
    outcome = RayRun(site, tmp_path, CONNECT + body, launcher=NO_DASHBOARD, nodelist="n4001").finish()
    assert not outcome.success
    assert text in cause_of(outcome.error)
    nothing_is_left(site, "n4001")


KILLS = {
    "the raylet of a worker": ("n4002", "raylet"),
    "the head's control service": ("n4001", "gcs_server"),
}


@pytest.mark.parametrize("name", KILLS)
def test_a_part_of_ray_is_killed(name: str, site: SimulatedSite, tmp_path: Path) -> None:
    node, program = KILLS[name]
    run = RayRun(site, tmp_path, HANG, launcher=NO_DASHBOARD, **PLACE)
    run.wait_until_ready()
    site.run_on_node(node, f"kill -KILL $(pgrep -x {program})")
    outcome = run.finish()
    cause = cause_of(outcome.error)
    assert f"Ray on {node}: {program} was killed by signal 9" in cause
    nothing_is_left(site, *NODES)


def test_the_batch_shell_is_killed(site: SimulatedSite, tmp_path: Path) -> None:
    run = RayRun(site, tmp_path, HANG, launcher=NO_DASHBOARD, **PLACE)
    run.wait_until_ready()
    site.run_on_node("n4001", "kill -KILL $(pgrep -f [s]lurm_script)")
    assert "and Slurm reports FAILED 0:9" in cause_of(run.finish().error)
    nothing_is_left(site, *NODES)


def test_a_warning_before_the_time_limit_then_the_limit(
    site: SimulatedSite, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The workload that handles the warning gets it, in the middle of its waiting for Ray; then it hangs on."""
    workload = CONNECT.replace(
        "    ray.init",
        "    import signal; signal.signal(signal.SIGUSR1, lambda *_: (home_of / 'saved').touch())\n    ray.init",
    ).replace("    import ray\n", "    import ray\n    home_of = pathlib.Path.home()\n", 1)
    workload += "    hosts(); say_ready(); ray.get(ray.remote(lambda: time.sleep(600)).remote())\n"
    run = RayRun(site, tmp_path, workload, launcher=NO_DASHBOARD, time_limit="2", **PLACE)
    run.wait_until_ready()
    outcome = run.finish()
    assert (run.home / "saved").exists()
    assert "time limit: 12 s left" in capfd.readouterr().err
    assert "it reached its time limit (Slurm: TIMEOUT)" in cause_of(outcome.error)
    nothing_is_left(site, *NODES)
