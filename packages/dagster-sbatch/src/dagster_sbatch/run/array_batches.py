"""How the tasks of an array are divided into array jobs: as many as the site accepts, and as run at once. Pure."""

from collections.abc import Sequence

from dagster_sbatch.errors import ConfigurationError
from dagster_sbatch.slurm.gateway import Limits

USUAL_LIMIT = 1000
"""Tasks of an array job where Slurm does not tell its limit (MaxArraySize is 1001 by default)."""
PARTS = 4
"""Array jobs that fill the submit limit together: when one of them is over, there is room for the next one."""


class Batches:
    """The tasks that have to be submitted, as array jobs."""

    def __init__(self, tasks: Sequence[int], limits: Limits, max_running: int | None) -> None:
        """Choose the size of the array jobs.

        Args:
            tasks: indices, in the order in which they are submitted.
            limits: of the site.
            max_running: how many tasks may run at once, of all array jobs together.

        Raises:
            ConfigurationError: Slurm does not let so many tasks run at once.
        """
        submit = limits.submit
        if max_running and submit and max_running > submit:
            raise ConfigurationError(
                f"max_running_tasks={max_running} is more than the {submit} jobs that you may have submitted at once; "
                f"a task counts as a job. Write JobArray(max_running_tasks={submit})."
            )
        self._left = list(tasks)
        self._size = min(len(tasks) or 1, limits.array or USUAL_LIMIT)
        if submit and len(tasks) > submit // 2:  # other jobs of the user need room, too
            self._size = min(self._size, max(1, submit // PARTS))
        number = max(1, -(-len(tasks) // self._size))
        self._at_once = min(number, max_running, PARTS if submit else number) if max_running else None
        self._share = max_running // self._at_once if max_running and self._at_once else max_running

    def add(self, task: int) -> None:
        """Have a task submitted once more."""
        self._left.append(task)

    def take(self, active: int) -> list[int]:
        """Return the tasks of the next array job; none if there is none now.

        Args:
            active: number of array jobs that are not over.
        """
        if self._at_once is not None and active >= self._at_once:
            return []
        taken, self._left = self._left[: self._size], self._left[self._size :]
        return taken

    @property
    def max_running(self) -> int | None:
        """How many tasks of each array job may run at once."""
        return self._share

    @property
    def left(self) -> Sequence[int]:
        """Tasks that are not submitted yet."""
        return self._left
