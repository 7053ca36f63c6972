"""The batch script: text from an allocation and a launcher's commands."""

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Template

from dagster_sbatch.slurm.modules import render_modules
from dagster_sbatch.slurm.request import SlurmRequest, render_options
from dagster_sbatch.slurm.site import Site

_SCRIPT = Template(
    """\
#!$shell
$header
# Written by dagster-sbatch. It runs in the run directory, beside the workload and its Pipes context.
# shellcheck disable=SC2317  # traps and the launcher's commands call the functions
# A login profile may have set these options and traps, and have aliases and functions in place of these commands.
set +euxC; unalias -a; trap - DEBUG ERR
unset -f cat cd date echo head kill ln mkdir od printf read readlink rm scontrol sed sleep stat tail tee timeout tr
umask 077
cd $run || exit 1 # a login profile may have gone elsewhere
run_directory=$$PWD

# It was cancelled before its submission got an answer.
[ -e cancelled ] && exit 0
$claim

# The job's own record: a line at its start, a line at its end. The code is null if it was cut short; Slurm knows why.
# Where traps are set, $$(...) and <(...) stand in subshells, which have none: a signal while bash reads one of them
# makes the trap and the rest of the command fail ("unexpected EOF while looking for matching").
code=null began=null reading='' terminated=''
# A node may stand still: then a time limit passes with it. A second read has its own, and may find the end of a line.
read_usage() { IFS= read -rt 2 usage <&"$${SAMPLER[0]-}" && [[ $$usage == "{"*"}" ]]; }
finish() {
  local usage=null
  trap '' PIPE # the sampler may have ended
  if ! [ "$$reading" ]; then # it runs again in a trap: bash forgets the time limit of the first of two reads
    reading=1
    { echo >&"$${SAMPLER[1]-}" && { read_usage || { ! [ "$$terminated" ] && read_usage; }; }; } 2>/dev/null ||
      usage=null
    reading=
  fi
  (
    trap '' TERM USR1
    now=$${EPOCHREALTIME:-$$(date +%s.%N)}
    # Of those that the workload has not removed.
    mapfile -t sizes < <(exec stat -c '"%n": %s' messages.jsonl $outputs 2>/dev/null)
    IFS=,
    written="{$${sizes[*]$names}}"
    printf '{"code": %s, "began": %s, "time": %s, "sizes": %s, "usage": %s}\\n' \\
      "$$code" "$$began" "$${now/,/.}" "$$written" "$$usage" >>events
  )
}
# Waits at most 2 s for the end of the sampler: if Slurm finds a process when this script has ended, it sleeps for 1 s.
end_sampler() {
  local hold=$${SAMPLER[1]-} heard=$${SAMPLER[0]-}
  trap : TERM USR1 # all is recorded
  [ "$$hold" ] || return
  exec {hold}>&-
  read -rt 2 <&"$$heard"
  (($$? > 128)) || wait "$$SAMPLER_PID"
} 2>/dev/null
trap 'finish; end_sampler' EXIT
# Sets TMPDIR, the folder for temporary files on a node: its own disk, if the job can write to it.
set_temporary_folder() {
  export TMPDIR=/tmp
  if [ -w $disk/ ]; then TMPDIR=$disk; fi
}
export -f set_temporary_folder
set_temporary_folder
export JOB_TMPDIR=$$TMPDIR
[ ! -e workload.pid ] || { rm workload.pid; : >cause; } # of a former start, maybe on another node
# A former start may have left half a line. Its reports would count as well, if the disk is too full for this one.
printf '\\n{"method": "job_started"}\\n' >>messages.jsonl || exit 1
began=$${EPOCHREALTIME:-$$(date +%s.%N)} began=$${began/,/.} # from the locale's decimal point
printf '{"started": "%s", "time": %s, "temporary": "%s"}\\n' "$$HOSTNAME" "$$began" "$$JOB_TMPDIR" >>events

# In a profile these would send a step's output elsewhere, label it, start the step elsewhere, or fewer tasks of it.
unset SLURM_{CLUSTERS,EXTERNAL_LAUNCHER,LABELIO,REMOTE_CWD,WORKING_DIR} SLURM_STD{IN,OUT,ERR}MODE "$${!SRUN_@}"
ulimit -S -t hard -u hard -v hard # Slurm passes on those of the login node. With low ones, Ray hangs, for instance.
$setup# $$PYTHON uses its own packages, not those of a module's Python or of the home.
unset PYTHONHOME PYTHONPLATLIBDIR PYTHONSAFEPATH
export PYTHONNOUSERSITE=1 TMPDIR=$$JOB_TMPDIR
$environment

# When Slurm will end the job, in seconds since 1970. Slurm sets this since 23.02.
export SLURM_JOB_END_TIME=$${SLURM_JOB_END_TIME:-$$(($${EPOCHSECONDS:-$$(date +%s)} + $seconds))}

$start
warn() {
  warned=1
  echo "time limit: $lead s left" >&2
  (
    trap '' TERM USR1
    pid=$$(cat workload.pid 2>/dev/null) || exit
    # These handle it themselves: R and Erlang would end, and Node.js open a debugger to all users of the node.
    case $$(readlink "/proc/$$pid/exe") in */R | */node | */beam.smp) exit ;; esac
    handled=$$(sed -n 's/^SigCgt:[[:space:]]*//p' "/proc/$$pid/status" 2>/dev/null)
    if (( 0x$${handled: -4} & 0x200 )); then kill -USR1 "$$pid"; fi
  )
}
trap warn USR1
# At a cancellation or the time limit, Slurm sends SIGTERM, and SIGKILL some seconds later. Meanwhile the workload may
# save its state: this shell and the one below outlive it. Its exit code does not count. Where Slurm finds the processes
# of a job by their cgroup (of version 1: the freezer), only this shell gets SIGTERM: it passes it on to the workload.
pass_on() {
  kill "$$body" 2>/dev/null # it starts nothing more
  (
    trap '' TERM USR1
    pid=$$(cat workload.pid 2>/dev/null) && cgroups=$$(cat "/proc/$$pid/cgroup" 2>/dev/null) || exit
    [ "$$cgroups" = "$$(cat /proc/$$$$/cgroup)" ] || exit # of a step of srun, which gets its own
    if [[ $$cgroups =~ :(freezer)?:[^:]*/job_$$SLURM_JOB_ID/ ]]; then kill "$$pid"; fi
  )
}
trap 'terminated=1 warned=1; pass_on; finish' TERM # a record, as SIGKILL prevents that of the end

# In a subshell: whatever it does, the exit code is recorded. In the background: bash handles the warning meanwhile.
(
trap 'exit 143' TERM
$body
) &
body=$$!
$sampler
while :; do
  warned=
  wait "$$body"
  status=$$?
  # A signal ends `wait`. If several come close together, bash may end the next one as well, without a trap.
  [ "$$warned" ] || kill -0 "$$body" 2>/dev/null || break
done
# Slurm signals one process after another: SIGTERM may have ended the workload before it reaches this shell.
[ "$$terminated" ] || [ "$$status" != 143 ] || ( read -rt 1 <> <(:) )
[ "$$terminated" ] || code=$$status
exit "$$status"
"""
)

_START = """\
# Becomes Python with the variables of the asset; the script itself does not have them.
run_python() {{ exec {env}"$PYTHON" -u "$@"; }}
export -f run_python
# Starts the workload in the folder `work`, where no file of its own is taken for one of the run directory, and records
# its process. If it handles SIGUSR1, it gets that signal when the time limit is near.
run_workload() {{ ( echo "$BASHPID" >workload.pid; mkdir -p work && cd ./work && run_python "$@" ) }}"""

_CLAIM = """\
# One job per run: the first job to make this link is the run's job; any other ends. Slurm may start the same job again.
# Without a link (the disk is full, say) it fails.
ln -s "$SLURM_JOB_ID" job 2>/dev/null || [ "$(readlink job)" = "$SLURM_JOB_ID" ] || { [ -L job ]; exit; }
# No step follows it any more: its end is recorded, or another attempt is submitted. An administrator has requeued it.
[ -e end ] && exit 0
[ -e failed ] && exit 0"""
_CLAIM_TASK = """\
# One array job per run: the first to make this link is the run's job; the tasks of any other end. The link leads to a
# file that is named after its job: bash can compare the two (-ef) without starting a program.
id=$SLURM_ARRAY_JOB_ID
[ -e "$id" ] || : >"$id" || exit 1
[ -L job ] || ln -s "$id" job 2>/dev/null
[ job -ef "$id" ] || exit 0

# A task works in a folder of its own, which the agent has made. Nobody looks into that before it has its files and the
# task has said that it started: a file system may cache that a file does not exist. Slurm may start a task again.
index=$SLURM_ARRAY_TASK_ID
# No step follows it any more: its result was rejected, and another array job may have it; or all tasks are over.
[ -e "tasks/$index/failed" ] && exit 0
[ -e end ] && exit 0
if ! [ -e "tasks/$index.started" ]; then
  for name in messages.jsonl events cause; do : >>"tasks/$index/$name" || exit 1; done
  IFS= read -r -d '' head <context.head
  mapfile -t -s "$index" -n 1 rest <tasks.jsonl || exit 1
  printf '%s%s\\n' "$head" "${rest[0]}" >"tasks/$index/context.json" || exit 1
  : >"tasks/$index.started" || exit 1
fi
mapfile -t -s "$index" -n 1 pipes <tasks.pipes || exit 1
export DAGSTER_PIPES_CONTEXT="${pipes[0]%% *}" DAGSTER_PIPES_MESSAGES="${pipes[0]#* }"
cd "./tasks/$index" || exit 1 # not one below CDPATH"""

_SAMPLER = """\
# Measures what the job uses. A shorter job starts no program for it. It ends with its standard input, when this shell
# ends: nothing else has the other end of the pipe.
coproc SAMPLER {{
  read -rt {delay}
  (($? > 128)) || exit
  type -P "$PYTHON" >/dev/null || PYTHON=python3
  exec "$PYTHON" -B -E -s -S "$run_directory/sampler/sampler.py" job {numbers}
}} 2>/dev/null
"""
_SAMPLER_DELAY, _SAMPLER_DELAY_OF_TASKS = 3, 30  # seconds. There may be thousands of tasks

_THREADS = ("--threads-per-core", "--hint")
"""Options that decide whether hardware threads count; sbatch accepts only one of them."""
_UNSAFE = re.compile(r"[^A-Za-z0-9_./+-]")

LONGEST_LEAD = 300
SAMPLER_FILES = {f"sampler/{path.name}": path.read_text() for path in sorted(Path(__file__).parent.glob("job/*.py"))}
"""The program that measures what a job uses: its files by name in the run directory. As all programs of a job, it is
read at the import: an upgrade of the engine may replace it while a run continues."""


@dataclass(frozen=True)
class ArrayShape:
    """The tasks of an array job."""

    tasks: int  # how many there are; their indices begin at 0
    max_running: int | None = None  # how many run at once; None: as many as Slurm starts

    @property
    def option(self) -> str:
        """The option of sbatch."""
        return f"--array=0-{self.tasks - 1}" + (f"%{self.max_running}" if self.max_running else "")


def warning_lead(request: SlurmRequest) -> int:
    """Return how many seconds before its time limit the job is warned: a tenth of the limit, at most five minutes."""
    return max(1, min(request.seconds // 10, LONGEST_LEAD))


def directives(
    request: SlurmRequest, site: Site, job_name: str, about: Mapping[str, str], array: ArrayShape | None = None
) -> list[str]:
    """Return the #SBATCH lines of a request, in the order of its fields.

    `request`: after `allocate`; its values are words without spaces or quotes. `about`: further parts of the job's
    comment, for people who read the queue or the accounting.
    Raises ValueError: the job name is not a plain word.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", job_name):
        raise ValueError(f"not a job name: {job_name!r}")
    words = {"key": job_name, **about}
    comment = ",".join(f"{name}={re.sub(_UNSAFE, '_', value)}" for name, value in words.items())
    options = [f"--job-name={job_name}", f"--comment={comment}", *render_options(request)]
    if site.threads_per_core and not any(option.startswith(_THREADS) for option in request.options):
        options.append(f"--threads-per-core={site.threads_per_core}")
    folder = "tasks/%a." if array else ""
    own = [f"--output={folder}stdout", f"--error={folder}stderr", "--open-mode=append"]
    own.append(f"--export={'ALL' if array else 'NONE'}")  # the agent submits arrays with a login shell's environment
    own.append(f"--signal=B:USR1@{warning_lead(request)}")
    own += [array.option] if array else []
    return [f"#SBATCH {option}" for option in (*options, *request.options, *own)]


def render_start(variables: Mapping[str, str]) -> str:
    """Return the functions of bash with which launchers start a workload (`Launcher.render`).

    `variables`: for the workload alone.
    """
    words = shlex.join(["env", *(f"{name}={value}" for name, value in variables.items())])
    return _START.format(env=f"{words} " if variables else "")


def render_job_script(  # noqa: PLR0913 - the parts of a script
    request: SlurmRequest,
    site: Site,
    *,
    job_name: str,
    about: Mapping[str, str],
    environment: Mapping[str, str],
    body: str,
    start: str = render_start({}),
    run: str = ".",
    array: ArrayShape | None = None,
) -> str:
    """Return the batch script.

    In an array job, it reads `context.head`, `tasks.jsonl` and `tasks.pipes` in the run directory. Task `index` writes
    `context.head` and line `index` (from 0) of `tasks.jsonl` to its `context.json`; its line of `tasks.pipes` has the
    values of DAGSTER_PIPES_CONTEXT and DAGSTER_PIPES_MESSAGES, separated by a space. Every job needs `SAMPLER_FILES`.

    `body`: the launcher's commands (`Launcher.render`). `start`: functions of bash that start the workload:
    `render_start`, or those of a container. `run`: the run directory; default: where Slurm starts the script.
    """
    lines = [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    modules = request.modules or ()
    idle = [int(request.gpu_idle_limit.total_seconds())] if request.gpu_idle_limit else []
    numbers = " ".join(map(str, [request.nodes, request.gpus_per_node, *idle]))
    commands = ["job_folder=$PWD", *site.setup_commands, 'cd "$job_folder" || exit 1'] if site.setup_commands else []
    return _SCRIPT.substitute(
        header="\n".join([*site.script_header, *directives(request, site, job_name, about, array)]),
        claim=_CLAIM_TASK if array else _CLAIM,
        outputs='"../$index.stdout" "../$index.stderr"' if array else "stdout stderr",
        names='/"../$index."' if array else "",
        shell="/bin/bash -l" if commands or modules else "/bin/bash",  # only login shells have `module`
        setup="".join(f"{command}\n" for command in commands) + render_modules(modules),
        run=shlex.quote(run),
        environment="\n".join(lines),
        start=start,
        disk=site.local_disk,
        lead=warning_lead(request),
        seconds=request.seconds,
        body=body.rstrip(),
        sampler=_SAMPLER.format(delay=_SAMPLER_DELAY_OF_TASKS if array else _SAMPLER_DELAY, numbers=numbers).rstrip(),
    )
