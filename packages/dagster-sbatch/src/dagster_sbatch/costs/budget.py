"""What projects have left: by Slurm's limits, or by the budget that the owner of the deployment has set."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, time, timedelta

from dagster_sbatch.costs.cost import (
    MOST_DIGITS,
    add,
    describe_cost,
    highest_cost,
    hours_at_most,
    hours_used,
    show_hours,
)
from dagster_sbatch.errors import ConfigurationError
from dagster_sbatch.settings import Settings
from dagster_sbatch.slurm import Allocation
from dagster_sbatch.slurm.gateway import GPU, Gateway, JobLife, Queued, Share, Usage, charged_project
from dagster_sbatch.slurm.units import count_of

UNITS = {GPU: "GPU-hours", "node": "node-hours", "cpu": "CPU-hours"}
"""Units by resource of Slurm; another resource has `<resource>-hours`."""
PACE_DAYS = 14  # the pace of a project is what it used per day in this many days
OWNERS = "SLURM_BUDGET_GPU_HOURS"
UNSEEN = "waiting jobs of others are not known"  # follows the hours of waiting jobs, if the usage lacks some of these


@dataclass(frozen=True)
class Budget:
    """What a project may use, and how much of it is used, all in hours of one resource. Unknown numbers are None."""

    project: str  # that jobs are charged to
    limited: str  # the project whose limit it is: the same, or one above it
    tres: str  # Slurm's name of the resource: gres/gpu, node, cpu, billing, ...
    user: str  # whose jobs count; empty: those of all users. It is the user where Slurm hides the jobs of others
    source: str  # what sets the limit: `GrpTRESMins of p70600`, or SLURM_BUDGET_GPU_HOURS
    limit: float  # what may be used in total
    used: float | None  # what is used of it
    running: float | None  # what the running jobs use at most from now on, until their time limits
    queued: float | None  # what the waiting jobs use at most: those that the user sees, see `sees_all`

    @property
    def unit(self) -> str:
        """The unit of all numbers, in words."""
        return UNITS.get(self.tres, f"{self.tres}-hours")

    @property
    def left(self) -> float | None:
        """What is not used yet; below 0 if more was used than the limit."""
        return None if self.used is None else self.limit - self.used

    @property
    def free(self) -> float | None:
        """What is left for a new job, if all jobs that wait or run use their whole time limits."""
        if self.left is None or self.running is None or self.queued is None:
            return None
        return self.left - self.running - self.queued


def budget_start(settings: Settings) -> datetime | None:
    """Return since when the owner's budget counts jobs (SLURM_BUDGET_START at 00:00 UTC); None if there is none."""
    day = settings.budget_start
    return None if day is None or settings.budget_gpu_hours is None else datetime.combine(day, time(), UTC)


def budgets_of(usage: Usage, settings: Settings) -> list[Budget]:
    """Return the budgets of all projects of the user; none for a project without a limit.

    A project has one for each resource that Slurm limits, in it, in a project above it or for this user. The project
    that jobs are charged to has the owner's budget (SLURM_BUDGET_GPU_HOURS) if Slurm limits nothing of it.

    `usage`: with the jobs since `budget_start`, or the owner's budget has no `used`.
    """
    found = [
        _limit(usage, project, share)
        for project in usage.projects
        for share in usage.shares or ()
        if share.project in _chain(usage, project) and share.user in ("", usage.user)
    ]
    charged = charged_project(settings.account, usage.default)
    known = charged in usage.projects or not usage.projects
    since = budget_start(settings)
    if since and charged and known and not any(budget.project == charged for budget in found):
        found.append(_owners(usage, charged, settings.budget_gpu_hours or 0.0, since))
    return found


def pace_of(usage: Usage, budget: Budget) -> float | None:
    """Return what was used per day of the last PACE_DAYS days, in the unit of the budget; None if that is not known."""

    def counts(job: JobLife) -> bool:
        return budget.limited in _chain(usage, job.project) and budget.user in ("", job.user)

    used = _used_since(usage, usage.now - timedelta(days=PACE_DAYS), budget.tres, counts)
    return None if used is None or not sees_all(usage, budget) else used / PACE_DAYS


def sees_all(usage: Usage, budget: Budget) -> bool:
    """Return whether the usage has all jobs that count for a budget.

    It lacks those that Slurm hides from the user, and those of the user's fellow projects below a limit.
    """
    shown = usage.private is False and (budget.limited in usage.projects or not usage.projects)
    return shown or budget.user == usage.user


def days_left(usage: Usage, budget: Budget) -> float | None:
    """Return for how many days a budget lasts at its pace; infinite if nothing was used; None if that is not known.

    A budget that is used up lasts 0 days, whatever the pace: its jobs do not start any more.
    """
    pace = pace_of(usage, budget)
    if budget.left is not None and budget.left <= 0:
        return 0.0
    if budget.left is None or pace is None:
        return None
    return budget.left / pace if pace else math.inf


def describe(usage: Usage, budget: Budget) -> str:
    """Return what is left of a budget, what may still use it, and how long it lasts: three lines for people."""
    pace, days = pace_of(usage, budget), days_left(usage, budget)
    whose = f", your own jobs in {budget.project} only" if budget.user else ""
    lasts = "" if days is None or math.isinf(days) else f": it lasts {count_of(math.floor(days), 'day')}"
    others = "" if sees_all(usage, budget) else f" ({UNSEEN})"
    limit = show_hours(budget.limit, budget.unit, beside=[budget.left, budget.used])
    if budget.left is not None and budget.left <= 0:
        head = f"none of {limit} are left, {show_hours(budget.used, beside=[budget.limit])} are used"
    else:
        head = f"{show_hours(budget.left, beside=[budget.limit])} of {limit} are left"
    return (
        f"{budget.project}: {head} ({budget.source}{whose}).\n"
        f"  Running jobs use at most {show_hours(budget.running)} more, waiting jobs "
        f"{show_hours(budget.queued)}{others}.\n"
        f"  The last {PACE_DAYS} days used {show_hours(pace)} per day{lasts}."
    )


def _chain(usage: Usage, project: str) -> list[str]:
    """Return a project and those above it."""
    chain = [project]
    while (above := usage.parents.get(chain[-1])) and above not in chain:
        chain.append(above)
    return chain


def _limit(usage: Usage, project: str, share: Share) -> Budget:
    def counts(jobs: Queued) -> bool:
        return share.project in _chain(usage, jobs.project) and share.user in ("", jobs.user)

    return Budget(
        project=project,
        limited=share.project,
        tres=share.tres,
        user=share.user,
        source=f"GrpTRESMins of {share.project}",
        limit=share.limit / 60,
        used=None if share.used is None else share.used / 60,
        running=share.running / 60,
        queued=_queue_at_most(usage, share.tres, lambda jobs: not jobs.running and counts(jobs)),
    )


def _owners(usage: Usage, project: str, limit: float, since: datetime) -> Budget:
    user = "" if usage.private is False else usage.user

    def counts(jobs: Queued | JobLife) -> bool:
        return jobs.project == project and user in ("", jobs.user)

    return Budget(
        project=project,
        limited=project,
        tres=GPU,
        user=user,
        source=OWNERS,
        limit=limit,
        used=_used_since(usage, since, GPU, counts),
        running=_queue_at_most(usage, GPU, lambda jobs: jobs.running and counts(jobs)),
        queued=_queue_at_most(usage, GPU, lambda jobs: not jobs.running and counts(jobs)),
    )


def _used_since(usage: Usage, since: datetime, tres: str, counts: Callable[[JobLife], bool]) -> float | None:
    if usage.jobs is None or usage.since is None or usage.since > since:
        return None
    return add(hours_used(job, tres, since, usage.now) for job in usage.jobs if counts(job))


def _queue_at_most(usage: Usage, tres: str, counts: Callable[[Queued], bool]) -> float | None:
    return None if usage.queue is None else add(hours_at_most(jobs, tres) for jobs in usage.queue if counts(jobs))


SETTING = "SLURM_KEEP_WITHIN_BUDGET"
ANSWER_SECONDS = 40.0
"""Time to ask what the project has left: 10 s for Slurm, after up to 30 s for calls that are submitted first."""


def check_budget(
    gateway: Gateway, allocation: Allocation, settings: Settings, warn: Callable[[str], object], tasks: int
) -> None:
    """Refuse new jobs that could cost more than the project has left; what is not known refuses nothing.

    Call it last before the submission: other calls of the user wait until these jobs are submitted.

    `gateway`: its agent asks Slurm what is left, if the deployment keeps within that.
    Raises ConfigurationError: they could.
    """
    if not settings.keep_within_budget or not tasks:
        return
    usage = gateway.usage_before_submitting(settings.runs_folder, budget_start(settings), ANSWER_SECONDS)
    if usage is None:
        warn(f"{SETTING}: the supercomputer did not say in time what is left. The job is submitted.")
        return
    shortage, notes = find_shortage(allocation, tasks, usage, settings)
    for note in notes:
        warn(note)
    if shortage:
        raise ConfigurationError(shortage)


def find_shortage(
    allocation: Allocation, tasks: int, usage: Usage, settings: Settings
) -> tuple[str | None, Sequence[str]]:
    """Compare the highest possible cost with what the project has left, after all jobs that wait and run.

    Limits on GPU-hours and node-hours are compared. A limit whose numbers are not known refuses nothing.
    Waiting jobs that the user does not see may leave less than that.

    `usage`: of the projects, with the jobs since `budget_start`.
    Returns why nothing is submitted, or None; and for the log, why limits could not be compared.
    """
    cost, project = highest_cost(allocation, tasks), charged_project(allocation.request.account, usage.default)
    hours = {GPU: cost.gpu_hours, "node": cost.node_hours}
    budgets = [each for each in budgets_of(usage, settings) if each.project == project and hours.get(each.tres)]
    unknown = [each for each in budgets if each.free is None]
    why = f": {'; '.join(usage.trouble)}" if usage.trouble else ""
    notes = [
        f"{SETTING}: what project {project} has left of {each.source} is not known{why}. The job is submitted."
        for each in unknown
    ]
    if not budgets and (usage.shares is None or project not in usage.parents):
        of = f"project {project}" if project else "your default project"
        notes.append(f"{SETTING}: the limits of {of} are not known{why}. The job is submitted.")
    for each in budgets:
        if each.free is not None and round(hours[each.tres] - each.free, MOST_DIGITS) > 0:
            return _explain(allocation, tasks, usage, each, hours[each.tres]), notes
    return None, notes


def _explain(allocation: Allocation, tasks: int, usage: Usage, budget: Budget, hours: float) -> str:
    unseen = "" if sees_all(usage, budget) else f" ({UNSEEN})"
    others = {*usage.projects} != {budget.project}  # none: they are not known
    free, used = max(budget.free or 0.0, 0.0), show_hours(budget.used, beside=[budget.limit])
    return (
        f"{describe_cost(allocation, tasks, free, gpus=budget.tres == GPU)}. Project {budget.project} has "
        f"{show_hours(free, beside=[hours])} free: of {show_hours(budget.limit, budget.unit, beside=[budget.used])} "
        f"({budget.source}), {used} are used, running jobs may use {show_hours(budget.running)} more, and waiting "
        f"jobs {show_hours(budget.queued)}{unseen}. {SETTING} is set, so nothing is submitted. "
        f"{_advise(budget, others=others)}"
    )


def _advise(budget: Budget, *, others: bool) -> str:
    """Return what helps: not to wait where no job runs or waits, or where the budget is used up.

    `others`: whether the user may have another project.
    """
    free, left = budget.free or 0.0, budget.left or 0.0
    ways = ["request less"] if free > 0 else []
    ways += ["wait until other jobs have ended"] if left > max(free, 0) else []
    ways += ["charge another project (SLURM_ACCOUNT, or account=... of the request)"] if others else []
    if left <= 0:
        ways.append(f"raise {OWNERS}" if budget.source == OWNERS else "ask the centre for more")
    text = ", or ".join(filter(None, (", ".join(ways[:-1]), ways[-1])))
    return text[0].upper() + text[1:]
