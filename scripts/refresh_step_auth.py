#!/usr/bin/env python3
"""Look after access to the supercomputer: renew the SSH certificate, replace the stored secrets, tell how it is."""

import _environment

_environment.activate()

from dagster_sbatch.commands import refresh_step_auth
from resources import PROJECT

raise SystemExit(refresh_step_auth.main(PROJECT))
