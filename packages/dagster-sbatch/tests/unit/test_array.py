"""Job arrays without any process: what an asset may write, the tasks of it, their contexts, their failures."""

import json
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from dagster_sbatch import ConfigurationError, JobArray, RayLauncher, ScriptLauncher, SlurmRequest
from dagster_sbatch.run import task_output
from dagster_sbatch.run.array import Task, make_tasks
from dagster_sbatch.run.pipes import TaskContexts
from dagster_sbatch.run.plan import Plan, make_plan
from dagster_sbatch.run.task_failures import FailedTask, TaskFailures
from dagster_sbatch.run.task_output import ArrayProgress
from dagster_sbatch.settings import Settings
from resources import PROJECT
from slurm_in_a_box import wait_until


def plan(array: Any, launcher: Any = None, partitions: tuple[str, ...] = ("a", "b"), **request: Any) -> Plan:
    settings = Settings.model_construct(supercomputer_site="musica")
    return make_plan(
        settings,
        PROJECT,
        Path(__file__),
        launcher or ScriptLauncher(),
        SlurmRequest(**request),
        extras={"partition_keys": list(partitions)} if partitions else {},
        array=array,
    )


# Bad input


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"partitions_per_task": 0}, "JobArray: partitions_per_task: Input should be greater than 0"),
        ({"max_running_tasks": 0}, "JobArray: max_running_tasks: Input should be greater than 0"),
        ({"task": {}}, "task: unknown field; did you mean 'tasks'?"),
        ({"tasks": {}}, "there is no parameter set"),
        ({"tasks": {"a": {}}, "partitions_per_task": 2}, "give tasks or partitions_per_task, not both"),
        ({"tasks": [("a", {}), ("b", {}), ("a", {})]}, "two parameter sets have the name 'a'"),
        ({"tasks": ["ab"]}, "list of pairs (name, parameter set)"),
        ({"tasks": {"a\nb": {}}}, "characters that cannot be printed"),
        ({"tasks": {"": {}}}, "is empty"),
        ({"tasks": {"a": {"x": {1}}}}, "tasks['a']['x'] cannot be sent to the workload as JSON"),
        ({"tasks": {"a": {"x": {1: "one", "two": 2}}}}, "tasks['a']['x'] cannot be sent to the workload as JSON"),
        ({"tasks": {"a": {"partition_keys": []}}}, "'partition_keys' holds the partitions of the run"),
    ],
)
def test_an_array_that_cannot_work(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        JobArray(**fields)
    assert text in str(error.value)


def test_each_partition_or_each_chunk_is_a_task() -> None:
    one, several = JobArray(), JobArray(partitions_per_task=2)
    assert [task.name for task in make_tasks(one, ["a", "b", "c"])] == ["a", "b", "c"]
    assert [(task.name, list(task.partitions)) for task in make_tasks(several, ["a", "b", "c"])] == [
        ("a..b", ["a", "b"]),
        ("c", ["c"]),
    ]


def test_no_two_tasks_have_the_same_name() -> None:
    """A task of several partitions is named after the first and the last; a partition may have the same name."""
    partitions = ["a", "b..c", "a..b", "c", "a..b..c (2)"]
    names = [task.name for task in make_tasks(JobArray(partitions_per_task=2), partitions)]
    assert names == ["a..b..c", "a..b..c (2)", "a..b..c (2) (2)"]


def test_what_decides_the_result_of_a_task_decides_its_id() -> None:
    sets = {"a": {"x": 1, "y": 2}, "b": {"x": 1}, "c": {"x": 1}}
    same = {"c": {"x": 1}, "b": {"x": 2}, "a": {"y": 2, "x": 1}}
    first, second = ({task.name: task.id for task in make_tasks(JobArray(tasks=each), [])} for each in (sets, same))
    assert len(set(first.values())) == 3
    assert {name for name in first if first[name] == second[name]} == {"a", "c"}


def test_a_hundred_thousand_tasks_are_refused_with_what_to_write() -> None:
    keys = tuple(str(number) for number in range(100_000))
    with pytest.raises(ConfigurationError, match=r"100000 tasks .* 10000 .* JobArray\(partitions_per_task=10\)"):
        plan(JobArray(), partitions=keys)
    assert len(plan(JobArray(partitions_per_task=10), partitions=keys).tasks) == 10_000
    with pytest.raises(ConfigurationError, match="Divide the parameter sets among several runs"):
        plan(JobArray(tasks={key: {} for key in keys}))


@pytest.mark.parametrize(
    ("array", "launcher", "request_", "text"),
    [
        ({"tasks": {}}, None, {}, "is not a JobArray. Write for instance array=JobArray()"),
        (JobArray(), RayLauncher(), {}, "RayLauncher does not work in a job array"),
        (
            JobArray(max_running_tasks=99),
            None,
            {"nodes": 2, "qos": "dev_zen4_0768", "time_limit": "10"},
            "max_running_tasks=99 with nodes=2 needs more than 2 nodes, the limit of QoS dev_zen4_0768 per user. "
            "Write JobArray(max_running_tasks=1).",
        ),
    ],
)
def test_a_call_that_cannot_work(array: Any, launcher: Any, request_: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        plan(array, launcher, **request_)
    assert text in str(error.value)


def test_an_asset_without_partitions_needs_parameter_sets() -> None:
    with pytest.raises(ConfigurationError, match="this asset has no partitions"):
        plan(JobArray(), partitions=())


@pytest.mark.parametrize("extras", [{}, {"n": 1}])
@pytest.mark.parametrize("values", [{}, {"n": 2}])
def test_the_context_of_a_parameter_set(extras: dict[str, int], values: dict[str, int]) -> None:
    document = {"run_id": "r", "extras": {**extras, "partition_keys": ["p"]}, "partition_key": "p"}
    tasks = [Task("a", values=values), Task("b")]
    contexts = TaskContexts(json.dumps(document), None, tasks)
    for task in tasks:
        text = contexts.head + contexts.tail(task)
        assert json.loads(text) == {**document, "extras": {**extras, **task.values, "partition_keys": ["p"]}}
        assert text.count('"n"') == len({**extras, **task.values})
        assert "\n" not in text


def test_the_context_of_a_partition() -> None:
    document = {"run_id": "r", "extras": {"n": 1, "partition_keys": ["a", "2013-01-01"]}, "partition_key": None}
    task = Task("2013-01-01", ["2013-01-01"])
    contexts = TaskContexts(json.dumps(document), dg.DailyPartitionsDefinition("2013-01-01"), [task])
    assert "partition_keys" not in contexts.head
    context = json.loads(contexts.head + contexts.tail(task))
    assert context["extras"] == {"n": 1, "partition_keys": ["2013-01-01"]}
    assert context["partition_time_window"]["end"] == "2013-01-02T00:00:00+00:00"


@pytest.mark.parametrize(
    ("partitions", "window"),
    [
        (["2013-01-02|m"], ("2013-01-02", "2013-01-03")),
        (["2013-01-01|m", "2013-01-02|m"], ("2013-01-01", "2013-01-03")),
        (["2013-01-02|m", "2013-01-01|n"], None),  # as Dagster orders them: the next value begins anew
        (["2013-01-01|m", "2013-01-02|n"], None),
        (["2013-01-01|m", "2013-01-01|n"], None),
        (["2013-01-01|m", "2013-01-03|m"], None),
    ],
)
def test_several_partitions_of_two_dimensions_have_a_time_window_if_it_is_one(
    partitions: list[str], window: tuple[str, str] | None
) -> None:
    days = dg.DailyPartitionsDefinition("2013-01-01")
    both = dg.MultiPartitionsDefinition({"day": days, "model": dg.StaticPartitionsDefinition(["m", "n"])})
    task = Task("a", partitions)
    contexts = TaskContexts(json.dumps({"run_id": "r", "extras": {}}), both, [task])
    found = json.loads(contexts.head + contexts.tail(task))["partition_time_window"]
    assert (found and (found["start"][:10], found["end"][:10])) == window


# Failures and progress


def failures(*causes: tuple[str, str]) -> TaskFailures:
    found = TaskFailures()
    for index, (name, cause) in enumerate(causes):
        found.add(FailedTask(index, Task(name, [name]), cause, "the last line", f"scripts/job 7_{index} logs"))
    return found


def test_causes_that_differ_in_names_and_numbers_only_are_one() -> None:
    found = failures(("may", "no file may-1"), ("june", "no file june-2"), ("july", "a node failed"))
    assert found.describe() == (
        "2 tasks (may, june): no file may-1\nLogs: scripts/job 7_0 logs\nLast lines of stderr of may:\nthe last line"
        "\n\n1 task (july): a node failed\nLogs: scripts/job 7_2 logs\nLast lines of stderr of july:\nthe last line"
    )
    rows = [record.data for record in found.metadata()["failed_tasks"].records]
    assert [row["cause"] for row in rows] == ["no file may-1", "no file june-2", "a node failed"]


def test_a_thousand_causes_are_not_all_described() -> None:
    found = failures(*[(f"p{number}", "x" * number) for number in range(1, 1001)])
    assert "990 tasks failed for 990 other causes." in found.describe()
    assert len(found.metadata()["failed_tasks"].records) == 200


def test_progress_is_logged_when_it_changes_and_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_output, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(task_output, "LONGEST_PAUSE", 0.01)
    lines: list[str] = []
    progress = ArrayProgress(3, 1, lines.append)
    with progress.shown():
        wait_until(lambda: len(lines) == 1, "the first line", 60)
        progress.started = {0, 1}
        wait_until(lambda: len(lines) == 2, "the second line", 60)
        progress.started, progress.failed = set(), 1
        progress.done = 2
    assert lines[0] == "3 tasks: 1 done, 0 running, 2 waiting, 0 failed"
    assert lines[-1] == "3 tasks: 2 done, 0 running, 0 waiting, 1 failed"


def test_tasks_that_have_recorded_their_end_are_not_shown_as_running() -> None:
    """With `max_running_tasks=2`, three tasks have ended, and Slurm has not confirmed it yet."""
    lines: list[str] = []
    progress = ArrayProgress(9, 0, lines.append)
    with progress.shown():
        progress.started, progress.running = {0, 1, 2, 3, 4}, 2
    assert lines == ["9 tasks: 0 done, 2 running, 4 waiting, 0 failed, 3 ended (Slurm has not confirmed it yet)"]
