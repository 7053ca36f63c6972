"""Which tasks of an array become which array job, and which are adopted: pure."""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import dagster as dg
import pytest

from dagster_sbatch.errors import ConfigurationError
from dagster_sbatch.run import family as family_module
from dagster_sbatch.run.adoption import choose
from dagster_sbatch.run.array import Batches, Task
from dagster_sbatch.run.calls import StepCalls
from dagster_sbatch.run.family import Family
from dagster_sbatch.slurm import Retries, SlurmRequest
from dagster_sbatch.slurm.gateway import Attempt, Claim, JobEnd, Limits, OtherRun, Questions, RefusedError

NO_LIMITS = Limits(None, None)


def divide(number: int, limits: Limits, max_running: int | None = None, active: int = 0) -> list[tuple[int, int]]:
    """Size and share of the array jobs that can be submitted while another one, with `active` tasks, is not over."""
    batches = Batches(range(number), limits, max_running)
    shares, found = [active] if active else [], list[tuple[int, int]]()
    while True:
        taken, share = batches.take(shares, active + sum(size for size, _ in found))
        if not taken:
            return found
        found.append((len(taken), share or 0))
        shares.append(share or 0)


def sizes(number: int, limits: Limits) -> list[int]:
    return [size for size, _ in divide(number, limits)]


@pytest.mark.parametrize(
    ("number", "limits", "expected"),
    [
        (3, NO_LIMITS, [3]),
        (2500, NO_LIMITS, [1000, 1000, 500]),
        (2500, Limits(2000, None), [2000, 500]),
        (50, Limits(1000, 100), [50]),
        (60, Limits(1000, 100), [25, 25, 10]),
        (30, Limits(10, 100), [10, 10, 10]),
        (3, Limits(1000, 2), [1, 1, 1]),
    ],
)
def test_a_long_range_becomes_several_array_jobs(number: int, limits: Limits, expected: list[int]) -> None:
    assert sizes(number, limits) == expected


@pytest.mark.parametrize(
    ("number", "limits", "most", "active", "expected"),
    [
        (100, NO_LIMITS, 10, 0, [(100, 10)]),
        (2500, NO_LIMITS, 30, 0, [(1000, 10), (1000, 10), (500, 10)]),
        (2500, NO_LIMITS, 7, 0, [(1000, 3), (1000, 2), (500, 2)]),
        (2500, NO_LIMITS, 2, 0, [(1000, 1), (1000, 1)]),
        (1000, Limits(1000, 100), 40, 0, [(25, 10)] * 4),
        (2000, Limits(1001, None), 50, 50, []),
        (2000, Limits(1001, None), 50, 20, [(1001, 15), (999, 15)]),
    ],
)
def test_no_more_tasks_run_at_once_than_the_asset_allows(
    number: int, limits: Limits, most: int, active: int, expected: list[tuple[int, int]]
) -> None:
    """All array jobs together, also one that an earlier run has submitted."""
    assert divide(number, limits, most, active) == expected


def test_a_limit_above_the_site_s_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"Write JobArray\(max_running_tasks=100\)"):
        Batches(range(5), Limits(1000, 100), 101)


def test_a_task_that_has_to_run_again_is_submitted_with_the_next_array_job() -> None:
    batches = Batches(range(2), NO_LIMITS, None)
    assert batches.take([], 0) == ([0, 1], None)
    batches.left.append(1)
    assert (batches.take([], 2), batches.take([], 2)) == (([1], None), ([], None))


def test_tasks_that_have_to_run_again_wait_only_for_as_many_others_as_there_are_of_them() -> None:
    """A larger number waits for the end of an array job: Slurm would not let more of them run once there is room."""
    batches = Batches([7], Limits(1001, None), 5)
    assert batches.take([], 0) == ([7], 1)
    for index in range(300):
        batches.left.append(index)
    assert batches.take([5], 2, running=2) == ([], None)
    assert batches.take([1], 1) == (list(range(300)), 4)
    batches.left += [7, 8]
    assert [batches.take([5], left, running=left) for left in (4, 3)] == [([], None), ([7, 8], 2)]


WELL, BADLY = JobEnd(0, "COMPLETED"), JobEnd(1, "FAILED")


def array(
    number: int, tasks: str, ends: Mapping[int, JobEnd], *, job: str | None = "7", rejected: int | None = None
) -> Attempt:
    over = len(ends) == len(tasks)
    refused = frozenset() if rejected is None else frozenset([rejected])
    return Attempt(f"runs/f-{number}", number, job, over, list(tasks), ends, rejected=refused)


def test_each_task_is_adopted_from_the_latest_array_job_with_it() -> None:
    first = array(1, "abcde", {0: WELL, 1: BADLY, 2: WELL, 3: WELL}, rejected=2)
    second = array(2, "b", {})
    choice = choose(
        [first, second],
        dict(zip([10, 11, 12, 13, 14, 15], "abcdex", strict=True)),
        lambda _, index: index == 13,
        Retries(),
    )
    assert choice.follow == {"runs/f-1": {0: 10, 4: 14}, "runs/f-2": {0: 11}}
    assert (list(choice.new), choice.ended) == ([12, 13, 15], 1)


def test_a_failed_task_that_may_be_repeated_is_followed_unless_a_step_has_judged_it() -> None:
    ran_out = JobEnd(None, "OUT_OF_MEMORY")
    arrays, ids = [array(1, "ab", {0: ran_out, 1: ran_out}, rejected=1)], {0: "a", 1: "b"}
    choice = choose(arrays, ids, lambda *_: False, Retries(max_mem="1G"))
    assert (choice.follow, list(choice.new), choice.ended) == ({"runs/f-1": {0: 0}}, [1], 1)
    assert list(choose(arrays, ids, lambda *_: False, Retries()).new) == [0, 1]


def test_the_tasks_of_an_array_job_have_one_request() -> None:
    batches = Batches(range(2), NO_LIMITS, None)
    for index in (0, 5, 6, 7):
        batches.left.append(index)
    requests = {5: "more", 7: "more"}
    sizes = [batches.take([], 0, requests.get)[0] for _ in range(3)]
    assert sizes == [[0, 1, 0, 6], [5, 7], []]


def test_tasks_with_other_values_are_outdated_until_they_are_over() -> None:
    """Task b has another value now (B), c and d are not in the array any more."""
    first, second = array(1, "abc", {2: WELL}), array(2, "d", {})
    over = array(3, "bd", {0: WELL, 1: BADLY})
    choice = choose([first, second, over], {0: "a", 1: "B"}, lambda *_: False, Retries())
    assert (choice.follow, list(choice.new)) == ({"runs/f-1": {0: 0}}, [1])
    assert choice.outdated == {"runs/f-1": [1], "runs/f-2": [0]}


TASK = Task("x", values={"n": 1})


@pytest.mark.parametrize("refused", [False, True])
def test_outdated_tasks_are_cancelled_before_others_are_submitted(*, refused: bool) -> None:
    """Of an array job that is followed, only those; a refusal is no reason to fail."""
    record = {"tasks": [{"name": name} for name in ("x", "y", "z")]}
    attempts = [
        replace(array(1, "abc", {}), record=record, tasks=[TASK.id, "b", "c"]),
        replace(array(2, "d", {}), record=record),
        replace(array(3, "e", {}), record=None, tasks=[""]),  # it cannot be read
    ]
    done: list[tuple[str, Sequence[int] | None]] = []

    def cancel(run: str, tasks: Sequence[int] | None = None) -> None:
        done.append((run, tasks))
        if refused:
            raise RefusedError("it is not over after a minute")

    def claim(*_: object) -> Claim:
        return Claim(None, attempts=attempts)

    warnings: list[str] = []
    log = SimpleNamespace(info=lambda _: None, warning=warnings.append, error=None)
    with dg.DagsterInstance.ephemeral() as instance:
        context: Any = SimpleNamespace(
            instance=instance,
            run=dg.DagsterRun("all"),
            run_id="r",
            log=log,
            op_handle="step",
            get_mapping_key=lambda: None,
            selected_asset_keys=(),
        )
        gateway: Any = SimpleNamespace(claim=claim, cancel=cancel, cancel_tasks=cancel)
        call = StepCalls().begin("r", "step", "digest")
        family = Family(context, gateway, "/base/runs", call, {}, SlurmRequest(), questions=Questions())
        family.choose({0: TASK})
    assert done == [("runs/f-1", [1, 2]), ("runs/f-2", None), ("runs/f-3", None)]
    assert "newer data (y, z). They are cancelled" in warnings[0]
    assert "newer data (no record of what it was submitted with). They" in warnings[-2 if refused else -1]
    assert len(warnings) == (6 if refused else 3)


def test_all_array_jobs_with_other_inputs_are_cancelled_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long range has several of one family. The step follows jobs of its other calls itself."""
    monkeypatch.setattr(family_module, "SIBLING_SECONDS", 0)
    calls = StepCalls()
    call, other = (calls.begin("r", "step", digest) for digest in ("old", "new"))
    record = {"call": 0, "inputs": {"args": "old"}}
    runs = {"of-a-1": "of-a", "of-a-2": "of-a", "of-b-1": "of-b", f"{other.family}-1": other.family}
    others = [OtherRun(family, run, str(number), record) for number, (run, family) in enumerate(runs.items())]
    claimed, cancelled, warnings = list[str](), list[list[str]](), list[str]()

    def claim(_: str, family: str, *__: object) -> Claim:
        claimed.append(family)
        return Claim(None)

    def cancel_all(asked: list[str], report: Callable[[str, Any], None]) -> None:
        cancelled.append(asked)
        report(asked[0], RefusedError("it is not over after a minute"))

    gateway: Any = SimpleNamespace(claim=claim, cancel_all=cancel_all, stop=threading.Event())
    log = SimpleNamespace(info=None, warning=warnings.append, error=None)
    with dg.DagsterInstance.ephemeral() as instance:
        context: Any = SimpleNamespace(run_id="r", log=log, instance=instance, run=dg.DagsterRun("all"))
        attempts = Family(context, gateway, "/base/runs", call, {"args": "new"}, SlurmRequest(), questions=Questions())
    found = Claim(None, others=others)
    assert [attempts.cancel_outdated(found), attempts.cancel_outdated(found)] == [True, False]
    assert (claimed, cancelled[0]) == (["of-a", "of-b"], ["of-a-1", "of-a-2", "of-b-1"])
    assert "Slurm job 1 was submitted by an earlier run of this step with other inputs (args)" in warnings[1]
    assert warnings[3] == "Slurm job 0 could not be cancelled. it is not over after a minute"


def test_an_array_job_that_was_never_submitted_hides_no_earlier_one() -> None:
    never = Attempt("runs/f-2", 2, None, over=True, tasks=["a"], ends={})
    choice = choose([array(1, "a", {}), never], {0: "a"}, lambda *_: False, Retries())
    assert choice.follow == {"runs/f-1": {0: 0}}
