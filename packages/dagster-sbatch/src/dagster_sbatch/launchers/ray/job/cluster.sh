# shellcheck shell=bash
# A Ray cluster over the allocation, with the workload as its driver. The job script, which has run_workload, run_python
# and pre_start, sources this with the number of words of the workload's command, these words, then the options of srun:
# the nodes, and what each has.
workload=("${@:2:$1}")
shift "$(($1 + 1))"
if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 403)); then # `wait -n` is missing
  echo "Ray: $HOSTNAME has bash $BASH_VERSION, and 4.3 or later is needed" | tee cause >&2
  exit 1
fi

# What a login shell may have set would lead elsewhere.
unset RAY_ADDRESS RAY_API_SERVER_ADDRESS RAY_AUTH_TOKEN RAY_NAMESPACE RAY_REDIS_ADDRESS RAY_TMPDIR
# A folder for each life of the job: one that is requeued must not find the address of the cluster before.
RAY_JOB_STATE=$PWD/ray/state-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
export RAY_JOB_STATE RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$RAY_JOB_STATE/token RAY_USAGE_STATS_ENABLED=0
mkdir "$RAY_JOB_STATE"
ln -sfn "${RAY_JOB_STATE##*/}" ray/state # for people, and for `scripts/job JOB dashboard`
od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$RAY_AUTH_TOKEN_PATH"
# Made before anybody asks for it: an NFS client may go on saying "no such file" for a minute.
: >"$RAY_JOB_STATE/head.json"
: >cause

# Leave word of why the cluster failed, unless somebody has before.
ray_failed() { (set -C && echo "$1" >"$RAY_JOB_STATE/failed") 2>/dev/null; }
export -f ray_failed

# All nodes at the same time. They live as long as their standard input: it ends with this shell, however that ends.
# shellcheck disable=SC2016  # expanded on the nodes
coproc NODES {
  exec srun --overlap --export=ALL --kill-on-bad-exit=1 "$@" \
    bash -c 'HOSTNAME=$SLURMD_NODENAME # Slurm hands on that of the first node
      SLURM_CPUS_ON_NODE=$SLURM_CPUS_PER_TASK # in a step, Slurm counts hardware threads
      TMPDIR=$(temporary_folder)
      [ "$TMPDIR" = "$JOB_TMPDIR" ] || echo "temporary files on $HOSTNAME: $TMPDIR" >&2
      JOB_TMPDIR=$TMPDIR
      pre_start
      type -P "$PYTHON" >/dev/null || ray_failed "Ray on $HOSTNAME: there is no $PYTHON"
      run_python ray/node.py' >&2
}
nodes=$NODES_PID hold=${NODES[1]}
run_workload ray/driver.py "${workload[@]}" &
driver=$!
"$PYTHON" ray/watch.py &
watch=$! node_lost=75

# Seconds until a process has ended, but no more than these.
patiently() { timeout "$1" tail --pid="$2" -s 0.1 -f /dev/null; }
end() {
  kill "$1" 2>/dev/null && ! patiently 5 "$1" && kill -KILL "$1" 2>/dev/null
  wait "$1" 2>/dev/null
}

wait -n "$nodes" "$driver" "$watch"
status=$?
if kill -0 "$nodes" 2>/dev/null && kill -0 "$driver" 2>/dev/null && [ "$status" != "$node_lost" ]; then
  wait -n "$nodes" "$driver" # a watch that fails decides nothing
  status=$?
fi
if kill -0 "$driver" 2>/dev/null; then # the cluster was first
  ray_failed "Ray: srun ended with exit code $status, and no node has said why"
  status=1
  kill -KILL "$(cat workload.pid)" # without its cluster there is nothing that it could still do
  wait "$driver" 2>/dev/null
elif [ "$status" != 0 ]; then
  patiently 3 "$watch" # did it fail since its cluster did? That takes Ray some seconds to see
fi
if kill -0 "$watch" 2>/dev/null; then
  end "$watch"
elif wait "$watch"; [ $? = "$node_lost" ]; then
  status=$node_lost
fi
if [ "$status" != 0 ] && [ -e "$RAY_JOB_STATE/failed" ]; then
  cat "$RAY_JOB_STATE/failed" >&2
  head -n 1 "$RAY_JOB_STATE/failed" >cause
fi
exec {hold}>&-
patiently 15 "$nodes" || end "$nodes"
exit "$status"
