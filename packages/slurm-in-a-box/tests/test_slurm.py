"""Slurm on the simulated site: both partitions, MUSICA's rules, and what jobs see."""

import json
import shlex
import subprocess

import pytest

from slurm_in_a_box import (
    CERTIFICATE_USER,
    CPU_PARTITION,
    GPU_PARTITION,
    PLAIN_KEY_USER,
    TCSH_USER,
    VANILLA,
    SimulatedSite,
    wait_until,
)
from slurm_in_a_box.machines import MEMORY_CGROUPS

pytestmark = pytest.mark.cluster

CPU = (f"--partition={CPU_PARTITION}", f"--qos={CPU_PARTITION}")
CPU_DEV = (f"--partition={CPU_PARTITION}", f"--qos=dev_{CPU_PARTITION}", "--time=5")
GPU_DEV = (f"--partition={GPU_PARTITION}", f"--qos=dev_{GPU_PARTITION}", "--time=5", "--gres=gpu:1")
WRAP_HOSTNAME = f"--wrap {shlex.quote(VANILLA + 'hostname')}"


@pytest.mark.smoke
def test_nodes_are_as_large_as_musicas(slurm_site: SimulatedSite) -> None:
    nodes = slurm_site.cluster.query("sinfo", "--noheader", "--Node", "--format=%N %R %c %m %G").splitlines()
    cpu = [f"n400{i} zen4_0768 384 768000 (null)" for i in (1, 2, 3, 4)]
    gpu = [f"g400{i} zen4_0768_h100x4 384 768000 gpu:h100:4" for i in (1, 2)]
    assert sorted(nodes) == sorted(cpu + gpu)


def test_job_on_the_cpu_partition(slurm_site: SimulatedSite) -> None:
    job = slurm_site.submit("srun hostname", *CPU_DEV, "--nodes=2", "--ntasks-per-node=1")
    slurm_site.wait_for_job(job)
    hosts = slurm_site.output(job).split()
    assert len(set(hosts)) == 2
    assert set(hosts) <= {"n4001", "n4002", "n4003", "n4004"}
    accounting = [
        "--noheader",
        "--parsable2",
        "--allocations",
        f"--jobs={job}",
        "--format=State,ExitCode,QOS,AllocNodes",
    ]
    wait_until(lambda: slurm_site.sacct(*accounting) == "COMPLETED|0:0|dev_zen4_0768|2\n", "the job's accounting")


@pytest.mark.smoke
def test_job_on_the_gpu_partition_sees_its_gpus(slurm_site: SimulatedSite) -> None:
    job = slurm_site.submit("hostname; echo $CUDA_VISIBLE_DEVICES", *GPU_DEV[:3], "--gres=gpu:4")
    slurm_site.wait_for_job(job)
    host, gpus = slurm_site.output(job).split()
    assert host in ("g4001", "g4002")
    assert gpus == "0,1,2,3"


def test_machines_have_their_own_folders_and_share_homes(slurm_site: SimulatedSite) -> None:
    script = "hostname >/tmp/mine; hostname >/dev/shm/mine; touch ~/$(hostname)"
    for node in ("n4001", "login01"):
        slurm_site.machines[node].run(["sh", "-c", script], CERTIFICATE_USER)
    for node in ("n4001", "login01"):
        assert slurm_site.run_on_node(node, "cat /tmp/mine /dev/shm/mine").stdout.split() == [node, node]
    assert slurm_site.run_on_login(CERTIFICATE_USER, "ls").stdout.split() == ["login01", "n4001"]
    assert slurm_site.run_on_node("n4002", "find /tmp /dev/shm -name mine").stdout == ""


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ((f"--partition={CPU_PARTITION}",), "Invalid qos"),
        ((f"--partition={CPU_PARTITION}", f"--qos={GPU_PARTITION}"), "Invalid qos"),
        ((f"--partition={GPU_PARTITION}", f"--qos={CPU_PARTITION}", "--gres=gpu:1"), "Invalid qos"),
        ((f"--partition={CPU_PARTITION}", "--qos=nonsense"), "Invalid qos"),
        (("--partition=nonsense", f"--qos={CPU_PARTITION}"), "invalid partition"),
        ((*CPU_DEV[:2], "--time=11"), "QOSMaxWallDurationPerJobLimit"),
        ((*CPU_DEV, "--nodes=3"), "QOSMaxNodePerUserLimit"),
        ((*CPU, "--time=3-00:01"), "QOSMaxWallDurationPerJobLimit"),
        ((*CPU, "--nodes=5"), "Node count specification invalid"),
        ((*CPU, "--mem=800G"), "Memory specification can not be satisfied"),
        ((*CPU, "--gres=gpu:1"), "Requested node configuration is not available"),
        (GPU_DEV[:3], "QOSMinGRES"),
        ((*GPU_DEV[:3], "--gres=gpu:5"), "Requested node configuration is not available"),
    ],
)
def test_wrong_requests_are_refused_at_submission(
    slurm_site: SimulatedSite, options: tuple[str, ...], reason: str
) -> None:
    command = f"sbatch --parsable {' '.join(options)} {WRAP_HOSTNAME}"
    refused = slurm_site.run_on_login(CERTIFICATE_USER, command, check=False)
    assert refused.returncode == 1
    assert reason in refused.stderr
    assert slurm_site.squeue("--noheader") == ""


@pytest.mark.parametrize("qos", ["", "dev_", "idle_", "fast_", "long_"])
@pytest.mark.parametrize("partition", [CPU_PARTITION, GPU_PARTITION])
def test_each_qos_is_accepted_in_its_partition(slurm_site: SimulatedSite, partition: str, qos: str) -> None:
    gpus = ["--gres=gpu:1"] if partition == GPU_PARTITION else []
    command = ["sbatch", "--test-only", f"--partition={partition}", f"--qos={qos}{partition}", "--time=5", *gpus]
    accepted = slurm_site.run_on_login(CERTIFICATE_USER, f"{' '.join(command)} {WRAP_HOSTNAME}")
    assert "to start at" in accepted.stderr


def test_plain_job_preempts_idle_one_which_runs_again(slurm_site: SimulatedSite) -> None:
    everything = ["--nodes=4", "--exclusive", f"--partition={CPU_PARTITION}"]
    idle = slurm_site.submit("exec sleep 1000", *everything, f"--qos=idle_{CPU_PARTITION}")
    slurm_site.wait_for_job(idle, "RUNNING")
    plain = slurm_site.submit("exec sleep 1000", *everything, f"--qos={CPU_PARTITION}", user=PLAIN_KEY_USER)
    slurm_site.wait_for_job(plain, "RUNNING")
    assert slurm_site.job_state(idle) == "PENDING"
    slurm_site.cluster.query("scancel", str(plain))
    slurm_site.wait_for_job(idle, "RUNNING", timeout=90)
    assert slurm_site.squeue("--noheader", f"--jobs={idle}", "--Format=RestartCnt").strip() == "1"


@pytest.mark.smoke
def test_job_beyond_its_memory_ends_as_out_of_memory_where_that_is_enforced(slurm_site: SimulatedSite) -> None:
    program = "exec python3 -c 'bytearray(500 << 20)'"
    job = slurm_site.submit(program, *CPU_DEV, "--mem=100M", "--chdir=/tmp", "--output=/dev/null")
    slurm_site.wait_for_job(job, "OUT_OF_MEMORY" if MEMORY_CGROUPS else "COMPLETED")


def test_sbatch_prints_noise_on_both_streams_around_its_answer(slurm_site: SimulatedSite) -> None:
    done = slurm_site.run_on_login(CERTIFICATE_USER, f"sbatch --parsable {' '.join(CPU_DEV)} --nodes=1 --wrap hostname")
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    assert lines[1].isdecimal()
    assert "sbatch: applying job settings for >> full cpu node(s) <<" in done.stderr
    slurm_site.wait_for_job(int(lines[1]))


@pytest.mark.smoke
def test_squeue_speaks_json(slurm_site: SimulatedSite) -> None:
    job = slurm_site.submit("exec sleep 1000", *CPU_DEV)
    assert [each["job_id"] for each in json.loads(slurm_site.squeue("--json"))["jobs"] if each["job_id"] == job] == [
        job
    ]


def test_user_of_another_shell_submits(slurm_site: SimulatedSite) -> None:
    command = slurm_site.login_command(
        f"sbatch --parsable {' '.join(CPU_DEV)} --nodes=1 --wrap 'echo $0'", user=TCSH_USER
    )
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    job = int(done.stdout.splitlines()[1])
    slurm_site.wait_for_job(job)
