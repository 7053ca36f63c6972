"""Ray from the image of a container, on every node of a job."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from dagster_sbatch.launchers import Container, RayLauncher
from slurm_in_a_box import SimulatedSite
from slurm_in_a_box.images import IMAGE, OS_NAME
from support.ray_run import CONNECT, HANG, NO_DASHBOARD, RayRun, cause_of, nothing_is_left, place, share_out

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("on_supercomputer")]
LOOKS = HANG.replace(
    "    return socket.gethostname()",
    f"    return socket.gethostname() * ('{OS_NAME}' in pathlib.Path('/etc/os-release').read_text())",
)
"""A task that runs outside of the image has no host."""
Disturb = Callable[[SimulatedSite, RayRun, tuple[str, ...]], None]


def drop(site: SimulatedSite, run: RayRun, _: tuple[str, ...]) -> None:
    site.faults.drop_connections()
    run.go_on()


def cancel(site: SimulatedSite, run: RayRun, _: tuple[str, ...]) -> None:
    site.faults.cancel_job(run.job)


def kill_raylet(site: SimulatedSite, _: RayRun, nodes: tuple[str, ...]) -> None:
    site.run_on_node(nodes[-1], "kill -KILL $(pgrep -x raylet)")


CASES: dict[str, tuple[str, Disturb, str]] = {
    "works": (LOOKS, drop, ""),
    "cancelled": (HANG, cancel, "it was cancelled on the cluster"),
    "raylet": (HANG, kill_raylet, "Ray on {second}: raylet was killed by signal 9"),
}
"""By name: the workload, what happens when it runs, and the cause of its failure."""


def play(name: str, site: SimulatedSite, folder: Path, python: str, nodes: tuple[str, ...]) -> None:
    workload, disturb, cause = CASES[name]
    packages = str(Path(python).parents[1])
    image = Container(str(site.layout.images / IMAGE), binds=["~", packages], python=python)
    launcher = NO_DASHBOARD.model_copy(update={"container": image})
    libraries = {"LD_LIBRARY_PATH": f"{packages}/base/lib"}
    run = RayRun(site, folder, workload, name=name, launcher=launcher, env=libraries, **place(nodes))
    run.wait_until_ready()
    disturb(site, run, nodes)
    outcome = run.finish()
    if cause:
        assert cause.format(second=nodes[-1]) in cause_of(outcome.error)
    else:
        assert outcome.error == ""
        assert outcome.materializations[None][0]["hosts"] == list(nodes)
    nothing_is_left(site, *nodes)


def start_without(name: str, site: SimulatedSite, folder: Path, nodes: tuple[str, ...]) -> None:
    """With an image that has no Ray, or not that Python."""
    image = Container(str(site.layout.images / IMAGE), binds=["~"], python=name)
    outcome = RayRun(site, folder, CONNECT, name=name, launcher=RayLauncher(container=image), **place(nodes)).finish()
    causes = {
        "python3": f"/usr/bin/python3 in the image {site.layout.images / IMAGE} has no Ray. Install it in the image",
        "python9": f"The image {site.layout.images / IMAGE} has no python9, and a Python of the image starts every",
    }
    assert causes[name] in cause_of(outcome.error)
    nothing_is_left(site, *nodes)


def test_ray_of_the_image_works_fails_and_ends_as_any_other(
    site: SimulatedSite, tmp_path: Path, on_supercomputer: dict[str, str]
) -> None:
    """The site's users have Ray in an environment; here, the image has that."""
    python = on_supercomputer["SLURM_PYTHON"]
    cases = {name: partial(play, name, site, tmp_path, python) for name in CASES}
    share_out({**cases, **{name: partial(start_without, name, site, tmp_path) for name in ("python3", "python9")}})
