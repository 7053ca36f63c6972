"""What jobs cost, as a person sees it in Dagster: an attempt with more memory, a proposal, a budget that ends."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, expect

from slurm_in_a_box import GPU_PARTITION, SimulatedSite, wait_until
from slurm_in_a_box.layout import DATABASE
from slurm_in_a_box.slurm_configuration import LIMITED_ACCOUNT, LIMITED_GPU_MINUTES
from support import ROOT
from support.background import MEASURED
from support.browser import open_failure, open_ui, take
from support.dagster_dev import DagsterDev
from support.workload_asset import EATS, PIPES

LOCATION = f"""
from dagster_sbatch import Retries

@dg.asset
def trains(context: dg.AssetExecutionContext, compute: ComputeResource) -> dg.MaterializeResult:
    request = eval((FOLDER / "request.txt").read_text())  # a person edits it
    done = compute.run(context, workload=FOLDER / "workloads" / "trains.py", launcher=ScriptLauncher(), request=request)
    return done.get_materialize_result()

@dg.asset
def waits_for_money(context: dg.AssetExecutionContext, compute: ComputeResource) -> dg.MaterializeResult:
    place = {{"partition": "{GPU_PARTITION}", "account": "{LIMITED_ACCOUNT}"}}
    request = SlurmRequest(gpus_per_node=4, time_limit="00:30:00", **place)
    done = compute.run(context, workload=FOLDER / "workloads" / "trains.py", launcher=ScriptLauncher(), request=request)
    return done.get_materialize_result()
"""
"""Two assets of a location that has FOLDER."""
REQUEST = f"""SlurmRequest(
    gpus_per_node=4, cpus_per_task=2, mem="200M", time_limit="00:30:00", partition="{GPU_PARTITION}",
    retries=Retries(max_mem="4G", factor=4),
)"""
PREVIEW = """\
import runpy, sys
from dataclasses import replace
from pathlib import Path
from dagster_sbatch.commands import preview
from resources import PROJECT
project, location = replace(PROJECT, root=Path(sys.argv.pop(1))), sys.argv.pop(1)
raise SystemExit(preview.main(project, runpy.run_path(location)["defs"]))
"""
OBSERVATIONS = """
    query Observations($path: [String!]!) { assetOrError(assetKey: {path: $path}) { ... on Asset {
      assetObservations { metadataEntries { label ... on FloatMetadataEntry { floatValue } } } } } }"""
LEFT, USED = (f"{LIMITED_ACCOUNT}_gpu_hours_{name}" for name in ("left", "used"))
SECONDS = 50 if os.environ.get("UPDATE_SCREENSHOTS") else 4


def write(folder: Path, site: SimulatedSite) -> None:
    """Write the request and the workload; the folder has a subfolder `workloads`."""
    (folder / "request.txt").write_text(REQUEST)
    device = f"open('{site.layout.run}/gpus/nvidia' + os.environ['CUDA_VISIBLE_DEVICES'].split(',')[0])"
    report = f"{PIPES}    pipes.report_asset_materialization()\n"
    (folder / "workloads" / "trains.py").write_text(
        f"{MEASURED}import sys\n{EATS}\ngpu = {device}\nwait_until_measured({SECONDS})\n{report}"
    )


class CostsStory:
    """Plays it, while others use the same Dagster and the nodes without GPUs.

    Attributes:
        jobs: number of Slurm jobs that it takes.
    """

    jobs = 2 + 1 + 2

    def __init__(self, server: DagsterDev, site: SimulatedSite, folder: Path, pictures: Path) -> None:
        """`folder`: see `write`; it has the code location, `location.py`."""
        self._server, self._site, self._folder, self._pictures = server, site, folder, pictures

    def play(self) -> None:
        """Play all of it."""
        with open_ui(self._server.url) as page:
            page.goto("about:blank")  # an open page of the UI asks for news all the time
            before = self._observe()
            assert before[LEFT] > 9
            self._run_out_of_memory(page)
            busy = self._fill_gpus()
            self._follow_the_proposal(busy)
            self._end(busy)
            self._see_the_budget_end(page, before)

    def _run_out_of_memory(self, page: Page) -> None:
        """The first attempt has too little memory, the second one enough."""
        run = self._server.launch("trains", location="probe")
        assert self._server.wait(run) == "SUCCESS"
        page.goto("/assets/trains")
        expect(page.get_by_text("attempts", exact=True)).to_be_visible()
        attempts = page.locator("table", has_text="ran out of memory").last
        for text in ("mem=200M", "mem=800M", "succeeded"):
            expect(attempts.get_by_text(text).first).to_be_visible()
        expect(page.get_by_text(re.compile("^GPU [▁▂▃▄▅▆▇█]+ "))).to_be_visible()
        page.set_viewport_size({"width": 2350, "height": 900})  # the costs of an attempt are right of its cause
        page.locator("tr", has_text="trains.py").last.evaluate("row => row.hidden = true")  # a path of this machine
        attach = page.get_by_text(re.compile("^ssh -t -i /"))  # here the site's key is not in ~/.ssh
        attach.evaluate("command => { command.textContent = command.textContent.replace(/-i .*\\//, '-i ~/.ssh/') }")
        row = page.locator("tr", has_text="ran out of memory").first
        row.evaluate("row => row.scrollIntoView({block: 'end', inline: 'start'})")
        take(page, "attempts.png", self._pictures)
        page.goto("about:blank")

    def _fill_gpus(self) -> list[int]:
        """Let jobs of the project with a limit use six of the eight GPUs for an hour."""
        where = [f"--account={LIMITED_ACCOUNT}", f"--partition={GPU_PARTITION}", f"--qos={GPU_PARTITION}"]
        where += ["--nodes=1", "--cpus-per-task=1", "--time=60"]
        jobs = [self._site.submit("sleep 3600", *where, f"--gres=gpu:{gpus}") for gpus in (4, 2)]
        for job in jobs:
            self._site.wait_for_job(job, "RUNNING")
        return jobs

    def _follow_the_proposal(self, busy: list[int]) -> None:
        """Slurm would start the proposed request at once, and it does: other jobs still have the GPUs of the first."""
        said = self._preview("trains", "--test-only")
        proposal = re.search(
            r"the proposed request, (SlurmRequest\(.*\)), would start at .*: 00:5\d:\d\d earlier", said
        )
        assert proposal, said
        assert re.search(r'gpus_per_node=[12], mem="1G", time_limit="00:05:00", ', proposal[1]), said
        (self._folder / "request.txt").write_text(proposal[1])
        run = self._server.launch("trains", location="probe")
        assert self._server.wait(run) == "SUCCESS"
        assert {self._site.job_state(job) for job in busy} == {"RUNNING"}

    def _preview(self, *words: str) -> str:
        """Return what `scripts/preview` of the project prints."""
        command = [sys.executable, "-c", PREVIEW, f"{self._server.folder}", f"{self._folder}/location.py", *words]
        done = subprocess.run(
            command, cwd=ROOT, env=self._server.environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return str(done.stdout)

    def _end(self, busy: list[int]) -> None:
        """End the jobs on six GPUs when they have used a GPU-minute."""
        wait_until(lambda: all(seconds > 10 for seconds in self._elapsed(busy)), "a GPU-minute is used", 60)
        self._site.cluster.query("scancel", *map(str, busy))
        for job in busy:
            self._site.wait_for_job(job, "CANCELLED")

    def _elapsed(self, jobs: list[int]) -> list[int]:
        """Return for how many seconds jobs have run, as squeue says (MINUTES:SECONDS)."""
        said = self._site.cluster.query("squeue", "--noheader", "--format=%M", f"--jobs={','.join(map(str, jobs))}")
        return [60 * int(minutes) + int(seconds) for minutes, seconds in re.findall(r"(\d+):(\d+)", said)]

    def _see_the_budget_end(self, page: Page, before: dict[str, float]) -> None:
        """The jobs have used a GPU-minute, and the limit is lowered to that: ten hours take eight GPUs 75 minutes."""
        minutes = round(before[USED] * 60)
        try:
            set_limit(self._site, minutes + 1)
            after = self._observe()
            assert after[USED] >= before[USED] + 1 / 60 - 1e-3
            assert after[LEFT] <= 0
            page.goto("/assets/musica_budget")
            expect(page.get_by_text(LEFT, exact=True)).to_be_visible()
            page.get_by_text("Plots", exact=True).click()
            expect(page.locator("canvas").first).to_be_visible()
            page.goto("/assets/musica_budget?view=checks")
            expect(page.get_by_text("budget_lasts", exact=True).first).to_be_visible()
            expect(page.get_by_text("Failed", exact=True).first).to_be_visible()
            page.set_viewport_size({"width": 1400, "height": 540})
            take(page, "budget-check.png", self._pictures)
            run = self._server.launch("waits_for_money", location="probe")
            assert self._server.wait(run) == "FAILURE"
        finally:
            set_limit(self._site, LIMITED_GPU_MINUTES)
        failure = open_failure(page, run)
        cost = f"could cost 2 GPU-hours (1 node x 4 GPUs x 00:30:00). Project {LIMITED_ACCOUNT} has 0 free: of"
        expect(failure.get_by_text(cost)).to_be_visible()
        expect(failure.get_by_text("SLURM_KEEP_WITHIN_BUDGET is set, so nothing is submitted.")).to_be_visible()
        upper = failure.bounding_box()
        assert upper
        take(page, "budget-refusal.png", self._pictures, {**upper, "height": 190})  # what follows are paths

    def _observe(self) -> dict[str, float]:
        """Execute the check, and return the numbers that it records."""
        run = self._server.execute_check("musica_budget", "budget_lasts")
        assert self._server.wait(run) == "SUCCESS"
        found = self._server.ask(OBSERVATIONS, path=["musica_budget"])["assetOrError"]["assetObservations"]
        newest: list[dict[str, Any]] = found[0]["metadataEntries"]
        return {entry["label"]: entry["floatValue"] for entry in newest if "floatValue" in entry}


def set_limit(site: SimulatedSite, minutes: int) -> None:
    """Set the GPU-minutes that the jobs of LIMITED_ACCOUNT may use; slurmctld has them at once."""
    change = ["modify", "account", LIMITED_ACCOUNT, "set", f"GrpTRESMins=gres/gpu={minutes}"]
    site.machines[DATABASE.hostname].run(["sacctmgr", "--immediate", "--quiet", *change])
    known = ("sshare", "--noheader", "--parsable2", f"--accounts={LIMITED_ACCOUNT}", "--format=GrpTRESMins")
    wait_until(lambda: f"gres/gpu={minutes}\n" in site.cluster.query(*known), "slurmctld has the limit", 60)
