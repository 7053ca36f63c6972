"""Listings of the documentation that need a supercomputer, as they stand there."""

import os
import re
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from dagster_sbatch.errors import ConfigurationError
from dagster_sbatch.run.compute import ComputeResource
from dagster_sbatch.slurm import SlurmRequest
from resources import build_resources
from support import ROOT

WORKLOAD = """\
import os, pathlib, time
from dagster_pipes import open_dagster_pipes
folder = pathlib.Path(os.environ["DATA_ROOT"])
folder.mkdir(parents=True, exist_ok=True)
(folder / os.uname().nodename).touch()
if os.environ["SLURM_PROCID"] == "0":
    with open_dagster_pipes() as pipes:
        while len(names := sorted(path.name for path in folder.iterdir())) < COUNT:
            time.sleep(0.1)
        pipes.report_asset_materialization(metadata={"nodes": names})
"""


@pytest.fixture
def each_node() -> Any:
    """The launcher that docs/writing-a-launcher.md shows."""
    (listing,) = re.findall(
        r"```python\n(.*?)```",
        (ROOT / "packages" / "dagster-sbatch" / "docs" / "writing-a-launcher.md").read_text(),
        re.DOTALL,
    )
    names: dict[str, Any] = {"__name__": "page"}
    exec(compile(listing, "writing-a-launcher.md", "exec"), names)
    return names["EachNodeLauncher"]


def test_the_launcher_refuses_what_it_cannot_do(each_node: Any) -> None:
    with pytest.raises(ConfigurationError, match="did you mean 'label'"):
        each_node(lable=True)
    with pytest.raises(ConfigurationError, match="EachNodeLauncher starts one process per node"):
        each_node().check(SlurmRequest(ntasks_per_node=2))
    assert "--label" in each_node().with_site({"each_node": {"label": True}}).render(SlurmRequest(), ["w.py"])


def run_on(count: int, folder: Path, launcher: Any) -> set[str]:
    """Run the workload on so many nodes; their names, as it reports them."""
    program = folder / "each.py"
    program.write_text(WORKLOAD.replace("COUNT", str(count)))

    @dg.asset
    def probe(context: dg.AssetExecutionContext, compute: ComputeResource) -> dg.MaterializeResult:
        request = SlurmRequest(nodes=count, mem="100M", time_limit="5")
        done = compute.run(context, workload=program, launcher=launcher, request=request)
        return done.get_materialize_result()

    result = dg.materialize([probe], resources=build_resources())
    (event,) = result.asset_materializations_for_node("probe")
    nodes = event.metadata["nodes"].value
    assert isinstance(nodes, list)
    return set(nodes)


@pytest.mark.cluster
@pytest.mark.usefixtures("on_supercomputer")
def test_the_launcher_runs_on_every_node(each_node: Any, workloads: Path) -> None:
    assert len(run_on(2, workloads, each_node(label=True))) == 2


@pytest.mark.local
def test_the_launcher_runs_in_development(each_node: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA_ROOT", str(tmp_path / "data"))
    assert run_on(1, tmp_path, each_node()) == {os.uname().nodename}
