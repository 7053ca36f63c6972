"""A gateway agent that dies at any step of a submission: one job is submitted, and all of its output comes."""

from functools import partial
from pathlib import Path

import pytest

from dagster_sbatch.slurm import SlurmRequest, allocate, load_site, render_job_script
from dagster_sbatch.slurm.gateway import Gateway, StoppedError
from support.agent_fixtures import HURRIED, Prepare, put
from support.background import STRESS

KILLED = """
import os, sys
def spoil():
    vars(sys.modules["agent.jobs"]).update(LATE=0.6, SEARCH_EVERY=0.2)
    if not os.path.exists({mark!r}):
        sys.addaudithook(watch)
steps = 0
def watch(event, args):
    global steps
    writes = event == "open" and (args[2] or 0) & (os.O_CREAT | os.O_WRONLY | os.O_RDWR)
    changes = writes or event in ("os.rename", "os.symlink", "os.remove", "os.mkdir", "os.utime")
    if event == "subprocess.Popen" or (changes and {runs!r} in str(args) and ".queue-" not in str(args)):
        steps += 1
        if steps == {step}:
            os.close(os.open({mark!r}, os.O_CREAT))
            os._exit(9)
"""
"""Ends the agent before a step, which changes a file beside the runs or starts a command, unless the mark exists."""
SBATCH = """\
basename "$3" >>"{slurm}/jobs"
echo "$3" >"{slurm}/part" && mv "{slurm}/part" "{slurm}/run"
echo 17"""
SQUEUE = """\
case "$*" in *%F*) exec sed 's/^/17|/' "{slurm}/jobs" ;; esac
SLURM_JOB_ID=17 setsid sh -c 'mv "{slurm}/run" "{slurm}/begun" || exit; cd "$(cat "{slurm}/begun")"
bash job.sh >>stdout; echo >"{slurm}/over"' </dev/null >/dev/null 2>&1 &"""
"""The job begins when an agent that follows it asks for the queue: before, only Slurm knows of it. An agent that ends
kills its squeue; the job begins in a session of its own, or with the next squeue."""
SCONTROL = """\
[ -e "{slurm}/over" ] && state=COMPLETED || state=RUNNING
echo "JobName=$(head -n 1 "{slurm}/jobs") JobState=$state ExitCode=0:0 SubmitTime=1 StartTime=1 EndTime=2" """


def files_of(name: str) -> dict[str, str]:
    site = load_site({}, "musica")
    request = allocate(SlurmRequest(), site).request
    script = render_job_script(request, site, job_name=name, about={}, environment={}, body="echo done")
    return {"job.sh": script, "sampler/sampler.py": ""}


def follow(gateway: Gateway, runs: Path, token: str, said: bytearray) -> int | None:
    """Claim the family, and submit or adopt its latest attempt as a step does; return its exit code."""
    while (claim := gateway.claim(str(runs), "family", token, token)).held_by:
        pass
    adopt = any(not attempt.over or attempt.ends for attempt in claim.attempts)
    name = f"family-{claim.number if adopt else claim.number + 1}"
    return gateway.run(str(runs / name), None if adopt else files_of(name), {"stdout": said.extend}, "run").code


def stop(gateway: Gateway, _: str) -> None:
    gateway.stop.set()


@pytest.mark.timeout(900)
@pytest.mark.parametrize("client", ["the same", "another"])
def test_an_agent_is_killed_at_every_step_of_a_submission(
    client: str, prepare: Prepare, slurm: Path, tmp_path: Path
) -> None:
    """Its client continues with another agent, or is killed with it: then another client claims its runs (STRESS=1)."""
    for name, text in {"sbatch": SBATCH, "squeue": SQUEUE, "scontrol": SCONTROL}.items():
        put(slurm, name, text.format(slurm=slurm).replace("EndTime=2", "EndTime=1000"))  # the accounting is asked
    put(slurm, "sacct", "echo '17|COMPLETED||'")
    mark, jobs, step, killed = tmp_path / "mark", slurm / "jobs", 1, True
    while killed:
        base, said = tmp_path / f"step-{step}", bytearray()
        base.mkdir(mode=0o700)
        jobs.write_text("")
        for each in (mark, slurm / "over"):
            each.unlink(missing_ok=True)
        gateway = prepare(HURRIED + KILLED.format(runs=f"{base}/runs", mark=str(mark), step=step))
        try:
            if client == "another":
                gateway.on_trouble = partial(stop, gateway)
            code = follow(gateway, base / "runs", "token 1", said)
        except StoppedError:
            said.clear()
            gateway.close()
            gateway = prepare(HURRIED)
            code = follow(gateway, base / "runs", "token 2", said)
        gateway.close()
        killed = mark.exists()
        assert (code, bytes(said), len(jobs.read_text().splitlines())) == (0, b"done\n", 1), (
            f"killed before step {step}"
        )
        step += 1 if STRESS else 4
    assert step > 35
