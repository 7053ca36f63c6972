"""Inputs of a call, and the choice whether a step adopts the job of an earlier attempt. Pure functions."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dagster_sbatch.run.array import PARTITION_KEYS
from dagster_sbatch.run.attempts import load_attempts
from dagster_sbatch.run.digests import digest_of
from dagster_sbatch.run.plan import Plan
from dagster_sbatch.slurm import Retries
from dagster_sbatch.slurm.gateway import ArrayJob, Claim, OtherRun
from dagster_sbatch.slurm.gateway.agent.images import INPUT
from dagster_sbatch.slurm.outcome import fault_of
from dagster_sbatch.slurm.units import list_names

MOST_NAMES = 8  # differences that a message names
NO_RECORD = "no record of what it was submitted with"


def inputs_of(
    plan: Plan, code: Mapping[str, str], step: Mapping[str, Any], data_root: str | None, image: str | None = None
) -> dict[str, str]:
    """Return the inputs of a call, which decide its result: a digest by name.

    Of the Slurm request, only the modules are among them.

    `code`: digests of code and packages, by name; see `RunEnvironment.inputs`. `step`: what else decides the step's
    result, by name; see `inputs_of_step`. `image`: identity of the image of the launcher's container; see
    `Gateway.image`.
    """
    launcher = plan.launcher.model_dump(mode="json")
    if launcher["container"]:
        launcher["container"] |= {"runtime": plan.site.container_runtime.model_dump(mode="json")}
    values: dict[str, Any] = {
        "workload": plan.workload.name,
        "args": plan.workload.args,
        **step,
        "launcher": plan.launcher.key,
        **{f"launcher.{name}": value for name, value in launcher.items()},
        **{f"extras[{name!r}]": value for name, value in plan.extras.items() if name != PARTITION_KEYS},
        "partitions": sorted(plan.extras.get(PARTITION_KEYS, ())),
        "tasks": [task.name for task in plan.tasks],
        **{f"env[{name!r}]": value for name, value in plan.env.items()},
        "setup_commands": plan.site.setup_commands,
        "modules": plan.allocation.request.modules or (),
        "DATA_ROOT": data_root,
    }
    digests = {name: digest_of(value) for name, value in values.items()}
    return {**digests, **code, **({INPUT: image} if image else {})}


@dataclass(frozen=True)
class Choice:
    """The attempt that a step follows."""

    attempt: int  # its number
    adopt: bool  # whether it exists already; otherwise the step submits it
    reason: str = ""  # why, for the log; empty for a new attempt


def choose(claim: Claim, *, stored: bool, retries: Retries) -> Choice:
    """Choose between the latest attempt with equal inputs and a new one.

    `stored`: whether Dagster has stored the result of the latest attempt. `retries`: of the request. The step follows a
    failed attempt that it may have to repeat.
    """
    job = f"Slurm job {claim.job}" if claim.job else "The Slurm job"
    if claim.attempt and not claim.over:
        reason = f"{job} was submitted by an earlier run of this step. Attaching to it."
        return Choice(claim.attempt, adopt=True, reason=reason)
    end = claim.end
    if end and end.succeeded and not claim.rejected and not stored:
        reason = f"{job} of an earlier run of this step has ended. Using its result."
        return Choice(claim.attempt, adopt=True, reason=reason)
    if end and not claim.rejected and retries.repeats(fault_of(end)):
        reason = f"{job} of an earlier run of this step has failed (Slurm: {end.state}). This run decides what follows."
        return Choice(claim.attempt, adopt=True, reason=reason)
    return Choice(claim.attempt + 1, adopt=False)


def is_left_out(claim: Claim) -> bool:
    """Return whether the latest attempt repeats a failed one, and was interrupted before it was submitted."""
    unsubmitted = claim.over and not claim.job and claim.end is None and not claim.rejected
    return unsubmitted and bool(load_attempts(claim.record))


@dataclass(frozen=True)
class TaskChoice:
    """What a step does with the tasks of an array that are not done."""

    # Run directories of earlier array jobs, each with the indices of its tasks there, by the task's index
    follow: Mapping[str, Mapping[int, int]]
    ended: int  # how many of these tasks are over
    new: Sequence[int]  # indices of the tasks that have to be submitted
    # Run directories of earlier array jobs, each with the indices there of tasks that are not over and that no task of
    # this array is: their values, or the data that they read, are others now; or their partitions are done
    outdated: Mapping[str, Sequence[int]] = field(default_factory=dict)


def choose_tasks(
    arrays: Sequence[ArrayJob], ids: Mapping[int, str], is_stored: Callable[[ArrayJob, int], bool], retries: Retries
) -> TaskChoice:
    """Choose for each task between the latest array job with it and a new one.

    `arrays`: of the family, the latest last. `ids`: of the tasks that are not done, by index. `retries`: of the
    request. The step follows a failed task that it may have to repeat.
    """
    latest = {
        name: (array, place)
        for array in arrays
        if array.job or not array.over  # else it was never submitted
        for place, name in enumerate(array.tasks)
    }
    follow: dict[str, dict[int, int]] = {}
    new, ended = [], 0
    for index, name in ids.items():
        array, place = latest.get(name, (None, 0))
        end = array.ends.get(place) if array else None
        if array is None or (end is None and array.over):
            new.append(index)
        elif end is None:
            follow.setdefault(array.run, {})[place] = index
        elif place not in array.rejected and (
            retries.repeats(fault_of(end)) or (end.succeeded and not is_stored(array, index))
        ):
            follow.setdefault(array.run, {})[place] = index
            ended += 1
        else:
            new.append(index)
    wanted = set(ids.values())
    active = [array for array in arrays if not array.over]
    left = {
        array.run: [place for place, name in enumerate(array.tasks) if name not in wanted and place not in array.ends]
        for array in active
    }
    return TaskChoice(follow, ended, new, {run: places for run, places in left.items() if places})


def outdated_runs(others: Iterable[OtherRun], begun: int) -> list[OtherRun]:
    """Return the jobs that earlier executions of a step submitted with other inputs, and that no call can adopt.

    Calls that this execution has not made yet may adopt the jobs of the calls with the same number or a later one.

    `begun` is the number of calls that this execution has made.
    """
    return [each for each in others if each.record is None or each.record["call"] < begun]


def name_differences(mine: Mapping[str, str], record: Mapping[str, Any] | None) -> str:
    """Return the names of the inputs that differ between a call and an earlier job; values are not shown."""
    if record is None:
        return NO_RECORD
    theirs = record["inputs"]
    names = [name for name in sorted({*mine, *theirs}) if mine.get(name) != theirs.get(name)]
    return list_names([f"{name}{_how(name, mine, theirs)}" for name in names], MOST_NAMES)


def _how(name: str, mine: Mapping[str, str], theirs: Mapping[str, str]) -> str:
    return " (new)" if name not in theirs else " (gone)" if name not in mine else ""


def name_request_changes(mine: Mapping[str, Any], record: Mapping[str, Any] | None) -> str:
    """Return the fields in which the asset's request for an adopted job differs, with both values; empty if none."""
    theirs = record["request"] if record else {}
    names = [name for name in sorted({*mine, *theirs}) if mine.get(name) != theirs.get(name)]
    return ", ".join(f"{name}={theirs.get(name, 'default')} (now {mine.get(name, 'default')})" for name in names)
