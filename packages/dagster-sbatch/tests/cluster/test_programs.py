"""Programs of any language and batch scripts as Slurm jobs."""

import os
import shutil
from pathlib import Path

import pytest

from dagster_sbatch.launchers import BatchScriptLauncher, CommandLauncher
from dagster_sbatch.slurm import SlurmRequest
from slurm_in_a_box import CERTIFICATE_USER, SimulatedSite, wait_until
from slurm_in_a_box.machines import MEMORY_CGROUPS
from support.background import (
    Background,
    go_on,
    jobs_of,
    nobody_left,
    one_job_did_it,
    only_job,
    output_there,
    rows_of,
    runs_there,
)
from support.programs import PICTURE, REPORTS, make
from support.step import Step, kill
from support.workload_asset import materialize

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("on_supercomputer")]
SHORT = SlurmRequest(time_limit="00:10:00")
WAITS = f"""\
#!/bin/bash
pipes log begun
echo begun
until [ -e {CERTIFICATE_USER.home}/go-on ]; do sleep 0.1; done
pipes materialize --metadata rows=7
"""


@pytest.mark.smoke
def test_a_script_reports_by_the_command_pipes(
    site: SimulatedSite, workloads: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its helper is executable there too, and nothing can write into the folder of the code."""
    (workloads / "plot.png").write_bytes(PICTURE)
    make(workloads, '#!/bin/sh\necho "helped by $(basename "$0")"\n', "helper")
    text = 'cd "$(dirname "$0")"\n./helper\n(echo x >>plot.png) 2>/dev/null && exit 9\nset -- plot.png "$@"\n'
    path = make(workloads, REPORTS.replace("set -eu\n", f"set -eu\n{text}"))
    outcome = materialize(
        path, workloads, launcher=CommandLauncher(), request=SHORT, args=["a b"], extras={"trials": 3}, checks=("fine",)
    )
    assert outcome.error == ""
    (metadata,) = outcome.materializations[None]
    assert (metadata["rows"], metadata["share"], metadata["where"]) == (12, 0.5, "0123")
    assert metadata["plot"].startswith("![plot](data:image/png;base64,iVBOR")
    assert metadata["node"].startswith("n400")
    assert outcome.checks == {"fine": True}
    out, err = capfd.readouterr()
    assert out == "helped by helper\narguments: plot.png a b\n3\n"
    assert "half of it" in err
    nobody_left(site)


def test_a_batch_script_runs_unchanged_on_its_nodes(
    site: SimulatedSite, workloads: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its srun starts tasks as in a job of its own, and they may report; what it writes is in the run directory."""
    (workloads / "input.txt").write_text("5\n")
    path = workloads / "relax.sbatch"
    path.write_text(
        "#!/bin/bash -e\n#SBATCH -N 2 --ntasks-per-node=1 -J relax\n#SBATCH --time=8 --mem=100M\n"
        "export RANKS=2\ncd $SLURM_SUBMIT_DIR\n"
        "srun bash -c 'pipes log \"rank $SLURM_PROCID\" && echo $(uname -n) of $RANKS' | sort >nodes\n"
        'pipes materialize --metadata rows=$(cat input.txt) --metadata nodes="$(xargs <nodes)"\n'
    )
    outcome = materialize(path, workloads, launcher=BatchScriptLauncher(), request=SlurmRequest(time_limit="5"))
    assert outcome.error == ""
    (metadata,) = outcome.materializations[None]
    assert metadata["rows"] == 5
    nodes = metadata["nodes"].split()
    assert nodes[1::3] == ["of", "of"]
    assert nodes[2::3] == ["2", "2"]
    assert len(set(nodes[::3])) == 2
    err = capfd.readouterr().err
    assert all(f" - rank {rank}\n" in err for rank in (0, 1))
    (row,) = rows_of(site, "%D %l", f"--jobs={metadata['job_id']}")
    assert row == ["2", "5:00"]
    shown = site.run_on_login(CERTIFICATE_USER, f"cat {metadata['run_directory']}/work/nodes").stdout
    assert shown.split() == nodes


def test_the_exit_code_alone_decides(site: SimulatedSite, workloads: Path) -> None:
    good = make(workloads, "#!/bin/sh\nexit 0\n")
    one_job_did_it(site, materialize(good, workloads, launcher=CommandLauncher(), request=SHORT))
    bad = make(workloads, "#!/bin/sh\npipes materialize --metadata rows=1\necho 'no licence' >&2\nexit 3\n", "bad.sh")
    outcome = materialize(bad, workloads, launcher=CommandLauncher(), request=SHORT)
    assert "bad.sh ended with exit code 3" in outcome.error
    assert "no licence" in outcome.error
    assert outcome.materializations == {}


def test_a_program_for_another_cpu_says_so(workloads: Path) -> None:
    path = workloads / "model"
    head = bytearray(Path(str(shutil.which("true"))).read_bytes()[:4096])
    head[18:20] = (0xB7 if os.uname().machine != "aarch64" else 0x3E).to_bytes(2, "little")
    path.write_bytes(head)
    path.chmod(0o755)
    outcome = materialize(path, workloads, launcher=CommandLauncher(), request=SHORT)
    assert "probe: " in outcome.error
    assert "/model was built for " in outcome.error


def test_its_job_is_adopted_after_a_kill(site: SimulatedSite, tmp_path: Path, on_supercomputer: dict[str, str]) -> None:
    variables = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
    step = Step(tmp_path / "step", {**variables, **on_supercomputer}, WAITS)
    step.call(launcher="CommandLauncher")
    (tmp_path / "step" / "workloads" / "workload.py").chmod(0o755)
    first = step.start(again=False)
    job = only_job(site, "RUNNING")
    wait_until(lambda: "begun" in output_there(site), "it runs", 60)
    kill(first)
    second = step.start(again=True)
    wait_until(lambda: f"Slurm job {job} was submitted by an earlier run" in step.log, "the second follows", 60)
    go_on(site)
    success, error, metadata = step.result(second)
    assert (success, error, metadata["rows"], metadata["job_id"]) == (True, "", 7, job)
    assert step.output == "begun\n"
    (run,) = runs_there(site)
    assert jobs_of(site, run) == [str(job)]


FIRST_LIFE = """\
#!/bin/bash
if [ -z "$SLURM_RESTART_COUNT" ]; then
  pipes materialize --metadata rows=6
  echo begun
  sleep 600
fi
echo begun again
pipes materialize --metadata rows=7
"""


def test_a_lost_connection_and_a_new_start_lose_and_double_nothing(
    site: SimulatedSite, workloads: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = make(workloads, FIRST_LIFE)
    run = Background(lambda: materialize(path, workloads, launcher=CommandLauncher(), request=SHORT))
    wait_until(lambda: "begun" in output_there(site), "it runs", 60)
    site.faults.drop_connections()
    site.faults.requeue_job(only_job(site, "RUNNING"))
    outcome = run.outcome(240)
    one_job_did_it(site, outcome)
    assert outcome.materializations[None][0]["rows"] == 7
    assert capfd.readouterr().out == "begun\nbegun again\n"


def test_a_cancelled_job(site: SimulatedSite, workloads: Path) -> None:
    path = make(workloads, WAITS)
    run = Background(lambda: materialize(path, workloads, launcher=CommandLauncher(), request=SHORT))
    wait_until(lambda: "begun" in output_there(site), "it runs", 60)
    site.faults.cancel_job(only_job(site, "RUNNING"))
    assert "it was cancelled on the cluster" in run.outcome().error


@pytest.mark.skipif(not MEMORY_CGROUPS, reason="this machine cannot enforce a job's memory")
def test_out_of_memory(workloads: Path) -> None:
    path = make(workloads, "#!/bin/bash\nhead -c 400M /dev/zero | tail\n")
    outcome = materialize(
        path, workloads, launcher=CommandLauncher(), request=SlurmRequest(mem="200M", time_limit="00:10:00")
    )
    assert "it ran out of memory (Slurm: OUT_OF_MEMORY). It had mem='200M'" in outcome.error


def test_out_of_time_is_announced_to_a_script_that_traps_the_signal(workloads: Path) -> None:
    path = make(workloads, "#!/bin/bash\ntrap 'echo warned >&2' USR1\nsleep 600 & wait; wait\n")
    outcome = materialize(path, workloads, launcher=CommandLauncher(), request=SlurmRequest(time_limit="00:01:00"))
    assert "it reached its time limit (Slurm: TIMEOUT). It had time_limit='00:01:00'" in outcome.error
    assert "\nwarned" in outcome.error
