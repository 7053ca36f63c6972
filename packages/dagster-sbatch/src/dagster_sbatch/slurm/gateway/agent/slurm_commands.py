"""Slurm's commands: run in an environment that does not change their answers; what the answers mean."""

import os
import pwd
import re
import signal
import subprocess
import time
from contextlib import suppress
from itertools import groupby

from .disk import RequestError, kind_of

PROJECT = "SBATCH_ACCOUNT"
KEPT = frozenset(("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT", PROJECT))
"""The variables that Slurm's commands keep: how to reach Slurm, and the project that the user has chosen."""
OTHERS = ("SACCT_", "SBATCH_", "SCANCEL_", "SCONTROL_", "SQUEUE_", "SLURM_")
ACCOUNT = re.compile(r"^#SBATCH --account=", re.M)
FIELD = re.compile(r"(\w+)=(\S*(?: +[^\s=]+(?!\S))*)")  # a path may have spaces
SETTING = re.compile(r"^(\w+) *= *(.*?) *$", re.M)
UNSEEN = 60.0  # seconds without an answer of squeue, after which, and as often, an agent asks Slurm about its own job
LAG = 15.0  # seconds to wait for a job's own record of its end, once Slurm says that it is over
COMMAND_PATIENCE, SBATCH_PATIENCE = 60.0, 120.0
CANCEL_EVERY = 0.5
UNFINISHED = ("PENDING", "RUNNING", "COMPLETING")
ACCOUNTING_TAKES = 0.1  # seconds: sacct asks a database
RUNNING = set()  # the commands and login shells that end with the agent
FORGOTTEN = 240.0  # seconds after which squeue alone proves nothing: it forgets ended jobs after MinJobAge (300)
OVER = frozenset(
    "BOOT_FAIL CANCELLED COMPLETED DEADLINE FAILED NODE_FAIL OUT_OF_MEMORY PREEMPTED REVOKED TIMEOUT".split()
)
RANGE = re.compile(r"(\d+)(?:-(\d+)(?::(\d+))?)?")


def for_slurm(variables, script=""):
    """Return those of some variables that do not change what Slurm's commands do, and the agent's own of KEPT.

    script: a job for sbatch. If it names an account, PROJECT is left out, which sbatch would prefer.
    """
    kept = {name: value for name, value in variables.items() if name == PROJECT or not name.startswith(OTHERS)}
    kept.update((name, os.environ[name]) for name in KEPT if name in os.environ)
    if ACCOUNT.search(script):
        kept.pop(PROJECT, None)
    return kept


def user():
    """Return the user's name; the number while the directory of users does not answer."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def call(*command, patience=COMMAND_PATIENCE, script=""):
    """Run a command and return the CompletedProcess; it reads `script`, a job, from its stdin."""
    # With SLURM_BITSTR_LEN=0, Slurm does not cut off the indices of an array's waiting tasks.
    env = dict(for_slurm(os.environ, script), SLURM_TIME_FORMAT="%s", SLURM_BITSTR_LEN="0")
    pipe = subprocess.PIPE
    try:
        child = subprocess.Popen(command, env=env, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True)
    except OSError as error:
        raise not_started(command[0], error)
    RUNNING.add(child)
    try:
        out, err = child.communicate(script.encode(), timeout=patience)
    except subprocess.TimeoutExpired:
        kill(child)
        raise RequestError("temporary", "%s did not answer within %d s" % (command[0], patience))
    finally:
        RUNNING.discard(child)
    return subprocess.CompletedProcess(command, child.returncode, out, err)


def not_started(command, error):
    """Return the error of a command that did not start: `temporary` if the machine is short of something now."""
    kind = "temporary" if kind_of(error) == "temporary" else "refused"
    return RequestError(kind, "%s: %s" % (command, error.strerror))


def kill(child):
    """Kill a command and what it has started; do not wait for one that hangs in the kernel."""
    os.killpg(child.pid, signal.SIGKILL)
    for pipe in (child.stdin, child.stdout, child.stderr):
        pipe.close()
    with suppress(subprocess.TimeoutExpired):
        child.wait(1)


def kill_running():
    """Kill the commands that have not ended: nobody waits for their answers any more."""
    for child in list(RUNNING):
        with suppress(OSError):  # it has ended meanwhile
            os.killpg(child.pid, signal.SIGKILL)


def ask_slurm(*command, patience=COMMAND_PATIENCE):
    """Run a query and return its stdout; raise `temporary` if it fails, or ends within a line."""
    done = call(*command, patience=patience)
    text = done.stdout.decode(errors="replace")
    if done.returncode or not (text.endswith("\n") or (text == "" and command[0] != "scontrol")):
        said = done.stderr.decode(errors="replace").strip()
        said = said or "exit code %d; its answer is empty or cut off" % done.returncode
        raise RequestError("temporary", "%s: %s" % (command[0], said))
    return text


def rows_of(*command, patience=COMMAND_PATIENCE):
    """Run a query and return its rows, split at `|`."""
    return [line.split("|") for line in ask_slurm(*command, patience=patience).splitlines() if "|" in line]


def period(since):
    """Return sacct's options for all jobs from a time on.

    Without an end, sacct leaves out what Slurm says began later than this machine's clock shows, which may be behind.
    """
    return "-S", "now%+dseconds" % (since - time.time()), "-E", "now+1days"


def listed(*what):
    """Return rows of sacctmgr; none if Slurm has no accounting, or that does not answer."""
    try:
        return rows_of("sacctmgr", "--noheader", "--parsable2", "show", *what)
    except RequestError:
        return []


def configuration():
    return dict(SETTING.findall(ask_slurm("scontrol", "show", "config")))


def here(settings):
    """Return the option with which sacctmgr leaves out other clusters that share the accounting with this one.

    settings: of Slurm; empty if the controller does not answer
    """
    return ["cluster=" + settings["ClusterName"]] if "ClusterName" in settings else []


def find_by_folder(key, since):
    """Return the job of a run, if the queue or the accounting has one; it was not submitted before `since`.

    Its user may have renamed it: a run's job is known by its folder.
    """
    jobs = jobs_in(key, rows_of("squeue", "-a", "-h", "-t", "all", "-u", user(), "-o", "%F|%Z"))
    if not jobs:
        try:
            rows = rows_of("sacct", *period(since - 120), "-X", "-n", "-P", "-u", user(), "-o", "JobID,WorkDir")
        except RequestError:
            if time.time() - since > FORGOTTEN:
                raise
            return None
        jobs = jobs_in(key, rows)
    return min(jobs, key=int, default=None)


def jobs_in(key, rows):
    """Return the jobs of those rows (id, folder) whose folder has the name of a run."""
    jobs = [row[0].partition("_")[0] for row in rows if os.path.basename(row[-1]) == key]  # `17_3`: of an array job
    return [job for job in jobs if job.isdigit()]


def fields_of(line):
    """Return the fields of a record of scontrol; the first of each name: later ones stand in paths."""
    found = {}
    for name, value in FIELD.findall(line):
        found.setdefault(name, value)
    return found


def keys_of(record):
    """Return what can be the key of the run to which a record of scontrol belongs: its user may rename a job."""
    return record.get("JobName", ""), os.path.basename(record.get("WorkDir", ""))


def is_of(record, key):
    """Return whether a record of scontrol is of a run's job: ids are used again."""
    return key in keys_of(record)


def indices(text):
    """Return the indices in a text of Slurm, such as `3`, `[2-9,12%4]` or `0-8:2`."""
    found = set()
    for first, last, step in RANGE.findall(text.partition("%")[0]):
        found.update(range(int(first), int(last or first) + 1, int(step or 1)))
    return found


def indices_in(name):
    """Return the indices of the tasks that an id of Slurm stands for, such as `17_3.batch`; a single job is task 0."""
    return indices(name.partition(".")[0].partition("_")[2] or "0")


def ranges(found):
    """Return indices as such a text."""
    parts = []
    for _, group in groupby(enumerate(sorted(found)), lambda pair: pair[1] - pair[0]):
        row = [index for _, index in group]  # of indices without a gap
        parts.append("%d-%d" % (row[0], row[-1]) if len(row) > 1 else str(row[0]))
    return ",".join(parts)


def scancel(job, key, *tasks):
    """Cancel a run's job, or tasks of it: by the run's name, or by the id if somebody has renamed the job or a task."""
    try:
        records = [fields_of(line) for line in ask_slurm("scontrol", "-o", "show", "job", job).splitlines()]
    except RequestError:
        records = []
    renamed = any(is_of(record, key) and record["JobName"] != key for record in records)
    ask_slurm("scancel", "--user", user(), *((tasks or (job,)) if renamed else ("--name", key, *tasks)))


def await_end(ask, is_over):
    """Ask Slurm until what was cancelled is over, or for a minute; return the last answer."""
    until = time.time() + COMMAND_PATIENCE
    while True:
        time.sleep(CANCEL_EVERY)
        answer = ask()
        if is_over(answer) or time.time() > until:
            return answer


def account(job, fields, ran, tasks):
    """Return sacct's rows of a job that is over and of its steps, once sacct knows that all of them are over.

    Give up after 5 % of the time for which the job ran, with the rows of what is over: sacct lags, and a short job must
    not wait for it. tasks: the indices that count.
    """
    until, pause, complete = time.time() + min(0.05 * ran, 5), 0.05, []
    while until - time.time() > ACCOUNTING_TAKES:
        try:
            rows = rows_of("sacct", "-n", "-P", "-j", job, "-o", fields, patience=until - time.time())
        except RequestError:  # the end is reported without these rows
            break
        groups = {}
        for row in rows:
            if indices_in(row[0]) & tasks:
                groups.setdefault(row[0].partition(".")[0], []).append(row)
        over = [each for each in groups.values() if not any(row[1] in UNFINISHED for row in each)]
        complete = [row for each in over for row in each]
        if over and len(over) == len(groups):
            break
        time.sleep(pause)
        pause *= 2
    return complete


# Requests


def test(agent, ask, _):
    """Ask Slurm about a script, without submitting it: when it could start, or why it would be refused."""
    agent.profile.charge()
    done = call("sbatch", "--test-only", script=ask["script"])
    return {"code": done.returncode, "text": (done.stdout + done.stderr).decode(errors="replace").strip()}
