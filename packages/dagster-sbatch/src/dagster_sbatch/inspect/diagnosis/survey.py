"""One shell script, over one SSH channel, that asks a login node all the doctor wants to know, with any login shell."""

import re
import shlex
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from dagster_sbatch.children import child_environment
from dagster_sbatch.setting_paths import to_shell
from dagster_sbatch.slurm.gateway.agent.slurm_commands import KEPT
from dagster_sbatch.slurm.gateway.programs import after_login_profile, for_any_shell

if TYPE_CHECKING:
    import fabric

SECONDS = 90.0  # in which the login node must print something more; each Slurm command has 20 s

_SCRIPT = r"""
report() { name=$1; shift; text=$("$@" 2>&1); printf '\036%s\037%s\037%s' "$name" "$?" "$text"; }
commands() { for each in sbatch squeue scancel scontrol sinfo; do command -v "$each" >/dev/null || echo "$each"; done; }
above() { folder=$BASE; while [ ! -e "$folder" ]; do folder=$(dirname "$folder"); done; printf %s "$folder"; }
write() {
  file=$(mktemp "$(above)/.doctor.XXXXXX") || return
  head -c 1048576 /dev/zero > "$file"; code=$?; rm -f "$file"; return $code
}
room() { timeout 10 df -k --output=source,avail,itotal,iavail "$1"; }
python() { "$1" -c 'import sys; sys.stdout.write("%d.%d" % sys.version_info[:2])'; }
report commands commands
unset SLURM_CLUSTERS
report controller timeout 20 scontrol ping
report partitions timeout 20 scontrol --all --oneliner show partition
report base printf %s "$BASE"
report folder above
report write write
report room room "$(above)"
for each in HOME DATA SCRATCH; do
  eval "path=\$$each"
  if [ -n "$path" ]; then report "path $each" printf %s "$path"; report "room $each" room "$path"; fi
done
report quota timeout 10 quota -w -p
for each in $PYTHONS; do report "python $each" python "$each"; done
report temporary printf %s "${TMPDIR:-/tmp}"
report files sh -c 'ulimit -Hn'
printf '\036end\0370\037'
"""


class Output(NamedTuple):
    """The exit code of a command on the login node, and its stdout and stderr."""

    code: int
    text: str


def take_survey(
    connection: "fabric.Connection | None", base: str, pythons: tuple[str, ...], setup: tuple[str, ...]
) -> dict[str, Output]:
    """Run the script on the login node, after the login profile and the site's setup commands, as the agent runs.

    `connection`: open; None on the login node itself. `base`: SLURM_DEPLOYMENT_BASE_PATH; the script does not create
    it.
    Raises TimeoutError: the login node printed nothing for SECONDS.
    Raises OSError: the connection was lost, or the script did not run to its end.
    """
    script = f"exec /bin/sh -c {shlex.quote(render(base, pythons))}"
    here = connection is None and not setup  # then the agent, too, has this program's PATH
    line = script if here else after_login_profile(setup, script)
    try:
        printed = _run_here(line) if connection is None else _run_there(connection, line)
    except (TimeoutError, subprocess.TimeoutExpired):
        raise TimeoutError(f"the login node printed nothing for {SECONDS:.0f} s") from None
    return parse(printed.decode(errors="replace"))


def _run_there(connection: "fabric.Connection", line: str) -> bytes:
    from paramiko import SSHException

    from dagster_sbatch.ssh.connection import text_of

    try:
        with connection.transport.open_session() as channel:
            channel.settimeout(SECONDS)
            channel.exec_command(for_any_shell(line))
            return bytes(channel.makefile("rb").read())
    except (EOFError, SSHException) as error:
        raise OSError(f"the login node lets you log in, and runs no command: {text_of(error)}") from error


def _run_here(line: str) -> bytes:
    command = ["/bin/sh", "-c", line]
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=SECONDS,
        env=child_environment(*KEPT),
        check=False,
    )
    return done.stdout


def render(base: str, pythons: tuple[str, ...]) -> str:
    """Return the script for /bin/sh; for the arguments, see `take_survey`."""
    return f"BASE={to_shell(base)}\nPYTHONS={shlex.quote(' '.join(pythons))}\n{_SCRIPT}"


def parse(text: str) -> dict[str, Output]:
    """Return the output of each command by name, without what the login shell printed before the first.

    Raises OSError: the script did not run to its end.
    """
    parts = [part.split("\x1f", 2) for part in text.split("\x1e")[1:]]
    found = {name: Output(int(code), said.strip()) for name, code, said in parts}
    if "end" not in found:
        raise OSError(f"the login node's shell did not run the doctor's script; it printed: {text.strip()[-300:]!r}")
    return found


@dataclass(frozen=True)
class Room:
    """What may still be written to a folder."""

    kib: int | None  # KiB; None if not known
    files: int | None  # number of files; None if not known, or if the file system does not count them

    def __str__(self) -> str:
        parts = [] if self.kib is None else [f"{self.kib / (1 << 20):,.1f} GB"]
        parts += [] if self.files is None else [f"{self.files:,} files"]
        return f"{' and '.join(parts)} free" if parts else "free space not known"


# Columns source, avail, itotal, iavail; df prints "-" for a number that it does not know.
_DF = re.compile(r"^(.*?) +(-?\d+|-) +(\d+|-) +(\d+|-)$", re.M)
# Columns of `quota -w -p`: the file system, then used, quota, limit and grace of its KiB and of its files.
_QUOTA = re.compile(r"^\s*(\S+)\s+(\d+)\*?\s+(\d+)\s+(\d+)\s+\d+\s+(\d+)\*?\s+(\d+)\s+(\d+)\s+\d+\s*$", re.M)


def parse_room(df: str, quotas: str) -> Room:
    """Return the room of a folder: what its file system has left, or what the user's quota leaves if that is less.

    `df`: the output of `room` in the script. `quotas`: the output of `quota -w -p`, or its error.
    """
    source, *columns = [("", "-", "-", "-"), *_DF.findall(df)][-1]
    kib, total, files = (None if column == "-" else max(0, int(column)) for column in columns)
    rooms = [Room(kib, files if total else None)]  # btrfs, CephFS and BeeGFS count no inodes: they show 0 of 0
    for name, *numbers in _QUOTA.findall(quotas):
        if name == source:
            used_kib, soft_kib, hard_kib, used_files, soft_files, hard_files = map(int, numbers)
            rooms.append(Room(_left(used_kib, hard_kib or soft_kib), _left(used_files, hard_files or soft_files)))
    return Room(_least(each.kib for each in rooms), _least(each.files for each in rooms))


def _left(used: int, limit: int) -> int | None:
    return max(0, limit - used) if limit else None


def _least(numbers: Iterable[int | None]) -> int | None:
    return min((number for number in numbers if number is not None), default=None)
