"""What the doctor asks of a login node."""

import os
import resource

from .disk import RequestError, unique
from .slurm_commands import call

COMMANDS = ("sbatch", "squeue", "scancel", "scontrol", "sinfo")
PATIENCE, SLURM_PATIENCE = 10.0, 20.0  # seconds for each command
TRIAL = 1 << 20  # bytes that are written to the base path, and removed


def said_by(patience, *command):
    """Return the exit code of a command, and all that it has printed; code 1 if it did not start, or did not end."""
    try:
        done = call(*command, patience=patience)
    except RequestError as error:
        return 1, str(error)
    return done.returncode, (done.stdout + done.stderr).decode(errors="replace").strip()


def try_to_write(folder):
    """Return why a file cannot be written to a folder; empty if it can."""
    path = unique(os.path.join(folder, ".doctor"))
    try:
        with open(path, "xb") as file:  # never what another user has put there
            try:
                file.write(bytes(TRIAL))
                file.flush()
                os.fsync(file.fileno())
            finally:
                os.unlink(path)
    except OSError as error:
        return error.strerror
    return ""


# Requests


def survey(agent, ask, _):
    """Return what the agent sees here.

    missing: commands of Slurm that are not on its PATH
    controller, partitions: exit code and output of scontrol
    base, above, refusal: the base path; what there is of it; why nothing can be written there, empty if it can
    rooms: by the name of each of the user's folders, and of `above` as `base`: the path, and the output of df
    quota: what the command of that name prints
    temporary: TMPDIR; empty if it is not set
    files: the hard limit on open files
    """
    import shutil  # loading it takes longer than most agents have a use for it

    above = ask["path"]
    while not os.path.exists(above):
        above = os.path.dirname(above)
    named = {name: os.environ.get(name) or agent.profile.value(name) for name in ("DATA", "SCRATCH")}
    folders = dict({"HOME": os.path.expanduser("~"), "base": above}, **named)
    df = ("df", "-k", "--output=source,avail,itotal,iavail")
    return {
        "missing": [name for name in COMMANDS if not shutil.which(name)],
        "controller": said_by(SLURM_PATIENCE, "scontrol", "ping"),
        "partitions": said_by(SLURM_PATIENCE, "scontrol", "--all", "--oneliner", "show", "partition"),
        "base": ask["path"],
        "above": above,
        "refusal": try_to_write(above),
        "rooms": {name: (path, said_by(PATIENCE, *df, path)[1]) for name, path in folders.items() if path},
        "quota": said_by(PATIENCE, "quota", "-w", "-p")[1],
        "temporary": os.environ.get("TMPDIR", ""),
        "files": resource.getrlimit(resource.RLIMIT_NOFILE)[1],
    }
