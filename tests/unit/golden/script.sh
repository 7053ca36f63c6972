#!/bin/bash
#SBATCH --job-name=flights-2013-01
#SBATCH --comment=flights-2013-01
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=2
#SBATCH --mem=8G
#SBATCH --time=00:10:00
#SBATCH --partition=zen4_0768
#SBATCH --qos=zen4_0768
#SBATCH --mail-type=END
#SBATCH --output=stdout
#SBATCH --error=stderr
#SBATCH --open-mode=append
#SBATCH --export=NONE
# Written by musica-pipelines. It runs in the run directory, beside the workload and its Pipes context.
umask 077

# One job a run: the first to make this link is the run's job, any other steps back. Slurm may run the same job again.
ln -s "$SLURM_JOB_ID" job 2>/dev/null
[ "$(readlink job)" = "$SLURM_JOB_ID" ] || exit 0

# The run's own record: a line at the start, a line at the end. A code of null: cut short, and Slurm knows why.
code=null
# shellcheck disable=SC2317  # the trap calls it
finish() {
  local sizes
  mapfile -t sizes < <(stat -c %s messages.jsonl stdout stderr)
  printf '{"code": %s, "job": "%s", "time": %s, "sizes": {"messages.jsonl": %s, "stdout": %s, "stderr": %s}}
'     "$code" "$SLURM_JOB_ID" "$(date +%s.%N)" "${sizes[@]}" >>events
}
trap finish EXIT
touch messages.jsonl
printf '{"started": "%s", "time": %s}\n' "$HOSTNAME" "$(date +%s.%N)" >>events

export PYTHON=/environment/bin/python
export DATA_ROOT=/d

# In a subshell: whatever it does, the exit code is recorded.
(
"$PYTHON" -u 'work load.py'
)
code=$?
exit "$code"
