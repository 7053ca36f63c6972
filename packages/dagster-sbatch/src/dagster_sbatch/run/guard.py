"""The guard of a step: it refuses jobs that could cost more than the limit per run, or than the project has left."""

from dataclasses import replace

from dagster_sbatch.costs.budget import budget_start
from dagster_sbatch.costs.cost import explain_excess
from dagster_sbatch.costs.shortage import SETTING, find_shortage
from dagster_sbatch.errors import ConfigurationError
from dagster_sbatch.run.reports import StepLog
from dagster_sbatch.settings import Settings
from dagster_sbatch.slurm import Allocation
from dagster_sbatch.slurm.gateway import Gateway
from dagster_sbatch.slurm.next_request import Next

ANSWER_SECONDS = 40.0
"""For Slurm to say what the project has left: ten, after up to 30 for calls that are being submitted."""


class Guard:
    """Compares the highest possible cost of jobs with the limits of the deployment and of their request."""

    def __init__(self, settings: Settings, log: StepLog) -> None:
        self._settings, self._log = settings, log

    def check_cost(self, allocation: Allocation, tasks: int = 1) -> None:
        """Refuse new jobs that could cost more than the limit per run; call it before anything is sent for them.

        Args:
            allocation: what would be submitted.
            tasks: of an array, that would be submitted.

        Raises:
            ConfigurationError: they could.
        """
        if excess := explain_excess(allocation, tasks, self._settings):
            raise ConfigurationError(excess)

    def within_limit(self, following: Next, planned: Allocation) -> Next:
        """Return what follows a failed attempt, unless it alone could cost more than the limit per run.

        `planned`: the allocation of the first attempt.
        """
        request = following.request
        excess = request and explain_excess(replace(planned, request=request), 1, self._settings)
        return Next(None, excess) if excess else following

    def check_budget(self, gateway: Gateway, allocation: Allocation, tasks: int) -> None:
        """Refuse new jobs that could cost more than the project has left; what is not known refuses nothing.

        Call it when nothing else has to be done before they are submitted: other calls of the user wait until then.

        Args:
            gateway: its agent asks Slurm what is left, if the deployment keeps within that.
            allocation, tasks: see `check_cost`.

        Raises:
            ConfigurationError: they could.
        """
        if not self._settings.keep_within_budget or not tasks:
            return
        runs, since = f"{self._settings.deployment_base_path}/runs", budget_start(self._settings)
        usage = gateway.usage_before_submitting(runs, since, ANSWER_SECONDS)
        if usage is None:
            self._log.warning(f"{SETTING}: the supercomputer did not say in time what is left. The job is submitted.")
            return
        shortage, notes = find_shortage(allocation, tasks, usage, self._settings)
        for note in notes:
            self._log.warning(note)
        if shortage:
            raise ConfigurationError(shortage)
