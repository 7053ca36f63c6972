"""A wrong setting is seen before a run meets it: scripts/dev does not start, and scripts/doctor --settings fails."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dagster_sbatch.commands import dev
from dagster_sbatch.configuration import check_configuration
from dagster_sbatch.errors import ConfigurationError
from dagster_sbatch.setting_files import load_settings
from resources import PROJECT
from support import ROOT, access
from support.own_files import run_program


@pytest.fixture
def variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """In the environment: complete settings of a supercomputer."""
    found = access.environment("https://127.0.0.1:1", tmp_path)
    for name, value in found.items():
        monkeypatch.setenv(name, value)
    return found


WRONG = {
    "deployment": ({"DAGSTER_DEPLOYMENT": "moon"}, "DAGSTER_DEPLOYMENT='moon' is unknown"),
    "site": ({"SLURM_SUPERCOMPUTER_SITE": "musika"}, "did you mean 'musica'"),
    "missing": ({"SLURM_EDGE_NODE_USER": ""}, "SLURM_EDGE_NODE_USER=xy12345"),
    "port": ({"SLURM_EDGE_NODE_PORT": "ssh"}, "SLURM_EDGE_NODE_PORT"),
    "QoS": ({"SLURM_QOS": "fats_zen4_0768"}, "fats_zen4_0768"),
    "partition": ({"SLURM_PARTITION": "zen5"}, "zen5"),
}


def run(script: str, *arguments: str, **changes: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(ROOT / "scripts" / script), *arguments]
    environment = {**os.environ, **changes}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)


@pytest.mark.parametrize("case", WRONG)
def test_each_is_named(variables: Mapping[str, str], monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    changes, text = WRONG[case]
    check_configuration(PROJECT)
    for name, value in changes.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError, match=text):
        check_configuration(PROJECT)


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("partitons", {}, "unknown field"),
        (
            "launchers",
            {"ray": {"pre_start_comands": []}},
            r"\['other'\]\['launchers'\]: RayLauncher: .*unknown field; did you mean 'pre_start_commands'",
        ),
        ("host_authorities", ["musica ssh-rsa AAAA"], "does not begin with @cert-authority"),
    ],
)
def test_so_is_a_mistake_in_the_entry_of_any_site(key: str, value: Any, text: str) -> None:
    """Also where another site is used, or none."""
    project = replace(PROJECT, site_overrides={**PROJECT.site_overrides, "other": {key: value}})
    with pytest.raises(ConfigurationError, match=text):
        check_configuration(project)


@pytest.mark.usefixtures("variables")
def test_a_site_that_the_package_knows_needs_no_entry() -> None:
    assert check_configuration(replace(PROJECT, site_overrides={})).supercomputer_site == "musica"


def test_a_variable_in_lower_case_is_unknown(tmp_path: Path) -> None:
    """Its value would have no effect: jobs would be charged to another project."""
    (tmp_path / ".env").write_text("slurm_account=p70000\n")
    with pytest.raises(ConfigurationError, match="unknown variable slurm_account; did you mean 'SLURM_ACCOUNT'"):
        load_settings(["musica"], tmp_path)


@pytest.mark.usefixtures("variables")
def test_dev_does_not_start() -> None:
    changes, text = WRONG["deployment"]
    done = run("dev", **changes)
    assert done.returncode == 1
    assert done.stderr.startswith("Dagster is not started, because the settings are wrong.\n")
    assert text in done.stderr
    assert done.stdout == ""


@pytest.mark.usefixtures("variables")
@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("DAGSTER_DEPLOYMENT=development", "DAGSTER_DEPLOYMENT"),
        ("DAGSTER_DEPLOYMENT=", "DAGSTER_DEPLOYMENT"),
        ("DAGSTER_HOME=/elsewhere", "DAGSTER_HOME"),
        ("DAGSTER_DEPLOYMENT=production_supercomputer", None),
        ("SLURM_ACCOUNT=p70000", None),
        ("EDITOR=vi", None),
        ("SLURM_QOS", None),
    ],
)
def test_dev_does_not_start_where_dagster_would_use_other_values(
    line: str, name: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dagster's commands put `.env` over their environment."""
    started: list[object] = []
    monkeypatch.setattr(os, "execv", lambda *_: started.append(1))
    monkeypatch.setattr(sys, "argv", ["dev"])
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    monkeypatch.setenv("EDITOR", "ed")
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text(f"{line}\n")
    (tmp_path / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
    if name is None:
        dev.main(replace(PROJECT, root=tmp_path))
        assert started
        return
    with pytest.raises(SystemExit, match=f"have different values of {name}"):
        dev.main(replace(PROJECT, root=tmp_path))
    assert not started


@pytest.mark.usefixtures("variables")
@pytest.mark.parametrize("daemon", [["-m", "dagster._daemon", "run"], ["bin/dagster-daemon", "run"]])
def test_dev_does_not_start_beside_another_daemon(
    daemon: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both would start some of the runs."""
    waits = "import sys\nsys.stdin.read()\n"
    for folder, name in (("dagster", "_daemon.py"), ("bin", "dagster-daemon"), ("dagster", "__init__.py")):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / name).write_text(waits if name != "__init__.py" else "")
    project = replace(PROJECT, root=tmp_path)
    started: list[object] = []
    monkeypatch.setattr(os, "execv", lambda *_: started.append(1))
    monkeypatch.setattr(sys, "argv", ["dev"])
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
    with (
        subprocess.Popen([sys.executable, *daemon], stdin=subprocess.PIPE, cwd=tmp_path) as running,
        pytest.raises(SystemExit, match=f"process {running.pid} is a Dagster daemon of this project"),
    ):
        dev.main(project)
    assert not started
    dev.main(project)
    assert started


@pytest.mark.usefixtures("variables")
def test_dev_does_not_start_without_its_dagster_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dagster would start with its own defaults: it would not retry runs whose process was killed."""
    monkeypatch.setattr(os, "execv", lambda *_: pytest.fail("it starts"))
    monkeypatch.setattr(sys, "argv", ["dev"])
    with pytest.raises(
        SystemExit, match=rf"^Dagster is not started.*\n{tmp_path}/dagster.yaml cannot be read: No such"
    ):
        dev.main(replace(PROJECT, root=tmp_path))


@pytest.mark.usefixtures("variables")
@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("dagster.yaml", b"storage: [1\nnux: 2\n", r"but got ':'\n  in {path}, line 2, column 4$"),
        ("dagster.yaml", b"\tnux: {}\n", "in {path}, line 1, column 1$"),
        ("dagster.yaml", b"nux: \x07\n", "{path}: unacceptable character"),
        ("dagster.yaml", b"nux: \xe4\n", "{path} cannot be read: line 1 is not in UTF-8"),
        ("dagster.yaml", b"nux: 2026-13-01\n", "{path}: month must be in 1..12"),
        ("dagster.yaml", b"# nothing\n", "{path} is empty, or"),
        ("dagster.yaml", b"- nux\n", "{path} is empty, or"),
        ("workspace.yaml", b"load_from: {\n", "in {path}, line 2, column 1$"),
        ("workspace.yaml", b"", "{path} is empty, or"),
        ("workspace.yaml", None, "{path} cannot be read: Is a directory"),
        ("pyproject.toml", b"[tool.dagster]\nmodule_name = x\n", r"{path}: Invalid value \(at line 2, column 15\)$"),
    ],
)
def test_dev_does_not_start_with_a_file_that_dagster_cannot_parse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes | None, text: str
) -> None:
    """Dagster would show a stack."""
    monkeypatch.setattr(os, "execv", lambda *_: pytest.fail("it starts"))
    monkeypatch.setattr(sys, "argv", ["dev"])
    (tmp_path / "dagster.yaml").write_text("nux: {enabled: false}\n")
    if content is None:
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit, match=text.format(path=tmp_path / name)) as refused:
        dev.main(replace(PROJECT, root=tmp_path))
    assert str(refused.value).startswith("Dagster is not started, because")


@pytest.mark.usefixtures("variables")
def test_the_command_for_ci() -> None:
    done = run("doctor", "--settings")
    assert (done.returncode, done.stdout) == (0, "the settings are correct: production_supercomputer, musica\n")
    done = run("doctor", "--settings", DAGSTER_DEPLOYMENT="development", SLURM_SUPERCOMPUTER_SITE="")
    assert done.stdout == "the settings are correct: development; DAGSTER_DEPLOYMENT chooses another\n"
    changes, text = WRONG["QoS"]
    done = run("doctor", "--settings", **changes)
    assert (done.returncode, done.stdout) == (1, "")
    assert text in done.stderr


@pytest.mark.usefixtures("no_other_daemon")
def test_the_ui_is_not_opened_to_the_users_of_a_login_node(
    variables: Mapping[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sbatch = tmp_path / "sbatch"
    sbatch.write_text("#!/bin/sh\n")
    sbatch.chmod(0o755)
    here = {"SLURM_EDGE_NODE_HOST": "localhost", "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = run("dev", "--no-such-option", **here)
    assert done.returncode == 1
    assert "Every user of this node could open it" in done.stderr
    accepted = run("dev", "--no-such-option", "--anyone-on-this-machine", **here)
    assert "No such option" in accepted.stderr, "it comes as far as Dagster"


STATUS = """\
import json
from musica_pipelines.definitions import defs
import dagster as dg
from dagster_sbatch.errors import ConfigurationError
found = {}
for name in ("refresh_credentials_when_due", "cancel_orphaned_jobs", "clean_run_directories", "observe_budget"):
    sensor = defs.get_sensor_def(name)
    with dg.build_sensor_context(instance=dg.DagsterInstance.ephemeral()) as context:
        try:
            sensor.evaluate_tick(context)
            found[name] = sensor.default_status.value, ""
        except ConfigurationError as error:
            found[name] = sensor.default_status.value, str(error)
print(json.dumps(found))
"""


@pytest.mark.parametrize(
    ("changes", "status", "error"),
    [
        ({}, "RUNNING", ""),
        ({"DAGSTER_DEPLOYMENT": "moon"}, "RUNNING", "DAGSTER_DEPLOYMENT='moon' is unknown"),
        ({"DAGSTER_DEPLOYMENT": "development"}, "STOPPED", ""),
        ({"SLURM_EDGE_NODE_USER": ""}, "RUNNING", "SLURM_EDGE_NODE_USER="),
    ],
)
def test_the_location_loads_and_the_sensors_run_where_they_are_needed(
    variables: dict[str, str], changes: dict[str, str], status: str, error: str, tmp_path: Path
) -> None:
    """With wrong settings their ticks fail; a skipped tick looks healthy in the UI."""
    (tmp_path / "status.py").write_text(STATUS)
    done = run_program(tmp_path / "status.py", files=tmp_path, variables={**variables, **changes})
    assert done.returncode == 0, done.stderr
    for found, said in json.loads(done.stdout.splitlines()[-1]).values():
        assert found == status
        assert (error in said) if error else said == ""
