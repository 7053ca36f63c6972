"""What is done on the login node, by an agent that the client sends along: submit, follow, cancel, account."""

from resources.slurm.gateway.channel import local_channel, ssh_channel
from resources.slurm.gateway.client import Gateway, JobEnd, JobState, RefusedError, StoppedError, Submitted

__all__ = [
    "Gateway",
    "JobEnd",
    "JobState",
    "RefusedError",
    "StoppedError",
    "Submitted",
    "local_channel",
    "ssh_channel",
]
