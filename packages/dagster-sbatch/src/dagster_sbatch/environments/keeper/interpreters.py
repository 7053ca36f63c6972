"""The site's Python: which it is, and how it is run."""

import contextlib
import hashlib
import json
import os
import subprocess
import time

from dagster_sbatch.slurm.gateway.agent.disk import load, store

from .files import Refused

REMEMBERED = 86400.0  # seconds; a better candidate may have come since
STAMP = ("st_ino", "st_size", "st_mtime_ns")
MARK = "\x1e"  # what a profile or a module prints comes without it
DESCRIBE = (
    "import json, os, platform, sys; glibc = os.confstr('CS_GNU_LIBC_VERSION').split()[1]; "
    "base = os.path.realpath(getattr(sys, '_base_executable', sys.executable)); "
    "print('\\x1e' + json.dumps(dict(given=sys.executable, executable=base, version=platform.python_version(), "
    "implementation=sys.implementation.name, machine=platform.machine(), glibc=glibc)))"
)


def in_setup(ask, script, *arguments):
    """Run a piece of bash after the site's setup commands; its exit code, and all that was printed."""
    text = "\n".join(list(ask["setup"]) + [script])
    done = subprocess.run(
        ["/bin/bash", "-l", "-c", text, "bash"] + list(arguments),
        check=False,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    return done.returncode, done.stdout.decode(errors="replace")


def choose(ask):
    """The interpreter for an environment; remembered for a day, on this machine and while its file is the same."""
    parts = [os.uname()[1], DESCRIBE] + [ask[name] for name in ("setup", "asked", "candidates", "oldest", "newest")]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    path = os.path.join(ask["folder"], ".interpreter-%s.json" % key)
    known = load(path, "found", "stamp", "at")
    if known and time.time() - known["at"] < REMEMBERED and known["stamp"] == stamp(ask, known["found"]):
        return known["found"]
    found = probe(ask)
    with contextlib.suppress(OSError):  # nothing was deployed yet, or the disk is full: it is asked again
        store(path, {"found": found, "stamp": stamp(ask, found), "at": time.time()})
    return found


def stamp(ask, found):
    """What tells an interpreter from another in its place."""
    paths = (ask["python"] or found["given"], found["executable"])
    return [os.path.exists(path) and [getattr(os.stat(path), name) for name in STAMP] for path in paths]


def probe(ask):
    """The one that is set, or the first candidate that fits."""
    fixed = ask["python"]
    names = [fixed] if fixed else ask["candidates"]
    _, said = in_setup(ask, 'code=$1; shift; for each; do echo; "$each" -I -c "$code"; done', DESCRIBE, *names)
    found = [json.loads(line[1:]) for line in said.split("\n") if line.startswith(MARK)]
    for each in found:
        minor = [int(part) for part in each["version"].split(".")[:2]]
        if fixed or (ask["oldest"] <= minor <= ask["newest"] and each["implementation"] == "cpython"):
            return each
    if fixed:
        raise Refused("SLURM_PYTHON=%s does not run on %s: %s" % (fixed, os.uname()[1], " ".join(said.split())[-500:]))
    seen = ", ".join("%s is %s" % (each["given"], each["version"]) for each in found) or "none of them is there"
    raise Refused(
        "no Python %s to %s on %s: of %s, %s. Name another one in python_candidates of SUPERCOMPUTER_SITE_OVERRIDES, "
        "load one in its setup_commands (module load ...), or make an environment there by other means and set "
        "SLURM_PYTHON to its interpreter"
        % (dotted(ask["oldest"]), dotted(ask["newest"]), os.uname()[1], ", ".join(names), seen)
    )


def dotted(version):
    return ".".join(str(part) for part in version)


def run(ask, *command):
    code, said = in_setup(ask, 'exec "$@"', *command)
    if code:
        raise Refused("%s on %s failed:\n%s" % (" ".join(command[:4]), os.uname()[1], said.strip()[-1500:]))


def skeleton(path, interpreter):
    """A virtual environment (PEP 405) without what needs ensurepip; its bin/python."""
    os.makedirs(os.path.join(path, "bin"))
    with open(os.path.join(path, "pyvenv.cfg"), "w") as file:
        home, version = os.path.dirname(interpreter["executable"]), interpreter["version"]
        file.write("home = %s\ninclude-system-site-packages = false\nversion = %s\n" % (home, version))
    python = os.path.join(path, "bin", "python")
    os.symlink(interpreter["executable"], python)
    return python
