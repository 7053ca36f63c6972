"""The facts about a supercomputer that the client needs: partitions, QoS, commands to run before Python."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from dagster_sbatch.errors import ConfigurationError, Place, describe_at, nearest
from dagster_sbatch.sites import SITES
from dagster_sbatch.slurm.modules import Modules
from dagster_sbatch.slurm.request import word
from dagster_sbatch.slurm.units import Memory, Time
from dagster_sbatch.ssh.host_key import parse_authority

_Comment = Annotated[
    str, word(r"#[^\r\n]*", "is not a comment: write one line that begins with #; commands go to setup_commands")
]
_Interpreter = Annotated[
    str,
    word(
        r"[A-Za-z0-9_.+-]+|/\S+",
        "is neither the name of a program nor an absolute path without spaces. Nothing replaces ~ or a variable in it; "
        "the interpreter of one user is SLURM_PYTHON",
    ),
]
_Launcher = Annotated[str, word(r"script|srun|command|batch_script|ray", "is not the key of a launcher")]
_Authority = Annotated[str, AfterValidator(lambda line: parse_authority(line) and line)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Qos(_Part):
    """Limits of a quality of service; a limit that is left out is not checked."""

    time_limit: Time | None = Field(None, description="The longest time limit of a job in this QoS.")
    nodes: PositiveInt | None = Field(None, description="The most nodes that one user may have in this QoS.")


class Partition(_Part):
    """Nodes of one kind."""

    cores: PositiveInt = Field(description="CPUs that a job can have on one node. With threads_per_core=1: cores.")
    mem: Memory = Field(description="Memory per node.")
    gpus: int = Field(0, ge=0, description="GPUs per node.")
    cores_per_gpu: PositiveInt | None = Field(None, description="CPUs per GPU, for requests that name no CPUs.")
    mem_per_gpu: Memory | None = Field(None, description="Memory per GPU, for requests that name no memory.")
    tokens_per_node_hour: float | None = Field(
        None,
        ge=0,
        description="What the centre charges for a node for an hour, in its own unit; shown by scripts/costs.",
    )
    tokens_per_gpu_hour: float | None = Field(None, ge=0, description="What it charges for a GPU for an hour.")
    qos: dict[str, Qos] = Field({}, description="QoS of this partition, the ordinary one first; empty: jobs need none.")

    def limits_of(self, qos: str | None) -> Qos:
        """Return the limits of a QoS; an unknown QoS has none."""
        return self.qos.get(qos or "", Qos())


class ContainerRuntime(_Part):
    """The program that runs the container of a launcher; see `Container`."""

    command: str = Field(
        "apptainer", pattern=r"^[A-Za-z0-9_./+-]+$", description="apptainer or singularity, or its path."
    )
    options: tuple[str, ...] = Field((), description="Options of its `exec` for all containers, as --name=value.")
    gpu_options: tuple[str, ...] = Field(("--nv",), description="Options for jobs that request GPUs.")


class Site(_Part):
    """A supercomputer: its entry in SUPERCOMPUTER_SITE_OVERRIDES, merged over the facts that this package has."""

    partitions: dict[str, Partition] = Field({}, description="By name; first the preferred one of each kind.")
    launchers: dict[_Launcher, dict[str, Any]] = Field(
        {}, description="Fields of launchers by their keys: script, srun, command, batch_script, ray."
    )
    script_header: tuple[_Comment, ...] = Field(
        (), description="Comment lines for the site's submit plugin, before the #SBATCH lines of the job script."
    )
    threads_per_core: Literal[1, 2, 4, 8] | None = Field(
        None,
        description="Hardware threads per core that a job uses. With 1, CPUs are cores everywhere; "
        "without it, Slurm decides what a CPU is.",
    )
    setup_commands: tuple[str, ...] = Field(
        (), description="Shell commands that run first, on the login node and in each job (module load ...)."
    )
    modules: Modules = Field((), description="Modules (Lmod) that jobs load whose request has no `modules` of its own.")
    host_authorities: tuple[_Authority, ...] = Field(
        (), description="Lines `@cert-authority ...` for hosts that are not in the user's known_hosts."
    )
    container_runtime: ContainerRuntime = Field(ContainerRuntime(), description="The program that runs containers.")
    documentation: str | None = Field(None, description="Address of the centre's documentation.")
    local_disk: str = Field(
        "/local",
        pattern=r"^/[A-Za-z0-9._/-]{1,24}$",
        description="Folder on each node's own disk for temporary files; jobs that cannot write to it use /tmp.",
    )
    python_candidates: tuple[_Interpreter, ...] = Field(
        ("python3",), description="Python interpreters to try, the best first."
    )


def load_site(overrides: Mapping[str, Any], name: str) -> Site:
    """Return a site: what the project knows of it, with its entry in `overrides` merged over that.

    Dictionaries are merged key by key, any other value replaces the known one; None removes it.
    Raises ConfigurationError: the name is unknown, or its entry has an unknown key or a wrong value.
    """
    known = SITES.keys() | overrides.keys()
    if name not in known:
        raise ConfigurationError(f"SLURM_SUPERCOMPUTER_SITE={name!r} is not a known site{nearest(name, known)}")
    try:
        return Site.model_validate(_merge(SITES.get(name, {}), overrides.get(name, {})))
    except ValidationError as error:
        place = f"SUPERCOMPUTER_SITE_OVERRIDES[{name!r}]"
        text = describe_at(
            error, lambda keys: place + "".join(f"[{key!r}]" for key in keys if key != "[key]"), _keys_beside
        )
        raise ConfigurationError(text) from None


def _merge(known: Any, changes: Any) -> Any:
    if not isinstance(changes, Mapping):
        return changes
    old = known if isinstance(known, Mapping) else {}
    merged = {**old, **{key: _merge(old.get(key), value) for key, value in changes.items()}}
    return {key: value for key, value in merged.items() if value is not None}


def _keys_beside(place: Place) -> list[str]:
    """Return the valid keys beside an unknown one, which is this many keys below the site's entry."""
    if place[0] == "container_runtime" and len(place) > 1:
        return list(ContainerRuntime.model_fields)
    models: dict[int, type[BaseModel]] = {1: Site, 3: Partition}
    return list(models.get(len(place), Qos).model_fields)
