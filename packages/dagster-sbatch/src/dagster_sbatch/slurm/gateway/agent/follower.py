"""Following a run: its output, messages, states and end, from given offsets on."""

import os
import time

from .files import CHUNK, Failure
from .runs import MESSAGES, STREAMS, conclude, job_of, locate, quietly_conclude, words_of
from .slurm import COMMAND_PATIENCE, OVER, QUEUE, SQUEUE_EVERY, account
from .submission import UNDER_WAY

UNSEEN = 60.0  # seconds without an answer of squeue, after which Slurm is asked about the one job, as often
HOLE = 10.0  # seconds for which NUL bytes are held back: on NFS, they may stand for what a node's cache still has
LAG = 15.0  # seconds for which a job's own words are waited for when Slurm says that it is over
ABSENT = 10.0  # seconds for which a run directory may be on its way
MOST_CHUNKS = 8  # of one stream in a row, so that none starves another

LATEST = {}  # by run: who follows it; a client that asks once more has given up what it asked for before


class Follower:
    def __init__(self, ask, say):
        self.run, self.key = locate(ask)
        self.say = say
        self.at = {name: ask["offsets"][name] for name in STREAMS if name in ask["offsets"]}
        self.fields = ask["fields"]
        self.begun = self.moved = self.asked = time.time()
        self.pause = 0.015
        self.told, self.trouble = None, None
        self.holes = {}  # by stream: the size that it had when NUL bytes were first seen, and when that was
        self.end, self.end_seen = None, 0.0

    def follow(self):
        QUEUE.want(os.path.dirname(self.run))
        LATEST[self.run] = self
        while not os.path.isdir(self.run):  # asked for in one breath with its submission
            if time.time() - self.begun > ABSENT and self.run not in UNDER_WAY:
                raise Failure("refused", "there is no run %s" % self.run)
            time.sleep(0.02)
        while LATEST[self.run] is self:
            words = words_of(self.run)  # before the streams: what was written before the end is read after it
            sent = [self.pump(name) for name in self.at]
            if any(sent):
                self.moved = time.time()
            job, word = job_of(self.run), words.get("end")
            if job and not self.end:
                self.tell_state(job, words)
                self.ask_for_end(job, word)
            if self.end and not any(sent):
                answer = self.finish(job, word)
                if answer:
                    return answer
            if max(sent or [0]) < MOST_CHUNKS:
                # 2 % of the silence: 0.02 s while things happen, 1 s for a job that works quietly
                time.sleep(min(max(0.02 * (time.time() - self.moved), 0.02), 1))
        return {}

    def pump(self, name):
        """Send what a file has beyond its offset; the number of chunks."""
        try:  # opened anew each time: on NFS that is what shows another machine's appends
            file = os.open(os.path.join(self.run, name), os.O_RDONLY)
        except FileNotFoundError:
            return 0
        try:
            for sent in range(MOST_CHUNKS):
                data = os.pread(file, CHUNK, self.at[name])  # nothing beyond the end, nor where a view is old
                data = data[: self.whole(name, data, file)]
                if not data:
                    return sent
                self.say(data, file=name, at=self.at[name])
                self.at[name] += len(data)
            return MOST_CHUNKS
        finally:
            os.close(file)

    def whole(self, name, data, file):
        """Return how much of some bytes of a stream can be sent: what stands before NUL bytes that may be a hole."""
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
        return min(len(data), size - self.at[name])  # it was written so

    def tell_state(self, job, words):
        row = QUEUE.row(job, self.key)
        if "started" in words and (not row or row[0] == "PENDING"):  # squeue's view is older
            row = ["RUNNING", "None", ""] + (row or [])[3:]
        if row and row[0] not in OVER and "end" not in words:
            self.tell(*row, **(words.get("started") or {}))
        if QUEUE.view["trouble"] and QUEUE.view["trouble"] != self.trouble:
            self.trouble = QUEUE.view["trouble"]
            self.say(trouble=self.trouble)

    def tell(self, state, reason, start="", project="", started="", temporary="", **_):
        if (state, reason, project, started) != self.told:
            self.told = (state, reason, project, started)
            place = {"node": started, "temporary": temporary}
            self.say(state=state, reason=reason, start=start, account=project, **place)

    def ask_for_end(self, job, word):
        """When the job has told its end, at once; where it was cut short, or is gone without a word, a little later."""
        since, row = time.time() - self.asked, QUEUE.row(job, self.key)
        told = word and word["code"] is not None and since > self.pause
        cut_short = word and since > min(max(1, time.time() - self.moved), SQUEUE_EVERY)
        gone = since > SQUEUE_EVERY and QUEUE.view["at"] > self.begun + 5 and (not row or row[0] in OVER)
        unseen = since > UNSEEN and time.time() - QUEUE.view["at"] > UNSEEN
        if not (told or cut_short or gone or unseen):
            return
        self.asked = time.time()
        if told:
            self.pause = min(1.5 * self.pause, 5)
        try:
            self.end = conclude(self.run, job)
        except Failure as failure:
            if word:
                self.tell("COMPLETING", "waiting for Slurm to confirm the end: %s" % failure)

    def finish(self, job, word):
        """The answer, once all that the job wrote is sent; a job that left no word may have one on its way."""
        self.end_seen = self.end_seen or time.time()
        waited = time.time() - self.end_seen
        sizes = (word or {}).get("sizes", {})
        short = {name: size for name, size in sizes.items() if name in self.at and self.at[name] < size}
        if (short and waited < COMMAND_PATIENCE) or (not word and waited < LAG):
            return None
        if not word and not quietly_conclude(self.run, job):  # put back in the queue meanwhile
            self.end, self.end_seen = None, 0.0
            return None
        start, end = self.end["times"][1:]
        rows = account(job, self.fields, end - start) if start and end else []
        return {"job": job, "end": dict(word or {}, **self.end), "short": short, "rows": rows}


# Requests


def follow(ask, say):
    return Follower(ask, say).follow()
