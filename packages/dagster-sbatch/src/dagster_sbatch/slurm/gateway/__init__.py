"""The gateway: requests to an agent on the login node, which submits, follows, cancels and accounts for jobs.

client.Gateway     the requests; files: sent and fetched
following          jobs: submitted, and followed to the end of their tasks; a single job has one task
link.Link          repeats a request until it is answered, over a new connection if one is lost
channel            requests and answers over SSH, or to a subprocess on the login node itself
programs           the agent's source, and the command lines that start it
~~~~~~~~~~~~~~~~~  the login node begins here
agent.server       reads requests, answers them, leaves when the client is gone
"""

from dagster_sbatch.slurm.gateway.agent.job_record import MESSAGES
from dagster_sbatch.slurm.gateway.answers import (
    ACCOUNTED,
    Attempt,
    Claim,
    JobEnd,
    JobState,
    LostClaimError,
    OtherRun,
    Questions,
    RefusedError,
    RemovedError,
    StoppedError,
    Submitted,
    TaskStates,
)
from dagster_sbatch.slurm.gateway.channel import OpenChannel, choose_channel
from dagster_sbatch.slurm.gateway.client import Gateway, fetch_file, make_gateway, send_file
from dagster_sbatch.slurm.gateway.following import JobHandler, JobToFollow, Sinks, follow_jobs
from dagster_sbatch.slurm.gateway.project_usage import (
    GPU,
    JobLife,
    Limits,
    Projects,
    Queued,
    Share,
    Usage,
    charged_project,
)
