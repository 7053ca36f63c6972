"""Start Dagster's UI and daemon on this machine: `dagster dev` in the project's environment.

usage: scripts/dev [--anyone-on-this-machine] [OPTIONS OF dagster dev]

Open http://localhost:3000 when it says so; stop it with Ctrl-C. DAGSTER_DEPLOYMENT chooses where workloads run. For
instance, with another port:

    scripts/dev --port 3001

It does not start with wrong settings, if `.env` and the environment give a variable different values, or beside another
Dagster daemon of the project. On a login node it needs --anyone-on-this-machine: the UI asks for no password, and every
user of that node can open it and start jobs in your name.

It sets DAGSTER_HOME to the project's folder, where dagster.yaml and the history are. SIGTERM stops it, too, even if it
was started in the background (`nohup scripts/dev &`).

Exit codes are those of `dagster dev`; 1 also if it does not start (the reason is printed).
"""

import io
import os
import sys
import tomllib
from pathlib import Path

import psutil
import yaml

from dagster_sbatch.configuration import check_configuration
from dagster_sbatch.errors import ConfigurationError
from dagster_sbatch.project import Project
from dagster_sbatch.setting_files import find_overridden
from dagster_sbatch.text_file import read_text

ANYONE = "--anyone-on-this-machine"
SUPERSEDED = "Function `dev_command` is superseded"  # begins a warning of Dagster, which recommends `dg dev`
REFUSED = f"""\
Dagster is not started: this machine is the login node (SLURM_EDGE_NODE_HOST=localhost).
Its UI asks for no password. Every user of this node could open it, and start jobs in your name.
Run Dagster on a machine of your own. If nobody else can log in here:
  scripts/dev {ANYONE}"""
OVERRIDDEN = """\
Dagster is not started: {file} and the environment of this command have different values of {names}.
Dagster would use the values of the file. Remove these variables from the file, or from the environment."""
SECOND = """\
Dagster is not started: process {pid} is a Dagster daemon of this project, and two would start the same runs.
Stop the other Dagster first, with Ctrl-C in its terminal, or with `kill {pid}`."""


def main(project: Project) -> None:
    """Replace this process by `dagster dev`.

    Raises SystemExit: it is not started; the text says why, and what to do.
    """
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        return
    accepted, options = ANYONE in sys.argv[1:], [each for each in sys.argv[1:] if each != ANYONE]
    try:
        settings = check_configuration(project)
        check_files(project.root)
    except ConfigurationError as error:
        raise SystemExit(f"Dagster is not started, because the settings are wrong.\n{error}") from None
    if settings.on_login_node and not accepted:
        raise SystemExit(REFUSED)
    if pid := find_daemon(project.root):
        raise SystemExit(SECOND.format(pid=pid))
    os.chdir(project.root)
    if (home := os.environ.get("DAGSTER_HOME")) and Path(home).resolve() != project.root:
        print(f"DAGSTER_HOME={home} is not used: dagster.yaml and the history are in {project.root}", file=sys.stderr)
    os.environ["DAGSTER_HOME"] = str(project.root)
    if found := ", ".join(find_overridden(project.root)):
        raise SystemExit(OVERRIDDEN.format(file=project.root / ".env", names=found))
    os.execv(sys.executable, [sys.executable, "-W", f"ignore:{SUPERSEDED}", "-m", "dagster", "dev", *options])


def check_files(root: Path) -> None:
    """Raise ConfigurationError for a file that Dagster cannot parse; without dagster.yaml, it would retry no run."""
    others = (root / name for name in ("workspace.yaml", "pyproject.toml") if (root / name).exists())
    for path in (root / "dagster.yaml", *others):
        text = read_text(path)
        try:
            found = tomllib.loads(text) if path.suffix == ".toml" else yaml.safe_load(io.StringIO(text))
        except (ValueError, yaml.YAMLError) as error:  # ValueError: also of a date
            raise ConfigurationError(f"{path}: {error}".replace('"<file>"', str(path))) from None
        if not isinstance(found, dict):
            raise ConfigurationError(f"{path} is empty, or has something other than `name: value`. Restore it.")


def find_daemon(root: Path) -> int | None:
    """Return a process that is a Dagster daemon and was started in a folder; None if there is none."""
    names, folder = ("dagster._daemon", "dagster-daemon"), str(root.resolve())
    here = (each for each in psutil.process_iter(["cmdline", "cwd"]) if each.info["cwd"] == folder)
    return next((each.pid for each in here if any(word.endswith(names) for word in each.info["cmdline"] or ())), None)
