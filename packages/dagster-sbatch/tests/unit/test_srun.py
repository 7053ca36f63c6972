"""SrunLauncher's fields, and the parts of its program that need no ranks."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from dagster_pipes import decode_param

from dagster_sbatch.errors import ConfigurationError
from dagster_sbatch.launchers import SrunLauncher
from dagster_sbatch.slurm import SlurmRequest

import one_rank
import ports
import ranks


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"mpi": "pmix v4"}, "write a type that `srun --mpi=list` prints, for instance pmix"),
        ({"cpu_bind": "cores;rm"}, "write what srun's --cpu-bind takes, for instance cores"),
        ({"gpu_bind": ""}, "write what srun's --gpu-bind takes, for instance per_task:1"),
        ({"end_time_limit": 0}, "end_time_limit"),
        ({"mpi_type": "pmix"}, "mpi_type: unknown field"),
    ],
)
def test_wrong_values_are_named(fields: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        SrunLauncher(**fields)


@pytest.mark.parametrize(("bind", "gpus", "needed"), [("per_task:1", 2, 4), ("per_task:2", 4, 8), ("closest", 0, 1)])
def test_too_few_gpus_to_bind(bind: str, gpus: int, needed: int) -> None:
    request = SlurmRequest(ntasks_per_node=4, gpus_per_node=gpus)
    with pytest.raises(ConfigurationError, match=f"Request gpus_per_node={needed}, or let all tasks see all GPUs"):
        SrunLauncher(gpu_bind=bind).check(request)
    SrunLauncher().check(request)


def test_the_site_names_the_mpi_type() -> None:
    assert SrunLauncher().with_site({"srun": {"mpi": "pmix"}}).mpi == "pmix"


def test_dagster_pipes_reads_the_parameter() -> None:
    param = {"path": os.devnull, "include_stdio_in_messages": False}
    assert decode_param(one_rank.encode_param(param)) == param


def test_a_claimed_port_is_for_those_who_reuse_addresses() -> None:
    ((port, claim),) = ports.claim_ports(1).items()
    with claim:
        with socket.socket() as stranger, pytest.raises(OSError, match="in use"):
            stranger.bind(("", port))
        with socket.socket(socket.AF_INET6) as server:  # PyTorch listens on both
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(("", port))
            server.listen()
    with socket.socket() as free:
        free.bind(("", port))


TYPES, VERSIONS = "MPI plugin types are...\n", "specific pmix plugin versions available:"
LISTS = {
    "22.05": f"{TYPES}\tnone\n\tpmi2\n\tpmix\n{VERSIONS} pmix_v4\n",
    "24.11": f"{TYPES}\tpmi2\n\tpmix\n\tnone\n{VERSIONS} pmix_v4,pmix_v5\n",
}


@pytest.mark.parametrize("version", LISTS)
def test_mpi_types_of_srun(version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "list").write_text(LISTS[version])
    (tmp_path / "srun").write_text(f"#!/bin/sh\ncat '{tmp_path}/list' >&2\n")
    (tmp_path / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert ranks.missing_mpi(None) == ranks.missing_mpi("pmi2") == ranks.missing_mpi("pmix_v4") == ""
    assert "srun has no MPI type 'openmpi' on " in ranks.missing_mpi("openmpi")
    assert ", pmix_v4" in ranks.missing_mpi("openmpi")
    assert ". Set SrunLauncher(mpi=...) to one of these." in ranks.missing_mpi("openmpi")


def test_a_rank_that_srun_has_ended_is_not_the_cause(tmp_path: Path) -> None:
    """The one that was killed has recorded nothing."""
    (tmp_path / "failure").write_text('{"rank": "0", "host": "n1", "code": -15, "stderr": []}')
    command = ["sh", "-c", "echo 'srun: error: n2: task 1: Killed' >&2; exit 137"]
    found = ranks.await_starter(command, tmp_path / "failure", "600")
    assert found == (137, "sh ended with exit code 137: srun: error: n2: task 1: Killed")


def test_a_job_that_starts_again_does_not_have_the_failure_of_its_former_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if Slurm does not know that it has started before: its controller has lost the latest state."""

    def run_job(_: object, failure: Path, __: object) -> tuple[int, str]:
        assert not failure.exists()
        failure.touch()
        return 1, "a cause"

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MASTER_PORT", "1")  # the program sets it in this process
    monkeypatch.setattr(ranks, "run_job", run_job)
    monkeypatch.setattr(sys, "argv", ["ranks.py", "job", "--wait=600", "true"])
    assert [ranks.main(), ranks.main()] == [1, 1]


@pytest.mark.parametrize("text", ["", '{"rank": '])
def test_a_failure_that_cannot_be_read_leaves_the_words_of_srun(text: str, tmp_path: Path) -> None:
    failure = tmp_path / "failure"
    failure.write_text(text)
    command = ["sh", "-c", "echo 'srun: error: node lost' >&2; exit 3"]
    assert ranks.await_starter(command, failure, "600") == (3, "sh ended with exit code 3: srun: error: node lost")
    code, cause = ranks.await_starter(["sh", "-c", "kill -KILL $$"], failure, "600")
    assert (code, cause.partition(" (")[0]) == (137, "sh was killed by SIGKILL")


@pytest.mark.parametrize(
    ("ending", "code", "stderr"),
    [
        ("sys.exit(3)", 3, []),
        ("sys.exit('no data')", 1, ["no data"]),
        ("sys.exit()", 0, []),
        ("raise KeyError(7)", 1, ["KeyError: 7"]),
    ],
)
def test_a_rank_with_mpi4py_records_its_failure_itself(
    ending: str, code: int, stderr: list[str], tmp_path: Path
) -> None:
    """Then mpi4py may end all ranks at once."""
    workload, failure = tmp_path / "w.py", tmp_path / "failure"
    workload.write_text(
        f"import sys; assert sys.argv[1:] == ['a b']; assert sys.path[0] == {str(tmp_path)!r}\n{ending}"
    )
    program = Path(one_rank.__file__).with_name("mpi_rank.py")
    command = [sys.executable, str(program), str(failure), str(workload), "a b"]
    done = subprocess.run(command, env={**os.environ, "RANK": "2"}, capture_output=True, check=False)
    assert done.returncode == code
    record = ranks.read_failure(failure)
    found = record and (record["rank"], record["code"], record["stderr"][-1:])
    assert found == (("2", code, stderr) if code else None)


def test_the_exception_is_found_between_lines_of_pytorch() -> None:
    """It labels them, and may warn after the traceback."""
    lines = [
        "[rank3]: Traceback (most recent call last):",
        "[rank3]: ValueError: boom",
        "[rank3]:[W1127] was not called",
    ]
    record = {"rank": "3", "host": "n4002", "code": 1, "stderr": lines}
    _, cause = ranks.explain(record)
    assert cause.startswith("rank 3 on n4002 ended with exit code 1: [rank3]: ValueError: boom\n")


def test_the_first_failure_is_recorded_whole(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "3")
    for code in (1, 2):
        one_rank.record_failure(tmp_path / "failure", code, [])
    record = json.loads((tmp_path / "failure").read_text())
    assert (record["rank"], record["code"]) == ("3", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["failure"]
    one_rank.record_failure(tmp_path / "none" / "failure", 3, [])
    assert "The failure of this rank cannot be recorded" in capfd.readouterr().err
