"""A command on this machine, as `run_workload` follows it."""

import os
import sys
import threading
import time
from pathlib import Path

from resources.local import RunDirectory, run_workload
from tests.simulated_site import wait_until


def test_how_long_it_ran_does_not_include_what_its_output_costs_us(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    slow = 0.5

    def store(data: bytes) -> None:
        """As a database that takes its time."""
        wait_until(directory.end.exists, "the command has ended", 60, 0.01)
        time.sleep(slow)

    begun = time.monotonic()
    command = [sys.executable, "-c", "print('a line')"]
    ended = run_workload(command, os.environ, directory, {directory.stdout: store}, threading.Event())
    assert ended.exit_code == 0
    assert 0 < ended.seconds <= time.monotonic() - begun - slow
