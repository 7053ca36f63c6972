"""One job per run: submit and follow it, find the job of a submission that got no answer, cancel it."""

import os
import re
import subprocess
import time
from contextlib import contextmanager, suppress

from .disk import RequestError, inode_of, kind_of, lock, own, read
from .follower import Follower
from .location import Location, RemovedError, give_up, inodes_above
from .paths import login_environment
from .run_directories import digest, has, job_of, lay_out, locate, mark, note_follower, settle
from .slurm_commands import ACCOUNT, SBATCH_PATIENCE, await_end, find_by_folder, for_slurm, not_started, scancel
from .tasks import CONTENTS, Tasks, is_array

JOB_ID = re.compile(r"^(\d+)(?:;\S+)?\s*$", re.M)
LATE = 20.0  # seconds after which the job of a submission that got no answer can no longer appear in the queue
SEARCH_EVERY = 2.0
LOCK_EVERY = 0.1
JOB_EVERY = 1.0  # seconds between two looks for the job of a run that another client submits
FIRST_PAUSE, ROOM_PAUSE, LONGEST_PAUSE = 0.5, 5.0, 60.0  # seconds between two tries to submit; each is twice as long
# Errors of sbatch after which the job may exist or not, or Slurm does not work as it should.
UNSURE = re.compile(
    r"timed out|timeout|contact slurm controller|communication|connection|not connected|no route|is unreachable"
    r"|unexpected m(essage|issing)|zero (bytes|length)|message (send|receive|length)|entire message|header lengths"
    r"|broken pipe|temporarily|authentication|munge",
    re.I,
)
# Errors of sbatch after which there is no job, and the same job may be accepted later: too many jobs, and all others.
FULL = re.compile(r"(Assoc|QOS)(Max|Grp)\w*(Submit|Jobs)\w*|MaxSubmit|MaxJobCount", re.I)
LATER = re.compile(
    r"standby|configuration source"
    r"|(submissions?|operation) (is |are )?(currently |presently )?disabled|inactive or drain|maintenance"
    r"|shutting down|shutdown|try again|writing script",
    re.I,
)
# Slurm says this of too many jobs, and of a job that is too large; then the line before it names the limit.
LIMIT = re.compile(r"violates accounting/QOS policy", re.I)
NAMED_LIMIT = re.compile(r"\b(Assoc|QOS)\w*(Limit|Max|Min|Per)\w*")


@contextmanager
def locked(run):
    """Hold the lock of a run, unless its job is recorded meanwhile: by the job itself, while its sbatch has the lock.

    sbatch inherits the lock: if the agent is killed, the lock stays until sbatch has ended.
    """
    file = os.open(os.path.join(run, "lock"), os.O_CREAT | os.O_RDWR, 0o600)
    try:
        while not job_of(run):
            try:
                lock(file, run, wait=False)
                break
            except BlockingIOError:
                time.sleep(LOCK_EVERY)
        yield file
    finally:
        os.close(file)


def submit_when_possible(agent, ask, say, current):
    """Submit a run; return its job and how that was found, None for both if the client has given up this request.

    RequestError: `refused` or `broken`.
    """
    run, key = locate(ask)
    pause, said = FIRST_PAUSE, None
    while current():
        try:
            with agent.finishing():
                found = submit_once(run, key, ask)
                note_follower(run, ask["follower"])
                return found
        except RequestError as error:
            kind, text = error.kind, str(error)
        except OSError as error:
            kind, text = kind_of(error), "%s: %s" % (error.filename or run, error.strerror)
        finally:
            agent.turn.end()
        if kind in ("refused", "broken"):
            raise RequestError(kind, text)
        if text != said:
            said = text
            say(**{"waiting" if kind == "full" else "trouble": text})
        pause = max(pause, ROOM_PAUSE) if kind == "full" else pause
        until = time.time() + pause
        while current() and time.time() < until:
            time.sleep(min(0.5, pause))
        pause = min(2 * pause, LONGEST_PAUSE)
    return None, None


def submit_once(run, key, ask):
    """Return the run's job, and whether it was `recorded` before, `found` in Slurm, or `submitted` now."""
    if not inode_of(run):
        if ask["files"] is None:
            raise RequestError("refused", "there is no run %s" % run)
        own(os.path.dirname(run))
        lay_out(run, ask["files"])
    with locked(run) as lock:
        job, how = find_job(run, key)
        if not job and has(run, "cancelled"):
            raise RequestError("refused", "%s was cancelled before it was submitted" % run)
        if ask["files"] is not None and read(os.path.join(run, "digest")) != digest(ask["files"]):
            raise RequestError("refused", "%s exists already, with other content" % run)
        if not job:
            variables = environment_of(run)
            end_earlier_attempt(run)
            mark(run, "tried")
            job, how = sbatch(run, lock, variables), "submitted"
        return settle(run, job), how


def end_earlier_attempt(run):
    """Have the job of the attempt before this one end at once if an administrator requeues it.

    The tasks of an array job are rejected one by one: others of them may still run.
    """
    family, _, number = run.rpartition("-")
    earlier = "%s-%d" % (family, int(number) - 1) if number.isdigit() else ""
    if inode_of(earlier) and not is_array(earlier):
        mark(earlier, "failed")


def find_job(run, key):
    """Return the run's job and how it was found; search Slurm's queue for one whose submission got no answer."""
    job = job_of(run)
    if job or not has(run, "tried"):
        return job, "recorded"
    os.utime(os.path.join(run, "lock"))  # to now by the file server's clock: this machine's may be ahead or behind
    now, tried = (os.stat(os.path.join(run, name)).st_mtime for name in ("lock", "tried"))
    since = time.time() - max(now - tried, 0)
    job = find_by_folder(key, since)
    while not job and time.time() - since < LATE:
        time.sleep(SEARCH_EVERY)
        job = job_of(run) or find_by_folder(key, since)
    return job and settle(run, job), "found"


def environment_of(run):
    """Return the variables with which the run's job is submitted.

    The tasks of an array job get them: Slurm would read the login profile for each task, and the agent reads it once.
    A single job gets the environment of a login on its node.
    """
    script = read(os.path.join(run, "job.sh")).decode(errors="replace")
    return for_slurm(login_environment() if is_array(run) else os.environ, script)


def sbatch(run, lock, variables):
    """Submit the run's job.sh; return the job's id."""
    # By the agent's PATH, which the site's setup commands may have set.
    paths = [os.path.join(folder, "sbatch") for folder in os.get_exec_path()]
    command = next((path for path in paths if os.access(path, os.X_OK)), "sbatch")
    try:
        child = subprocess.Popen(
            [command, "--parsable", "--chdir", run, os.path.join(run, "job.sh")],
            cwd=run,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=[lock],
        )
    except OSError as error:
        os.unlink(os.path.join(run, "tried"))
        raise not_started("sbatch", error)
    until = time.monotonic() + SBATCH_PATIENCE
    while True:
        try:
            out, err = (text.decode(errors="replace") for text in child.communicate(timeout=SEARCH_EVERY))
            break
        except subprocess.TimeoutExpired as late:  # not killed: it may be about to submit
            if job_of(run):
                return job_of(run)
            if time.monotonic() > until:  # it waits itself while Slurm has as many jobs as it can have (MaxJobCount)
                said = (late.stderr or b"").decode(errors="replace").strip()
                said = ". ".join(filter(None, ["sbatch did not answer within %d s" % SBATCH_PATIENCE, said]))
                raise RequestError("temporary", said)
    found = JOB_ID.findall(out)  # wrappers and submit filters print more than the id
    if child.returncode == 0 and found:
        return found[-1]
    said = err.strip() or out.strip() or "sbatch ended with exit code %d, and gave no reason" % child.returncode
    if child.returncode <= 0 or UNSURE.search(err):
        raise RequestError("temporary", said)
    os.unlink(os.path.join(run, "tried"))
    full = FULL.search(err) or (LIMIT.search(err) and not NAMED_LIMIT.search(err))
    raise RequestError("full" if full else "temporary" if LATER.search(err) else "refused", said)


# Requests


def run(agent, ask, say):
    """Submit a run once, as soon as Slurm has room for it, and follow its job to its end.

    files: None if the run exists already
    follower: the Dagster run that follows the job; empty for `scripts/job`, which submits nothing
    tasks: those to follow
    known: the answer in which this client has already got the job; None: it has not
    """
    path, _ = locate(ask)
    files = ask.get("files")
    if files and CONTENTS not in files and not ACCOUNT.search(files.get("job.sh", "")):
        agent.profile.charge()  # the variables of an array are all those of the profile
    agent.followers[path] = me = object()

    def current():
        return agent.followers[path] is me

    known = ask.get("known")
    try:
        if not known:
            job, how = (submit_when_possible if ask["follower"] else await_job)(agent, ask, say, current)
            if not job:
                return {}
            known = {"job": job, "how": how, "above": inodes_above(path)}
            say(**known)
    except RequestError as error:
        if error.kind != "refused":
            raise
        return {"refused": str(error)}  # an answer: an error would end the client's other requests
    location = Location(path, known["above"], say, current)
    try:
        location.wait()
        return Follower(agent.queue, ask, say, known["job"], location).follow()
    except RemovedError:
        return {"removed": give_up(path, known["job"], set(ask["tasks"]), ask["follower"])}


def await_job(_, ask, __, current):
    """Wait until another client has submitted a run; return its job as `submit_when_possible` does."""
    path, _ = locate(ask)
    if not inode_of(path):
        raise RequestError("refused", "there is no run %s" % path)
    while current() and not job_of(path):
        if has(path, "cancelled"):
            raise RequestError("refused", "%s was cancelled before it was submitted" % path)
        time.sleep(JOB_EVERY)
    return job_of(path), "recorded"


def cancel(agent, ask, _):
    """Cancel a run's job, and wait until it is over. A run that has no job will never get one.

    job: its id, if the client knows that: the run directory may have been removed
    """
    (run, key), full = locate(ask), None
    with agent.finishing():
        job = job_of(run) or ask.get("job")
        if not job:
            own(os.path.dirname(run))
            os.makedirs(run, 0o700, exist_ok=True)
            try:
                mark(run, "cancelled")
            except OSError as error:  # the disk is full: there may be a job all the same, which could not be recorded
                if not has(run, "tried"):
                    raise
                full = error
            with locked(run):  # after a submission that another agent has begun
                job, _ = find_job(run, key)
            if full and not job:
                raise full
        return {"job": job, "end": job and end_job(run, key, job)}


def end_job(run, key, job):
    """Cancel a run's job; return how it ended, None if it did not end within a minute."""
    end = Tasks(run).conclude(job)[0]
    if not end or not inode_of(run):  # of an array job whose run directory was removed, one task is known
        scancel(job, key)
    with suppress(OSError):  # the disk is full; a run that has a job is not submitted again
        mark(run, "cancelled")
    return end or await_end(lambda: Tasks(run).conclude(job)[0], bool)
