"""What happens to programs of any language, batch scripts and ranks when their jobs fail: many jobs at once."""

import re
from pathlib import Path
from typing import Any

import pytest

from dagster_sbatch.launchers import BatchScriptLauncher, CommandLauncher, Launcher, ScriptLauncher, SrunLauncher
from dagster_sbatch.slurm import Retries, SlurmRequest
from slurm_in_a_box import CERTIFICATE_USER, SimulatedSite, wait_until
from slurm_in_a_box.machines import MEMORY_CGROUPS
from support.background import MEASURED, Background, attempts_of, go_on, jobs_of, nobody_left, runs_there
from support.programs import foreign_elf, make
from support.ranks import RANK
from support.ray_run import cause_of, nothing_is_left
from support.workload_asset import PIPES, Outcome, materialize

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("on_supercomputer")]
LAUNCHERS: dict[str, Launcher] = {
    "command": CommandLauncher(),
    "batch": BatchScriptLauncher(),
    "script": ScriptLauncher(),
    "srun": SrunLauncher(),
}
"""By the first word of a program's name."""
GO_ON = f"until [ -e {CERTIFICATE_USER.home}/go-on ]; do sleep 0.1; done\n"
BEGUN = 'echo "begun $(basename "$0")"\necho "$SLURM_JOB_ID" >~/"begun $(basename "$0")"\n'
"""Writes the id of the job into a file in the user's home."""
FAILS = "#!/bin/bash\npipes materialize --metadata rows=1\necho 'no licence' >&2\nexit 3\n"
WARNED = 'trap \'echo "warned $(basename "$0")"\' USR1\nsleep 600 & wait; wait\n'
SAVES = """\
trap 'trap "" TERM; sleep 1; pipes log "saved $(basename "$0")"; exit 0' TERM
pipes materialize --metadata rows=1
"""
"""When it is cancelled, it has some seconds. Neither the report nor the exit code counts. The controller repeats its
request to a node that is slow to answer, and each process gets SIGTERM again."""
WAITS = "while :; do sleep 600 & wait $!; done\n"
"""For SIGTERM, which `sleep` and srun may get first."""
LIVES = """\
if [ -z "$SLURM_RESTART_COUNT" ]; then
  pipes materialize --metadata rows=6
  sleep 600
fi
pipes materialize --metadata rows=7
"""
TIME = "it reached its time limit (Slurm: TIMEOUT). It had time_limit='00:01:00'. Request more, for instance "
CANCELLED = "it was cancelled on the cluster, by scancel or by its administrators (Slurm: CANCELLED)"
PROGRAMS: dict[str, tuple[str, list[str]]] = {
    "command-fails": (FAILS, ["command-fails ended with exit code 3", "\nno licence\n"]),
    "command-out-of-time": (f"#!/bin/bash\n{WARNED}", [TIME, "time_limit='00:02:00'"]),
    "command-cancelled": (f"#!/bin/bash\n{SAVES}{BEGUN}{WAITS}", [CANCELLED]),
    "command-cancels-itself": (  # it may end before the job script gets SIGTERM: Slurm's state counts
        '#!/bin/bash\npipes materialize --metadata rows=1\nscancel "$SLURM_JOB_ID"\n',
        [CANCELLED],
    ),
    "command-disconnected": (f"#!/bin/bash\n{BEGUN}{GO_ON}pipes materialize --metadata rows=7\n", []),
    "command-requeued": (f"#!/bin/bash\n{BEGUN}{LIVES}", []),
    "command-without-reports": ("#!/bin/sh\n", []),
    "command-for-another-CPU": ("", ["/command-for-another-CPU was built for ", " Build it for "]),
    "batch-fails": (FAILS, ["batch-fails ended with exit code 3", "\nno licence\n"]),
    "batch-out-of-time": (f"#!/bin/bash\n#SBATCH --time=1\n{WARNED}", [TIME, "time_limit='00:02:00'"]),
    "batch-cancelled": (
        f"#!/bin/bash\n#SBATCH -N 2 --ntasks-per-node=1\n{SAVES}{BEGUN}srun sleep 600 &\n{WAITS}",
        [CANCELLED],
    ),
    "batch-disconnected": (f"#!/bin/bash\n{BEGUN}{GO_ON}srun pipes materialize --metadata rows=7\n", []),
    "batch-with-a-missing-program": (
        "#!/usr/bin/env relax\n",
        ["/batch-with-a-missing-program asks for 'relax' in its first line, and n400", "Load its module, or correct"],
    ),
    "script-out-of-time": (
        f"{PIPES}    import signal, time\n"
        "    signal.signal(signal.SIGUSR1, lambda *_: print('warned script-out-of-time', flush=True))\n"
        "    kept = b'x' * (150 << 20)\n"
        "    time.sleep(600)\n",
        [TIME, "time_limit='00:02:00'", "time limit: 6 s left"],
    ),
    "script-with-more-time": (  # its first attempt reaches the time limit
        f"{PIPES}    import pathlib, time\n"
        "    time.sleep(600 if pathlib.Path.cwd().parent.name.endswith('-1') else 0)\n"
        "    pipes.report_asset_materialization(metadata=dict(rows=7))\n",
        [],
    ),
    "srun-out-of-time": (  # rank 0 alone is warned; rank 3 is on the second node
        f"{RANK}    warned = lambda *_: print('warned srun-out-of-time', flush=True)\n"
        "    if rank == 0: signal.signal(signal.SIGUSR1, warned)\n"
        "    if rank == 3: kept = b'x' * (150 << 20)\n"
        "    time.sleep(600)\n",
        [TIME, "time_limit='00:02:00'"],
    ),
}
"""By name: the program, and what its failure says; nothing if it succeeds."""
if MEMORY_CGROUPS:  # elsewhere the site's Slurm knows processes by their parents alone
    PROGRAMS["command that leaves processes"] = ("#!/bin/bash\nsetsid --fork sleep 600\nsleep 600 &\n", [])


def start(path: Path, **request: Any) -> Background:
    """Run the program with the launcher that its name begins with."""
    launcher = LAUNCHERS[re.split("[- ]", path.name)[0]]
    return Background(lambda: materialize(path, path.parent, launcher=launcher, request=SlurmRequest(**request)))


def most_memory(outcome: Outcome) -> float:
    """MiB of a job that has failed, on one node, as its sampler has measured it until the end."""
    found = re.search(r"memory \S+ at most ([\d.]+) GiB", outcome.failure["usage"])
    assert found, outcome.failure
    return 1024 * float(found[1])


def has_run(site: SimulatedSite, job: int) -> float:
    """For how many seconds, as Slurm says; less than an hour."""
    minutes, _, seconds = site.squeue("--noheader", f"--jobs={job}", "--format=%M").strip().rpartition(":")
    return 60 * int(minutes) + int(seconds)


def test_jobs_that_fail_in_every_way_at_once(
    site: SimulatedSite, workloads: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A result or the reason, one job per run, each line once; and no node has a process or a file of them.

    What they have used until then is known, also of two nodes.
    """
    for name, (text, _) in PROGRAMS.items():
        make(workloads, text, name)
    (workloads / "command-for-another-CPU").write_bytes(foreign_elf())
    requests: dict[str, dict[str, Any]] = {
        "batch-out-of-time": {},
        "command-out-of-time": {"time_limit": "1"},
        "script-out-of-time": {"time_limit": "1"},
        "script-with-more-time": {"time_limit": "1", "retries": Retries(max_time_limit="10")},
        "srun-out-of-time": {"time_limit": "1", "nodes": 2, "ntasks_per_node": 2},
    }
    runs = {name: start(workloads / name, **requests.get(name, {"time_limit": "10"})) for name in PROGRAMS}
    waiting = [name for name, (text, _) in PROGRAMS.items() if BEGUN in text]
    begun = {name: site.layout.home / CERTIFICATE_USER.name / f"begun {name}" for name in waiting}
    wait_until(lambda: all(path.exists() and path.read_text() for path in begun.values()), "all run", 180)
    jobs = {name: int(path.read_text()) for name, path in begun.items()}
    site.faults.drop_connections()
    site.faults.requeue_job(jobs["command-requeued"])
    go_on(site)
    cancelled = jobs["command-cancelled"], jobs["batch-cancelled"]
    listing = ("--noheader", "--steps", f"--jobs={cancelled[1]}", "--format=%i")
    wait_until(lambda: f"{cancelled[1]}.1" in site.squeue(*listing).split(), "the second node has its sampler", 60)
    wait_until(lambda: has_run(site, cancelled[0]) > 10, "the sampler has measured it", 60)
    kill_wait = re.search(r"^KillWait\s*= (\d+) sec", site.cluster.query("scontrol", "show", "config"), re.MULTILINE)
    assert kill_wait
    for job in cancelled:
        site.faults.cancel_job(job)
    listed = ("--noheader", f"--jobs={cancelled[1]}")
    wait_until(lambda: not site.squeue(*listed), "both nodes are left before Slurm kills", int(kill_wait[1]))
    outcomes = {name: run.outcome(240) for name, run in runs.items()}
    for name, (text, texts) in PROGRAMS.items():
        outcome = outcomes[name]
        if texts:
            assert outcome.materializations == {}, name
            assert texts[0] in cause_of(outcome.error), f"{name}: {outcome.error}"
        else:
            rows = outcome.materializations[None][0].get("rows")
            assert (outcome.error, rows) == ("", 7 if "rows=7" in text else None), name
        assert all(each in outcome.error for each in texts), f"{name}: {outcome.error}"
        assert outcome.retries == []
    for name in ("script-out-of-time", "srun-out-of-time"):
        assert 150 <= most_memory(outcomes[name]) < 300, name
        assert outcomes[name].failure["max_rss_mib"] > 150
    assert most_memory(outcomes["command-cancelled"]) < 100
    out, err = capfd.readouterr()
    expected = [f"begun {name}" for name in [*waiting, "command-requeued"]]
    expected += [f"warned {name}" for name in PROGRAMS if "out-of-time" in name]
    assert sorted(out.splitlines()) == sorted(expected)
    assert [err.count(f" - saved {name}-cancelled\n") for name in ("command", "batch")] == [1, 1]
    first, second = attempts_of(outcomes["script-with-more-time"].materializations[None][0])
    assert first["end"] == "it reached its time limit (Slurm: TIMEOUT)"
    assert (second["request"], second["end"]) == ("time_limit=00:02:00", "succeeded")
    assert len(runs_there(site)) == len(PROGRAMS) + 1
    for run in runs_there(site):
        assert len(jobs_of(site, run)) == 1, run
    nothing_is_left(site)
    nobody_left(site)


EATS = "head -c 400M /dev/zero | tail"
MEMORY = {
    "command-in-memory": f"#!/bin/bash\n{EATS}\n",
    "batch-in-memory": f"#!/bin/bash\n#SBATCH --mem=200M\n{EATS}\n",
    "batch-step-in-memory": f"#!/bin/bash\n#SBATCH --mem=200M\nsrun bash -c '{EATS}'\n",
    "script-in-memory": (
        f"{MEASURED}\nkept = b'x' * (100 << 20)\nwait_until_measured(3)\n"
        f"{PIPES}    ballast = bytearray(b'x' * (400 << 20))\n"
    ),
}


@pytest.mark.skipif(not MEMORY_CGROUPS, reason="this machine cannot enforce a job's memory")
def test_jobs_that_run_out_of_memory(site: SimulatedSite, workloads: Path) -> None:
    for name, text in MEMORY.items():
        make(workloads, text, name)
    runs = {name: start(workloads / name, **({} if "batch" in name else {"mem": "200M"})) for name in MEMORY}
    for name, run in runs.items():
        outcome = run.outcome()
        cause = cause_of(outcome.error)
        assert cause.startswith(f"it ran out of memory {'on n400' if 'step' in name else '(Slurm: OUT_OF_MEMORY)'}"), (
            name
        )
        assert ". It had mem='200M'. Request more, for instance mem='300M'" in cause, name
        assert outcome.retries == []
        if name == "script-in-memory":
            assert 100 <= most_memory(outcome) <= 205  # of 200
    nothing_is_left(site)
    nobody_left(site)
