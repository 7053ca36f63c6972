"""`environment` of an asset: groups of pyproject.toml, their lock files, and paths of interpreters."""

import stat
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import dagster as dg
import pytest

from dagster_sbatch.commands import lock
from dagster_sbatch.commands.deploy_environment import choose_for_removal
from dagster_sbatch.environments import deployed
from dagster_sbatch.environments.code import read_code
from dagster_sbatch.environments.deployed import EnvironmentListing, Environments
from dagster_sbatch.environments.groups import DEFAULT, read_group
from dagster_sbatch.errors import ConfigurationError
from dagster_sbatch.inspect.asset_preview import Preview
from dagster_sbatch.inspect.diagnosis.finding import Facts
from dagster_sbatch.inspect.diagnosis.slurm_jobs import check_environment
from dagster_sbatch.inspect.dry_run import try_script
from dagster_sbatch.inspect.plan_summary import place_run, summarise
from dagster_sbatch.inspect.remote_runs import Runs
from dagster_sbatch.launchers import Container, ScriptLauncher
from dagster_sbatch.project import Project
from dagster_sbatch.run.adoption import name_differences
from dagster_sbatch.run.plan import Plan, make_plan
from dagster_sbatch.run.run_environment import RunEnvironment
from dagster_sbatch.settings import Settings
from dagster_sbatch.slurm import SlurmRequest
from dagster_sbatch.slurm.gateway import Gateway, Projects, RefusedError
from dagster_sbatch.slurm.gateway.agent import releases
from dagster_sbatch.slurm.gateway.agent.building import HERE, check_interpreter, describe
from dagster_sbatch.slurm.gateway.agent.disk import RequestError, store
from dagster_sbatch.slurm.gateway.agent.server import find
from resources import PROJECT

GROUPS = """\
[dependency-groups]
cluster = ["dagster-pipes"]
cluster-torch = [{include-group = "cluster"}, "tiny>=2", "winonly>=1; sys_platform == 'win32'"]
Cluster_Empty = []
cluster-new = ["tiny"]
docs = ["tiny"]
"""
IMAGE = Container("$DATA/image.sif")
HASH = "--hash=sha256:aa"
DEVELOPMENT = Settings()
STAGING = DEVELOPMENT.model_copy(
    update={"deployment": "staging_supercomputer", "supercomputer_site": "musica", "deployment_base_path": "/base"}
)


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A project with the groups `torch` and `empty`, which are locked, and `new`, which is not."""
    (tmp_path / "pyproject.toml").write_text(GROUPS)
    (tmp_path / "requirements").mkdir()
    (tmp_path / "workloads").mkdir()
    (tmp_path / "workloads" / "main.py").touch()
    for name, pins in {"": ["dagster-pipes==1"], "-torch": ["dagster-pipes==1", "tiny==2.1"], "-empty": []}.items():
        text = "".join(f"{pin} {HASH}\n" for pin in pins)
        (tmp_path / "requirements" / f"cluster{name}.txt").write_text(text)
    return Project(tmp_path, PROJECT.site_overrides)


def plan(project: Project, environment: Any, settings: Settings = STAGING, container: Container | None = None) -> Plan:
    launcher = ScriptLauncher(container=container) if container else ScriptLauncher()
    request = SlurmRequest()
    return make_plan(settings, project, project.workloads / "main.py", launcher, request, environment=environment)


def inputs(project: Project, environment: str | None, **settings: Any) -> dict[str, str]:
    chosen = STAGING.model_copy(update=settings)
    return RunEnvironment(cast(Gateway, None), chosen, plan(project, environment)).inputs


@pytest.mark.parametrize(
    ("environment", "text"),
    [
        ("torhc", r"environment='torhc' is not an environment of this project; did you mean 'torch'\?\nEach one is a"),
        ("cuda", "; valid are empty, new, torch\nEach one is a dependency group"),
        ("", "; valid are empty, new, torch\n"),
        ("docs", "is not an environment of this project"),
        ("new", "requirements/cluster-new.txt does not exist. .*\nscripts/lock$"),
        (["torch"], r"environment=\['torch'\] is not a string"),
        (Path("/conda/bin/python"), "is not a string"),
        ("./env/bin/python", "is not an absolute path. Valid forms: /absolute/path, ~/path"),
        ("$CONDA/bin/python", "environment: .*\\$CONDA is unknown"),
    ],
)
@pytest.mark.parametrize("settings", [STAGING, DEVELOPMENT], ids=["staging", "development"])
def test_what_cannot_be_an_environment_is_refused_everywhere(
    project: Project, environment: Any, text: str, settings: Settings
) -> None:
    with pytest.raises(ConfigurationError, match=text):
        plan(project, environment, settings)


def test_a_project_without_groups_says_so() -> None:
    with pytest.raises(ConfigurationError, match=r"is not an environment of this project; it has none\nEach one is"):
        make_plan(STAGING, PROJECT, "flights.py", ScriptLauncher(), SlurmRequest(), environment="torch")


@pytest.mark.parametrize(
    ("pins", "text"),
    [
        (["dagster-pipes==1"], "requires tiny>=2, and the file has no tiny"),
        (["dagster-pipes==1", "tiny==1.9"], "requires tiny>=2, and the file has tiny 1.9"),
        (["tiny==2"], "requires dagster-pipes, and the file has no dagster-pipes"),
    ],
)
def test_a_lock_file_that_is_out_of_date(project: Project, pins: list[str], text: str) -> None:
    path = project.root / "requirements" / "cluster-torch.txt"
    path.write_text("".join(f"{pin} {HASH}\n" for pin in pins))
    error = rf"^{path} is out of date. The group cluster-torch of pyproject.toml {text}. .*\nscripts/lock$"
    with pytest.raises(ConfigurationError, match=error):
        plan(project, "torch")


def test_the_lock_file_of_assets_that_name_no_environment_is_out_of_date(project: Project) -> None:
    project.lock.write_text(f"tiny==2 {HASH}\n")
    error = rf"^{project.lock} is out of date. The group cluster of pyproject.toml requires dagster-pipes, and "
    with pytest.raises(ConfigurationError, match=error):
        inputs(project, None)
    assert "packages" in inputs(project, None, python="/a/python")  # which has the packages


@pytest.mark.parametrize(
    ("each", "text"),
    [
        ('{include-group = "cluster-a"}', "cluster-a includes itself"),
        ('{include-group = "b"}', "Dependency group 'b' not found"),
        ('"tiny >> 2"', "Expected .*\n.*tiny >> 2"),
    ],
)
def test_a_group_that_cannot_be_resolved(project: Project, each: str, text: str) -> None:
    (project.root / "pyproject.toml").write_text(f"[dependency-groups]\ncluster-a = [{each}]\n")
    (project.root / "requirements" / "cluster-a.txt").touch()
    with pytest.raises(
        ConfigurationError, match=rf"'cluster-a' was malformed: (?s:.*){text}(?s:.*)Correct \[dependency"
    ):
        plan(project, "a")


def test_each_group_is_locked_into_a_file_of_its_own(project: Project) -> None:
    files = lock.locked_files(project.root)
    assert list(files) == ["dev.txt", "cluster.txt", "cluster-empty.txt", "cluster-new.txt", "cluster-torch.txt"]
    assert files["cluster-torch.txt"] == ["--group", "cluster-torch"]
    assert list(lock.locked_files(PROJECT.root)) == ["dev.txt", "cluster.txt"]


@pytest.mark.parametrize("environment", ["torch", "/there/env/bin/python"])
def test_development_uses_the_projects_own_environment_and_says_so(project: Project, environment: str) -> None:
    (note,) = plan(project, environment, DEVELOPMENT).notes
    assert note.startswith(f"environment={environment!r} is for the supercomputer.")
    assert plan(project, environment).notes == ()


def test_imports_are_compared_with_the_lock_of_the_group(project: Project) -> None:
    (project.root / "workloads" / "main.py").write_text("import dagster\n")
    (note,) = plan(project, "torch").notes
    assert "the package dagster is not in cluster-torch.txt. Add it to the `cluster-torch` group" in note
    assert plan(project, "/there/env").notes == ()
    assert plan(project, None, container=IMAGE).notes == ()


def test_a_container_has_packages_of_its_own(project: Project) -> None:
    with pytest.raises(ConfigurationError, match=r"environment='torch' has no effect with a container: .*Remove one"):
        plan(project, "torch", container=IMAGE)


def test_the_container_of_a_site_counts_as_one_of_the_asset(project: Project) -> None:
    """The asset may leave it out. The packages of its image are not compared with a lock file."""
    entry = {**PROJECT.site_overrides["musica"], "launchers": {"script": {"container": {"image": "image.sif"}}}}
    project = Project(project.root, {"musica": entry})
    with pytest.raises(ConfigurationError, match=r"has no effect with a container: .* container=None"):
        plan(project, "torch")
    without = make_plan(
        STAGING, project, project.workloads / "main.py", ScriptLauncher(container=None), SlurmRequest(),
        environment="torch",
    )  # fmt: skip
    assert without.launcher.container is None
    (project.workloads / "main.py").write_text("import dagster\n")
    assert plan(project, None).notes == ()
    assert len(plan(Project(project.root, PROJECT.site_overrides), None).notes) == 1


def test_the_environment_is_an_input_and_the_default_has_the_inputs_that_it_had(project: Project) -> None:
    default, torch = inputs(project, None), inputs(project, "torch")
    assert default["packages"] == read_group(project, None).digest
    assert torch["packages"] == read_group(project, "torch").digest
    assert name_differences(torch, {"inputs": default}) == "packages"
    assert name_differences(inputs(project, "/a"), {"inputs": default}) == (
        "SLURM_PYTHON (gone), environment (new), packages (gone)"
    )
    assert name_differences(inputs(project, "/a"), {"inputs": inputs(project, "/b")}) == "environment"
    assert inputs(project, "torch", python="/other/python") == torch  # what an asset asks for counts more


def test_the_preview_names_the_lock_or_the_interpreter(project: Project) -> None:
    shown = summarise("step", plan(project, "torch"), STAGING.model_copy(update={"python": "/mine"}))
    assert shown["packages"] == "torch: requirements/cluster-torch.txt"
    assert shown["python"] == "/base/environments/<hash of its content>/bin/python"
    shown = summarise("step", plan(project, "$DATA/x/bin/python"), STAGING)
    assert shown["python"] == "$DATA/x/bin/python"
    assert "packages" not in shown
    assert place_run(STAGING, "r", "/there/python").python == "/there/python"


# On the login node, run here


def ask_for(folder: Path, asked: str, asked_by: str = "environment", **fields: Any) -> dict[str, Any]:
    (folder / "environments").mkdir(exist_ok=True)
    limits = {"oldest": [3, 11], "newest": [3, 99], "candidates": [], "setup": [], **fields}
    content: dict[str, Any] = {"code": {}, "modules": [], "lock": None}
    named = {"asked": asked, "python": asked, "asked_by": asked_by}
    return {"folder": str(folder / "environments"), **named, **content, **limits}


def test_the_folder_of_an_interpreter_is_as_good_as_its_path(tmp_path: Path) -> None:
    python = tmp_path / "env" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    found = describe(ask_for(tmp_path, str(tmp_path / "env")))
    assert found["python"] == str(python)
    assert found["kind"] == "path"
    assert found["interpreter"] == describe(ask_for(tmp_path, str(python)))["interpreter"]


@pytest.mark.parametrize("mode", [None, 0o600])
def test_an_interpreter_that_does_not_exist_or_cannot_be_executed(tmp_path: Path, mode: int | None) -> None:
    python = tmp_path / "python"
    if mode:
        python.touch()
        python.chmod(stat.S_IFREG | mode)
    why = "Permission denied" if mode else "No such file or directory"
    with pytest.raises(RequestError, match=rf"environment={python} does not run on .*: {why}(?s:.)*Name a Python"):
        describe(ask_for(tmp_path, str(python)))


def test_an_interpreter_that_is_too_old_is_refused_if_an_asset_names_it(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=rf"environment={sys.executable} is Python 3.* need 3.99 or newer"):
        describe(ask_for(tmp_path, sys.executable, oldest=[3, 99]))
    assert describe(ask_for(tmp_path, sys.executable, "SLURM_PYTHON", oldest=[3, 99]))["python"]


def test_an_interpreter_is_checked_without_making_anything(tmp_path: Path) -> None:
    assert check_interpreter(None, ask_for(tmp_path, sys.executable, modules=["dagster_pipes"]), None) == {}
    said = rf"^environment={sys.executable} cannot import none_such on .*: .*No module named 'none_such'\nInstall .*\n"
    with pytest.raises(RequestError, match=rf"{said}{sys.executable} -m pip install none-such$"):
        check_interpreter(None, ask_for(tmp_path, sys.executable, modules=["none_such"]), None)
    assert [path.name for path in (tmp_path / "environments").iterdir() if path.is_dir()] == []


class Published:
    """The folder of environments, as the agent sees it, with an environment of each name."""

    def __init__(self, folder: Path, *names: str, code: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        for name in names:
            (folder / name).mkdir(parents=True)
            content = dict.fromkeys(releases.NEEDED)
            about = dict.fromkeys(("executable", "version", "machine", "glibc"), "")
            own = {"name": name, "python": sys.executable, "code": code or {}, "interpreter": about}
            store(str(folder / name / HERE), {**content, **own})

    def ask(self, *_: Any, do: str, **fields: Any) -> Any:
        """Stand for `Gateway.ask`, with the agent in this process."""
        try:
            return find(do)(None, {**fields, "folder": str(self.folder)}, lambda **_: None)
        except RequestError as error:
            raise RefusedError(str(error)) from None

    def test(self, _: str) -> tuple[bool, str]:
        """Stand for `Gateway.test`."""
        return True, "sbatch: Job 1 to start"

    @property
    def environments(self) -> Environments:
        return Environments(cast(Gateway, self), "/base", PROJECT.load_site("musica"))

    def publish(self, **names: str) -> bool:
        found = {each.environment.name: each.environment for each in self.environments.inventory()}
        groups = {group.removeprefix("default"): found[name] for group, name in names.items()}
        return self.environments.publish(groups, "")

    def name(self, group: str = DEFAULT) -> str | None:
        published = self.environments.published(group)
        return published.environment.name if published else None


def test_all_groups_are_published_and_rolled_back_at_once(tmp_path: Path) -> None:
    there = Published(tmp_path, "a1", "b1", "a2", "b2")
    assert there.name("torch") is None
    assert there.publish(default="a1", torch="b1")
    assert not there.publish(default="a1", torch="b1")
    assert there.publish(default="a1", torch="b2")  # only one of them is new
    assert there.publish(default="a2", torch="b2")
    assert (there.name(), there.name("torch"), there.name("other")) == ("a2", "b2", None)
    there.environments.roll_back()
    there.environments.roll_back()
    assert (there.name(), there.name("torch")) == ("a1", "b1")


def test_the_doctor_names_the_group_that_cannot_run(project: Project, tmp_path: Path) -> None:
    there = Published(tmp_path / "environments", "a1", "b1", "c1", code=read_code(project.workloads).digests)
    facts = Facts(project, dg.DagsterInstance.ephemeral, ExitStack())
    facts.settings = STAGING.model_copy(update={"deployment": "production_supercomputer"})
    facts.site, facts.runs = project.load_site("musica"), Runs(cast(Gateway, there), STAGING)
    state, found, fix = check_environment(facts)
    assert (state, "cluster-new.txt does not exist" in found, fix) == ("broken", True, "do what the error says")

    (project.root / "requirements" / "cluster-new.txt").write_text(f"tiny==2 {HASH}\n")
    there.publish(default="a1", torch="b1")
    state, found, fix = check_environment(facts)
    assert found == "environment empty, new has not been published: runs of assets that name it are refused"
    assert (state, fix) == ("broken", "scripts/deploy_environment.py")

    there.publish(default="a1", torch="b1", empty="c1", new="c1")
    assert check_environment(facts)[0] == "ok"

    (project.workloads / "main.py").write_text("changed")  # or production has been rolled back
    state, found, fix = check_environment(facts)
    said = f"what is here is not what was published: runs are refused\n{project.workloads / 'main.py'} is changed"
    assert (state, found) == ("broken", said)
    assert fix.endswith("publish what is here: scripts/deploy_environment.py")
    for number in range(5):
        (project.workloads / f"new_{number}.py").touch()
    assert check_environment(facts)[1].endswith("new_3.py is new\nand 1 more file")


def trial(there: Published, project: Project, environment: str | None, **settings: str) -> tuple[bool, str]:
    """Ask Slurm about the job of an asset, as `scripts/preview --test-only` and the doctor do."""
    changed = STAGING.model_copy(update=settings)
    shown = Preview(plan(project, environment), {}, place_run(changed, "r", environment or "/p"), "step", None, changed)
    return try_script(cast(Gateway, there), shown, Projects({"p1": frozenset("q")}, "p1"))


def test_an_interpreter_that_cannot_run_workloads_is_found_before_the_job(project: Project, tmp_path: Path) -> None:
    there = Published(tmp_path / "environments")
    (tmp_path / "environments").mkdir()
    assert trial(there, project, sys.executable) == (True, "sbatch: Job 1 to start\ncharged to project p1")
    accepted, said = trial(there, project, "/no/env/bin/python")
    assert (accepted, "environment=/no/env/bin/python does not run on " in said) == (False, True)
    assert said.endswith(
        "\nName a Python interpreter, or the folder that has its bin/python, which all nodes can see and run."
    )


def test_a_login_node_without_a_python_for_the_packages_is_found_before_the_job(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = Published(tmp_path / "environments")
    (tmp_path / "environments").mkdir()
    assert trial(there, project, None)[0]
    accepted, said = trial(there, project, None, python="/no/bin/python")
    assert (accepted, "SLURM_PYTHON=/no/bin/python does not run on " in said) == (False, True)
    monkeypatch.setattr(deployed, "OLDEST", (4, 0))
    monkeypatch.setattr(deployed, "NEWEST", (4, 1))
    accepted, said = trial(there, project, "torch")
    assert (accepted, said.startswith("no Python 4.0 to 4.1 on ")) == (False, True)


def test_a_group_that_is_not_published_is_found_before_the_job(project: Project, tmp_path: Path) -> None:
    there = Published(tmp_path / "environments", "a1", "b1")
    there.publish(default="a1")
    assert trial(there, project, "torch")[0]
    production = {"deployment": "production_supercomputer"}
    accepted, said = trial(there, project, "torch", **production)
    assert not accepted
    assert said.startswith("environment 'torch' has not been published for production_supercomputer yet. ")
    assert said.endswith("Publish what is here:\nscripts/deploy_environment.py")
    there.publish(default="a1", torch="b1")
    assert trial(there, project, "torch", **production)[0]


def test_cleaning_keeps_what_each_group_runs_or_can_go_back_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = Published(tmp_path, "a1", "b1", "a2", "b2", "a3", "b3", "old")
    for number in "123":
        there.publish(default=f"a{number}", torch=f"b{number}")
    marks = {each.environment.name: each.published for each in there.environments.inventory()}
    assert marks == {
        "a1": "", "b1": "", "old": "", "a2": "before", "b2": "before torch", "a3": "current", "b3": "current torch"
    }  # fmt: skip
    monkeypatch.setattr(releases, "GRACE", -60.0)
    listings: list[EnvironmentListing] = there.environments.inventory()
    assert sorted(choose_for_removal(listings, {"b1"}, keep=0)) == ["a1", "old"]
    assert sorted(there.environments.remove(list(marks))) == ["a1", "b1", "old"]
