"""Access to the supercomputer that renews itself: an op, its job, and the sensor that launches the job when needed."""

from dagster_sbatch import make_credential_refresh
from resources import PROJECT

_refresh = make_credential_refresh(PROJECT)

refresh_credentials_op = _refresh.op
"""Replaces the secrets and the certificate if they are due."""

refresh_credentials_job = _refresh.job
"""Runs the op; you can also launch it by hand."""

refresh_credentials_sensor = _refresh.sensor
"""Reads their expiry times every 30 seconds, connects to nothing, and launches the job when something is due."""

musica_access = _refresh.asset
"""Shows the remaining hours in the UI."""

access_health = _refresh.check
"""Fails when access does not work, or no longer renews itself."""
