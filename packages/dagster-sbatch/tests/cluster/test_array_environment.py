"""The environment of tasks: that of a login, which the agent reads once per array job, and Slurm for no task."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from dagster_sbatch.auth import ensure_certificate
from dagster_sbatch.settings import Settings
from dagster_sbatch.slurm import SlurmRequest, allocate, render_job_script
from dagster_sbatch.slurm.gateway import Gateway, JobToFollow, choose_channel, follow_jobs
from resources import PROJECT
from slurm_in_a_box import CERTIFICATE_USER, SimulatedSite
from support.array_run import RUNS, Recorder, files_of, new_key

pytestmark = pytest.mark.cluster
SITE = PROJECT.load_site("musica")
SHOW = 'env -0 >environment; echo "$HOSTNAME"; of_user'
PROFILE = """\
echo 17; echo "a welcome" >&2
echo "$(uname -n)" >>~/read
export OF_PROFILE='a = ä' PATH=/of/profile:$PATH HOSTNAME SBATCH_PARTITION=nosuch SLURM_NTASKS=99 SQUEUE_FORMAT=x
of_user() { echo "a function of the user"; }
export -f of_user
false
"""
OF_EACH = ("SLURM", "SBATCH", "SQUEUE", "DAGSTER_PIPES_", "SHLVL=", "MAIL=", "_=", "PWD=", "OLDPWD=")
"""Of variables that may differ between two jobs: for Slurm's commands, of each shell, and of `su`."""


@pytest.fixture
def gateway(site: SimulatedSite, client_home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gateway]:
    monkeypatch.setenv("HOME", str(client_home))
    settings = Settings.model_validate(site.environment())
    made = Gateway(choose_channel(settings, ["python3"], ensure_certificate))
    yield made
    made.close()


def run_single(gateway: Gateway) -> str:
    """Run a single job; return its run directory."""
    key = new_key()
    request = allocate(SlurmRequest(time_limit="5"), SITE, qos="zen4_0768").request
    environment = {"PYTHON": "/usr/bin/python3"}
    script = render_job_script(request, SITE, job_name=key, about={}, environment=environment, body=SHOW)
    assert gateway.run(f"{RUNS}/{key}", {"job.sh": script}, {}, "a-run").code == 0
    return f"{RUNS}/{key}"


def environment(site: SimulatedSite, folder: str) -> list[str]:
    path = site.layout.home / Path(folder).relative_to("/home") / "environment"
    return sorted(path.read_text().split("\0"))


def test_a_task_has_the_environment_of_a_single_job(gateway: Gateway, site: SimulatedSite) -> None:
    """The profile prints, fails, and exports what would change the submission or belongs to the login node."""
    home = site.layout.home / CERTIFICATE_USER.name
    (home / ".bash_profile").write_text(PROFILE)
    key = new_key()
    run = JobToFollow(f"{RUNS}/{key}", files_of(SITE, key, SHOW, 4), range(4))
    seen = Recorder(run)
    follow_jobs(gateway, seen, "run-1")
    assert seen.outcomes == dict.fromkeys(range(4), ("COMPLETED", 0))
    (login_node,) = (home / "read").read_text().split()
    assert login_node.startswith("l"), "the profile was read once, on the login node"
    single = environment(site, run_single(gateway))
    for task in range(4):
        found = environment(site, f"{run.run}/tasks/{task}")
        assert [each for each in found if not each.startswith(OF_EACH)] == [
            each for each in single if not each.startswith(OF_EACH)
        ]
        assert f"HOME={CERTIFICATE_USER.home}" in found
        assert f"DATA={CERTIFICATE_USER.data}" in found
        assert {"OF_PROFILE=a = ä", 'BASH_FUNC_of_user%%=() {  echo "a function of the user"\n}'} <= set(found)
        assert "SLURM_NTASKS=1" in found
        others = ("SBATCH", "SQUEUE", "SLURM_TIME_FORMAT", "SLURM_BITSTR_LEN")
        assert not [each for each in found if each.startswith(others)]
        assert seen.text(task).splitlines() == [*seen.starts[task], "a function of the user"]
