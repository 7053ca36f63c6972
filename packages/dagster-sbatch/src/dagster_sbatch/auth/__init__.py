"""Access to the supercomputer that keeps itself alive: app password -> OIDC token -> certificate -> SSH.

`ensure_certificate` is called before each connect; `refresh` and `check_health` serve the job, its sensor and the
script.
"""

from dagster_sbatch.auth.access_errors import (
    AccessError,
    BootstrapError,
    ClockError,
    RejectedError,
    UnavailableError,
    UnsafeFileError,
)
from dagster_sbatch.auth.health import AccessHealth, HealthItem, check_health
from dagster_sbatch.auth.refresher import Report
from dagster_sbatch.auth.renew import ensure_certificate, refresh, replace_refused_certificate
