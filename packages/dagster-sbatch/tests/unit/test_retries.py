"""Which failures are repeated, with what request, what the record keeps of them, and what an interrupted step does."""

from dataclasses import asdict
from typing import Any

import pytest

from dagster_sbatch import ConfigurationError, Retries, SlurmRequest
from dagster_sbatch.run.adoption import Choice, choose, describe_adoption, is_left_out, name_request_changes
from dagster_sbatch.run.attempts import (
    AttemptRecord,
    AttemptSeries,
    load_attempts,
    load_request,
    rows_of,
    store_attempts,
    store_change,
    store_request,
)
from dagster_sbatch.settings import Settings
from dagster_sbatch.slurm import Site, allocate, render_job_script
from dagster_sbatch.slurm.gateway import JobEnd
from dagster_sbatch.slurm.request import Fault
from dagster_sbatch.slurm.retries import check_retries, next_request
from resources import PROJECT
from support.claims import single_job

ALL = Retries(max_mem="64G", max_time_limit="04:00:00", exclude_failed_nodes=True)


@pytest.fixture
def site() -> Site:
    return PROJECT.load_site("musica")


def follow(site: Site, fault: Fault | None, *, retried: int = 0, node: str = "n4001.musica", **request: Any) -> Any:
    """Return the fields that the next attempt has and the first one does not, or why there is none."""
    asked = {"mem": "16G", "retries": ALL, **request}
    planned = allocate(SlurmRequest(**asked), site)
    found = next_request(fault, planned.request, planned, node, retried)
    if not found.request:
        return found.text
    return {name: value for name, value in store_request(found.request).items() if (name, value) not in first(planned)}


def first(planned: Any) -> Any:
    return store_request(planned.request).items()


@pytest.mark.parametrize(
    ("fault", "request_", "expected"),
    [
        (Fault.MEMORY, {}, {"mem": "32G"}),
        (Fault.MEMORY, {"mem": "40G"}, {"mem": "64G"}),
        (Fault.MEMORY, {"mem": "64G"}, "mem='64G' has reached max_mem='64G'"),
        (Fault.MEMORY, {"mem": None, "mem_per_cpu": "2G"}, {"mem_per_cpu": "4G"}),
        (Fault.MEMORY, {"retries": Retries(max_mem="100G", factor=1.1)}, {"mem": "18023M"}),
        (Fault.MEMORY, {"mem": "500G", "retries": Retries(max_mem="2T")}, {"mem": "768G"}),
        (
            Fault.MEMORY,
            {"mem": "768G", "retries": Retries(max_mem="2T")},
            "mem='768G' has reached the 768G that a node of partition zen4_0768 has",
        ),
        (
            Fault.MEMORY,
            {"mem": None, "mem_per_cpu": "5G", "cpus_per_task": 100, "retries": Retries(max_mem="1T")},
            {"mem_per_cpu": "7864M"},  # a hundredth of the node's
        ),
        (Fault.MEMORY, {"mem": None, "gpus_per_node": 1, "retries": Retries(max_mem="400G")}, {"mem": "360G"}),
        (Fault.TIME, {}, {"time_limit": "02:00:00"}),
        (Fault.TIME, {"time_limit": "03:00:00"}, {"time_limit": "04:00:00"}),
        (Fault.TIME, {"time_limit": "4:0:0"}, "time_limit='04:00:00' has reached max_time_limit='04:00:00'"),
        (Fault.TIME, {"time_limit": "2-00", "retries": Retries(max_time_limit="9-00")}, {"time_limit": "3-00:00:00"}),
        (
            Fault.TIME,
            {"time_limit": "3-00", "retries": Retries(max_time_limit="9-00")},
            "time_limit='3-00:00:00' has reached the 3-00:00:00 that QoS zen4_0768 allows",
        ),
        (Fault.NODE, {}, {"exclude": "n4001"}),
        (Fault.NODE, {"exclude": "n[5-7]"}, {"exclude": "n[5-7],n4001"}),
        (Fault.NODE, {"nodes": 2}, {}),
        (Fault.NODE, {"node": ""}, {}),
        (Fault.NODE, {"retries": Retries()}, {}),
        (Fault.GPU, {}, {"exclude": "n4001"}),
        (Fault.GPU, {"nodes": 2}, "the node with the broken GPU is not known"),
        (Fault.AGAIN, {}, {}),
        *[(fault, {"retries": Retries()}, "") for fault in (Fault.MEMORY, Fault.TIME, Fault.GPU, None)],
        *[(fault, {"retried": 3}, "max_retries=3") for fault in Fault],
        *[(fault, {"retries": Retries(max_retries=0)}, "") for fault in Fault],
    ],
)
def test_the_next_request(site: Site, fault: Fault, request_: dict[str, Any], expected: Any) -> None:
    assert follow(site, fault, **request_) == expected


@pytest.mark.parametrize(
    ("request_", "text"),
    [
        ({"retries": Retries(max_mem="64G")}, "max_mem='64G' needs a request that names its memory"),
        ({"exclusive": True, "retries": Retries(max_mem="64G")}, "needs a request that names its memory"),
        ({"mem": "64G", "retries": ALL}, "max_mem='64G' is not more than the 64G of the request"),
        ({"mem": "1G", "time_limit": "4:0:0", "retries": ALL}, "max_time_limit='04:00:00' is not more than the time"),
        ({"mem": "1G", "nodelist": "n7", "retries": ALL}, "exclude_failed_nodes contradicts nodelist='n7'"),
    ],
)
def test_retries_that_could_change_nothing_are_refused(site: Site, request_: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigurationError, match=text.replace("(", r"\(")):
        check_retries(allocate(SlurmRequest(**request_), site).request)
    check_retries(allocate(SlurmRequest(), site).request)


def test_mistakes_are_named() -> None:
    with pytest.raises(ConfigurationError, match="Retries: max_memory: unknown field; did you mean 'max_mem'"):
        Retries(max_memory="64G")
    with pytest.raises(ConfigurationError, match="'64GB' is not a Slurm memory size"):
        Retries(max_mem="64GB")
    with pytest.raises(ConfigurationError, match="retries"):
        SlurmRequest(retries=3)


def test_the_job_script_is_the_same_with_retries(site: Site) -> None:
    scripts = {
        render_job_script(
            allocate(SlurmRequest(mem="1G", retries=retries), site).request,
            site, job_name="a-1", about={}, environment={}, body="true",
        )
        for retries in (Retries(), ALL)
    }  # fmt: skip
    assert len(scripts) == 1


REQUEST = SlurmRequest(mem="16G", modules=["GCC"], time_limit="01:30:00", retries=ALL)
GREW = REQUEST.model_copy(update={"mem": "32G", "exclude": "n1"})
ATTEMPT = AttemptRecord("7", "out of memory", store_request(REQUEST), {"node_hours": 0.5})


def test_the_record_gives_back_the_request_and_the_attempts() -> None:
    record = {"request": store_request(REQUEST), **store_change(GREW, REQUEST), **store_attempts([ATTEMPT])}
    assert load_request(record, REQUEST) == GREW
    assert load_request({"request": store_request(GREW), **store_change(GREW, GREW)}, REQUEST) == GREW
    assert load_attempts(record) == (ATTEMPT,)
    assert load_request(None, REQUEST) == load_request({"request": {"later": 1}}, REQUEST) == REQUEST
    assert load_attempts(None) == load_attempts({"request": {}}) == ()
    newer = {"attempts": [{**store_attempts([ATTEMPT])["attempts"][0], "later": 1}, {"job": "6"}]}
    assert load_attempts(newer) == (ATTEMPT, AttemptRecord("6", "", {}, {}))
    assert load_request({"older": 1}, REQUEST) == REQUEST
    assert store_attempts([]) == {}
    assert name_request_changes(store_request(REQUEST), record) == ""  # the step itself has changed it
    assert name_request_changes({**store_request(REQUEST), "mem": "8G"}, record) == "mem=16G (now 8G)"


def test_the_table_shows_request_cause_and_cost_of_each_attempt() -> None:
    last = AttemptRecord("8", "succeeded", store_request(GREW), {"node_hours": 1.0})
    assert rows_of([ATTEMPT, last]) == [
        {
            "attempt": 1, "job": "7", "request": "mem=16G, time_limit=01:30:00", "end": "out of memory",
            "node_hours": 0.5,
        },
        {
            "attempt": 2, "job": "8", "request": "mem=32G, time_limit=01:30:00, exclude=n1", "end": "succeeded",
            "node_hours": 1.0,
        },
    ]  # fmt: skip


OOM = JobEnd(None, "OUT_OF_MEMORY", "0:125")


@pytest.mark.parametrize(
    ("stored", "memory"), [("16G", ["32G", "64G"]), ("8G", ["16G", "32G"])], ids=["same", "changed"]
)
def test_a_task_that_a_killed_step_has_left_counts_its_attempts_and_has_the_request_of_the_asset(
    stored: str, memory: list[str], site: Site
) -> None:
    """If a person has changed that meanwhile, the next attempt has it as it is now."""
    planned = allocate(SlurmRequest(mem="16G", retries=Retries(max_mem="64G", max_retries=3)), site)
    series = AttemptSeries(planned, Settings.model_construct())
    now = store_request(planned.request)
    record = {"request": {**now, "mem": stored}, "tasks": [{"name": "a", **store_attempts([ATTEMPT])}]}
    series.read(record, now, 0)
    for _ in range(2):
        following = series.judge(OOM, "")[2].request
        assert following
        series.repeat("8", OOM, "out of memory", following)
    assert series.judge(JobEnd(None, "NODE_FAIL"), "")[2].text == "max_retries=3"
    assert [attempt.request["mem"] for attempt in series.ended] == ["16G", stored, memory[0]]
    assert series.request.mem == memory[1]


@pytest.mark.parametrize(
    ("end", "rejected", "retries", "adopt"),
    [
        (OOM, False, ALL, True),
        (OOM, True, ALL, False),  # a step has judged it: a person begins anew
        (OOM, False, Retries(), False),
        (JobEnd(None, "NODE_FAIL"), False, Retries(), True),
        (JobEnd(None, "NODE_FAIL"), False, Retries(max_retries=0), False),
        (JobEnd(75, "FAILED", "75:0"), False, Retries(), True),
        (JobEnd(3, "FAILED", "3:0"), False, ALL, False),
    ],
)
def test_a_failed_attempt_that_no_step_has_judged_is_followed(
    end: JobEnd, rejected: bool, retries: Retries, adopt: bool
) -> None:
    attempt = single_job(2, end=end, rejected=rejected)
    choice = choose([attempt], {0: ""}, lambda *_: False, retries)
    assert (list(choice.new), [*choice.follow]) == (([], [attempt.run]) if adopt else ([0], []))
    assert "has failed (Slurm:" in describe_adoption(attempt)


@pytest.mark.parametrize(
    ("changes", "left_out"),
    [
        ({}, True),
        ({"rejected": True}, False),  # Slurm has refused it
        ({"job": "8", "end": OOM}, False),
        ({"record": {"request": store_request(GREW)}}, False),
        ({"request": {}}, False),  # the asset's has changed since
    ],
)
def test_a_further_attempt_that_was_never_submitted_is_recognised(changes: dict[str, Any], left_out: bool) -> None:
    request = store_request(GREW)
    known = {"job": None, "record": {"request": request, "attempts": [asdict(ATTEMPT)]}, "request": request, **changes}
    request = known.pop("request")
    attempt = single_job(2, **known)
    assert is_left_out(attempt, request) is left_out
    if left_out:
        assert choose([attempt], {0: ""}, lambda *_: False, ALL) == Choice({}, 0, [0])
