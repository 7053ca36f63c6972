"""Whether what a project has left is enough for the jobs of a call of `compute.run`. Pure."""

from collections.abc import Sequence

from dagster_sbatch.costs.budget import UNSEEN, Budget, budgets_of, sees_all
from dagster_sbatch.costs.cost import describe_cost, highest_cost
from dagster_sbatch.costs.hours import MOST_DIGITS, show_hours
from dagster_sbatch.settings import Settings
from dagster_sbatch.slurm import Allocation
from dagster_sbatch.slurm.gateway import GPU, Usage, charged_project

SETTING = "SLURM_KEEP_WITHIN_BUDGET"


def find_shortage(
    allocation: Allocation, tasks: int, usage: Usage, settings: Settings
) -> tuple[str | None, Sequence[str]]:
    """Compare the highest possible cost with what the project has left, after all jobs that wait and run.

    Limits on GPU-hours and node-hours are compared. A limit whose numbers are not known refuses nothing.
    Waiting jobs that the user does not see may leave less than that.

    `usage`: of the projects, with the jobs since `budget_start`.

    Returns:
        Why nothing is submitted, or None; and for the log, why limits could not be compared.
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
            unseen = "" if sees_all(usage, each) else f" ({UNSEEN})"
            return _explain(allocation, tasks, each, hours[each.tres], unseen), notes
    return None, notes


def _explain(allocation: Allocation, tasks: int, budget: Budget, hours: float, unseen: str) -> str:
    free, used = max(budget.free or 0.0, 0.0), show_hours(budget.used, beside=[budget.limit])
    return (
        f"{describe_cost(allocation, tasks, free, gpus=budget.tres == GPU)}. Project {budget.project} has "
        f"{show_hours(free, beside=[hours])} free: of {show_hours(budget.limit, budget.unit, beside=[budget.used])} "
        f"({budget.source}), {used} are used, and jobs that run and wait may use {show_hours(budget.running)} and "
        f"{show_hours(budget.queued)}{unseen}. {SETTING} is set, so nothing is submitted. "
        "Request less, wait until other jobs have ended, or charge another project (account=...)"
    )
