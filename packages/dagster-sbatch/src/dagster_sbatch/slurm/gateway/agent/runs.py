"""Run directories: laid out at once, asked how they ended, listed and cleaned up.

KEY/            0700; its name is the submission key, and the job's name
  job.sh ...    what the client has sent; `digest` is its hash
  lock          held while somebody submits or cancels
  tried         sbatch may have been called: look behind it before it is called again
  job           a link to the job's id, made by whoever knows it first, the job itself included
  events        the job's own words: {"started": node}, then {"code": n, "sizes": {...}}; null: cut short
  cause         why it failed, in a sentence, where something in it knows better than the exit code
  end           how it ended, by those words and Slurm's
  cancelled     it must not be submitted any more
  failed        a step found its result wanting
  follower-ID   a Dagster run that submitted or adopted it
"""

import binascii
import errno
import hashlib
import json
import os
import re
import time

from .disk import load, parse, read, store, unique, write
from .files import Failure, remove_tree
from .slurm import FORGOTTEN, QUEUE, verdict

MESSAGES = "messages.jsonl"
STREAMS = (MESSAGES, "stdout", "stderr")
EVENTS, CAUSE = "events", "cause"
FOLLOWER = "follower-"
KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}\Z")
DAY = 86400


def locate(ask):
    """A run directory and the submission key, which is its name."""
    run = ask["run"]
    return run, checked(os.path.basename(run))


def checked(key):
    """The first part of a submission key, or all of it."""
    if not KEY.match(key):
        raise Failure("refused", "not a name for runs: %r" % key)
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
        for name in STREAMS + (EVENTS, CAUSE):  # made now: no file system keeps a stale "no such file"
            os.close(os.open(os.path.join(new, name), os.O_CREAT | os.O_WRONLY, 0o600))
        for name, content in files.items():
            if name.startswith("/") or not all(part not in ("", ".", "..") for part in name.split("/")):
                raise Failure("refused", "not a path below the run directory: %r" % name)
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
    """What tells two submissions under one key apart."""
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest().encode()


def words_of(run):
    """The words of the job's last life, by `started` and `end`; a job that runs again begins anew."""
    words = {}
    for line in read(os.path.join(run, EVENTS)).split(b"\n")[:-1]:  # the last piece is not a whole line yet
        word = parse(line, "time")
        if not word:  # cut off by a full disk
            continue
        words = dict(words, end=word) if "code" in word else {"started": word}
    return words


def job_of(run):
    """The run's job: what sbatch said or what the job itself has left, whichever came first."""
    try:
        return os.readlink(os.path.join(run, "job"))
    except FileNotFoundError:
        return None


def settle(run, job):
    """Note the run's job, unless there is one; return which it is."""
    try:
        os.symlink(job, os.path.join(run, "job"))
    except FileExistsError:
        pass
    except OSError as error:  # the job exists all the same, and notes itself when it starts
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
    return job_of(run) or job


def conclude(run, job):
    """How the run ended, by its own word and Slurm's; None while it has not."""
    known = load(os.path.join(run, "end"), "state", "exit", "times")
    if known:
        return known
    word = words_of(run).get("end") or {}
    try:
        said = verdict(job, os.path.basename(run))
    except Failure as failure:
        old = word.get("code") is not None and time.time() - word["time"] > FORGOTTEN
        if failure.kind != "forgotten" and not old:
            raise
        said = {"state": "", "exit": "", "times": [None] * 3, "account": ""}
    if said is None:
        return None
    word = words_of(run).get("end") or {}  # once more: it may have come in the meantime
    cause = read(os.path.join(run, CAUSE)).decode(errors="replace").strip()
    end = dict(word, cause=cause, **said)
    if word:
        try:
            store(os.path.join(run, "end"), end)
        except OSError:  # the disk is full: it is worked out again the next time
            pass
    return end


def quietly_conclude(run, job):
    """The end of a run; None also while Slurm does not answer."""
    try:
        return conclude(run, job)
    except Failure:
        return None


def latest(folder, family):
    """The last attempt of a family: its number (0: there is none), whether it is over, and how it ended."""
    attempts = [name[len(family) + 1 :] for name in os.listdir(folder) if name.startswith(family + "-")]
    number = max([int(text) for text in attempts if text.isdigit()] or [0])
    run = os.path.join(folder, "%s-%d" % (family, number))
    job = job_of(run)
    found = {"attempt": number, "over": True, "end": None, "job": job, "rejected": False, "followers": []}
    found["record"] = record_of(run)
    if not number or not (job or has(run, "tried")):  # never submitted: sbatch refused it, or nobody came so far
        return found
    end = conclude(run, job) if job else None
    return dict(found, over=bool(end), end=end, rejected=has(run, "failed"), followers=followers_of(run))


def others(folder, family, beginnings):
    """Runs of other families, by the beginnings of their names, whose job may be waiting or running."""
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
    """What a run was submitted with; None where nothing says that."""
    try:
        return json.loads(read(os.path.join(run, "submitted_with.json")).decode())
    except ValueError:
        return None


def note_follower(run, follower):
    """Note a Dagster run that follows the job. If the disk is full, its result may be offered once more."""
    try:
        mark(run, FOLLOWER + checked(follower))
    except OSError:
        pass


def followers_of(run):
    """The Dagster runs that submitted or adopted the job, in that order."""
    marks = [name for name in os.listdir(run) if name.startswith(FOLLOWER)]
    marks.sort(key=lambda name: os.stat(os.path.join(run, name)).st_mtime)
    return [name[len(FOLLOWER) :] for name in marks]


# Requests


def look(ask, _):
    """How a run stands now: its job, the row of the queue's view that tells of it, and its end if it is over."""
    run, key = locate(ask)
    job = job_of(run)
    end = conclude(run, job) if job else None
    if job and not end:
        QUEUE.refresh(os.path.dirname(run))
    row = QUEUE.row(job, key) if job else None
    return {"job": job, "end": end, "row": row, "started": "started" in words_of(run)}


def reject(ask, _):
    """Note that a step found the result of a run wanting."""
    run, _ = locate(ask)
    mark(run, "failed")
    return {}


def runs(ask, _):
    """All that is known of every run without asking Slurm."""
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
