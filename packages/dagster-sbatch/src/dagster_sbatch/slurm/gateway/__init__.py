"""The gateway: requests to an agent on the login node, which submits, follows, cancels and accounts for jobs.

client.Gateway     the requests
link.Link          repeats a request until it is answered, over a new connection if one is lost
channel            bytes over SSH, or to a subprocess on the login node itself
~~~~~~~~~~~~~~~~~  the login node begins here
agent.server       reads requests, answers them, leaves when the client is gone
"""

from dagster_sbatch.slurm.gateway.agent.run_directories import MESSAGES
from dagster_sbatch.slurm.gateway.answers import (
    Claim,
    JobEnd,
    JobState,
    LostClaimError,
    OtherRun,
    Projects,
    RefusedError,
    StoppedError,
    Submitted,
)
from dagster_sbatch.slurm.gateway.channel import OpenChannel, choose_channel
from dagster_sbatch.slurm.gateway.client import ACCOUNTED, Gateway, make_gateway

__all__ = [
    "ACCOUNTED",
    "MESSAGES",
    "Claim",
    "Gateway",
    "JobEnd",
    "JobState",
    "LostClaimError",
    "OpenChannel",
    "OtherRun",
    "Projects",
    "RefusedError",
    "StoppedError",
    "Submitted",
    "choose_channel",
    "make_gateway",
]
