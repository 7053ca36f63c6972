"""Check that a lock on one login node is seen on another: two Dagsters must not act on the same run."""

import uuid

from dagster_sbatch.auth import AccessError
from dagster_sbatch.inspect.doctor.finding import Facts, Verdict, broken, ok, warning
from dagster_sbatch.inspect.runs import open_runs
from dagster_sbatch.slurm.gateway import RefusedError
from dagster_sbatch.ssh import SshError

SECONDS = 60.0
"""For the agents to answer."""
TRIES = 6
"""Connections that may all come to the login node that holds the lock."""
FAMILY = "lock-test"


def check_locks(facts: Facts) -> Verdict:
    """Take a lock below SLURM_DEPLOYMENT_BASE_PATH on one login node, and try to take it on another."""
    try:
        with open_runs(facts.settings, facts.project, SECONDS) as runs:
            held_by = runs.gateway.claim(runs.folder, FAMILY, uuid.uuid4().hex, "scripts/doctor").held_by
            return ok("another doctor holds the lock") if held_by else _look_from_elsewhere(facts, runs.gateway.host())
    except (AccessError, SshError, RefusedError) as error:
        return broken(str(error), "do what the error says; if it says nothing of that kind, try again")


def _look_from_elsewhere(facts: Facts, holder: str) -> Verdict:
    for _ in range(TRIES):
        with open_runs(facts.settings, facts.project, SECONDS) as runs:
            host = runs.gateway.host()
            if runs.gateway.claim(runs.folder, FAMILY, uuid.uuid4().hex, "scripts/doctor").held_by is None:
                return warning(
                    f"a lock that {holder} holds is not seen on {host}: two Dagsters could act on the same run, or "
                    "make the same environment",
                    "set SLURM_DEPLOYMENT_BASE_PATH to a folder on another file system, or SLURM_EDGE_NODE_HOST to one "
                    "login node; or ask the centre to switch on locks for the whole cluster",
                )
        if host != holder:
            return ok(f"what {holder} locks is locked on {host}")
    return ok(f"what one process on {holder} locks is locked for others there; no other login node was reached")
