"""Commands in place of Slurm's, which run each job on this machine at once; Dagster runs here, as on a login node."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from shlex import quote

import pytest

from support.agent_fixtures import put
from support.step import kill_all

SBATCH = """\
cd {jobs} && id=$((17 + $(ls | wc -l))) && mkdir $id && basename "$3" >$id/name && cd "$3" || exit
SLURM_JOB_ID=$id setsid sh -c 'echo $$ >"$1/pid"; bash job.sh >>stdout 2>>stderr; touch "$1/over"' - {jobs}/$id \\
  </dev/null >/dev/null 2>&1 &
echo $id"""
SQUEUE = """\
cd {jobs} && for id in *; do
  name=$(cat $id/name)
  [ -e $id/over ] || case "$*" in *%F*) echo "$id|$name" ;; *) echo "$id|RUNNING|None|N/A|$name|p1" ;; esac
done"""
SCONTROL = """\
cd {jobs}/"$4" || {{ echo 'Invalid job id specified' >&2; exit 1; }}
state=RUNNING; [ ! -e over ] || state=COMPLETED; [ ! -e cancelled ] || state=CANCELLED
echo "JobId=$4 JobName=$(cat name) JobState=$state ExitCode=0:0 SubmitTime=1 StartTime=1 EndTime=2" """
SCANCEL = """\
cd {jobs} && for id in *; do
  case " $* " in *" $id "* | *" --name $(cat $id/name) "*) touch $id/cancelled; kill -- -$(cat $id/pid) ;; esac
done"""


class PlayedSlurm:
    """Jobs 17, 18, ... of a deployment whose base path is `base`."""

    def __init__(self, commands: Path, base: Path) -> None:
        self._jobs, self.runs = commands / "jobs", base / "runs"
        self._jobs.mkdir()
        for name, text in {"sbatch": SBATCH, "squeue": SQUEUE, "scontrol": SCONTROL, "scancel": SCANCEL}.items():
            put(commands, name, text.format(jobs=quote(str(self._jobs))))
        put(commands, "sacct", "echo 'Slurm accounting storage is disabled' >&2; exit 1")
        self.variables = {
            "DAGSTER_DEPLOYMENT": "staging_supercomputer",
            "SLURM_SUPERCOMPUTER_SITE": "musica",
            "SLURM_EDGE_NODE_HOST": "localhost",
            "SLURM_DEPLOYMENT_BASE_PATH": str(base),
            "SLURM_PYTHON": sys.executable,
        }

    def names(self) -> list[str]:
        """Names of the jobs that were submitted, the first one first."""
        return [(path / "name").read_text().strip() for path in sorted(self._jobs.iterdir())]

    def cancelled(self) -> list[str]:
        """Ids of the jobs that were cancelled."""
        return [path.name for path in sorted(self._jobs.iterdir()) if (path / "cancelled").exists()]

    def end(self) -> None:
        """End what still runs: a test has failed."""
        for path in self._jobs.iterdir():
            if not (path / "over").exists():
                with suppress(FileNotFoundError, ProcessLookupError):
                    os.killpg(int((path / "pid").read_text()), signal.SIGKILL)


@pytest.fixture
def played_slurm(slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PlayedSlurm]:
    """Settings and commands with which an asset's job runs on this machine."""
    made = PlayedSlurm(slurm, tmp_path / "base")
    for name, value in made.variables.items():
        monkeypatch.setenv(name, value)
    yield made
    kill_all()
    made.end()
