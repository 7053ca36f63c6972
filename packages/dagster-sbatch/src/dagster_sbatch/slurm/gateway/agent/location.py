"""Where a run directory lies: one that was removed is not taken for one whose file system is away."""

import os
import time

from .disk import inode_of
from .ends import verdicts
from .slurm_commands import await_end, scancel

REMOVED = 300.0  # seconds after which a run directory that was removed is given up
MISSING_EVERY = 1.0


class RemovedError(Exception):
    """A run directory was removed."""


def inodes_above(run):
    """Return the inodes of the folders above a run directory by path, as far up as they lie on its file system."""
    device, path, found = os.stat(run).st_dev, os.path.dirname(run), {}
    while path not in found and os.stat(path).st_dev == device:
        found[path] = os.stat(path).st_ino
        path = os.path.dirname(path)
    return found


class Location:
    """The run directory of a job.

    above: of `inodes_above`, when the job was submitted or found
    """

    def __init__(self, run, above, say, current):
        self.run, self.above, self.say, self.current = run, above, say, current

    def wait(self):
        """Return once the run directory is there, or the client has given up.

        RemovedError: it has been missing for a while, but a folder above it is there: so the file system works
        OSError: that cannot be known now
        """
        since, said = None, None
        while self.current():
            if inode_of(self.run):
                return
            removed = any(inode_of(path) == known for path, known in self.above.items())
            since = (since or time.time()) if removed else None
            if since and time.time() - since > REMOVED:
                raise RemovedError
            if removed != said:
                said, host = removed, os.uname()[1]
                lost = "%s was removed. The step fails unless it is back within %d minutes" % (self.run, REMOVED / 60)
                away = "%s is not there: its file system is away from %s. The job is not affected" % (self.run, host)
                self.say(trouble=lost if removed else away)
            time.sleep(MISSING_EVERY)


def give_up(run, job, wanted, follower):
    """Return what a step reports whose run directory was removed; its job is cancelled: nobody can adopt it any more.

    wanted: the indices of the tasks that are followed
    follower: the Dagster run; empty for `scripts/job`, which cancels nothing
    RequestError: Slurm does not answer
    """
    key = os.path.basename(run)

    def states():
        found, trouble = verdicts(job, key, max(wanted, default=0) + 1, wanted, wanted)
        if trouble:
            raise trouble
        return [said and (said["state"] or "unknown to Slurm") for said in found.values()]

    found = states()
    end = "It had ended: %s" % ", ".join(sorted(set(filter(None, found))))
    if None in found:
        end = "It is still running. Cancel it:\n  scancel %s" % job
        if follower:
            scancel(job, key)
            over = None not in await_end(states, lambda found: None not in found)
            end = "It was still running, so it was cancelled, and %s" % (
                "is over" if over else "is not over after a minute"
            )
    text = "the run directory of Slurm job %s was removed while the job was followed: %s\n"
    text += "Without it, nothing can receive the messages and the result of the job. %s"
    return text % (job, run, end)
