"""Programs of any language and batch scripts as Slurm jobs."""

from pathlib import Path

import pytest

from dagster_sbatch.launchers import BatchScriptLauncher, CommandLauncher
from dagster_sbatch.slurm import SlurmRequest
from slurm_in_a_box import CERTIFICATE_USER, GPU_PARTITION, SimulatedSite
from support.background import nobody_left, rows_of
from support.programs import PICTURE, REPORTS, make
from support.workload_asset import materialize

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("on_supercomputer")]
SHORT = SlurmRequest(time_limit="00:10:00")


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


def test_tasks_of_a_batch_script_have_the_gpus_that_they_have_with_sbatch(
    site: SimulatedSite, workloads: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The lines are those with which `sbatch` on the login node gives each task a GPU of its own."""
    lines = "#!/bin/bash\n  # indented\n#SBATCH--ntasks=4 --gpus-per-task=1 --time=5 --mem=1G\n"
    shows = "srun bash -c 'echo $CUDA_VISIBLE_DEVICES' | sort\n"
    path = workloads / "relax.sbatch"
    path.write_text(lines + shows)
    assert materialize(path, workloads, launcher=BatchScriptLauncher()).error == ""
    assert capfd.readouterr().out == "0\n1\n2\n3\n"
    script = f"{lines}#SBATCH -p {GPU_PARTITION} -q {GPU_PARTITION} -c 2 -o by-hand\n{shows}"
    home = site.layout.home / CERTIFICATE_USER.name
    (home / "by-hand.sbatch").write_text(script.replace("\n", "\n#ASC --vanilla\n", 1))
    site.run_on_login(CERTIFICATE_USER, "sbatch --wait by-hand.sbatch")
    assert (home / "by-hand").read_text() == "0\n1\n2\n3\n"
