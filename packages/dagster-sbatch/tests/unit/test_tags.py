"""The tags by which the UI finds a run."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dagster as dg
import pytest

from dagster_sbatch.launchers import ScriptLauncher
from dagster_sbatch.run.compute import ComputeResource
from dagster_sbatch.run.tags import job_tag, retried_elsewhere, tag_deployment, tag_job
from resources import build_resources
from support.array_asset import ArrayAsset

WORKLOAD = "from dagster_pipes import open_dagster_pipes\nwith open_dagster_pipes(): pass\n"


def test_a_run_has_its_deployment_and_jobs(tmp_path: Path) -> None:
    (tmp_path / "nothing.py").write_text(WORKLOAD)

    @dg.asset(key_prefix="a-group")
    def probe(context: dg.AssetExecutionContext, compute: ComputeResource) -> dg.MaterializeResult:
        done = compute.run(context, workload=tmp_path / "nothing.py", launcher=ScriptLauncher())
        for number, job in enumerate(("101", "102")):  # as on a supercomputer, for two calls
            tag_job(context.op_execution_context, job, number)
        return done.get_materialize_result()

    with dg.DagsterInstance.ephemeral() as instance:
        result = dg.materialize([probe], resources=build_resources(), instance=instance)
        for tags in (
            {"deployment": "development"},
            {"slurm_job/a_group__probe": "101"},
            {"slurm_job/a_group__probe.2": "102"},
        ):
            (run,) = instance.get_runs(dg.RunsFilter(tags=tags))
            assert run.run_id == result.run_id


class Retried(ArrayAsset):
    """An asset that is retried as by Dagster itself if `by_dagster` is set: the former run then names the new one."""

    by_dagster = False

    def definitions(self) -> dg.Definitions:
        @dg.asset
        def probe(context: dg.AssetExecutionContext, compute: ComputeResource) -> dg.MaterializeResult:
            if self.by_dagster:
                context.instance.add_run_tags(context.run.parent_run_id, {"dagster/auto_retry_run_id": context.run_id})
            workload = self._folder / "workloads" / "workload.py"
            return compute.run(context, workload=workload, launcher=ScriptLauncher()).get_materialize_result()

        job = dg.define_asset_job("all", selection="probe", executor_def=dg.in_process_executor)
        return dg.Definitions(assets=[probe], jobs=[job], resources=build_resources())


@pytest.mark.parametrize(
    "tags",
    [
        {"deployment": "production_supercomputer", "site": "musica"},
        {"deployment": "development", "data_root": "/elsewhere"},
    ],
    ids=["deployment", "DATA_ROOT"],
)
def test_dagster_itself_retries_no_run_in_another_place(tmp_path: Path, tags: dict[str, str]) -> None:
    """It does when it is started with other settings: the data and the job of the interrupted run are not there."""
    asset = Retried(tmp_path, "pass", None, partitions=None)
    first = asset.run().run_id
    asset.by_dagster = True
    assert asset.run(of=first, from_failure=True).success
    with dg.DagsterInstance.from_config(str(tmp_path / "dagster")) as instance:
        instance.add_run_tags(first, tags)
    retry = asset.run(of=first, from_failure=True)
    assert f"one that was interrupted on {tags['deployment']}" in retry.error
    assert not retry.success
    asset.by_dagster = False
    again = asset.run(of=retry.run_id, from_failure=True, **tags)
    assert again.success, "a person has re-executed it; Dagster copies the tags"
    asset.by_dagster = True
    assert asset.run(of=again.run_id, from_failure=True, **tags).success, "it was interrupted here"


@pytest.mark.parametrize("by_person", [True, False])
def test_a_run_that_came_to_no_step_has_only_inherited_tags(instance: dg.DagsterInstance, by_person: bool) -> None:
    """Its process dies at once, and Dagster retries it; whether that is elsewhere depends on who requested it."""
    tags = {"deployment": "production_supercomputer", "site": "musica", "data_root": "/d"}
    runs: list[dg.DagsterRun] = []
    for _ in ("interrupted", "dies at once", "retry"):
        former: Any = {"parent_run_id": runs[-1].run_id, "root_run_id": runs[0].run_id} if runs else {}
        run = dg.DagsterRun(job_name="job", tags=tags, **former)
        instance.add_run(run)
        if runs and not (by_person and len(runs) == 1):
            instance.add_run_tags(runs[-1].run_id, {"dagster/auto_retry_run_id": run.run_id})
        runs.append(run)
    start = dg.DagsterEvent(dg.DagsterEventType.STEP_START.value, "job", step_key="probe")
    instance.report_dagster_event(start, runs[0].run_id)
    step: Any = SimpleNamespace(instance=instance, run=runs[-1], run_id=runs[-1].run_id)
    found = retried_elsewhere(step, None, "/here")
    assert found == ("" if by_person else "production_supercomputer with DATA_ROOT=/d")


@pytest.mark.parametrize(
    ("tags", "place"),
    [
        ({}, None),
        ({"deployment": "production_supercomputer", "site": "musica", "data_root": "/d"}, "/d"),
        ({"data_root": "/elsewhere"}, "/elsewhere"),
    ],
    ids=["here", "deployment", "DATA_ROOT"],
)
def test_data_of_another_place_are_mentioned(tmp_path: Path, tags: dict[str, str], place: str | None) -> None:
    """Dagster shows one state of an asset, and From failure skips what has succeeded in another place."""
    (tmp_path / "nothing.py").write_text(WORKLOAD)

    def make(name: str, *deps: str) -> dg.AssetsDefinition:
        @dg.asset(name=name, deps=deps)
        def asset(context: dg.AssetExecutionContext, compute: ComputeResource) -> dg.MaterializeResult:
            done = compute.run(context, workload=tmp_path / "nothing.py", launcher=ScriptLauncher())
            return done.get_materialize_result()

        return asset

    assets, resources = [make("early"), make("late", "early")], build_resources()
    with dg.DagsterInstance.ephemeral() as instance:
        first = dg.materialize(assets, resources=resources, instance=instance)
        instance.add_run_tags(first.run_id, tags)
        later = dg.materialize(assets, resources=resources, instance=instance, selection="late")
        found = [
            [log.user_message for log in instance.all_logs(run.run_id) if "early was last" in log.user_message]
            for run in (first, later)
        ]
    named = [f"DATA_ROOT={place}. " in text for text in found[1]]
    assert (found[0], named) == ([], [True] if place else [])


def test_steps_with_long_names_have_tags_of_their_own() -> None:
    """By them, the hours of a job count for its asset, and a re-execution finds its job."""
    names = [f"{first}_{'long' * 20}_{last}" for first in "ab" for last in "ab"]

    def make(name: str) -> dg.AssetsDefinition:
        @dg.asset(name=name)
        def asset(context: dg.AssetExecutionContext) -> None:
            for call in (0, 9):
                tag_job(context.op_execution_context, f"{name} {call}", call)

        return asset

    with dg.DagsterInstance.ephemeral() as instance:
        (run,) = instance.get_runs(dg.RunsFilter([dg.materialize([*map(make, names)], instance=instance).run_id]))
    found = [run.tags.get(f"{job_tag(name)}{call}") for name in names for call in ("", ".10")]
    assert found == [f"{name} {call}" for name in names for call in (0, 9)]


def test_calls_in_threads_lose_no_tag_of_each_other(tmp_path: Path) -> None:
    @dg.asset
    def probe(context: dg.AssetExecutionContext) -> None:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda call: tag_job(context.op_execution_context, str(100 + call), call), range(20)))

    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance:
        result = dg.materialize([probe], instance=instance)
        run = instance.get_run_by_id(result.run_id)
    assert run
    assert {tag for tag in run.tags if tag.startswith("slurm_job/")} == {
        "slurm_job/probe",
        *(f"slurm_job/probe.{call + 1}" for call in range(1, 20)),
    }


ADDS = """\
import sys
import dagster as dg
from dagster_sbatch.run.tags import add_tags
folder, run, step = sys.argv[1:]
with dg.DagsterInstance.local_temp(folder) as instance:
    print("ready", flush=True)
    sys.stdin.readline()
    for call in range(20):
        add_tags(instance, run, {f"{step}/{call}": "1"})
"""


def test_steps_in_parallel_lose_no_tag_of_each_other(tmp_path: Path) -> None:
    """Each step is a process of its own."""

    @dg.job
    def empty() -> None:
        pass

    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance:
        run = instance.create_run_for_job(dg.Definitions(jobs=[empty]).resolve_job_def("empty")).run_id
        steps = [
            subprocess.Popen(
                [sys.executable, "-c", ADDS, str(tmp_path), run, name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for name in ("one", "other")
        ]
        for step in steps:
            assert step.stdout
            assert step.stdout.readline() == "ready\n"
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda step: step.communicate("go\n", timeout=60), steps))
        found = instance.get_run_by_id(run)
    assert found
    assert {f"{name}/{call}" for name in ("one", "other") for call in range(20)} <= set(found.tags)


def test_an_asset_that_is_called_directly_has_no_run() -> None:
    with dg.build_asset_context() as context:
        tag_deployment(context.op_execution_context, "development", None, "data")
        assert context.instance.get_runs() == []


def test_a_database_that_takes_no_tag_does_not_end_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("No space left on device")

    with dg.build_asset_context() as context:
        monkeypatch.setattr(context.instance, "has_run", fail)
        tag_deployment(context.op_execution_context, "development", None, "data")
