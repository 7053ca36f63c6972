"""The shared disk as it can be: full, without locks, open to other users, with files of a newer version."""

import errno
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dagster_sbatch.inspect.remote_runs import Runs
from dagster_sbatch.slurm.gateway import Gateway, JobEnd, RefusedError, fetch_file, link, send_file
from dagster_sbatch.slurm.gateway.agent import disk
from support import ROOT
from support.agent_fixtures import HURRIED, NO_INODES, SETTINGS, Prepare, put
from support.submission import submit_run

NO_LOCKS = """
import fcntl
def flock(*_):
    raise OSError({code}, {text!r})
fcntl.flock = flock
"""
SPOILT = """
def spoil():
    import os, sys
    follower = sys.modules["agent.follower"]
    events_of = follower.events_of
    def fail(run):
        with open({counted!r}, "a") as file:
            file.write("x")
        if os.path.getsize({counted!r}) <= {times}:
            raise {error}
        return events_of(run)
    follower.events_of = fail
"""
CANCELLED = "JobName=KEY JobState=CANCELLED ExitCode=0:15 SubmitTime=100 StartTime=110 EndTime=120"
RUNNING = "JobName=KEY JobState=RUNNING ExitCode=0:0 SubmitTime=100 StartTime=110 EndTime=Unknown"


def lay_out(folder: Path, job: str = "17") -> Path:
    """A run that has a job."""
    run = folder / "runs" / "KEY"
    run.mkdir(parents=True, mode=0o700)
    for name in ("messages.jsonl", "stdout", "stderr", "events"):
        (run / name).touch()
    (run / "job").symlink_to(job)
    return run


def follow(gateway: Gateway, run: Path, **sinks: Callable[[bytes], None]) -> JobEnd:
    return gateway.run(str(run), None, {name.replace("_", "."): sink for name, sink in sinks.items()}, follower="")


@pytest.mark.parametrize("half", ['{"idle": 600, "ti', "\0" * 20], ids=["a full disk", "a node without power"])
def test_a_record_that_follows_half_a_record_counts(half: str, prepare: Prepare, slurm: Path, tmp_path: Path) -> None:
    run, ended = lay_out(tmp_path), '{"code": 0, "time": 2, "sizes": {}}'
    (run / "events").write_text(f'{half}{{"started": "n1", "time": 1, "temporary": "/tmp"}}\n{half}{ended}\n')
    put(slurm, "scontrol", f"echo '{CANCELLED.replace('CANCELLED', 'COMPLETED')}'")
    end = follow(prepare(HURRIED), run)
    assert (end.code, end.node) == (0, "n1")


# Locks


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_refused(code: int, prepare: Prepare, tmp_path: Path) -> None:
    """Lustre without the mount option, NFS without its lock daemon, some FUSE."""
    gateway = prepare(NO_LOCKS.format(code=code, text=os.strerror(code)))
    for ask in (
        lambda: gateway.claim(f"{tmp_path}/base/runs", "family", "token", "me"),
        lambda: submit_run(gateway, f"{tmp_path}/base/runs/KEY", {"job.sh": ""}),
        lambda: send_file(gateway, ROOT / "README.md", f"{tmp_path}/base/environments/wheels/x"),
        lambda: gateway.ask(do="releases.roll_back", folder=f"{tmp_path}/base/environments"),
    ):
        with pytest.raises(RefusedError, match=rf"no file locks \(flock: {os.strerror(code)}\).*another file system"):
            ask()


# Other users


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o007])
def test_folders_are_the_users_alone_whatever_the_umask(umask: int, prepare: Prepare, tmp_path: Path) -> None:
    gateway, base = prepare(f"import os; os.umask({umask})"), tmp_path / "scratch" / "base"
    put(tmp_path / "bin", "sbatch", "echo Invalid >&2; exit 1")
    gateway.claim(f"{base}/runs", "family", "token", "me")
    send_file(gateway, ROOT / "README.md", f"{base}/environments/wheels/1/x")
    with pytest.raises(RefusedError):
        submit_run(gateway, f"{base}/runs/a", {"job.sh": "", "code/a": ""})
    assert gateway.cancel(f"{base}/runs/KEY") is None
    paths = [tmp_path / "scratch", *(tmp_path / "scratch").rglob("*")]
    assert {path.stat().st_mode & 0o777 for path in paths if path.is_dir()} == {0o700}
    assert {path.stat().st_mode & 0o077 for path in paths} == {0}


@pytest.mark.parametrize("place", ["base", "base/runs", "base/environments", "base/environments/wheels"])
@pytest.mark.parametrize("fault", ["writable by all", "writable by the group", "of another user"])
def test_a_folder_that_others_can_change_is_refused(place: str, fault: str, prepare: Prepare, tmp_path: Path) -> None:
    for each in ("base", "base/runs", "base/environments", "base/environments/wheels"):
        (tmp_path / each).mkdir(mode=0o755)
    path = tmp_path / place
    preparation, says = "", rf"{path}: other users can write to it, .*\n  chmod go-w '{path}'"
    if fault == "of another user":
        says = rf"{path}: user \d+ owns it"
        if os.getuid() == 0:
            os.chown(path, 12345, -1)
        else:  # who cannot give a folder away is somebody else
            user, says = os.getuid(), r"user \d+ owns it"
            preparation = f"import os; os.getuid = lambda: {user} + 1"
    else:
        path.chmod(0o777 if "all" in fault else 0o775)
    gateway = prepare(preparation)

    def ask() -> None:
        if "environments" in place:
            gateway.ask(do="releases.inventory", folder=f"{tmp_path}/base/environments")
        else:
            gateway.claim(f"{tmp_path}/base/runs", "family", "token", "me")

    with pytest.raises(RefusedError, match=says):
        ask()
    if not preparation:
        os.chown(path, os.getuid(), -1)
        path.chmod(0o755)
        ask()


def test_a_base_path_in_scratch_is_fine_and_one_that_anybody_can_exchange_is_not(
    prepare: Prepare, tmp_path: Path
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    scratch.chmod(0o1777)
    assert prepare().claim(f"{scratch}/me/runs", "family", "token", "me").held_by is None
    scratch.chmod(0o777)
    with pytest.raises(RefusedError, match=r"everybody can rename what lies in it(.|\n)*chmod o-w"):
        prepare().claim(f"{scratch}/me/runs", "family", "token", "me")


def test_nothing_lies_where_another_user_could_have_made_it_first() -> None:
    for path in Path(disk.__file__).parent.glob("*.py"):
        assert not {word for word in ("/tmp", "/var/tmp", "/dev/shm", "tempfile") if word in path.read_text()}, path


# Full disks, and a queue that does not answer


@pytest.mark.parametrize(
    "squeue", ["[ -e scancel ] || echo '17|PENDING|Priority|N/A|KEY|p1'", "exec sleep 100", "sleep 100", "exit 1"]
)
def test_without_a_free_inode_the_end_is_seen_and_a_job_can_be_cancelled(
    squeue: str, prepare: Prepare, slurm: Path, tmp_path: Path
) -> None:
    """Also where squeue never answers: then Slurm is asked about the one job, and the step hears why."""
    run, told = lay_out(tmp_path), list[str]()
    put(slurm, "squeue", f"cd '{tmp_path}'; {squeue}")
    put(slurm, "scontrol", f"[ -e '{tmp_path}/scancel' ] && echo '{CANCELLED}' || echo '{RUNNING}'")
    put(slurm, "scancel", f'echo "$@" >"{tmp_path}/scancel"')
    follower, canceller = prepare(HURRIED + NO_INODES, told), prepare(HURRIED + NO_INODES)
    ends: list[JobEnd] = []
    thread = threading.Thread(target=lambda: ends.append(follow(follower, run, stdout=lambda _: None)), daemon=True)
    thread.start()
    cancelled = canceller.cancel(str(run))
    thread.join(60)
    assert cancelled is not None
    assert [end.state for end in (cancelled, *ends)] == ["CANCELLED", "CANCELLED"]
    assert (tmp_path / "scancel").read_text().split()[-2:] == ["--name", "KEY"]
    assert any("Disk quota exceeded" in text or "squeue" in text for text in told)


@pytest.mark.parametrize("others", [[], [CANCELLED]], ids=["all of it", "one task"])
def test_a_job_that_its_user_has_renamed_is_cancelled(
    others: list[str], prepare: Prepare, slurm: Path, tmp_path: Path
) -> None:
    run, renamed = lay_out(tmp_path), f"WorkDir={tmp_path}/runs/KEY"
    states = [f"{state.replace('JobName=KEY', 'JobName=mine')} {renamed}" for state in (CANCELLED, RUNNING)]
    said = ["\n".join([*others, state]) for state in states]
    put(slurm, "scontrol", f"[ -e '{tmp_path}/scancel' ] && echo '{said[0]}' || echo '{said[1]}'")
    put(slurm, "scancel", f'[ "$*" = "--user $(id -un) 17" ] && touch "{tmp_path}/scancel"')
    cancelled = prepare(HURRIED).cancel(str(run))
    assert cancelled is not None
    assert cancelled.state == "CANCELLED"


def test_a_job_that_is_gone_is_noticed_though_squeue_hangs(prepare: Prepare, slurm: Path, tmp_path: Path) -> None:
    """It was cancelled while it waited: it leaves no word."""
    run, told = lay_out(tmp_path), list[str]()
    put(slurm, "squeue", "sleep 100")
    put(slurm, "scontrol", f"echo '{CANCELLED.replace('EndTime=120', f'EndTime={int(time.time())}')}'")
    assert follow(prepare(HURRIED, told), run).state == "CANCELLED"
    assert told == ["squeue did not answer within 0 s"]
    assert json.loads((run / "end").read_text())["state"] == "CANCELLED"


def test_a_job_that_ends_slowly_is_cancelled_all_the_same(prepare: Prepare, slurm: Path, tmp_path: Path) -> None:
    run = lay_out(tmp_path)
    put(slurm, "scontrol", f"echo '{RUNNING.replace('RUNNING', 'COMPLETING')}'")
    with pytest.raises(RefusedError, match=r"has accepted that job 17 is cancelled(.|\n)*scripts/job 17 state"):
        prepare(HURRIED).cancel(str(run))


def test_a_job_that_ends_slowly_delays_the_cancellation_of_no_other(
    prepare: Prepare, slurm: Path, tmp_path: Path
) -> None:
    runs = [lay_out(tmp_path / name, job) for name, job in (("slow", "17"), ("other", "18"), ("never", "19"))]
    (runs[2] / "job").unlink()
    slow = RUNNING.replace("RUNNING", "COMPLETING")
    over = f"[ $(grep -c . '{tmp_path}/scancel') = 2 ] && echo '{CANCELLED}'"
    put(slurm, "scontrol", f"case $* in *17) echo '{slow}';; *) {over} || echo '{RUNNING}';; esac")
    put(slurm, "scancel", f'echo "$@" >>"{tmp_path}/scancel"')
    outcomes: dict[str, JobEnd | RefusedError | None] = {}
    prepare(HURRIED).cancel_all(list(map(str, runs)), outcomes.__setitem__)
    assert list(outcomes)[-1] == str(runs[0])
    assert "has accepted that job 17 is cancelled" in str(outcomes.pop(str(runs[0])))
    other, never = outcomes[str(runs[1])], outcomes[str(runs[2])]
    assert isinstance(other, JobEnd)
    assert (other.state, never) == ("CANCELLED", None)
    assert len((tmp_path / "scancel").read_text().splitlines()) == 2


def test_a_run_that_cannot_be_cancelled_delays_the_cancellation_of_no_other(
    prepare: Prepare, slurm: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    runs = [tmp_path / "file" / "KEY", lay_out(tmp_path)]
    put(slurm, "scontrol", f"[ -e '{tmp_path}/scancel' ] && echo '{CANCELLED}' || echo '{RUNNING}'")
    put(slurm, "scancel", f'echo "$@" >>"{tmp_path}/scancel"')
    outcomes: dict[str, JobEnd | RefusedError | None] = {}
    prepare(HURRIED).cancel_all(list(map(str, runs)), outcomes.__setitem__)
    refused, other = (outcomes[str(run)] for run in runs)
    assert isinstance(refused, RefusedError)
    assert isinstance(other, JobEnd)
    assert ("Not a directory" in str(refused), other.state) == (True, "CANCELLED")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_job_whose_link_cannot_be_made_is_not_lost(code: int, prepare: Prepare, slurm: Path, tmp_path: Path) -> None:
    put(slurm, "sbatch", "echo 17")
    gateway = prepare(f"import os\ndef fail(*_): raise OSError({code}, {os.strerror(code)!r})\nos.symlink = fail")
    assert submit_run(gateway, f"{tmp_path}/runs/KEY", {"job.sh": ""}).job == "17"


@pytest.mark.parametrize(
    "error", ["KeyError('state')", "OSError(13, 'Permission denied')", "OSError(38, 'No such call')"]
)
def test_errors_of_the_agent_do_not_cost_a_job_and_are_shown(
    error: str, prepare: Prepare, slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More of them than end a request without a job."""
    put(slurm, "sbatch", "echo 17")
    put(slurm, "scontrol", f"echo '{CANCELLED}'")
    times, told = 2 * link.BROKEN_TRIES, list[str]()
    gateway = prepare(HURRIED + SPOILT.format(counted=f"{tmp_path}/counted", times=times, error=error), told)
    run, job = f"{tmp_path}/runs/KEY", list[str]()
    sinks = {"stdout": lambda _: None}
    end = gateway.run(run, {"job.sh": ""}, sinks, "follower", lambda found: job.append(found.job))
    assert (end.state, set(job)) == ("CANCELLED", {"17"})
    assert len([text for text in told if error.split("'")[1] in text]) >= times


# Files that grow, and holes


def test_fetching_a_file_that_grows_ends(prepare: Prepare, tmp_path: Path) -> None:
    log, over = tmp_path / "log", threading.Event()
    log.write_bytes(b"a line\n" * 1_000_000)

    def write() -> None:
        with log.open("ab") as file:
            while not over.is_set():
                file.write(b"another line\n")
                file.flush()

    thread = threading.Thread(target=write)
    thread.start()
    told: list[str] = []
    try:
        fetch_file(prepare(told=told), str(log), tmp_path / "fetched")
    finally:
        over.set()
        thread.join()
    fetched = (tmp_path / "fetched").read_bytes()
    assert len(fetched) >= 7_000_000
    assert log.read_bytes().startswith(fetched)
    assert told == []


def test_nul_bytes_of_a_late_write_are_not_delivered(prepare: Prepare, tmp_path: Path) -> None:
    """On NFS a reader can see the new size before the pages. A program that prints NUL bytes has them all the same."""
    run = lay_out(tmp_path)
    lines = b"a line\n" * 1000
    for name in ("stdout", "messages.jsonl"):
        (run / name).write_bytes(lines + bytes(2000) + lines)
    come = {"stdout": b"", "messages.jsonl": b""}

    def take(name: str) -> Callable[[bytes], None]:
        def add(data: bytes) -> None:
            come[name] += data
            if come[name] == lines and name == "messages.jsonl":  # the pages arrive
                with (run / name).open("r+b") as file:
                    file.write(3 * lines)
                end = {"code": 0, "time": 1, "sizes": {"stdout": 16000, "stderr": 0, "messages.jsonl": 21000}}
                (run / "events").write_text(json.dumps(end) + "\n")

        return add

    put(tmp_path / "bin", "scontrol", f"echo '{CANCELLED}'")
    begun = time.monotonic()
    prepare(HURRIED).run(str(run), None, {name: take(name) for name in come}, follower="")
    assert come["messages.jsonl"] == 3 * lines
    assert come["stdout"] == lines + bytes(2000) + lines
    assert time.monotonic() - begun > 0.5


def test_an_error_where_the_output_goes_is_no_lost_connection(prepare: Prepare, tmp_path: Path) -> None:
    """`scripts/job JOB logs | head` ends. A lost connection would be opened anew, for ever."""
    run = lay_out(tmp_path)
    (run / "stdout").write_text("a line")

    def fail(_: object) -> None:
        raise BrokenPipeError("nobody reads")

    gateway = prepare(HURRIED)
    gateway.on_trouble = pytest.fail
    with pytest.raises(BrokenPipeError, match="nobody reads"):
        follow(gateway, run, stdout=fail)


def test_a_hole_that_a_node_without_power_has_left_is_delivered(prepare: Prepare, tmp_path: Path) -> None:
    """The job's next start appends to the same file. Messages without that hole would end there for ever."""
    run, come = lay_out(tmp_path), bytearray()
    said = b'{"method": "opened"}\n' + bytes(2000) + b'\n{"method": "job_started"}\n{"method": "opened"}\n'
    (run / "messages.jsonl").write_bytes(said)
    end = {"code": 0, "time": 1, "sizes": {"stdout": 0, "stderr": 0, "messages.jsonl": len(said)}}
    (run / "events").write_text(json.dumps(end) + "\n")
    gateway = prepare(HURRIED)
    put(tmp_path / "bin", "scontrol", f"echo '{CANCELLED}'")
    found = follow(gateway, run, messages_jsonl=come.extend)
    assert (bytes(come), found.short) == (said, {})


# Files of another version


def test_files_of_a_newer_version_are_read_and_damaged_ones_are_skipped(prepare: Prepare, tmp_path: Path) -> None:
    about = {"run": "r", "root": "r", "asset": "a", "partitions": "", "environment": "", "format": 7, "new": {"x": 1}}
    end = {"code": 0, "state": "COMPLETED", "exit": "0:0", "times": [1, 2, 3], "format": 7, "new": 1}
    runs: dict[str, dict[str, str | None]] = {
        "newer-1": {"about.json": json.dumps(about), "end": json.dumps(end)},
        "cut-1": {"about.json": json.dumps(about)[:20]},
        "other-1": {"about.json": "[]"},
        "lacks-1": {"about.json": '{"format": 9}'},
        "half-1": {"about.json": json.dumps(about), "end": '{"code": 0, "sta'},
        "odd-1": {"about.json": json.dumps(about), "end": "", "events": None},
    }
    for name, texts in runs.items():
        run = tmp_path / "runs" / name
        run.mkdir(parents=True, mode=0o700)
        for file, text in ({"events": ""} | texts).items():
            if text is not None:
                (run / file).write_text(text)
    settings = SETTINGS.model_copy(update={"deployment_base_path": str(tmp_path)})
    found = {run.key: run for run in Runs(prepare(), settings).all()}
    assert sorted(found) == ["half-1", "newer-1"]
    assert found["newer-1"].about.asset == "a"
    assert (found["newer-1"].end and found["newer-1"].end.state, found["half-1"].end) == ("COMPLETED", None)


NEWER = '{"at": 1, "asked": 1, "calls": 3, "jobs": {}, "trouble": null, "format": 9, "new": 1}'


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 9}', NEWER])
def test_a_view_of_the_queue_of_another_version_does_no_harm(
    text: str, prepare: Prepare, slurm: Path, tmp_path: Path
) -> None:
    put(slurm, "squeue", "echo '17|PENDING|Priority|N/A|KEY|p1'")
    (tmp_path / "runs").mkdir(mode=0o700)
    (tmp_path / "runs" / f".queue-{os.uname()[1]}.json").write_text(text)
    view = prepare().queue(f"{tmp_path}/runs")
    assert view["jobs"] == {"17": ["PENDING", "Priority", "N/A", "KEY", "p1", {"PENDING": "0"}]}


def test_every_document_on_the_shared_disk_has_a_format(prepare: Prepare, slurm: Path, tmp_path: Path) -> None:
    run = lay_out(tmp_path)
    put(slurm, "scontrol", f"echo '{CANCELLED}'")
    (run / "events").write_text('{"code": 0, "time": 1, "sizes": {}}\n')
    gateway = prepare(HURRIED)
    follow(gateway, run)
    gateway.queue(f"{tmp_path}/runs")
    documents = [run / "end", tmp_path / "runs" / f".queue-{os.uname()[1]}.json"]
    assert [json.loads(path.read_text())["format"] for path in documents] == [disk.FORMAT] * len(documents)
