"""How many jobs, and how many tasks of an array job, Slurm accepts."""

import re

from .disk import RequestError
from .slurm_commands import ask_slurm, configuration, fields_of, here, listed, projects_here, user

MOST_TASKS = re.compile(r"\bmax_array_tasks=(\d+)")


def limits(agent, ask, _):
    """Return the most tasks of an array job, and the most jobs that may be in the queue at once; None: not known.

    partition, qos: of the jobs; empty: not known
    account: that the job script names; empty: it names none
    """
    agent.profile.charge()
    settings = configuration()
    most = [settings.get("MaxArraySize", "")] + MOST_TASKS.findall(settings.get("SchedulerParameters", ""))
    account = ask["account"] or projects_here(settings)["default"]
    chosen = here(settings) + (["account=" + account] if account else [])
    associations = listed("assoc", "user=" + user(), *chosen, "format=Partition,MaxSubmitJobs,GrpSubmitJobs")
    submit = [text for partition, *texts in associations if partition in ("", ask["partition"]) for text in texts]
    for qos in {ask["qos"], qos_of(ask["partition"])} - {""}:
        for _, *texts in listed("qos", qos, "format=Name,MaxSubmitPU,MaxSubmitPA,GrpSubmit"):
            submit += texts
    return {"array": fewest(most), "submit": fewest(submit)}


def fewest(texts):
    return min((int(text) for text in texts if text.isdigit()), default=None)


def qos_of(partition):
    """Return the name of a partition's own QoS; empty if it has none, or Slurm does not answer."""
    try:
        name = fields_of(ask_slurm("scontrol", "-a", "-o", "show", "partition", partition)).get("QoS", "N/A")
    except RequestError:
        return ""
    return "" if name == "N/A" else name
