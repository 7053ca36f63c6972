"""The plan of an asset that runs a program, a batch script or ranks, and of an asset check."""

import re
from pathlib import Path

import dagster as dg
import pytest

from dagster_sbatch.errors import ConfigurationError
from dagster_sbatch.inspect.asset_preview import Preview, find_submitting, preview_asset
from dagster_sbatch.launchers import BatchScriptLauncher, CommandLauncher, Launcher, ScriptLauncher, SrunLauncher
from dagster_sbatch.run.compute import ComputeResource
from dagster_sbatch.slurm import SlurmRequest
from resources import PROJECT
from support.programs import make

SCRIPT = "#!/bin/bash\n#SBATCH -N 2 -n 8 --gres=gpu:4\n#SBATCH -t 2:00:00 --mem=1G\nsrun ./relax\n"


def preview(program: Path, launcher: Launcher, request: SlurmRequest | None = None) -> Preview:
    @dg.asset
    def probe(context: dg.AssetExecutionContext, compute: ComputeResource) -> dg.MaterializeResult:
        done = compute.run(context, workload=program, launcher=launcher, request=request, args=["a b"])
        return done.get_materialize_result()

    (found,) = preview_asset(dg.Definitions([probe], resources={"compute": ComputeResource.of(PROJECT)}), "probe")
    return found


def test_a_program_and_its_arguments(tmp_path: Path) -> None:
    found = preview(make(tmp_path, SCRIPT), CommandLauncher())
    assert found.summary["how"] == "model.sh with CommandLauncher"
    program = '\nrun_workload "$run_directory/program/run_program.py"'
    assert f"{program} '<SLURM_DEPLOYMENT_BASE_PATH>/environments/" in found.script
    assert "/workloads/model.sh' 'a b'\n" in found.script
    assert "#SBATCH --nodes=1\n" in found.script


def test_a_batch_script_is_shown_with_what_its_lines_request(tmp_path: Path) -> None:
    found = preview(make(tmp_path, SCRIPT), BatchScriptLauncher(), SlurmRequest(time_limit="5"))
    for line in ("--nodes=2", "--ntasks-per-node=4", "--gres=gpu:4", "--time=00:05:00", "--mem=1G"):
        assert f"#SBATCH {line}\n" in found.script
    assert found.summary["time limit"] == "00:05:00"
    assert found.plan.notes == (
        "model.sh, line 3: --time=2:00:00 does not apply. The asset requests time_limit='00:05:00'.",
    )


def test_the_ranks_of_srun(tmp_path: Path) -> None:
    request = SlurmRequest(nodes=2, ntasks_per_node=4, gpus_per_node=4, time_limit="5")
    found = preview(make(tmp_path, "print(1)\n", "train.py"), SrunLauncher(mpi="pmix"), request)
    assert found.summary["how"] == "train.py with SrunLauncher"
    assert found.summary["nodes"].startswith("2, 4 tasks per node")
    assert '/srun/ranks.py" job --nodes=2 --ntasks=8 --ntasks-per-node=4 --cpus-per-task=44 ' in found.script
    assert " --gres=gpu:4 --mpi=pmix --wait=600 '<SLURM_DEPLOYMENT_BASE_PATH>/" in found.script
    assert "/workloads/train.py' 'a b'\n" in found.script


def test_an_asset_check_that_submits_a_job(tmp_path: Path) -> None:
    """A check that the asset's own workload reports has no job of its own."""
    program = make(tmp_path, "print(1)\n", "no_gaps.py")

    @dg.asset(check_specs=[dg.AssetCheckSpec("complete", asset="counts")])
    def counts(context: dg.AssetExecutionContext, compute: ComputeResource) -> dg.MaterializeResult:
        return compute.run(context, workload=program, launcher=ScriptLauncher()).get_materialize_result()

    @dg.asset_check(asset=counts)
    def no_gaps(context: dg.AssetCheckExecutionContext, compute: ComputeResource) -> dg.AssetCheckResult:
        request = SlurmRequest(time_limit="00:07:00")
        done = compute.run(context, workload=program, launcher=ScriptLauncher(), request=request)
        return done.get_asset_check_result()

    resources = {"compute": ComputeResource.of(PROJECT)}
    defs = dg.Definitions(assets=[counts], asset_checks=[no_gaps], resources=resources)
    (found,) = preview_asset(defs, "counts:no_gaps")
    assert "#SBATCH --time=00:07:00\n" in found.script
    with dg.DagsterInstance.ephemeral() as instance:
        assert find_submitting(defs, instance) == [("counts", None), ("counts:no_gaps", None)]
    for asked, proposed in {
        "no_gaps": "did you mean 'counts:no_gaps'?",
        "complete": "valid are counts",
        "counts:complete": "valid are counts",
    }.items():
        with pytest.raises(ConfigurationError, match=re.escape(f"there is no such asset; {proposed}")):
            preview_asset(defs, asked)
