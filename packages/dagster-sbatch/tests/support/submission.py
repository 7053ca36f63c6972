"""A run that is submitted, and not followed."""

from collections.abc import Mapping
from typing import NoReturn

from dagster_sbatch.slurm.gateway import Gateway, Submitted


class _Stop(Exception):  # noqa: N818 - no error
    pass


def submit_run(gateway: Gateway, run: str, files: Mapping[str, str] | None, follower: str = "a-run") -> Submitted:
    """Submit a run; return as soon as it has a job."""
    found: list[Submitted] = []

    def stop(submitted: Submitted) -> NoReturn:
        found.append(submitted)
        raise _Stop

    try:
        gateway.run(run, files, {}, follower, on_submitted=stop)
    except _Stop:
        return found[0]
    raise AssertionError("the job is over, and was never reported")
