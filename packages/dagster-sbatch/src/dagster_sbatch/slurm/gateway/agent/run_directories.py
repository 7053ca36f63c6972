"""Run directories: creating them, reading how a run ended, listing them.

KEY/            0700; its name is the submission key, and the job's name
  job.sh ...    what the client has sent; `digest` is its hash
  lock          held while an agent submits or cancels
  tried         sbatch may have been called: search the queue for the job before calling it again
  job           a link to the job's id, made by the first that knows it: the agent or the job itself
  events        the job's own record: {"started": node}, then {"code": n, "sizes": {...}}; code null: cut short
  cause         why it failed, in a sentence, if something in the job knows more than the exit code
  end           how it ended, by the job's own record and Slurm's
  cancelled     it must not be submitted any more
  forgotten     since the time of this file, it is known to be over, and Slurm has no time of its end
  failed        a step rejected its result, or the next attempt was submitted
  follower-ID   a Dagster run that submitted or adopted it
  work/         the workload's working directory: what it writes there means nothing here
"""

import errno
import hashlib
import json
import os
import re
from contextlib import suppress

from .disk import RequestError, inode_of, kind_of, load, names_in, remove_tree, unique, write
from .ends import SINGLE, may_be_success
from .job_record import CAUSE, EVENTS, STREAMS, cut_short, events_of
from .slurm_commands import await_end, ranges, scancel
from .tasks import CONTENTS, END, ENDS, FOLDER, Tasks, is_array, task_folder

FOLLOWER = "follower-"
KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}\Z")
DAY = 86400
RUNS = ["RUNNING", "None", ""]  # the row of a job that has started, and is not in the queue as last seen


def locate(ask):
    """Return a run directory and the submission key, which is its name."""
    run = ask["run"]
    return run, checked(os.path.basename(run))


def checked(key):
    """Return a submission key or the first part of one, if it is valid."""
    if not KEY.match(key):
        raise RequestError("refused", "%r is not a valid name of a run" % key)
    return key


def has(run, mark):
    return bool(inode_of(os.path.join(run, mark)))


def mark(run, name):
    write(os.path.join(run, name), b"")


def lay_out(run, files):
    """Make the run directory (0700) with all its files in one step: a rename onto a folder that has files fails."""
    new = unique(run) + ".new"
    os.makedirs(new, 0o700)
    try:
        for name in () if CONTENTS in files else STREAMS + (EVENTS, CAUSE):  # now: absence may be cached
            os.close(os.open(os.path.join(new, name), os.O_CREAT | os.O_WRONLY, 0o600))
        if CONTENTS in files:
            os.mkdir(os.path.join(new, FOLDER), 0o700)
            for index in range(len(files[CONTENTS].splitlines())):
                os.mkdir(os.path.join(new, FOLDER, str(index)), 0o700)
        for name, content in files.items():
            if name.startswith("/") or not all(part not in ("", ".", "..") for part in name.split("/")):
                raise RequestError("refused", "%r is not a path below the run directory" % name)
            os.makedirs(os.path.dirname(os.path.join(new, name)), 0o700, exist_ok=True)
            write(os.path.join(new, name), content.encode())
        write(os.path.join(new, "digest"), digest(files))
        os.rename(new, run)
    except BaseException as error:
        remove_tree(new)
        if not (isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST)):
            raise


def digest(files):
    """Return a digest of a submission's files, to tell two submissions under one key apart."""
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest().encode()


def job_of(run):
    """Return the run's job, as sbatch or the job itself has recorded it; None if neither has."""
    try:
        return os.readlink(os.path.join(run, "job"))
    except FileNotFoundError:
        return None


def may_have_job(run):
    """Return whether a run has a job, or may get one because its submission got no answer."""
    return bool(job_of(run)) or (has(run, "tried") and not has(run, "cancelled"))


def settle(run, job):
    """Record the run's job, unless one is recorded; return the recorded one."""
    try:
        os.symlink(job, os.path.join(run, "job"))
    except FileExistsError:
        pass
    except OSError as error:  # the job exists all the same, and records itself when it starts
        if kind_of(error) != "refused":
            raise
    return job_of(run) or job


def attempt_of(run, certain=False):
    """Return what is known of a run and its tasks; `over`: whether all of them are.

    A single job is a task without id; so are the tasks of an array whose record cannot be read.
    certain: a task that Slurm calls complete is not over while its own record may still appear (NFS shows it later)
    RequestError: Slurm does not answer, and some task's end is not recorded.
    """
    job, tasks, ends = job_of(run), Tasks(run), {}
    if job:
        ends, trouble = tasks.all_ends(job)
        if certain:
            ends = {index: end for index, end in ends.items() if index in tasks.ends or not may_be_success(end)}
        if trouble and len(ends) < tasks.count:
            raise trouble
    record, started, number = record_of(run), tasks.started(), run.rpartition("-")[2]
    ids = [task["id"] for task in ((tasks.array and record) or {}).get("tasks", [{"id": ""}] * tasks.count)]
    judged = started.union(ends) if tasks.array else SINGLE  # one that Slurm refuses is rejected without a start
    return {
        "run": run,
        "number": int(number) if number.isdigit() else 0,
        "job": job,
        "over": len(ends) == tasks.count or not may_have_job(run),
        "tasks": ids,
        "ends": {str(index): end for index, end in ends.items()},
        "started": sorted(started),
        "requeued": sorted(index for index in started - set(ends) if cut_short(events_of(tasks.path(index)))),
        "rejected": sorted(index for index in judged if has(tasks.path(index), "failed")),
        "followers": followers_of(run),
        "record": record,
    }


def record_of(run):
    """Return what a run was submitted with; None if it has no readable record of that."""
    return load(os.path.join(run, "submitted_with.json"))


def note_follower(run, follower):
    """Record a Dagster run that follows the job. If the disk is full, a result may be offered a second time."""
    with suppress(OSError):
        mark(run, FOLLOWER + checked(follower))


def followers_of(run):
    """Return the Dagster runs that submitted or adopted the job, in that order."""
    marks = [name for name in os.listdir(run) if name.startswith(FOLLOWER) and not name.endswith(".part")]
    marks.sort(key=lambda name: os.stat(os.path.join(run, name)).st_mtime)
    return [name[len(FOLLOWER) :] for name in marks]


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


def state(agent, ask, _):
    """Return a run's job, its row of the queue, and its end if it is over."""
    run, key = locate(ask)
    job = job_of(run)
    (end, trouble), row = Tasks(run).conclude(job) if job else (None, None), None
    if trouble:
        raise trouble
    if job and not end:
        agent.queue.refresh(os.path.dirname(run))
        row, started = agent.queue.row(job, key), "started" in events_of(run)
        if started and row and row[0] == "PENDING":  # that view is older than the start, or the job waits to run again
            agent.queue.refresh(os.path.dirname(run), anew=True)
            row = agent.queue.row(job, key)
        row = row or (RUNS if started else None)
    return {"job": job, "end": end, "row": row}


def reject(_, ask, __):
    """Record that a step rejected the result of a run, or that of one of its tasks."""
    run, _ = locate(ask)
    mark(run if ask.get("task") is None else task_folder(run, ask["task"]), "failed")
    return {}


def attempt(_, ask, __):
    return attempt_of(locate(ask)[0])


def runs(_, ask, __):
    """Return all that is known of every run without asking Slurm; the oldest run comes first."""
    folder, found = ask["runs"], []
    for name in sorted(names_in(folder)):
        run = os.path.join(folder, name)
        about = load(os.path.join(run, "about.json"), "run", "asset")
        if about:
            try:
                changed = (FOLDER, ENDS) if is_array(run) else (EVENTS,)
                at = max(os.stat(os.path.join(run, name)).st_mtime for name in changed if has(run, name))
                followers, made = followers_of(run), os.stat(os.path.join(run, "about.json")).st_mtime
            except (FileNotFoundError, ValueError):  # it is being removed
                continue
            end = load(os.path.join(run, END), "state", "exit", "times")
            row = {"run": run, "job": job_of(run), "about": about, "end": end, "at": at, "followers": followers}
            found.append((made, run, dict(row, array=is_array(run))))
    return {"found": [row for _, _, row in sorted(found)]}


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
