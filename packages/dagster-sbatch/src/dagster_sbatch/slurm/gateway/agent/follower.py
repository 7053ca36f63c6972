"""Following a run: its output, messages, states and end, from given offsets on."""

import os
import time

from .disk import RequestError
from .job_record import MESSAGES, STREAMS, events_of
from .run_directories import conclude, job_of, locate, quietly_conclude, row_of
from .slurm_commands import COMMAND_PATIENCE, LAG, OVER, SQUEUE_EVERY, UNSEEN, account
from .streams import MOST_CHUNKS, Stream, pause_after, short_of

ABSENT = 10.0  # seconds to wait for a run directory that a submission is about to make


class Follower:
    def __init__(self, agent, ask, say):
        self.agent, self.queue = agent, agent.queue
        self.run, self.key = locate(ask)
        self.say = say
        at = ask["offsets"]
        names = [name for name in STREAMS if name in at]
        self.streams = [Stream(os.path.join(self.run, name), name, at[name], name == MESSAGES) for name in names]
        self.fields = ask["fields"]
        self.begun = self.moved = self.asked = time.time()
        self.pause = 0.02  # seconds until Slurm is asked about a job that has recorded its end, and asked again; grows
        self.recorded = False
        self.reported, self.trouble = None, None
        self.end, self.end_seen = None, 0.0

    def follow(self):
        self.queue.want(os.path.dirname(self.run))
        self.agent.followers[self.run] = self
        while not os.path.isdir(self.run):  # the client sends its submission and this request together
            if time.time() - self.begun > ABSENT and self.run not in self.agent.submitting:
                raise RequestError("refused", "there is no run %s" % self.run)
            time.sleep(0.02)
        while self.agent.followers[self.run] is self:
            events = events_of(self.run)  # before the streams: so all that was written before the end is sent
            sent = [stream.pump(self.say) for stream in self.streams]
            if any(sent):
                self.moved = time.time()
            job, own = job_of(self.run), events.get("end")
            recorded = bool(own and own["code"] is not None)
            if recorded and not self.recorded:
                self.asked = time.time()  # Slurm needs a moment to see the end itself
            self.recorded = recorded
            if job and not self.end:
                self.report_state(job, events)
                self.ask_for_end(job, own)
            if self.end and not any(sent):
                answer = self.finish(job, own)
                if answer:
                    return answer
            if max(sent or [0]) < MOST_CHUNKS:
                quiet = pause_after(time.time() - self.moved)
                time.sleep(min(quiet, self.pause / 4) if self.recorded else quiet)
        return {}

    def report_state(self, job, events):
        row = row_of(self.agent, job, self.key, events)
        if row and row[0] not in OVER and "end" not in events:
            self.report(*row, idle=events.get("idle"), **events.get("started", {}))
        if self.queue.view["trouble"] and self.queue.view["trouble"] != self.trouble:
            self.trouble = self.queue.view["trouble"]
            self.say(trouble=self.trouble)

    def report(self, state, reason, start="", project="", *, started="", temporary="", idle=None, **_):
        if (state, reason, project, started, idle) != self.reported:
            self.reported = (state, reason, project, started, idle)
            place = {"node": started, "temporary": temporary, "idle": idle}
            self.say(state=state, reason=reason, start=start, account=project, **place)

    def ask_for_end(self, job, own):
        """Ask Slurm whether the job is over: soon after its own record says so, else later and less often."""
        since, row = time.time() - self.asked, self.queue.row(job, self.key)
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
            self.end = conclude(self.run, job)
        except RequestError as error:
            if own:
                self.report("COMPLETING", "waiting for Slurm to confirm the end: %s" % error)

    def finish(self, job, own):
        """Return the answer, once all that the job wrote is sent; wait for the record of a job that has none yet."""
        self.end_seen = self.end_seen or time.time()
        waited = time.time() - self.end_seen
        short = short_of(self.streams, (own or {}).get("sizes", {}))
        if (short and waited < COMMAND_PATIENCE) or (not own and waited < LAG):
            return None
        if not own and not quietly_conclude(self.run, job):  # put back in the queue meanwhile
            self.end, self.end_seen = None, 0.0
            return None
        start, end = self.end["times"][1:]
        rows = account(job, self.fields, end - start) if start and end else []
        return {"job": job, "end": dict(own or {}, **self.end), "short": short, "rows": rows}


# Requests


def follow(agent, ask, say):
    return Follower(agent, ask, say).follow()
