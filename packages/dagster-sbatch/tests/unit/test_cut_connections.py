"""Connections that are cut, delayed and split at random bytes in both directions: nothing is lost, nothing doubled."""

import hashlib
import os
import random
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest

from dagster_sbatch.slurm import SlurmRequest, allocate, load_site, render_job_script
from dagster_sbatch.slurm.gateway import (
    MESSAGES,
    Gateway,
    RefusedError,
    choose_channel,
    client,
    fetch_file,
    link,
    send_file,
)
from dagster_sbatch.slurm.gateway.agent import transfer
from dagster_sbatch.slurm.gateway.agent.disk import RequestError
from dagster_sbatch.slurm.gateway.channel import Channel
from slurm_in_a_box import wait_until
from support.agent_fixtures import HURRIED, SETTINGS, Prepare, put
from support.array_site import Follow, Site, record, wait_for_ends
from support.background import STRESS
from unit.test_agent_killed import SBATCH, SCONTROL, SQUEUE

SEEDS = range(200 if STRESS else 2)
TEXT = "".join(f"Zeile {number}: äöü €\n" for number in range(200)) + "x" * 5_000 + "\n"
TASKS, PARTS = 5, 4
NAMES = (MESSAGES, "stdout", "stderr")

ENDS_ONCE_AT_FSYNC = """
def spoil():
    import os
    def end(_):
        if not os.path.exists({mark!r}):
            os.close(os.open({mark!r}, os.O_CREAT))
            os._exit(9)
    os.fsync = end
"""


class Cuts:
    """Opens channels to agents on this machine. They are cut after some bytes, the first one after few."""

    def __init__(self, seed: int) -> None:
        self._count, self._random = 0, random.Random(seed)
        self._open = choose_channel(SETTINGS, (), lambda _: None)

    def __call__(self) -> Channel:
        self._count += 1
        found = self._open()
        most = (30, 3_000) if self._count == 1 else (30, 3_000, 400_000)
        to_come, to_go = (self._random.randrange(1, self._random.choice(most)) for _ in range(2))
        read, write, held, is_cut = found._read, found._write, bytearray(), False

        def read_some(seconds: float) -> bytes:
            nonlocal is_cut, to_come
            if not held and not is_cut:
                held.extend(read(seconds))
            data = b"" if is_cut else self._part(held)[:to_come]
            del held[: len(data)]
            to_come -= len(data)
            is_cut |= not to_come
            return data

        def write_some(data: bytes) -> None:
            nonlocal is_cut, to_go
            while data and not is_cut:
                part = self._part(data)[:to_go]
                write(part)
                data = data[len(part) :]
                to_go -= len(part)
                is_cut = not to_go
            if is_cut:
                raise ConnectionResetError

        found._read, found._write = read_some, write_some  # type: ignore[method-assign]
        return found

    def _part(self, data: bytes | bytearray) -> bytes:
        """Return the beginning of what is sent, sometimes late."""
        if self._random.random() < 0.05:
            time.sleep(self._random.random() / 50)
        return bytes(data[: self._random.choice((1, 7, 1000, 100_000))])


MakeCut = Callable[[int], Gateway]


@pytest.fixture
def cut(prepare: Prepare, monkeypatch: pytest.MonkeyPatch) -> MakeCut:
    """A gateway with such channels, by a seed."""
    monkeypatch.setattr(link, "LONGEST_PAUSE", 0.05)
    monkeypatch.setattr(link, "LOGINS_SECONDS", 0.0)

    def make(seed: int) -> Gateway:
        gateway = prepare(HURRIED)
        gateway._open_channel = Cuts(seed)
        return gateway

    return make


@pytest.mark.parametrize("seed", SEEDS)
def test_a_job(seed: int, cut: MakeCut, slurm: Path, tmp_path: Path) -> None:
    for name, text in {"sbatch": SBATCH, "squeue": SQUEUE, "scontrol": SCONTROL}.items():
        put(slurm, name, text.format(slurm=slurm).replace(">>stdout", ">>stdout 2>>stderr"))
    (slurm / "jobs").touch()
    (tmp_path / "text").write_text(TEXT)
    runs, site = tmp_path / "runs", load_site({}, "musica")
    each = f"for each in {MESSAGES} /dev/fd/2 /dev/fd/1; do cat '{tmp_path}/text' >>$each; sleep 0.02; done"
    body = f"for part in {' '.join('1' * PARTS)}; do {each}; done"
    request = allocate(SlurmRequest(), site).request
    script = render_job_script(request, site, job_name="family-1", about={}, environment={}, body=body)
    gateway = cut(seed)
    received: dict[str, bytearray] = defaultdict(bytearray)
    assert gateway.claim(str(runs), "family", "token", "me").held_by is None
    sinks = {name: received[name].extend for name in NAMES}
    end = gateway.run(str(runs / "family-1"), {"job.sh": script, "sampler/sampler.py": ""}, sinks, "run")
    assert end.code == 0
    assert {name: bytes(data) for name, data in received.items()} == {
        name: (runs / "family-1" / name).read_bytes() for name in NAMES
    }
    assert TEXT * PARTS in received["stdout"].decode()
    assert (slurm / "jobs").read_text() == "family-1\n"


@pytest.mark.parametrize("seed", SEEDS)
def test_an_array_job(seed: int, cut: MakeCut, slurm: Path, tmp_path: Path, follow: Follow) -> None:
    site = Site(slurm, tmp_path, TASKS)
    gateway = cut(seed)
    seen = follow(site, gateway)
    for part in range(PARTS):
        for task in range(part and 2, TASKS):
            site.start(task)
            for name in NAMES:
                site.write(task, name, f"{task}, {part}: {TEXT}")
        if not part:  # these are over before the others write on
            site.end(0)
            site.end(1)
            site.say(record("0-1", "COMPLETED"), record("2-4", "RUNNING", "Unknown"))
            wait_for_ends(seen, 2)
        end = f"4, {part}: {TEXT}".encode()
        wait_until(lambda end=end: seen.written[4, "stderr"].endswith(end), "the last of a part", 60)  # type: ignore[misc]
    for task in range(2, TASKS):
        site.end(task)
    site.say(record("0-4", "COMPLETED"))
    wait_for_ends(seen, TASKS)
    assert {task: end.code for task, end in seen.ends.items()} == dict.fromkeys(range(TASKS), 0)
    for task in range(TASKS):
        text = "".join(f"{task}, {part}: {TEXT}" for part in range(PARTS if task > 1 else 1))
        assert {name: seen.text(task, name) for name in NAMES} == dict.fromkeys(NAMES, text)
    assert [len(nodes) for _, nodes in sorted(seen.starts.items())] == [1] * TASKS


@pytest.mark.parametrize("seed", SEEDS)
def test_a_file(seed: int, cut: MakeCut, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "PIECE", 20_000)
    local, there, back = (tmp_path / name for name in ("local", "there/there", "back"))
    local.write_bytes(random.Random(seed).randbytes(200_000))
    there.parent.mkdir()
    there.write_bytes(bytes(200_000))  # an earlier one
    gateway = cut(seed)
    seen: list[int] = []
    send_file(gateway, local, str(there), lambda at, _: seen.append(at))
    fetch_file(gateway, str(there), back)
    assert there.read_bytes() == back.read_bytes() == local.read_bytes()
    assert [path.name for path in there.parent.iterdir()] == ["there"]
    assert seen == sorted(seen)


@pytest.mark.parametrize(
    "change",
    [lambda path: path.write_bytes(b"y" * 100_000), lambda path: os.truncate(path, 50_000)],
    ids=["other bytes", "shorter"],
)
def test_a_file_that_changes_while_it_is_sent_is_named(
    change: Callable[[Path], None], prepare: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "PIECE", 20_000)
    local, there = tmp_path / "local", tmp_path / "there"
    local.write_bytes(b"x" * 100_000)
    gateway = prepare("")
    with pytest.raises(RefusedError, match=f"^{local} changed while it was sent"):
        send_file(gateway, local, f"{there}/there", lambda *_: change(local))
    assert not (there / "there").exists()


@pytest.mark.parametrize("at", [0, 1, transfer.CHUNK, transfer.CHUNK + 1, 2 * transfer.CHUNK + 7])
def test_a_file_is_fetched_from_an_offset_on_as_it_was_at_first(at: int, tmp_path: Path) -> None:
    path, content = tmp_path / "there", random.Random(0).randbytes(2 * transfer.CHUNK + 7)
    path.write_bytes(content)
    sent = bytearray()

    def append(data: bytes, **_: object) -> None:
        sent.extend(data)
        with path.open("ab") as file:
            file.write(data)

    said = transfer.get(None, {"path": str(path), "at": at}, append)
    assert said == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    assert sent == content[at:]


def test_a_file_that_becomes_shorter_while_it_is_fetched_is_fetched_again(tmp_path: Path) -> None:
    path, size = tmp_path / "there", transfer.CHUNK
    path.write_bytes(bytes(2 * size))
    with pytest.raises(RequestError, match=f"^{path} has become shorter$") as error:
        transfer.get(None, {"path": str(path), "at": 0}, lambda *_, **__: os.truncate(path, size))
    assert error.value.kind == "temporary"


def test_what_is_appended_to_a_file_while_it_is_sent_does_not_count(prepare: Prepare, tmp_path: Path) -> None:
    local, there = tmp_path / "local", tmp_path / "there"

    def append(*_: int) -> None:
        with local.open("ab") as file:
            file.write(b"y" * 99)

    local.write_bytes(b"x" * (2 * client.PIECE + 1))
    assert send_file(prepare(), local, str(there), append) == there.stat().st_size == 2 * client.PIECE + 1


@pytest.mark.parametrize("content", [b"x" * 100_000, b""], ids=["full", "empty"])
def test_a_file_whose_last_piece_has_come_is_not_sent_again(content: bytes, prepare: Prepare, tmp_path: Path) -> None:
    """Its agent ends before the file has its name: writing a large one to slow storage takes long. Nor a whole one."""
    (tmp_path / "local").write_bytes(content)
    gateway = prepare(ENDS_ONCE_AT_FSYNC.format(mark=str(tmp_path / "mark")))
    assert [send_file(gateway, tmp_path / "local", f"{tmp_path}/there/there") for _ in range(2)] == [0, 0]
    assert (tmp_path / "mark").exists()
    assert {path.name: path.read_bytes() for path in (tmp_path / "there").iterdir()} == {"there": content}
