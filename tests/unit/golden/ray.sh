#!/bin/bash
#SBATCH --job-name=flights-2013-01
#SBATCH --comment=flights-2013-01
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=88
#SBATCH --gres=gpu:4
#SBATCH --mem=720G
#SBATCH --time=02:00:00
#SBATCH --partition=zen4_0768_h100x4
#SBATCH --qos=zen4_0768_h100x4
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
# Ray: the head and the workers start at the same time, one a node; the head tells its address through a file.
mkdir -m 700 ray
"$PYTHON" -c 'import secrets; print(secrets.token_hex(32))' >ray/token
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$PWD/ray/token" RAY_USAGE_STATS_ENABLED=0
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=5
cat >ray/node.sh <<'NODE'
ulimit -n 65536 || { ulimit -n "$(ulimit -Hn)"; echo 'ulimit -n 65536: refused on '"$HOSTNAME"', going on' >&2; }
address=$("$PYTHON" -c 'import socket; print(socket.gethostbyname(socket.gethostname()))')
set -- --block --disable-usage-stats --temp-dir="/tmp/r-$SLURM_JOB_ID" --node-ip-address="$address" --num-cpus=88 --num-gpus=4 --object-store-memory=68719476736
if [ "$SLURM_PROCID" = 0 ]; then
  port=$("$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
  echo "$address:$port" >ray/address.part && mv ray/address.part ray/address
  exec "$PYTHON" -m ray.scripts.scripts start --head --port="$port" --dashboard-host=127.0.0.1 "$@"
fi
until [ -s ray/address ]; do sleep 0.1; done
exec "$PYTHON" -m ray.scripts.scripts start --address="$(cat ray/address)" "$@"
NODE
srun --overlap --export=ALL --nodes=2 --ntasks=2 --ntasks-per-node=1 --cpus-per-task=88 --gres=gpu:4   --output=ray/node-%n.log bash ray/node.sh &
ray=$!
trap 'kill "$ray" 2>/dev/null; wait "$ray"' EXIT

# The workload starts as soon as all nodes are there; if they are not in time, it is told which log to read.
"$PYTHON" -u - <<'READY' || { tail -n 20 ray/node-*.log >&2; exit 1; }
import os, sys, time
until = time.monotonic() + 120
while not os.path.exists("ray/address"):
    if time.monotonic() > until:
        sys.exit("Ray: the head did not start within 120 s")
    time.sleep(0.1)
import ray
ray.init(address=open("ray/address").read().strip(), log_to_driver=False, logging_level="ERROR")
while True:
    alive, there = sum(node["Alive"] for node in ray.nodes()), ray.cluster_resources()
    if alive >= 2 and there.get("CPU", 0) >= 176 and there.get("GPU", 0) >= 8:
        break
    if time.monotonic() > until:
        sys.exit(f"Ray: after 120 s there are {alive} of 2 nodes, {there.get('CPU', 0):.0f} of 176 CPUs, "
                 f"{there.get('GPU', 0):.0f} of 8 GPUs")
    time.sleep(0.1)
READY
export RAY_ADDRESS
RAY_ADDRESS=$(cat ray/address)
"$PYTHON" -u 'work load.py'
)
code=$?
exit "$code"
