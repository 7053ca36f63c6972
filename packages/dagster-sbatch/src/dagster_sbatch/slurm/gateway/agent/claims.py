"""Claims: which client acts on a family of runs; removing runs that nobody needs.

A claim is a lock on a file beside the runs. The agent of the client holds it, for as long as that agent lives.
"""

import json
import os
import threading
import time
from contextlib import suppress

from .disk import RequestError, load, names_in, open_locked, own, read, remove_tree, status_of, unique
from .ends import UNKNOWN_JOB, state_of
from .run_directories import DAY, attempt_of, checked, has, job_of, may_have_job, record_of
from .slurm_commands import ask_slurm, fields_of, keys_of
from .tasks import is_array

INHERIT_EVERY = 0.5  # seconds between two tries to take the lock of this client's previous agent


def take(held, path, holder):
    """Lock a file and write the holder into it, unless another agent has it; return whether that worked."""
    try:
        file = open_locked(path, os.O_CREAT, wait=False)
    except BlockingIOError:
        return False
    try:
        text = json.dumps(holder).encode()
        if read(path) != text:  # a client that connects anew writes nothing: the disk may be full by now
            os.pwrite(file, text.ljust(os.fstat(file).st_size), 0)
            os.ftruncate(file, len(text))
    except OSError:
        os.close(file)
        raise
    held[path] = file
    return True


def inherit(agent, path, mine, say):
    """Wait until this client's previous agent releases the lock, then take it; leave if that is not possible."""
    try:
        while not take(agent.held, path, mine):
            there = load(path, "token", "who")
            if there and there["token"] != mine["token"]:
                say(held=there["who"])
                agent.leave()
            time.sleep(INHERIT_EVERY)
    except OSError:  # the client holds the family again with its next agent, or waits until it can
        agent.leave()


def attempts_of(folder, family):
    """Return the latest attempt of a family; of array jobs, all (several can be active at once), the latest last."""
    endings = [name[len(family) + 1 :] for name in os.listdir(folder) if name.startswith(family + "-")]
    numbers = sorted(int(text) for text in endings if text.isdigit())
    paths = [os.path.join(folder, "%s-%d" % (family, number)) for number in numbers]
    return [attempt_of(path, certain=True) for path in paths if is_array(path) or path == paths[-1]]


def runs_of(folder, beginning):
    """Return the names of the runs that begin with a text, in order."""
    names = sorted(os.listdir(folder)) if beginning else ()
    return [name for name in names if name.startswith(beginning) and name.rpartition("-")[2].isdigit()]


def others(folder, family, beginning):
    """Return the runs of other families whose names begin with a text and whose jobs may not be over."""
    found = []
    for name in runs_of(folder, beginning):
        run, its = os.path.join(folder, name), name.rpartition("-")[0]
        if its == family:
            continue
        job = job_of(run)
        if (job or has(run, "tried")) and not has(run, "end") and not has(run, "cancelled"):
            found.append({"family": its, "run": run, "job": job, "record": record_of(run)})
    return found


def refuse_beside_lost(folder, beginning, jobs):
    """Refuse a new job while an earlier one of the step runs whose run directory was removed, or is elsewhere.

    Its messages could get among those of the new job: both may have the same paths.

    jobs: those that the client knows of
    """
    known = {job_of(os.path.join(folder, name)) for name in runs_of(folder, beginning)}
    for job in jobs:
        if job in known:
            continue
        try:
            records = [fields_of(line) for line in ask_slurm("scontrol", "-o", "show", "job", job).splitlines()]
        except RequestError as error:
            if UNKNOWN_JOB in str(error):
                continue
            raise
        for record in records:
            key = next((each for each in keys_of(record) if each.startswith(beginning)), None)
            if key and not state_of(record):
                text = "Slurm job %s of an earlier run of this step is %s, and its run directory is not in %s: %s\n"
                text += "A new job would run beside it. Set SLURM_DEPLOYMENT_BASE_PATH as it was then, if you have "
                text += "changed it, or cancel the job on %s; then re-execute this run:\n  scancel %s"
                values = (job, record["JobState"], folder, record.get("WorkDir", key), os.uname()[1], job)
                raise RequestError("refused", text % values)


def environment_of(agent, ask, say):
    """Return the answer to a request about an environment; None if that fails: a client that needs it asks again."""
    try:
        return agent.answer(ask, say)
    except (RequestError, OSError):
        return None


def is_left(path):
    """Return whether something was begun there more than a day ago and never finished, or cancelled before it began."""
    unfinished = path.endswith((".new", ".old", ".part"))
    empty = has(path, "cancelled") and not has(path, "about.json") and not may_have_job(path)
    status = status_of(path) if unfinished or empty else None
    return status is not None and time.time() - status.st_mtime > DAY


# Requests


def hold(agent, ask, say):
    """Make the client the one that acts on a family of runs, or answer who does.

    A client that has lost its connection may have another agent here that does not know it yet. The same token is
    let in beside that one, and inherits its lock.
    """
    folder, family = ask["runs"], checked(ask["family"])
    own(folder)
    path, mine = os.path.join(folder, family + ".holder"), {"token": ask["token"], "who": ask["who"]}
    if path in agent.held or take(agent.held, path, mine):
        return {}
    there = load(path, "token", "who") or {}  # it may not be written yet
    if there.get("token") != mine["token"]:
        return {"held": there.get("who", "somebody")}
    threading.Thread(target=inherit, args=(agent, path, mine, say), daemon=True).start()
    return {}


def claim(agent, ask, say):
    """Hold a family; answer the state of its attempts, and `runs` and `data_root` as absolute paths.

    environment: a request about the environment of a new attempt, which is answered once the latest one is over
    earlier: ids of jobs that earlier runs of the step have followed
    """
    held = hold(agent, ask, say)
    if held:
        return held
    folder, environment = ask["runs"], None
    attempts = attempts_of(folder, ask["family"])
    beside = others(folder, ask["family"], ask["related"])
    if not attempts or attempts[-1]["over"]:
        refuse_beside_lost(folder, ask["related"], ask["earlier"])
        environment = ask["environment"] and environment_of(agent, ask["environment"], say)
    known = {"attempts": attempts, "others": beside, "environment": environment}
    return dict(known, runs=folder, data_root=ask["data_root"])


def clean(agent, ask, _):
    """Remove the runs of some names that have no job, or one that is over, and what was begun and never finished."""
    folder, cleaned = ask["runs"], []
    names = names_in(folder)
    for name in names:
        path = os.path.join(folder, name)
        if is_left(path):
            remove_tree(path)
            with suppress(OSError):  # it was a folder
                os.unlink(path)
        elif name in ask["names"] and (has(path, "end") or not may_have_job(path)):
            old = unique(path) + ".old"
            with suppress(FileNotFoundError):  # another client is removing it
                os.rename(path, old)
                remove_tree(old)
                cleaned.append(name)
    left = {name.rpartition("-")[0] for name in os.listdir(folder)} if names else ()
    for name in names:
        path = os.path.join(folder, name)
        if name.endswith(".holder") and name[: -len(".holder")] not in left and take(agent.held, path, {}):
            os.unlink(path)
            os.close(agent.held.pop(path))
    return {"cleaned": cleaned}
