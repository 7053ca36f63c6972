"""Refuse jobs that could cost more than the project has left."""

from dagster_sbatch.costs.budget import SETTING, budget_start, find_shortage
from dagster_sbatch.errors import ConfigurationError
from dagster_sbatch.run.reports import StepLog
from dagster_sbatch.settings import Settings
from dagster_sbatch.slurm import Allocation
from dagster_sbatch.slurm.gateway import Gateway

ANSWER_SECONDS = 40.0
"""Time to ask what the project has left: 10 s for Slurm, after up to 30 s for calls that are submitted first."""


def check_budget(gateway: Gateway, allocation: Allocation, settings: Settings, log: StepLog, tasks: int) -> None:
    """Refuse new jobs that could cost more than the project has left; what is not known refuses nothing.

    Call it when nothing else has to be done before they are submitted: other calls of the user wait until then.

    `gateway`: its agent asks Slurm what is left, if the deployment keeps within that.
    Raises ConfigurationError: they could.
    """
    if not settings.keep_within_budget or not tasks:
        return
    usage = gateway.usage_before_submitting(settings.runs_folder, budget_start(settings), ANSWER_SECONDS)
    if usage is None:
        log.warning(f"{SETTING}: the supercomputer did not say in time what is left. The job is submitted.")
        return
    shortage, notes = find_shortage(allocation, tasks, usage, settings)
    for note in notes:
        log.warning(note)
    if shortage:
        raise ConfigurationError(shortage)
