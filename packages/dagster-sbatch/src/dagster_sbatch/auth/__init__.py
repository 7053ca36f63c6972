"""Access to the supercomputer that keeps itself alive: app password -> OIDC token -> certificate -> SSH.

`ensure_certificate` is called before each connect; `refresh` and `check_health` serve the job, its sensor and the
script.
"""

from dagster_sbatch.auth.errors import (
    AccessError,
    BootstrapError,
    ClockError,
    LockTimeoutError,
    MisconfiguredError,
    RefusedError,
    UnavailableError,
    UnsafeFileError,
)
from dagster_sbatch.auth.health import Health, Item, check_health
from dagster_sbatch.auth.renew import Report, ensure_certificate, refresh

__all__ = [
    "AccessError",
    "BootstrapError",
    "ClockError",
    "Health",
    "Item",
    "LockTimeoutError",
    "MisconfiguredError",
    "RefusedError",
    "Report",
    "UnavailableError",
    "UnsafeFileError",
    "check_health",
    "ensure_certificate",
    "refresh",
]
