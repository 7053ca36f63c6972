"""What goes into an environment: the lock for a target, the code as git has it; and what may be removed."""

import subprocess
import tomllib
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from dagster_sbatch.commands.deploy_environment import choose_for_removal, publish
from dagster_sbatch.environments.code import read_code, revision_of
from dagster_sbatch.environments.deployed import (
    Environment,
    EnvironmentListing,
    Environments,
    EnvironmentSpec,
    Progress,
    Published,
)
from dagster_sbatch.environments.lockfile import NEWEST, OLDEST, Interpreter, read_lock
from dagster_sbatch.errors import ConfigurationError
from dagster_sbatch.launchers import ScriptLauncher
from dagster_sbatch.run.plan import make_plan
from dagster_sbatch.run.run_environment import RunEnvironment
from dagster_sbatch.settings import Settings
from dagster_sbatch.slurm import SlurmRequest
from dagster_sbatch.slurm.gateway import Gateway
from resources import PROJECT
from support import ROOT

PYTHON = Interpreter("/usr/bin/python3.11", "3.11.2", "x86_64", "2.28")


# The lock


def lock_of(folder: Path, text: str) -> Path:
    path = folder / "lock.txt"
    path.write_text(text)
    return path


def test_the_lock_has_all_that_the_cluster_group_names() -> None:
    group = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]["cluster"]
    lock = read_lock(PROJECT.lock)
    assert {Requirement(each).name for each in group} <= {pin.name for pin in lock.pins}
    assert lock.modules == ["dagster_pipes", "ray"]


@pytest.mark.parametrize(
    ("version", "numpy"), [("3.11.9", "numpy==1 --hash=sha256:aa"), ("3.12.1", "numpy==2 --hash=sha256:bb")]
)
def test_markers_are_evaluated_for_the_interpreter(tmp_path: Path, version: str, numpy: str) -> None:
    text = "numpy==1 ; python_full_version < '3.12' --hash=sha256:aa\n"
    text += "numpy==2 ; python_full_version >= '3.12' --hash=sha256:bb\n"
    text += "colorama==1 ; sys_platform == 'win32' --hash=sha256:cc\n"
    lines = read_lock(lock_of(tmp_path, text)).requirements_for(Interpreter("/python", version, "x86_64", "2.28"))
    assert lines == [numpy]


def test_each_version_that_the_project_supports_gets_every_package_once() -> None:
    for minor in range(OLDEST[1], NEWEST[1] + 1):
        lines = read_lock(PROJECT.lock).requirements_for(Interpreter("/python", f"3.{minor}.1", "x86_64", "2.28"))
        names = [line.partition("==")[0] for line in lines]
        assert len(names) == len(set(names))
        assert {"ray", "dagster-pipes", "pip", "xgboost"} <= set(names)


def test_comments_and_order_do_not_count_but_hashes_do(tmp_path: Path) -> None:
    one = read_lock(lock_of(tmp_path, "a==1 --hash=sha256:aa\nb==1 \\\n    --hash=sha256:bb\n    # via a\n"))
    same = read_lock(lock_of(tmp_path, "# new\nb==1 --hash=sha256:bb\na==1 --hash=sha256:aa # via\n"))
    other = read_lock(lock_of(tmp_path, "a==1 --hash=sha256:aa\nb==1 --hash=sha256:cc\n"))
    assert one.digest == same.digest != other.digest


@pytest.mark.parametrize(
    "line", ["a>=1 --hash=sha256:aa", "a==1", "-e .", "a==1 ; what --hash=sha256:aa", "a @ file:///home/a"]
)
def test_what_is_not_exact_is_refused(tmp_path: Path, line: str) -> None:
    with pytest.raises(ConfigurationError, match=r"lock\.txt: .* If pyproject\.toml names a folder or an address, "):
        read_lock(lock_of(tmp_path, line))


def test_a_lock_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="scripts/lock"):
        read_lock(tmp_path / "none.txt")


# The interpreter


def test_the_versions_are_those_of_the_project() -> None:
    wanted = SpecifierSet(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"])
    there = [minor for minor in range(30) if f"3.{minor}" in wanted]
    assert ((3, there[0]), (3, there[-1])) == (OLDEST, NEWEST)


# The code of a run


def test_every_workload_below_the_workloads_folder_has_the_same_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is what scripts/deploy_environment.py publishes, so production can run each of them."""
    for name in ("top.py", "climate/prog.py", "climate/model/__main__.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    for given in ("top.py", "climate/prog.py", "climate/model"):
        project = replace(PROJECT, workload_folder=str(tmp_path))
        plan = make_plan(Settings(), project, tmp_path / given, ScriptLauncher(), SlurmRequest())
        inputs = RunEnvironment(cast(Gateway, None), Settings(), plan).inputs
        code = {name.removeprefix("code "): digest for name, digest in inputs.items() if name.startswith("code ")}
        assert code == read_code(tmp_path).digests


def test_production_says_that_the_code_of_a_workload_elsewhere_is_never_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To publish it, as for other differences, would not help."""
    (tmp_path / "prog.py").touch()

    there = Published(listing("a", 0).environment, "", datetime.now(UTC))
    monkeypatch.setattr(Environments, "published", lambda *_: there)
    production = Settings().model_copy(update={"deployment": "production_supercomputer", "python": "/python"})
    plan = make_plan(Settings(), PROJECT, tmp_path / "prog.py", ScriptLauncher(), SlurmRequest())
    with pytest.raises(ConfigurationError) as error:
        RunEnvironment(cast(Gateway, None), production, plan).find(lambda _: None)
    assert str(error.value).endswith(f"\nOnly {PROJECT.workloads} is published. Move {tmp_path}/prog.py there.")


def test_what_is_published_has_the_revision_that_was_read(tmp_path: Path) -> None:
    """Making an environment takes minutes, in which a person commits."""
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", "-C", str(tmp_path)]
    commit = [*git, "commit", "--quiet", "--allow-empty", "--message=a"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run(commit, check=True)
    read = revision_of(tmp_path)

    class Slow(Environments):
        def __init__(self) -> None:
            self.published_as = ""

        def ensure(self, *_: Any) -> Environment:
            subprocess.run(commit, check=True)
            return listing("a", 0).environment

        def publish(self, environments: Any, revision: str) -> bool:
            self.published_as = revision
            return True

    environments = Slow()
    publish(environments, {"": EnvironmentSpec(read_code(tmp_path), None)})
    assert environments.published_as == read != revision_of(tmp_path)


# What may go


def listing(name: str, days: float, published: str = "") -> EnvironmentListing:
    environment = Environment(name, "path", "/python", "/w", PYTHON, "/python", None, {})
    return EnvironmentListing(environment, datetime.now(UTC) - timedelta(days=days), published)


LISTINGS = [
    listing("a", 0.1),
    listing("b", 2),
    listing("c", 3, "before"),
    listing("d", 4, "current"),
    listing("e", 5),
    listing("f", 40),
]


@pytest.mark.parametrize(
    ("used", "limits", "gone"),
    [
        ((), {"older_than": 1.0}, ["b", "e", "f"]),
        (("e",), {"older_than": 1.0}, ["b", "f"]),
        ((), {"keep": 2}, ["e", "f"]),
        ((), {"keep": 0}, ["a", "b", "e", "f"]),
        ((), {"keep": 1, "older_than": 10.0}, ["f"]),
        (("f",), {"keep": 10}, []),
    ],
)
def test_old_environments_go_but_none_that_is_needed(used: tuple[str], limits: dict[str, int], gone: list[str]) -> None:
    assert choose_for_removal(LISTINGS, used, **limits) == gone


# Progress


def test_the_log_shows_percent_and_rate_every_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("dagster_sbatch.environments.deployed.time.monotonic", lambda: now[0])
    lines: list[str] = []
    progress = Progress(lines.append)
    progress.step("installing")
    for second in range(26):
        now[0] = 100.0 + second
        progress.sent(second * 4_000_000, 100_000_000)
    assert lines == [
        "environment: installing",
        "environment: sent 40 % of 100.0 MB, 4.0 MB/s",
        "environment: sent 80 % of 100.0 MB, 4.0 MB/s",
        "environment: sent 100 % of 100.0 MB, 4.0 MB/s",
    ]
