"""A workload has a folder of its own: no file that it writes there is taken for one of the run directory."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from dagster_pipes import encode_param

from dagster_sbatch.launchers import BatchScriptLauncher, CommandLauncher, Launcher, ScriptLauncher
from dagster_sbatch.run.local import LocalProcess
from dagster_sbatch.slurm import SlurmRequest, allocate, load_site, render_job_script

NAMES = "cause end events failed job messages.jsonl stdout"
"""In the run directory, these say that a job is over, that its result was rejected, which one it is, why it failed."""
FILES = {"DAGSTER_PIPES_CONTEXT": "context.json", "DAGSTER_PIPES_MESSAGES": "messages.jsonl"}
WRITES = f"for name in '{NAMES}'.split(): open(name, 'w').write('of the workload')\n"


@pytest.mark.parametrize(
    "launcher", [ScriptLauncher(), CommandLauncher(), BatchScriptLauncher()], ids=lambda it: it.key
)
def test_in_a_job(launcher: Launcher, tmp_path: Path) -> None:
    run, program, site = tmp_path / "run", tmp_path / "code" / "program.py", load_site({}, "musica")
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\n{WRITES}")
    program.chmod(0o755)
    request = allocate(SlurmRequest(), site).request
    document = {"asset_keys": ["a"], "run_id": "", "extras": {}}
    paths = {name: encode_param({"path": f"{run}/{file}"}) for name, file in FILES.items()}
    body = launcher.render(request, [str(program)])
    variables = {"PYTHON": sys.executable, **paths}
    text = render_job_script(request, site, job_name="k", about={}, environment=variables, body=body)
    given = {"stdout": "", "stderr": "", "job.sh": text, "context.json": json.dumps(document)}
    for name, content in {**launcher.files(request), **given}.items():
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(content)
    of_slurm = {"PATH": os.environ["PATH"], "SLURM_JOB_ID": "17"}
    done = subprocess.run(["bash", "job.sh"], cwd=run, env=of_slurm, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert (run / "job").readlink() == Path("17")
    assert json.loads((run / "events").read_text().splitlines()[-1])["code"] == 0
    assert [name for name in ("cause", "end", "failed") if (run / name).exists()] == []
    assert "of the workload" not in (run / "messages.jsonl").read_text() + (run / "stdout").read_text()


def test_on_this_machine(tmp_path: Path) -> None:
    seen = bytearray()
    process = LocalProcess([sys.executable, "-c", WRITES], os.environ, tmp_path, {"stdout": seen.extend})
    ended = process.run(threading.Event())
    assert (ended.exit_code, ended.cause, bytes(seen)) == (0, "", b"")
