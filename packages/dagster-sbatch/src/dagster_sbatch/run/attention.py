"""What a person has to see to, as asset checks that any process may report."""

from contextlib import suppress

import dagster as dg

ACCESS = dg.AssetKey("musica_access")
REACHABLE, LEFT_JOBS = "jobs_are_reachable", "jobs_are_followed"
"""Its checks about jobs on the supercomputer."""


def report_reachable(context: dg.OpExecutionContext, *, passed: bool, description: str) -> None:
    """Report whether the step that follows a job can reach the login node; the run's log says the same."""
    evaluation = evaluate(REACHABLE, passed=passed, description=f"Run {context.run_id}: {description}")
    with suppress(Exception):  # a step that waits for its job does not fail because of a report
        context.instance.report_runless_asset_event(evaluation)


def evaluate(check: str, *, passed: bool, description: str) -> dg.AssetCheckEvaluation:
    """Return an evaluation of one of the checks."""
    return dg.AssetCheckEvaluation(
        asset_key=ACCESS,
        check_name=check,
        passed=passed,
        description=description.replace("\n", "  \n"),
        severity=dg.AssetCheckSeverity.ERROR,
        metadata={},
    )
