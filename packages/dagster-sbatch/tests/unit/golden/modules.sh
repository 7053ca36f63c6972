#!/bin/bash -l
#ASC --vanilla
#SBATCH --job-name=counts-2013-01
#SBATCH --comment=key=counts-2013-01,asset=a_b
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=2
#SBATCH --time=00:10:00
#SBATCH --partition=zen4_0768
#SBATCH --qos=zen4_0768
#SBATCH --threads-per-core=1
#SBATCH --output=stdout
#SBATCH --error=stderr
#SBATCH --open-mode=append
#SBATCH --export=NONE
#SBATCH --signal=B:USR1@60
# Written by dagster-sbatch. It runs in the run directory, beside the workload and its Pipes context.
# shellcheck disable=SC2317  # traps and the launcher's commands call the functions
# A login profile may have set these options and traps, and have aliases and functions in place of these commands.
set +euxC; unalias -a; trap - DEBUG ERR
unset -f cat cd date echo head kill ln mkdir od printf read readlink rm scontrol sed sleep stat tail tee timeout tr
umask 077
cd . || exit 1 # a login profile may have gone elsewhere
run_directory=$PWD

# It was cancelled before its submission got an answer.
[ -e cancelled ] && exit 0
# One job per run: the first job to make this link is the run's job; any other ends. Slurm may start the same job again.
# Without a link (the disk is full, say) it fails.
ln -s "$SLURM_JOB_ID" job 2>/dev/null || [ "$(readlink job)" = "$SLURM_JOB_ID" ] || { [ -L job ]; exit; }
# No step follows it any more: its end is recorded, or another attempt is submitted. An administrator has requeued it.
[ -e end ] && exit 0
[ -e failed ] && exit 0

# The job's own record: a line at its start, a line at its end. The code is null if it was cut short; Slurm knows why.
# Where traps are set, $(...) and <(...) stand in subshells, which have none: a signal while bash reads one of them
# makes the trap and the rest of the command fail ("unexpected EOF while looking for matching").
code=null began=null reading='' terminated=''
# A node may stand still: then a time limit passes with it. A second read has its own, and may find the end of a line.
read_usage() { IFS= read -rt 2 usage <&"${SAMPLER[0]-}" && [[ $usage == "{"*"}" ]]; }
finish() {
  local usage=null
  trap '' PIPE # the sampler may have ended
  if ! [ "$reading" ]; then # it runs again in a trap: bash forgets the time limit of the first of two reads
    reading=1
    { echo >&"${SAMPLER[1]-}" && { read_usage || { ! [ "$terminated" ] && read_usage; }; }; } 2>/dev/null ||
      usage=null
    reading=
  fi
  (
    trap '' TERM USR1
    now=${EPOCHREALTIME:-$(date +%s.%N)}
    # Of those that the workload has not removed.
    mapfile -t sizes < <(exec stat -c '"%n": %s' messages.jsonl stdout stderr 2>/dev/null)
    IFS=,
    written="{${sizes[*]}}"
    printf '{"code": %s, "began": %s, "time": %s, "sizes": %s, "usage": %s}\n' \
      "$code" "$began" "${now/,/.}" "$written" "$usage" >>events
  )
}
# Waits at most 2 s for the end of the sampler: if Slurm finds a process when this script has ended, it sleeps for 1 s.
end_sampler() {
  local hold=${SAMPLER[1]-} heard=${SAMPLER[0]-}
  trap : TERM USR1 # all is recorded
  [ "$hold" ] || return
  exec {hold}>&-
  read -rt 2 <&"$heard"
  (($? > 128)) || wait "$SAMPLER_PID"
} 2>/dev/null
trap 'finish; end_sampler' EXIT
# Sets TMPDIR, the folder for temporary files on a node: its own disk, if the job can write to it.
set_temporary_folder() {
  export TMPDIR=/tmp
  if [ -w /local/ ]; then TMPDIR=/local; fi
}
export -f set_temporary_folder
set_temporary_folder
export JOB_TMPDIR=$TMPDIR
[ ! -e workload.pid ] || { rm workload.pid; : >cause; } # of a former start, maybe on another node
# A former start may have left half a line. Its reports would count as well, if the disk is too full for this one.
printf '\n{"method": "job_started"}\n' >>messages.jsonl || exit 1
began=${EPOCHREALTIME:-$(date +%s.%N)} began=${began/,/.} # from the locale's decimal point
printf '{"started": "%s", "time": %s, "temporary": "%s"}\n' "$HOSTNAME" "$began" "$JOB_TMPDIR" >>events

# In a profile these would send a step's output elsewhere, label it, start the step elsewhere, or fewer tasks of it.
unset SLURM_{CLUSTERS,EXTERNAL_LAUNCHER,LABELIO,REMOTE_CWD,WORKING_DIR} SLURM_STD{IN,OUT,ERR}MODE "${!SRUN_@}"
ulimit -S -t hard -u hard -v hard # Slurm passes on those of the login node. With low ones, Ray hangs, for instance.
# The modules of the request. If Lmod cannot load one of them, it loads none, and the job ends.
module load GCC/14.3.0 OpenMPI 2>modules.log
loaded=$?
said=$(<modules.log)
[ -z "$said" ] || printf '%s\n' "$said" >&2
if [ "$loaded" != 0 ]; then
  code=1
  said=${said#*'Lmod has detected the following error: '} # its first paragraph; the others are general advice
  said=${said%%$'\n\n'*}
  why=${said//$'\n'/ }$'\n'
  why+='Correct modules=[...] of the request or of the site. On the supercomputer, this command lists valid names:
module spider'
  [ "$loaded" != 127 ] ||
    why='There is no command module: the machine has no Lmod, or its login profile does not start it. Remove modules=[...], or start Lmod in the setup_commands of the site.'
  printf '%s could not load the modules %s. %s\n' "$HOSTNAME" 'GCC/14.3.0, OpenMPI' "$why" >cause
  exit 1
fi
# $PYTHON uses its own packages, not those of a module's Python or of the home.
unset PYTHONHOME PYTHONPLATLIBDIR PYTHONSAFEPATH
export PYTHONNOUSERSITE=1 TMPDIR=$JOB_TMPDIR
export PYTHON=/environment/bin/python
export DATA_ROOT=/d

# When Slurm will end the job, in seconds since 1970. Slurm sets this since 23.02.
export SLURM_JOB_END_TIME=${SLURM_JOB_END_TIME:-$((${EPOCHSECONDS:-$(date +%s)} + 600))}

# Becomes Python with the variables of the asset; the script itself does not have them.
run_python() { exec "$PYTHON" -u "$@"; }
export -f run_python
# Starts the workload in the folder `work`, where no file of its own is taken for one of the run directory, and records
# its process. If it handles SIGUSR1, it gets that signal when the time limit is near.
run_workload() { ( echo "$BASHPID" >workload.pid; mkdir -p work && cd ./work && run_python "$@" ) }
warn() {
  warned=1
  echo "time limit: 60 s left" >&2
  (
    trap '' TERM USR1
    pid=$(cat workload.pid 2>/dev/null) || exit
    # These handle it themselves: R and Erlang would end, and Node.js open a debugger to all users of the node.
    case $(readlink "/proc/$pid/exe") in */R | */node | */beam.smp) exit ;; esac
    handled=$(sed -n 's/^SigCgt:[[:space:]]*//p' "/proc/$pid/status" 2>/dev/null)
    if (( 0x${handled: -4} & 0x200 )); then kill -USR1 "$pid"; fi
  )
}
trap warn USR1
# At a cancellation or the time limit, Slurm sends SIGTERM, and SIGKILL some seconds later. Meanwhile the workload may
# save its state: this shell and the one below outlive it. Its exit code does not count. Where Slurm finds the processes
# of a job by their cgroup (of version 1: the freezer), only this shell gets SIGTERM: it passes it on to the workload.
pass_on() {
  kill "$body" 2>/dev/null # it starts nothing more
  (
    trap '' TERM USR1
    pid=$(cat workload.pid 2>/dev/null) && cgroups=$(cat "/proc/$pid/cgroup" 2>/dev/null) || exit
    [ "$cgroups" = "$(cat /proc/$$/cgroup)" ] || exit # of a step of srun, which gets its own
    if [[ $cgroups =~ :(freezer)?:[^:]*/job_$SLURM_JOB_ID/ ]]; then kill "$pid"; fi
  )
}
trap 'terminated=1 warned=1; pass_on; finish' TERM # a record, as SIGKILL prevents that of the end

# In a subshell: whatever it does, the exit code is recorded. In the background: bash handles the warning meanwhile.
(
trap 'exit 143' TERM
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
run_workload 'work load.py'
) &
body=$!
# Measures what the job uses. A shorter job starts no program for it. It ends with its standard input, when this shell
# ends: nothing else has the other end of the pipe.
coproc SAMPLER {
  read -rt 3
  (($? > 128)) || exit
  type -P "$PYTHON" >/dev/null || PYTHON=python3
  exec "$PYTHON" -B -E -s -S "$run_directory/sampler/sampler.py" job 1 0
} 2>/dev/null
while :; do
  warned=
  wait "$body"
  status=$?
  # A signal ends `wait`. If several come close together, bash may end the next one as well, without a trap.
  [ "$warned" ] || kill -0 "$body" 2>/dev/null || break
done
# Slurm signals one process after another: SIGTERM may have ended the workload before it reaches this shell.
[ "$terminated" ] || [ "$status" != 143 ] || ( read -rt 1 <> <(:) )
[ "$terminated" ] || code=$status
exit "$status"
