"""Inputs of a call, and the choice whether a step adopts the job of an earlier attempt. Pure functions."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dagster_sbatch.run.array import PARTITION_KEYS
from dagster_sbatch.run.attempts import load_attempts
from dagster_sbatch.run.digests import digest_of
from dagster_sbatch.run.plan import Plan
from dagster_sbatch.slurm import Retries
from dagster_sbatch.slurm.gateway import Attempt, OtherRun
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
    """What a step does with its tasks that are not done."""

    # Earlier attempts that the step adopts, by run directory: the index of each task here, by its index there
    follow: Mapping[str, Mapping[int, int]]
    ended: int  # how many of these tasks are over
    new: Sequence[int]  # indices of the tasks that have to be submitted
    # Active tasks of earlier array jobs that this step does not need, by run directory: their indices in the job. Their
    # values or the data that they read have changed since, or their partitions are done
    outdated: Mapping[str, Sequence[int]] = field(default_factory=dict)


def choose(
    attempts: Sequence[Attempt], ids: Mapping[int, str], is_stored: Callable[[Attempt, int], bool], retries: Retries
) -> Choice:
    """Choose for each task between the latest attempt with it and a new one.

    `attempts`: of the family, the latest last. `ids`: of the tasks that are not done, by index. `is_stored`: whether
    Dagster has stored the result of a task in an attempt. `retries`: of the request. The step follows a failed task
    that it may have to repeat.
    """
    latest = {
        name: (attempt, place)
        for attempt in attempts
        if attempt.job or not attempt.over  # else it was never submitted
        for place, name in enumerate(attempt.tasks)
    }
    follow: dict[str, dict[int, int]] = {}
    new, ended = [], 0
    for index, name in ids.items():
        attempt, place = latest.get(name, (None, 0))
        end = attempt.ends.get(place) if attempt else None
        if attempt is None or (end is None and attempt.over):
            new.append(index)
        elif end is None:
            follow.setdefault(attempt.run, {})[place] = index
        elif place not in attempt.rejected and (
            retries.repeats(fault_of(end)) or (end.succeeded and not is_stored(attempt, index))
        ):
            follow.setdefault(attempt.run, {})[place] = index
            ended += 1
        else:
            new.append(index)
    wanted = set(ids.values())
    active = [attempt for attempt in attempts if not attempt.over]
    left = {
        attempt.run: [
            place for place, name in enumerate(attempt.tasks) if name not in wanted and place not in attempt.ends
        ]
        for attempt in active
    }
    return Choice(follow, ended, new, {run: places for run, places in left.items() if places})


def describe_adoption(attempt: Attempt) -> str:
    """Return what a step does with the single job of an earlier run that it follows."""
    job, end = f"Slurm job {attempt.job}" if attempt.job else "The Slurm job", attempt.ends.get(0)
    if not attempt.over or end is None:
        return f"{job} was submitted by an earlier run of this step. Attaching to it."
    if end.succeeded:
        return f"{job} of an earlier run of this step has ended. Using its result."
    return f"{job} of an earlier run of this step has failed (Slurm: {end.state}). This run decides what follows."


def is_left_out(attempt: Attempt, request: Mapping[str, Any]) -> bool:
    """Return whether a single job repeats a failed one, and the step was interrupted before it was submitted.

    `request`: of the asset, as it would be stored now; with another one, the attempts begin anew.
    """
    unsubmitted = attempt.over and not (attempt.job or attempt.ends or attempt.rejected)
    record = attempt.record or {}
    return unsubmitted and bool(load_attempts(record)) and record.get("request") == request


def outdated_runs(others: Iterable[OtherRun], begun: int) -> list[OtherRun]:
    """Return the jobs that earlier executions of a step submitted with other inputs, and that no call can adopt.

    Calls that this execution has not made yet may adopt the jobs of the calls with the same number or a later one.

    `begun` is the number of calls that this execution has made.
    """
    return [each for each in others if each.record is None or each.record.get("call", 0) < begun]


def name_differences(mine: Mapping[str, str], record: Mapping[str, Any] | None) -> str:
    """Return the names of the inputs that differ between a call and an earlier job; values are not shown."""
    if record is None:
        return NO_RECORD
    theirs = record.get("inputs", {})
    how = dict.fromkeys(mine.keys() - theirs, " (new)") | dict.fromkeys(theirs.keys() - mine, " (gone)")
    names = [name for name in sorted({*mine, *theirs}) if mine.get(name) != theirs.get(name)]
    return list_names([f"{name}{how.get(name, '')}" for name in names], MOST_NAMES)


def name_request_changes(mine: Mapping[str, Any], record: Mapping[str, Any] | None) -> str:
    """Return the fields in which the asset's request for an adopted job differs, with both values; empty if none."""
    theirs = record.get("request", {}) if record else {}
    names = [name for name in sorted({*mine, *theirs}) if mine.get(name) != theirs.get(name)]
    return ", ".join(f"{name}={theirs.get(name, 'default')} (now {mine.get(name, 'default')})" for name in names)
