"""Array jobs: the tasks of a run that is one, and how each has ended, by its own record and Slurm's.

KEY/
  tasks.jsonl       a line per task: what its Pipes context has beyond context.head. It makes the run an array job
  tasks.pipes       a line per task: the values of its variables for Pipes
  tasks/17.stdout   and 17.stderr, opened by Slurm
  tasks/17/         empty until the task starts; then what a run directory has of a single job
  tasks/17.started  once the task has filled its folder
  ends.json         the ends of tasks, confirmed so far
  ends.lock         held while an agent writes it
"""

import os
import re
import time

from .disk import RequestError, load, lock, read, store
from .job_record import MESSAGES, STREAMS, cause_of, events_of, node_of
from .slurm_commands import (
    ENDED,
    FORGOTTEN,
    NO_ACCOUNTING,
    UNKNOWN,
    UNKNOWN_JOB,
    ask_slurm,
    fields_of,
    is_of,
    over,
    rows_of,
    state_of,
)
from .streams import Stream
from .task_states import indices

CONTENTS, FOLDER, ENDS, LOCK = "tasks.jsonl", "tasks", "ends.json", "ends.lock"
STARTED = ".started"
TASK_ID = re.compile(r" ArrayTaskId=(\S+)")
CANCELLED = dict(UNKNOWN, state="CANCELLED")
RECORDED = ("account", "cause", "code", "exit", "node", "state", "time", "times", "usage")  # of an end, in ends.json
# Of the ends of several tasks, the one that is the array job's.
WORST = "NODE_FAIL BOOT_FAIL OUT_OF_MEMORY TIMEOUT DEADLINE FAILED PREEMPTED REVOKED CANCELLED".split() + [""]
SETTLED = 60.0  # seconds after Slurm's end of a task that has no record of its own: none will appear


def is_array(run):
    return os.path.exists(os.path.join(run, CONTENTS))


def task_folder(run, index):
    """Return the folder of a task, which has its files once the task has started."""
    return os.path.join(run, FOLDER, str(index))


class Tasks:
    """The tasks of an array job.

    count  how many there are; their indices begin at 0
    ends   how those have ended that are over, by index
    """

    def __init__(self, run):
        self.run = run
        self.folder = os.path.join(run, FOLDER)
        self.count = len(read(os.path.join(run, CONTENTS)).splitlines())
        self.ends = self.recorded()

    def recorded(self):
        known = load(os.path.join(self.run, ENDS), "tasks") or {"tasks": {}}
        return {int(index): end for index, end in known["tasks"].items()}

    def path(self, index):
        return task_folder(self.run, index)

    def streams(self, index, offsets):
        """Return the streams of a task."""
        paths = {name: "%s.%s" % (self.path(index), name) for name in STREAMS}
        paths[MESSAGES] = os.path.join(self.path(index), MESSAGES)
        return [Stream(paths[name], name, offsets.get(name, 0)) for name in STREAMS]

    def started(self):
        """Return the indices of the tasks that have started."""
        names = os.listdir(self.folder)
        return {int(name[: -len(STARTED)]) for name in names if name.endswith(STARTED)}

    def missing(self):
        return set(range(self.count)) - set(self.ends)

    def find_ends(self, job):
        """Ask Slurm for the tasks whose end is not known.

        Return the ends of those that are over; the indices of those of which nothing more can come: they have recorded
        their end, or never started; the error that leaves other tasks undecided.
        """
        missing, started = self.missing(), self.started()
        found, trouble = verdicts(job, os.path.basename(self.run), self.count, missing, started)
        ends, certain = {}, set()
        for index in missing:
            slurms = found.get(index, UNKNOWN)
            if slurms is None:
                continue
            events = events_of(self.path(index))
            own = events.get("end") or {}
            old = own.get("code") is not None and time.time() - own["time"] > FORGOTTEN
            if index not in found and not old:
                continue
            ends[index] = dict(own, cause=cause_of(self.path(index)), node=node_of(events), **slurms)
            never = slurms["state"] and slurms["times"][1] is None and index not in started
            settled = time.time() - (slurms["times"][2] or time.time()) > SETTLED
            if own or never or settled:
                certain.add(index)
        return ends, certain, trouble

    def keep(self, ends):
        """Record ends that are certain, beside those that other agents have recorded meanwhile.

        If the disk is full, the next request works them out again.
        """
        self.ends.update((index, {name: end[name] for name in RECORDED if name in end}) for index, end in ends.items())
        path = os.path.join(self.run, ENDS)
        try:
            with open(os.path.join(self.run, LOCK), "w") as file:
                lock(file, path)
                self.ends = {**self.recorded(), **self.ends}
                store(path, {"tasks": {str(index): end for index, end in self.ends.items()}})
                if not self.missing():
                    store(os.path.join(self.run, "end"), whole(self.ends))
        except OSError:
            pass

    def all_ends(self, job):
        """Return the ends of all tasks that are over, by index, and the error that leaves others undecided.

        Ends that are certain are recorded: without a task's own record, one may still appear for a while.
        """
        if not self.missing():
            return self.ends, None
        ends, certain, trouble = self.find_ends(job)
        if certain:
            self.keep({index: ends[index] for index in certain})
        return {**ends, **self.ends}, trouble

    def conclude(self, job):
        """Return how the array job ended; None while a task is not over."""
        ends, trouble = self.all_ends(job)
        if len(ends) == self.count:
            return whole(ends)
        if trouble:
            raise trouble
        return None


def whole(ends):
    """Return the end of an array job: that of its worst task, with the times of all."""
    worst = min(ends.values(), key=lambda end: (WORST + [end["state"]]).index(end["state"]))
    if worst["state"] in ("", "COMPLETED"):  # a task that Slurm has forgotten may have failed
        worst = max(ends.values(), key=lambda end: (end.get("code") is None, end.get("code") or 0, bool(end["state"])))
    times = []
    for place, choose in enumerate((min, min, max)):
        known = [end["times"][place] for end in ends.values() if end["times"][place] is not None]
        times.append(choose(known) if known else None)
    return dict(worst, times=times)


def verdicts(job, key, count, wanted, started):
    """Return what Slurm says of tasks by index, and the error that leaves the others undecided.

    count: of the array job's tasks
    wanted: the indices to ask for
    started: those that have started. If Slurm has no record of another one, that was cancelled while it waited
    A task that is over has what `over` returns, one that is not has None.
    """
    found, known, trouble = {}, False, None
    try:
        found, rest, known = ask_controller(job, key, count, wanted)
        if rest:
            found.update(dict.fromkeys(wanted - set(found) - started, rest))
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
    found.update(more)
    left -= set(more)
    if trouble and left:
        return found, trouble
    for index in left:
        found[index] = CANCELLED if (known or recorded) and index not in started else UNKNOWN
    return found, None


def ask_controller(job, key, count, wanted):
    """Return states by index, that of waiting tasks that were all cancelled, and whether Slurm knows the job."""
    found, rest, known = {}, None, False
    for line in ask_slurm("scontrol", "-o", "show", "job", job).splitlines():
        text = TASK_ID.search(line)
        numbers = indices(text.group(1)) if text else set()
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
    return found, rest, known


def ask_accounting(job, key, wanted):
    """Return states by index, and whether the accounting knows the job."""
    rows = rows_of("sacct", "-X", "-n", "-P", "-j", job, "-o", ENDED + ",JobID")
    rows = [row for row in rows if row[6] == key]
    found = {}
    for row in rows:
        found.update(dict.fromkeys(indices(row[7].partition("_")[2]) & wanted, over(row, row[5])))
    return found, bool(rows)
