"""What a login node says of itself: one script over one SSH channel, with any login shell and whatever that prints."""

import shlex
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dagster_sbatch.places import to_shell
from dagster_sbatch.slurm.gateway.shell import after_login_profile, for_any_shell

if TYPE_CHECKING:
    import fabric

SECONDS = 90.0
"""For the whole survey; each Slurm command has 20 s."""

_SCRIPT = r"""
report() { name=$1; shift; text=$("$@" 2>&1); printf '\036%s\037%s\037%s' "$name" "$?" "$text"; }
commands() { for each in sbatch squeue scancel scontrol sinfo; do command -v "$each" >/dev/null || echo "$each"; done; }
above() { folder=$BASE; while [ ! -e "$folder" ]; do folder=$(dirname "$folder"); done; printf %s "$folder"; }
write() {
  file=$(mktemp "$(above)/.doctor.XXXXXX") || return
  head -c 1048576 /dev/zero > "$file"; code=$?; rm -f "$file"; return $code
}
room() { timeout 10 df -Pk "$1" 2>/dev/null; printf '\035'; timeout 10 df -Pi "$1" 2>/dev/null; }
python() { "$1" -c 'import sys; sys.stdout.write("%d.%d" % sys.version_info[:2])'; }
report commands commands
report controller timeout 20 scontrol ping
report partitions timeout 20 scontrol --oneliner show partition
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


@dataclass(frozen=True)
class Answer:
    """What a command on the login node said.

    Attributes:
        code: its exit code.
        text: stdout and stderr.
    """

    code: int
    text: str


def take_survey(
    connection: "fabric.Connection", base: str, pythons: tuple[str, ...], setup: tuple[str, ...]
) -> dict[str, Answer]:
    """Ask a login node about Slurm, the deployment folder and Python.

    Args:
        connection: open.
        base: SLURM_DEPLOYMENT_BASE_PATH; what is missing of it is not made.
        pythons: interpreters to try.
        setup: the site's setup commands; they and the login profile come before the questions, as for the agent.

    Raises:
        TimeoutError: it did not end within SECONDS.
        OSError: the connection was lost, or the script was cut short.
    """
    channel = connection.transport.open_session()
    try:
        channel.settimeout(SECONDS)
        channel.exec_command(for_any_shell(after_login_profile(setup, "exec /bin/sh -s")))
        with suppress(OSError):  # a shell that has ended takes nothing; what it has said is read all the same
            channel.sendall(render(base, pythons).encode())
            channel.shutdown_write()
        received, deadline = bytearray(), time.monotonic() + SECONDS
        while data := channel.recv(65536):
            received += data
            if time.monotonic() > deadline:
                raise TimeoutError(f"the login node did not answer all questions within {SECONDS:.0f} s")
    finally:
        channel.close()
    return parse(received.decode(errors="replace"))


def render(base: str, pythons: tuple[str, ...]) -> str:
    """Return the questions as a script of /bin/sh; for the arguments, see `take_survey`."""
    names = " ".join(pythons)
    return f"BASE={to_shell(base)}\nPYTHONS={shlex.quote(names)}\n{_SCRIPT}"


def parse(text: str) -> dict[str, Answer]:
    """Return the answers by name; what the shell printed before the first does not count.

    Raises:
        OSError: the last answer is missing.
    """
    answers = {}
    for part in text.split("\x1e")[1:]:
        name, code, said = part.split("\x1f", 2)
        answers[name] = Answer(int(code), said.strip())
    if "end" not in answers:
        raise OSError(f"the login node's shell did not run the questions; it said: {text.strip()[-300:]!r}")
    return answers
