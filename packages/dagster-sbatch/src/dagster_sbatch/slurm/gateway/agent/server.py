"""The agent: it reads requests, answers them, and leaves when its client is gone."""

import json
import os
import sys
import threading
import time
from contextlib import contextmanager
from functools import partial
from importlib import import_module

from .disk import RequestError, kind_of
from .paths import FIELDS, Profile, with_paths
from .shared_queue import Queue
from .slurm_commands import SBATCH_PATIENCE, kill_running
from .transfer import CHUNK
from .turn import Turn

HELLO = "gateway-agent 1"
SILENCE = 60.0  # seconds without a byte from the client: it is gone, though the connection does not say so
CLOCK_STEP = 5.0  # seconds by which the clock of the login node was set, after which the agent ends


def ping(*_):
    return {"pong": True, "host": os.uname()[1]}


IN_ORDER = ("claims.hold", "run_directories.reject")  # before the next request is read, which builds on them


def find(verb):
    """Return the function of a verb, such as `jobs.run`; its module is compiled when it is first needed."""
    module, _, name = verb.partition(".")
    return getattr(import_module("." + module, __package__), name)


class Agent:
    """One client's agent.

    queue     the shared view of the user's jobs
    profile   what the login profile sets
    held      the locks of claims, by path, held as long as the agent lives
    turn      of its client, to submit what it has compared with what is left
    followers by run: the latest request to follow it; a client that asks again has given up the one before
    """

    def __init__(self):
        self.queue, self.profile, self.turn = Queue(), Profile(), Turn()
        self.held, self.followers = {}, {}
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
        """Return this many bytes of stdin, or a line; leave at its end. Any byte shows that the client is alive."""
        while True:
            cut = size or self.inbox.find(b"\n") + 1
            if 0 < cut <= len(self.inbox):
                data = bytes(self.inbox[:cut])
                del self.inbox[:cut]
                return data
            more = sys.stdin.buffer.read1(CHUNK)
            self.heard = time.monotonic()
            if not more:
                self.leave()
            self.inbox += more

    def handle(self, ask):
        say = partial(self.say, ask.get("id"))
        try:
            answer = self.answer(ask, say)
        except RequestError as error:
            answer = {"error": error.kind, "text": str(error)}
        except OSError as error:
            place = error.filename or next(filter(None, map(ask.get, FIELDS)), ask["do"])
            answer = {"error": kind_of(error), "text": "%s: %s" % (place, error.strerror)}
        except Exception:  # whatever it is, the client reports it
            import traceback  # loading it takes longer than most agents have a use for it

            answer = {"error": "broken", "text": "the gateway agent failed:\n%s" % traceback.format_exc(-3).strip()}
        if ask.get("do") == "jobs.cancel" and answer.get("error") == "refused":
            answer = {"refused": answer["text"]}  # an answer: an error would end the client's other requests
        say(**answer)
        if ask.get("do") == "claims.claim":
            find("jobs.run")  # compiled while the client reads the answer: this is what it asks for next
        if answer and ask.get("do") == "claims.hold":  # the requests that follow could touch the jobs of another client
            self.leave()

    def answer(self, ask, say):
        """Return the answer to a request. RequestError, OSError: there is none."""
        return find(ask["do"])(self, with_paths(self.profile, ask), say)

    @contextmanager
    def finishing(self):
        """Let what is done meanwhile be finished even if the client goes away."""
        with self.counting:
            self.busy += 1
        try:
            yield
        finally:
            with self.counting:
                self.busy -= 1

    def watch(self):
        """End the agent once its client is gone; or the clock was set: the client continues with a new agent.

        Otherwise what is due by the old clock would wait until the new one shows that time.
        """
        offset = before = time.time() - time.monotonic()
        while time.monotonic() - self.heard < SILENCE and abs(offset - before) < CLOCK_STEP:
            time.sleep(1)
            before, offset = offset, time.time() - time.monotonic()
        self.leave()

    def leave(self):
        """End the agent. A submission is finished first, so that its job id is on record; all else is killed."""
        until = time.monotonic() + SBATCH_PATIENCE
        while self.busy and time.monotonic() < until:
            time.sleep(0.02)
        kill_running()
        os._exit(0)

    def serve(self):
        for target in (self.watch, self.queue.keep):
            threading.Thread(target=target, daemon=True).start()
        self.say(0, hello=HELLO, pid=os.getpid(), python=sys.version.split()[0], host=os.uname()[1])
        while True:
            ask = json.loads(self.receive().decode())
            if ask.get("size"):
                ask["data"] = self.receive(ask["size"])
            if ask["do"] in IN_ORDER:
                self.handle(ask)
                continue
            threading.Thread(target=self.handle, args=(ask,), daemon=True).start()


def serve():
    """Serve one client, until it is gone."""
    os.umask(0o077)
    Agent().serve()
