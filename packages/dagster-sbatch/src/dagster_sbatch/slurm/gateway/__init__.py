"""What is done on the login node, by an agent that the client sends along: submit, follow, cancel, account.

client.Gateway     what can be asked for
link.Link          asks again until there is an answer, over a new connection where one is lost
wire.Wire          frames: lines of JSON with bytes behind them; signs of life
channel            SSH, or a subprocess on the login node itself
~~~~~~~~~~~~~~~~~  the login node begins here
agent.server       takes requests, leaves when the client is gone
agent.submission, claims, follower, runs, slurm, files
"""

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
from dagster_sbatch.slurm.gateway.client import ACCOUNTED, Gateway

__all__ = [
    "ACCOUNTED",
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
]
