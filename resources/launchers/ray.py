"""A Ray cluster over the nodes of the allocation, with the workload as its driver."""

import secrets
import shlex
from string import Template
from typing import Annotated, ClassVar

from pydantic import AfterValidator, Field, PositiveInt

from resources.errors import ConfigurationError
from resources.launchers.base import Launcher, render_pre_start
from resources.slurm.request import Memory, SlurmRequest
from resources.slurm.units import parse_memory

_BODY = Template(
    """\
# Ray: the head and the workers start at the same time, one a node; the head tells its address through a file.
mkdir -m 700 ray
"$$PYTHON" -c 'import secrets; print(secrets.token_hex(32))' >ray/token
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$$PWD/ray/token" RAY_USAGE_STATS_ENABLED=0
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=5
cat >ray/node.sh <<'NODE'
$pre_start
address=$$("$$PYTHON" -c '$own_address')
set -- --block --disable-usage-stats --temp-dir="/tmp/r-$$SLURM_JOB_ID" --node-ip-address="$$address" $arguments
if [ "$$SLURM_PROCID" = 0 ]; then
  port=$$("$$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
  echo "$$address:$$port" >ray/address.part && mv ray/address.part ray/address
  exec "$$PYTHON" -m ray.scripts.scripts start --head --port="$$port" --dashboard-host=127.0.0.1 "$$@"
fi
until [ -s ray/address ]; do sleep 0.1; done
exec "$$PYTHON" -m ray.scripts.scripts start --address="$$(cat ray/address)" "$$@"
NODE
srun --overlap --export=ALL --nodes=$nodes --ntasks=$nodes --ntasks-per-node=1$step_options \
  --output=ray/node-%n.log bash ray/node.sh &
ray=$$!
trap 'kill "$$ray" 2>/dev/null; wait "$$ray"' EXIT

# The workload starts as soon as all nodes are there; if they are not in time, it is told which log to read.
"$$PYTHON" -u - <<'READY' || { tail -n 20 ray/node-*.log >&2; exit 1; }
$ready
READY
export RAY_ADDRESS
RAY_ADDRESS=$$(cat ray/address)
"$$PYTHON" -u $workload
"""
)

_OWN_ADDRESS = "import socket; print(socket.gethostbyname(socket.gethostname()))"
_INTERFACE_ADDRESS = (
    "import fcntl, socket, struct; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); "
    'print(socket.inet_ntoa(fcntl.ioctl(s.fileno(), 0x8915, struct.pack("256s", b"$name"))[20:24]))'
)
_READY = Template(
    """\
import os, sys, time
until = time.monotonic() + $seconds
while not os.path.exists("ray/address"):
    if time.monotonic() > until:
        sys.exit("Ray: the head did not start within $seconds s")
    time.sleep(0.1)
import ray
ray.init(address=open("ray/address").read().strip(), log_to_driver=False, logging_level="ERROR")
while True:
    alive, there = sum(node["Alive"] for node in ray.nodes()), ray.cluster_resources()
    if alive >= $nodes and there.get("CPU", 0) >= $cpus and there.get("GPU", 0) >= $gpus:
        break
    if time.monotonic() > until:
        sys.exit(f"Ray: after $seconds s there are {alive} of $nodes nodes, {there.get('CPU', 0):.0f} of $cpus CPUs, "
                 f"{there.get('GPU', 0):.0f} of $gpus GPUs")
    time.sleep(0.1)"""
)


def _interface(text: str | None) -> str | None:
    if text is not None and not text.replace("-", "").replace(".", "").isalnum():
        raise ValueError(f"{text!r} is not the name of a network interface, such as 'ib0'")
    return text


class RayLauncher(Launcher):
    """Starts Ray on every node of the allocation and runs the workload with RAY_ADDRESS set.

    CPUs, GPUs and memory are those of the request. In `development` nothing is started: the workload's own `ray.init()`
    makes a local Ray there, and finds the cluster here.

    Example:
        RayLauncher(ray_start_args=["--include-dashboard=false"])
    """

    key: ClassVar[str] = "ray"

    ray_start_args: tuple[str, ...] = Field((), description="Further arguments of `ray start`, on every node.")
    object_store_memory: Memory | None = Field(
        None, description="Size of the object store a node, for instance 64G; Ray chooses if not given."
    )
    startup_time_limit: PositiveInt = Field(
        120, description="Seconds for all nodes to join; then the job fails and shows their logs."
    )
    network_interface: Annotated[str | None, AfterValidator(_interface)] = Field(
        None,
        description="Interface whose address Ray uses, for instance ib0; if not given, what the hostname resolves to.",
    )

    def local_environment(self) -> dict[str, str]:  # noqa: D102 - see Launcher
        # Ray would write a token of its own into the home folder, for everybody to read.
        return {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}

    def check(self, request: SlurmRequest) -> None:  # noqa: D102 - see Launcher
        if request.ntasks_per_node != 1:
            raise ConfigurationError(
                f"ntasks_per_node={request.ntasks_per_node}: RayLauncher takes 1, Ray fills the node itself"
            )
        if (request.cpus_per_task or 1) < request.gpus_per_node:
            raise ConfigurationError(
                f"cpus_per_task={request.cpus_per_task or 1} with gpus_per_node={request.gpus_per_node}: "
                "Ray needs at least one CPU for each GPU"
            )

    def render(self, request: SlurmRequest, workload: str) -> str:  # noqa: D102 - see Launcher
        cpus, gpus = request.cpus_per_task or 1, request.gpus_per_node
        arguments = [f"--num-cpus={cpus}", f"--num-gpus={gpus}", *self.ray_start_args]
        if self.object_store_memory:
            arguments.append(f"--object-store-memory={parse_memory(self.object_store_memory) * 1024}")
        # A step inherits neither of these from the job (since Slurm 22.05).
        step_options = f" --cpus-per-task={cpus}" + (f" --gres=gpu:{gpus}" if gpus else "")
        own_address = (
            Template(_INTERFACE_ADDRESS).substitute(name=self.network_interface)
            if self.network_interface
            else _OWN_ADDRESS
        )
        return _BODY.substitute(
            pre_start=render_pre_start(self.pre_start_commands),
            own_address=own_address,
            arguments=shlex.join(arguments),
            nodes=request.nodes,
            step_options=step_options,
            ready=_READY.substitute(
                seconds=self.startup_time_limit,
                nodes=request.nodes,
                cpus=cpus * request.nodes,
                gpus=gpus * request.nodes,
            ),
            workload=shlex.quote(workload),
        )
