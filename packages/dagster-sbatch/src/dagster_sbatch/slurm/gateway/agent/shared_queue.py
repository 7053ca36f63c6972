"""squeue's view of the user's jobs, which all agents on a machine share."""

import os
import threading
import time

from .disk import RequestError, check, load, lock, own, store
from .slurm_commands import OVER, indices, indices_in, ranges, rows_of, user

SQUEUE_EVERY = 15.0
UNSHARED_EVERY = 60.0  # seconds between two calls of squeue by an agent that asks for itself
WAITS = ("REQUEUED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT")  # PENDING, to whoever waits for a job


def by_job(rows):
    """Return squeue's rows (id, state, reason, start, key of the run, account) by job, without the id.

    The rows of an array job become one: its state is RUNNING as long as a task runs, its reason that of the waiting
    tasks. A row ends with the indices of the tasks that are not over, by state; a single job is one task, with index 0.
    """
    jobs, found = {}, {}
    for name, state, *rest in rows:
        row = ["PENDING" if state in WAITS else state] + rest
        found.setdefault(name.partition("_")[0], []).append((indices_in(name), row))
    for job, tasks in found.items():
        active = {}
        for numbers, row in tasks:
            if row[0] not in OVER:
                active.setdefault(row[0], set()).update(numbers)
        waiting = [row for _, row in tasks if row[0] == "PENDING"]
        running = [row for _, row in tasks if row[0] not in OVER and row[0] != "PENDING"]
        state, reason, start, *rest = (running or waiting or [tasks[-1][1]])[0]
        if waiting:
            reason, start = waiting[0][1:3]
        jobs[job] = [state, reason, start] + rest + [{name: ranges(numbers) for name, numbers in active.items()}]
    return jobs


class Queue:
    """The view, refreshed every SQUEUE_EVERY by the first agent on this machine that needs it.

    It is in a file beside the runs. An agent that cannot write that file asks squeue for itself, less often.
    """

    def __init__(self):
        self.view = {"at": 0, "asked": 0, "calls": 0, "jobs": {}, "trouble": None}
        self.every = SQUEUE_EVERY
        self.folder = None
        self.wanted = threading.Event()

    def want(self, folder):
        """Keep the view fresh from now on; `folder`: of the runs."""
        self.folder = folder
        self.wanted.set()

    def refresh(self, folder, anew=False):
        """Bring the view up to date; `anew`: even if it is fresh."""
        path = os.path.join(folder, ".queue-%s.json" % os.uname()[1])
        try:
            (check if self.wanted.is_set() else own)(folder)  # while a job is followed, its user may be moving it
            with open(path + ".lock", "w") as file:
                lock(file, path)
                shared = load(path, *self.view) or self.view
                if shared["asked"] > self.view["asked"]:
                    self.view, self.every = shared, SQUEUE_EVERY
                if anew or not self.fresh():
                    self.view = self.ask()
                    store(path, self.view)
                    self.every = SQUEUE_EVERY
        except OSError as error:
            self.every = UNSHARED_EVERY
            if anew or not self.fresh():
                self.view = self.ask()
            if not self.view["trouble"]:
                text = "each run asks squeue for itself, since the answer cannot be shared: %s: %s"
                self.view["trouble"] = text % (error.filename or path, error.strerror)

    def fresh(self):
        return 0 <= time.time() - self.view["asked"] < self.every

    def ask(self):
        """Return squeue's answer as a view; without an answer, the former view with its age."""
        view = dict(self.view, asked=time.time(), calls=self.view["calls"] + 1, trouble=None)
        try:
            rows = rows_of("squeue", "-a", "-h", "-t", "all", "-u", user(), "-o", "%i|%T|%r|%S|%Z|%a")
            # A job's user may rename it: a run's job is known by its folder. That of another may have further lines.
            rows = [row[:4] + [os.path.basename(row[4])] + row[5:] for row in rows if len(row) > 5]
            view.update(at=view["asked"], jobs=by_job(rows))
        except RequestError as error:
            view["trouble"] = str(error)
        return view

    def keep(self):
        """Refresh the view for ever, in a thread of its own: a slow controller must not delay the streams."""
        while self.wanted.wait():
            try:
                self.refresh(self.folder)
            except Exception as error:  # the thread is needed for as long as the agent lives
                self.view = dict(self.view, trouble=repr(error), asked=time.time())
            due = SQUEUE_EVERY - (time.time() - self.view["asked"])
            # Not all agents at once: 0.2 to 2 s late.
            time.sleep(min(max(due, 0), SQUEUE_EVERY) + 0.2 + 1.8 * os.urandom(1)[0] / 255)

    def row(self, job, key):
        """Return state, reason, expected start and account of a job, as last seen; None if it was not seen."""
        found = self.view["jobs"].get(job)
        return found[:3] + found[4:5] if found and found[3] == key else None

    def tasks(self, job, key):
        """Return the indices of a job's tasks that are not over, by state, as last seen."""
        found = self.view["jobs"].get(job, ())
        active = found[5] if len(found) > 5 and found[3] == key else {}  # an older agent writes shorter rows
        return {state: indices(text) for state, text in active.items()}


# Requests


def queue(agent, ask, _):
    agent.queue.refresh(ask["runs"])
    return agent.queue.view
