"""What people ask about the tasks of an array job: how many are done, what one has recorded, and its cancellation."""

import os

from .disk import RequestError
from .job_record import cut_short, events_of
from .run_directories import has, job_of, locate
from .slurm_commands import await_end, scancel
from .task_states import ranges
from .tasks import Tasks, is_array


def count(run):
    """Return how many tasks of an array job are done, running, waiting and failed, without asking Slurm.

    Ends that nobody has confirmed yet count as the tasks' own records say; one that was cut short waits to run again.
    """
    tasks = Tasks(run)
    codes = {
        index: 0 if end["state"] in ("COMPLETED", "") and end.get("code") == 0 else 1
        for index, end in tasks.ends.items()
    }
    started = tasks.started()
    for index in set(started) - set(codes):
        events = events_of(tasks.path(index))
        if cut_short(events):
            started.discard(index)
        elif "end" in events:
            codes[index] = events["end"]["code"]
    failed = sum(1 for index, code in codes.items() if code != 0 or has(tasks.path(index), "failed"))
    running = len(started - set(codes))
    waiting = tasks.count - len(codes) - running
    return {"done": len(codes) - failed, "running": running, "waiting": waiting, "failed": failed}


# Requests


def task_counts(_, ask, __):
    """Return the counts of those of some runs that are array jobs, by run."""
    return {"counts": {run: count(run) for run in ask["paths"] if is_array(run)}}


def task_records(_, ask, __):
    """Return of some tasks, by index, the node and the time of the latest start, and the end of stderr.

    tail: how many bytes of stderr
    """
    run, _ = locate(ask)
    tasks, found = Tasks(run), {}
    for index in ask["tasks"]:
        started = events_of(tasks.path(index)).get("started") or {"started": "", "time": None}
        stderr = tail_of(tasks.path(index) + ".stderr", ask["tail"]) if ask["tail"] else ""
        found[str(index)] = {"node": started["started"], "time": started["time"], "stderr": stderr}
    return {"records": found}


def tail_of(path, size):
    try:
        with open(path, "rb") as file:
            file.seek(max(os.fstat(file.fileno()).st_size - size, 0))
            return file.read(size).decode(errors="replace")
    except FileNotFoundError:
        return ""


def cancel_tasks(_, ask, __):
    """Cancel some tasks, and wait until they are over; return by index the ends of those that ended within a minute."""
    run, key = locate(ask)
    job, wanted, tasks = job_of(run), set(ask["tasks"]), Tasks(run)
    if not job:
        raise RequestError("refused", "%s has no job" % run)
    ends = tasks.all_ends(job)[0]
    if wanted - set(ends):
        scancel(job, key, "%s_[%s]" % (job, ranges(wanted - set(ends))))
        ends = await_end(lambda: tasks.all_ends(job)[0], wanted.issubset)
    return {"ends": {str(index): ends[index] for index in wanted & set(ends)}}
