"""A certificate that is valid, and that a server refuses all the same."""

from contextlib import suppress
from datetime import timedelta

from dagster_sbatch.auth.access_errors import AccessError
from dagster_sbatch.auth.renew import refresh
from dagster_sbatch.auth.ways import read_access
from dagster_sbatch.settings import Settings

REFUSED_AGE = timedelta(minutes=15)
"""A younger certificate is not replaced: the next one would be refused, too."""


def replace_refused_certificate(settings: Settings) -> bool:
    """Replace a certificate that a server has refused, and return whether there is a new one.

    The centre may have revoked it, changed the key of its authority, or the user's login name.
    """
    if settings.edge_node_key_path is None:  # a key of ~/.ssh/config, which nothing renews
        return False
    access = read_access(settings)
    found = access.valid_certificate
    if found and access.now - found.obtained >= REFUSED_AGE and not access.pausing("certificate"):
        with suppress(AccessError):
            return refresh(settings, certificate="now", patient=True).certificate != found
    return False
