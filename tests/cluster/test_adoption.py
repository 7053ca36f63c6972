"""A step that was killed and is executed again goes on with the job that is there: one job for each attempt."""

import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.background import STRESS, WAITS, events, go_on, jobs_of, nobody_left, only_job, runs_there
from tests.cluster.step import Step, kill
from tests.local.workload_asset import PIPES
from tests.simulated_site import SimulatedSite, wait_until

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
    second = step.start(again=True)
    told = f"run {step.runs()[0]}, process {first.pid} on "
    wait_until(lambda: told in step.log and "is at work on the same" in step.log, "the second is told who", 60)
    kill(first)
    wait_until(lambda: f"job {job} is on its way since an earlier run" in step.log, "the second follows", 60)
    go_on(site)
    success, error, metadata = step.result(second)
    assert (success, error) == (True, "")
    assert (metadata["job_id"], metadata["run_directory"][-2:]) == (job, "-1")
    assert step.output == "begun\ngone on\n"
    third = step.start(again=True)  # what is materialised is not taken again
    success, error, metadata = step.result(third)
    assert (success, error) == (True, "")
    assert metadata["job_id"] != job
    assert metadata["run_directory"].endswith("-2")
    one_job_each(site)
    nobody_left(site)


ENDS = {
    "well": (WAITS, "taking its result", 1),
    "badly": (f"{WAITS.rstrip()}\n    raise SystemExit(3)\n", "", 2),
    "without closing Pipes": (f"{WAITS.rstrip()}\n    import os; os._exit(0)\n", "taking its result", 2),
}


@pytest.mark.parametrize("how", ENDS)
def test_the_job_has_ended_while_nobody_looked(
    how: str, site: SimulatedSite, tmp_path: Path, variables: dict[str, str]
) -> None:
    workload, told, attempts = ENDS[how]
    step = Step(tmp_path / "step", variables, workload)
    process = step.start(again=False)
    only_job(site, "RUNNING")
    kill(process)
    go_on(site)
    wait_until(lambda: '"code"' in events(site), "the end of the job", 60)
    success, error, _ = step.result(step.start(again=True))
    assert told in step.log
    assert success is (how == "well"), error
    if how == "without closing Pipes":  # its result was looked at, and is not taken a second time
        success, error, _ = step.result(step.start(again=True))
        assert not success
        assert "without closing its Dagster Pipes session" in error
        assert "taking its result" not in step.log
    assert len(runs_there(site)) == attempts
    one_job_each(site)


LAST_KILL = 8.0
LINES = 70
"""Ten a second: with the submission's two seconds that takes longer than until the last kill."""
COUNTS = (
    PIPES
    + f"""
    import time
    for number in range({LINES}):
        print(f"line {{number}}", flush=True)
        time.sleep(0.1)
    pipes.report_asset_materialization(metadata={{"rows": 7}})
    """
)


@pytest.mark.parametrize("rounds", [20 if STRESS else 3])
def test_killed_at_random_moments(rounds: int, site: SimulatedSite, tmp_path: Path, variables: dict[str, str]) -> None:
    """Between the connection and the end of the job, some of them during a submission of two seconds."""
    failures: list[str] = []

    def play(number: int) -> None:
        step = Step(tmp_path / f"step-{number}", variables, COUNTS)
        process = step.start(again=False)
        wait_until(lambda: step.begun(process), "it begins", 90)
        threading.Event().wait(random.uniform(0, LAST_KILL))
        kill(process)
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
