"""Start a Ray cluster on the nodes of the allocation, with the workload as its driver."""

import json
import secrets
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import AfterValidator, Field, PositiveInt

from dagster_sbatch.errors import ConfigurationError
from dagster_sbatch.launchers.base import Launcher
from dagster_sbatch.slurm.request import SlurmRequest
from dagster_sbatch.slurm.units import Memory, parse_memory

_PROGRAMS = [*Path(__file__).parent.glob("job/*.*"), Path(__file__).parents[1] / "srun" / "job" / "ports.py"]
_FILES = {f"ray/{path.name}": path.read_text() for path in sorted(_PROGRAMS)}
_NO_DASHBOARD = "--include-dashboard=false"
_OWN_ARGUMENTS = frozenset(
    """
    --address --block --dashboard-host --dashboard-port --disable-usage-stats --head --node-ip-address --num-cpus
    --num-gpus --object-store-memory --port --ray-client-server-port --temp-dir
    """.split()
)
LONGEST_TEMP_DIR = 40
"""Bytes in the path of Ray's folder: a Unix socket's path has 107 at most, and Ray appends up to 66."""
_JOB_FOLDER = "/r-abcd1234/ray"


def _argument(text: str) -> str:
    name = text.partition("=")[0]
    if not name.startswith("--") or name in _OWN_ARGUMENTS:
        raise ValueError(
            f"{text!r}: RayLauncher sets {name} itself" if name in _OWN_ARGUMENTS else f"{text!r}: write --name=value"
        )
    return text


def _temp_dir(text: str) -> str:
    longest = LONGEST_TEMP_DIR - len(_JOB_FOLDER)
    if not text.startswith("/") or len(text.encode()) > longest:
        raise ValueError(f"{text!r} is not an absolute path of at most {longest} bytes: Ray keeps sockets below it")
    return text


class RayLauncher(Launcher):
    """Starts Ray on every node of the allocation and runs the workload with RAY_ADDRESS set.

    CPUs, GPUs and memory are those of the request. The workload calls `ray.init()` without an address. In a job, that
    finds this cluster; in `development`, the launcher starts nothing, and `ray.init()` starts a local Ray. With a
    container, the Ray of the image runs on every node.

    Example:
        RayLauncher(ray_start_args=["--include-dashboard=false"])
    """

    key: ClassVar[str] = "ray"
    not_in_arrays: ClassVar[str] = (
        "each task would start a Ray cluster of its own. Remove array=..., and let the one Ray cluster of the job "
        "divide the partitions (pipes.extras['partition_keys']) among Ray tasks; or use launcher=ScriptLauncher()."
    )
    ray_start_args: tuple[Annotated[str, AfterValidator(_argument)], ...] = Field(
        (), description="Further arguments of `ray start` on every node; --include-dashboard only on the head."
    )
    object_store_memory: Memory | None = Field(
        None, description="Size of the object store per node, for instance 64G; default: 30 % of the job's memory."
    )
    startup_time_limit: PositiveInt = Field(
        120, description="Seconds in which all nodes must join. Then the job fails, with the logs of missing nodes."
    )
    network_interface: str | None = Field(
        None,
        description="Network interface that Ray uses, for instance ib0; default: that of the address of the host name.",
    )
    temp_dir: Annotated[str, AfterValidator(_temp_dir)] | None = Field(
        None,
        description="Local disk on which each node keeps Ray's folder, `r-XXXXXXXX`, until the job ends. Default: the "
        "site's `local_disk`, or /tmp where that is not writable.",
    )
    collect_logs: bool = Field(
        default=True, description="Keep Ray's logs in the run directory, as ray/logs-NODE.tar.gz."
    )

    def local_environment(self) -> dict[str, str]:  # noqa: D102 - see Launcher
        # Without a token here, Ray would write one into the home folder, readable by everybody.
        return {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}

    def check(self, request: SlurmRequest) -> None:  # noqa: D102 - see Launcher
        if request.ntasks_per_node != 1:
            raise ConfigurationError(
                f"ntasks_per_node={request.ntasks_per_node}: RayLauncher needs 1; Ray starts its own processes. "
                "Remove ntasks_per_node, and request CPUs with cpus_per_task."
            )
        if (request.cpus_per_task or 1) < request.gpus_per_node:
            raise ConfigurationError(
                f"cpus_per_task={request.cpus_per_task or 1} with gpus_per_node={request.gpus_per_node}: "
                "Ray needs at least one CPU per GPU. Raise cpus_per_task"
            )
        if self.container and self.temp_dir and self.temp_dir not in self.container.binds:
            raise ConfigurationError(
                f"temp_dir={self.temp_dir!r}: the container does not have this folder. "
                f"Write Container(..., binds=[{self.temp_dir!r}])"
            )

    def files(self, request: SlurmRequest) -> dict[str, str]:  # noqa: D102 - see Launcher
        settings = {
            **self.model_dump(exclude={"container", "pre_start_commands"}),
            "object_store_memory": self.object_store_memory and parse_memory(self.object_store_memory) * 1024,
            "nodes": request.nodes,
            "cpus": request.cpus_per_task or 1,
            "gpus": request.gpus_per_node,
        }
        return {**_FILES, "ray/settings.json": json.dumps(settings, indent=1)}

    def hints(self, job: str) -> dict[str, str]:  # noqa: D102 - see Launcher
        return {} if _NO_DASHBOARD in self.ray_start_args else {"dashboard": f"scripts/job {job} dashboard"}

    def render(self, request: SlurmRequest, command: Sequence[str]) -> str:  # noqa: D102 - see Launcher
        step, gpus = self.step_options(request), request.gpus_per_node
        # Ray starts one worker per CPU in advance; with GPUs, usually only one worker per GPU is used.
        few = "export RAY_prestart_worker_first_driver=${RAY_prestart_worker_first_driver:-0}\n" if gpus else ""
        return (
            f"# Every node runs this before Ray.\n# shellcheck disable=SC2317\n{self.render_pre_start_function()}"
            f"{few}# shellcheck source=/dev/null\n"
            f". ray/cluster.sh {len(command)} {shlex.join([*command, *step])}"
        )
