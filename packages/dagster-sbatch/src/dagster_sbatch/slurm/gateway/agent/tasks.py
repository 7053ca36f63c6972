"""The tasks of a job, and how each has ended, by its own record and Slurm's. A single job is one task, with index 0.

KEY/                of an array job; that of a single job has what a task's folder has
  tasks.jsonl       a line per task: what its Pipes context has beyond context.head
  tasks.pipes       a line per task: the values of its variables for Pipes
  tasks/17.stdout   and 17.stderr, opened by Slurm
  tasks/17/         empty until the task starts; then what a run directory has of a single job
  tasks/17.started  once the task has filled its folder
  ends.json         the ends of tasks, confirmed so far
  ends.lock         held while an agent writes it
"""

import os
from contextlib import suppress

from .disk import inode_of, load, lock, names_in, read, store
from .ends import SINGLE, end_in, is_final, verdicts
from .job_record import MESSAGES, STREAMS, Stream, events_of

CONTENTS, FOLDER, ENDS, LOCK, END = "tasks.jsonl", "tasks", "ends.json", "ends.lock", "end"
STARTED = ".started"
RECORDED = ("account", "cause", "code", "exit", "node", "state", "time", "times", "usage")  # of an end, in ends.json
# States of tasks, the worst first: the worst one of its tasks is that of the array job.
WORST = "NODE_FAIL BOOT_FAIL OUT_OF_MEMORY TIMEOUT DEADLINE FAILED PREEMPTED REVOKED CANCELLED".split() + [""]


def is_array(run):
    """Return whether a run is an array job: also if the site has removed files, or a workload has made one of them."""
    folder = os.path.join(run, FOLDER)
    return bool(inode_of(folder) and (inode_of(os.path.join(folder, "0")) or inode_of(os.path.join(run, CONTENTS))))


def count_tasks(run):
    listed, folders = read(os.path.join(run, CONTENTS)).splitlines(), names_in(os.path.join(run, FOLDER))
    return max(len(listed), sum(map(str.isdigit, folders)))


def task_folder(run, index):
    """Return the folder of a task, which has its files once the task has started."""
    return os.path.join(run, FOLDER, str(index))


class Tasks:
    """The tasks of a job.

    array  whether it is an array job
    count  how many there are; their indices begin at 0
    ends   how those have ended that are over, by index
    """

    def __init__(self, run):
        self.run, self.array = run, is_array(run)
        self.count = count_tasks(run) if self.array else 1
        self.ends = self.recorded()

    def recorded(self):
        if not self.array:
            end = load(os.path.join(self.run, END), "state", "exit", "times")
            return {0: end} if end else {}
        known = load(os.path.join(self.run, ENDS), "tasks") or {"tasks": {}}
        return {int(index): end for index, end in known["tasks"].items()}

    def path(self, index):
        return task_folder(self.run, index) if self.array else self.run

    def streams(self, index, offsets):
        """Return the streams of a task; `offsets`: what the client has, by name; see `Stream`."""
        own = os.path.join(self.path(index), "")
        beside = self.path(index) + "." if self.array else own  # where Slurm opens two of them before the task begins
        return [Stream((own if name == MESSAGES else beside) + name, name, *offsets.get(name, ())) for name in STREAMS]

    def started(self):
        """Return the indices of the tasks that have started."""
        if not self.array:
            return set(SINGLE) if "started" in events_of(self.run) else set()
        names = os.listdir(os.path.join(self.run, FOLDER))
        return {int(name[: -len(STARTED)]) for name in names if name.endswith(STARTED)}

    def missing(self):
        return set(range(self.count)) - set(self.ends)

    def find_ends(self, job):
        """Ask Slurm for the tasks whose end is not known.

        Return the ends of those that are over; the indices of those of which nothing more can come: they have recorded
        their end, or never started; the error that leaves other tasks undecided.
        """
        missing, started = self.missing(), self.started()
        asked = started if self.array else SINGLE
        found, trouble = verdicts(job, os.path.basename(self.run), self.count, missing, asked)
        ends, certain = {}, set()
        for index in missing:
            end = end_in(self.path(index), found, index)
            if not end:
                continue
            ends[index] = end
            if is_final(end, index in started, self.run):
                certain.add(index)
        return ends, certain, trouble

    def keep(self, ends):
        """Record ends that are certain, beside those that other agents have recorded meanwhile.

        If the disk is full, the next request works them out again.
        """
        self.ends.update((index, {name: end[name] for name in RECORDED if name in end}) for index, end in ends.items())
        path = os.path.join(self.run, ENDS)
        with suppress(OSError):
            if self.array:
                with open(os.path.join(self.run, LOCK), "w") as file:
                    lock(file, path)
                    self.ends = {**self.recorded(), **self.ends}
                    store(path, {"tasks": {str(index): end for index, end in self.ends.items()}})
            if not self.missing():
                store(os.path.join(self.run, END), whole(self.ends))

    def all_ends(self, job):
        """Return the ends of all tasks that are over, by index, and the error that leaves others undecided.

        Only certain ends are recorded: a task's own record may still appear for a while.
        """
        if not self.missing():
            return self.ends, None
        ends, certain, trouble = self.find_ends(job)
        if certain:
            self.keep({index: ends[index] for index in certain})
        return {**ends, **self.ends}, trouble

    def conclude(self, job):
        """Return how the job ended, None while a task is not over; and the error that leaves that undecided."""
        ends, trouble = self.all_ends(job)
        return (whole(ends), None) if len(ends) == self.count else (None, trouble)


def whole(ends):
    """Return the end of a job: that of its worst task, with the times of all."""
    worst = min(ends.values(), key=lambda end: (WORST + [end["state"]]).index(end["state"]))
    if worst["state"] in ("", "COMPLETED"):  # a task that Slurm has forgotten may have failed
        worst = max(ends.values(), key=lambda end: (end.get("code") is None, end.get("code") or 0, bool(end["state"])))
    times = []
    for place, choose in enumerate((min, min, max)):
        known = [end["times"][place] for end in ends.values() if end["times"][place] is not None]
        times.append(choose(known) if known else None)
    return dict(worst, times=times)
