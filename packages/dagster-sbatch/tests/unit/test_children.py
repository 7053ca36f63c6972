"""No child process gets this process's environment: it may hold secrets, from a shell or from `.env`."""

import ast
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dagster_sbatch.children import child_environment
from dagster_sbatch.environments import lockfile, wheels
from dagster_sbatch.run.local import workload_environment
from support import ENGINE, ROOT

STARTERS = {"run", "Popen", "call", "check_call", "check_output", "getoutput", "system", "popen", "spawnv"}
ELSEWHERE = ("slurm/gateway/agent", "launchers/ray/job", "launchers/srun/job", "slurm/job")
"""What runs on the supercomputer, where no setting of Dagster gets to."""
DAGSTER_ITSELF = {"commands/demo.py", "check", "run_launcher/fork_client.py", "run_launcher/fork_server.py"}
BY_LOCAL = {"run/supervisor.py"}
"""Started with the workload's environment, which it passes on."""


def programs() -> Iterator[tuple[str, ast.Module]]:
    for folder, pattern in ((ENGINE, "**/*.py"), (ROOT / "jobs", "*.py"), (ROOT / "scripts", "*")):
        for path in folder.glob(pattern):
            name = str(path.relative_to(folder))
            if path.is_file() and not name.startswith(ELSEWHERE) and name not in DAGSTER_ITSELF | BY_LOCAL:
                yield name, ast.parse(path.read_text())


def test_every_child_process_is_given_an_environment() -> None:
    found = 0
    for name, tree in programs():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            owner = node.func.value
            if isinstance(owner, ast.Name) and owner.id in ("subprocess", "os") and node.func.attr in STARTERS:
                found += 1
                assert "env" in {keyword.arg for keyword in node.keywords}, f"{name}:{node.lineno} inherits everything"
    assert found >= 7


def test_nothing_else_passes_on_the_whole_environment() -> None:
    """As `{**os.environ}`, `dict(os.environ)`, `os.environ.copy()` or by leaving some of it out."""
    for name, tree in programs():
        if name in ("children.py", "_environment.py"):
            continue
        for node in ast.walk(tree):
            whole = ast.unparse(node) if isinstance(node, ast.Dict | ast.Call | ast.DictComp) else ""
            passed = ("**os.environ", "dict(os.environ)", "os.environ.copy()", "os.environ.items()")
            assert not any(each in whole for each in passed), f"{name}: {whole[:80]}"


def test_what_a_child_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ASC_AUTHENTIK_API_TOKEN", "AWS_SECRET_ACCESS_KEY", "PIP_INDEX_URL", "LC_TIME", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "value")
    assert {"PATH", "LC_TIME", "A"} <= set(child_environment(A="1"))
    given = set(child_environment()) | set(workload_environment())
    assert not {"ASC_AUTHENTIK_API_TOKEN", "AWS_SECRET_ACCESS_KEY", "PIP_INDEX_URL", "HTTPS_PROXY"} & given
    assert {"PIP_INDEX_URL", "HTTPS_PROXY"} <= set(child_environment("PIP_", "HTTPS_PROXY"))


def test_waiting_threads_of_a_workload_leave_the_cpus_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    assert workload_environment()["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert workload_environment()["OMP_WAIT_POLICY"] == "ACTIVE"


def test_pip_and_the_build_code_of_packages_get_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASC_OIDC_APP_PASSWORD", "secret")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    stand_in = tmp_path / "python"
    stand_in.write_text(f"#!{shutil.which('bash')}\nenv >'{tmp_path}/seen'\n")
    stand_in.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(stand_in))
    wheels._pip(["wheel"], lockfile.LockFile(tmp_path / "cluster.txt", ()), tmp_path, lambda: None)
    seen = (tmp_path / "seen").read_text()
    assert "PIP_NO_INDEX=1" in seen
    assert "secret" not in seen
