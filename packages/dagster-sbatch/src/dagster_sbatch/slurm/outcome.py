"""Why a job did not end well, in words for whoever asked for it, and whether another try can help."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from dagster_sbatch.slurm.gateway import JobEnd, Projects
from dagster_sbatch.slurm.request import SlurmRequest
from dagster_sbatch.slurm.units import format_memory, format_time, parse_memory

CAUSES = {
    "NODE_FAIL": "a node failed",
    "BOOT_FAIL": "a node did not start",
    "PREEMPTED": "it was preempted by another job",
    "OUT_OF_MEMORY": "it ran out of memory",
    "TIMEOUT": "it reached its time limit",
    "DEADLINE": "it reached the deadline that its options set",
    "CANCELLED": "it was cancelled on the cluster, by scancel or by its administrators",
    "REVOKED": "it was taken over by another cluster",
}
MACHINES_DOING = frozenset({"NODE_FAIL", "BOOT_FAIL", "PREEMPTED"})
"""The states after which the same job may well succeed the next time."""


TRY_AGAIN = 75
"""Exit code by which a workload, or a Ray cluster that has lost a node, asks for another try (EX_TEMPFAIL)."""


NOT_STARTED = ("0:53", "2:0")
"""Exit code and signal of a job whose output files slurmd could not open, by Slurm 22.05 and 24.11."""


@dataclass(frozen=True)
class Outcome:
    """How a job ended, where it did not end well.

    Attributes:
        cause: in a sentence.
        again: whether the same job may succeed on another try.
    """

    cause: str
    again: bool = False


def judge(end: JobEnd, request: SlurmRequest) -> Outcome | None:
    """What Slurm has to say against a job; None if nothing: then its exit code and its Pipes session decide.

    Args:
        end: of the job.
        request: what it was submitted with.
    """
    if end.state in CAUSES:
        cause = f"{CAUSES[end.state]} (Slurm: {end.state}){_advice(end.state, request)}"
        if end.state == "NODE_FAIL" and end.cause:
            cause += f"; {end.cause}"  # that may tell which one
        return Outcome(cause, again=end.state in MACHINES_DOING)
    if end.code is None:
        return _explain_cut_short(end)
    if end.code == TRY_AGAIN or (end.code and end.cause):
        cause = end.cause or f"it asks for another try (exit code {TRY_AGAIN}): its stderr says why"
        return Outcome(cause, again=end.code == TRY_AGAIN)
    if end.code == 0 and end.state not in ("COMPLETED", ""):
        return Outcome(f"its script ended with 0, but Slurm says {end.state} {end.exit}")
    if "messages.jsonl" in end.short:
        return Outcome("its Pipes messages did not arrive in full: the file system lost some, or is very slow")
    return None


_ABOUT_PROJECTS = re.compile(r"account|qos|association", re.IGNORECASE)
_ABOUT_LIMITS = "violates accounting/QOS policy"


def explain_refusal(text: str, request: SlurmRequest, ask: Callable[[], Projects]) -> str:
    """Return why sbatch refused a job, with the project that it would be charged to if the refusal may be about that.

    Args:
        text: what sbatch says.
        request: of the job, after `allocate`.
        ask: asks the login node for the user's projects; it is called only if the answer is needed.
    """
    if _ABOUT_LIMITS in text:
        qos = request.qos or "(the default)"
        return (
            f"{text}\nThe request is outside a limit of QoS {qos} or of the project. Request less time or fewer nodes, "
            "or another QoS: SLURM_QOS, or the asset's SlurmRequest(qos=...)"
        )
    if not _ABOUT_PROJECTS.search(text):
        return text
    projects = ask()
    charged, others = projects.charged(request.account), ", ".join(sorted(projects.qos))
    elsewhere = "name another one in SLURM_ACCOUNT, or in the asset's SlurmRequest(account=...)"
    if not projects.qos:
        return f"{text}\nThe job names the project {charged or 'that is your default'}; {elsewhere}"
    if charged not in projects.qos:
        return f"{text}\n{charged!r} is not a project of yours. Yours are {others}: {elsewhere}"
    allowed = projects.qos[charged]
    if request.qos and request.qos not in allowed:
        return (
            f"{text}\nProject {charged} may not use QoS {request.qos}, only {', '.join(sorted(allowed))}. "
            "A project that has used up its budget may use the idle_ ones only. "
            f"Set SLURM_QOS to one of these, or charge another project ({others}): {elsewhere}"
        )
    return f"{text}\nThe job would be charged to project {charged}. Yours are {others}: {elsewhere}"


def _explain_cut_short(end: JobEnd) -> Outcome:
    """Return the outcome of a job that has not recorded its own end."""
    if end.state == "FAILED" and end.exit in NOT_STARTED:
        return Outcome(
            f"the job could not start in its run directory (Slurm: {end.state} {end.exit}). Its compute node does not "
            "see that folder, or cannot write to it. Set SLURM_DEPLOYMENT_BASE_PATH to a folder that every node sees, "
            "such as $DATA/dagster-slurm"
        )
    told = f"Slurm says {end.state} {end.exit}" if end.state else "Slurm does not know it any more"
    return Outcome(f"it recorded no exit code, and {told}: look at its stderr and at the node")


def _advice(state: str, request: SlurmRequest) -> str:
    """What to change, where that is known."""
    if state == "TIMEOUT":
        limit, longer = format_time(request.time_limit), format_time(2 * request.time_limit)
        return (
            f"; it had time_limit={limit!r}, ask for more, for instance time_limit={longer!r}, "
            "or let the workload save its state and go on from there"
        )
    if state == "OUT_OF_MEMORY":
        for name in ("mem", "mem_per_cpu"):
            asked = getattr(request, name)
            if asked and (kib := parse_memory(asked)):
                return f"; it had {name}={asked!r}, ask for more, for instance {name}={format_memory(kib * 3 // 2)!r}"
        return "; ask for more, for instance mem='32G'"
    return ""
