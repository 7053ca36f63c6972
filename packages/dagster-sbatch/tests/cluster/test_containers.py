"""Workloads in containers, with the site's program `apptainer`."""

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from dagster_sbatch import JobArray
from dagster_sbatch.launchers import (
    BatchScriptLauncher,
    CommandLauncher,
    Container,
    Launcher,
    ScriptLauncher,
    SrunLauncher,
)
from dagster_sbatch.slurm import SlurmRequest
from slurm_in_a_box import CERTIFICATE_USER, SimulatedSite, wait_until
from slurm_in_a_box.images import IMAGE, NOT_AN_IMAGE, OS_NAME, REBUILT
from slurm_in_a_box.machines import MEMORY_CGROUPS
from slurm_in_a_box.storage import SOLVER, STACK
from support.array_asset import DAYS, ArrayAsset
from support.background import SLEEPS, Background, jobs_of, runs_there
from support.programs import REPORTS, make
from support.ranks import RENDEZVOUS
from support.ray_run import cause_of, nothing_is_left
from support.step import Step, kill
from support.workload_asset import PIPES, Outcome, materialize

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("on_supercomputer")]
NODES = ("n4001", "n4002", "n4003", "n4004")
HOME = CERTIFICATE_USER.home
LOOK = (
    PIPES
    + f"""
    import os, pathlib, sys, dagster_pipes
    temporary = pathlib.Path(os.environ["TMPDIR"], "scratch-file")
    temporary.write_text("7")
    pathlib.Path(os.environ["DATA_ROOT"], "result").write_text("from the container")
    pipes.log.warning("a message of the workload")
    pipes.report_asset_materialization(metadata={{
        "system": pathlib.Path("/etc/os-release").read_text(),
        "home": os.listdir("{HOME}"),
        "note": pathlib.Path("/mnt/note").read_text(),
        "env": os.environ["COLOUR"] + os.environ["LD_LIBRARY_PATH"],
        "python": sys.executable,
        "temporary": str(temporary.parent),
        "args": sys.argv[1:],
    }})
"""
)
MPI = f"""\
import ctypes, os
from dagster_pipes import open_dagster_pipes
mpi, rank, total = ctypes.CDLL("{HOME}/mpi/libmpi.so.12"), ctypes.c_int(), ctypes.c_int()
world, integers, addition = 0x44000000, 0x4C000405, 0x58000003  # as in MPICH's mpi.h
mpi.MPI_Init(None, None)
mpi.MPI_Comm_rank(world, ctypes.byref(rank))
mpi.MPI_Allreduce(ctypes.byref(rank), ctypes.byref(total), 1, integers, addition, world)
assert "{OS_NAME}" in open("/etc/os-release").read()
with open_dagster_pipes() as pipes:
    pipes.report_asset_materialization(metadata={{"total": total.value, "module": os.environ["EBROOTSOLVER"]}})
mpi.MPI_Finalize()
"""
WAITS = (
    PIPES
    + """
    import os, pathlib, time
    data = pathlib.Path(os.environ["DATA_ROOT"])
    print("begun", flush=True)
    if os.environ.get("RANK", "0") == "0":
        (data / pipes.extras["name"]).write_text(os.environ["SLURM_JOB_ID"])
    while not (data / "go-on").exists():
        time.sleep(0.1)
    print("gone on", flush=True)
    pipes.report_asset_materialization(metadata={"rows": 7})
"""
)
"""Until there is a file `go-on` in DATA_ROOT; the container has no home."""


FILLS = PIPES + "    ballast = bytearray(b'x' * (400 << 20))\n"
FINE, RAISES, FULL = DAYS.get_partition_keys()[:3]
TASKS = f"""
if pipes.partition_key == "{RAISES}": raise ValueError("boom")
if pipes.partition_key == "{FULL}": ballast = bytearray(b'x' * (400 << 20))
pipes.report_asset_materialization(metadata={{"system": open("/etc/os-release").read()}})
"""


@pytest.fixture
def image(site: SimulatedSite) -> Path:
    """An image on the site. The user has a link to it in DATA_ROOT."""
    path = site.layout.images / IMAGE
    site.run_on_login(
        CERTIFICATE_USER,
        f"umask 077; mkdir -p dagster-slurm/data notes; ln -s {path} dagster-slurm/data; echo n >notes/note",
    )
    return path


def start(folder: Path, workload: str, launcher: Launcher, request: dict[str, Any], **more: Any) -> Background:
    wanted = SlurmRequest(**{"time_limit": "5", "mem": "1G", **request})
    folder.mkdir()
    path = make(folder, workload) if isinstance(launcher, CommandLauncher) else workload
    return Background(lambda: materialize(path, folder, launcher=launcher, request=wanted, **more))


def test_each_launcher_runs_its_workload_in_the_image(site: SimulatedSite, workloads: Path, image: Path) -> None:
    """The packages of the environment are not there, and `dagster_pipes` is; a relative image lies in DATA_ROOT."""
    bound = Container(IMAGE, binds=["~/notes:/mnt"])
    variables = {"COLOUR": "dark 'blue'", "LD_LIBRARY_PATH": "/of/the/asset"}
    script = start(workloads / "s", LOOK, ScriptLauncher(container=bound), {}, env=variables, args=["a b"])
    command = start(
        workloads / "c",
        f'#!/bin/bash\ngrep -q "{OS_NAME}" /etc/os-release || exit 9\ntouch picture.txt\nset -- picture.txt\n'
        + REPORTS.removeprefix("#!/bin/bash\n"),
        CommandLauncher(container=Container(str(image))),
        {},
        extras={"trials": 3},
        checks=("fine",),
    )
    batch = start(
        workloads / "b",
        f'#!/bin/bash\n#SBATCH --cpus-per-task=3\ngrep -q "{OS_NAME}" /etc/os-release || exit 9\n'
        'pipes materialize --metadata cpus="$SLURM_CPUS_PER_TASK" --metadata folder="${PWD##*/}"\nmodule load GCC\n',
        BatchScriptLauncher(container=Container(str(image))),
        {},
    )
    ranks = start(
        workloads / "r",
        RENDEZVOUS.replace("words = [word]", f'assert "{OS_NAME}" in open("/etc/os-release").read(); words = [word]'),
        SrunLauncher(container=Container(str(image))),
        {"nodes": 2, "ntasks_per_node": 2},
        extras={"name": "probe"},
    )
    own, copy = Path(sys.prefix) / "lib", site.layout.home / CERTIFICATE_USER.name / "mpi"
    shutil.copytree(own / "mpich", copy / "mpich")
    shutil.copy(own / "libmpi.so.12", copy)
    mpi = start(
        workloads / "m",
        MPI,
        SrunLauncher(mpi="pmi2", container=Container(str(image), binds=["~/mpi"])),
        {"nodes": 2, "modules": (STACK, SOLVER)},  # one rank per node: each is in a user namespace of its own
    )
    outcome, of_command, of_ranks, of_mpi = (succeeded(run) for run in (script, command, ranks, mpi))
    of_batch = batch.outcome(180)
    assert "/model.sh: line 5" not in of_batch.error
    assert "model.sh ended with exit code 127" in of_batch.error
    assert "module: command not found. A container has the commands of its image, not those of the" in of_batch.error
    assert of_mpi["total"] == 0 + 1
    assert of_mpi["module"].endswith(SOLVER)
    assert outcome["system"] == f'NAME="{OS_NAME}"\n'
    assert outcome["home"] == ["dagster-slurm"]
    assert (outcome["note"], outcome["env"]) == ("n\n", "dark 'blue'/of/the/asset")
    assert (outcome["python"], outcome["temporary"]) == ("/usr/bin/python3", "/local")
    assert outcome["args"] == ["a b"]
    assert site.run_on_login(CERTIFICATE_USER, "cat dagster-slurm/data/result").stdout == "from the container"
    assert of_command["rows"] == 12
    words = [word.split() for word in of_ranks["words"]]
    assert [word[:2] for word in words] == [["0", "0"], ["1", "1"], ["2", "0"], ["3", "1"]]
    assert len({word[2] for word in words}) == 2
    nothing_is_left(site, *NODES)


def succeeded(run: Background) -> dict[str, Any]:
    outcome = run.outcome(180)
    assert outcome.error == ""
    return outcome.materializations[None][0]


@pytest.fixture
def step(on_supercomputer: dict[str, str], tmp_path: Path) -> Step:
    """A step in a process of its own, whose image the user may replace."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
    made = Step(tmp_path / "step", {**kept, **on_supercomputer}, WAITS)
    made.call(extras={"name": "step"}, container=IMAGE, mem="1G")
    return made


def test_jobs_in_containers_that_end_in_every_way_at_once(
    site: SimulatedSite, workloads: Path, image: Path, step: Step, tmp_path: Path
) -> None:
    """They end as any other and leave nothing.

    They are warned before the time limit, although the container's own process handles all signals. The next attempt of
    a step attaches to a job only if that has the image which is there now.
    """
    container, broken = Container(str(image)), Container(str(image), python="python9")
    saves = PIPES + "    import signal, sys, time\n    signal.signal(signal.SIGUSR1, lambda *_: sys.exit('saved'))\n"
    saves += "    time.sleep(600)\n"
    two: dict[str, Any] = {"nodes": 2, "ntasks_per_node": 2}
    wanted: dict[str, tuple[str, Launcher, dict[str, Any]]] = {
        "warned": (saves, ScriptLauncher(container=container), {"time_limit": "1"}),
        "late": (SLEEPS, ScriptLauncher(container=container), {"time_limit": "1"}),
        "python": (SLEEPS, ScriptLauncher(container=broken), {}),
        "option": (SLEEPS, ScriptLauncher(container=Container(str(image), options=["--no-such"])), {}),
        "ranks": (SLEEPS, SrunLauncher(container=broken), {"ntasks_per_node": 2}),
        "disconnected": (WAITS, ScriptLauncher(container=container), {"time_limit": "20"}),
        "cancelled": (WAITS, SrunLauncher(container=container), two),
    }
    if MEMORY_CGROUPS:
        wanted["memory"] = (FILLS, ScriptLauncher(container=container), {"mem": "200M"})
    runs = {name: start(workloads / name, *each, extras={"name": name}) for name, each in wanted.items()}
    first = step.start(again=False)
    jobs = {name: begun(site, name) for name in ("disconnected", "cancelled", "step")}
    site.faults.drop_connections()
    kill(first)
    site.faults.cancel_job(jobs["cancelled"])
    second = step.start(again=True)
    follows = f"Slurm job {jobs['step']} was submitted by an earlier run of this step. Attaching to it."
    wait_until(lambda: follows in step.log, "the second follows", 120)
    kill(second)
    (site.layout.home / CERTIFICATE_USER.name / "dagster-slurm/data/step").unlink()
    replace = f"ln -sfn {image.with_name(REBUILT)} dagster-slurm/data/{IMAGE}"
    site.run_on_login(CERTIFICATE_USER, replace)
    third = step.start(again=True)
    new = begun(site, "step")
    assert f"Slurm job {jobs['step']} was submitted by an earlier run of this step with other inputs" in step.log
    assert "(container image). It is cancelled, and a new job is submitted." in step.log
    site.run_on_login(CERTIFICATE_USER, "touch dagster-slurm/data/go-on")
    request = SlurmRequest(mem="200M", time_limit="5")
    array = ArrayAsset(tmp_path, TASKS, JobArray(), launcher=ScriptLauncher(container=container), request=request)
    of_tasks = array.run(FINE, FULL if MEMORY_CGROUPS else RAISES)
    assert list(of_tasks.once) == [FINE]
    assert of_tasks.once[FINE]["system"] == f'NAME="{OS_NAME}"\n'
    assert f"1 task ({RAISES}): " in of_tasks.error
    success, error, metadata = step.result(third)
    assert (success, error, metadata["job_id"], step.output) == (True, "", new, "begun\ngone on\n")
    outcomes = {name: run.outcome(240) for name, run in runs.items()}
    done = outcomes.pop("disconnected")
    assert (done.error, done.retries, done.materializations[None][0]["rows"]) == ("", [], 7)
    causes = {name: cause_of(outcome.error) for name, outcome in outcomes.items()}
    no_python = f"The image {image} has no python9, and a Python of the image starts every workload."
    expected = {
        "warned": "saved",
        "late": "it reached its time limit (Slurm: TIMEOUT)",
        "python": no_python,
        "ranks": no_python,
        "option": "The container did not start: apptainer ended before the workload. Its exit code is 1.",
        "cancelled": "it was cancelled on the cluster",
    }
    if MEMORY_CGROUPS:
        expected["memory"] = "it ran out of memory (Slurm: OUT_OF_MEMORY). It had mem='200M'"
        assert f"1 task ({FULL}): it ran out of memory (Slurm: OUT_OF_MEMORY)" in of_tasks.error
    assert {name: text for name, text in expected.items() if text not in causes[name]} == {}, causes
    assert 'Error for command "exec": unknown flag: --no-such' in outcomes["option"].error
    for run in runs_there(site):
        assert len({job.partition("_")[0] for job in jobs_of(site, run)}) == 1, run
    nothing_is_left(site, *NODES)


def begun(site: SimulatedSite, name: str) -> int:
    """The id of a job whose workload waits, as soon as it does."""
    path = site.layout.home / CERTIFICATE_USER.name / "dagster-slurm/data" / name
    wait_until(lambda: path.exists() and path.read_text(), f"{name} runs", 180)
    return int(path.read_text())


def test_an_image_that_cannot_be_run_is_found_before_the_job(site: SimulatedSite, workloads: Path, image: Path) -> None:
    site.run_on_login(CERTIFICATE_USER, "install -m 000 /dev/null closed.sif")
    wrong = {
        "~/closed.sif": f"You may not read the container image {HOME}/closed.sif on login0",
        "$HOME/none.sif": f"There is no container image {HOME}/none.sif on login0",
        str(image.with_name(NOT_AN_IMAGE)): "is not a container image: it is neither a SIF or squashfs file, nor a",
    }
    for path, text in wrong.items():
        outcome: Outcome = materialize(SLEEPS, workloads, launcher=ScriptLauncher(container=Container(path)))
        assert text in cause_of(outcome.error)
    assert site.run_on_login(CERTIFICATE_USER, "ls dagster-slurm/runs", check=False).stdout == ""
