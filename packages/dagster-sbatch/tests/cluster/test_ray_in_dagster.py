"""A Ray job that is followed, and terminated, in the UI of a real `dagster dev`."""

from pathlib import Path

import pytest

from slurm_in_a_box import CERTIFICATE_USER, SimulatedSite, wait_until
from support.background import nobody_left
from support.dagster_dev import beside_location
from support.ray_run import HANG, NODES, PLACE, nothing_is_left

pytestmark = pytest.mark.cluster

LOCATION = f"""\
from pathlib import Path
import dagster as dg
from resources import build_resources
from dagster_sbatch.run.compute import ComputeResource
from dagster_sbatch.launchers import RayLauncher
from dagster_sbatch.slurm import SlurmRequest

@dg.asset
def hangs(context: dg.AssetExecutionContext, compute: ComputeResource) -> dg.MaterializeResult:
    return compute.run(
        context,
        workload=Path(__file__).parent / "workloads" / "hangs.py",
        launcher=RayLauncher(ray_start_args=["--include-dashboard=false"]),
        request=SlurmRequest(cpus_per_task=2, mem="3G", time_limit="00:10:00", **{PLACE}),
        extras={{"name": "ready"}},
    ).get_materialize_result()

defs = dg.Definitions(assets=[hangs], resources=build_resources())
"""


def test_followed_and_terminated_in_the_ui(
    on_supercomputer: dict[str, str], site: SimulatedSite, tmp_path: Path
) -> None:
    (tmp_path / "workloads").mkdir()
    (tmp_path / "workloads" / "hangs.py").write_text(HANG)
    (tmp_path / "location.py").write_text(LOCATION)
    variables = {**on_supercomputer, "DATA_ROOT": f"{CERTIFICATE_USER.home}/data"}
    with beside_location(tmp_path / "location.py", tmp_path / "project", variables) as server:
        run = server.launch("hangs", location="probe")
        ready = site.layout.home / CERTIFICATE_USER.name / "ready"
        wait_until(ready.exists, "the workload runs", 180)
        progress = "Ray: 2 node(s), 0 of 4 CPUs in use, 0 task(s) waiting"
        wait_until(lambda: progress in server.messages(run), "progress of the cluster in the run's events", 120)
        server.terminate(run)
        assert server.wait(run, 90) == "CANCELED"
    assert site.job_state(int(ready.read_text())) == "CANCELLED"
    nothing_is_left(site, *NODES)
    nobody_left(site)
