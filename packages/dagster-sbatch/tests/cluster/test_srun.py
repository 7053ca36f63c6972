"""SrunLauncher with the real Slurm: ranks over two nodes, a real MPI, GPUs, and ranks that fail."""

import shutil
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from dagster_sbatch import JobArray
from dagster_sbatch.launchers import SrunLauncher
from dagster_sbatch.slurm import SlurmRequest
from slurm_in_a_box import CERTIFICATE_USER, SimulatedSite, wait_until
from slurm_in_a_box.machines import MEMORY_CGROUPS
from support.array_asset import DAYS, ArrayAsset
from support.background import WAITS, Background, go_on, only_job
from support.ranks import MPI, RANK, RENDEZVOUS
from support.ray_run import cause_of, nothing_is_left
from support.step import Step, kill
from support.workload_asset import PIPES, Outcome, materialize

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("on_supercomputer")]
NODES, GPU_NODES = ("n4001", "n4002"), ("g4001", "g4002")
TWO_NODES: dict[str, Any] = {"nodes": 2, "ntasks_per_node": 2, "nodelist": ",".join(NODES)}


def run(workload: str, folder: Path, launcher: SrunLauncher | None = None, env: Any = None, **request: Any) -> Outcome:
    wanted = SlurmRequest(**{"time_limit": "5", "mem": "1G", **TWO_NODES, **request})
    return materialize(
        workload, folder, launcher=launcher or SrunLauncher(), request=wanted, extras={"name": "probe"}, env=env
    )


FOR_SRUN = (
    "SLURM_LABELIO=1 SLURM_STDOUTMODE=/dev/null SLURM_REMOTE_CWD=/tmp SLURM_CLUSTERS=x SRUN_OUTPUT=/dev/null "
    "SLURM_EXTERNAL_LAUNCHER=1"
)


def test_ranks_on_two_nodes_find_each_other(
    site: SimulatedSite, workloads: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The login profile exports what would change where srun starts them, how many, and where their output goes."""
    site.run_on_login(CERTIFICATE_USER, f"echo 'export {FOR_SRUN}' >.bash_profile")
    outcome = run(RENDEZVOUS, workloads, cpus_per_task=3)
    assert outcome.error == ""
    assert len(outcome.materializations[None]) == 1
    assert outcome.materializations[None][0]["words"] == [
        "0 0 n4001 None probe 3", "1 1 n4001 None probe 3", "2 0 n4002 None probe 3", "3 1 n4002 None probe 3"
    ]  # fmt: skip
    lines = capfd.readouterr().out.splitlines()
    assert sorted(lines) == ["[rank 1] a line of 1", "[rank 2] a line of 2", "[rank 3] a line of 3", "a line of 0"]
    nothing_is_left(site, *NODES)


@pytest.mark.smoke
@pytest.mark.parametrize(("bind", "seen"), [("none", {"0,1,2,3"}), ("per_task:1", {"0", "1", "2", "3"})])
def test_each_rank_sees_all_gpus_or_one(bind: str, seen: set[str], site: SimulatedSite, workloads: Path) -> None:
    request = {"nodes": 1, "ntasks_per_node": 4, "gpus_per_node": 4, "cpus_per_task": 1, "nodelist": None}
    outcome = run(RENDEZVOUS, workloads, SrunLauncher(gpu_bind=bind), **request)
    assert outcome.error == ""
    assert {word.split()[3] for word in outcome.materializations[None][0]["words"]} == seen
    nothing_is_left(site, *GPU_NODES)


def test_a_real_mpi_over_two_nodes(site: SimulatedSite, workloads: Path) -> None:
    """MPICH: its library is not among the packages of the simulated site's interpreter, so the user has a copy."""
    own, copy = Path(sys.prefix) / "lib", site.layout.home / CERTIFICATE_USER.name
    shutil.copy(own / "libmpi.so.12", copy)
    shutil.copytree(own / "mpich", copy / "mpich")
    env = {"MPI4PY_LIBMPI": f"{CERTIFICATE_USER.home}/libmpi.so.12"}
    launcher = SrunLauncher(mpi="pmi2")
    outcome = run(MPI, workloads, launcher, env)
    assert outcome.error == ""
    (metadata,) = outcome.materializations[None]
    assert (metadata["total"], metadata["nodes"]) == (6, ["n4001", "n4001", "n4002", "n4002"])
    nothing_is_left(site, *NODES)
    outcome = run(f"{MPI}if world.rank == 3: raise ValueError('boom')\nworld.barrier()", workloads, launcher, env)
    assert cause_of(outcome.error) == "rank 3 on n4002 ended with exit code 1: ValueError: boom"


LIMITS = pytest.mark.skipif(not MEMORY_CGROUPS, reason="this machine cannot enforce a job's memory")
MEMORY = "a rank runs out of memory"
FAILURES: dict[str, tuple[str, SrunLauncher, list[str]]] = {
    "a rank on the other node raises": (
        RANK + "    if rank == 3: raise ValueError('boom')\n    time.sleep(600)\n",
        SrunLauncher(),
        ["rank 3 on n4002 ended with exit code 1: ValueError: boom", "Last lines of stderr of rank 3:\nTraceback"],
    ),
    "a rank hangs at the end": (
        RANK
        + "    pathlib.Path(f'begun-{rank}').touch()\n"
        + "    while len([*pathlib.Path().glob('begun-*')]) < 4: time.sleep(0.1)\n"
        + "    if rank == 2: time.sleep(600)\n    pipes.report_asset_materialization()\n",
        SrunLauncher(end_time_limit=5),
        ["rank 2 still ran 5 s after another rank had ended", "raise SrunLauncher(end_time_limit=...)"],
    ),
    MEMORY: (
        RANK + "    if rank == 1: b'x' * (2 << 30)\n    time.sleep(600)\n",
        SrunLauncher(),
        ["rank 1 on n4001 ran out of memory. Request more with SlurmRequest(mem=...)"],
    ),
    "the site lacks the MPI type": (
        RANK,
        SrunLauncher(mpi="openmpi"),
        ["srun has no MPI type 'openmpi' on n4001. It has ", "pmi2", "Set SrunLauncher(mpi=...) to one of these."],
    ),
    "srun refuses an option": (
        RANK,
        SrunLauncher(cpu_bind="nonsense"),
        ["srun ended with exit code 1: srun: error: unrecognized --cpu-bind argument"],
    ),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=LIMITS) if name == MEMORY else name for name in FAILURES])
def test_a_job_in_which(name: str, site: SimulatedSite, workloads: Path) -> None:
    workload, launcher, texts = FAILURES[name]
    outcome = run(workload, workloads, launcher)
    assert not outcome.success
    assert texts[0] in cause_of(outcome.error)
    for text in texts:
        assert text in outcome.error
    assert outcome.materializations == {}
    nothing_is_left(site, *NODES)


FINE, RAISES, HANGS, FULL = DAYS.get_partition_keys()[:4]
BY_DAY = f"""\
import os, time
day, other = pipes.partition_key, os.environ["RANK"] != "0"
if day == "{RAISES}" and other: raise ValueError("boom")
if day == "{FULL}" and other: b"x" * (2 << 30)
{textwrap.dedent(RENDEZVOUS.removeprefix(PIPES))}
if day == "{HANGS}" and other: time.sleep(600)
"""


def test_tasks_of_an_array_with_two_ranks_each(site: SimulatedSite, tmp_path: Path) -> None:
    """They share a node: each has a port of its own, the error of its own rank, and ends by itself."""
    request = SlurmRequest(ntasks_per_node=2, nodelist=NODES[0], mem="500M", time_limit="5")
    launcher = SrunLauncher(end_time_limit=20)  # the ranks of a task start within that time
    asset = ArrayAsset(tmp_path, BY_DAY, JobArray(), launcher=launcher, request=request, extras={"name": "probe"})
    outcome = asset.run(FINE, FULL if MEMORY_CGROUPS else HANGS)
    assert list(outcome.once) == [FINE]
    assert outcome.once[FINE]["words"] == ["0 0 n4001 None probe 1", "1 1 n4001 None probe 1"]
    assert f"1 task ({RAISES}): rank 1 on n4001 ended with exit code 1: ValueError: boom" in outcome.error
    assert f"1 task ({HANGS}): rank 1 still ran 20 s after another rank had ended" in outcome.error
    if MEMORY_CGROUPS:
        assert f"1 task ({FULL}): rank 1 on n4001 ran out of memory." in outcome.error
    nothing_is_left(site, NODES[0])


def test_a_job_that_is_cancelled(site: SimulatedSite, workloads: Path) -> None:
    """Each rank gets one SIGTERM, and has time to save its state."""
    text = (
        f"{RANK}    home = os.path.expanduser('~')\n"
        "    signal.signal(signal.SIGTERM, lambda *_: print('saved', file=open(f'{home}/saved-{rank}', 'a')))\n"
        "    open(f'{home}/begun-{rank}', 'w').close()\n"
        "    while not os.path.exists(f'{home}/go-on'): time.sleep(0.1)\n"
    )
    running, home = Background(lambda: run(text, workloads)), site.layout.home / CERTIFICATE_USER.name
    job = only_job(site, "RUNNING")
    ranks = range(4)
    wait_until(lambda: all((home / f"begun-{rank}").exists() for rank in ranks), "the ranks run", 60)
    site.cluster.query("scancel", str(job))
    saved = [home / f"saved-{rank}" for rank in ranks]
    wait_until(lambda: all(path.exists() and path.read_text() for path in saved), "the ranks have saved", 60)
    go_on(site)
    assert "it was cancelled on the cluster" in cause_of(running.outcome().error)
    assert [path.read_text() for path in saved] == ["saved\n"] * 4
    nothing_is_left(site, *NODES)


def test_a_lost_connection_and_a_killed_step(
    site: SimulatedSite, tmp_path: Path, step_variables: dict[str, str]
) -> None:
    """The next attempt attaches to the ranks that still run; each line of output arrives once."""
    step = Step(tmp_path / "step", step_variables, WAITS.replace("print(", "import os; print(os.environ['RANK'], "))
    step.call(launcher="SrunLauncher", **TWO_NODES)
    first = step.start(again=False)
    job = only_job(site, "RUNNING")
    site.faults.drop_connections()
    kill(first)
    second = step.start(again=True)
    wait_until(lambda: "was submitted by an earlier run of this step" in step.log, "the second follows", 90)
    go_on(site)
    success, error, metadata = step.result(second)
    assert (success, error, metadata["job_id"]) == (True, "", job)
    labels = ["", "[rank 1] ", "[rank 2] ", "[rank 3] "]
    expected = [f"{label}{rank} {word}" for rank, label in enumerate(labels) for word in ("begun", "gone on")]
    assert sorted(step.output.splitlines()) == sorted(expected)
    nothing_is_left(site, *NODES)
