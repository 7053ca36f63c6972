"""Run a workload as several ranks, and report why one of them has failed.

usage: ranks.py job OPTIONS COMMAND...     on the first node of a job: start the ranks with srun and these options of it
       ranks.py local OPTIONS COMMAND...   on a laptop: start them as processes of this machine

Starts in the run directory, on a laptop in the folder `work` of it, with the folder of this file on Python's path. It
claims MASTER_PORT, starts one_rank.py once per rank, and writes the file `cause` if a rank fails. COMMAND contains
Python's arguments.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import Any

from one_rank import POLL_SECONDS, STDERR, WORK, Output, leave_signals_to_the_workload, shell_code
from ports import claim_ports

_RANK = Path(__file__).with_name("one_rank.py")
GRACE_SECONDS = 5.0  # between SIGTERM and SIGKILL for local ranks
NO_CONTAINER = ("container: ", "FATAL: ")
"""Beginnings of lines of start.sh and of apptainer, if a rank cannot start in its container."""
RANK_SHELL = """\
HOSTNAME=$SLURMD_NODENAME # Slurm passes on that of the first node
set_temporary_folder
JOB_TMPDIR=$TMPDIR
pre_start
run_python -I "$@"
"""
NO_MPIEXEC = """\
There is no mpiexec on this machine. It starts the ranks of SrunLauncher(mpi=...) in `development`. Install an MPI:
pip install mpich"""
MORE_RANKS_THAN_CORES = {
    "OMPI_MCA_rmaps_base_oversubscribe": "true",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}
"""Open MPI 4 and 5 refuse that without these; MPICH does not read them."""
_EXCEPTION = re.compile(r"(\[rank ?\d+\]:? )*[A-Za-z_][\w.]*(Error|Exception|Exit|Interrupt)\b")
"""Begins the line with which Python's tracebacks end; an MPI or PyTorch may say more after it. PyTorch writes
`[rank3]: ` before each line."""
_STILL_RUNNING = re.compile(r"tasks? ([0-9,-]+): running")
"""What srun says of tasks when its --wait is over, before it kills them (Slurm 22.05 to 24.11)."""


def main() -> int:
    """Return the exit code of the job."""
    role, *words = sys.argv[1:]
    options = dict(word[2:].split("=", 1) for word in takewhile(lambda word: word.startswith("--"), words))
    command = words[len(options) :]
    if role == "local":
        os.chdir("..")
    Path(WORK).mkdir(exist_ok=True)
    failure = Path(f"rank-failure-{time.time_ns()}").absolute()  # not that of a former start
    ((port, claim),) = claim_ports(1).items()
    with claim:
        os.environ["MASTER_PORT"] = str(port)
        code, cause = run_job(options, failure, command) if role == "job" else run_here(options, failure, command)
    if cause:
        try:
            Path("cause").write_text(cause)
        except OSError as error:  # the exit code counts all the same
            print(f"{cause}\nThis cause cannot be recorded: {error}", file=sys.stderr)
    return code


def rank_command(options: Mapping[str, str], failure: Path, command: Sequence[str]) -> list[str]:
    """Return Python's arguments for one rank."""
    return [str(_RANK), *(["--mpi"] if "mpi" in options else []), str(failure), *command]


# On the first node of a job


def run_job(options: Mapping[str, str], failure: Path, command: Sequence[str]) -> tuple[int, str]:
    """Run the ranks with srun; return the exit code and, if it is not 0, the cause."""
    problem = missing_mpi(options.get("mpi"))
    if problem:
        print(problem, file=sys.stderr)
        return 1, problem
    os.environ["MASTER_ADDR"] = socket.gethostname()
    step = [f"--{name}={value}" for name, value in options.items()]
    ranks = ["bash", "-c", RANK_SHELL, "-", *rank_command(options, failure, command)]
    srun = ["srun", "--export=ALL", "--input=none", "--kill-on-bad-exit=1", *step, *ranks]
    return await_starter(srun, failure, options["wait"])


def await_starter(command: Sequence[str], failure: Path, limit: str) -> tuple[int, str]:
    """Run srun or mpiexec to its end; return the exit code and, if it is not 0, the cause."""
    starter = subprocess.Popen(command, stderr=subprocess.PIPE)
    output = Output(starter.stderr, STDERR)
    code = starter.wait()
    output.drain()
    if code == 0:
        return 0, ""
    record, said = read_failure(failure), "\n".join(output.lines)
    if record and (record["code"] != -signal.SIGTERM or ": Killed" not in said):  # else srun has ended that one
        return explain(record, out_of_memory="Out Of Memory" in said)
    late = next(filter(None, map(_STILL_RUNNING.search, output.lines)), None)
    if late:
        return 1, explain_late(late[1], limit)
    # A workload that calls MPI_Abort itself kills all processes of the job, also those that record failures.
    words = [line for line in output.lines if _EXCEPTION.match(line)][:1]
    words = words or [line for line in output.lines if line.startswith(NO_CONTAINER)][:1]
    words = words or [line for line in output.lines if line.startswith(("srun:", "slurmstepd:"))]
    said = "\n".join(words) or "its output may say why"
    return shell_code(code), f"{Path(command[0]).name} {name_exit(code)}: {said}"


def missing_mpi(mpi: "str | None") -> str:
    """Return what is wrong with an MPI type of srun; empty if it has it."""
    if mpi is None:
        return ""
    listed = subprocess.run(["srun", "--mpi=list"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    text = listed.stdout.decode(errors="replace").split("...")[-1]
    words = text.replace("specific pmix plugin versions available:", "").replace(",", " ").split()
    if mpi in words:
        return ""
    found = f"srun has no MPI type {mpi!r} on {socket.gethostname()}. It has {', '.join(words)}."
    return f"{found} Set SrunLauncher(mpi=...) to one of these."


# On a laptop


def run_here(options: Mapping[str, str], failure: Path, command: Sequence[str]) -> tuple[int, str]:
    """Run the ranks as processes of this machine; return the exit code and, if it is not 0, the cause."""
    leave_signals_to_the_workload()
    count = int(options["ntasks"])
    rank = [sys.executable, "-I", *rank_command(options, failure, command)]
    threads = str(max((os.cpu_count() or 1) // count, 1))
    os.environ.update(MASTER_ADDR="127.0.0.1", WORLD_SIZE=str(count))
    os.environ.setdefault("OMP_NUM_THREADS", threads)
    if "mpi" in options:
        beside = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
        mpiexec = shutil.which("mpiexec", path=beside)
        if mpiexec is None:
            return 1, NO_MPIEXEC
        for name, value in MORE_RANKS_THAN_CORES.items():
            os.environ.setdefault(name, value)
        return await_starter([mpiexec, "-n", str(count), *rank], failure, options["wait"])
    gpus = [] if options["gpu-bind"] == "none" else local_gpus()
    ranks = []
    for number in range(count):
        own = {"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]} if gpus else {}  # else what this machine has
        ranks.append(subprocess.Popen(rank, env={**os.environ, "RANK": str(number), **own}))
    late, failed = await_ranks(ranks, float(options["wait"]))
    record = read_failure(failure)  # before others fail as a result
    if late or failed:
        end(ranks)
    if late:
        return 1, explain_late(",".join(map(str, late)), options["wait"])
    if record:
        return explain(record)
    if failed:
        number, code = failed
        return shell_code(code), f"the process that started rank {number} {name_exit(code)}; its output may say why"
    return 0, ""


def local_gpus() -> list[str]:
    """Return the GPUs of this machine that this process can see, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return named.split(",")
    return [str(number) for number in range(len(list(Path("/dev").glob("nvidia[0-9]*"))))]


def await_ranks(
    ranks: "Sequence[subprocess.Popen[bytes]]", seconds: float
) -> "tuple[list[int], tuple[int, int] | None]":
    """Wait until all ranks have ended, until one has failed, or until a time after the first one has ended.

    Returns the ranks that still ran at that time; the rank that has failed and its exit code, None if none has.
    """
    first = None
    while True:
        codes = [process.poll() for process in ranks]
        failed = next(((rank, code) for rank, code in enumerate(codes) if code), None)
        left = [rank for rank, code in enumerate(codes) if code is None]
        if failed or not left:
            return [], failed
        if first is None and len(left) < len(ranks):
            first = time.monotonic()
        if first is not None and time.monotonic() - first > seconds:
            return left, None
        time.sleep(POLL_SECONDS)


def end(ranks: "Sequence[subprocess.Popen[bytes]]") -> None:
    """End all ranks, and wait until they have. The signal is for all processes of the group, as in a job."""
    os.killpg(0, signal.SIGTERM)
    until = time.monotonic() + GRACE_SECONDS
    for rank in ranks:
        try:
            rank.wait(max(until - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            rank.kill()
            rank.wait()


# Failures


def read_failure(path: Path) -> "dict[str, Any] | None":
    """Return what the rank that has failed first has recorded; None if there is no record, or only part of it."""
    with suppress(OSError, ValueError):
        record: dict[str, Any] = json.loads(path.read_text())
        return record
    return None


def explain(record: Mapping[str, Any], *, out_of_memory: bool = False) -> tuple[int, str]:
    """Return exit code and cause of the rank that has failed first."""
    rank, code, tail = record["rank"], record["code"], record["stderr"]
    how = "ran out of memory. Request more with SlurmRequest(mem=...)" if out_of_memory else name_exit(code)
    exceptions = [line for line in tail if _EXCEPTION.match(line)]
    last = f": {(exceptions or tail)[-1].strip()}" if code > 0 and tail else ""
    lines = ["", f"Last lines of stderr of rank {rank}:", *tail] if tail else []
    return shell_code(code), "\n".join([f"rank {rank} on {record['host']} {how}{last}", *lines])


def explain_late(ranks: str, seconds: str) -> str:
    """Return the cause of a job that was ended because ranks still ran end_time_limit after another had ended."""
    late = f"rank {ranks} still ran {seconds} s after another rank had ended, so all were ended."
    return f"{late} Let all ranks end together, or raise SrunLauncher(end_time_limit=...)."


def name_exit(code: int) -> str:
    """Return how a process ended; `code`: not 0; negative is the signal that ended it, as in `subprocess`."""
    if code > 0:
        return f"ended with exit code {code}"
    cause = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    hint = " (the system does that when memory runs out)"
    return f"was killed by {cause}{hint if cause == 'SIGKILL' else ''}"


if __name__ == "__main__":
    exit_code = main()
    with suppress(OSError):
        sys.stderr.flush()
    os._exit(exit_code)  # a thread may still read or write
