"""The gateway agent: what has to be done on a login node, over one pair of pipes.

One file, standard library, Python 3.6: the client sends it along, nothing is installed. It is run with `python3 -u -c`,
reads requests from stdin and writes answers to stdout, each a line of JSON:

    stdin   {"id": 1, "do": "submit", "run": "/path/KEY", "files": {"job.sh": "..."}, "options": ["--partition=..."]}
    stdout  {"id": 0, "hello": "gateway-agent 1", ...}          what comes before is not ours: banners, profiles
            {"id": 1, "job": "1184", "how": "submitted"}
            {"id": 2, "file": "stdout", "at": 0, "size": 13}    13 raw bytes follow that line
            {"id": 1, "error": "refused", "text": "..."}        final; `unknown`: nothing was decided, ask again

Requests are independent of each other and may be repeated: the run directory remembers, the agent does not. It lives as
long as its stdin, and no longer than SILENCE without a word from its client, since a laptop that sleeps closes nothing.
"""

import errno
import fcntl
import getpass
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time

HELLO = "gateway-agent 1"
STREAMS = ("messages.jsonl", "stdout", "stderr")
EVENTS = "events"  # the job's own words: {"started": node}, then {"code": n, "sizes": {...}}; null: cut short
KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}\Z")
JOB_ID = re.compile(r"^(\d+)(?:;\S+)?\s*$", re.M)
CHUNK = 1 << 18
SILENCE = 60.0  # seconds without a line from the client: it is gone, though the connection does not say so
SQUEUE_EVERY = 15.0
COMMAND_PATIENCE = 60.0
SBATCH_PATIENCE = 120.0
LATE = 20.0  # seconds after which a submission that got no answer can no longer turn up in the queue
FORGOTTEN = 240.0  # seconds after which squeue alone proves nothing: it forgets ended jobs after MinJobAge (300)
LAG = 15.0  # seconds for which a job's own words are waited for when Slurm says that it is over
OVER = frozenset(
    "BOOT_FAIL CANCELLED COMPLETED DEADLINE FAILED NODE_FAIL OUT_OF_MEMORY PREEMPTED REVOKED TIMEOUT".split()
)
# Words of sbatch after which it is not known whether the job exists.
UNSURE = re.compile(r"timed out|timeout|contact slurm controller|communication|connection|unexpected message", re.I)


class Failure(Exception):
    """`refused`: Slurm or we said no, for good. `unknown`: nothing was decided, ask again."""

    def __init__(self, kind, text):
        super().__init__(text)
        self.kind = kind


# Files


def read(path):
    """The content of a file; nothing if there is none."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        return b""


def write(path, data):
    """Put a file in place, whole or not at all, for its owner alone."""
    part = "%s.%d.part" % (path, threading.get_ident())
    with open(part, "wb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.rename(part, path)


def lay_out(run, files):
    """Make the run directory (0700) with all its files in one step: a rename onto a folder that has files fails."""
    new = "%s.%d-%d.new" % (run, os.getpid(), threading.get_ident())
    os.makedirs(new, 0o700)
    try:
        for name in STREAMS + (EVENTS,):  # made now: no file system keeps a stale "no such file"
            write(os.path.join(new, name), b"")
        for name, text in files.items():
            if os.path.basename(name) != name or name in ("", ".", ".."):
                raise Failure("refused", "not a plain file name: %r" % name)
            write(os.path.join(new, name), text.encode())
        write(os.path.join(new, "digest"), digest(files))
        os.rename(new, run)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise Failure("refused", "%s: %s" % (run, error.strerror))
    finally:
        shutil.rmtree(new, ignore_errors=True)


def digest(files):
    """What tells two submissions under one key apart."""
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest().encode()


def words_of(run):
    """The words of the job's last life, by `started` and `end`; a job that runs again begins anew."""
    words = {}
    for line in read(os.path.join(run, EVENTS)).split(b"\n")[:-1]:  # the last piece is not a whole line yet
        word = json.loads(line.decode())
        words = dict(words, end=word) if "code" in word else {"started": word}
    return words


# Slurm


def environment():
    """For Slurm's commands: nothing that would change what they do or print."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SBATCH_", "SQUEUE_", "SACCT_", "SLURM_"))
    }
    if "SLURM_CONF" in os.environ:
        kept["SLURM_CONF"] = os.environ["SLURM_CONF"]
    kept["SLURM_TIME_FORMAT"] = "%s"
    return kept


def ask_slurm(*command):
    """The rows that a query prints, split at `|`."""
    try:
        done = subprocess.run(
            command,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            timeout=COMMAND_PATIENCE,
        )
    except subprocess.TimeoutExpired:
        raise Failure("unknown", "%s did not answer within %d s" % (command[0], COMMAND_PATIENCE))
    except OSError as error:
        raise Failure("refused", "%s: %s" % (command[0], error.strerror))
    if done.returncode:
        raise Failure("unknown", "%s: %s" % (command[0], done.stderr.decode(errors="replace").strip()))
    return [line.split("|") for line in done.stdout.decode(errors="replace").splitlines() if "|" in line]


def job_of(run):
    """The run's job: what sbatch said or what the job itself has left, whichever came first."""
    try:
        return os.readlink(os.path.join(run, "job"))
    except FileNotFoundError:
        return None


def settle(run, job):
    """Note the run's job, unless there is one."""
    try:
        os.symlink(job, os.path.join(run, "job"))
    except FileExistsError:
        pass
    return job_of(run)


def look_up(key, since):
    """The job of that name, also where its submitter never heard of it. `since`: when it may have been submitted."""
    rows = ask_slurm("squeue", "-h", "-t", "all", "-u", getpass.getuser(), "-n", key, "-o", "%i|%j")
    if not rows:
        day = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(since - 120))
        fields = ("-X", "-n", "-P", "-u", getpass.getuser(), "--name", key, "-S", day, "-o", "JobID,JobName")
        try:
            rows = ask_slurm("sacct", *fields)
        except Failure:
            if time.time() - since > FORGOTTEN:
                raise
    jobs = sorted(int(row[0]) for row in rows if row[1] == key and row[0].isdigit())
    return str(jobs[0]) if jobs else None


def verdict(job, key):
    """How a job ended, from squeue, else from the accounting; None while it has not, or nobody knows."""
    questions = (
        ("squeue", ("squeue", "-h", "-t", "all", "-j", job, "-o", "%T|%j")),
        ("sacct", ("sacct", "-X", "-n", "-P", "-j", job, "-o", "State,JobName")),
    )
    for source, command in questions:
        try:
            rows = [row for row in ask_slurm(*command) if row[1] == key]  # ids are used again
        except Failure:  # squeue also fails for an id that it has forgotten
            continue
        if rows:
            state = rows[-1][0].split()[0].rstrip("+")  # "CANCELLED by 123", "COMPLETED+"
            return {"state": state, "source": source} if state in OVER else None
    return None


# Requests


def submit(ask, _):
    """Submit a run, once, however often and from wherever it is asked for."""
    run = os.path.expanduser(ask["run"])
    key = os.path.basename(run)
    if not KEY.match(key):
        raise Failure("refused", "not a name for a run: %r" % key)
    if not os.path.isdir(run):
        lay_out(run, ask["files"])
    if read(os.path.join(run, "digest")) != digest(ask["files"]):
        raise Failure("refused", "%s is there already, with other content" % run)
    tried = os.path.join(run, "tried")
    lock = os.open(os.path.join(run, "lock"), os.O_CREAT | os.O_RDWR, 0o600)
    try:
        # sbatch inherits the lock: should the agent be killed, it stays locked until that sbatch has ended.
        fcntl.flock(lock, fcntl.LOCK_EX)
        job, how = job_of(run), "recorded"
        if not job and os.path.exists(tried):
            since, how = os.stat(tried).st_mtime, "found"
            job = look_up(key, since)
            while not job and time.time() - since < ask.get("late", LATE):
                time.sleep(2)
                job = job_of(run) or look_up(key, since)
        if not job:
            write(tried, b"")
            job, how = sbatch(run, key, ask["options"], lock), "submitted"
        return {"job": settle(run, job), "how": how}
    finally:
        os.close(lock)


def sbatch(run, key, options, lock):
    """Hand the run's job.sh to Slurm; the job's id."""
    try:
        child = subprocess.Popen(
            ["sbatch", "--parsable", "--chdir", run] + options + [os.path.join(run, "job.sh")],
            cwd=run,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=[lock],
        )
        out, err = (text.decode(errors="replace") for text in child.communicate(timeout=SBATCH_PATIENCE))
    except subprocess.TimeoutExpired:
        raise Failure("unknown", "sbatch did not answer within %d s" % SBATCH_PATIENCE)
    except OSError as error:
        os.unlink(os.path.join(run, "tried"))
        raise Failure("refused", "sbatch: %s" % error.strerror)
    found = JOB_ID.findall(out)  # wrappers and submit filters print more than the id
    if child.returncode == 0 and found:
        return found[-1]
    if child.returncode <= 0 or UNSURE.search(err):
        raise Failure("unknown", err.strip() or out.strip())
    os.unlink(os.path.join(run, "tried"))
    raise Failure("refused", err.strip())


def cancel(ask, _):
    """Cancel the run's job, and wait until Slurm says that it is over."""
    run = os.path.expanduser(ask["run"])
    key = os.path.basename(run)
    job, over, until = job_of(run) or look_up(key, time.time() - 86400), None, time.time() + 60
    if job:
        over = verdict(job, key)
        if not over:
            ask_slurm("scancel", job)
        while not over and time.time() < until:
            time.sleep(0.5)
            over = verdict(job, key)
    return {"job": job, "over": over}


def accounting(ask, _):
    """What sacct has of the run's job and its steps, a row each."""
    run = os.path.expanduser(ask["run"])
    job = job_of(run)
    return {"rows": ask_slurm("sacct", "-n", "-P", "-j", job, "-o", ask["fields"]) if job else []}


class Queue:
    """squeue for all of the user's jobs, asked every SQUEUE_EVERY by whichever agent on this machine is first."""

    def __init__(self):
        self.folder = os.path.join("/tmp", "gateway-%d" % os.getuid())
        self.view = {"at": 0, "asked": 0, "calls": 0, "jobs": {}, "error": None}
        self.wanted = threading.Event()

    def refresh(self):
        try:
            os.mkdir(self.folder, 0o700)
        except FileExistsError:
            pass
        mine = os.lstat(self.folder)
        if mine.st_uid != os.getuid() or mine.st_mode & 0o077:
            raise Failure("refused", "%s is not ours alone" % self.folder)
        path = os.path.join(self.folder, "squeue.json")
        with open(path + ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            view = json.loads(read(path).decode() or json.dumps(self.view))
            if not 0 <= time.time() - max(view["at"], view["asked"]) < SQUEUE_EVERY:
                view["asked"] = time.time()
                view["calls"] += 1
                try:
                    rows = ask_slurm("squeue", "-h", "-t", "all", "-u", getpass.getuser(), "-o", "%i|%T|%r|%S|%j")
                    view.update(at=view["asked"], jobs={row[0]: row[1:] for row in rows}, error=None)
                except Failure as failure:
                    view["error"] = str(failure)  # the old view stays, with its age
                write(path, json.dumps(view).encode())
        self.view = view

    def keep(self):
        """In a thread of its own: a slow controller must not hold up the streams."""
        while self.wanted.wait():
            try:
                self.refresh()
                due = SQUEUE_EVERY - (time.time() - max(self.view["at"], self.view["asked"]))
            except (Failure, OSError, ValueError) as error:
                self.view, due = dict(self.view, error=str(error)), SQUEUE_EVERY
            time.sleep(max(due, 0) + random.uniform(0.2, 2))

    def row(self, job, key):
        """State, reason and expected start of a job, as last seen; None if it was not seen."""
        found = self.view["jobs"].get(job)
        return found[:3] if found and found[3] == key else None


QUEUE = Queue()


def states(_, __):
    """The view of all of the user's jobs."""
    QUEUE.refresh()
    return QUEUE.view


class Follower:
    """Tells a run's output, messages, states and end, from given offsets on."""

    def __init__(self, ask, say):
        self.run = os.path.expanduser(ask["run"])
        self.key = os.path.basename(self.run)
        self.say = say
        self.at = {name: ask.get("offsets", {}).get(name, 0) for name in STREAMS}
        self.begun = self.moved = self.asked = time.time()
        self.told = None
        self.end, self.end_seen = None, 0.0

    def follow(self):
        QUEUE.wanted.set()
        while not os.path.isdir(self.run):  # asked for in one breath with its submission
            if time.time() - self.begun > 10:
                raise Failure("refused", "there is no run %s" % self.run)
            time.sleep(0.02)
        while True:
            words = words_of(self.run)  # before the streams: what was written before the end is read after it
            if any([self.pump(name) for name in STREAMS]):
                self.moved = time.time()
                continue
            job = job_of(self.run)
            self.tell_state(job, words)
            word = words.get("end")
            if word and word["code"] is not None:
                self.end = word
            elif job and not self.end:
                self.ask_for_end(job, word)
            if self.end:
                answer = self.finish(word)
                if answer:
                    return answer
            # 5 % of the silence: 0.03 s while things happen, 1 s for a job that works quietly
            time.sleep(min(max(0.05 * (time.time() - self.moved), 0.03), 1))

    def pump(self, name):
        """Send what a file has beyond its offset, in a few chunks, so that no stream starves another."""
        try:  # opened anew each time: on NFS that is what shows another machine's appends
            file = os.open(os.path.join(self.run, name), os.O_RDONLY)
        except FileNotFoundError:
            return False
        try:
            sent = False
            for _ in range(8):
                data = os.pread(file, CHUNK, self.at[name])  # nothing beyond the end, nor where a view is old
                if not data:
                    break
                self.say(data, file=name, at=self.at[name])
                self.at[name] += len(data)
                sent = True
            return sent
        finally:
            os.close(file)

    def tell_state(self, job, words):
        row = QUEUE.row(job, self.key)
        if "started" in words and (not row or row[0] == "PENDING"):  # squeue's view is older
            row = ["RUNNING", "None", ""]
        if row and row[:2] != self.told and not self.end:
            self.told = row[:2]
            self.say(state=row[0], reason=row[1], start=row[2])

    def ask_for_end(self, job, word):
        """For a job that did not say how it ended: cut short (a `code` of null), or gone without a word."""
        since, row = time.time() - self.asked, QUEUE.row(job, self.key)
        cut_short = word and since > min(max(1, time.time() - self.moved), SQUEUE_EVERY)
        gone = since > SQUEUE_EVERY and QUEUE.view["at"] > self.begun + 5 and (not row or row[0] in OVER)
        if cut_short or gone:
            self.asked, self.end = time.time(), verdict(job, self.key)

    def finish(self, word):
        """The answer, once all that the job wrote is sent; a job that left no word may have one on its way."""
        self.end_seen = self.end_seen or time.time()
        waited = time.time() - self.end_seen
        sizes = (word or {}).get("sizes", {})
        short = {name: size for name, size in sizes.items() if name in self.at and self.at[name] < size}
        if (short and waited < COMMAND_PATIENCE) or (not word and waited < LAG):
            return None
        return {"end": dict(word or {}, **self.end), "short": short}


def follow(ask, say):
    return Follower(ask, say).follow()


def ping(_, __):
    return {"pong": True}


VERBS = {
    "submit": submit,
    "follow": follow,
    "cancel": cancel,
    "accounting": accounting,
    "states": states,
    "ping": ping,
}


# The wire


class Agent:
    def __init__(self):
        self.out = os.fdopen(os.dup(1), "wb")
        os.dup2(os.open(os.devnull, os.O_RDWR), 1)  # nothing that a child prints gets between two answers
        self.writing, self.counting = threading.Lock(), threading.Lock()
        self.heard = time.monotonic()
        self.submitting = 0

    def say(self, ident, payload=b"", **fields):
        if payload:
            fields["size"] = len(payload)
        try:
            with self.writing:
                self.out.write(json.dumps(dict(fields, id=ident)).encode() + b"\n" + payload)
                self.out.flush()
        except OSError:
            self.leave()

    def handle(self, ask):
        ident = ask.get("id")

        def say(payload=b"", **fields):
            self.say(ident, payload, **fields)

        try:
            answer = VERBS[ask["do"]](ask, say)
        except Failure as failure:
            answer = {"error": failure.kind, "text": str(failure)}
        except Exception as error:  # whatever it is, the client has to hear of it
            answer = {"error": "unknown", "text": repr(error)}
        if ask.get("do") == "submit":
            with self.counting:
                self.submitting -= 1
        self.say(ident, **answer)

    def watch(self):
        while time.monotonic() - self.heard < SILENCE:
            time.sleep(1)
        self.leave()

    def leave(self):
        """The client is gone. A submission is finished first, so that its id is on record; all else just stops."""
        until = time.monotonic() + SBATCH_PATIENCE
        while self.submitting and time.monotonic() < until:
            time.sleep(0.02)
        os._exit(0)

    def serve(self):
        for target in (self.watch, QUEUE.keep):
            threading.Thread(target=target, daemon=True).start()
        self.say(0, hello=HELLO, pid=os.getpid(), python=sys.version.split()[0], host=os.uname()[1])
        for line in sys.stdin.buffer:
            self.heard = time.monotonic()
            ask = json.loads(line.decode())
            if ask["do"] == "submit":
                with self.counting:
                    self.submitting += 1
            threading.Thread(target=self.handle, args=(ask,), daemon=True).start()
        self.leave()


if __name__ == "__main__":
    Agent().serve()
