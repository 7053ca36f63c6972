"""What the projects of the user have used, what waits and runs in them, and how much Slurm lets them use and submit."""

import os
import re
import time
from collections import Counter

from .disk import RequestError
from .slurm_commands import PROJECT, SETTING, ask_slurm, configuration, fields_of, here, listed, period, rows_of, user

ALLOCATION = "JobID,State,User,Account,Start,End,ElapsedRaw,AllocTRES,Partition,JobName,Comment".split(",")
# Fields of squeue, and the widths of their columns.
QUEUED = (("State", 30), ("UserName", 64), ("Account", 64), ("TimeLeft", 30), ("TimeLimit", 30), ("tres-alloc", 512))
SHARE = "Account,User,GrpTRESMins,GrpTRESRaw,TRESRunMins"
MOST_TASKS = re.compile(r"\bmax_array_tasks=(\d+)")
PATIENCE = 120.0  # a database may have to read the jobs of a year


def usage(agent, ask, _):
    """Return the rows of jobs, of the queue and of limits. What Slurm does not answer is None; `trouble` says why.

    runs: folder of all runs, of a client that submits next: it gets its turn first
    since: jobs count that ran at this time or later, in seconds since 1970; None: jobs are not asked for
    now: of this machine
    jobs: rows of ALLOCATION, for each allocation that has begun; each life of a requeued job is one
    queue: rows of a number of jobs and QUEUED
    shares: rows of SHARE, of the projects and of those above them that are known
    parents: the project above each project
    tracked: names of what Slurm accounts for, such as gres/gpu
    private: names of what Slurm hides from users
    """
    trouble = []
    agent.profile.charge()
    if ask.get("runs"):
        agent.turn.take(ask["runs"])

    def tried(find, *arguments):
        try:
            return find(*arguments)
        except RequestError as error:
            trouble.append(str(error))
            return None

    settings = tried(configuration)
    known = projects_here(settings or {})
    names = sorted({row[1] for row in known["rows"]})
    above = tried(parents, names, settings or {})
    if names and above == {}:
        trouble.append("sacctmgr: Slurm hides the accounts above your projects, whose limits count, too (PrivateData)")
    return {
        "user": user(),
        "projects": names,
        "default": known["default"],
        "now": time.time(),
        "jobs": None if ask["since"] is None else tried(allocations, names, ask["since"]),
        "queue": tried(queued, names),
        "shares": tried(shares, names, above) if names and above is not None else None,
        "parents": above,
        "tracked": settings and settings.get("AccountingStorageTRES", "").split(","),
        "private": tried(private),
        "trouble": trouble,
    }


def allocations(names, since):
    """Return the rows of all jobs of some projects that the user may see; without a project, of the user's own."""
    command = ["sacct", "-X", "-D", "-n", "-P", *period(since), "-o", ",".join(ALLOCATION)]
    command += ["-a", "-A", ",".join(names)] if names else ["-u", user()]
    lines, number = ask_slurm(*command, patience=PATIENCE).splitlines(), len(ALLOCATION)
    # A name and a comment may have further lines: then that of the job has no comment.
    rows = [(line.split("|", number - 1) + [""])[:number] for line in lines]
    return [row for row in rows if len(row) == number and re.match(r"\d{1,10}\Z", row[4])]  # else it has not begun


def queued(names):
    """Return rows of what waits and runs. Equal ones are one row with their number, as those of an array's tasks."""
    chosen = ["-A", ",".join(names)] if names else ["-u", user()]
    columns = ",".join("%s:%d" % column for column in QUEUED)
    lines = ask_slurm("squeue", "-h", "-r", "-a", "-O", columns, *chosen).splitlines()
    found = Counter(tuple(line.split()) for line in lines)
    rows = [row for row in found if len(row) == len(QUEUED) and row[0] != "COMPLETING"]  # such a job has ended
    return [[found[row]] + list(row) for row in rows]


def shares(names, above):
    """Return the rows of projects, of those above them, and of the user in them.

    RequestError: Slurm hides the rows of projects, with what they may use.
    """
    rows = rows_of("sshare", "-n", "-P", "-A", ",".join(sorted(set(names).union(above.values()))), "-o", SHARE)
    rows = [[text.strip() for text in row] for row in rows]  # the tree is indented
    if not {row[0] for row in rows if not row[1]}.issuperset(names):
        raise RequestError("refused", "sshare: Slurm hides from you what your projects may use (PrivateData)")
    return rows


def parents(names, settings):
    """Return the project above each project, up to the root."""
    found, left, options = {}, set(names), ["user=", *here(settings), "format=Account,User,ParentName"]
    while left:
        accounts = "account=" + ",".join(sorted(left))
        rows = rows_of("sacctmgr", "--noheader", "--parsable2", "show", "assoc", accounts, *options)
        new = {account: above for account, name, above in rows if above and not name and account in left}
        found.update(new)
        left = set(new.values()) - set(found)
    return found


def private():
    """Return the names of what Slurm's daemons hide from users: `jobs` are those of other users."""
    said = ask_slurm("sacctmgr", "show", "configuration")  # of slurmctld and of slurmdbd
    hidden = [text for name, text in SETTING.findall(said) if name == "PrivateData"]
    return sorted(set(",".join(hidden).split(",")) - {"none", ""})


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
    submit = [settings.get("MaxJobCount", "")]  # of all users
    rows = listed("assoc", "user=" + user(), *chosen, "format=Partition,MaxSubmitJobs,GrpSubmitJobs")
    rows += listed("assoc", "user=", *chosen, "format=Partition,GrpSubmitJobs") if account else []  # of all its users
    for partition, *texts in rows:
        submit += texts if partition in ("", ask["partition"]) else ()
    for qos in {ask["qos"], qos_of(ask["partition"])} - {"", "N/A"}:
        for _, *texts in listed("qos", qos, "format=Name,MaxSubmitPU,MaxSubmitPA,GrpSubmit"):
            submit += texts
    return {"array": fewest(most), "submit": fewest(submit)}


def fewest(texts):
    return min((int(text) for text in texts if text.isdigit()), default=None)


def qos_of(partition):
    """Return the name of a partition's own QoS, N/A if it has none; empty if Slurm does not answer."""
    try:
        return fields_of(ask_slurm("scontrol", "-a", "-o", "show", "partition", partition)).get("QoS", "")
    except RequestError:
        return ""


def projects(agent, *_):
    agent.profile.charge()
    try:
        return projects_here(configuration())
    except RequestError:
        return projects_here({})


def projects_here(settings):
    """Return rows of the user's default project, a project and its QoS; none if Slurm does not answer.

    default: the project of a job whose script names none; empty if Slurm does not answer
    exported: whether PROJECT says so, which sbatch prefers
    """
    rows = listed("user", user(), "withassoc", *here(settings), "format=DefaultAccount,Account,QOS")
    exported = os.environ.get(PROJECT)
    return {"rows": rows, "default": exported or (rows[0][0] if rows else ""), "exported": bool(exported)}
