"""Following a run: its output, messages, states and end, from given offsets on."""

import os
import time

from .disk import RequestError
from .run_directories import MESSAGES, STREAMS, conclude, events_of, job_of, locate, quietly_conclude, row_of
from .slurm_commands import COMMAND_PATIENCE, OVER, SQUEUE_EVERY, account
from .transfer import CHUNK

UNSEEN = 60.0  # seconds without an answer of squeue, after which the agent asks Slurm about the one job, as often
HOLE = 10.0  # seconds for which NUL bytes are held back: on NFS, a node may not have written those bytes yet
LAG = 15.0  # seconds to wait for a job's own record of its end, once Slurm says that it is over
ABSENT = 10.0  # seconds to wait for a run directory that a submission is about to make
MOST_CHUNKS = 8  # of one stream in a row, so that none starves another


class Follower:
    def __init__(self, agent, ask, say):
        self.agent, self.queue = agent, agent.queue
        self.run, self.key = locate(ask)
        self.say = say
        self.at = {name: ask["offsets"][name] for name in STREAMS if name in ask["offsets"]}
        self.fields = ask["fields"]
        self.begun = self.moved = self.asked = time.time()
        self.pause = 0.015  # seconds until Slurm is asked again about a job that has recorded its end; grows
        self.reported, self.trouble = None, None
        self.holes = {}  # by stream: its size when NUL bytes were first seen, and the time
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
            sent = [self.pump(name) for name in self.at]
            if any(sent):
                self.moved = time.time()
            job, own = job_of(self.run), events.get("end")
            if job and not self.end:
                self.report_state(job, events)
                self.ask_for_end(job, own)
            if self.end and not any(sent):
                answer = self.finish(job, own)
                if answer:
                    return answer
            if max(sent or [0]) < MOST_CHUNKS:
                # 2 % of the time without output: 0.02 s while there is output, 1 s for a job that has long been quiet
                time.sleep(min(max(0.02 * (time.time() - self.moved), 0.02), 1))
        return {}

    def pump(self, name):
        """Send what a file has beyond its offset; return the number of chunks."""
        try:  # opened each time: on NFS, only that shows what another machine has appended
            file = os.open(os.path.join(self.run, name), os.O_RDONLY)
        except FileNotFoundError:
            return 0
        try:
            for sent in range(MOST_CHUNKS):
                data = os.pread(file, CHUNK, self.at[name])  # nothing beyond the end of the file
                data = data[: self.whole(name, data, file)]
                if not data:
                    return sent
                self.say(data, file=name, at=self.at[name])
                self.at[name] += len(data)
            return MOST_CHUNKS
        finally:
            os.close(file)

    def whole(self, name, data, file):
        """Return how many bytes of a piece can be sent: those before NUL bytes that may be a hole."""
        place = data.find(b"\0")
        if place < 0:
            return len(data)
        if name == MESSAGES:  # JSON has none
            return place
        size, since = self.holes.get(name, (0, 0))
        if size <= self.at[name] + place:
            size, since = self.holes[name] = os.fstat(file).st_size, time.time()
        if time.time() - since < HOLE:
            return place
        return min(len(data), size - self.at[name])  # the program wrote NUL bytes

    def report_state(self, job, events):
        row = row_of(self.agent, job, self.key, events)
        if row and row[0] not in OVER and "end" not in events:
            self.report(*row, **(events.get("started") or {}))
        if self.queue.view["trouble"] and self.queue.view["trouble"] != self.trouble:
            self.trouble = self.queue.view["trouble"]
            self.say(trouble=self.trouble)

    def report(self, state, reason, start="", project="", started="", temporary="", **_):
        if (state, reason, project, started) != self.reported:
            self.reported = (state, reason, project, started)
            place = {"node": started, "temporary": temporary}
            self.say(state=state, reason=reason, start=start, account=project, **place)

    def ask_for_end(self, job, own):
        """Ask Slurm whether the job is over: at once when its own record says so, else later and less often."""
        since, row = time.time() - self.asked, self.queue.row(job, self.key)
        ended = own and own["code"] is not None and since > self.pause
        # A second after a job was cut short; as long as the silence lasts if Slurm does not confirm that.
        cut_short = own and since > min(max(1, time.time() - self.moved), SQUEUE_EVERY)
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
        sizes = (own or {}).get("sizes", {})
        short = {name: size for name, size in sizes.items() if name in self.at and self.at[name] < size}
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
