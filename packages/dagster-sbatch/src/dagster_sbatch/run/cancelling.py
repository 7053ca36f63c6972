"""Cancelling the jobs of a step that a person has terminated."""

import threading
from collections.abc import Mapping

from dagster_sbatch.auth import AccessError
from dagster_sbatch.errors import ConfigurationError
from dagster_sbatch.slurm.gateway import Gateway, JobEnd, LostClaimError, RefusedError, StoppedError
from dagster_sbatch.ssh import SshError


def cancel_jobs(
    gateway: Gateway, runs: Mapping[str, str | None], seconds: float
) -> tuple[list[str], Mapping[str, str | None], str]:
    """Cancel the jobs of run directories; return how they ended, those that may not be over, and why.

    `runs`: the run directories, each with the id of its job, if that is known. `seconds`: for all of them together.
    """
    gateway.stop = threading.Event()
    limit = threading.Timer(seconds, gateway.stop.set)
    limit.start()
    texts, errors, left = [], [], dict(runs)

    def report(run: str, outcome: JobEnd | RefusedError | None) -> None:
        if isinstance(outcome, RefusedError):
            errors.append(str(outcome))
            return
        job = left.pop(run)
        texts.append(f"Slurm job {job} is over: {outcome.state}" if outcome else "No job was submitted.")

    try:
        gateway.cancel_all(list(left), report, runs)
    except (RefusedError, StoppedError, LostClaimError, AccessError, SshError, ConfigurationError) as error:
        errors.append(str(error))
    finally:
        limit.cancel()
    return texts, left, "\n".join(filter(None, errors))


def describe_left(left: Mapping[str, str | None], error: str | None) -> str:
    """Return what to do about jobs that could not be cancelled; `left`: by run directory."""
    names = [job or run.rpartition("/")[2] for run, job in left.items()]
    commands = "\n".join(f"  scripts/job {name} cancel" for name in names)
    return (
        f"Slurm job {', '.join(names)} could not be cancelled, and may still be running. "
        f"{error or 'The login node cannot be reached.'}\nCancel it later:\n{commands}"
    )
