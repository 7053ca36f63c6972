"""Jobs that may never start are told from those that wait for their turn."""

import pytest

from resources.slurm.waiting import advise


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
        ("AssocGrpBillingMinutes", "computing time"),
        ("QOSGrpGRESMinutes", "computing time"),
    ],
)
def test_a_job_that_may_never_start(reason: str, says: str) -> None:
    assert says in (advise(reason, "17") or "")


@pytest.mark.parametrize(
    "reason",
    "None Priority Resources Dependency BeginTime Licenses ReqNodeNotAvail Reservation PartitionDown PartitionInactive "
    "QOSMaxJobsPerUserLimit AssocMaxJobsLimit QOSGrpNodeLimit AssocGrpCpuLimit JobArrayTaskLimit Prolog Cleaning "
    "QOSMaxGRESPerUser MaxJobsPerAccount".split(),
)
def test_a_job_that_waits_for_its_turn(reason: str) -> None:
    assert advise(reason, "17") is None
