"""The wire: requests in, answers out, and leaving when the client is gone."""

import errno
import json
import os
import sys
import threading
import time

from .claims import claim, clean, hold
from .files import CHUNK, Failure, get, piece, put
from .follower import follow
from .places import with_paths
from .programs import consult, program
from .runs import look, reject, runs
from .slurm import QUEUE, projects, states, test
from .submission import SBATCH_PATIENCE, cancel, submit

HELLO = "gateway-agent 1"
SILENCE = 60.0  # seconds without a byte from the client: it is gone, though the connection does not say so
# Errors of the file system that repeating the request does not fix.
FINAL = (
    errno.EACCES,
    errno.EDQUOT,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOSPC,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
)
# Those that pass by themselves: a server that is away, a node that is short of something. All others are `broken`.
PASSING = (
    errno.EAGAIN,
    errno.EBUSY,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.EINTR,
    errno.EIO,
    errno.EMFILE,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.ENFILE,
    errno.ENOBUFS,
    errno.ENOMEM,
    errno.ENOTCONN,
    errno.EREMOTEIO,
    errno.ESHUTDOWN,
    errno.ESTALE,
    errno.ETIMEDOUT,
)


def kind_of(error):
    """The kind of an error of the file system or of a system call."""
    if error.errno in FINAL:
        return "refused"
    return "temporary" if error.errno in PASSING else "broken"


def ping(_, __):
    return {"pong": True, "host": os.uname()[1]}


VERBS = {
    verb.__name__: verb
    for verb in (
        hold,
        claim,
        submit,
        test,
        cancel,
        look,
        reject,
        runs,
        clean,
        put,
        piece,
        get,
        consult,
        program,
        states,
        projects,
        follow,
        ping,
    )
}
FINISHED = ("submit", "cancel")  # also when the client goes away in the middle
AT_ONCE = ("hold", "reject", "piece")  # before the next request is looked at: what follows builds on them


class Agent:
    def __init__(self):
        self.out = os.fdopen(os.dup(1), "wb")
        os.dup2(os.open(os.devnull, os.O_RDWR), 1)  # nothing that a child prints gets between two answers
        self.writing, self.counting = threading.Lock(), threading.Lock()
        self.inbox = bytearray()
        self.heard = time.monotonic()
        self.busy = 0

    def say(self, ident, payload=b"", **fields):
        if payload:
            fields["size"] = len(payload)
        try:
            with self.writing:
                self.out.write(json.dumps(dict(fields, id=ident)).encode() + b"\n" + payload)
                self.out.flush()
        except OSError:
            self.leave()

    def receive(self, size=0):
        """So many bytes of stdin, or a line; None at its end. Each piece that comes is a sign of life."""
        while True:
            cut = size or self.inbox.find(b"\n") + 1
            if 0 < cut <= len(self.inbox):
                data = bytes(self.inbox[:cut])
                del self.inbox[:cut]
                return data
            more = sys.stdin.buffer.read1(CHUNK)
            self.heard = time.monotonic()
            if not more:
                return None
            self.inbox += more

    def handle(self, ask):
        ident = ask.get("id")

        def say(payload=b"", **fields):
            self.say(ident, payload, **fields)

        try:
            answer = VERBS[ask["do"]](with_paths(ask), say)
        except Failure as failure:
            answer = {"error": failure.kind, "text": str(failure)}
        except OSError as error:
            answer = {"error": kind_of(error), "text": "%s: %s" % (error.filename or ask["do"], error.strerror)}
        except Exception:  # whatever it is, the client has to hear of it
            import traceback  # loading it takes longer than most agents have a use for it

            answer = {"error": "broken", "text": "the gateway agent failed:\n%s" % traceback.format_exc(-3).strip()}
        if ask.get("do") in FINISHED:
            with self.counting:
                self.busy -= 1
        self.say(ident, **answer)

    def watch(self):
        while time.monotonic() - self.heard < SILENCE:
            time.sleep(1)
        self.leave()

    def leave(self):
        """The client is gone. A submission is finished first, so that its id is on record; most else just stops."""
        until = time.monotonic() + SBATCH_PATIENCE
        while self.busy and time.monotonic() < until:
            time.sleep(0.02)
        os._exit(0)

    def serve(self):
        for target in (self.watch, QUEUE.keep):
            threading.Thread(target=target, daemon=True).start()
        self.say(0, hello=HELLO, pid=os.getpid(), python=sys.version.split()[0], host=os.uname()[1])
        while True:
            line = self.receive()
            if line is None:
                self.leave()
            ask = json.loads(line.decode())
            if ask.get("size"):
                ask["data"] = self.receive(ask["size"])
                if ask["data"] is None:
                    self.leave()
            if ask["do"] in AT_ONCE:
                self.handle(ask)
                continue
            if ask["do"] in FINISHED:
                with self.counting:
                    self.busy += 1
            threading.Thread(target=self.handle, args=(ask,), daemon=True).start()


def serve():
    """Until the client is gone."""
    os.umask(0o077)
    Agent().serve()
