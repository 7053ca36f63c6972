"""Reasons of Slurm for which a pending job may never start, and what to do about each."""

import re

_ADVICE = (
    (
        r"DependencyNeverSatisfied",
        "the job that it depends on did not end as its `dependency` asks. Terminate this run, and execute it again "
        "without that dependency, or after the other job.",
    ),
    (
        r"JobHeldUser|JobHeldAdmin|JobHoldMaxRequeue|[Hh]eld",
        "it is held. An administrator or you did that (scontrol hold), or its nodes failed to start it. Find out why, "
        "then release it on the login node, or Terminate this run:\n  scontrol release {job}",
    ),
    (
        r"BadConstraints|ReqNodeNotAvail.*UnavailableNodes|NodeDown$|FrontEndDown",
        "no available node has what the job requests. Terminate this run if the nodes do not come back, and "
        "change `constraint`, `nodelist`, `exclude` or GPUs in its SlurmRequest.",
    ),
    (
        r"Partition(Config|NodeLimit|TimeLimit)|Invalid(Account|QOS)|(Account|QOS)NotAllowed|ReservationDeleted"
        r"|Reservation.*(Invalid|deleted)|QOSMin\w*|((Assoc|QOS)\w*|Max\w*)Per(Job|Node)\w*|MaxMemPerLimit|DeadLine",
        "a limit of its account, QoS, partition or reservation does not allow a job of this size. Terminate this run, "
        "and change its SlurmRequest; `scripts/preview ASSET --test-only` asks Slurm beforehand.",
    ),
    (
        r"(Assoc|QOS)Grp(?!\w*RunMinutes)\w*(Minutes|Wall)\w*",  # RunMinutes: of the jobs that run now
        "the project has used up its computing time. It starts once there is more; Terminate this run if there will be "
        "none.",
    ),
)


def advise(reason: str, job: str) -> str | None:
    """Return what to do about a job that may never start; None if the job only waits for its turn.

    `reason`: of a pending job (squeue(1), JOB REASON CODES).
    """
    for pattern, advice in _ADVICE:
        if re.search(pattern, reason):
            return advice.format(job=job)
    return None
