"""The sampler of a job: what it reads of cgroups, processes and nvidia-smi, and what its numbers come to."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from dagster_sbatch.slurm.gateway.agent import job_record
from slurm_in_a_box import wait_until
from support.programs import make

import job_use
import node_use
import sampler

JOB = "4711"


def gpus(count: int, visible: str | None, monkeypatch: pytest.MonkeyPatch) -> node_use.Gpus:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    return node_use.Gpus(count)


@pytest.mark.parametrize(
    ("visible", "printed", "rows"),
    [
        ("0", b"0, GPU-a, 97, 40512\n", [(97.0, 40512.0)]),
        ("1", b"0, GPU-a, 97, 40512\n1, GPU-b, 3, 4\n", [(3.0, 4.0)]),  # nvidia-smi also shows another job's GPU
        ("GPU-b", b"0, GPU-a, 97, 40512\n1, GPU-b, 3, 4\n", [(3.0, 4.0)]),
        (None, b"0, GPU-a, 97, 40512\n1, GPU-b, 3, 4\n", None),  # which one is the job's is not known
        ("0", b"0, GPU-a, [N/A], 40512\n", [(None, 40512.0)]),
        ("0", b"0, GPU-a, [N/A], [N/A]\n", None),
        ("0", b"0, GPU-a, 97, 40", None),  # the rest has not arrived yet
        ("0", b"No devices were found\n", None),
        ("0", b"0, GPU-a, [Unknown Error], [GPU is lost]\n", None),
        ("0", b"Unable to determine the device handle for GPU 0000:41:00.0: GPU is lost.  Reboot the system\n", None),
        ("0", b"", None),
    ],
)
def test_rows_of_the_jobs_gpus_are_read(
    visible: str | None, printed: bytes, rows: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = gpus(1, visible, monkeypatch)
    found.feed(printed)
    assert found.take() == rows
    assert found.take() is None


def test_a_node_without_nvidia_smi_has_no_numbers_of_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = gpus(1, "0", monkeypatch)
    found.start()
    assert (found.process, found.take()) == (None, None)


def test_a_reading_waits_for_all_gpus_of_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    found = gpus(2, "0,1", monkeypatch)
    found.feed(b"0, GPU-a, 50, 10\n1, GPU")
    assert found.take() is None
    found.feed(b"-b, 70, 30\n")
    assert found.take() == [(50.0, 10.0), (70.0, 30.0)]


Machine = Callable[[dict[str, str]], None]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """`machine(files)` writes files that the sampler takes for those of /proc and of cgroups."""
    monkeypatch.setattr(node_use, "CGROUPS", str(tmp_path))
    monkeypatch.setattr(node_use, "PROC", str(tmp_path))

    def write(files: dict[str, str]) -> None:
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)

    return write


V2 = {
    "self/cgroup": f"0::/system.slice/slurmstepd.scope/job_{JOB}/step_batch/user/task_0\n",
    f"system.slice/slurmstepd.scope/job_{JOB}/memory.stat": "anon 104857600\nfile 9999999999\nshmem 1048576\n",
    f"system.slice/slurmstepd.scope/job_{JOB}/cpu.stat": "usage_usec 2500000\nuser_usec 1\n",
}
NO_MEMORY = {name: text for name, text in V2.items() if not name.endswith("memory.stat")}
V1 = {
    "self/cgroup": f"4:memory:/slurm/uid_7/job_{JOB}/step_0/task_0\n3:cpu,cpuacct:/slurm/uid_7/job_{JOB}/step_0\n",
    f"memory/slurm/uid_7/job_{JOB}/memory.stat": "rss 1\ntotal_rss 104857600\ntotal_cache 7\ntotal_shmem 1048576\n",
    f"cpuacct/slurm/uid_7/job_{JOB}/cpuacct.usage": "2500000000\n",
}


HYBRID = V1 | {"self/cgroup": V1["self/cgroup"] + "1:name=systemd:/system.slice/slurmd.service\n0::/\n"}


@pytest.mark.parametrize("files", [V1, V2, HYBRID], ids=["version 1", "version 2", "both"])
def test_memory_and_cpu_time_of_a_job_come_from_its_cgroup(files: dict[str, str], machine: Machine) -> None:
    """The cache of files does not count: it gives way when a process needs memory."""
    machine(files)
    node = node_use.Node(JOB)
    assert node.sample() == (101.0, 2.5)
    assert node.processes is None


def process(parent: int, kib: int, environment: str = "") -> dict[str, str]:
    """Files of a process that has used 2.5 s."""
    times = f"{2 * node_use.TICKS} {node_use.TICKS // 2} 0 0"
    return {
        "stat": f"7 (a ) b) S {parent} {'0 ' * 9}{times} 20",
        "status": f"Name:\ta\nRssAnon:\t{kib} kB\nRssFile:\t9999 kB\nRssShmem:\t1024 kB\n",
        "environ": environment,
    }


def files_of(processes: dict[int, dict[str, str]]) -> dict[str, str]:
    return {f"{pid}/{name}": text for pid, files in processes.items() for name, text in files.items()}


def test_what_a_cgroup_does_not_have_comes_from_the_processes(machine: Machine) -> None:
    """Version 2 always counts CPU time, memory only if Slurm asks for that."""
    machine(NO_MEMORY | files_of({70000: process(1, 100 << 10, f"SLURM_JOB_ID={JOB}\0")}))
    assert node_use.Node(JOB).sample() == (101.0, 2.5)


@pytest.mark.parametrize("late", ["environ", "parent"])
def test_a_process_that_is_not_yet_known_as_the_job_s_is_counted_later(late: str, machine: Machine) -> None:
    """slurmstepd is about to start it; or it has a lower number than its parent, and does not name the job."""
    mark = f"A=1\0SLURM_JOB_ID={JOB}\0"
    first = {70000: process(1, 1024, mark), 60000: process(70000 if late == "parent" else 1, 2048)}
    machine(files_of(first))
    node = node_use.Node(JOB)
    assert node.sample() == (1 + 1, 2.5)
    if late == "environ":
        machine(files_of({60000: process(1, 2048, mark)}))
    assert node.sample() == (1 + 1 + 2, 5.0)


def test_without_cgroups_the_jobs_processes_are_counted() -> None:
    """Also one whose environment does not name the job, as in a container; not those of another job."""
    hold = "import sys; kept = b'x' * (64 << 20); print(flush=True); sys.stdin.read()"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', {hold!r}], env={{}})"
    commands = [(JOB, ["-c", program]), ("12", ["-c", hold]), (JOB, [sampler.__file__, "node", "0"])]
    started = []
    try:
        for job, words in commands:  # the last one is the sampler
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            process = subprocess.Popen([sys.executable, "-S", *words], env={"SLURM_JOB_ID": job}, **pipes)  # type: ignore[call-overload]
            started.append(process)
            printed = process.stdout.readline()
        _, memory, cpu, gpus = json.loads(printed)
        assert 64 < memory < 120
        assert cpu > 0
        assert gpus == []
    finally:
        for process in started:
            process.communicate()


def test_samples_of_several_nodes_become_sums_means_and_maxima() -> None:
    usage = job_use.Usage(2, 1, 0.0)
    usage.add("", 0.0, 100.0, 1.0, [(50.0, 7.0)])
    usage.point(0.0)
    assert usage.document(1.0, series=True) == {"seconds": 1.0}  # the other node is not known yet
    usage.add("n2", 0.0, 300.0, 2.0, [(100.0, 8.0)])
    usage.point(0.0)
    usage.add("", 10.0, 200.0, 11.0, [(0.0, 9.0)])
    usage.add("n2", 10.0, 100.0, 22.0, None)
    usage.point(10.0)
    document = usage.document(10.0, series=True)
    assert document == {
        "seconds": 10.0,
        "memory_mib": 300.0,
        "cpu_seconds": 33.0,
        "gpu_percent": 50.0,
        "gpu_memory_mib": 9.0,
        "series": [(75.0, None, 300.0), (50.0, 3.0, 200.0)],
    }


@pytest.mark.parametrize(
    ("row", "known", "means"),
    [
        ((30.0, 5.0), {"gpu_percent", "gpu_memory_mib"}, [45.0, 45.0]),
        ((30.0, None), {"gpu_percent"}, [45.0, 45.0]),
        ((None, 5.0), set(), [None, None]),  # a divided one (MIG)
    ],
)
def test_numbers_of_which_one_gpu_does_not_tell_its_part_are_left_out(
    row: object, known: set[str], means: list[float | None]
) -> None:
    usage = job_use.Usage(2, 2, 0.0)
    for now in (0.0, 15.0):
        usage.add("", now, 1.0, now, [(50.0, 7.0), (50.0, 7.0)])
        usage.add("n2", now, 1.0, now, [(50.0, 7.0), row])
        usage.point(now)
    document = usage.document(15.0, series=True)
    assert {name for name in document if name.startswith("gpu_")} == known
    assert [point[0] for point in document["series"]] == means


def test_of_a_job_that_has_lost_a_node_nothing_is_known() -> None:
    """Slurm may notice it minutes later. Numbers of the other nodes would be taken for those of the job."""
    usage = job_use.Usage(2, 1, 0.0)
    for now in (0.0, 15.0, 30.0):
        usage.add("", now, 100.0, now, [(50.0, 7.0)])
        usage.add("n2", now, 300.0, now, [(50.0, 7.0)])
        usage.point(now)
    assert len(usage.document(30.0, series=True)) == 6
    for now in range(45, 300, 15):
        usage.add("", now, 100.0, now, [(50.0, 7.0)])
        usage.point(now)
    assert len(usage.points) == 3 + 3  # less than STALE
    assert usage.document(300.0, series=True) == {"seconds": 300.0}


def test_a_line_of_a_node_that_was_lost_meanwhile_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", JOB)
    first = sampler.FirstNode(3, 0, 0)
    first.hear(b'["n2", 10.0, ')
    first.hear(b'["n3", 20.0, 1.0, null]\n["n3", 30.0, 2.0, null]\n["n2", 40')
    assert first.usage.memory == {"n3": 30.0}


NVIDIA_SMI = """\
#!/bin/sh
touch begun
until [ -e go-on ]; do sleep 0.05; done
echo "0, GPU-0, 50, 7"
touch printed
exec sleep 600
"""


def test_what_was_measured_before_the_job_asks_is_counted(tmp_path: Path) -> None:
    """The sampler sees both at once: a reading of the GPU, and the question at the end of the job."""
    make(tmp_path, NVIDIA_SMI, "nvidia-smi")
    command = [sys.executable, "-S", sampler.__file__, "job", "1", "1"]
    variables = {"SLURM_JOB_ID": JOB, "PATH": f"{tmp_path}:/usr/bin:/bin"}
    with subprocess.Popen(
        command, cwd=tmp_path, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin
        assert process.stdout
        wait_until((tmp_path / "begun").exists, "nvidia-smi runs")
        process.send_signal(signal.SIGSTOP)
        (tmp_path / "go-on").touch()
        wait_until((tmp_path / "printed").exists, "nvidia-smi has read the GPU")
        process.stdin.write("\n")
        process.stdin.flush()
        process.send_signal(signal.SIGCONT)
        found = json.loads(process.stdout.readline())
        process.stdin.close()
    assert (found["gpu_percent"], found["gpu_memory_mib"]) == (50, 7)


def test_the_series_of_a_long_job_stays_short_and_keeps_the_most_memory() -> None:
    usage = job_use.Usage(1, 0, 0.0)
    for sample in range(5760):  # a day
        usage.add("", 15.0 * sample, 900.0 if sample == 4321 else 100.0, 30.0 * sample, [])
        usage.point(15.0 * sample)
    series = usage.document(86400.0, series=True)["series"]
    assert 16 <= len(series) < job_use.MOST_POINTS
    assert max(point[2] for point in series) == 900.0
    assert {point[1] for point in series} == {2.0}
    assert "gpu_percent" not in usage.document(86400.0, series=False)


def test_gpus_are_idle_if_all_of_all_nodes_are_and_all_are_known() -> None:
    usage = job_use.Usage(2, 2, 0.0)
    idle, busy = [(0.0, 4.0), (0.0, 4.0)], [(0.0, 4.0), (1.0, 4.0)]
    for now in (0.0, 15.0, 30.0):
        usage.add("", now, None, None, idle)
    assert usage.idle(30.0) == 0  # nothing is known of the other node
    usage.add("n2", 30.0, None, None, idle)
    usage.add("n2", 45.0, None, None, idle)
    usage.add("", 45.0, None, None, idle)
    assert usage.idle(45.0) == 15.0
    assert usage.idle(45.0 + job_use.STALE) == 0
    usage.add("n2", 60.0, None, None, busy)
    assert usage.idle(60.0) == 0
    usage.add("n2", 75.0, None, None, [(0.0, 4.0), (None, 4.0)])
    assert usage.idle(75.0) == 0
    assert job_use.Usage(1, 0, 0.0).idle(1e6) == 0  # a job without GPUs


def test_time_without_a_reading_of_the_gpus_is_not_idle_time() -> None:
    """Such as a job that Slurm suspends for an hour: it has had no time to use them again."""
    usage = job_use.Usage(1, 1, 0.0)
    idle = [(0.0, 4.0)]
    for now in (0.0, 15.0, 3600.0, 3615.0):
        usage.add("", now, None, None, idle)
        assert usage.idle(now) == now % 3600.0


@pytest.mark.parametrize(("limit", "reported_at"), [(0, 600), (1000, 500), (7200, 600)])
def test_idle_gpus_are_recorded_once(
    limit: int, reported_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the sampler ends the job, if it is to do that. The follower reads it from the job's own record."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", JOB)
    Path("events").write_text('{"started": "g4001", "time": 1}\n')
    first = sampler.FirstNode(1, 1, limit)
    ended = []
    monkeypatch.setattr(first, "end_job", lambda: ended.append(True))
    monkeypatch.setattr(first.node, "sample", lambda: (None, None))
    monkeypatch.setattr(first.gpus, "take", lambda: [(0.0, 4.0)])
    for now in range(0, 1500, 20):
        first.sample(float(now))
        events = job_record.events_of(str(tmp_path))
        assert events.get("idle", {}).get("idle") == (reported_at if now >= reported_at else None)
        assert bool(ended) == (0 < limit <= now)
    assert events["started"]["started"] == "g4001"


@pytest.mark.parametrize(
    ("array", "ended"),
    [({}, JOB), ({"SLURM_ARRAY_JOB_ID": "4700", "SLURM_ARRAY_TASK_ID": "11"}, "4700_11")],
    ids=["a job", "a task alone"],
)
def test_the_sampler_cancels(
    array: dict[str, str],
    ended: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Once more with its next sample if Slurm did not answer: until then it has not ended the job."""
    scancel, calls = tmp_path / "scancel", tmp_path / "calls"
    scancel.write_text(f"#!/bin/sh\necho $* >>'{calls}'\n[ $(wc -l <'{calls}') = 2 ] && kill $$\n")
    scancel.chmod(0o755)
    for name, value in {"SLURM_JOB_ID": JOB, "PATH": f"{tmp_path}:{os.environ['PATH']}", **array}.items():
        monkeypatch.setenv(name, value)
    first = sampler.FirstNode(1, 1, 40)
    monkeypatch.setattr(first, "record", lambda _: None)
    monkeypatch.setattr(first.gpus, "take", lambda: [(0.0, 4.0)])
    known = []
    for now in (0.0, 40.0, 55.0, 70.0):
        monkeypatch.setattr(sampler, "time", SimpleNamespace(monotonic=lambda now=now: now, time=time.time))
        first.sample(now)
        if first.scancel:
            first.scancel.wait(30)
        first.asked(b"\n")
        known.append("ended_idle" in json.loads(capfd.readouterr().out))
    assert known == [False, False, True, True]
    assert calls.read_text() == 2 * f"{ended}\n"


def test_a_full_disk_does_not_save_a_job_with_idle_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", JOB)
    Path("events").symlink_to("/dev/full")
    monkeypatch.setattr(sampler, "read", lambda _: "")  # it has no end
    first = sampler.FirstNode(1, 1, 40)
    ended = []
    monkeypatch.setattr(first, "end_job", lambda: ended.append(True))
    monkeypatch.setattr(first.gpus, "take", lambda: [(0.0, 4.0)])
    for now in (0.0, 20.0, 40.0):
        first.sample(now)
    assert ended == [True]
