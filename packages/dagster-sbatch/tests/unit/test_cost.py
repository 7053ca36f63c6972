"""The highest possible cost of a call, and its limit per run."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from dagster_sbatch.commands import preview as preview_command
from dagster_sbatch.costs.cost import Cost, explain_excess, highest_cost, show_hours
from dagster_sbatch.errors import ConfigurationError
from dagster_sbatch.inspect.asset_preview import preview_asset
from dagster_sbatch.inspect.dry_run import try_script
from dagster_sbatch.launchers import ScriptLauncher
from dagster_sbatch.run.array import JobArray
from dagster_sbatch.run.compute import ComputeResource
from dagster_sbatch.settings import Settings
from dagster_sbatch.slurm import SlurmRequest, allocate
from dagster_sbatch.slurm.gateway import Projects
from dagster_sbatch.slurm.job_script import directives
from resources import PROJECT

SITE = PROJECT.load_site("musica")
GPU = "zen4_0768_h100x4"


@pytest.mark.parametrize(
    ("fields", "tasks", "cost"),
    [
        ({"nodes": 2, "gpus_per_node": 4, "time_limit": "02:00:00"}, 1, Cost(4, 16)),
        ({"time_limit": "20"}, 3, Cost(1, 0)),
        ({"gpus_per_node": 1, "time_limit": timedelta(seconds=61)}, 30, Cost(1, 1)),  # Slurm counts whole minutes
        ({"gpus_per_node": 1, "exclusive": True}, 1, Cost(1, 4)),  # Slurm allocates all GPUs of the node
        ({"partition": GPU, "exclusive": True}, 2, Cost(2, 8)),
        ({"exclusive": True}, 1, Cost(1, 0)),
    ],
)
def test_the_highest_cost_is_that_of_all_tasks_to_their_time_limit(
    fields: dict[str, Any], tasks: int, cost: Cost
) -> None:
    assert highest_cost(allocate(SlurmRequest(**fields), SITE), tasks) == cost


@pytest.mark.parametrize(
    ("hours", "beside", "text"),
    [
        (16, [10], "16 GPU-hours"),
        (1.0000000001, [], "1 GPU-hour"),
        (1 / 60, [], "0.02 GPU-hours"),
        (1 / 3600, [], "0.0003 GPU-hours"),  # not 0
        (4 + 1 / 60, [4], "4.02 GPU-hours"),
        (4.001, [4, 4.001], "4.001 GPU-hours"),
        (4, [4.001], "4 GPU-hours"),
        (0.25, [0.251], "0.250 GPU-hours"),
        (-0.0000001, [], "0 GPU-hours"),
        (None, [4], "? GPU-hours"),
    ],
)
def test_hours_have_the_digits_that_tell_them_from_what_they_are_compared_with(
    hours: float | None, beside: list[float | None], text: str
) -> None:
    assert show_hours(hours, "GPU-hours", beside=beside) == text


def excess(tasks: int = 1, settings: dict[str, float] | None = None, **limits: Any) -> str | None:
    allocation = allocate(SlurmRequest(nodes=2, gpus_per_node=4, time_limit="02:00:00", **limits), SITE)
    return explain_excess(allocation, tasks, Settings.model_validate(settings or {}))


def test_a_refusal_has_the_numbers_the_setting_and_what_to_change() -> None:
    assert excess(settings={"SLURM_MOST_GPU_HOURS_PER_RUN": 10}) == (
        "This call of compute.run could cost 16 GPU-hours (2 nodes x 4 GPUs x 02:00:00). "
        "SLURM_MOST_GPU_HOURS_PER_RUN allows 10, so nothing is submitted. Request a shorter time_limit or fewer GPUs "
        "or nodes; or allow this asset more: SlurmRequest(most_gpu_hours=16, ...)"
    )
    assert excess(3, {"SLURM_MOST_NODE_HOURS_PER_RUN": 11.999}) == (
        "This call of compute.run could cost 12 node-hours (3 tasks x 2 nodes x 02:00:00). "
        "SLURM_MOST_NODE_HOURS_PER_RUN allows 11.999, so nothing is submitted. Request a shorter time_limit or fewer "
        "nodes, or divide the tasks; or allow this asset more: SlurmRequest(most_node_hours=12, ...)"
    )
    assert "most_gpu_hours of the request allows 1," in str(excess(most_gpu_hours=1))


@pytest.mark.parametrize(
    ("settings", "own", "refused"),
    [
        ({}, {}, False),
        ({"SLURM_MOST_GPU_HOURS_PER_RUN": 16, "SLURM_MOST_NODE_HOURS_PER_RUN": 4}, {}, False),
        ({"SLURM_MOST_GPU_HOURS_PER_RUN": 0}, {}, True),
        ({"SLURM_MOST_GPU_HOURS_PER_RUN": 0}, {"most_gpu_hours": 16}, False),
        ({"SLURM_MOST_GPU_HOURS_PER_RUN": 0}, {"most_node_hours": 16}, True),
        ({"SLURM_MOST_GPU_HOURS_PER_RUN": 100}, {"most_gpu_hours": 15}, True),
        ({}, {"most_node_hours": 0}, True),
    ],
)
def test_the_limit_of_the_request_replaces_the_setting(
    settings: dict[str, float], own: dict[str, Any], refused: bool
) -> None:
    assert (excess(settings=settings, **own) is not None) is refused


@pytest.mark.parametrize("value", ["nan", "inf", "-1", "many"])
def test_what_is_no_limit_is_an_error(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A comparison with nan is never true: it would refuse nothing."""
    for field in ("most_gpu_hours", "most_node_hours"):
        with pytest.raises(ConfigurationError, match=field):
            SlurmRequest(**{field: value})
        variable = f"SLURM_{field.upper()}_PER_RUN"
        monkeypatch.setenv(variable, value)
        with pytest.raises(ConfigurationError, match=variable):
            PROJECT.load_settings()
        monkeypatch.delenv(variable)


def test_the_limits_are_no_options_of_sbatch() -> None:
    plain, limited = (
        directives(allocate(SlurmRequest(**limits), SITE).request, SITE, "key-1", {})
        for limits in ({}, {"most_gpu_hours": 3, "most_node_hours": 2})
    )
    assert plain == limited


@dg.asset
def sweep(context: dg.AssetExecutionContext, compute: ComputeResource) -> dg.MaterializeResult:
    request = SlurmRequest(gpus_per_node=1, time_limit="01:00:00")
    array = JobArray(tasks={f"rate={number}": {} for number in range(5)})
    done = compute.run(context, workload=Path(__file__), launcher=ScriptLauncher(), request=request, array=array)
    return done.get_materialize_result()


def test_the_preview_shows_the_refusal_and_asks_slurm_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # the command changes both
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    definitions = dg.Definitions([sweep], resources={"compute": ComputeResource.of(PROJECT)})
    monkeypatch.setattr("sys.argv", ["preview", "sweep"])
    monkeypatch.setenv("SLURM_MOST_GPU_HOURS_PER_RUN", "4")
    assert preview_command.main(PROJECT, definitions) == 1
    out, err = capsys.readouterr()
    script, summary = out.index("#SBATCH --array=0-4"), out.index("5 GPU-hours for all 5 tasks")
    assert script < summary, "a terminal shows the last lines"
    assert err.startswith("sweep: This call of compute.run could cost 5 GPU-hours (5 tasks x 1 node x 1 GPU x ")
    (shown,) = preview_asset(definitions, "sweep")
    no_gateway: Any = None
    assert try_script(no_gateway, shown, Projects({}, default="p1")) == (False, shown.refusal)
