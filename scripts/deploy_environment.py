#!/usr/bin/env -S python3 -E
"""Publish the environment that production runs on the supercomputer; list and remove environments."""

import _environment

_environment.activate()

from dagster_sbatch.commands import deploy_environment
from resources import PROJECT

raise SystemExit(deploy_environment.main(PROJECT))
