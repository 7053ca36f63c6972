"""The batch script: pure text from an allocation and a launcher's commands."""

import re
import shlex
from collections.abc import Mapping
from string import Template

from resources.slurm.request import SlurmRequest
from resources.slurm.site import Site

_SCRIPT = Template(
    """\
#!/bin/bash
$directives
# Written by musica-pipelines. It runs in the run directory, beside the workload and its Pipes context.
umask 077

# One job a run: the first to make this link is the run's job, any other steps back. Slurm may run the same job again.
ln -s "$$SLURM_JOB_ID" job 2>/dev/null
[ "$$(readlink job)" = "$$SLURM_JOB_ID" ] || exit 0

# The run's own record: a line at the start, a line at the end. A code of null: cut short, and Slurm knows why.
code=null
# shellcheck disable=SC2317  # the trap calls it
finish() {
  local sizes
  mapfile -t sizes < <(stat -c %s messages.jsonl stdout stderr)
  printf '{"code": %s, "job": "%s", "time": %s, "sizes": {"messages.jsonl": %s, "stdout": %s, "stderr": %s}}\n' \
    "$$code" "$$SLURM_JOB_ID" "$$(date +%s.%N)" "$${sizes[@]}" >>events
}
trap finish EXIT
touch messages.jsonl
printf '{"started": "%s", "time": %s}\\n' "$$HOSTNAME" "$$(date +%s.%N)" >>events

$environment

# In a subshell: whatever it does, the exit code is recorded.
(
$body
)
code=$$?
exit "$$code"
"""
)

_FLAGS = ("exclusive",)
_GPUS = "gpus_per_node"
_NAMES = {"time_limit": "time"}


def directives(request: SlurmRequest, job_name: str) -> list[str]:
    """The #SBATCH lines of a request, in the order of its fields.

    Args:
        request: after `allocate`; its values are words without spaces or quotes.
        job_name: the submission key; it is the comment, too, where accounting keeps it.

    Raises:
        ValueError: the job name is not a plain word.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", job_name):
        raise ValueError(f"not a job name: {job_name!r}")
    options = [f"--job-name={job_name}", f"--comment={job_name}"]
    for field, value in request:
        if field == "options" or value in (None, False, 0):
            continue
        if field == _GPUS:
            options.append(f"--gres=gpu:{value}")
        else:
            name = _NAMES.get(field, field).replace("_", "-")
            options.append(f"--{name}" if field in _FLAGS else f"--{name}={value}")
    own = ["--output=stdout", "--error=stderr", "--open-mode=append", "--export=NONE"]
    return [f"#SBATCH {option}" for option in (*options, *request.options, *own)]


def render_job_script(
    request: SlurmRequest, site: Site, *, job_name: str, environment: Mapping[str, str], body: str
) -> str:
    """The whole batch script.

    Args:
        request: after `allocate`.
        site: its setup commands come first.
        job_name: the submission key.
        environment: variables for the workload; values are quoted here.
        body: the launcher's commands (`Launcher.render`).
    """
    lines = [*site.setup_commands, *(f"export {name}={shlex.quote(value)}" for name, value in environment.items())]
    return _SCRIPT.substitute(
        directives="\n".join(directives(request, job_name)), environment="\n".join(lines), body=body.rstrip()
    )
