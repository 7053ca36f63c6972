"""What the commands share: a parser that shows examples, and errors as text and exit code."""

import argparse
import sys
from collections.abc import Callable

from dagster_sbatch.auth import AccessError
from dagster_sbatch.errors import ConfigurationError
from dagster_sbatch.slurm.gateway import RefusedError
from dagster_sbatch.ssh import SshError


def make_parser(description: str, examples: str) -> argparse.ArgumentParser:
    """Return a parser whose help keeps the line breaks of the description and of the examples."""
    form = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=description, epilog=examples, formatter_class=form)


def exit_code_of(command: Callable[[], int]) -> int:
    """Run a command and return its exit code.

    An error is printed to stderr: exit code 1 if something is to be corrected, or if the supercomputer refused;
    3 if the supercomputer cannot be reached; 130 after Ctrl-C.
    """
    try:
        return command()
    except (ConfigurationError, RefusedError) as error:
        problem, code = str(error), 1
    except (AccessError, SshError) as error:
        problem, code = str(error), 3
    except KeyboardInterrupt:
        return 130
    print(problem, file=sys.stderr)
    return code
