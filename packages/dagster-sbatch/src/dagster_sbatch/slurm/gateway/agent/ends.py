"""How jobs, and tasks of array jobs, have ended: by their own records and by what Slurm says."""

import os
import re
import time

from .disk import RequestError, inode_of, write
from .job_record import cause_of, events_of
from .slurm_commands import FORGOTTEN, OVER, ask_slurm, fields_of, indices, indices_in, is_of, rows_of

ENDED = "State,ExitCode,Submit,Start,End,Account,JobName,JobID,WorkDir"
TASK_ID = re.compile(r" ArrayTaskId=(\S+)")
UNKNOWN_JOB, NO_ACCOUNTING = "Invalid job id", "disabled"  # in errors of scontrol and of sacct
UNKNOWN = {"state": "", "exit": "", "times": [None] * 3, "account": ""}  # the end of a job that Slurm has forgotten
CANCELLED = dict(UNKNOWN, state="CANCELLED")
RESTARTED = frozenset("BOOT_FAIL NODE_FAIL PREEMPTED".split())  # after these, Slurm may start the same job again
SINGLE = frozenset([0])
# Seconds after Slurm's end of a job: it records nothing more, and its processes are gone. The accounting has the end of
# a job that is cut short as soon as Slurm asks its processes to end; they have KillWait (by default 30 s) to do so.
SETTLED = 60.0


def end_in(folder, found, index):
    """Return how a job or a task ended; None if it has not, or that is not decided.

    folder: with its own record
    found: what Slurm says, by index
    """
    if found.get(index, UNKNOWN) is None:
        return None
    events = events_of(folder)
    own = events.get("end") or {}
    old = own.get("code") is not None and time.time() - own["time"] > FORGOTTEN
    if index not in found and not old:
        return None
    node = events.get("started", {}).get("started", "")  # the first one of the latest start
    return dict(own, cause=cause_of(folder), node=node, **found.get(index, UNKNOWN))


def is_final(end, started, run):
    """Return whether nothing more can come of what is over: it has its own record, never started, or ended a while ago.

    started: whether it has said so
    run: its run directory; since when it is known to be over is noted there if Slurm has no time of its end
    """
    recorded = "code" in end and not may_be_success(end)  # else the record is of an earlier start, which was cut short
    if recorded or (end["state"] and end["times"][1] is None and not started):
        return True
    return time.time() - (end["times"][2] or noted(os.path.join(run, "forgotten"))) > SETTLED


def noted(mark):
    """Return when a mark was made; make it now, if that was not before."""
    try:
        if not inode_of(mark):
            write(mark, b"")
        return os.stat(mark).st_mtime
    except OSError:  # the disk is full, or the run is being removed
        return time.time()


def may_be_success(end):
    """Return whether Slurm calls it completed, and only its own record is missing."""
    return end["state"] == "COMPLETED" and end.get("code") is None


def verdicts(job, key, count, wanted, started):
    """Return what Slurm says of tasks by index, and the error that leaves the others undecided.

    The controller is asked first, then the accounting.

    count: of the array job's tasks
    wanted: the indices to ask for
    started: those that have started. Another one of which Slurm has no record was cancelled while it waited
    For a task that is over, Slurm's answer is what `over` returns; for any other it is None.
    """
    found, known, trouble = {}, False, None
    try:
        found, known = ask_controller(job, key, count, wanted, started)
    except RequestError as error:
        trouble = None if UNKNOWN_JOB in str(error) else error
    left = wanted - set(found)
    if not left:
        return found, None
    try:
        more, recorded = ask_accounting(job, key, left)
    except RequestError as error:
        if trouble or NO_ACCOUNTING not in str(error):
            return found, trouble or error
        more, recorded = {}, False
    if trouble:
        more = {index: said for index, said in more.items() if not said or suffices(said)}
    else:  # what the controller does not know is over, even if the accounting has never got its end
        more = {index: said for index, said in more.items() if said}
    found.update(more)
    left -= set(more)
    if trouble and left:
        return found, trouble
    for index in left:
        found[index] = CANCELLED if (known or recorded) and index not in started else UNKNOWN
    return found, None


def ask_controller(job, key, count, wanted, started):
    """Return ends by index, those of waiting tasks included if all were cancelled, and whether Slurm knows the job."""
    found, rest, known = {}, None, False
    for line in ask_slurm("scontrol", "-o", "show", "job", job).splitlines():
        text = TASK_ID.search(line)
        numbers = indices(text.group(1)) if text else SINGLE
        remains = bool(numbers) and min(numbers) >= count  # of the waiting tasks, when all of them are cancelled
        if not remains and not numbers & wanted:
            continue
        record = fields_of(line)
        if not is_of(record, key):
            continue
        known, said = True, state_of(record)
        if remains and said:
            rest = dict(said, times=[said["times"][0], None, said["times"][2]])
        found.update(dict.fromkeys(numbers & wanted, said))
    return {**dict.fromkeys(wanted - started if rest else (), rest), **found}, known


def ask_accounting(job, key, wanted):
    """Return ends by index, and whether the accounting knows the job."""
    rows = rows_of("sacct", "-X", "-n", "-P", "-j", job, "-o", ENDED)
    rows = [row for row in rows if is_of({"JobName": row[6], "WorkDir": row[-1]}, key)]
    found = {}
    for row in rows:
        found.update(dict.fromkeys(indices_in(row[7]) & wanted, over(row, row[5])))
    return found, bool(rows)


def suffices(said):
    """Return whether an end by the accounting counts while the controller does not answer.

    Only the controller knows whether Slurm has put a job back in the queue, and whether its processes still run.
    """
    _, start, end = said["times"]
    ended = said["state"] in ("COMPLETED", "FAILED") or not start or time.time() - (end or 0) > SETTLED
    return ended and said["state"] not in RESTARTED


def state_of(record):
    """Return what a record of scontrol says of the end, as `over`."""
    names = ("JobState", "ExitCode", "SubmitTime", "StartTime", "EndTime")
    return over([record[name] for name in names], record.get("Account"))


def over(row, project):
    """Return state, exit code, times and account of what is over, None of what is not."""
    state = row[0].partition(" ")[0].rstrip("+")  # "CANCELLED by 123", "COMPLETED+"
    times = [int(text) if text.isdigit() else None for text in row[2:5]]
    return {"state": state, "exit": row[1], "times": times, "account": project} if state in OVER else None
