"""Ask the supercomputer whether it would accept what a preview shows: Slurm, the container image, the environment."""

import re
from dataclasses import replace
from datetime import datetime, timedelta

from dagster_sbatch.costs.budget import budget_start, find_shortage
from dagster_sbatch.costs.proposal import render
from dagster_sbatch.errors import ConfigurationError
from dagster_sbatch.inspect.asset_preview import Preview
from dagster_sbatch.inspect.plan_summary import ANY_LIMITS, count_array_jobs, name_limits
from dagster_sbatch.run.run_environment import RunEnvironment
from dagster_sbatch.settings import Settings
from dagster_sbatch.slurm.gateway import Gateway, Limits, Projects, RefusedError, Usage, charged_project
from dagster_sbatch.slurm.outcome import explain_refusal
from dagster_sbatch.slurm.units import format_time

SAME_TIME = 60  # seconds between two starts that count as one: a job that can start at once starts when Slurm is asked
_SLURM_PREFIXES = ("sbatch:", "allocation failure:")  # of the lines that Slurm prints
_TIME = re.compile(r"(?<= to start at )\d+")


def ask_usage(gateway: Gateway, settings: Settings) -> Usage | None:
    """Return what the projects have used, if the deployment keeps within their budgets."""
    return gateway.usage(budget_start(settings)) if settings.keep_within_budget else None


def try_script(gateway: Gateway, preview: Preview, projects: Projects, usage: Usage | None = None) -> tuple[bool, str]:
    """Ask Slurm whether it would accept the script; return that, and the expected start and the project, or why not.

    `usage`: see `ask_usage`.
    """
    request, limits, array = preview.plan.allocation.request, ANY_LIMITS, ""
    shortage = find_shortage(preview.plan.allocation, preview.tasks, usage, preview.settings)[0] if usage else None
    if problem := preview.refusal or shortage or _find_problem(gateway, preview):
        return False, problem
    try:
        if preview.plan.array:
            limits = gateway.limits(request.partition or "", request.qos or "", request.account or "")
            array = f"{count_array_jobs(preview.plan, limits)}; {name_limits(limits)}\n"
        accepted, text = gateway.test(preview.render(limits))
    except ConfigurationError as error:
        return False, str(error)
    of_slurm = [line for line in text.splitlines() if line.startswith(_SLURM_PREFIXES)]  # centres print more
    said = "\n".join(of_slurm) or text
    if not accepted:
        return False, f"{array}{explain_refusal(said, request, lambda: projects)}"
    if request.modules and (problem := gateway.load_modules(request.modules, preview.plan.site.setup_commands)):
        return False, f"{array}{problem}"
    project = charged_project(request.account, projects.default) or "(the accounting does not answer)"
    compared = f"\n{_compare(gateway, preview, limits, said)}" if preview.proposed else ""
    return True, f"{array}{_TIME.sub(_written, said)}\ncharged to project {project}{compared}"


def _compare(gateway: Gateway, preview: Preview, limits: Limits, said: str) -> str:
    """Return how much earlier Slurm would start the proposed request."""
    assert preview.proposed
    accepted, text = gateway.test(replace(preview, plan=preview.proposed).render(limits))
    start, earlier = _TIME.search(said), _TIME.search(text)
    head = f"the proposed request, {render(preview.proposed.request)},"
    if not (accepted and start and earlier):
        return f"{head} would get no start time from Slurm: {text}"
    seconds = int(start[0]) - int(earlier[0])
    how = f"{format_time(timedelta(seconds=abs(seconds)))} {'earlier' if seconds >= 0 else 'later'}"
    return f"{head} would start at {_written(earlier)}: {how if abs(seconds) >= SAME_TIME else 'at the same time'}"


def _find_problem(gateway: Gateway, preview: Preview) -> str:
    """Return why a run would be refused for its image, its interpreter or its packages; empty if it would not."""
    container, settings = preview.plan.launcher.container, preview.settings
    if container:
        data_root, runs = preview.paths.data_root, preview.paths.run.rpartition("/")[0]
        problem, _ = gateway.image(container.remote_image(data_root), data_root, runs)
        if problem:
            return problem
    environment = RunEnvironment(gateway, settings, preview.plan)
    try:
        environment.check()
        gateway.ask(**environment.request)  # in staging, it refuses if the login node has no fitting interpreter
    except (ConfigurationError, RefusedError) as error:
        return str(error)
    return ""


def _written(time: re.Match[str]) -> str:
    return f"{datetime.fromtimestamp(int(time[0])).astimezone():%c %Z}"
