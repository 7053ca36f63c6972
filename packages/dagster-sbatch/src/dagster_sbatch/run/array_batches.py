"""How the tasks of an array are divided into array jobs: as many as the site accepts, and as run at once. Pure."""

from collections.abc import Callable, Hashable, Sequence

from dagster_sbatch.errors import ConfigurationError
from dagster_sbatch.slurm.gateway import Limits
from dagster_sbatch.slurm.units import count_of

USUAL_LIMIT = 1000  # tasks of an array job where Slurm does not tell its limit (MaxArraySize is 1001 by default)
PARTS = 4  # array jobs that fill the submit limit together: when one of them is over, there is room for the next one


class Batches:
    """The tasks that have to be submitted, as array jobs."""

    def __init__(self, tasks: Sequence[int], limits: Limits, max_running: int | None) -> None:
        """Choose the size of the array jobs.

        `tasks`: indices, in the order in which they are submitted. `max_running`: how many tasks may run at once, of
        all array jobs together.
        Raises ConfigurationError: Slurm does not let so many tasks run at once.
        """
        submit = limits.submit
        if max_running and submit and max_running > submit:
            raise ConfigurationError(
                f"max_running_tasks={max_running} is more than you may have submitted at once: "
                f"{count_of(submit, 'job')}. A task counts as a job. Write JobArray(max_running_tasks={submit})."
            )
        self.left = list(tasks)  # not submitted yet; one that has to be submitted once more is appended
        self._limits, self._max_running = limits, max_running

    def take(
        self, shares: Sequence[int], queued: int, kind: Callable[[int], Hashable] = lambda _: None, running: int = 0
    ) -> tuple[list[int], int | None]:
        """Return the tasks of the next array job, none if there is none now, and how many of them may run at once.

        `shares`: how many tasks of each array job that is not over may run at once; not read without `max_running`.
        `queued`: number of tasks of these array jobs. `kind`: returns the request of a task: the tasks of an array job
        have the same one. `running`: how many tasks of the array jobs can run at once from now on: fewer than their
        shares, if these have fewer tasks left; not read without `max_running`.
        """
        submit = self._limits.submit
        alike = [task for task in self.left if kind(task) == kind(self.left[0])]
        size = min(len(alike), self._limits.array or USUAL_LIMIT)
        if submit and len(self.left) + queued > submit // 2:  # other jobs of the user need room, too
            size = min(size, max(1, submit // PARTS))
        most = share = self._max_running
        if most is not None and size:
            number, share = -(-len(alike) // size), most - sum(shares)
            if share < 1:  # Slurm would never let more of them run than have room now
                number, share = 1, min(size, most - running)
                if share < len(alike):
                    return [], None
            if submit:
                number = min(number, max(1, PARTS - len(shares)))
            share = min(size, -(-share // number))
        taken = alike[:size]
        gone = set(taken)
        self.left = [task for task in self.left if task not in gone]
        return taken, share
