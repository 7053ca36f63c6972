"""Slurm accepts what the client accepts, also after a failure, and refuses what it refuses: over many combinations."""

import base64
import random
import subprocess
from dataclasses import replace
from typing import Any

import pytest

from dagster_sbatch import ConfigurationError, Retries, SlurmRequest
from dagster_sbatch.slurm import allocate, render_job_script
from dagster_sbatch.slurm.request import Fault
from dagster_sbatch.slurm.retries import next_request
from resources import PROJECT
from slurm_in_a_box import CPU_PARTITION, GPU_PARTITION, SimulatedSite

pytestmark = pytest.mark.cluster
KNOWN = {"mem": "750G"}, {"time_limit": "3-00"}, {"time_limit": "10-00"}
"""What the engine does not know of MUSICA, and the simulated site has."""
OVERRIDES = {
    name: {**KNOWN[0], "qos": {f"idle_{name}": KNOWN[1], f"long_{name}": KNOWN[2]}}
    for name in (CPU_PARTITION, GPU_PARTITION)
}
SITE = replace(PROJECT, site_overrides={"musica": {"partitions": OVERRIDES}}).load_site("musica")
RETRIES = Retries(max_mem="2T", max_time_limit="20-00", factor=3)
CHOICES: dict[str, list[Any]] = {
    "gpus_per_node": [0, 0, 1, 2, 3, 4, 5],
    "nodes": [1, 2],
    "ntasks_per_node": [1, 1, 2, 4, 5, 190],
    "cpus_per_task": [None, None, 1, 2, 44, 45, 95, 176, 177, 190, 191],
    "exclusive": [False, True],
    "time_limit": ["5", "10", "11", "3-00", "3-00:01", "10-00"],
    "options": [(), ("--hint=nomultithread",)],
}
MEMORY: list[dict[str, str]] = [
    {}, {"mem": "0"}, {"mem": "1G"}, {"mem": "180G"}, {"mem": "740G"}, {"mem": "751G"},
    {"mem_per_cpu": "1G"}, {"mem_per_cpu": "3G"}, {"mem_per_cpu": "5G"},
]  # fmt: skip


def requests(chance: random.Random) -> tuple[str, list[SlurmRequest]]:
    """Return why the client refuses a request, and what Slurm is asked about: that, or also the next attempts."""
    fields = {name: chance.choice(values) for name, values in CHOICES.items()} | chance.choice(MEMORY)
    gpus = fields["gpus_per_node"] > 0
    partition = GPU_PARTITION if gpus else CPU_PARTITION  # with GPUs, MUSICA has no job without one
    kind = chance.choice(["", "dev_", "idle_", "fast_", "long_"])
    asked = SlurmRequest(**fields, partition=chance.choice([None, partition]), retries=RETRIES)
    try:
        allocation = allocate(asked, SITE, qos=kind + chance.choice([CPU_PARTITION, GPU_PARTITION]))
    except ConfigurationError as error:
        return str(error), [asked.model_copy(update={"partition": partition, "qos": kind + partition})]
    first = allocation.request
    faults = [Fault.TIME, *([Fault.MEMORY] if first.mem or first.mem_per_cpu else [])]
    later = [next_request(fault, first, allocation, "", 0).request for fault in faults]
    return "", [first, *filter(None, later)]


def test_slurm_and_the_client_agree(site: SimulatedSite) -> None:
    chance = random.Random(2026)
    cases = [(refusal, each) for _ in range(400) for refusal, found in [requests(chance)] for each in found]
    scripts = [
        render_job_script(each, SITE, job_name="x", about={}, environment={}, body="true").encode() for _, each in cases
    ]
    ask = "while read -r line; do echo \"$line\" | base64 -d | sbatch --test-only 2>&1; printf '\\036'; done"
    lines = "".join(f"{base64.b64encode(script).decode()}\n" for script in scripts)
    done = subprocess.run(site.login_command(ask), input=lines, capture_output=True, text=True, check=True)
    answers = done.stdout.split("\x1e")[:-1]
    wrong = [
        (refusal, each, said)
        for (refusal, each), said in zip(cases, answers, strict=True)
        if bool(refusal) == (" to start at " in said)
    ]
    assert wrong == []
    assert 100 < sum(bool(refusal) for refusal, _ in cases) < len(cases) - 100
