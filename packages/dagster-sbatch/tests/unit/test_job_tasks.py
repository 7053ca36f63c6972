"""What scripts/job prints of the tasks of an array job, however many there are."""

from argparse import Namespace
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest

from dagster_sbatch.commands.job import act_on_task
from dagster_sbatch.commands.job_tasks import MOST_LOGS, MOST_ROWS, find_task, show_array, show_array_logs, split_task
from dagster_sbatch.errors import ConfigurationError
from dagster_sbatch.inspect.remote_runs import RunRecord
from dagster_sbatch.run.directory import RunInfo
from dagster_sbatch.slurm.gateway import Attempt, JobEnd

DONE, FAILED = JobEnd(0, "COMPLETED", "0:0"), JobEnd(7, "FAILED", "7:0", cause="no input")


class ManyRuns:
    """As much of `Runs` as is used: one array job."""

    def __init__(self, tasks: int, ends: dict[int, JobEnd], started: int, **indices: Any):
        record = {"tasks": [{"name": f"day-{index}", "partitions": []} for index in range(tasks)]}
        over, begun = len(ends) == tasks, frozenset(range(started))
        job = Attempt("/runs/a-1", 1, "17", over, (), ends, started=begun, record=record, **indices)
        self.gateway = SimpleNamespace(attempt=lambda _: job, ask=self.ask)
        self.asked: list[list[int]] = []

    def ask(self, *, tasks: list[int], **_: object) -> dict[str, Any]:
        self.asked.append(tasks)
        return {"records": {str(index): {"node": "n1", "time": 1.0, "stderr": f"line {index}\n"} for index in tasks}}


def run(*, array: bool = True) -> RunRecord:
    about = RunInfo(run="r", root="r", asset="a", partitions="")
    return RunRecord("/runs/a-1", "17", about, None, datetime.now(UTC), (), array)


def shown(runs: Any, capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    show_array(runs, run())
    return [line.split() for line in capsys.readouterr().out.splitlines()]


def test_of_a_long_array_the_failed_tasks_come_first_and_the_others_are_counted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    ends = {index: FAILED if index in (3, 500) else DONE for index in range(900)}
    runs = ManyRuns(1000, ends, started=905)
    lines = shown(runs, capsys)
    assert [line[0] for line in lines[1:8]] == ["17_3", "17_500", *(f"17_{index}" for index in range(900, 905))]
    assert lines[1][1:5] == ["day-3", "FAILED", "7:0", "n1"]
    assert ["17_3:", "no", "input"] in lines
    assert "1000 tasks: 898 done, 5 running, 95 waiting, 2 failed".split() in lines
    assert runs.asked == [[3, 500, *range(900, 905)]]  # nothing was read of the others


def test_a_table_has_an_end(capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(ManyRuns(1000, dict.fromkeys(range(1000), FAILED), started=1000), capsys)
    assert len([line for line in lines if line[1:2] and line[1].startswith("day-")]) == MOST_ROWS
    assert "1000 tasks: 1000 failed".split() in lines


def test_a_task_whose_result_was_rejected_has_failed(capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(ManyRuns(2, {0: DONE, 1: DONE}, started=2, rejected=frozenset({1})), capsys)
    assert lines[2][:6] == ["17_1", "day-1", "COMPLETED,", "result", "rejected", "0:0"]
    assert "2 tasks: 1 done, 1 failed".split() in lines


def test_a_task_that_was_preempted_waits(capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(ManyRuns(3, {0: DONE}, started=2, requeued=frozenset({1})), capsys)
    assert lines[2][:3] == ["17_1", "day-1", "PENDING"]
    assert "3 tasks: 1 done, 2 waiting".split() in lines


def test_the_logs_of_an_array_are_the_last_lines_of_failed_tasks(capsys: pytest.CaptureFixture[str]) -> None:
    runs: Any = ManyRuns(10, dict.fromkeys(range(1, 9), FAILED), started=9)
    show_array_logs(runs, run(), follow=False)
    said = capsys.readouterr().out
    assert "== task 17_1 (day-1): FAILED 7:0; the end of its stderr:\nline 1\n" in said
    assert f"== {8 - MOST_LOGS} more tasks failed; to list them:\n  scripts/job 17\n" in said
    assert said.endswith("To see all output of one task:\n  scripts/job 17_1 logs\n")


def test_the_logs_of_an_array_without_failed_tasks_say_how_to_name_one(capsys: pytest.CaptureFixture[str]) -> None:
    runs: Any = ManyRuns(10, {}, started=1)
    show_array_logs(runs, run(), follow=False)
    assert capsys.readouterr().out == (
        "Job 17 is an array job, and none of its tasks has failed.\n"
        "To see all output of one task:\n  scripts/job 17_0 logs\n"
    )
    with pytest.raises(ConfigurationError, match="scripts/job 17_0 logs --follow"):
        show_array_logs(runs, run(), follow=True)


def test_a_task_that_does_not_exist_says_which_do() -> None:
    runs: Any = ManyRuns(10, {}, started=1)
    with pytest.raises(ConfigurationError, match=r"has no task 10\. The highest index of its tasks is 9"):
        find_task(runs, run(), 10)
    with pytest.raises(ConfigurationError, match=r"not an array job, so it has no tasks\. .*:\n  scripts/job 17$"):
        find_task(runs, run(array=False), 0)
    with pytest.raises(ConfigurationError, match=r"17_9 \(day-9\) has no output, because it has not started"):
        act_on_task(Namespace(action="logs", follow=False), runs, *find_task(runs, run(), 9))


def test_names_of_tasks_are_slurms() -> None:
    assert split_task("1184_17") == ("1184", 17)
    for name in ("1184", "a-1", "step_1-0a1b2c-1", "1184_", "1184_x"):
        assert split_task(name) == (name, None)
