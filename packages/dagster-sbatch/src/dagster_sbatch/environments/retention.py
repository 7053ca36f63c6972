"""Which environments may go: never one that a job uses, that production runs, or that it could go back to."""

from collections.abc import Collection, Sequence
from datetime import UTC, datetime, timedelta

from dagster_sbatch.environments.environments import EnvironmentListing


def choose_for_removal(
    rows: Sequence[EnvironmentListing],
    used: Collection[str],
    *,
    keep: int | None = None,
    older_than: float | None = None,
) -> list[str]:
    """Names of the environments that may go.

    Args:
        rows: the one used last first.
        used: names that must stay.
        keep: so many of those that were used last stay.
        older_than: days since the last use.
    """
    limit = datetime.now(UTC) - timedelta(days=older_than or 0)
    return [
        row.environment.name
        for row in rows[keep or 0 :]
        if row.used < limit and not row.published and row.environment.name not in used
    ]
