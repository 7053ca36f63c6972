"""Following a run: its output, messages, states and end, from given offsets on."""

import os
import time

from .disk import RequestError
from .job_record import STREAMS, events_of
from .jobs import submit_when_possible
from .location import Location, RemovedError, give_up, inodes_above
from .run_directories import RUNS, conclude, has, job_of, keep_end, locate, quietly_conclude
from .shared_queue import SQUEUE_EVERY
from .slurm_commands import COMMAND_PATIENCE, LAG, UNSEEN, account
from .streams import MOST_CHUNKS, Stream, pause_after, short_of
from .task_states import OVER

JOB_EVERY = 1.0  # seconds between two looks for the job of a run that another client submits


class Follower:
    def __init__(self, queue, ask, say, job, location):
        self.queue, self.say, self.job, self.location = queue, say, job, location
        self.run, self.key = locate(ask)
        at = ask["offsets"]
        self.streams = [Stream(os.path.join(self.run, name), name, at[name]) for name in STREAMS if name in at]
        self.fields = ask["fields"]
        self.begun = self.moved = self.asked = self.heard = time.time()
        self.events = None
        self.pause = 0.02  # seconds until Slurm is asked about a job that has recorded its end, and asked again; grows
        self.recorded = False
        self.reported, self.trouble = None, None
        self.end, self.end_seen = None, 0.0

    def follow(self):
        self.queue.want(os.path.dirname(self.run))
        while self.location.current():
            self.location.wait()
            ended = self.end  # before the streams, too: Slurm itself writes to stderr
            events = events_of(self.run)  # before the streams: so all that was written before the end is sent
            row = self.row(events)
            if row and row[0] == "PENDING" and not ended:
                events = {}  # of an earlier start: Slurm has put the job back in the queue since
            sent = [stream.pump(self.say) for stream in self.streams]
            if any(sent):
                self.moved = time.time()
            own = events.get("end")
            recorded = bool(own and own["code"] is not None)
            if recorded and not self.recorded:
                self.asked = time.time()  # Slurm needs a moment to see the end itself
            self.recorded = recorded
            if not ended:
                self.report_state(row, events)
                self.ask_for_end(own)
            elif not any(sent):
                answer = self.finish(own)
                if answer:
                    return answer
            if max(sent or [0]) < MOST_CHUNKS and self.end is ended:
                quiet = pause_after(time.time() - self.moved)
                time.sleep(min(quiet, self.pause / 4) if self.recorded else quiet)
        return {}

    def row(self, events):
        """Return the job's row of the queue; RUNNING if that view is older than the job's own record of its start.

        None if both were there when the job was first looked at. The record's own time counts for nothing: the clock
        of its node may be ahead or behind.
        """
        if events != self.events:
            self.heard = self.begun if self.events is None else time.time()
            self.events = events
        row = self.queue.row(self.job, self.key)
        if "started" not in events or (row and (row[0] != "PENDING" or self.heard < self.queue.view["at"])):
            return row
        return None if row and self.heard == self.begun else RUNS + (row or [])[3:]

    def report_state(self, row, events):
        if row and row[0] not in OVER and "end" not in events:
            self.report(*row, idle=events.get("idle", {}).get("idle"), **events.get("started", {}))
        if self.queue.view["trouble"] and self.queue.view["trouble"] != self.trouble:
            self.trouble = self.queue.view["trouble"]
            self.say(trouble=self.trouble)

    def report(self, state, reason, start="", project="", *, started="", temporary="", idle=None, **_):
        if (state, reason, project, started, idle) != self.reported:
            self.reported = (state, reason, project, started, idle)
            place = {"node": started, "temporary": temporary, "idle": idle}
            self.say(state=state, reason=reason, start=start, account=project, **place)

    def ask_for_end(self, own):
        """Ask Slurm whether the job is over: soon after its own record says so, else later and less often."""
        since, row = time.time() - self.asked, self.queue.row(self.job, self.key)
        ended = own and own["code"] is not None and since > self.pause
        # A second after a job was cut short; if Slurm does not confirm that, after twice the silence before.
        cut_short = own and since > min(max(1, self.asked - self.moved), SQUEUE_EVERY)
        # A view that is at least 5 s younger than this request shows a job that was submitted before it.
        gone = since > SQUEUE_EVERY and self.queue.view["at"] > self.begun + 5 and (not row or row[0] in OVER)
        unseen = since > UNSEEN and time.time() - self.queue.view["at"] > UNSEEN
        if not (ended or cut_short or gone or unseen):
            return
        self.asked = time.time()
        if ended:
            self.pause = min(1.5 * self.pause, 5)
        try:
            self.end = conclude(self.run, self.job)
        except RequestError as error:
            if own:
                self.report("COMPLETING", "waiting for Slurm to confirm the end: %s" % error)

    def finish(self, own):
        """Return the answer, once all that the job wrote is sent; wait for the record of a job that has none yet."""
        self.end_seen = self.end_seen or time.time()
        waited = time.time() - self.end_seen
        short = short_of(self.streams, (own or {}).get("sizes", {}))
        if (short and waited < COMMAND_PATIENCE) or (not own and waited < LAG):
            return None
        if "code" not in self.end:  # its own record may have come meanwhile, or it was put back in the queue
            self.end = quietly_conclude(self.run, self.job)
            if not self.end:
                self.end_seen = 0.0
                return None
            keep_end(self.run, self.end)
        start, end = self.end["times"][1:]
        rows = account(self.job, self.fields, end - start) if start and end else []
        return {"end": self.end, "short": short, "rows": rows}


# Requests


def run(agent, ask, say):
    """Submit a run once, as soon as Slurm has room for it, and follow its job to its end.

    files: None if the run exists already
    follower: the Dagster run that follows the job; empty for `scripts/job`, which submits nothing
    tasks: of an array job, those to follow
    known: the answer with the job that this client has had before; None: none yet
    """
    path, _ = locate(ask)
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
        details = (agent.queue, ask, say, known["job"], location)
        if "tasks" not in ask:
            return Follower(*details).follow()
        from .array_follower import ArrayFollower  # compiled where it is needed

        return ArrayFollower(*details).follow()
    except RemovedError:
        return {"removed": give_up(path, known["job"], ask.get("tasks"), ask["follower"])}


def await_job(_, ask, __, current):
    """Wait until another client has submitted a run; return its job as `submit_when_possible` does."""
    path, _ = locate(ask)
    if not os.path.isdir(path):
        raise RequestError("refused", "there is no run %s" % path)
    while current() and not job_of(path):
        if has(path, "cancelled"):
            raise RequestError("refused", "%s was cancelled before it was submitted" % path)
        time.sleep(JOB_EVERY)
    return job_of(path), "recorded"
