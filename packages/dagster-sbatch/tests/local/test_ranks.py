"""SrunLauncher in `development`: as many processes of this machine, with all that can be wrong with one of them."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dagster_sbatch import JobArray
from dagster_sbatch.launchers import SrunLauncher
from dagster_sbatch.run.local import LocalProcess
from dagster_sbatch.slurm import SlurmRequest
from slurm_in_a_box import wait_until
from support.array_asset import ArrayAsset
from support.dagster_dev import gone
from support.ranks import MPI, RANK, RENDEZVOUS
from support.workload_asset import Outcome, materialize

import one_rank

pytestmark = pytest.mark.local
FOUR = SlurmRequest(nodes=2, ntasks_per_node=2)


def run(workload: str, folder: Path, launcher: SrunLauncher | None = None, request: SlurmRequest = FOUR) -> Outcome:
    return materialize(workload, folder, launcher=launcher or SrunLauncher(), request=request, extras={"name": "probe"})


def test_ranks_find_each_other_and_rank_0_reports(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    outcome = run(RENDEZVOUS, tmp_path)
    assert outcome.error == ""
    words = [word.split() for word in outcome.materializations[None][0]["words"]]
    threads = str(max((os.cpu_count() or 1) // 4, 1))
    assert [(word[:2], word[4:]) for word in words] == [([n, n], ["probe", threads]) for n in "0123"]
    lines = capfd.readouterr().out.splitlines()
    assert sorted(lines) == ["[rank 1] a line of 1", "[rank 2] a line of 2", "[rank 3] a line of 3", "a line of 0"]


def test_each_rank_has_a_gpu_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    outcome = run(
        RENDEZVOUS, tmp_path, SrunLauncher(gpu_bind="per_task:1"), SlurmRequest(ntasks_per_node=2, gpus_per_node=2)
    )
    assert outcome.error == ""
    assert [word.split()[3] for word in outcome.materializations[None][0]["words"]] == ["4", "5"]


FAILURES: dict[str, tuple[str, SrunLauncher, list[str]]] = {
    "raises, and others fail as a result": (
        RANK
        + "    if rank == 2: raise ValueError('boom')\n"
        + "    while not [*pathlib.Path().glob('rank-failure-*')]: time.sleep(0.02)\n"
        + "    raise ConnectionError('rank 2 is gone')\n",
        SrunLauncher(),
        ["rank 2 on ", " ended with exit code 1: ValueError: boom", "Last lines of stderr of rank 2:\nTraceback"],
    ),
    "is killed": (
        RANK + "    if rank == 0: os.kill(os.getpid(), signal.SIGSEGV)\n    time.sleep(600)\n",
        SrunLauncher(),
        ["rank 0 on ", " was killed by SIGSEGV"],
    ),
    "loses the process that waits for it": (
        RANK + "    if rank == 2: os.kill(os.getppid(), signal.SIGKILL)\n    time.sleep(600)\n",
        SrunLauncher(),
        ["the process that started rank 2 was killed by SIGKILL", "memory"],
    ),
    "is the last one, and loses the process that waits for it": (
        RANK
        + "    starter = pathlib.Path(f'/proc/{os.getppid()}/stat').read_text().split()[3]\n"
        + "    children = pathlib.Path(f'/proc/{starter}/task/{starter}/children')\n"
        + "    while rank == 2 and children.read_text().split() != [str(os.getppid())]: time.sleep(0.05)\n"
        + "    if rank == 2: os.kill(os.getppid(), signal.SIGKILL)\n",
        SrunLauncher(),
        ["the process that started rank 2 was killed by SIGKILL"],
    ),
    "hangs at the end": (
        RANK + "    if rank != 2: time.sleep(600)\n    pipes.report_asset_materialization()\n",
        SrunLauncher(end_time_limit=1),
        ["rank 0,1,3 still ran 1 s after another rank had ended", "raise SrunLauncher(end_time_limit=...)"],
    ),
    "hangs at the end, and ignores that it is to end": (
        RANK + "    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n    if rank: time.sleep(600)\n",
        SrunLauncher(end_time_limit=1),
        ["rank 1,2,3 still ran 1 s after another rank had ended"],
    ),
    "fails in MPI": (
        # mpi4py kills all processes; the one that reads the output of this rank may not have read anything until then.
        f"import os, signal\n{MPI}if world.rank == 2:\n"
        "    os.kill(os.getppid(), signal.SIGSTOP); raise ValueError('no data')\nworld.barrier()\n",
        SrunLauncher(mpi="pmix"),
        ["rank 2 on ", " ended with exit code 1: ValueError: no data", "Last lines of stderr of rank 2:\nTraceback"],
    ),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_rank(name: str, tmp_path: Path) -> None:
    workload, launcher, texts = FAILURES[name]
    outcome = run(workload, tmp_path, launcher)
    assert not outcome.success
    assert f"Failure: probe: {texts[0]}" in outcome.error
    for text in texts:
        assert text in outcome.error
    assert outcome.materializations == {}


def test_a_rank_whose_output_is_read_late_loses_none_of_it(tmp_path: Path) -> None:
    workload = tmp_path / "w.py"
    (tmp_path / "work").mkdir()
    workload.write_text("for number in range(3_000): print('a line with the number', number)\n")
    command = [sys.executable, "-I", str(one_rank.__file__), str(tmp_path / "failure"), str(workload)]
    variables = {**os.environ, "RANK": "1", "WORLD_SIZE": "2"}
    with subprocess.Popen(command, cwd=tmp_path, env=variables, stdout=subprocess.PIPE) as rank:
        with pytest.raises(subprocess.TimeoutExpired):
            rank.wait(one_rank.DRAIN_SECONDS + 1)
        output, _ = rank.communicate()
    assert rank.returncode == 0
    assert output.decode().splitlines() == [f"[rank 1] a line with the number {n}" for n in range(3_000)]


def test_tasks_of_an_array_with_two_ranks_each(tmp_path: Path) -> None:
    workload = """
    import os
    assert os.environ["WORLD_SIZE"] == "2"
    if pipes.extras["lr"] == 2 and os.environ["RANK"] == "1":
        raise ValueError("boom")
    if pipes.extras["lr"] == 1:
        pipes.report_asset_materialization()
    """
    array = JobArray(tasks={"one": {"lr": 1}, "two": {"lr": 2}})
    asset = ArrayAsset(
        tmp_path, workload, array, partitions=None, launcher=SrunLauncher(), request=SlurmRequest(ntasks_per_node=2)
    )
    outcome = asset.run()
    assert "rank 1 on " in outcome.error
    assert " ended with exit code 1: ValueError: boom" in outcome.error
    asset.array = JobArray(tasks={"one": {"lr": 1}})
    assert asset.run().error == ""


def test_more_tasks_than_cores(tmp_path: Path) -> None:
    outcome = run(RANK, tmp_path, request=SlurmRequest(ntasks_per_node=200))
    assert "probe: ntasks_per_node=200: a node of partition zen4_0768 gives a job 190 CPUs" in outcome.error


def test_mpiexec_starts_an_mpi_program(tmp_path: Path) -> None:
    outcome = run(MPI, tmp_path, SrunLauncher(mpi="pmix"))
    assert outcome.error == ""
    (metadata,) = outcome.materializations[None]
    assert (metadata["total"], len(metadata["nodes"])) == (6, 4)


def test_a_machine_without_mpiexec(tmp_path: Path) -> None:
    command = SrunLauncher(mpi="pmix").local_command(FOUR, ["w.py"])
    command[0] = f"{sys.base_prefix}/bin/python3"  # the MPI of the tests is in their environment
    (tmp_path / "work").mkdir()
    done = subprocess.run(command, cwd=tmp_path / "work", env={"PATH": str(tmp_path)}, check=False)
    assert done.returncode == 1
    assert "Install an MPI:\npip install mpich" in (tmp_path / "cause").read_text()


def test_open_mpi_may_start_more_ranks_than_there_are_cores(tmp_path: Path) -> None:
    """Unless the user has set something else."""
    mpiexec, own = tmp_path / "mpiexec", "PRTE_MCA_rmaps_default_mapping_policy"
    mpiexec.write_text("#!/bin/sh\nenv | grep _MCA_rmaps_ >variables\n")
    mpiexec.chmod(0o755)
    command = SrunLauncher(mpi="pmix").local_command(FOUR, ["w.py"])
    command[0] = f"{sys.base_prefix}/bin/python3"
    (tmp_path / "work").mkdir()
    variables = {"PATH": f"{tmp_path}:/usr/bin:/bin", own: "core"}
    subprocess.run(command, cwd=tmp_path / "work", env=variables, check=True)
    found = sorted((tmp_path / "variables").read_text().splitlines())
    assert found == ["OMPI_MCA_rmaps_base_oversubscribe=true", f"{own}=core"]


def test_ranks_that_are_terminated_save_their_state_and_are_gone(tmp_path: Path) -> None:
    workload = tmp_path / "w.py"
    workload.write_text(
        "import os, pathlib, signal, subprocess, time\n"
        "child = subprocess.Popen(['sleep', '600'], start_new_session=True)\n"
        "def save(*_):\n    pathlib.Path('saved-' + os.environ['RANK']).touch(); raise SystemExit(3)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "path = pathlib.Path('pids-' + os.environ['RANK'])\n"
        "path.with_suffix('.part').write_text(f'{os.getpid()} {child.pid}'); path.with_suffix('.part').rename(path)\n"
        "while True: time.sleep(0.1)\n"
    )
    stop, run, directory = threading.Event(), tmp_path / "run", tmp_path / "run" / "work"
    run.mkdir()

    def terminate() -> None:
        wait_until(lambda: all((directory / f"pids-{n}").exists() for n in range(4)), "the ranks run", 60)
        stop.set()

    threading.Thread(target=terminate).start()
    command = SrunLauncher().local_command(FOUR, [str(workload)])
    ended = LocalProcess(command, os.environ, run, {}).run(stop)
    assert ended.exit_code == 3
    assert all((directory / f"saved-{n}").exists() for n in range(4))
    pids = [int(pid) for n in range(4) for pid in (directory / f"pids-{n}").read_text().split()]
    wait_until(lambda: all(map(gone, pids)), "its processes have ended")
