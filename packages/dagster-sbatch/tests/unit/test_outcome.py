"""What a job's end means: whether it went well, why not, and whether another try can help."""

from datetime import timedelta

import pytest

from dagster_sbatch.slurm import SlurmRequest
from dagster_sbatch.slurm.gateway import JobEnd, Projects
from dagster_sbatch.slurm.outcome import (
    TRY_AGAIN,
    Outcome,
    explain_refusal,
    explain_stderr,
    find_fault,
    judge,
    judge_stderr,
)
from dagster_sbatch.slurm.request import Fault, Retries

REQUEST = SlurmRequest(mem="8G", time_limit="01:00:00")
CANCELLED = Outcome(
    "it was cancelled on the cluster, by scancel or by its administrators (Slurm: CANCELLED)",
    advice=". To submit it again, re-execute the run",
)
LOST = "Ray: lost the node n4002: health check failed"


@pytest.mark.parametrize(
    ("job", "outcome"),
    [
        (JobEnd(0, "COMPLETED"), None),
        (JobEnd(0, ""), None),  # Slurm has forgotten it; its own word stands
        (JobEnd(7, "FAILED"), None),  # its exit code tells
        (JobEnd(None, "NODE_FAIL"), Outcome("a node failed (Slurm: NODE_FAIL)", Fault.NODE)),
        (JobEnd(None, "NODE_FAIL", cause=LOST), Outcome(f"a node failed (Slurm: NODE_FAIL); {LOST}", Fault.NODE)),
        (JobEnd(TRY_AGAIN, "FAILED", cause=LOST), Outcome(LOST, Fault.AGAIN)),
        (
            JobEnd(TRY_AGAIN, "FAILED"),
            Outcome("it requests a retry (exit code 75). Its stderr says why", Fault.AGAIN),
        ),
        (JobEnd(1, "FAILED", cause="Ray on n4001: there is no python3"), Outcome("Ray on n4001: there is no python3")),
        # SIGTERM ended the workload before it reached the job script, which recorded a code: Slurm's state counts.
        (JobEnd(0, "CANCELLED"), CANCELLED),
        (JobEnd(7, "CANCELLED", exit="0:15"), CANCELLED),
        (JobEnd(TRY_AGAIN, "CANCELLED"), CANCELLED),
        (JobEnd(0, "PREEMPTED"), Outcome("it was preempted by another job (Slurm: PREEMPTED)", Fault.AGAIN)),
        (
            JobEnd(None, "TIMEOUT", started=1000, ended=1120),
            Outcome(
                "it reached its time limit (Slurm: TIMEOUT), which was shortened in Slurm: "
                "it ran for 00:02:00 of 01:00:00"
            ),
        ),
        (JobEnd(None, "BOOT_FAIL"), Outcome("a node did not start (Slurm: BOOT_FAIL)", Fault.NODE)),
        (
            JobEnd(None, "PREEMPTED", cause=LOST),
            Outcome("it was preempted by another job (Slurm: PREEMPTED)", Fault.AGAIN),
        ),
        (
            JobEnd(None, "FAILED", exit="0:9"),
            Outcome(
                "it recorded no exit code (killed, or disk full?), and Slurm reports FAILED 0:9. "
                "Read its stderr in the run directory"
            ),
        ),
        (
            JobEnd(None, "FAILED", exit="2:0"),
            Outcome(
                "the job could not start in its run directory (Slurm: FAILED 2:0). Its compute node does not see that "
                "folder, or cannot write to it. Set SLURM_DEPLOYMENT_BASE_PATH to a folder that every node sees"
            ),
        ),
        (
            JobEnd(None, "FAILED", exit="0:53"),
            Outcome(
                "the job could not start in its run directory (Slurm: FAILED 0:53). Its compute node does not see that "
                "folder, or cannot write to it. Set SLURM_DEPLOYMENT_BASE_PATH to a folder that every node sees"
            ),
        ),
        (
            JobEnd(None, ""),
            Outcome(
                "it recorded no exit code (killed, or disk full?), and Slurm does not know it any more. "
                "Read its stderr in the run directory"
            ),
        ),
        (
            JobEnd(0, "FAILED", exit="1:0"),
            Outcome("its script ended with 0, but Slurm says FAILED 1:0"),
        ),
        (
            JobEnd(0, "COMPLETED", short={"messages.jsonl": 10}),
            Outcome("its Pipes messages did not arrive in full. The file system has lost some, or is very slow"),
        ),
    ],
)
def test_an_end_is_judged(job: JobEnd, outcome: Outcome | None) -> None:
    assert judge(job, REQUEST) == outcome


@pytest.mark.parametrize(
    ("state", "request_", "advice"),
    [
        ("TIMEOUT", REQUEST, "time_limit='02:00:00'"),
        ("TIMEOUT", SlurmRequest(time_limit=timedelta.max), "or instance time_limit='999999999-23:59:59'"),
        ("OUT_OF_MEMORY", REQUEST, "mem='12G'"),
        ("OUT_OF_MEMORY", SlurmRequest(mem_per_cpu="2G"), "mem_per_cpu='3G'"),
        ("OUT_OF_MEMORY", SlurmRequest(), "mem='32G'"),
    ],
)
def test_the_advice_is_to_ask_for_more(state: str, request_: SlurmRequest, advice: str) -> None:
    outcome = judge(JobEnd(None, state), request_)
    assert outcome
    assert outcome.fault is (Fault.TIME if state == "TIMEOUT" else Fault.MEMORY)
    assert advice in outcome.text
    assert "Request more" not in outcome.cause


KILLED = "error: Detected 1 oom_kill event in StepId=13.0. Some of the step tasks have been OOM Killed."


@pytest.mark.parametrize(
    ("stderr", "where"),
    [
        (f"slurmstepd-n2: {KILLED}\nslurmstepd-n1: {KILLED}\nslurmstepd-n2: {KILLED}", " on n1, n2"),
        (f"slurmstepd: {KILLED}", ""),
        ("slurmstepd-n1: error: Detected 2 oom-kill event(s) in StepId=13.0.", " on n1"),  # before Slurm 22.05
    ],
)
def test_a_cause_begins_with_the_nodes_on_which_a_step_ran_out_of_memory(stderr: str, where: str) -> None:
    cause = explain_stderr("a raised WorkerCrashedError", f"a line\n{stderr}\nanother", REQUEST)
    assert cause == (
        f"it ran out of memory{where}, and the system killed some of its processes. It had mem='8G'. Request more, for "
        "instance mem='12G'. Then a raised WorkerCrashedError"
    )


def test_a_cause_says_once_that_memory_ran_out() -> None:
    for cause, stderr in (("rank 1 on n1 ran out of memory", f"slurmstepd-n1: {KILLED}"), ("a", "n1: Out Of Memory")):
        assert explain_stderr(cause, stderr, REQUEST) == cause


def test_what_stderr_says_decides_if_the_request_repeats_it() -> None:
    stderr, lost = f"slurmstepd-n1: {KILLED}", JobEnd(TRY_AGAIN, "FAILED", cause=LOST)
    grows = REQUEST.model_copy(update={"retries": Retries(max_mem="64G")})
    for end, request, fault in [
        (lost, grows, Fault.MEMORY),
        (lost, REQUEST, Fault.AGAIN),
        (JobEnd(1, "FAILED"), REQUEST, Fault.MEMORY),
        (JobEnd(1, "NODE_FAIL"), grows, Fault.NODE),
    ]:
        found = find_fault(judge(end, request), end, stderr, request)
        assert found
        assert found.fault is fault
    assert find_fault(None, JobEnd(0, "COMPLETED"), stderr, grows) is None


@pytest.mark.parametrize(
    "line",
    [
        "RuntimeError: CUDA error: uncorrectable ECC error encountered",
        "cuda failure 214: CUDA_ERROR_ECC_UNCORRECTABLE",
        "cudaErrorNvlinkUncorrectable: uncorrectable NVLink error detected during the execution",
        "Unable to determine the device handle for GPU 0000:3B:00.0: GPU is lost.  Reboot the system",
        "pynvml.NVMLError_GpuIsLost: NVML_ERROR_GPU_IS_LOST",
    ],
)
def test_a_broken_gpu_is_seen_in_the_stderr_of_a_job_with_gpus(line: str) -> None:
    found = judge_stderr(f"step 7\n{line}\n", SlurmRequest(gpus_per_node=1))
    assert found
    assert found.fault is Fault.GPU
    assert judge_stderr(line, SlurmRequest()) is None


@pytest.mark.parametrize(
    "line", ["CUDA error: an illegal memory access was encountered", "CUDA out of memory", "unspecified launch failure"]
)
def test_an_error_that_a_program_may_cause_is_no_broken_gpu(line: str) -> None:
    assert judge_stderr(line, SlurmRequest(gpus_per_node=1)) is None


BAD_ACCOUNT = "sbatch: error: Batch job submission failed: Invalid account or account/partition combination specified"
BAD_QOS = "sbatch: error: Batch job submission failed: Invalid qos specification"
ROWS = [["p1", "p1", "q,idle_q"], ["p1", "p2", "idle_q"]]


@pytest.mark.parametrize(
    ("text", "account", "rows", "default", "expected"),
    [
        (
            BAD_ACCOUNT,
            "p9",
            ROWS,
            "p1",
            "'p9' is not a project of yours. Name one of yours (p1, p2) in SLURM_ACCOUNT, or in",
        ),
        (BAD_ACCOUNT, None, ROWS, "p8", "'p8' is not a project of yours. Name one of yours (p1, p2)"),
        (BAD_QOS, "p2", ROWS, "p8", "Project p2 may not use QoS q, only idle_q (a project that has used up its budget"),
        (
            BAD_QOS,
            "p2",
            ROWS,
            "p8",
            "Set SLURM_QOS to one of these, or name another project (p1) in SLURM_ACCOUNT, or in",
        ),
        (BAD_QOS, None, [["p2", "p2", "idle_q"]], "p2", "Set SLURM_QOS to one of these"),
        (BAD_QOS, None, [["p2", "p2", "r,s"]], "p2", "only r, s. Set"),
        (BAD_QOS, None, [["p2", "p2", ""]], "p2", "would be charged to project p2. You have no other project"),
        (
            BAD_QOS,
            None,
            ROWS,
            "p1",
            "The job would be charged to project p1. Others of yours: p2; name another one in SLURM_ACCOUNT",
        ),
        (
            BAD_QOS,
            "P1",
            ROWS,
            "p8",
            "The job would be charged to project p1. Others of yours: p2",
        ),  # Slurm writes it like this
        (BAD_ACCOUNT, "p9", [], "", "The job names the project p9; name another one in SLURM_ACCOUNT"),
        (BAD_ACCOUNT, None, [], "", "The job names the project that is your default; name another one"),
    ],
)
def test_a_refusal_for_the_project_names_it_and_what_to_change(
    text: str, account: str | None, rows: list[list[str]], default: str, expected: str
) -> None:
    projects = Projects.parse({"rows": rows, "default": default, "exported": False})
    said = explain_refusal(text, SlurmRequest(qos="q", account=account), lambda: projects)
    assert said.startswith(f"{text}\n")
    assert expected in said


def test_a_refusal_for_a_limit_does_not_blame_the_project() -> None:
    text = "sbatch: error: QOSMaxWallDurationPerJobLimit\nallocation failure: Job violates accounting/QOS policy (...)"
    said = explain_refusal(text, SlurmRequest(qos="dev_q"), lambda: Projects({}))
    assert said.startswith(f"{text}\nThe request is outside a limit of QoS dev_q or of the project. Request less time")
    assert "SLURM_ACCOUNT" not in said


def test_a_refusal_for_a_budget_says_where_it_is_shown() -> None:
    text = "sbatch: error: AssocGrpGRESMinutes\nallocation failure: Job violates accounting/QOS policy (...)"
    said = explain_refusal(text, SlurmRequest(qos="q"), lambda: Projects({}))
    assert said.startswith(f"{text}\nThe job could use more computing time than the project has left; scripts/costs")
    assert said.endswith("or name another project in SLURM_ACCOUNT, or in the asset's SlurmRequest(account=...)")


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        (
            "sbatch: error: Memory specification",
            "\nscripts/preview ASSET shows the request. Correct it, or ask the centre",
        ),
        ("No space left on device", ""),
    ],
)
def test_another_refusal_asks_for_no_projects(text: str, advice: str) -> None:
    def ask() -> Projects:
        raise AssertionError

    assert explain_refusal(text, SlurmRequest(), ask) == f"{text}{advice}"
