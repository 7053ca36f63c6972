"""Jobs that may never start are told from those that wait for their turn."""

from types import SimpleNamespace
from typing import Any

import pytest

from dagster_sbatch.run.remote_job import RemoteJob
from dagster_sbatch.slurm.gateway import JobState
from dagster_sbatch.slurm.outcome import advise


@pytest.mark.parametrize(
    ("reason", "says"),
    [
        ("DependencyNeverSatisfied", "without that dependency"),
        ("JobHeldUser", "scontrol release 17"),
        ("JobHeldAdmin", "scontrol release 17"),
        ("launch failed requeued held", "scontrol release 17"),
        ("launch_failed_requeued_held", "scontrol release 17"),
        ("user env retrieval failed requeued held", "scontrol release 17"),
        ("job requeued in held state", "scontrol release 17"),
        ("JobHoldMaxRequeue", "scontrol release 17"),
        ("BadConstraints", "constraint"),
        ("PartitionConfig", "--test-only"),
        ("PartitionTimeLimit", "--test-only"),
        ("PartitionNodeLimit", "--test-only"),
        ("InvalidQOS", "--test-only"),
        ("InvalidAccount", "--test-only"),
        ("AccountNotAllowed", "--test-only"),
        ("QOSMaxCpuPerJobLimit", "--test-only"),
        ("AssocMaxWallDurationPerJobLimit", "--test-only"),
        ("QOSMinGRES", "--test-only"),
        ("ReservationDeleted", "--test-only"),
        ("MaxMemPerLimit", "--test-only"),
        ("AssocGrpBillingMinutes", "computing time"),
        ("QOSGrpGRESMinutes", "computing time"),
        ("AssocGrpCPUMinutesLimit", "computing time"),
        ("AssocGrpWallLimit", "computing time"),
        ("QOSGrpWallLimit", "computing time"),
    ],
)
def test_a_job_that_may_never_start(reason: str, says: str) -> None:
    assert says in (advise(reason, "17") or "")


@pytest.mark.parametrize(
    "reason",
    "None Priority Resources Dependency BeginTime Licenses ReqNodeNotAvail Reservation PartitionDown PartitionInactive "
    "QOSMaxJobsPerUserLimit AssocMaxJobsLimit QOSGrpNodeLimit AssocGrpCpuLimit JobArrayTaskLimit Prolog Cleaning "
    "QOSMaxGRESPerUser MaxJobsPerAccount AssocGrpCPURunMinutesLimit QOSGrpGRESRunMinutes".split(),
)
def test_a_job_that_waits_for_its_turn(reason: str) -> None:
    assert advise(reason, "17") is None


def test_the_step_warns_once_with_the_advice() -> None:
    warned: list[str] = []
    log = SimpleNamespace(info=lambda _: None, warning=warned.append)
    step: Any = SimpleNamespace(_job="17", _state=None, _log=log, _report_project=lambda *_: None)
    for reason in ("Priority", "JobHeldUser", "JobHeldUser", "None"):
        RemoteJob._report_state(step, JobState("PENDING", reason, None))
    (text,) = warned
    assert text.startswith("Slurm job 17 may never start (JobHeldUser): ")
    assert text.endswith("\n  scontrol release 17")
