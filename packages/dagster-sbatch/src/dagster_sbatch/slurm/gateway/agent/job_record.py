"""What a job, or a task of an array job, writes in its folder: its own record, and streams, sent from an offset on."""

import os
import re
import time

from .disk import parse, read
from .transfer import CHUNK

MESSAGES = "messages.jsonl"
STREAMS = (MESSAGES, "stdout", "stderr")
EVENTS, CAUSE = "events", "cause"
LONGEST_CAUSE = 10000  # characters: Dagster stores it with several events
HALF = re.compile(rb'.+(?=\{"(?:started|code|idle)": )', re.S)
"""Half a record, as a full disk or a node without power leaves it: the next record follows in the same line."""
HOLE = 10.0  # seconds for which NUL bytes are held back: on NFS, a node may not have written those bytes yet
LONGER = 4  # times as long for messages, which have no NUL bytes: a node without power never writes what is missing
MOST_CHUNKS = 8  # of one stream in a row, so that none starves another
LAST = 64  # bytes before an offset, by which a file is recognized
BEHIND = 30.0  # seconds for which a machine may see less of a file than another one has seen before


def events_of(folder):
    """Return the job's own records of its latest start by name; a requeued job starts again.

    started, end  of the job script
    idle          of the sampler: for how many seconds the GPUs have been idle; it writes that once
    """
    events, began = {}, None
    for line in read(os.path.join(folder, EVENTS)).split(b"\n")[:-1]:  # the last piece is not a whole line yet
        event = parse(line, "time") or parse(HALF.sub(b"", line), "time") or {}
        if "started" in event:
            events, began = {"started": event}, event["time"]
        elif "code" in event and began in (None, event.get("began") or began):  # not of a start that was replaced
            events["end"] = event
        elif "idle" in event:
            events["idle"] = event
    return events


def cut_short(events):
    """Return whether a job has recorded that it was cut short: Slurm ends it, or runs it again."""
    return "end" in events and events["end"]["code"] is None


def cause_of(folder):
    """Return why the job failed, as something in it has recorded; empty if nothing has. A long text is cut."""
    text = read(os.path.join(folder, CAUSE)).decode(errors="replace").strip()
    more = len(text) - LONGEST_CAUSE
    return text if more <= 0 else "%s\n[... %d characters left out ...]" % (text[:LONGEST_CAUSE], more)


def read_on(file, at, last, behind=False):
    """Return the next bytes of an open file and their offset: `at`, or 0 if a program has emptied the file meanwhile.

    `echo ... >/dev/stderr` in a shell script empties it, since the shell opens the file anew. `last`: the bytes that
    were before `at`. `behind`: this machine may not see all of them yet. Return None for the bytes if it does not.
    """
    data = os.pread(file, CHUNK + len(last), at - len(last))
    if data.startswith(last):
        return data[len(last) :], at
    if behind and last.startswith(data):
        return None, at
    return os.pread(file, CHUNK, 0), 0


def last_of(last, data, at):
    """Return the last bytes before `at`; `data` ends there, and `last` was before it. NUL bytes may be replaced yet."""
    return (last + data)[-min(LAST, at) :].rpartition(b"\0")[2]


class Stream:
    """A file, what the client calls it, and the number of its bytes that are sent, with the last of them.

    An earlier agent may have sent them: `last` is what the client has of them, a text with a character for each byte.
    `holes`: whether NUL bytes may stand for bytes that are not there yet.
    """

    def __init__(self, path, name, at=0, last="", holes=True):
        self.path, self.name, self.at, self.last, self.holes = path, name, at, last.encode("latin-1"), holes
        self.hole = (0, 0)  # its size when NUL bytes were first seen, and the time
        # Until when this machine may not see all that was sent. No program empties the messages
        self.behind = time.time() + (float("inf") if name == MESSAGES else BEHIND) if last else 0
        self.seen, self.removed = at > 0, False  # whether it was there, and is not any more

    def pump(self, say, most=MOST_CHUNKS):
        """Send what the file has beyond the offset, as far as this many chunks go; return their number."""
        try:  # opened each time: on NFS, only that shows what another machine has appended
            file = os.open(self.path, os.O_RDONLY)
        except FileNotFoundError:
            self.behind, self.removed = 0, self.seen  # by the job, or by the site
            return 0
        self.seen, self.removed = True, False
        try:
            for sent in range(most):
                data, at = read_on(file, self.at, self.last, time.time() < self.behind)
                if data is None:
                    return sent
                self.behind = 0
                if at < self.at:
                    self.at, self.last, self.hole = 0, b"", (0, 0)
                data = data[: self.whole(data, file)]
                if not data:
                    return sent
                say(data, file=self.name, at=self.at)
                self.at += len(data)
                self.last = last_of(self.last, data, self.at)
            return most
        finally:
            os.close(file)

    def whole(self, data, file):
        """Return how many bytes of a piece can be sent: those before NUL bytes that may be a hole."""
        place = data.find(b"\0")
        if place < 0 or not self.holes:
            return len(data)
        size, since = self.hole
        if size <= self.at + place:
            size, since = self.hole = os.fstat(file).st_size, time.time()
        if time.time() - since < HOLE * (LONGER if self.name == MESSAGES else 1):
            return place
        return min(len(data), size - self.at)  # the program wrote NUL bytes, or nobody will replace them


def short_of(streams, sizes):
    """Return the streams that have not sent all, with the number of bytes sent.

    sizes: the job's own record of them
    """
    now = time.time()
    short = (each for each in streams if each.at < max(sizes.get(each.name, 0), each.hole[0]) or now < each.behind)
    return {each.name: each.at for each in short}


def pause_after(silence):
    """Return the seconds until a file is read again: 2 % of the time without news, at least 0.02 s, at most 1 s."""
    return min(max(0.02 * silence, 0.02), 1)
