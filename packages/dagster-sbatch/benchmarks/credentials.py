"""What access costs: before each connect, and for a new certificate. On the simulated site, as root.

    ../../.venv/bin/python -m benchmarks.credentials

Each pair is measured in turns in one run; what counts is the ratio. The floor of "nothing to do" is reading and parsing
the certificate once; that of a sensor's tick is the look at the files; that of a new certificate is the `step` program,
given a token that a bare request fetched; that of a connection is OpenSSH's `ssh`.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import dagster as dg
from cryptography.hazmat.primitives.serialization import load_ssh_public_identity
from rich.console import Console
from rich.table import Table

from dagster_sbatch.auth import check_health, ensure_certificate, refresh
from dagster_sbatch.auth.keys import certificate_path
from dagster_sbatch.settings import Settings
from dagster_sbatch.ssh import connect
from jobs.credentials import refresh_credentials_sensor
from slurm_in_a_box import CERTIFICATE_USER, SimulatedSite

SITE_NAME = "benchmark"


def main() -> None:
    """Measure and print the table."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    SimulatedSite.down(SITE_NAME)
    site = SimulatedSite.up(SITE_NAME, install=True)
    with TemporaryDirectory() as home:
        _measure(site, Path(home))


def _measure(site: SimulatedSite, home: Path) -> None:
    (home / ".ssh").mkdir()
    shutil.copy(site.login.known_hosts, home / ".ssh" / "known_hosts")
    variables = site.environment()
    os.environ |= {**variables, "HOME": str(home)}
    try:
        settings = Settings.model_validate(variables)
        assert ensure_certificate(settings) and settings.edge_node_key_path
        path, openssh = certificate_path(settings.edge_node_key_path), site.login_command("true")
        instance = dg.DagsterInstance.ephemeral()
        table = Table("", "runs", "ours, median", "worst", "floor, median", "ratio")
        for name, runs, ours, floor in (
            (
                "nothing to do",
                500,
                lambda: ensure_certificate(settings),
                lambda: load_ssh_public_identity(path.read_bytes()),
            ),
            ("a tick of the sensor", 100, lambda: _tick(instance), lambda: check_health(settings)),
            ("a new certificate", 20, lambda: refresh(settings, "no", "now"), lambda: _with_step(site, path.parent)),
            (
                "log in, run true",
                20,
                lambda: _connect(settings),
                lambda: subprocess.run(openssh, capture_output=True, check=True),
            ),
            ("secrets and certificate", 20, lambda: refresh(settings, "now", "now"), None),
        ):
            mine, bare = _alternate(ours, floor, runs)
            ratio = [_milliseconds(bare), f"{statistics.median(mine) / statistics.median(bare):.2f}"] if bare else []
            table.add_row(name, str(runs), _milliseconds(mine), f"{max(mine) * 1000:.2f} ms", *ratio)
        Console().print(table)
    finally:
        SimulatedSite.down(SITE_NAME)


def _alternate(
    ours: Callable[[], object], floor: Callable[[], object] | None, runs: int
) -> tuple[list[float], list[float]]:
    mine, bare = [], []
    for _ in range(runs):
        mine.append(_seconds(ours))
        if floor:
            bare.append(_seconds(floor))
    return mine, bare


def _seconds(function: Callable[[], object]) -> float:
    begun = time.perf_counter()
    function()
    return time.perf_counter() - begun


def _milliseconds(times: list[float]) -> str:
    return f"{statistics.median(times) * 1000:.2f} ms"


def _tick(instance: dg.DagsterInstance) -> None:
    result = refresh_credentials_sensor(dg.build_sensor_context(instance=instance))
    assert isinstance(result, dg.SensorResult) and result.skip_reason  # nothing is due


def _connect(settings: Settings) -> None:
    with connect(settings, ensure_certificate) as connection:
        connection.run("true", hide=True)


def _with_step(site: SimulatedSite, folder: Path) -> None:
    password = next(token.key for token in site.authentik.tokens() if token.intent == "app_password")
    authority = site.certificate_authority
    subprocess.run(
        [
            authority.step, "ssh", "certificate", CERTIFICATE_USER.email, folder / "id_musica.pub", "--sign", "--force",
            "--ca-url", authority.url, "--root", authority.authorities.root_certificate,
        ],
        env={"PATH": "/usr/bin:/bin", "HOME": str(folder), "STEP_TOKEN": site.id_token(password)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=True,
    )  # fmt: skip


if __name__ == "__main__":
    main()
