#!/usr/bin/env -S python3 -E
"""Renew access to the supercomputer, the SSH certificate and the stored secrets; show its state."""

import _environment

_environment.activate()

from dagster_sbatch.commands import refresh_step_auth
from resources import PROJECT

raise SystemExit(refresh_step_auth.main(PROJECT))
