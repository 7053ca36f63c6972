"""Every environment variable that the project reads, with its type, meaning and default."""

import ipaddress
import shutil
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal, get_args
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, ValidationInfo

from dagster_sbatch.setting_paths import check_remote_path, read_local_path

Deployment = Literal["development", "staging_supercomputer", "production_supercomputer"]
DEPLOYMENTS: tuple[str, ...] = get_args(Deployment)


def _https(url: str, values: ValidationInfo) -> str:
    """Check an address: https, since secrets go there; http to this machine only, or with ASC_ALLOW_HTTP."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise ValueError(f"not a URL: {error}") from None
    if parts.scheme not in ("https", "http") or not parts.hostname:
        raise ValueError("not a URL: it begins with https://")
    if parts.scheme == "http" and not values.data.get("allow_http") and not is_loopback(parts.hostname):
        raise ValueError("plain http would show secrets to everyone on the way: use https://")
    return url


def is_loopback(host: str) -> bool:
    """Return whether a host is this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


SLURM_NAME = r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$"

LocalPath = Annotated[Path, AfterValidator(read_local_path)]
RemotePath = Annotated[str, AfterValidator(check_remote_path)]
Url = Annotated[str, AfterValidator(_https)]
Hours = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Skew = Annotated[float, Field(gt=0, lt=1e6)]


def _variable(name: str, description: str, example: str, default: Any = None, **limits: Any) -> Any:
    return Field(default, validation_alias=name, description=description, examples=[example], **limits)


class Settings(BaseModel):
    """The settings of one deployment; `setting_files.load_settings` makes them."""

    model_config = ConfigDict(frozen=True)

    deployment: Deployment = _variable(
        "DAGSTER_DEPLOYMENT",
        "Where workloads run: " + ", ".join(DEPLOYMENTS) + ".",
        "production_supercomputer",
        "development",
    )
    data_root: str | None = _variable(
        "DATA_ROOT",
        "Folder for the workloads' files, on the machine where they run. Default: data/ of the repository; on the "
        "supercomputer data/ of SLURM_DEPLOYMENT_BASE_PATH.",
        "~/data",
    )

    supercomputer_site: str | None = _variable("SLURM_SUPERCOMPUTER_SITE", "Name of the supercomputer.", "musica")
    edge_node_host: str | None = _variable(
        "SLURM_EDGE_NODE_HOST", "Name of the login node; localhost if Dagster runs on it.", "musica.vie.asc.ac.at"
    )
    edge_node_port: int = _variable("SLURM_EDGE_NODE_PORT", "SSH port of the login node.", "22", 22, ge=1, le=65535)
    edge_node_user: str | None = _variable("SLURM_EDGE_NODE_USER", "Your user name on the supercomputer.", "xy12345")
    edge_node_key_path: LocalPath | None = _variable(
        "SLURM_EDGE_NODE_KEY_PATH", "Private SSH key; the certificate lies beside it.", "~/.ssh/id_musica"
    )
    deployment_base_path: RemotePath | None = _variable(
        "SLURM_DEPLOYMENT_BASE_PATH",
        "Folder on the supercomputer for runs, environments and data; every node must see it. No % : = \\ or bar.",
        "$DATA/dagster-slurm",
        pattern=r"^[^%:=\\|\r\n]*$",  # Slurm replaces %j and \j; `:` divides PYTHONPATH; env takes A=b for a variable
    )
    python: RemotePath | None = _variable(
        "SLURM_PYTHON",
        "An interpreter on the supercomputer that has dagster-pipes and everything that workloads import. "
        "Not used by assets that name an environment. Default: the client makes an environment.",
        "$DATA/environment/bin/python",
    )
    partition: str | None = _variable(
        "SLURM_PARTITION",
        "Preferred partition. If its nodes do not suit a request (GPUs or none), another partition is chosen.",
        "zen4_0768_h100x4",
    )
    qos: str | None = _variable(
        "SLURM_QOS",
        "Preferred QoS. On another partition, jobs use the QoS of the same class (dev_, idle_, plain).",
        "dev_zen4_0768_h100x4",
    )
    account: str | None = _variable(
        "SLURM_ACCOUNT",
        "Project that jobs are charged to, unless an asset names one. "
        "Default: SBATCH_ACCOUNT of the login shell on the supercomputer, else your default project.",
        "p71234",
        pattern=SLURM_NAME,
    )
    reservation: str | None = _variable(
        "SLURM_RESERVATION",
        "Reservation of the site in which jobs run, unless an asset names one.",
        "course_2026",
        pattern=SLURM_NAME,
    )
    most_gpu_hours_per_run: Hours | None = _variable(
        "SLURM_MOST_GPU_HOURS_PER_RUN",
        "GPU-hours that one call of compute.run may cost; a call that could cost more submits nothing. "
        "An asset may name its own limit.",
        "64",
    )
    most_node_hours_per_run: Hours | None = _variable(
        "SLURM_MOST_NODE_HOURS_PER_RUN", "Node-hours that one call may cost.", "100"
    )
    budget_gpu_hours: Hours | None = _variable(
        "SLURM_BUDGET_GPU_HOURS",
        "GPU-hours that the project of your jobs may use from SLURM_BUDGET_START on. "
        "Not used where Slurm itself limits what the project may use.",
        "5000",
    )
    budget_start: date | None = _variable(
        "SLURM_BUDGET_START", "First day (UTC) of SLURM_BUDGET_GPU_HOURS.", "2026-10-01"
    )
    keep_within_budget: bool = _variable(
        "SLURM_KEEP_WITHIN_BUDGET",
        "Submit nothing that could cost more GPU-hours or node-hours than the project has left, after all jobs that "
        "wait and run.",
        "true",
        default=False,
    )

    allow_http: bool = _variable(  # before the addresses, whose check reads it
        "ASC_ALLOW_HTTP",
        "Accept http:// in the ASC_ addresses also for other machines. Secrets are then readable on the network: "
        "for tests.",
        "true",
        default=False,
    )
    oidc_client_id: str | None = _variable("ASC_OIDC_CLIENT_ID", "Client id of the step CA at authentik.", "abc123")
    oidc_username: str | None = _variable("ASC_OIDC_USERNAME", "Your user name at authentik.", "xy12345")
    oidc_token_url: Url | None = _variable(
        "ASC_OIDC_TOKEN_URL", "Address that issues OIDC tokens.", "https://auth.asc.ac.at/application/o/token/"
    )
    oidc_app_password: SecretStr | None = _variable(
        "ASC_OIDC_APP_PASSWORD", "An app password of yours; one of the ways to get access.", "(secret)"
    )
    authentik_api_base: Url | None = _variable(
        "ASC_AUTHENTIK_API_BASE", "Address of authentik.", "https://auth.asc.ac.at"
    )
    authentik_credentials_file: LocalPath | None = _variable(
        "ASC_AUTHENTIK_CREDENTIALS_FILE",
        "File with the credentials that renew themselves. Default: ~/.config/musica-pipelines/<site>-auth.env.",
        "~/.config/dagster-slurm/musica-auth.env",
    )
    authentik_api_token: SecretStr | None = _variable(
        "ASC_AUTHENTIK_API_TOKEN", "An API token of yours, for the first time and for recovery only.", "(secret)"
    )
    authentik_token_identifier: str = _variable(
        "ASC_AUTHENTIK_TOKEN_IDENTIFIER",
        "Prefix of the names of the tokens that the client makes for you: letters, digits, _ and -.",
        "dagster-slurm",
        "musica-pipelines",
        pattern=r"^[A-Za-z0-9_-]{1,80}$",
    )
    authentik_refresh_skew_days: Skew | None = _variable(
        "ASC_AUTHENTIK_REFRESH_SKEW_DAYS",
        "How many days before they expire both stored secrets are replaced. "
        "Default: 7, or a third of their lifetime if that is less.",
        "3",
    )
    step_ca_url: Url | None = _variable("ASC_STEP_CA_URL", "The certificate authority.", "https://auth.asc.ac.at:9000")
    step_fingerprint: str | None = _variable(
        "ASC_STEP_FINGERPRINT",
        "SHA-256 of the certificate authority's root certificate, 64 hexadecimal digits.",
        "44b04847...",
        pattern=r"^[0-9a-fA-F]{64}$",
    )
    step_refresh_skew: Skew | None = _variable(
        "ASC_STEP_REFRESH_SKEW",
        "How many minutes before its end a certificate is replaced. Default: after two thirds of its life.",
        "60",
    )

    @property
    def on_supercomputer(self) -> bool:
        """Whether workloads run as Slurm jobs."""
        return self.deployment != "development"

    @property
    def on_login_node(self) -> bool:
        """Whether this machine is the login node: Slurm is here, and no SSH needed."""
        return self.edge_node_host == "localhost" and shutil.which("sbatch") is not None

    @property
    def runs_folder(self) -> str:
        """The folder of all runs, on the supercomputer."""
        return f"{self.deployment_base_path}/runs"

    @property
    def data_folder(self) -> str:
        """DATA_ROOT on the supercomputer, as the user wrote it, or its default."""
        return self.data_root or f"{self.deployment_base_path}/data"

    @property
    def credentials_file(self) -> Path:
        """ASC_AUTHENTIK_CREDENTIALS_FILE or its default."""
        default = Path(f"~/.config/musica-pipelines/{self.supercomputer_site}-auth.env")
        return self.authentik_credentials_file or default.expanduser()
