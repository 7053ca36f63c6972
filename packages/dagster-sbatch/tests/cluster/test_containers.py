"""Workloads in containers, with the site's program `apptainer`."""

from pathlib import Path
from typing import Any

import pytest

from dagster_sbatch.launchers import CommandLauncher, Container, Launcher, ScriptLauncher, SrunLauncher
from dagster_sbatch.slurm import SlurmRequest
from slurm_in_a_box import CERTIFICATE_USER, SimulatedSite, wait_until
from slurm_in_a_box.images import IMAGE, NOT_AN_IMAGE, OS_NAME
from support.background import SLEEPS, Background, rows_of, runs_there
from support.programs import REPORTS, make
from support.ranks import RENDEZVOUS
from support.ray_run import cause_of, nothing_is_left
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
    ranks = start(
        workloads / "r",
        RENDEZVOUS.replace("words = [word]", f'assert "{OS_NAME}" in open("/etc/os-release").read(); words = [word]'),
        SrunLauncher(container=Container(str(image))),
        {"nodes": 2, "ntasks_per_node": 2},
        extras={"name": "probe"},
    )
    outcome, of_command, of_ranks = (succeeded(run) for run in (script, command, ranks))
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


def test_a_job_in_a_container_fails_as_any_other_and_leaves_nothing(
    site: SimulatedSite, workloads: Path, image: Path
) -> None:
    """It is warned before its time limit, although the container's own process handles all signals."""
    container = Container(str(image))
    saves = PIPES + "    import signal, sys, time\n    signal.signal(signal.SIGUSR1, lambda *_: sys.exit('saved'))\n"
    saves += "    time.sleep(600)\n"
    runs = {
        "warned": start(
            workloads / "w", saves + "    time.sleep(600)\n", ScriptLauncher(container=container), {"time_limit": "1"}
        ),
        "late": start(workloads / "l", SLEEPS, ScriptLauncher(container=container), {"time_limit": "1"}),
        "python": start(workloads / "p", SLEEPS, ScriptLauncher(container=Container(str(image), python="python9")), {}),
        "option": start(
            workloads / "o", SLEEPS, ScriptLauncher(container=Container(str(image), options=["--no-such"])), {}
        ),
        "ranks": start(
            workloads / "r",
            SLEEPS,
            SrunLauncher(container=Container(str(image), python="python9")),
            {"ntasks_per_node": 2},
        ),
    }
    cancelled = start(workloads / "c", SLEEPS, ScriptLauncher(container=container), {"time_limit": "7"})
    wait_until(lambda: _running(site, "7:00"), "the job runs", 90)
    (job,) = _running(site, "7:00")
    begun = f"grep -l begun dagster-slurm/runs/*/stdout | xargs dirname | xargs -I@ readlink @/job | grep -x {job}"
    wait_until(lambda: site.run_on_login(CERTIFICATE_USER, begun, check=False).stdout, "it has begun", 60)
    site.cluster.query("scancel", job)
    causes = {name: cause_of(run.outcome(240).error) for name, run in runs.items()}
    assert "it was cancelled on the cluster" in cause_of(cancelled.outcome().error)
    assert "saved" in causes["warned"]
    assert "it reached its time limit (Slurm: TIMEOUT)" in causes["late"]
    no_python = f"The image {image} has no python9, and a Python of the image starts every workload."
    assert no_python in causes["python"]
    assert no_python in causes["ranks"]
    assert "The container did not start: apptainer ended before the workload. Its exit code is 1." in causes["option"]
    assert 'Error for command "exec": unknown flag: --no-such' in runs["option"].outcome().error
    nothing_is_left(site, *NODES)


def _running(site: SimulatedSite, limit: str) -> list[str]:
    return [job for job, *its in rows_of(site, "%i %T %l") if its == ["RUNNING", limit]]


def test_an_image_that_cannot_be_run_is_found_before_the_job(site: SimulatedSite, workloads: Path, image: Path) -> None:
    site.run_on_login(CERTIFICATE_USER, "install -m 000 /dev/null closed.sif")
    wrong = {
        "~/closed.sif": f"You may not read the container image {HOME}/closed.sif on login0",
        "$HOME/none.sif": f"There is no container image {HOME}/none.sif on login0",
        str(image.with_name(NOT_AN_IMAGE)): "is no container image: it is neither a SIF or squashfs file, nor a folder",
    }
    for path, text in wrong.items():
        outcome: Outcome = materialize(SLEEPS, workloads, launcher=ScriptLauncher(container=Container(path)))
        assert text in cause_of(outcome.error)
    assert runs_there(site) == []
