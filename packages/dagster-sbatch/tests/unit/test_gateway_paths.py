"""Paths that begin with a variable of the login profile: the agent on this machine, with a home of its own."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dagster_sbatch.settings import Settings
from dagster_sbatch.slurm.gateway import Gateway, Questions, RefusedError, choose_channel
from support.agent_fixtures import put
from support.submission import submit_run

PROFILE = """\
read -r line && export DATA=$line
echo "welcome"
sleep 60 &
echo >>'{home}/read'
export DATA='{home}/data' SCRATCH=scratch
"""
"""Prints, reads its input, leaves a process behind, and notes that it was read."""


class Home:
    """A home folder with a login profile."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.profile = folder / ".bash_profile"
        self.profile.write_text(PROFILE.format(home=folder))

    @property
    def times_read(self) -> int:
        return len((self.folder / "read").read_text().splitlines()) if (self.folder / "read").exists() else 0


@pytest.fixture
def home(slurm: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    monkeypatch.setenv("DATA", "/of/another/machine")
    return Home(slurm.parent)


@pytest.fixture
def open_gateway(slurm: Path) -> Iterator[Callable[[], Gateway]]:
    settings, made = Settings.model_validate({"SLURM_EDGE_NODE_HOST": "localhost"}), []

    def make() -> Gateway:
        made.append(Gateway(choose_channel(settings, (), lambda _: None)))
        return made[-1]

    yield make
    for gateway in made:
        gateway.close()


def test_the_login_profile_says_where_data_is_and_is_read_once(home: Home, open_gateway: Callable[[], Gateway]) -> None:
    claim = open_gateway().claim("$DATA/d/runs", "family", "token", "me", Questions(data_root="~/files"))
    assert (claim.runs, claim.data_root) == (f"{home.folder}/data/d/runs", f"{home.folder}/files")
    assert (home.folder / "data" / "d" / "runs").is_dir()
    gateway = open_gateway()
    assert gateway.claim("$DATA/d/runs", "other", "token", "me", Questions(data_root="~")).data_root == str(home.folder)
    assert gateway.runs("$DATA/d/runs") == []
    assert home.times_read == 1


def test_a_profile_that_has_changed_is_read_again(home: Home, open_gateway: Callable[[], Gateway]) -> None:
    open_gateway().runs("$DATA/d/runs")
    time.sleep(0.02)  # the clock of the file system ticks
    home.profile.write_text(f"export DATA='{home.folder}/elsewhere'\n")
    claim = open_gateway().claim("$DATA/d/runs", "family", "token", "me")
    assert claim.runs == f"{home.folder}/elsewhere/d/runs"


def test_a_profile_that_changes_while_it_is_read_is_read_again(home: Home, open_gateway: Callable[[], Gateway]) -> None:
    newer = home.folder / "newer"
    newer.write_text(f"export DATA='{home.folder}/elsewhere'\n")
    home.profile.write_text(f"mv '{newer}' '{home.profile}'\nexport DATA='{home.folder}/data'\n")
    stamp = home.profile.stat()
    os.utime(home.profile, ns=(stamp.st_atime_ns, stamp.st_mtime_ns - 10**9))
    for folder in ("data", "elsewhere"):
        claim = open_gateway().claim("$DATA/d/runs", folder, "token", "me")
        assert claim.runs == f"{home.folder}/{folder}/d/runs"


@pytest.mark.parametrize(
    ("profile", "text"),
    [
        ("true", r"\$DATA/d/runs cannot be used: the login profile on \S+ sets no \$DATA\. Write the path itself"),
        ("export DATA=data", r"sets \$DATA to 'data', which is not an absolute path"),
        ("exit 3", "the login profile on .* ended the shell"),
    ],
)
def test_what_the_profile_does_not_say_is_refused_and_not_remembered(
    home: Home, open_gateway: Callable[[], Gateway], profile: str, text: str
) -> None:
    home.profile.write_text(profile)
    gateway = open_gateway()
    with pytest.raises(RefusedError, match=text):
        gateway.runs("$DATA/d/runs")
    assert not (home.folder / "$DATA").exists()
    stamp = home.profile.stat()
    home.profile.write_text(f"export DATA='{home.folder}'")
    os.utime(home.profile, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert gateway.runs("$DATA/d/runs") == []


def test_a_home_that_is_full_is_no_obstacle(home: Home, open_gateway: Callable[[], Gateway]) -> None:
    (home.folder / ".cache").write_text("no folder can be made here\n")
    assert open_gateway().claim("$DATA/d/runs", "family", "token", "me").runs == f"{home.folder}/data/d/runs"


def test_environments_get_absolute_paths(home: Home, open_gateway: Callable[[], Gateway]) -> None:
    """But SLURM_PYTHON counts as it is written: the name of an environment must not depend on a user."""
    (home.folder / "data").mkdir()
    (home.folder / "data" / "python").symlink_to(sys.executable)
    ask = {"setup": [], "candidates": [], "oldest": [3, 0], "newest": [3, 99], "lock": "", "modules": [], "code": {}}
    python = {"asked": "$DATA/python", "asked_by": "SLURM_PYTHON", "python": "$DATA/python"}
    folder = "$DATA/environments"
    found = open_gateway().ask(do="building.find", folder=folder, **ask, **python)["environment"]
    assert (found["asked"], found["python"]) == ("$DATA/python", f"{home.folder}/data/python")
    assert found["workloads"] == f"{home.folder}/data/environments/{found['name']}/workloads"


def test_the_login_profile_names_the_project(
    home: Home, open_gateway: Callable[[], Gateway], slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shell that reads no profile started the agent; the user's own sbatch charges that project."""
    put(slurm, "sbatch", 'echo "${SBATCH_ACCOUNT:-none}" >&2; [ "$1" = --test-only ]')
    with home.profile.open("a") as file:
        file.write("export SBATCH_ACCOUNT=p9\n")
    gateway = open_gateway()
    assert (gateway.test("#!/bin/sh\n"), gateway.projects().default) == ((True, "p9"), "p9")
    with pytest.raises(RefusedError, match="p9"):
        submit_run(open_gateway(), f"{home.folder}/runs/KEY", {"job.sh": "#!/bin/sh\n"})
    assert home.times_read == 1
    with pytest.raises(RefusedError, match="p9"):
        submit_run(open_gateway(), f"{home.folder}/runs/ARRAY", {"job.sh": "#!/bin/sh\n", "tasks.jsonl": "{}\n"})
    assert home.times_read == 2, "for the environment of the tasks"
    monkeypatch.setenv("SBATCH_ACCOUNT", "p2")
    assert open_gateway().test("#!/bin/sh\n") == (True, "p2")
    monkeypatch.delenv("SBATCH_ACCOUNT")
    home.profile.write_text(f"echo >>'{home.folder}/read'; exit 3\n")
    gateway = open_gateway()
    assert [gateway.test("#!/bin/sh\n") for _ in range(2)] == [(True, "none")] * 2
    assert home.times_read == 3


@pytest.mark.parametrize(("link", "exchanged"), [("base", "link"), ("base", "target"), ("base/runs", "target")])
def test_a_link_that_anybody_can_exchange_is_refused(
    open_gateway: Callable[[], Gateway], tmp_path: Path, link: str, exchanged: str
) -> None:
    """Neither may the folder where it lies be open to all, nor the one where its target lies."""
    places = {"link": tmp_path / "own", "target": tmp_path / "other"}
    path = places["link"] / link
    for folder in (path.parent, places["target"] / "target"):
        folder.mkdir(mode=0o755, parents=True)
    path.symlink_to(places["target"] / "target")
    runs = f"{places['link']}/base/runs"
    assert open_gateway().claim(runs, "family", "token", "me").held_by is None
    places[exchanged].chmod(0o777)
    with pytest.raises(RefusedError, match=rf"{places[exchanged]}: everybody can rename what lies in it"):
        open_gateway().claim(runs, "family", "token", "me")
