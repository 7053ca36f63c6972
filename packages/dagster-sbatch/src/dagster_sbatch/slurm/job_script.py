"""The batch script: pure text from an allocation and a launcher's commands."""

import re
import shlex
from collections.abc import Mapping
from string import Template

from dagster_sbatch.slurm.request import SlurmRequest
from dagster_sbatch.slurm.site import Site
from dagster_sbatch.slurm.units import format_time

_SCRIPT = Template(
    """\
#!$shell
$header
# Written by musica-pipelines. It runs in the run directory, beside the workload and its Pipes context.
umask 077

# One job a run: the first to make this link is the run's job, any other steps back. Slurm may run the same job again.
ln -s "$$SLURM_JOB_ID" job 2>/dev/null || [ "$$(readlink job)" = "$$SLURM_JOB_ID" ] || exit 0

# The run's own record: a line at the start, a line at the end. A code of null: cut short, and Slurm knows why.
code=null
# shellcheck disable=SC2317  # the trap calls it
finish() {
  local sizes now=$${EPOCHREALTIME:-$$(date +%s.%N)}
  mapfile -t sizes < <(stat -c %s messages.jsonl stdout stderr)
  printf '{"code": %s, "job": "%s", "time": %s, "sizes": {"messages.jsonl": %s, "stdout": %s, "stderr": %s}}\\n' \\
    "$$code" "$$SLURM_JOB_ID" "$${now/,/.}" "$${sizes[@]}" >>events
}
trap finish EXIT
# Where temporary files lie on a node: its own disk, if something can be written to it.
temporary_folder() {
  local probe=$disk/.$$SLURM_JOB_ID-$$RANDOM
  if (set -C && echo >"$$probe" && rm "$$probe") 2>/dev/null; then echo $disk; else echo /tmp; fi
}
JOB_TMPDIR=$$(temporary_folder)
export JOB_TMPDIR
export -f temporary_folder
printf '\\n{"method": "job_started"}\\n' >>messages.jsonl # after what an earlier life may have cut off
now=$${EPOCHREALTIME:-$$(date +%s.%N)} # with the locale's decimal point
printf '{"started": "%s", "time": %s, "temporary": "%s"}\\n' "$$HOSTNAME" "$${now/,/.}" "$$JOB_TMPDIR" >>events

$setup# Neither a module's Python nor packages in the home may get between $$PYTHON and its own packages.
unset PYTHONHOME PYTHONPLATLIBDIR PYTHONSAFEPATH
export PYTHONNOUSERSITE=1 TMPDIR=$$JOB_TMPDIR
$environment

# When Slurm will end the job, in seconds since 1970. Slurm says so itself since 23.02.
export SLURM_JOB_END_TIME=$${SLURM_JOB_END_TIME:-$$(($${EPOCHSECONDS:-$$(date +%s)} + $seconds))}

# Becomes Python with the variables that the asset names; the script itself does without them.
# shellcheck disable=SC2317  # the launcher's commands call it
run_python() { exec $env"$$PYTHON" -u "$$@"; }
export -f run_python
# Starts the workload, so that it can be told apart. One that handles SIGUSR1 gets it when the time limit is near.
# shellcheck disable=SC2317  # the launcher's commands call it
run_workload() { ( echo "$$BASHPID" >workload.pid; run_python "$$@" ) }
# shellcheck disable=SC2317  # the trap calls it
warn() {
  local pid handled
  warned=1
  echo "time limit: $lead s left" >&2
  pid=$$(cat workload.pid 2>/dev/null) || return
  handled=$$(sed -n 's/^SigCgt:[[:space:]]*//p' "/proc/$$pid/status" 2>/dev/null)
  if (( 0x$${handled: -4} & 0x200 )); then kill -USR1 "$$pid"; fi
}
trap warn USR1

# In a subshell: whatever it does, the exit code is recorded. In the background: bash heeds the warning meanwhile.
(
$body
) &
body=$$!
while :; do
  warned=
  wait "$$body"
  status=$$?
  [ "$$warned" ] || break
done
code=$$status
exit "$$code"
"""
)

_FLAGS = ("exclusive",)
_GPUS = "gpus_per_node"
_THREADS = ("--threads-per-core", "--hint")
"""Options that decide whether hardware threads count; sbatch takes one of them only."""
_UNSAFE = re.compile(r"[^A-Za-z0-9_./-]")


LONGEST_LEAD = 300


def warning_lead(request: SlurmRequest) -> int:
    """Seconds before the time limit when the job is warned: a tenth of it, five minutes at most."""
    return max(1, min(int(request.time_limit.total_seconds()) // 10, LONGEST_LEAD))


def directives(request: SlurmRequest, site: Site, job_name: str, about: Mapping[str, str]) -> list[str]:
    """Return the #SBATCH lines of a request, in the order of its fields.

    Args:
        request: after `allocate`; its values are words without spaces or quotes.
        site: its threads_per_core holds unless the request has an option that says the same.
        job_name: the submission key.
        about: what else the job's comment tells, for people who look at the queue or the accounting.

    Raises:
        ValueError: the job name is not a plain word.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", job_name):
        raise ValueError(f"not a job name: {job_name!r}")
    words = {"key": job_name, **about}
    comment = ",".join(f"{name}={re.sub(_UNSAFE, '_', value)}" for name, value in words.items())
    options = [f"--job-name={job_name}", f"--comment={comment}"]
    for field, value in request:
        if field == "options" or value in (None, False, 0):
            continue
        if field == _GPUS:
            options.append(f"--gres=gpu:{value}")
        elif field == "time_limit":
            options.append(f"--time={format_time(value)}")
        else:
            name = field.replace("_", "-")
            options.append(f"--{name}" if field in _FLAGS else f"--{name}={value}")
    if site.threads_per_core and not any(option.startswith(_THREADS) for option in request.options):
        options.append(f"--threads-per-core={site.threads_per_core}")
    own = ["--output=stdout", "--error=stderr", "--open-mode=append", "--export=NONE"]
    own.append(f"--signal=B:USR1@{warning_lead(request)}")
    return [f"#SBATCH {option}" for option in (*options, *request.options, *own)]


def render_job_script(
    request: SlurmRequest,
    site: Site,
    *,
    job_name: str,
    about: Mapping[str, str],
    environment: Mapping[str, str],
    body: str,
    variables: Mapping[str, str] | None = None,
) -> str:
    """The whole batch script.

    Args:
        request: after `allocate`.
        site: its header comes before the directives; its setup commands come first, in a login shell.
        job_name: the submission key.
        about: goes into the job's comment.
        environment: variables of the script; values are quoted here.
        body: the launcher's commands (`Launcher.render`).
        variables: those that the workload has besides.
    """
    lines = [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    assignments = [f"{name}={value}" for name, value in (variables or {}).items()]
    return _SCRIPT.substitute(
        header="\n".join([*site.script_header, *directives(request, site, job_name, about)]),
        shell="/bin/bash -l" if site.setup_commands else "/bin/bash",  # `module` is a function of login shells
        setup="".join(f"{command}\n" for command in site.setup_commands),
        environment="\n".join(lines),
        env=shlex.join(["env", *assignments]) + " " if assignments else "",
        disk=site.local_disk,
        lead=warning_lead(request),
        seconds=int(request.time_limit.total_seconds()),
        body=body.rstrip(),
    )
