"""Workloads on this machine: what reaches them, what comes back, and everything that can be wrong with one."""

import errno
import os
import sys
import threading
from pathlib import Path

import dagster as dg
import pytest

from dagster_sbatch.launchers import RayLauncher
from dagster_sbatch.run.compute import ComputeResource
from dagster_sbatch.slurm import SlurmRequest
from support.dagster_dev import gone, wait_for
from support.workload_asset import PIPES, materialize

pytestmark = pytest.mark.local


@pytest.fixture(autouse=True)
def data_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "data root"
    monkeypatch.setenv("DATA_ROOT", str(folder))
    return folder


# ---- what works


def test_a_workload_reports_metadata_checks_and_gets_its_extras(tmp_path: Path, data_root: Path) -> None:
    workload = (
        PIPES
        + """
    import os
    assert pipes.extras == {"trials": 3, "nested": {"a": [1, None]}}, pipes.extras
    assert os.environ["DATA_ROOT"] == pipes_root and os.environ["MINE"] == "a'b $HOME"
    pipes.report_asset_check("fine", passed=True)
    pipes.report_asset_materialization(metadata={"rows": 7})
    """.replace("pipes_root", repr(str(data_root)))
    )
    extras = {"trials": 3, "nested": {"a": [1, None]}}
    outcome = materialize(workload, tmp_path, extras=extras, env={"MINE": "a'b $HOME"}, checks=("fine",))
    assert outcome.error == ""
    (metadata,) = outcome.materializations[None]
    assert metadata["rows"] == 7
    assert metadata["workload_seconds"] > 0
    assert outcome.checks == {"fine": True}


def test_no_secret_and_no_setting_reaches_a_workload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "ASC_OIDC_APP_PASSWORD",
        "ASC_AUTHENTIK_API_TOKEN",
        "SLURM_QOS",
        "AWS_SECRET_ACCESS_KEY",
        "RAY_ADDRESS",
    ):
        monkeypatch.setenv(name, "zen4_0768")
    workload = (
        PIPES
        + """
    import os
    pipes.report_asset_materialization(metadata={"names": sorted(os.environ)})
    """
    )
    outcome = materialize(workload, tmp_path, launcher=RayLauncher())
    names = set(outcome.materializations[None][0]["names"])
    allowed = {name for name in os.environ if name.startswith("LC_")}
    allowed |= set("PATH HOME USER LOGNAME SHELL LANG LANGUAGE TZ TMPDIR TERM VIRTUAL_ENV CONDA_PREFIX PWD".split())
    allowed |= {
        "SSL_CERT_FILE",
        "SSL_CERT_DIR",
        "OMP_NUM_THREADS",
        "OMP_WAIT_POLICY",
        "LD_LIBRARY_PATH",
        "CUDA_HOME",
        "CUDA_VISIBLE_DEVICES",
    }
    allowed |= {
        "DATA_ROOT",
        "PYTHONPATH",
        "PYTHONUNBUFFERED",
        "PYTHONUTF8",
        "RAY_AUTH_MODE",
        "RAY_AUTH_TOKEN",
        "RAY_USAGE_STATS_ENABLED",
        "DAGSTER_PIPES_CONTEXT",
        "DAGSTER_PIPES_MESSAGES",
    }
    assert names <= allowed


def test_output_passes_through_as_it_is_written(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    workload = (
        PIPES
        + """
    import sys, pathlib, time
    print("first")
    print("to stderr", file=sys.stderr)
    sys.stdout.buffer.write(b"caf\\xc3\\xa9 \\xff\\n")
    sys.stdout.flush()
    pipes.report_asset_materialization()
    """
    )
    assert materialize(workload, tmp_path).success
    out, err = capfd.readouterr()
    assert out == "first\ncafé \ufffd\n"
    assert "to stderr\n" in err


def test_output_is_seen_while_the_workload_runs(tmp_path: Path) -> None:
    """The workload ends only once its own line has come out at the other side."""
    seen = tmp_path / "seen"
    workload = (
        PIPES
        + f"""
    import pathlib, time
    print("waiting to be seen")
    deadline = time.monotonic() + 30
    while not pathlib.Path({str(seen)!r}).exists():
        assert time.monotonic() < deadline, "nobody saw the line"
        time.sleep(0.01)
    pipes.report_asset_materialization()
    """
    )

    class Watching:
        """Stands where the step's stdout is."""

        def write(self, text: str) -> None:
            if "waiting to be seen" in text:
                seen.touch()

        def flush(self) -> None:
            pass

    before, sys.stdout = sys.stdout, Watching()
    try:
        outcome = materialize(workload, tmp_path)
    finally:
        sys.stdout = before
    assert outcome.error == ""


def test_a_hundred_thousand_lines_come_once_each_in_order(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    workload = (
        PIPES
        + """
    for number in range(100_000):
        print(f"line {number}" if number % 10 else "")
    pipes.report_asset_materialization()
    """
    )
    assert materialize(workload, tmp_path).success
    lines = capfd.readouterr().out.splitlines()
    assert lines == [f"line {number}" if number % 10 else "" for number in range(100_000)]


def test_a_context_of_a_megabyte(tmp_path: Path) -> None:
    workload = (
        PIPES
        + """
    pipes.report_asset_materialization(metadata={"length": len(pipes.extras["text"])})
    """
    )
    outcome = materialize(workload, tmp_path, extras={"text": "x" * 1_000_000})
    assert outcome.materializations[None][0]["length"] == 1_000_000


def test_two_partitions_at_once_share_nothing(tmp_path: Path) -> None:
    """Each workload waits until the other one runs, then looks at what it was given."""
    workload = (
        PIPES
        + f"""
    import pathlib, time
    (key,) = pipes.extras["partition_keys"]
    folder = pathlib.Path({str(tmp_path)!r})
    (folder / f"runs-{{key}}").touch()
    deadline = time.monotonic() + 60
    while len(list(folder.glob("runs-*"))) < 2:
        assert time.monotonic() < deadline, "the other one never ran"
        time.sleep(0.01)
    pipes.report_asset_materialization(metadata={{"key": key}})
    """
    )
    outcomes = {}

    def run(key: str) -> None:
        folder = tmp_path / key
        folder.mkdir()
        outcomes[key] = materialize(workload, folder, partitions=("a", "b"), partition_key=key)

    threads = [threading.Thread(target=run, args=(key,)) for key in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for key in ("a", "b"):
        assert outcomes[key].error == ""
        assert outcomes[key].materializations[key][0]["key"] == key


# ---- what a workload can do wrong


BAD_WORKLOADS = {
    "exits 3": ("import sys\nprint('last words', file=sys.stderr)\nsys.exit(3)", ["exit code 3", "last words"]),
    "is killed": ("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)", ["killed by SIGSEGV"]),
    "runs out of memory": ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", ["SIGKILL", "memory runs out"]),
    "raises": (
        "raise RuntimeError('before Pipes')",
        ["exit code 1", "RuntimeError: before Pipes", "probe workload.py"],
    ),
    "raises in Pipes": (PIPES + "    raise KeyError('why')", ["raised KeyError: 'why'", "probe workload.py", "line 4"]),
    "raises after a materialization": (
        PIPES + "    pipes.report_asset_materialization(metadata={'rows': 1})\n    raise ValueError('too late')",
        ["raised ValueError: too late"],
    ),
    "says what is wrong and exits": (PIPES + "    raise SystemExit('no data for 2013-01')", ["no data for 2013-01"]),
    "never opens Pipes": ("print('done')", ["without opening a Dagster Pipes session", "open_dagster_pipes()"]),
    "never closes": (
        "from dagster_pipes import open_dagster_pipes\nopen_dagster_pipes().report_asset_materialization()",
        ["without closing its Dagster Pipes session", "or its work is not inside `with open_dagster_pipes()`"],
    ),
    "leaves in the middle": (PIPES + "    import os; os._exit(0)", ["without closing its Dagster Pipes session"]),
    "closes and then fails": (
        PIPES + "    pipes.report_asset_materialization()\nraise SystemExit(9)",
        ["exit code 9"],
    ),
}


@pytest.mark.parametrize("name", BAD_WORKLOADS)
def test_a_workload_that(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    workload, texts = BAD_WORKLOADS[name]
    outcome = materialize(workload, tmp_path)
    log = capfd.readouterr().err
    assert "STEP_FAILURE" in log
    assert "[pipes] did not receive" not in log  # Dagster's advice, beside what the failure says
    assert not outcome.success
    assert "probe: " in outcome.error
    for text in texts:
        assert text in outcome.error
    assert outcome.materializations == {}


def test_a_workload_that_writes_rubbish_among_its_messages(tmp_path: Path) -> None:
    workload = (
        PIPES
        + """
    import os
    from dagster_pipes import decode_param
    with open(decode_param(os.environ["DAGSTER_PIPES_MESSAGES"])["path"], "a") as file:
        file.write("rubbish\\n")
    pipes.report_asset_materialization()
    """
    )
    outcome = materialize(workload, tmp_path)
    assert "not a Dagster Pipes message" in outcome.error
    assert outcome.materializations == {}


@pytest.mark.parametrize("place", ["LocalProcess", "temporary_run_directory"])
def test_a_process_that_cannot_be_started(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(f"dagster_sbatch.run.local_run.{place}", refuse)
    outcome = materialize("", tmp_path)
    assert f"\nprobe: its process could not be started: [Errno {errno.ENOSPC}] No space left" in outcome.error


# ---- what an asset can ask for that cannot work


def test_a_workload_that_does_not_exist(tmp_path: Path) -> None:
    outcome = materialize(tmp_path / "no such.py", tmp_path)
    assert f"probe: the workload {tmp_path}/no such.py does not exist" in outcome.error


def test_a_workload_with_a_syntax_error_is_not_even_started(tmp_path: Path) -> None:
    outcome = materialize("x = 1\nfor x in\n", tmp_path)
    assert "probe workload.py, line 2: " in outcome.error


def test_extras_that_are_not_json(tmp_path: Path) -> None:
    outcome = materialize("", tmp_path, extras={"fine": 1, "bad": {1, 2}})
    assert "extras['bad'] cannot be sent to the workload as JSON" in outcome.error


@pytest.mark.parametrize(
    ("request_", "text"),
    [
        (SlurmRequest(gpus_per_node=5), "gpus_per_node=5: a node of partition zen4_0768_h100x4 has 4"),
        (SlurmRequest(qos="zen4_0768", gpus_per_node=1), "qos='zen4_0768' is not a QoS of partition zen4_0768_h100x4"),
    ],
)
def test_a_request_that_the_supercomputer_would_refuse_fails_here_too(
    request_: SlurmRequest, text: str, tmp_path: Path
) -> None:
    outcome = materialize("", tmp_path, request=request_)
    assert f"probe: {text}" in outcome.error


def test_a_request_that_is_wrong_in_itself_fails_the_asset_that_makes_it() -> None:
    @dg.asset
    def probe(context: dg.AssetExecutionContext, compute: ComputeResource) -> None:
        compute.run(context, workload="w.py", launcher=RayLauncher(), request=SlurmRequest(time_limit="2h"))

    resources = {"compute": ComputeResource(site_overrides={})}
    result = dg.materialize([probe], resources=resources, raise_on_error=False)
    (failure,) = result.get_step_failure_events()
    assert failure.step_key == "probe"
    assert "SlurmRequest: time_limit: '2h' is not a Slurm time" in str(failure.step_failure_data.error)


def test_settings_that_are_wrong_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DAGSTER_DEPLOYMENT", "produktion")
    outcome = materialize("", tmp_path)
    assert "probe: DAGSTER_DEPLOYMENT" in outcome.error
    assert "production_supercomputer" in outcome.error


def test_a_data_root_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from musica_pipelines.assets.flight_delays import WORKLOADS

    folder = Path("/sys/kernel")  # no one may make files there, not even root
    monkeypatch.setenv("DATA_ROOT", str(folder))
    outcome = materialize(
        WORKLOADS / "flights.py",
        tmp_path,
        partitions=("2013-01",),
        partition_key="2013-01",
        checks=("rows_match_source",),
    )
    assert "cannot write /sys/kernel/flights/2013-01.parquet" in outcome.error
    assert "is DATA_ROOT (/sys/kernel) yours to write?" in outcome.error


# ---- nothing is left behind


@pytest.mark.parametrize("how", ["in its group", "in a session of its own", "as a daemon"])
def test_what_a_workload_leaves_running_is_ended(how: str, tmp_path: Path) -> None:
    """As the end of a Slurm job would."""
    pid = tmp_path / "pid"
    sleep = f"echo $$ >'{pid}.part'; mv '{pid}.part' '{pid}'; exec sleep 600"
    command = ["setsid", "--fork", "bash", "-c", sleep] if how == "as a daemon" else ["bash", "-c", sleep]
    workload = (
        PIPES
        + f"""
    import pathlib, subprocess, time
    subprocess.Popen({command!r}, start_new_session={how == "in a session of its own"})
    while not pathlib.Path({str(pid)!r}).exists():
        time.sleep(0.01)
    pipes.report_asset_materialization()
    """
    )
    assert materialize(workload, tmp_path).success
    wait_for(lambda: gone(int(pid.read_text())), 60, "the child has ended")


def test_the_run_directory_is_private_and_removed(tmp_path: Path) -> None:
    workload = (
        PIPES
        + """
    import os, stat
    from dagster_pipes import decode_param
    folder = os.path.dirname(decode_param(os.environ["DAGSTER_PIPES_CONTEXT"])["path"])
    pipes.report_asset_materialization(metadata={"folder": folder, "mode": stat.S_IMODE(os.stat(folder).st_mode)})
    """
    )
    (metadata,) = materialize(workload, tmp_path).materializations[None]
    assert metadata["mode"] == 0o700
    assert not Path(metadata["folder"]).exists()


def test_the_same_workload_finds_ray_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real Ray: started by `ray.init()` here, gone afterwards, and no token of it left where others could read."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    workload = (
        PIPES
        + """
    import ray, os
    ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False)
    pids = ray.get([ray.remote(lambda: os.getpid()).remote() for _ in range(4)])
    squares = ray.get([ray.remote(lambda n: n * n).remote(n) for n in range(10)])
    pipes.report_asset_materialization(metadata={"squares": squares, "pids": pids, "nodes": len(ray.nodes())})
    """
    )
    outcome = materialize(workload, tmp_path, launcher=RayLauncher())
    assert outcome.error == ""
    (metadata,) = outcome.materializations[None]
    assert metadata["squares"] == [n * n for n in range(10)]
    assert metadata["nodes"] == 1
    assert list(home.rglob("auth_token")) == []
    wait_for(lambda: all(gone(pid) for pid in metadata["pids"]), 60, "Ray has ended")
