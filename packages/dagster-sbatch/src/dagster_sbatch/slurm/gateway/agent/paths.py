"""What the login profile sets; paths as users write them: absolute, or after `~`, `$HOME`, `$DATA` or `$SCRATCH`.

The login profile sets the last two, and perhaps the project of the user's jobs. The shell that starts the agent may not
have read it. Reading it takes up to a second on some machines, so the agent remembers their values for a while.
"""

import os
import re
import select
import subprocess
import threading
import time
from contextlib import suppress

from .disk import RequestError, load, stamp_of, store
from .slurm_commands import PROJECT, RUNNING, user

START = re.compile(r"(?:~|\$(HOME|DATA|SCRATCH))(?=/|\Z)")
FIELDS = ("run", "runs", "folder", "path", "python", "data_root")  # of requests, that are paths
MARK = b"\x1e\0"  # a profile prints before the first one
ASK = r"printf '\036\0'; %s; printf '\036\0'"
LOGIN_PATH = "/usr/local/bin:/usr/bin:/bin"  # which most profiles replace
ITS_OWN = ("HOSTNAME", "PWD", "OLDPWD", "SHLVL", "_")  # of each shell
PROFILE_PATIENCE = 30.0  # seconds, less than the client waits for a sign of life
PROFILE_ENDS = "the login profile on %s ended the shell, as `exit` and `exec zsh` do. Let it do that in interactive "
PROFILE_ENDS += "shells only, after [[ $- == *i* ]] &&. Try it there:\n  bash -lc 'echo it works'"
REMEMBERED = "~/.cache/musica-pipelines/login-profile-%s.json"
REMEMBERED_FOR = 3600.0  # seconds; a file of the profile that changes ends it sooner
PROFILES = ("/etc/profile", "/etc/profile.d", "/etc/bash.bashrc")
PROFILES += ("~/.bash_profile", "~/.bash_login", "~/.profile", "~/.bashrc")


def expanded(profile, path):
    """Return a path without `~` or variable; other paths stay as they are."""
    found = START.match(path)
    if not found:
        return path
    name = found.group(1) or "HOME"
    value = os.path.expanduser("~") if name == "HOME" else os.environ.get(name) or profile.value(name)
    if not value.startswith("/"):
        what = "sets no $%s" % name if not value else "sets $%s to %r, which is not an absolute path" % (name, value)
        text = "%s cannot be used: the login profile on %s %s. Write the path itself."
        raise RequestError("refused", text % (path, os.uname()[1], what))
    return value.rstrip("/") + path[found.end() :]


def with_paths(profile, ask):
    """Return a request with its paths expanded."""
    return dict(ask, **{name: expanded(profile, ask[name]) for name in FIELDS if ask.get(name)})


class Profile:
    """What the login profile sets."""

    def __init__(self):
        self.values = {}
        self.lock = threading.Lock()

    def value(self, name):
        """Return the value of a variable; empty if the profile does not set it. A path that is none is read again."""
        with self.lock:
            self.values = self.values or recall()
            known = self.values.get(name)
            if known is None or not (known.startswith("/") or name == PROJECT):
                before = stamps()  # a profile that changes while it is read is read again
                script = 'printf "%%s\\0" "$DATA" "$SCRATCH" "$%s"' % PROJECT
                self.values["DATA"], self.values["SCRATCH"], self.values[PROJECT] = ask_login_shell(script)
                remember(self.values, before)
            return self.values[name]

    def charge(self):
        """Let jobs that name no project have that of the login profile, unless this shell has one already."""
        if os.environ.get(PROJECT):
            return
        try:
            project = self.value(PROJECT)
        except RequestError:  # it cannot be read, nor by each later request: the user's default counts
            self.values[PROJECT] = project = ""
        if project:
            os.environ[PROJECT] = project


def recall():
    """Return the remembered values, unless they are old."""
    known = load(os.path.expanduser(REMEMBERED) % os.uname()[1], "values", "stamps", "at")
    fresh = known and known["stamps"] == stamps() and 0 <= time.time() - known["at"] < REMEMBERED_FOR
    return known["values"] if fresh else {}


def remember(values, when):
    """Remember the values that the login profile set when its files had last changed at those times."""
    path = os.path.expanduser(REMEMBERED) % os.uname()[1]
    with suppress(OSError):  # the disk is full: the next agent reads the profile again
        os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
        store(path, {"values": values, "stamps": when, "at": time.time()})


def stamps():
    """Return what changes with each file of the profile."""
    return [stamp_of(os.path.expanduser(path)) for path in PROFILES]


def login_environment():
    """Return the variables and functions that a login shell exports, without those that each shell sets itself."""
    found = dict(text.split("=", 1) for text in ask_login_shell("env -0"))
    return {name: value for name, value in found.items() if name not in ITS_OWN}


def ask_login_shell(script):
    """Return the texts that a script of bash prints in a new login shell; each ends with a null byte.

    Nothing of the agent's own shell comes into it: no variable of an SSH session, or of a module.

    RequestError: `refused` if the profile ends the shell, `temporary` if it does not end in time.
    """
    kept = {name: os.environ[name] for name in ("HOME", "SHELL") if name in os.environ}
    child = subprocess.Popen(
        ["/bin/bash", "-l", "-c", ASK % script],
        env=dict(kept, USER=user(), LOGNAME=user(), PATH=LOGIN_PATH),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    RUNNING.add(child)
    said, until = b"", time.monotonic() + PROFILE_PATIENCE
    try:
        while said.count(MARK) < 2:  # not to its end: a process that the profile left may hold it
            if not select.select([child.stdout], [], [], max(until - time.monotonic(), 0))[0]:
                text = "the login profile on %s did not end within %d s" % (os.uname()[1], PROFILE_PATIENCE)
                raise RequestError("temporary", text + ". See there what it waits for:\n  bash -lc true")
            more = os.read(child.stdout.fileno(), 65536)
            if not more:
                raise RequestError("refused", PROFILE_ENDS % os.uname()[1])
            said += more
    finally:
        RUNNING.discard(child)
        child.kill()
        child.wait()
        child.stdout.close()
    return os.fsdecode(said.split(MARK)[1]).split("\0")[:-1]
