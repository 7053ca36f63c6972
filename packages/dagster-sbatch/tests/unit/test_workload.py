"""Which folder is sent with a program, and how Python runs it; the variables that it may have."""

import os
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from dagster_sbatch.errors import ConfigurationError
from dagster_sbatch.launchers import ScriptLauncher, SrunLauncher
from dagster_sbatch.run.plan import Plan, complete_extras, make_plan
from dagster_sbatch.run.workload import read_workload
from dagster_sbatch.settings import Settings
from dagster_sbatch.slurm import SlurmRequest
from resources import PROJECT


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    names = "main.py climate/prog.py climate/model/__main__.py climate/model/__init__.py a-b/__main__.py"
    names += " deep/__init__.py deep/er/__init__.py deep/er/run.py deep/er/__main__.py"
    for name in names.split():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    return tmp_path


@pytest.mark.parametrize(
    ("given", "command"),
    [
        ("main.py", ["/there/main.py"]),
        ("climate/prog.py", ["/there/climate/prog.py"]),
        ("climate/model", ["-m", "climate.model"]),
        ("climate/model/__main__.py", ["/there/climate/model/__main__.py"]),
        ("deep/er", ["-m", "deep.er"]),
        ("climate/../main.py", ["/there/main.py"]),
    ],
)
def test_all_below_the_workloads_folder_has_that_as_its_code_root(given: str, command: list[str], folder: Path) -> None:
    found = read_workload(folder / given, ["--n", "1"], folder)
    assert found.root == folder
    assert found.command("/there") == [*command, "--n", "1"]


def test_a_link_on_the_way_to_the_workloads_folder_changes_nothing(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    link = tmp_path_factory.mktemp("link") / "project"
    link.symlink_to(folder)
    assert read_workload(link / "climate" / "prog.py", [], folder).command("/there") == ["/there/climate/prog.py"]
    assert read_workload(link / "climate" / "prog.py", [], folder).root == folder


@pytest.mark.parametrize(
    ("given", "root", "command"),
    [
        ("main.py", ".", ["/there/main.py"]),
        ("climate/prog.py", "climate", ["/there/prog.py"]),
        ("climate/model", "climate", ["-m", "model"]),
        ("deep/er/run.py", ".", ["/there/deep/er/run.py"]),
        ("deep/er", ".", ["-m", "deep.er"]),
    ],
)
def test_elsewhere_it_is_the_folder_of_the_program_or_of_its_outermost_package(
    given: str, root: str, command: list[str], folder: Path
) -> None:
    found = read_workload(folder / given, [], folder / "workloads")
    assert found.root == folder / root
    assert found.command("/there") == command


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("none.py", "the workload .*/none.py does not exist. Correct"),
        ("climate", "the package .*/climate has no __main__.py. Add one"),
        ("a-b", "the package .*/a-b cannot be imported: .*Rename the folder"),
        ("w.sh", "w.sh, line 2: .*\n.*\n.* For another language use launcher=CommandLauncher"),
        ("binary", "For another language use launcher=CommandLauncher"),
    ],
)
def test_what_cannot_run(given: str, text: str, folder: Path) -> None:
    (folder / "w.sh").write_text("#!/bin/sh\nexec echo hello\n")
    (folder / "binary").write_bytes(b"\x7fELF\0\0")
    with pytest.raises(ConfigurationError, match=text):
        read_workload(folder / given, [], folder / "workloads")


def plan(folder: Path, **arguments: Any) -> Plan:
    given: dict[str, Any] = {"launcher": ScriptLauncher(), "request": SlurmRequest(), **arguments}
    return make_plan(Settings(), PROJECT, folder / "main.py", **given)


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ("--trials 3", r"args='--trials 3' is one string\. Write a list"),
        (["--trials", 3], r"args\[1\]=3 is not a string\. Write str"),
        ([Path("/x")], r"args\[0\]=PosixPath\('/x'\) is not a string"),
        (["a\0b"], r"args\[0\] cannot be an argument: it has a NUL, a byte that is not UTF-8, a line end "),
        (["\udcff"], "cannot be an argument"),
        (["", "é" * 65536], r"args\[1\] cannot be an argument"),
        (["two\r\nlines"], "cannot be an argument"),  # sbatch refuses a script with them, whatever they are in
        ([None], "is not a string"),
        (None, r"args=None is not a list\. Write a list"),
        ({"--trials": "3"}, "is not a list"),  # its values would be lost
        ({"a", "b"}, "is not a list"),  # another order in each process
        ((each for each in ["--trials", "3"]), "is not a list"),  # can be read once, and is checked first
    ],
)
def test_arguments_are_a_list_of_texts(args: Any, text: str, folder: Path) -> None:
    with pytest.raises(ConfigurationError, match=text):
        plan(folder, args=args)


@pytest.mark.parametrize(
    ("env", "text"),
    [
        ([("A", "1")], "env=[('A', '1')] is not a dictionary. Write for instance env={'OMP_NUM_THREADS': '1'}"),
        ({"A-B": "1"}, "env['A-B'] is not the name of a variable"),
        ({"X; touch f; Y": "1"}, "is not the name of a variable"),
        ({"": "1"}, "is not the name of a variable"),
        ({"1A": "1"}, "is not the name of a variable"),
        ({"A\n": "1"}, "is not the name of a variable"),
        ({"\u00e9": "1"}, "is not the name of a variable"),
        ({5: "1"}, "is not the name of a variable"),
        ({"N": 5}, "env['N'] is not a string but 5 (int)"),
        ({"N": None}, "env['N'] is not a string but None"),
        ({"X": dg.EnvVar("HOME")}, "(EnvVar)"),
        ({"X": "a\0b"}, "has a NUL"),
        ({"X": os.fsdecode(b"\xff")}, "a byte that is not UTF-8"),
        ({"X": "y" * 131072}, "env['X'] cannot be a variable: it has a NUL, a byte that is not UTF-8, a line end "),
        ({"X": "two\r\nlines"}, "a line end of Windows (CRLF)"),
        ({"X": "y" * 131060}, "env cannot be passed: its variables have 128 KiB in all. Use extras"),
        ({"X": "'" * 27000}, "128 KiB in all"),
        ({"X": "y" * 70000, "Y": "y" * 70000}, "128 KiB in all"),
        ({"PATH": "/mine"}, "the deployment sets this variable. Extend it in the workload"),
        ({"PYTHON": "python3"}, "the deployment sets this variable."),
        ({"PYTHONPATH": "/pp"}, "Put modules into the code root"),
        ({"PYTHONHOME": "/pp"}, "the deployment sets this variable."),
        ({"PYTHONSAFEPATH": "1"}, "the deployment sets this variable."),
        ({"PYTHONPLATLIBDIR": "lib64"}, "the deployment sets this variable."),
        ({"DATA_ROOT": "/d"}, "a setting of the deployment"),
        ({"DAGSTER_PIPES_CONTEXT": ""}, "the deployment sets this variable."),
        ({"SLURM_JOB_ID": "1"}, "the deployment sets this variable."),
        ({"SLURMD_NODENAME": "n1"}, "the deployment sets this variable."),
        ({"JOB_TMPDIR": "/tmp"}, "the deployment sets this variable."),
        ({"RAY_ADDRESS": "auto"}, "the deployment sets this variable."),
        ({"RAY_AUTH_TOKEN": "a"}, "the deployment sets this variable."),
    ],
)
def test_a_variable_that_could_not_be_the_same_everywhere_is_refused(env: Any, text: str, folder: Path) -> None:
    with pytest.raises(ConfigurationError) as caught:
        plan(folder, env=env)
    assert text in str(caught.value)


@pytest.mark.parametrize("partitions", [(), ("a",)])
@pytest.mark.parametrize("value", [["b", "a"], {"a": 1}, 5])
def test_the_name_of_the_partitions_is_no_name_of_an_extra(value: Any, partitions: tuple[str, ...]) -> None:
    """As partitions their order does not count: ["a", "b"] would be the same input."""
    with pytest.raises(ConfigurationError, match=r"extras\['partition_keys'\] holds the partitions of the run"):
        complete_extras({"partition_keys": value}, partitions)


def test_ordinary_variables_stay_as_they_are(folder: Path) -> None:
    env = {"OMP_NUM_THREADS": "4", "LD_LIBRARY_PATH": "/x", "_a1": "", "TEXT": "a'b $HOME\n\u00e9"}
    assert plan(folder, env=env).env == env


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
def test_what_a_launcher_sets_for_each_process_is_refused(name: str, folder: Path) -> None:
    """In a job, that of the asset counted for all processes, and in `development` that of the launcher."""
    with pytest.raises(ConfigurationError, match=rf"env\['{name}'\]: SrunLauncher sets this variable for each process"):
        plan(folder, env={name: "1"}, launcher=SrunLauncher())
    assert plan(folder, env={name: "1"}).env == {name: "1"}
