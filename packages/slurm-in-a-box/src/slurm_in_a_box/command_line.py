"""The command `python -m slurm_in_a_box`."""

import argparse
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence

from . import requirements, roots
from .authentik import Disturbance
from .errors import NotInstalledError, RequirementsError, SiteError
from .faults import Fault, Faults
from .site import SimulatedSite

PROGRAM = "python -m slurm_in_a_box"
DEFAULT_NAME = "musica"
_EXIT_FAILED, _EXIT_REQUIREMENTS = 1, 2
_EPILOG = """\
examples:
  {program} up --install
  {program} login -- sinfo
  (umask 077; {program} env >.env)
  {program} down

exit codes: 0 success; 1 the site failed, or (status) a part of it does not run; 2 wrong usage, or this machine cannot
run the site (the message names what it needs); login: exit code of the remote command
"""

_FAULTS: dict[str, tuple[str, Callable[..., Fault | None]]] = {
    # name: (its arguments, what it calls with them)
    "node-off": ("NODE", lambda faults, node: faults.node_off(node)),
    "node-cut": ("NODE", lambda faults, node: faults.node_cut(node)),
    "node-down": ("NODE", lambda faults, node: faults.node_down(node)),
    "slurmctld-down": ("", lambda faults: faults.controller_down()),
    "sacct-off": ("", lambda faults: faults.accounting_off()),
    "sacct-lagging": ("", lambda faults: faults.accounting_lagging()),
    "sbatch": ("error-before|error-after|silent-after|slow", lambda faults, kind: faults.sbatch(kind)),
    "scancel": ("JOB", lambda faults, job: faults.cancel_job(int(job))),
    "requeue": ("JOB", lambda faults, job: faults.requeue_job(int(job))),
    "preempt": ("JOB", lambda faults, job: faults.preemption(int(job))),
    "ssh-refused": ("", lambda faults: faults.ssh_refused()),
    "ssh-drop": ("", lambda faults: faults.drop_connections()),
    "ssh-drop-after": ("BYTES", lambda faults, after: faults.drop_connections(int(after))),
    "login-frozen": ("", lambda faults: faults.login_frozen()),
    "login-slow": (
        "SECONDS BYTES_PER_SECOND",
        lambda faults, delay, rate: faults.login_slow(float(delay), float(rate)),
    ),
    "disk-full": ("", lambda faults: faults.disk_full()),
    "no-more-files": ("", lambda faults: faults.no_more_files()),
    "ca-down": ("", lambda faults: faults.certificate_authority_down()),
    "authentik-down": ("", lambda faults: faults.authentik_down()),
    "authentik-slow": (
        "SECONDS",
        lambda faults, seconds: faults.authentik_disturbed(Disturbance("slow", seconds=float(seconds))),
    ),
    "authentik-late": (
        "SECONDS",
        lambda faults, seconds: faults.authentik_disturbed(Disturbance("late", seconds=float(seconds))),
    ),
    "authentik-error": (
        "STATUS",
        lambda faults, status: faults.authentik_disturbed(Disturbance("error", status=int(status))),
    ),
    "authentik-lost": ("", lambda faults: faults.authentik_disturbed(Disturbance("lost"))),
}


def main(arguments: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    """Run the command and return its exit code.

    Args:
        arguments: the words of the command line; by default those of this process.
        program: how the user calls it, for help and messages.

    Returns:
        0: success. 1: the site failed. 2: this machine lacks something that the site needs, or the usage was wrong.
    """
    options = _parser(program).parse_args(arguments)
    try:
        requirements.check_system()
        code: int = options.run(options)
    except SiteError as error:
        print(f"{program}: {error}", file=sys.stderr)
        if isinstance(error, NotInstalledError):
            print(
                f"Install what is missing (as root; it needs some minutes):\n\n    {program} up --install",
                file=sys.stderr,
            )
        return _EXIT_REQUIREMENTS if isinstance(error, RequirementsError) else _EXIT_FAILED
    return code


def _parser(program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program,
        description="Start, use, disturb and end a simulated Slurm site on this machine.",
        epilog=_EPILOG.format(program=program),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--name", default=DEFAULT_NAME, help="name of the site; several can run side by side (default: %(default)s)"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    up = commands.add_parser("up", help="start the site, or those parts of it that do not run")
    up.add_argument(
        "--install",
        action="store_true",
        help="install what is missing (implied by CI=true)",
    )
    up.add_argument(
        "--slurm",
        choices=sorted(roots.SUITES),
        default="",
        help="version of Slurm of a new site (default: $SIMULATED_SITE_SLURM, else the newest)",
    )
    up.set_defaults(run=_up)
    commands.add_parser("down", help="end the site and remove everything but its logs").set_defaults(run=_down)
    commands.add_parser("status", help="list the parts and whether they run; exit 1 unless all do").set_defaults(
        run=_status
    )
    login = commands.add_parser("login", help="log in as xy12345, or run a command there")
    login.add_argument("command", nargs="*", metavar="-- COMMAND", help="what to run there")
    login.set_defaults(run=_login)
    commands.add_parser("env", help="print a dotenv file for the site").set_defaults(run=_env)
    known = "\n".join(f"  {name} {arguments}" for name, (arguments, _) in _FAULTS.items())
    fault = commands.add_parser(
        "fault",
        help="inject a fault, or repair all faults",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"faults:\n{known}\n  repair\nEach lasts until `repair`; scancel, requeue and ssh-drop* are events.",
    )
    fault.add_argument("fault", choices=[*_FAULTS, "repair"], metavar="FAULT")
    fault.add_argument("arguments", nargs="*", metavar="ARGUMENT")
    fault.set_defaults(run=_fault)
    return parser


def _up(options: argparse.Namespace) -> int:
    site = SimulatedSite.up(options.name, requirements.installation_allowed(options.install), options.slurm)
    print(f"up: {site.login.address}, state and logs in {site.layout.state}")
    return 0


def _down(options: argparse.Namespace) -> int:
    SimulatedSite.down(options.name)
    return 0


def _status(options: argparse.Namespace) -> int:
    status = SimulatedSite.running(options.name).status()
    for part, running in status.items():
        print(f"{part:20} {'runs' if running else 'DOWN'}")
    return 0 if all(status.values()) else 1


def _login(options: argparse.Namespace) -> int:
    site = SimulatedSite.running(options.name)
    return subprocess.run(site.login_command(*options.command), check=False).returncode


def _env(options: argparse.Namespace) -> int:
    site = SimulatedSite.running(options.name)
    print("# Test values for the simulated site. Let SSH trust its host keys:")
    print(f"#   mkdir -p ~/.ssh; cat {shlex.quote(str(site.login.known_hosts))} >>~/.ssh/known_hosts")
    for name, value in site.environment().items():
        print(f"{name}={value}")
    return 0


def _fault(options: argparse.Namespace) -> int:
    faults: Faults = SimulatedSite.running(options.name).faults
    if options.fault == "repair":
        faults.repair_all()
        return 0
    names, call = _FAULTS[options.fault]
    if len(options.arguments) != len(names.split()):
        print(f"usage: fault {options.fault} {names}", file=sys.stderr)
        return _EXIT_REQUIREMENTS
    try:
        fault = call(faults, *options.arguments)
    except ValueError as error:
        print(f"fault {options.fault} {names}: {error}", file=sys.stderr)
        return _EXIT_REQUIREMENTS
    if fault is not None:
        fault.inject()
    return 0
