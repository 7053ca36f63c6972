"""Ray over an allocation, with the real Slurm and the real Ray: what works."""

import json
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from dagster_sbatch.inspect.dashboard import Dashboard, open_dashboard
from dagster_sbatch.inspect.remote_runs import open_runs
from dagster_sbatch.launchers import RayLauncher
from resources import PROJECT
from slurm_in_a_box import SimulatedSite, wait_until
from support.background import STRESS, jobs_of, logins, nobody_left, rows_of, runs_there
from support.ray_run import CONNECT, FEW_CPUS, HANG, RayRun, nothing_is_left
from support.step import Step, kill

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("on_supercomputer")]
STARTS = 20 if STRESS else 2


@pytest.mark.smoke
def test_two_nodes_with_four_gpus_each(site: SimulatedSite, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """What an earlier Ray has left in the home leads nowhere: another cluster's address, a token for all to read."""
    home = site.layout.home / "xy12345"
    for name in (".profile", ".bash_profile", ".bashrc"):
        with (home / name).open("a") as file:
            file.write("export RAY_ADDRESS=10.9.9.9:6379 RAY_AUTH_TOKEN=foreign RAY_NAMESPACE=foreign\n")
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text("0" * 64)
    workload = (
        CONNECT
        + """
    import resource, stat, subprocess
    total = ray.cluster_resources()
    (temporary,) = pathlib.Path("/local").glob("r-*")
    token = pathlib.Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    stolen = {**os.environ, "RAY_AUTH_TOKEN": "0" * 64}
    import sys
    strange = subprocess.run([sys.executable, "-c", "import ray; ray.init(log_to_driver=False)"], env=stolen,
                             capture_output=True, text=True)
    import grpc, re
    servers = subprocess.run(["pgrep", "-af", "ray.util.client.server"], capture_output=True, text=True, check=True)
    host, port = os.environ["RAY_ADDRESS"].split(":")[0], re.search(r"--port=(\\d+)", servers.stdout)[1]
    try:
        ask = grpc.insecure_channel(f"{host}:{port}").unary_unary("/ray.rpc.RayletDriver/ClusterInfo")
        ask(b"", timeout=120, wait_for_ready=True)
        client_server = "open"
    except grpc.RpcError as error:
        client_server = error.code().name
    limit = ray.get(ray.remote(num_gpus=1)(lambda: resource.getrlimit(resource.RLIMIT_NOFILE)).remote())

    def meet(number):
        '''The GPU of a task that ends when all eight have one.'''
        (home / f"task-{number}").touch()
        while len(list(home.glob("task-*"))) < 8:
            time.sleep(0.1)
        return ray.get_gpu_ids()

    tasks = [ray.remote(num_gpus=1)(meet).remote(number) for number in range(8)]
    pipes.report_asset_materialization(metadata={
        "hosts": hosts(), "gpus": total["GPU"], "cpus": total["CPU"],
        "memory": (total["memory"] + total["object_store_memory"]) / 2**30,
        "gpu_ids": sorted(int(gpu) for ids in ray.get(tasks) for gpu in ids),
        "client_server": client_server,
        "strange": strange.returncode, "why": strange.stderr[-2000:], "limit": limit[0] == limit[1] or limit[0],
        "modes": [stat.S_IMODE(path.stat().st_mode) for path in (token, token.parent, temporary)],
        "end": int(os.environ["SLURM_JOB_END_TIME"]) - time.time(),
    })
    """
    )
    run = RayRun(site, tmp_path, workload, nodes=2, gpus_per_node=4, cpus_per_task=4)
    outcome = run.finish()
    assert outcome.error == ""
    (metadata,) = outcome.materializations[None]
    assert metadata["hosts"] == ["g4001", "g4002"]
    assert (metadata["gpus"], metadata["cpus"], metadata["memory"]) == (8, 8, pytest.approx(6, abs=0.01))
    assert metadata["gpu_ids"] == sorted([0, 1, 2, 3] * 2)
    assert metadata["client_server"] == "UNAUTHENTICATED"
    assert metadata["strange"] != 0
    assert "token" in metadata["why"].lower()
    assert metadata["modes"] == [0o600, 0o700, 0o700]
    assert 0 < metadata["end"] <= 600
    err = capfd.readouterr().err
    raised = metadata["limit"] == 65536 or "ulimit -n 65536: failed on g4001; the job continues" in err
    assert raised, (metadata["limit"], err)
    folder = site.layout.home / Path(str(metadata["run_directory"])).relative_to("/home")
    for node in ("g4001", "g4002"):
        with tarfile.open(folder / "ray" / f"logs-{node}.tar.gz") as archive:
            assert any(name.endswith("raylet.out") for name in archive.getnames())
    nothing_is_left(site, "g4001", "g4002")


@contextmanager
def opened(number: int) -> Iterator[Dashboard]:
    """The way to a job's dashboard, as scripts/job opens it."""
    settings, site = PROJECT.load_settings(), PROJECT.load_site("musica")
    with (
        open_runs(settings, PROJECT) as runs,
        open_dashboard(settings, site, runs, runs.find(str(number))[-1]) as dashboard,
    ):
        yield dashboard


def pages(dashboard: Dashboard) -> tuple[str, int, int]:
    """What a browser gets: the page, its nodes with the token, and without."""
    with httpx.Client(base_url=dashboard.url, timeout=60) as client:
        nodes = client.get("/api/v0/nodes", headers={"Authorization": f"Bearer {dashboard.token}"})
        return client.get("/").text, nodes.status_code, client.get("/api/v0/nodes").status_code


WAITS = (
    CONNECT
    + """
    print("begun on", *hosts(), flush=True)
    for name in ("reconnected", "adopted"):
        wait_for(name)
        print(name, "on", *hosts(), flush=True)
    pipes.report_asset_materialization(metadata={"hosts": hosts()})
    """
)


def test_two_jobs_on_one_node(site: SimulatedSite, tmp_path: Path, step_variables: dict[str, str]) -> None:
    """Each has a dashboard, to which the way closes with the job. One is cancelled, which the other does not notice.

    The step of the other job loses its connection, is killed, and executed again: it attaches to the same Ray cluster.
    """
    other = Step(tmp_path / "step", step_variables, WAITS)
    other.call(launcher="RayLauncher", cpus_per_task=FEW_CPUS, mem="3G", nodes=2, nodelist="n4002,n4003")
    process = other.start(again=False)
    run = RayRun(site, tmp_path, HANG, nodelist="n4002")
    run.wait_until_ready()
    wait_until(lambda: other.output == "begun on n4002 n4003\n", "the other workload runs", 300)
    (other_job,) = {int(job) for job, state in rows_of(site, "%i %T") if state == "RUNNING"} - {run.job}
    with opened(other_job) as dashboard:
        page, with_token, without = pages(dashboard)
    assert "<title>Ray Dashboard</title>" in page
    assert (with_token, without) == (200, 401)
    heads = [json.loads(path.read_text()) for path in run.home.glob("dagster-slurm/runs/*/ray/state/head.json")]
    assert len({head["ray_address"] for head in heads}) == 2
    assert len({str(head["dashboard_address"]) for head in heads}) == 2
    with opened(run.job) as dashboard:
        site.cluster.query("scancel", "--full", str(run.job))
        dashboard.wait_until_gone()
    assert "CANCELLED" in run.finish().error

    before = logins(site)
    site.faults.drop_connections()
    (run.home / "reconnected").touch()
    wait_until(lambda: other.output.endswith("reconnected on n4002 n4003\n"), "the output after the reconnection", 180)
    assert sum(logins(site).values()) > sum(before.values())
    kill(process)
    process = other.start(again=True)
    adopted = f"Slurm job {other_job} was submitted by an earlier run of this step"
    wait_until(lambda: adopted in other.log, "the job is adopted", 180)
    (run.home / "adopted").touch()
    success, error, metadata = other.result(process)
    assert (success, error) == (True, "")
    assert (metadata["job_id"], metadata["hosts"]) == (other_job, ["n4002", "n4003"])
    assert other.output == "".join(f"{word} on n4002 n4003\n" for word in ("begun", "reconnected", "adopted"))
    assert other.materializations() == 1
    assert [len(jobs_of(site, each)) for each in runs_there(site)] == [1, 1]
    nothing_is_left(site, "n4002", "n4003")
    nobody_left(site)


def test_many_starts_under_load(site: SimulatedSite, tmp_path: Path) -> None:
    """Two at a time, beside each other on the same nodes; with STRESS=1 twenty.

    Nothing listens where the workers of every cluster would look for a port by default: two found the same one free.
    """
    workload = (
        CONNECT
        + """
    def listens():
        for table in (pathlib.Path("/proc/net/tcp"), pathlib.Path("/proc/net/tcp6")):
            for line in table.read_text().splitlines()[1:]:
                _, local, _, state, *_ = line.split()
                if state == "0A":
                    yield int(local.rpartition(":")[2], 16)

    everywhere = hosts()
    shared = [port for port in listens() if 10002 <= port <= 19999]
    pipes.report_asset_materialization(metadata={"hosts": everywhere, "shared_ports": shared})
    """
    )
    launcher = RayLauncher(ray_start_args=["--include-dashboard=false"], collect_logs=False)
    names = [f"start-{number}" for number in range(STARTS)]
    for pair in (names[n : n + 2] for n in range(0, STARTS, 2)):
        for run in [
            RayRun(site, tmp_path, workload, name=name, launcher=launcher, nodes=2, nodelist="n4001,n4003")
            for name in pair
        ]:
            outcome = run.finish()
            assert outcome.error == ""
            (metadata,) = outcome.materializations[None]
            assert (metadata["hosts"], metadata["shared_ports"]) == (["n4001", "n4003"], [])
    nothing_is_left(site, "n4001", "n4003")
