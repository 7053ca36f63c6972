"""Why a job failed, or may never start, in words for its user, and whether a retry can help."""

import os
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import timedelta

from dagster_sbatch.slurm.accounting import explain_idle_end
from dagster_sbatch.slurm.gateway import MESSAGES, JobEnd, Projects, charged_project
from dagster_sbatch.slurm.request import Fault, SlurmRequest
from dagster_sbatch.slurm.retries import suggest
from dagster_sbatch.slurm.units import format_time

_RAN_OUT_OF_MEMORY = "ran out of memory"
CAUSES = {
    "NODE_FAIL": ("a node failed", Fault.NODE),
    "BOOT_FAIL": ("a node did not start", Fault.NODE),
    "PREEMPTED": ("it was preempted by another job", Fault.AGAIN),
    "OUT_OF_MEMORY": (f"it {_RAN_OUT_OF_MEMORY}", Fault.MEMORY),
    "TIMEOUT": ("it reached its time limit", Fault.TIME),
    "DEADLINE": ("it reached the deadline that its options set", None),
    "CANCELLED": ("it was cancelled on the cluster, by scancel or by its administrators", None),
    "REVOKED": ("it was taken over by another cluster", None),
}
"""Why a job failed, in words, and the fault if another attempt may succeed, by Slurm's state of the job."""
TRY_AGAIN = os.EX_TEMPFAIL
"""Exit code (75, of sysexits.h) by which a workload, or a Ray cluster that has lost a node, requests a retry."""
NOT_STARTED = ("0:53", "2:0")
"""Exit code and signal of a job whose output files slurmd could not open, by Slurm 22.05 and 24.11."""


@dataclass(frozen=True)
class Outcome:
    """Why a job failed."""

    cause: str  # in a sentence
    fault: Fault | None = None  # why, if another attempt may succeed
    advice: str = ""  # what to change; it follows the cause

    @property
    def text(self) -> str:
        """The cause and the advice."""
        return self.cause + self.advice


def fault_of(end: JobEnd) -> Fault | None:
    """Return why a job failed, if another attempt may succeed; its output is not considered."""
    if end.state in CAUSES:
        return CAUSES[end.state][1]
    return Fault.AGAIN if end.code == TRY_AGAIN else None


def judge(end: JobEnd, request: SlurmRequest) -> Outcome | None:
    """Return why a job failed, as Slurm and its own record say; None: its exit code and its Pipes session decide."""
    if end.state in CAUSES:
        return _explain_state(end, request)
    if end.code is None:
        return _explain_cut_short(end)
    if end.code == TRY_AGAIN or (end.code and end.cause):
        cause = end.cause or f"it requests a retry (exit code {TRY_AGAIN}). Its stderr says why"
        return Outcome(cause, fault_of(end))
    if end.code == 0 and not end.succeeded:
        return Outcome(f"its script ended with 0, but Slurm says {end.state} {end.exit}")
    if MESSAGES in end.short:
        return Outcome("its Pipes messages did not arrive in full. The file system has lost some, or is very slow")
    return None


_OUT_OF_MEMORY = re.compile(r"slurmstepd(?:-(\S+))?: error: Detected \d+ oom.kill event")
"""slurmstepd writes this to stderr, with a hyphen before Slurm 22.05."""
_BROKEN_GPU = re.compile(
    r"uncorrectable (ECC|NVLink) error|(ECC|NVLINK)_?UNCORRECTABLE|GPU[ _]is[ _]lost|GPU has fallen off the bus",
    re.IGNORECASE,
)
"""CUDA, NVML and nvidia-smi write this of a GPU that is broken. Errors that a program may cause are not among them,
such as an illegal memory access or a failed launch. Xid numbers are in the node's kernel log, not in stderr."""


def judge_stderr(stderr: str, request: SlurmRequest) -> Outcome | None:
    """Return what the last lines of a failed job's stderr say of the cause; None if they say nothing.

    Slurm calls a job FAILED if a step that its script started by srun ran out of memory. A Ray cluster is such a step:
    Ray reports only that a worker died.
    """
    nodes = set(_OUT_OF_MEMORY.findall(stderr))
    if nodes:
        where = f" on {', '.join(sorted(nodes))}" if all(nodes) else ""
        cause = f"it {_RAN_OUT_OF_MEMORY}{where}, and the system killed some of its processes"
        return Outcome(cause, Fault.MEMORY, suggest(Fault.MEMORY, request))
    if request.gpus_per_node and (found := _BROKEN_GPU.search(stderr)):
        return Outcome(f"a GPU of the node is broken (stderr: {found[0]!r})", Fault.GPU)
    return None


def explain_stderr(cause: str, stderr: str, request: SlurmRequest) -> str:
    """Return the cause of a failed job; it begins with what stderr says of it; see `judge_stderr`."""
    found = judge_stderr(stderr, request)
    if found is None or (found.fault is Fault.MEMORY and _RAN_OUT_OF_MEMORY in cause):
        return cause
    return f"{found.text}. Then {cause}"


def find_fault(outcome: Outcome | None, end: JobEnd, stderr: str, request: SlurmRequest) -> Outcome | None:
    """Return why a job failed, to decide whether it is repeated; None if it has succeeded, or nothing is known.

    `outcome`: what `judge` says. `stderr`: the last lines of the job; they count unless Slurm itself names the cause.
    """
    if end.state in CAUSES or not end.code:
        return outcome
    found = judge_stderr(stderr, request)
    return found if found and request.retries.repeats(found.fault) else outcome or found


_ABOUT_PROJECTS = re.compile(r"account|qos|association", re.IGNORECASE)
_ABOUT_LIMITS = "violates accounting/QOS policy"
_ABOUT_BUDGETS = re.compile(r"\b(Assoc|QOS)Grp\w*Minutes")


def explain_refusal(text: str, request: SlurmRequest, ask: Callable[[], Projects]) -> str:
    """Return why sbatch refused a job; if that may be about projects, with those that the user has.

    `request`: of the job, after `allocate`. `ask`: asks the login node for the user's projects; it is called only if
    the answer is needed.
    """
    another = "SLURM_ACCOUNT, or in the asset's SlurmRequest(account=...)"
    if _ABOUT_LIMITS in text:
        advice = (
            "The job could use more computing time than the project has left; scripts/costs shows that. Request "
            f"less, or name another project in {another}"
            if _ABOUT_BUDGETS.search(text)
            else f"The request is outside a limit of QoS {request.qos or '(the default)'} or of the project. Request "
            "less time or fewer nodes, or another QoS: SLURM_QOS, or the asset's SlurmRequest(qos=...)"
        )
        return f"{text}\n{advice}"
    if not _ABOUT_PROJECTS.search(text):
        return text + "\nscripts/preview ASSET shows the request. Correct it, or ask the centre" * ("sbatch:" in text)
    projects = ask()
    charged = charged_project(request.account, projects.default)
    others = ", ".join(sorted({*projects.qos} - {charged}))
    elsewhere = f"name another one in {another}"
    if not projects.qos:
        return f"{text}\nThe job names the project {charged or 'that is your default'}; {elsewhere}"
    if charged not in projects.qos:
        return f"{text}\n{charged!r} is not a project of yours. Name one of yours ({others}) in {another}"
    allowed = projects.qos[charged]
    if allowed and request.qos and request.qos not in allowed:
        only = f"{', '.join(sorted(allowed))}{idle_only(allowed)}"
        return (
            f"{text}\nProject {charged} may not use QoS {request.qos}, only {only}. "
            f"Set SLURM_QOS to one of these{f', or name another project ({others}) in {another}' if others else ''}"
        )
    more = f"Others of yours: {others}; {elsewhere}" if others else "You have no other project"
    return f"{text}\nThe job would be charged to project {charged}. {more}"


def idle_only(allowed: Collection[str]) -> str:
    """Return why a project may use idle_ QoS only, to be added to their list; empty if it may use others."""
    spent = all(qos.startswith("idle_") for qos in allowed)
    return " (a project that has used up its budget may use the idle_ ones only)" if spent else ""


def _explain_state(end: JobEnd, request: SlurmRequest) -> Outcome:
    """Return the outcome of a job whose state at Slurm is one of CAUSES."""
    if end.state == "CANCELLED" and (idle := explain_idle_end(end.usage, request)):
        return Outcome(idle)
    words, fault = CAUSES[end.state]
    cause = f"{words} (Slurm: {end.state})"
    if end.state == "NODE_FAIL" and end.cause:
        cause += f"; {end.cause}"  # it may name the node
    if fault is Fault.TIME and end.started and end.ended and (ran := end.ended - end.started) < request.seconds - 60:
        limit, ran_for = format_time(request.time_limit), format_time(timedelta(seconds=ran))
        return Outcome(f"{cause}, which was shortened in Slurm: it ran for {ran_for} of {limit}")
    again = ". To submit it again, re-execute the run" if end.state == "CANCELLED" else ""
    return Outcome(cause, fault, again or suggest(fault, request))


def _explain_cut_short(end: JobEnd) -> Outcome:
    """Return the outcome of a job that has not recorded its own end."""
    if end.state == "FAILED" and end.exit in NOT_STARTED:
        return Outcome(
            f"the job could not start in its run directory (Slurm: {end.state} {end.exit}). Its compute node does not "
            "see that folder, or cannot write to it. Set SLURM_DEPLOYMENT_BASE_PATH to a folder that every node sees"
        )
    slurms = f"Slurm reports {end.state} {end.exit}" if end.state else "Slurm does not know it any more"
    return Outcome(
        f"it recorded no exit code (killed, or disk full?), and {slurms}. Read its stderr in the run directory"
    )


_MAY_NEVER_START = (
    (
        r"DependencyNeverSatisfied",
        "the job that it depends on did not end as its `dependency` asks. Terminate this run, and execute it again "
        "without that dependency, or after the other job.",
    ),
    (
        r"JobHeldUser|JobHeldAdmin|JobHoldMaxRequeue|[Hh]eld",
        "it is held. An administrator or you did that (scontrol hold), or its nodes failed to start it. Find out why, "
        "then release it on the login node, or Terminate this run:\n  scontrol release {job}",
    ),
    (
        r"BadConstraints|ReqNodeNotAvail.*UnavailableNodes|NodeDown$|FrontEndDown",
        "no available node has what the job requests. Terminate this run if the nodes do not come back, and "
        "change `constraint`, `nodelist`, `exclude` or GPUs in its SlurmRequest.",
    ),
    (
        r"Partition(Config|NodeLimit|TimeLimit)|Invalid(Account|QOS)|(Account|QOS)NotAllowed|ReservationDeleted"
        r"|Reservation.*(Invalid|deleted)|QOSMin\w*|((Assoc|QOS)\w*|Max\w*)Per(Job|Node)\w*|MaxMemPerLimit|DeadLine",
        "a limit of its account, QoS, partition or reservation does not allow a job of this size. Terminate this run, "
        "and change its SlurmRequest; `scripts/preview ASSET --test-only` asks Slurm beforehand.",
    ),
    (
        r"(Assoc|QOS)Grp(?!\w*RunMinutes)\w*(Minutes|Wall)\w*",  # RunMinutes: of the jobs that run now
        "the project has used up its computing time. It starts once there is more; Terminate this run if there will be "
        "none.",
    ),
)
"""Reasons of Slurm for which a pending job may never start, and what to do about each."""


def advise(reason: str, job: str) -> str | None:
    """Return what to do about a job that may never start; None if the job only waits for its turn.

    `reason`: of a pending job (squeue(1), JOB REASON CODES).
    """
    for pattern, advice in _MAY_NEVER_START:
        if re.search(pattern, reason):
            return advice.format(job=job)
    return None
