"""Start Dagster's UI and daemon on this machine: `dagster dev` in the project's environment.

usage: scripts/dev [--anyone-on-this-machine] [OPTIONS OF dagster dev]

Open http://localhost:3000 when it says so; stop it with Ctrl-C. DAGSTER_DEPLOYMENT chooses where workloads run. For
instance, with another port:

    scripts/dev --port 3001

It does not start with wrong settings, and on a login node only with --anyone-on-this-machine: the UI asks for no
password, and every user of that node can open it and start jobs in your name.

It sets DAGSTER_HOME to the project's folder, where dagster.yaml and the history are. SIGTERM stops it, too, even if it
was started in the background (`nohup scripts/dev &`).

Exit codes are those of `dagster dev`; 1 also if it does not start (the reason is printed).
"""

import os
import sys
from pathlib import Path

from dagster_sbatch.configuration import check_configuration
from dagster_sbatch.errors import ConfigurationError
from dagster_sbatch.project import Project

ANYONE = "--anyone-on-this-machine"
SUPERSEDED = "Function `dev_command` is superseded"
"""Begins a warning of Dagster, which recommends `dg dev` for `dagster dev`."""
REFUSED = f"""\
Dagster is not started: this machine is the login node (SLURM_EDGE_NODE_HOST=localhost).
Its UI asks for no password. Every user of this node could open it, and start jobs in your name.
Run Dagster on a machine of your own. If nobody else can log in here:
  scripts/dev {ANYONE}"""


def main(project: Project) -> None:
    """Replace this process by `dagster dev`.

    Raises SystemExit: the settings are wrong, or this is a login node; the text says what to do.
    """
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        return
    accepted, options = ANYONE in sys.argv[1:], [each for each in sys.argv[1:] if each != ANYONE]
    try:
        settings = check_configuration(project)
    except ConfigurationError as error:
        raise SystemExit(f"Dagster is not started, because the settings are wrong.\n{error}") from None
    if settings.on_login_node and not accepted:
        raise SystemExit(REFUSED)
    os.chdir(project.root)
    home = os.environ.get("DAGSTER_HOME")
    if home and Path(home).resolve() != project.root:
        print(f"DAGSTER_HOME={home} is not used: dagster.yaml and the history are in {project.root}", file=sys.stderr)
    os.environ["DAGSTER_HOME"] = str(project.root)
    os.execv(sys.executable, [sys.executable, "-W", f"ignore:{SUPERSEDED}", "-m", "dagster", "dev", *options])
