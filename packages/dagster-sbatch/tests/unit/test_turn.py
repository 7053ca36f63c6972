"""Calls at the same moment: one at a time compares its cost with what is left, until it has submitted its job."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dagster_sbatch.slurm.gateway import Gateway
from resources import PROJECT
from support.agent_fixtures import Prepare, put
from support.array_run import files_of
from support.submission import submit_run

HURRY = "import sys\ndef spoil():\n    vars(sys.modules['agent.turn']).update({})"
ENOUGH = 25.0
"""Seconds for an answer, less than an agent gives another call."""


@pytest.fixture
def runs(slurm: Path, tmp_path: Path) -> str:
    """The folder of all runs. Each job waits in the queue of Slurm as soon as sbatch has answered."""
    (tmp_path / "base").mkdir(mode=0o700)
    waits = f"while read -r _; do echo PENDING xy p1 1:00:00 1:00:00 node=1; done <'{tmp_path}/queue'"
    put(slurm, "squeue", f'case "$*" in *tres-alloc*) {waits};; esac')
    put(slurm, "sbatch", f"echo job >>'{tmp_path}/queue'; wc -l <'{tmp_path}/queue'")
    (tmp_path / "queue").touch()
    return f"{tmp_path}/base/runs"


def waiting(gateway: Gateway, runs: str) -> int:
    usage = gateway.usage_before_submitting(runs, None, ENOUGH)
    assert usage
    assert usage.queue is not None
    return sum(jobs.count for jobs in usage.queue)


def submit(gateway: Gateway, runs: str, key: str, *, array: bool) -> None:
    if array:
        files = files_of(PROJECT.load_site("musica"), key, "true", 3)
        ask = {
            "do": "jobs.run",
            "run": f"{runs}/{key}",
            "files": files,
            "follower": "a-run",
            "tasks": [],
            "followed": [],
        }
        assert "job" in next(gateway.exchange([{**ask, "fields": "", "offsets": {}}]))[1]
    else:
        submit_run(gateway, f"{runs}/{key}", {"job.sh": ""})


@pytest.mark.parametrize("array", [False, True])
def test_each_call_sees_the_jobs_of_those_before_it(prepare: Prepare, runs: str, array: bool) -> None:
    """Two of five have room; all stay connected until each of them has its answer, as they do to follow their jobs."""
    gateways = [prepare() for _ in range(5)]
    together, left = threading.Barrier(5), threading.Barrier(2)

    def call(number: int) -> int:
        gateway = gateways[number]
        gateway.ping()  # it is connected
        together.wait(ENOUGH)
        seen = waiting(gateway, runs)
        if seen < 2:
            submit(gateway, runs, f"KEY{number}-1", array=array)
            left.wait(ENOUGH)
        else:
            gateway.close()  # its step fails
        return seen

    with ThreadPoolExecutor(5) as pool:
        assert sorted(pool.map(call, range(5))) == [0, 1, 2, 2, 2]


@pytest.mark.parametrize("limit", ["LONGEST", "WAIT"])
def test_a_call_that_neither_submits_nor_ends_keeps_others_for_a_while_only(
    prepare: Prepare, runs: str, limit: str
) -> None:
    """Either its turn ends, or the others wait no more."""
    first, second = (prepare(HURRY.format(f"{limit}=0.2")) for _ in range(2))
    first.ping()
    second.ping()
    assert (waiting(first, runs), waiting(second, runs)) == (0, 0)
    assert waiting(first, runs) == 0  # a further attempt of the step takes a turn of its own


def test_without_a_place_for_the_lock_the_answer_comes_all_the_same(prepare: Prepare, runs: str) -> None:
    Path(runs).touch()  # it is no folder
    gateway = prepare()
    gateway.ping()
    assert waiting(gateway, runs) == 0
