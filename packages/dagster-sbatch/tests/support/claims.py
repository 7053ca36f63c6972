"""Attempts of a family as a claim reports them."""

from collections.abc import Mapping
from typing import Any

from dagster_sbatch.slurm.gateway import Attempt, JobEnd


def single_job(
    number: int,
    job: str | None = "7",
    *,
    end: JobEnd | None = None,
    over: bool = True,
    rejected: bool = False,
    record: Mapping[str, Any] | None = None,
) -> Attempt:
    """Return an attempt that is a single job."""
    ends = {} if end is None else {0: end}
    run = f"runs/family-{number}"
    return Attempt(run, number, job, over, [""], ends, rejected=frozenset([0] * rejected), record=record)
