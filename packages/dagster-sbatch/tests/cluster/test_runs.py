"""`compute.run` on the supercomputer, as an asset and whoever looks at its run see it."""

import json
import os
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from dagster_sbatch.launchers import Launcher, RayLauncher, ScriptLauncher
from dagster_sbatch.run.compute import ComputeResource
from dagster_sbatch.slurm import SlurmRequest
from resources import PROJECT, build_resources
from slurm_in_a_box import CERTIFICATE_USER, CPU_PARTITION, SimulatedSite, wait_until
from slurm_in_a_box.slurm_configuration import ACCOUNT, LIMITED_ACCOUNT, SECOND_ACCOUNT, SPENT_ACCOUNT
from support import workload_asset
from support.background import (
    REPORTS,
    SLEEPS,
    Background,
    jobs_of,
    logins,
    nobody_left,
    only_job,
    output_there,
    runs_there,
)
from support.code_root import check_metadata, make_package, make_program
from support.ray_run import nothing_is_left
from support.workload_asset import PIPES, Outcome, materialize

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("on_supercomputer")]
SHORT = SlurmRequest(time_limit="00:10:00")


# ---- what works


@pytest.mark.smoke
def test_result_output_and_numbers(site: SimulatedSite, workloads: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (workloads / "neighbour.py").write_text("WORD = 'from beside'\n")
    before = [each.command for each in site.processes_on_login()]
    workload = (
        PIPES
        + """
    import os, sys, time, neighbour
    assert pipes.extras == {"trials": 3}
    for number in range(1000):
        print(f"line {number}" if number % 10 else "")
    print("a word to stderr", file=sys.stderr)
    ballast = bytearray(os.urandom(64 << 20))
    time.sleep(30)  # Slurm measures every 5 s, and a twentieth of this is waited for the accounting
    pipes.report_asset_check("fine", passed=True)
    where = {"run": pipes.run_id, "mine": os.environ["MINE"], "node": os.uname().nodename, "word": neighbour.WORD}
    secrets = [name for name in os.environ if name.startswith("ASC_")]
    pipes.report_asset_materialization(metadata={**where, "secrets": secrets, "data": os.environ["DATA_ROOT"]})
    """
    )
    outcome = materialize(
        workload, workloads, request=SHORT, extras={"trials": 3}, env={"MINE": "a'b $HOME"}, checks=("fine",)
    )
    assert outcome.error == ""
    assert outcome.checks == {"fine": True}
    out, err = capfd.readouterr()
    assert out.splitlines() == [f"line {number}" if number % 10 else "" for number in range(1000)]
    assert err.count("a word to stderr") == 1
    (metadata,) = outcome.materializations[None]
    assert (metadata["mine"], metadata["word"], metadata["secrets"]) == ("a'b $HOME", "from beside", [])
    assert metadata["node"] in ("n4001", "n4002", "n4003", "n4004")
    assert metadata["data"] == f"{CERTIFICATE_USER.home}/dagster-slurm/data"
    assert (metadata["partition"], metadata["qos"]) == (CPU_PARTITION, CPU_PARTITION)
    run, job = metadata["run_directory"], str(metadata["job_id"])
    assert jobs_of(site, run) == [job]
    assert (outcome.tags["deployment"], outcome.tags["site"]) == ("staging_supercomputer", "musica")
    assert outcome.tags["slurm_job/probe"] == job
    login = f"-i {os.environ['SLURM_EDGE_NODE_KEY_PATH']} {CERTIFICATE_USER.name}@{site.login.address}"
    assert metadata["attach"] == f"ssh -t {login} srun --jobid={job} --overlap --pty bash"
    assert 30 <= metadata["elapsed_seconds"] < 90
    assert metadata["queue_seconds"] >= 0
    assert metadata["node_hours"] == pytest.approx(metadata["elapsed_seconds"] / 3600, abs=1e-6)
    assert metadata["cpu_hours"] == metadata["node_hours"]
    assert "gpu_hours" not in metadata
    assert 'SlurmRequest(time_limit="00:05:00")' in metadata["proposal"]
    assert 64 < metadata["max_rss_mib"] < 1000
    assert 0 <= metadata["cpu_efficiency"] <= 1.5
    comment = site.squeue("--noheader", "--states=all", f"--jobs={job}", "--format=%k").strip()
    assert comment == f"key={run.rpartition('/')[2]},run={metadata['run']},asset=probe"
    about = json.loads(site.run_on_login(CERTIFICATE_USER, f"cat {run}/about.json").stdout)
    assert (about["run"], about["root"], about["asset"]) == (outcome.run_id, outcome.run_id, "probe")
    assert site.run_on_login(CERTIFICATE_USER, f"stat -c %a {run}").stdout.strip() == "700"
    wait_until(lambda: [each.command for each in site.processes_on_login()] == before, "nothing is left there")
    nothing_is_left(site)


def test_an_asset_check_and_an_asset_with_partitions_report_from_jobs_of_their_own(
    site: SimulatedSite, workloads: Path
) -> None:
    """What the job cost is metadata of the check, and of one of the partitions."""
    report = "for key in pipes.extras['partition_keys']:\n        "
    report += "pipes.report_custom_message({'musica.partition': {'partition': key, 'metadata': {'rows': len(key)}}})\n"
    (workloads / "probe.py").write_text(f"{PIPES}    {report}")
    (workloads / "fresh.py").write_text(
        f"{PIPES}    pipes.report_asset_check('fresh', passed=True, asset_key='probe')\n"
    )

    @dg.asset(partitions_def=dg.StaticPartitionsDefinition(["a", "bb"]), backfill_policy=dg.BackfillPolicy.single_run())
    def probe(context: dg.AssetExecutionContext, compute: ComputeResource) -> dg.MaterializeResult:
        done = compute.run(context, workload=workloads / "probe.py", launcher=ScriptLauncher(), request=SHORT)
        return done.get_materialize_result()

    @dg.asset_check(asset=probe)
    def fresh(context: dg.AssetCheckExecutionContext, compute: ComputeResource) -> dg.AssetCheckResult:
        done = compute.run(context, workload=workloads / "fresh.py", launcher=ScriptLauncher(), request=SHORT)
        return done.get_asset_check_result()

    tags = {"dagster/asset_partition_range_start": "a", "dagster/asset_partition_range_end": "bb"}
    result = dg.materialize([probe, fresh], resources=build_resources(), tags=tags)
    events = result.asset_materializations_for_node("probe")
    assert {event.partition: event.metadata["rows"].value for event in events} == {"a": 1, "bb": 2}
    assert [event.partition for event in events if "node_hours" in event.metadata] == ["a"]
    jobs = {event.metadata["job_id"].value for event in events}
    (evaluation,) = result.get_asset_check_evaluations()
    assert evaluation.passed
    assert "node_hours" in evaluation.metadata
    assert len(jobs | {evaluation.metadata["job_id"].value}) == 2


def test_a_retry_policy_starts_another_job(site: SimulatedSite, workloads: Path) -> None:
    workload = (
        PIPES
        + """
    import pathlib
    attempt = pathlib.Path.cwd().parent.name.rpartition("-")[2]
    assert attempt == "2", f"attempt {attempt}"
    pipes.report_asset_materialization(metadata={"attempt": attempt})
    """
    )
    policy = dg.RetryPolicy(max_retries=2)
    outcome = materialize(workload, workloads, request=SHORT, retry_policy=policy)
    assert outcome.error == ""
    assert [text.count("attempt 1") > 0 for text in outcome.retries] == [True]
    (metadata,) = outcome.materializations[None]
    assert metadata["attempt"] == "2"
    assert len(runs_there(site)) == 2


@pytest.mark.parametrize(
    ("make", "launcher"),
    [(make_program, ScriptLauncher()), (make_package, RayLauncher(ray_start_args=["--include-dashboard=false"]))],
    ids=["program", "package with Ray"],
)
def test_a_program_in_a_subfolder_and_a_package(
    make: Callable[..., Any], launcher: Launcher, workloads: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workload_asset, "PROJECT", replace(PROJECT, workload_folder=str(workloads)))
    path, arguments = make(workloads)
    request = SlurmRequest(time_limit="5", cpus_per_task=2, mem="3G")
    outcome = materialize(path, workloads, launcher=launcher, request=request, **arguments)
    assert outcome.error == ""
    check_metadata(outcome.materializations[None][0])


def test_which_project_is_charged(
    site: SimulatedSite, workloads: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The asset's, else the deployment's, else that of the login shell, else the user's default."""
    home = site.layout.home / CERTIFICATE_USER.name

    def charged(request: SlurmRequest) -> str:
        outcome = materialize(REPORTS, workloads, request=request)
        (metadata,) = outcome.materializations[None]
        job, project = metadata["job_id"], str(metadata["account"])
        assert f"job {job} is charged to project {project}" in capfd.readouterr().err
        assert site.squeue("--noheader", "--states=all", f"--jobs={job}", "--format=%a").strip() == project
        return project

    assert charged(SHORT) == ACCOUNT
    there = [name for name in (".bash_profile", ".bash_login", ".profile") if (home / name).exists()]
    profile = [*there, ".bash_profile"][0]
    with (home / profile).open("a") as file:  # the shell that starts the agent does not read it
        file.write(f"export SBATCH_ACCOUNT={SECOND_ACCOUNT}\n")
    assert charged(SHORT) == SECOND_ACCOUNT
    monkeypatch.setenv("SLURM_ACCOUNT", ACCOUNT)
    assert charged(SHORT) == ACCOUNT
    monkeypatch.setenv("SLURM_KEEP_WITHIN_BUDGET", "true")  # that of a project without a limit is not compared
    assert charged(SHORT.model_copy(update={"account": SECOND_ACCOUNT})) == SECOND_ACCOUNT
    runs = runs_there(site)
    request = SlurmRequest(account=LIMITED_ACCOUNT, gpus_per_node=1, time_limit="10:01:00")
    refused = materialize(REPORTS, workloads, request=request)
    assert "could cost 10.02 GPU-hours (1 node x 1 GPU x 10:01:00)" in refused.error
    assert f"free: of 10 GPU-hours (GrpTRESMins of {LIMITED_ACCOUNT}), " in refused.error
    assert runs_there(site) == runs
    assert "SLURM_KEEP_WITHIN_BUDGET: " not in capfd.readouterr().err  # Slurm has told everything


def test_a_run_takes_one_connection_and_one_channel(site: SimulatedSite, workloads: Path) -> None:
    begun = "Starting session: command"
    assert materialize(REPORTS, workloads, request=SHORT).error == ""  # the certificate is there, the environment too
    connections, channels = (sum(logins(site, said).values()) for said in ("Accepted publickey", begun))
    assert materialize(REPORTS, workloads, request=SHORT).error == ""
    assert sum(logins(site).values()) == connections + 1
    assert sum(logins(site, begun).values()) == channels + 1


@pytest.mark.smoke
def test_a_line_is_seen_while_the_workload_runs(site: SimulatedSite, workloads: Path) -> None:
    """The workload ends only once its own line has come out at the other side."""
    workload = (
        PIPES
        + f"""
    import pathlib, time
    print("waiting to be seen", flush=True)
    deadline = time.monotonic() + 60
    while not pathlib.Path("{CERTIFICATE_USER.home}/seen").exists():
        assert time.monotonic() < deadline, "nobody saw the line"
        time.sleep(0.05)
    pipes.report_asset_materialization()
    """
    )
    output = workloads.parent / "output"

    class Watching:
        """Stands where the step's stdout is."""

        def write(self, text: str) -> None:
            if "waiting to be seen" in text:
                output.touch()
                site.run_on_login(CERTIFICATE_USER, "touch seen")

        def flush(self) -> None:
            pass

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", Watching())
        outcome = materialize(workload, workloads, request=SHORT)
    assert outcome.error == ""
    assert output.exists()


def test_names_with_spaces_quotes_and_dollars(
    site: SimulatedSite, workloads: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = f"{CERTIFICATE_USER.home}/a'; echo $HOME `id` \"b"
    monkeypatch.setenv("SLURM_DEPLOYMENT_BASE_PATH", base)
    monkeypatch.setenv("DATA_ROOT", "~/data 'root' $HOME")
    workload = (
        PIPES
        + """
    import os
    (key,) = pipes.extras["partition_keys"]
    pipes.report_asset_materialization(metadata={"key": key, "data": os.environ["DATA_ROOT"]})
    """
    )
    path = workloads / "the 'work' load $HOME.py"
    path.write_text(workload)
    key = "a'; echo $HOME `id`"
    outcome = materialize(path, workloads, request=SHORT, partitions=(key, "b"), partition_key=key)
    assert outcome.error == ""
    (metadata,) = outcome.materializations[key]
    assert metadata["key"] == key
    assert metadata["data"] == f"{CERTIFICATE_USER.home}/data 'root' $HOME"
    assert metadata["run_directory"].startswith(f"{base}/runs/probe-")


def test_twelve_partitions_and_two_dagster_instances_at_once(site: SimulatedSite, tmp_path: Path) -> None:
    """Each `materialize` has an instance of its own; each workload waits until it is not alone."""
    keys = tuple(f"2013-{month:02}" for month in range(1, 13))
    workload = (
        PIPES
        + f"""
    import pathlib, time
    (key,) = pipes.extras["partition_keys"]
    print(key)
    folder = pathlib.Path("{CERTIFICATE_USER.home}")
    (folder / f"runs-{{key}}").touch()
    deadline = time.monotonic() + 240
    while len(list(folder.glob("runs-*"))) < 12:
        assert time.monotonic() < deadline, "the others never ran"
        time.sleep(0.1)
    pipes.report_asset_materialization(metadata={{"key": key}})
    """
    )

    def run(key: str) -> Callable[[], Outcome]:
        folder = tmp_path / key
        folder.mkdir()
        return lambda: materialize(workload, folder, request=SHORT, partitions=keys, partition_key=key)

    outcomes = {key: each.outcome(300) for key, each in [(key, Background(run(key))) for key in keys]}
    jobs = set()
    for key, outcome in outcomes.items():
        assert outcome.error == ""
        (metadata,) = outcome.materializations[key]
        assert metadata["key"] == key
        jobs.add(metadata["job_id"])
        assert jobs_of(site, metadata["run_directory"]) == [str(metadata["job_id"])]
        name = shlex.quote(metadata["run_directory"])
        assert site.run_on_login(CERTIFICATE_USER, f"cat {name}/stdout").stdout == f"{key}\n"
    assert len(jobs) == len(runs_there(site)) == 12
    nobody_left(site)


# ---- what does not


BAD_WORKLOADS = {
    "exits 3": ("import sys\nprint('last words', file=sys.stderr)\nsys.exit(3)", ["exit code 3", "last words"]),
    "raises in Pipes": (PIPES + "    raise KeyError('why')", ["raised KeyError: 'why'", "probe workload.py", "line 4"]),
    "raises after a materialization": (REPORTS + "    raise ValueError('too late')", ["raised ValueError: too late"]),
    "leaves in the middle": (PIPES + "    import os; os._exit(0)", ["without closing its Dagster Pipes session"]),
    "is killed": ("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)", ["killed by SIGSEGV"]),
}


@pytest.mark.smoke
@pytest.mark.parametrize("name", BAD_WORKLOADS)
def test_a_workload_that(name: str, site: SimulatedSite, workloads: Path) -> None:
    workload, texts = BAD_WORKLOADS[name]
    outcome = materialize(workload, workloads, request=SHORT)
    assert not outcome.success
    assert outcome.materializations == {}
    for text in (*texts, "\n\nSlurm job ", ", run directory on ", f"{CERTIFICATE_USER.home}/dagster-slurm/runs/probe-"):
        assert text in outcome.error
    assert outcome.retries == []
    assert len(runs_there(site)) == 1
    nothing_is_left(site)


@pytest.mark.smoke
def test_cancelled_by_an_administrator(site: SimulatedSite, workloads: Path) -> None:
    run = Background(lambda: materialize(SLEEPS, workloads, request=SHORT))
    wait_until(lambda: "begun" in output_there(site), "it runs", 60)
    site.faults.cancel_job(only_job(site, "RUNNING"))
    outcome = run.outcome()
    assert "it was cancelled on the cluster, by scancel or by its administrators (Slurm: CANCELLED)" in outcome.error
    assert outcome.retries == []
    nothing_is_left(site)


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("request_", "text"),
    [
        (SlurmRequest(nodelist="n4009"), "Invalid node name specified"),
        (
            SlurmRequest(account="nobody"),
            "'nobody' is not a project of yours. Name one of yours (p70001, p70600, p71234, p75678)",
        ),
        (SlurmRequest(account=SPENT_ACCOUNT), f"Project {SPENT_ACCOUNT} may not use QoS {CPU_PARTITION}, only idle_"),
    ],
)
def test_what_slurm_refuses_is_told_in_its_words(
    request_: SlurmRequest, text: str, site: SimulatedSite, workloads: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    outcome = materialize(REPORTS, workloads, request=request_)
    assert "[pipes]" not in capfd.readouterr().err  # Dagster's words: no process was to send messages
    assert "refused on the supercomputer" in outcome.error
    assert "Run directory" not in outcome.error  # no job has written into it
    assert text in outcome.error
    assert outcome.retries == []
