"""The site's Python: which interpreter an environment is for, and how commands are run after the setup commands."""

import contextlib
import hashlib
import json
import os
import subprocess
import threading
import time

from .disk import RequestError, inode_of, load, stamp_of, store
from .paths import PROFILE_ENDS
from .slurm_commands import for_slurm

LAST_WORDS = 5.0  # seconds for the output of a command that has ended, if another process has its pipe, too
REMEMBERED = 86400.0  # seconds; a better candidate may have been installed since
MARK = "\x1e"  # begins the lines of DESCRIBE; a profile or a module prints other lines
DESCRIBE = (
    "import json, os, platform, sys; glibc = os.confstr('CS_GNU_LIBC_VERSION').split()[1]; "
    "base = os.path.realpath(getattr(sys, '_base_executable', sys.executable)); "
    "print('\\x1e' + json.dumps(dict(given=sys.executable, executable=base, version=platform.python_version(), "
    "implementation=sys.implementation.name, machine=platform.machine(), glibc=glibc)))"
)
# Kills the whole group when the pipe %d closes; the agent alone holds its other end.
BOUND = '{ read -r _ <&%d; kill -KILL 0; } >/dev/null 2>&1 & unset POSIXLY_CORRECT; exec nice -n 5 /bin/bash -l -c "$@"'


def collect(pipe, said):
    with pipe:
        said.extend(pipe)


def in_setup(ask, script, *arguments):
    """Run a piece of bash after the site's setup commands; return its exit code and all that both have printed.

    It ends with the agent, together with all that it has started, however the agent ends.
    """
    text, said = "\n".join(["echo " + MARK] + list(ask["setup"]) + [script]), []
    watched, held = os.pipe()
    try:
        process = subprocess.Popen(
            ["/bin/bash", "-c", BOUND % watched, "bash", text, "bash"] + list(arguments),
            env=for_slurm(os.environ),
            pass_fds=[watched],
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        reader = threading.Thread(target=collect, args=(process.stdout, said), daemon=True)
        reader.start()
        process.wait()
    finally:
        os.close(watched)
        os.close(held)
    reader.join(LAST_WORDS)  # what the profile has left in the background was killed, unless it has left the group
    printed = b"".join(said).decode(errors="replace")
    banner, mark, text = printed.partition(MARK + "\n")  # the login profile prints news
    if not mark:
        raise RequestError("refused", "%s\n%s" % (PROFILE_ENDS % os.uname()[1], banner[-500:]))
    return process.returncode, text


def load_modules(_, ask, __):
    """Load modules as a job does, in a shell of its own; return the exit code, what was printed, and the machine."""
    code, said = in_setup(ask, 'echo %s; module load "$@"' % MARK, *ask["modules"])
    return {"code": code, "text": said.rpartition(MARK)[2], "host": os.uname()[1]}


def run(ask, *command):
    """Run a command after the setup commands; refuse the request if it fails."""
    code, said = in_setup(ask, 'exec "$@"', *command)
    if code:
        text = "%s on %s failed:\n%s"
        raise RequestError("refused", text % (" ".join(command[:4]), os.uname()[1], said.strip()[-1500:]))


def choose(ask):
    """Return the interpreter for an environment; remembered for a day, per machine, while its file is the same.

    A request may name an interpreter, or the folder that has its bin/python.
    """
    inside = ask["python"] and os.path.join(ask["python"], "bin", "python")
    if inside and inode_of(inside):
        ask = dict(ask, python=inside)
    parts = [os.uname()[1], DESCRIBE] + [ask[name] for name in ("setup", "asked", "candidates", "oldest", "newest")]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    path = os.path.join(ask["folder"], ".interpreter-%s.json" % key)
    known = load(path, "found", "stamp", "at")
    if known and 0 <= time.time() - known["at"] < REMEMBERED and known["stamp"] == stamp(ask, known["found"]):
        return known["found"]
    found = probe(ask)
    with contextlib.suppress(OSError):  # nothing was deployed yet, or the disk is full: the next request probes again
        store(path, {"found": found, "stamp": stamp(ask, found), "at": time.time()})
    return found


def stamp(ask, found):
    """Return what changes when another interpreter is installed in the same place."""
    return [stamp_of(path) for path in (ask["python"] or found["given"], found["executable"])]


def probe(ask):
    """Return what SLURM_PYTHON or the asset's interpreter says of itself, or else the first candidate that fits."""
    fixed = ask["python"]
    names = [fixed] if fixed else ask["candidates"]
    _, said = in_setup(ask, 'code=$1; shift; for each; do echo; "$each" -I -c "$code"; done', DESCRIBE, *names)
    found = [json.loads(line[1:]) for line in said.split("\n") if line.startswith(MARK)]
    for each in found:
        minor = [int(part) for part in each["version"].split(".")[:2]]
        if fixed or (ask["oldest"] <= minor <= ask["newest"] and each["implementation"] == "cpython"):
            return each
    host = os.uname()[1]
    if fixed:
        text = "%s=%s does not run on %s: %s" % (ask["asked_by"], fixed, host, " ".join(said.split())[-500:])
        text += "\nName a Python interpreter, or the folder that has its bin/python, which all nodes can see and run."
        raise RequestError("refused", text)
    seen = ", ".join("%s is %s" % (each["given"], each["version"]) for each in found) or "none exists"
    text = "no Python %s to %s on %s: of %s, %s. Name another one in python_candidates of "
    text += "SUPERCOMPUTER_SITE_OVERRIDES, load one in its setup_commands (module load ...), or make an environment "
    text += "there yourself, and set SLURM_PYTHON to its interpreter"
    raise RequestError("refused", text % (dotted(ask["oldest"]), dotted(ask["newest"]), host, ", ".join(names), seen))


def check_version(ask, found):
    """Refuse an interpreter that an asset names and that is older than the launchers' programs need."""
    version = [int(part) for part in found["version"].split(".")[:2]]
    if ask["asked_by"] == "environment" and ask["asked"] and version < ask["oldest"]:
        text = "environment=%s is Python %s. Workloads need %s or newer. Make an environment there with a newer Python"
        raise RequestError("refused", text % (ask["asked"], found["version"], dotted(ask["oldest"])))


def dotted(version):
    return ".".join(str(part) for part in version)


def skeleton(path, interpreter):
    """Make a virtual environment (PEP 405) without what needs ensurepip; return its bin/python."""
    os.makedirs(os.path.join(path, "bin"))
    with open(os.path.join(path, "pyvenv.cfg"), "w") as file:
        home, version = os.path.dirname(interpreter["executable"]), interpreter["version"]
        file.write("home = %s\ninclude-system-site-packages = false\nversion = %s\n" % (home, version))
    python = os.path.join(path, "bin", "python")
    os.symlink(interpreter["executable"], python)
    return python
