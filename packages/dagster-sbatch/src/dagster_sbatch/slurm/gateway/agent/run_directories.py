"""Run directories: creating them, reading how a run ended, listing them.

KEY/            0700; its name is the submission key, and the job's name
  job.sh ...    what the client has sent; `digest` is its hash
  lock          held while an agent submits or cancels
  tried         sbatch may have been called: search the queue for the job before calling it again
  job           a link to the job's id, made by whoever knows it first: the agent or the job itself
  events        the job's own record: {"started": node}, then {"code": n, "sizes": {...}}; code null: cut short
  cause         why it failed, in a sentence, if something in the job knows more than the exit code
  end           how it ended, by the job's own record and Slurm's
  cancelled     it must not be submitted any more
  failed        a step rejected its result
  follower-ID   a Dagster run that submitted or adopted it
"""

import binascii
import errno
import hashlib
import json
import os
import re
import time

from .disk import RequestError, load, parse, read, remove_tree, store, unique, write
from .slurm_commands import FORGOTTEN, verdict

MESSAGES = "messages.jsonl"
STREAMS = (MESSAGES, "stdout", "stderr")
EVENTS, CAUSE = "events", "cause"
FOLLOWER = "follower-"
KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}\Z")
DAY = 86400


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
    return os.path.exists(os.path.join(run, mark))


def mark(run, name):
    write(os.path.join(run, name), b"")


def lay_out(run, files):
    """Make the run directory (0700) with all its files in one step: a rename onto a folder that has files fails."""
    new = unique(run) + ".new"
    os.makedirs(new, 0o700)
    try:
        for name in STREAMS + (EVENTS, CAUSE):  # made now: a file system may cache that a file does not exist
            os.close(os.open(os.path.join(new, name), os.O_CREAT | os.O_WRONLY, 0o600))
        for name, content in files.items():
            if name.startswith("/") or not all(part not in ("", ".", "..") for part in name.split("/")):
                raise RequestError("refused", "%r is not a path below the run directory" % name)
            os.makedirs(os.path.dirname(os.path.join(new, name)), 0o700, exist_ok=True)
            write(
                os.path.join(new, name),
                binascii.a2b_base64(content["base64"]) if isinstance(content, dict) else content.encode(),
            )
        write(os.path.join(new, "digest"), digest(files))
        os.rename(new, run)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    finally:
        if os.path.isdir(new):
            remove_tree(new)


def digest(files):
    """Return what differs between two submissions under one key."""
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest().encode()


def events_of(run):
    """Return the job's own records of its latest start, by `started` and `end`; a requeued job starts again."""
    events = {}
    for line in read(os.path.join(run, EVENTS)).split(b"\n")[:-1]:  # the last piece is not a whole line yet
        event = parse(line, "time")
        if not event:  # cut off by a full disk
            continue
        events = dict(events, end=event) if "code" in event else {"started": event}
    return events


def job_of(run):
    """Return the run's job, as sbatch or the job itself has recorded it; None if neither has."""
    try:
        return os.readlink(os.path.join(run, "job"))
    except FileNotFoundError:
        return None


def settle(run, job):
    """Record the run's job, unless one is recorded; return the recorded one."""
    try:
        os.symlink(job, os.path.join(run, "job"))
    except FileExistsError:
        pass
    except OSError as error:  # the job exists all the same, and records itself when it starts
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
    return job_of(run) or job


def conclude(run, job):
    """Return how the run ended, by its own record and Slurm's; None while it has not."""
    known = load(os.path.join(run, "end"), "state", "exit", "times")
    if known:
        return known
    own = events_of(run).get("end") or {}
    try:
        slurms = verdict(job, os.path.basename(run))
    except RequestError as error:
        old = own.get("code") is not None and time.time() - own["time"] > FORGOTTEN
        if error.kind != "forgotten" and not old:
            raise
        slurms = {"state": "", "exit": "", "times": [None] * 3, "account": ""}
    if slurms is None:
        return None
    own = events_of(run).get("end") or {}  # once more: the job may have written it meanwhile
    cause = read(os.path.join(run, CAUSE)).decode(errors="replace").strip()
    end = dict(own, cause=cause, **slurms)
    if own:
        try:
            store(os.path.join(run, "end"), end)
        except OSError:  # the disk is full: the next request works it out again
            pass
    return end


def quietly_conclude(run, job):
    """Return how a run ended; None also while Slurm does not answer."""
    try:
        return conclude(run, job)
    except RequestError:
        return None


def row_of(agent, job, key, events):
    """Return a job's row of the queue; RUNNING if that view is older than the job's own record of its start."""
    row = agent.queue.row(job, key)
    if "started" in events and (not row or row[0] == "PENDING"):
        return ["RUNNING", "None", ""] + (row or [])[3:]
    return row


def latest(folder, family):
    """Return the last attempt of a family: its number (0: there is none), whether it is over, how it ended."""
    attempts = [name[len(family) + 1 :] for name in os.listdir(folder) if name.startswith(family + "-")]
    number = max([int(text) for text in attempts if text.isdigit()] or [0])
    run = os.path.join(folder, "%s-%d" % (family, number))
    job = job_of(run)
    found = {"attempt": number, "over": True, "end": None, "job": job, "rejected": False, "followers": []}
    found["record"] = record_of(run)
    if not number or not (job or has(run, "tried")):  # never submitted: sbatch refused it, or the agent died before
        return found
    end = conclude(run, job) if job else None
    return dict(found, over=bool(end), end=end, rejected=has(run, "failed"), followers=followers_of(run))


def others(folder, family, beginnings):
    """Return runs whose names have one of some beginnings, of other families, if their job may not be over."""
    found = []
    for name in sorted(os.listdir(folder)) if beginnings else ():
        run, its = os.path.join(folder, name), name.rpartition("-")[0]
        if its == family or not name.startswith(tuple(beginnings)) or not name.rpartition("-")[2].isdigit():
            continue
        job = job_of(run)
        if (job or has(run, "tried")) and not has(run, "end") and not has(run, "cancelled"):
            found.append({"family": its, "run": run, "job": job, "record": record_of(run)})
    return found


def record_of(run):
    """Return what a run was submitted with; None if it has no readable record of that."""
    try:
        return json.loads(read(os.path.join(run, "submitted_with.json")).decode())
    except ValueError:
        return None


def note_follower(run, follower):
    """Record a Dagster run that follows the job. If the disk is full, a result may be offered a second time."""
    try:
        mark(run, FOLLOWER + checked(follower))
    except OSError:
        pass


def followers_of(run):
    """Return the Dagster runs that submitted or adopted the job, in that order."""
    marks = [name for name in os.listdir(run) if name.startswith(FOLLOWER)]
    marks.sort(key=lambda name: os.stat(os.path.join(run, name)).st_mtime)
    return [name[len(FOLLOWER) :] for name in marks]


# Requests


def state(agent, ask, _):
    """Return a run's job, its row of the queue, and its end if it is over."""
    run, key = locate(ask)
    job = job_of(run)
    end = conclude(run, job) if job else None
    if job and not end:
        agent.queue.refresh(os.path.dirname(run))
    return {"job": job, "end": end, "row": job and row_of(agent, job, key, events_of(run))}


def reject(_, ask, __):
    """Record that a step rejected the result of a run."""
    run, _ = locate(ask)
    mark(run, "failed")
    return {}


def runs(_, ask, __):
    """Return all that is known of every run without asking Slurm."""
    folder, found = ask["runs"], []
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
        run = os.path.join(folder, name)
        about = load(os.path.join(run, "about.json"), "run", "asset")
        if about:
            try:
                at, followers = os.stat(os.path.join(run, EVENTS)).st_mtime, followers_of(run)
            except FileNotFoundError:  # it is being removed
                continue
            end = load(os.path.join(run, "end"), "state", "exit", "times")
            row = {"run": run, "job": job_of(run), "about": about, "end": end, "at": at, "followers": followers}
            found.append(row)
    return {"found": found}
