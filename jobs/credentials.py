"""Access to the supercomputer, kept alive by itself: an op, its job, and the sensor that starts it when it is due."""

from dagster_sbatch import make_credential_refresh
from resources import PROJECT

_refresh = make_credential_refresh(PROJECT)

refresh_credentials_op, refresh_credentials_job, refresh_credentials_sensor = _refresh.op, _refresh.job, _refresh.sensor
"""The op replaces the secrets and the certificate, as far as they are due. The sensor reads their expiry times every 30
seconds, connects to nothing, and requests the job then; the job may also be launched by hand."""
musica_access, access_health = _refresh.asset, _refresh.check
"""Show the remaining hours in the UI; the check fails when access does not work, or no longer renews itself."""
