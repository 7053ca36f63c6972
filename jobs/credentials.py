"""Access to the supercomputer, kept alive by itself: an op, its job, and the sensor that starts it when it is due."""

from dagster_sbatch import make_credential_refresh
from resources import PROJECT

_refresh = make_credential_refresh(PROJECT)

refresh_credentials_op = _refresh.op
"""Replaces the two authentik secrets and the SSH certificate, as far as they are due."""
refresh_credentials_job = _refresh.job
"""The op alone; also for the launchpad, by hand."""
refresh_credentials_sensor = _refresh.sensor
"""Reads the expiry times every 30 seconds, connects to nothing, and requests the job when something is due."""
musica_access = _refresh.asset
"""Shows the remaining hours of the certificate and the secrets in the UI."""
access_health = _refresh.check
"""Fails when access does not work, or no longer renews itself."""
