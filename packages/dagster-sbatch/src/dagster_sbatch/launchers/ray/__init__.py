"""A Ray cluster over the nodes of the allocation, with the workload as its driver."""

import json
import secrets
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import AfterValidator, Field, PositiveInt

from dagster_sbatch.errors import ConfigurationError
from dagster_sbatch.launchers.base import Launcher, render_pre_start
from dagster_sbatch.slurm.request import Memory, SlurmRequest
from dagster_sbatch.slurm.units import parse_memory

_FOLDER = Path(__file__).parent / "job"
_RELAY = Path(__file__).parent / "relay.py"
_NO_DASHBOARD = "--include-dashboard=false"
_OWN_ARGUMENTS = frozenset(
    """
    --address --block --dashboard-host --dashboard-port --disable-usage-stats --head --node-ip-address --num-cpus
    --num-gpus --object-store-memory --port --temp-dir
    """.split()
)
LONGEST_TEMP_DIR = 40
"""Characters of Ray's own folder: a Unix socket's path takes 107, and Ray adds up to 66 for it."""
_JOB_FOLDER = "/r-abcd1234/ray"


def _argument(text: str) -> str:
    name = text.partition("=")[0]
    if not name.startswith("--") or name in _OWN_ARGUMENTS:
        raise ValueError(
            f"{text!r}: RayLauncher sets {name} itself" if name in _OWN_ARGUMENTS else f"{text!r}: write --name=value"
        )
    return text


def _temp_dir(text: str | None) -> str | None:
    if text is None:
        return None
    longest = LONGEST_TEMP_DIR - len(_JOB_FOLDER)
    if not text.startswith("/") or len(text) > longest:
        raise ValueError(
            f"{text!r} is not an absolute path of at most {longest} characters: Ray keeps sockets below it"
        )
    return text


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

    ray_start_args: tuple[Annotated[str, AfterValidator(_argument)], ...] = Field(
        (), description="Further arguments of `ray start`, on every node; --include-dashboard on the head alone."
    )
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
    temp_dir: Annotated[str | None, AfterValidator(_temp_dir)] = Field(
        None,
        description="Where on each node Ray's own folder lies, `r-XXXXXXXX`, until the job ends: a local disk. If not "
        "given, the site's `local_disk`, or /tmp where that cannot be written to.",
    )
    collect_logs: bool = Field(
        default=True, description="Keep Ray's logs in the run directory, as ray/logs-NODE.tar.gz."
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

    def files(self, request: SlurmRequest) -> dict[str, str]:  # noqa: D102 - see Launcher
        settings = {
            "nodes": request.nodes,
            "cpus": request.cpus_per_task or 1,
            "gpus": request.gpus_per_node,
            "ray_start_args": self.ray_start_args,
            "object_store_memory": self.object_store_memory and parse_memory(self.object_store_memory) * 1024,
            "startup_time_limit": self.startup_time_limit,
            "network_interface": self.network_interface,
            "temp_dir": self.temp_dir,
            "collect_logs": self.collect_logs,
        }
        programs = {f"ray/{path.name}": path.read_text() for path in (*sorted(_FOLDER.glob("*.*")), _RELAY)}
        return {**programs, "ray/settings.json": json.dumps(settings, indent=1)}

    def hints(self, job: str) -> dict[str, str]:  # noqa: D102 - see Launcher
        return {} if _NO_DASHBOARD in self.ray_start_args else {"dashboard": f"scripts/job {job} dashboard"}

    def render(self, request: SlurmRequest, command: Sequence[str]) -> str:  # noqa: D102 - see Launcher
        nodes, cpus, gpus = request.nodes, request.cpus_per_task or 1, request.gpus_per_node
        # A step inherits neither CPUs nor GPUs from the job (since Slurm 22.05).
        step = [f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", f"--cpus-per-task={cpus}"]
        step += [f"--gres=gpu:{gpus}"] if gpus else []
        # Ray would start a Python for each CPU beforehand, where as many as there are GPUs have something to do.
        few = "export RAY_prestart_worker_first_driver=${RAY_prestart_worker_first_driver:-0}\n" if gpus else ""
        pre_start = render_pre_start(self.pre_start_commands) or ":"
        return (
            f"# On every node, before Ray.\n# shellcheck disable=SC2317\npre_start() {{\n{pre_start}\n}}\n"
            f"export -f pre_start\n{few}# shellcheck source=/dev/null\n"
            f". ray/cluster.sh {len(command)} {shlex.join([*command, *step])}"
        )
