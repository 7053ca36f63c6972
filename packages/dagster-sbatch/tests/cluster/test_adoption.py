"""A step that was killed and is executed again goes on with the job that is there: one job for each attempt."""

import os
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from slurm_in_a_box import CERTIFICATE_USER, SimulatedSite, wait_until
from support.background import (
    REPORTS,
    STRESS,
    WAITS,
    events,
    go_on,
    jobs_of,
    nobody_left,
    only_job,
    rows_of,
    runs_there,
)
from support.ray_run import nothing_is_left
from support.step import Step, kill
from support.workload_asset import PIPES

pytestmark = pytest.mark.cluster


@pytest.fixture
def variables(on_supercomputer: dict[str, str]) -> dict[str, str]:
    kept = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
    return {**kept, **on_supercomputer}


def one_job_each(site: SimulatedSite) -> None:
    """For each run directory there has been one job."""
    for run in runs_there(site):
        assert len(jobs_of(site, run)) == 1, run


def test_two_at_once_then_killed_then_done_anew(site: SimulatedSite, tmp_path: Path, variables: dict[str, str]) -> None:
    step = Step(tmp_path / "step", variables, WAITS)
    first = step.start(again=False)
    job = only_job(site, "RUNNING")
    step.call(most_node_hours=0)  # a job that runs already is adopted: it costs nothing more
    second = step.start(again=True)
    told = f"Another run (run {step.runs()[0]}, process {first.pid} on "
    wait_until(lambda: told in step.log and "is already executing this step" in step.log, "the second is told who", 60)
    kill(first)
    wait_until(
        lambda: f"Slurm job {job} was submitted by an earlier run of this step" in step.log, "the second follows", 60
    )
    go_on(site)
    success, error, metadata = step.result(second)
    assert (success, error) == (True, "")
    assert (metadata["job_id"], metadata["run_directory"][-2:]) == (job, "-1")
    assert step.output == "begun\ngone on\n"
    success, error, _ = step.result(step.start(again=True))  # what is materialised is not taken again
    assert (success, "could cost 0.50 node-hours (1 node x 00:30:00). most_node_hours" in error) == (False, True), error
    assert len(runs_there(site)) == 1
    step.call()
    third = step.start(again=True)
    success, error, metadata = step.result(third)
    site.wait_for_job(metadata["job_id"])
    assert (success, error) == (True, "")
    assert metadata["job_id"] != job
    assert metadata["run_directory"].endswith("-2")
    # Asked for while the same is executed: it waits, and uses that result.
    site.run_on_login(CERTIFICATE_USER, "rm go-on")
    fourth = step.start(again=True)
    only_job(site, "RUNNING")
    fifth = step.start(again=True)
    wait_until(lambda: "is already executing this step" in step.log, "the fifth waits", 90)
    go_on(site)
    _, _, first_result = step.result(fourth)
    success, error, metadata = step.result(fifth)
    assert (success, error) == (True, "")
    assert metadata["job_id"] == first_result["job_id"]
    assert metadata["run_directory"].endswith("-3")
    one_job_each(site)
    nothing_is_left(site)
    nobody_left(site)


ENDS = {
    "well": (WAITS, "Using its result", 1),
    "badly": (f"{WAITS.rstrip()}\n    raise SystemExit(3)\n", "", 2),
    "without closing Pipes": (f"{WAITS.rstrip()}\n    import os; os._exit(0)\n", "Using its result", 2),
}


@pytest.mark.smoke
def test_jobs_have_ended_while_nobody_looked(site: SimulatedSite, tmp_path: Path, variables: dict[str, str]) -> None:
    steps = {how: Step(tmp_path / how.replace(" ", "-"), variables, ENDS[how][0]) for how in ENDS}
    processes = [step.start(again=False) for step in steps.values()]
    wait_until(lambda: rows_of(site, "%T").count(["RUNNING"]) == len(steps), "their jobs run", 120)
    for process in processes:
        kill(process)
    go_on(site)
    wait_until(lambda: events(site).count('"code"') == len(steps), "the ends of their jobs", 60)
    processes = [step.start(again=True) for step in steps.values()]
    for (how, step), process in zip(steps.items(), processes, strict=True):
        success, error, _ = step.result(process)
        assert ENDS[how][1] in step.log, how
        assert success is (how == "well"), error
    step = steps["without closing Pipes"]  # its result was looked at, and is not taken a second time
    success, error, _ = step.result(step.start(again=True))
    assert not success
    assert "without closing its Dagster Pipes session" in error
    assert "Using its result" not in step.log
    assert len(runs_there(site)) == sum(attempts for *_, attempts in ENDS.values())
    one_job_each(site)


def test_killed_between_the_result_and_dagsters_record_of_it(
    site: SimulatedSite, tmp_path: Path, variables: dict[str, str]
) -> None:
    step = Step(tmp_path / "step", variables, REPORTS)
    step.hold()
    process = step.start(again=False)
    wait_until(step.held, "the asset has the result", 90)
    kill(process)
    success, error, first = step.result(step.start(again=True))
    assert (success, error) == (True, "")
    assert "Using its result" in step.log
    assert first["run_directory"].endswith("-1")
    success, error, second = step.result(step.start(again=True))  # now it is stored
    assert (success, error) == (True, "")
    assert second["job_id"] != first["job_id"]
    one_job_each(site)


def test_a_result_that_another_job_has_replaced_is_not_used(
    site: SimulatedSite, tmp_path: Path, variables: dict[str, str]
) -> None:
    """What decides the result was changed, and changed back."""
    step = Step(tmp_path / "step", variables, REPORTS)
    step.hold()
    process = step.start(again=False)
    wait_until(step.held, "the asset has the result", 90)
    kill(process)
    for extras in ({"n": 1}, {}):
        step.call(extras)
        success, error, _ = step.result(step.start(again=True))
        assert (success, error) == (True, "")
        assert "Using its result" not in step.log
    assert len(runs_there(site)) == 3
    one_job_each(site)


LATER = WAITS.replace("gone on", "gone on, later")


@pytest.mark.smoke
def test_what_decides_the_result_is_changed_while_the_job_runs(
    site: SimulatedSite, tmp_path: Path, variables: dict[str, str], client_home: Path
) -> None:
    """The job is cancelled, the differences are named without values. Another Slurm request is no difference."""
    step = Step(tmp_path / "step", variables, WAITS)
    step.call(extras={"n": 1}, env={"TOKEN": "secret 1"})
    process = step.start(again=False)
    jobs = [only_job(site, "RUNNING")]
    kill(process)
    changes: list[tuple[str, Callable[[], None]]] = [
        ("env['TOKEN'], extras['n']", lambda: step.call({"n": 2}, {"TOKEN": "secret 2"})),
        ("code workload.py", lambda: step.change(LATER)),
        ("env['TOKEN'], extras['n']", lambda: step.call({"n": 1}, {"TOKEN": "secret 1"})),
    ]
    for named, change in changes:
        change()
        process = step.start(again=True)
        wait_until(lambda: site.job_state(jobs[-1]) == "CANCELLED", "the outdated job is cancelled", 90)
        jobs.append(only_job(site, "RUNNING"))
        wait_until(lambda: f"job {jobs[-1]}: RUNNING" in step.log, "the step follows it", 60)
        kill(process)
        assert (
            f"Slurm job {jobs[-2]} was submitted by an earlier run of this step with other inputs ({named})" in step.log
        )
        assert "WARNING" in step.log
        assert "secret" not in step.log
    step.call({"n": 1}, {"TOKEN": "secret 1"}, time_limit="00:40:00")
    known = client_home / ".ssh" / "known_hosts"
    trusted = known.read_text()
    known.write_text("")
    process = step.start(again=True)
    wait_until(lambda: f"cannot reach its Slurm job {jobs[-1]}" in step.log, "the job is not forgotten", 90)
    known.write_text(trusted)
    wait_until(lambda: "time_limit=00:30:00 (now 00:40:00)" in step.log, "the job is adopted", 90)
    go_on(site)
    success, error, metadata = step.result(process)
    assert (success, error, metadata["job_id"]) == (True, "", jobs[-1])
    assert step.output.endswith("gone on, later\n")
    assert len(set(jobs)) == 4
    one_job_each(site)


def test_a_step_before_it_runs_again(site: SimulatedSite, tmp_path: Path, variables: dict[str, str]) -> None:
    """The job has read what that step had written before. Without that step, the job is adopted.

    Unless another run has materialized that asset meanwhile.
    """
    step = Step(tmp_path / "step", variables, WAITS)
    step.call(upstream=True)
    process = step.start(again=False)
    old = only_job(site, "RUNNING")
    kill(process)
    process = step.start("probe", again=True)
    wait_until(lambda: f"Slurm job {old} was submitted by an earlier run" in step.log, "the job is adopted", 90)
    kill(process)
    process = step.start(again=True)
    wait_until(lambda: site.job_state(old) == "CANCELLED", "the outdated job is cancelled", 90)
    by_another = "was submitted by an earlier run of this step with other inputs"
    assert f"Slurm job {old} {by_another} (data version of files)" in step.log
    new = only_job(site, "RUNNING")
    kill(process)
    step.materialize("files")
    process = step.start("probe", again=True)
    wait_until(lambda: site.job_state(new) == "CANCELLED", "the job that has read older files is cancelled", 90)
    assert f"Slurm job {new} {by_another} (data version of files)" in step.log
    go_on(site)
    success, error, metadata = step.result(process)
    assert (success, error) == (True, "")
    assert metadata["job_id"] not in (old, new)
    one_job_each(site)


LAST_KILL = 8.0
LINES = 70
COUNTS = (
    PIPES
    + f"""
    import pathlib, time
    for number in range({LINES}):
        print(f"line {{number}}", flush=True)
        time.sleep(0.1)
    while not pathlib.Path("{CERTIFICATE_USER.home}", pipes.extras["go_on"]).exists():
        time.sleep(0.1)
    pipes.report_asset_materialization(metadata={{"rows": 7}})
    """
)
"""Prints ten lines a second, and ends when its step was killed."""


@pytest.mark.parametrize("rounds", [20 if STRESS else 3])
def test_killed_at_random_moments(rounds: int, site: SimulatedSite, tmp_path: Path, variables: dict[str, str]) -> None:
    """Between the connection and the end of the job, some of them during a submission of two seconds."""
    failures: list[str] = []

    def play(number: int) -> None:
        step = Step(tmp_path / f"step-{number}", variables, COUNTS)
        step.call(extras={"go_on": f"go-on-{number}"})
        process = step.start(again=False)
        wait_until(lambda: step.begun(process), "it begins", 90)
        threading.Event().wait(random.uniform(0, LAST_KILL))
        kill(process)
        (site.layout.home / CERTIFICATE_USER.name / f"go-on-{number}").touch()
        success, error, _ = step.result(step.start(again=True))
        if not success or step.output.splitlines() != [f"line {line}" for line in range(LINES)]:
            failures.append(f"{error}\n{step.log}\n{step.output}")

    with site.faults.sbatch("slow"):
        for some in batches(range(rounds), 3):
            threads = [threading.Thread(target=play, args=(number,)) for number in some]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    assert not failures
    assert len(runs_there(site)) == rounds
    one_job_each(site)
    nobody_left(site)


def batches(numbers: range, size: int) -> Iterator[range]:
    for start in range(0, len(numbers), size):
        yield numbers[start : start + size]
