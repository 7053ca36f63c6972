"""The scripts of a project, run in the environment that its files name now."""

import signal
import subprocess
import sys
from pathlib import Path

from dagster_sbatch.children import NETWORK, child_environment


def run_script(root: Path, name: str, *options: str) -> int:
    """Run a script of a project, which installs the engine first; return its exit code. With options, only errors show.

    pixi has to install that engine itself: within its environment a script does not set anything up.
    """
    command = [sys.executable, str(root / "scripts" / name)]
    if (root / ".pixi" / "envs").resolve() in Path(sys.prefix).resolve().parents:
        command = ["pixi", "run", "--manifest-path", str(root / "pixi.toml"), "python", command[1]]
    environment = child_environment("UV_", "PIP_", "CI", "PYTEST_ADDOPTS", *NETWORK)
    output = subprocess.DEVNULL if options else None
    with subprocess.Popen([*command, *options], cwd=root, env=environment, stdout=output) as script:
        try:
            return script.wait()
        except KeyboardInterrupt as interrupt:
            if interrupt.args == (signal.SIGTERM,):
                script.terminate()  # the terminal sends Ctrl-C to the script, too
            script.wait()
            raise
