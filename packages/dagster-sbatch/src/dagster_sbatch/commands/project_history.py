"""The project's Dagster instance, from whatever folder a command was started in."""

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import dagster as dg

from dagster_sbatch.errors import ConfigurationError, describe_instance_error
from dagster_sbatch.project import Project

HISTORY = ".dagster"  # folder of the project's Dagster instance, as dagster.yaml names it; the first run makes it


def choose_instance(project: Project) -> None:
    """Let `dg.DagsterInstance.get()` open the project's instance. Changes the working directory of this process."""
    os.chdir(project.root)  # where dagster.yaml is, and the history that it names
    os.environ.setdefault("DAGSTER_HOME", str(project.root))


@contextmanager
def open_instance(project: Project) -> Iterator[dg.DagsterInstance]:
    """Open the project's Dagster instance.

    Raises ConfigurationError: its dagster.yaml has an error, or its database does not answer.
    """
    choose_instance(project)
    with ExitStack() as stack:
        try:
            instance = stack.enter_context(dg.DagsterInstance.get())
            instance.fetch_materializations(dg.AssetKey("any"), limit=1)
        except Exception as error:  # noqa: BLE001 - each file and database has errors of its own
            file = f"{os.environ['DAGSTER_HOME']}/dagster.yaml"
            raise ConfigurationError(
                f"Dagster's history cannot be opened: {describe_instance_error(error)}\n"
                f"Correct {file}, or what it names."
            ) from None
        yield instance


@contextmanager
def open_history(project: Project) -> Iterator[dg.DagsterInstance | None]:
    """Open the project's Dagster instance; None if there is none yet, or it has an error, which stderr shows."""
    if "DAGSTER_HOME" not in os.environ and not (project.root / HISTORY).is_dir():
        yield None
        return
    with ExitStack() as stack:
        try:
            history = stack.enter_context(open_instance(project))
        except ConfigurationError as error:
            print(f"What earlier runs have used is not known. {error}", file=sys.stderr)
            history = None
        yield history
