# shellcheck shell=bash disable=SC2154
# Run a Ray cluster on the nodes of the allocation; the workload is its driver. The job script, which defines `began`,
# run_workload, run_python and pre_start, sources this file with the number of words of the workload's command, these
# words, and the options of srun that describe the nodes.
workload=("${@:2:$1}")
shift "$(($1 + 1))"
if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 403)); then # without `wait -n`
  echo "Ray: $HOSTNAME has bash $BASH_VERSION, and 4.3 or later is needed" | tee cause >&2
  exit 1
fi

# A login shell may have set these for another cluster.
unset RAY_ADDRESS RAY_API_SERVER_ADDRESS RAY_AUTH_TOKEN RAY_NAMESPACE RAY_REDIS_ADDRESS RAY_TMPDIR
# Each start has a new folder: the old one has the address of the old cluster. SLURM_RESTART_COUNT may miss a start.
RAY_JOB_STATE=$PWD/ray/state-$began
export RAY_JOB_STATE RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$RAY_JOB_STATE/token RAY_USAGE_STATS_ENABLED=0
# head.json and cause exist before any node asks for them: an NFS client may repeat "no such file" for a minute.
make_state() {
  mkdir "$RAY_JOB_STATE" && : >"$RAY_JOB_STATE/head.json" && : >cause &&
    ln -sfn "${RAY_JOB_STATE##*/}" ray/state && # for people, and for `scripts/job JOB dashboard`
    od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$RAY_AUTH_TOKEN_PATH"
}
refuse() {
  echo "Ray: $1" | tee cause >&2
  exit 1
}
refuse_full() {
  refuse "$HOSTNAME cannot write to the run directory $PWD: ${1##*: }. If the disk or your quota is full, make room \
and run it again"
}
( # here, $(...) loses no signal: the traps are those of the shell around this one
  said=$(make_state 2>&1) || refuse_full "$said"
  # driver.py reads the names of the nodes from a file: in a container, it has no commands of Slurm.
  nodes=$(scontrol show hostnames 2>"$RAY_JOB_STATE/scontrol.err") ||
    refuse "\`scontrol show hostnames\` failed on $HOSTNAME, so the names of the job's nodes are unknown: \
$(<"$RAY_JOB_STATE/scontrol.err")"
  said=$(printf '%s\n' "$nodes" 2>&1 >"$RAY_JOB_STATE/nodes") || refuse_full "$said"
) || exit 1

# Record why the cluster failed. The first failure counts. The file appears with its text: see job_cluster.py.
ray_failed() {
  local part=$RAY_JOB_STATE/failed-$HOSTNAME-$$
  if echo "$1" >"$part"; then ln "$part" "$RAY_JOB_STATE/failed" 2>/dev/null; else echo "$1" >&2; fi
  rm -f "$part"
}
export -f ray_failed

# Start all nodes at the same time. A node ends with its standard input, which ends with this shell, however this ends.
# shellcheck disable=SC2016  # expanded on the nodes
coproc NODES {
  exec srun --overlap --export=ALL --kill-on-bad-exit=1 "$@" \
    bash -c 'HOSTNAME=$SLURMD_NODENAME # Slurm passes on that of the first node
      SLURM_CPUS_ON_NODE=$SLURM_CPUS_PER_TASK # in a step, Slurm counts hardware threads
      set_temporary_folder
      [ "$TMPDIR" = "$JOB_TMPDIR" ] || echo "temporary files on $HOSTNAME: $TMPDIR" >&2
      JOB_TMPDIR=$TMPDIR
      pre_start
      declare -F in_container >/dev/null || type -P "$PYTHON" >/dev/null ||
        ray_failed "Ray on $HOSTNAME: there is no $PYTHON"
      run_python ray/node.py' >&2
}
nodes=$! hold=${NODES[1]-} # bash forgets NODES as soon as srun ends
# At SIGTERM the workload may save its state, while the cluster ends: the shell around it and this one outlive it.
(
  trap : TERM
  run_workload "$PWD/ray/driver.py" "${workload[@]}"
) &
driver=$!
# A second SIGTERM, from the job script, may end a `wait`.
trap 'trap : TERM; while kill -0 "$driver" 2>/dev/null; do wait "$driver"; done; exit 143' TERM
run_python ray/watch.py &
watch=$! node_lost=75 # os.EX_TEMPFAIL
start_seconds=60 # for a container

# Wait for the end of a process, at most this many seconds.
await_end() { timeout "$1" tail --pid="$2" -s 0.1 -f /dev/null; }
end() {
  kill "$1" 2>/dev/null && ! await_end 5 "$1" && kill -KILL "$1" 2>/dev/null
  wait "$1" 2>/dev/null
}

# bash does not wait for a coprocess that has ended already: an srun that refuses its options.
kill -0 "$nodes" 2>/dev/null && wait -n "$nodes" "$driver" "$watch"
status=$?
if kill -0 "$nodes" 2>/dev/null && kill -0 "$driver" 2>/dev/null && [ "$status" != "$node_lost" ]; then
  wait -n "$nodes" "$driver" # watch.py itself has failed: that does not end the job
  status=$?
fi
[ "$status" != 143 ] || await_end 1 "$driver" # Slurm signals one process after another: SIGTERM may reach this one, too
if kill -0 "$driver" 2>/dev/null; then # the cluster ended before the workload
  ray_failed "Ray: srun ended with exit code $status, and no node has reported why"
  status=1
  # It can do nothing without its cluster. A container may still be starting. On a full disk, the workload's process is
  # not recorded: driver.py ends with its parent, and Slurm ends a container with the job.
  limit=$((SECONDS + start_seconds))
  until [ -s workload.pid ] || ! kill -0 "$driver" 2>/dev/null || ((SECONDS > limit)); do sleep 0.1; done
  if [ -s workload.pid ]; then read -r pid <workload.pid && kill -KILL "$pid"; else kill -KILL "$driver" 2>/dev/null; fi
  wait "$driver" 2>/dev/null
elif [ "$status" != 0 ]; then
  await_end 3 "$watch" # if a lost node made the workload fail, watch.py sees that some seconds later
fi
if kill -0 "$watch" 2>/dev/null; then
  end "$watch"
elif wait "$watch"; [ $? = "$node_lost" ]; then
  status=$node_lost
fi
if [ "$status" != 0 ] && [ -e "$RAY_JOB_STATE/failed" ]; then
  cat "$RAY_JOB_STATE/failed" >&2
  [ -s cause ] || head -n 1 "$RAY_JOB_STATE/failed" >cause # a container that does not start has written why
fi
[ ! "$hold" ] || exec {hold}>&-
await_end 15 "$nodes" || end "$nodes"
exit "$status"
