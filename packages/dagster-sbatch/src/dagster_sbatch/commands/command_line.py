"""What the commands share: a parser that shows examples, errors as text and exit code, tables."""

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from io import TextIOWrapper
from pathlib import Path
from typing import ParamSpec

from rich.console import Console
from rich.table import Table

from dagster_sbatch.auth import AccessError
from dagster_sbatch.errors import ConfigurationError
from dagster_sbatch.slurm.gateway import RefusedError
from dagster_sbatch.ssh import SshError

P = ParamSpec("P")
LEAST_WIDTH = 80  # of a table on a terminal. A narrower one wraps the lines itself: no job id is cut off
WIDEST = 10_000


def make_parser(description: str, examples: str) -> argparse.ArgumentParser:
    """Return a parser whose help keeps the line breaks of the description and of the examples."""
    name, form = f"scripts/{Path(sys.argv[0]).name}", argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(name, description=description, epilog=examples, formatter_class=form)


def make_trouble_printer() -> Callable[[str], None]:
    """Return a function that prints an error after which a request is repeated, unless it was the last one, too."""
    last = ""

    def report(text: str) -> None:
        nonlocal last
        if text != last:
            last = text
            print(f"{text}; trying again", file=sys.stderr)

    return report


def entry_point(*, wrong: int = 1, refused: int = 1) -> Callable[[Callable[P, int]], Callable[P, int]]:
    """Return a decorator for the `main` of a command, which returns the exit code.

    The command writes UTF-8, and ends with 1 and no traceback without a reader (`| head`). An error is printed to
    stderr: exit code `wrong` if something is to be corrected, `refused` if the supercomputer refused; 3 if the
    supercomputer cannot be reached; 130 after Ctrl-C; 1 after others of this machine's files, such as a full disk.
    """

    def decorate(main: Callable[P, int]) -> Callable[P, int]:
        @wraps(main)
        def run(*args: P.args, **kwargs: P.kwargs) -> int:
            if isinstance(sys.stdout, TextIOWrapper):
                sys.stdout.reconfigure(encoding="utf-8")  # in any locale, as the output of a step
            try:
                try:
                    return main(*args, **kwargs)
                except (ConfigurationError, RefusedError, AccessError, SshError) as error:
                    print(error, file=sys.stderr)
                    known = {ConfigurationError: wrong, RefusedError: refused}
                    return next((code for kind, code in known.items() if isinstance(error, kind)), 3)
                except KeyboardInterrupt:
                    return 130
                finally:
                    print(end="", flush=True)  # here, because Python's own flush at exit would print the error
            except OSError as error:
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                if not isinstance(error, BrokenPipeError):
                    print(error, file=sys.stderr)
                return 1

        return run

    return decorate


def print_table(
    headings: Sequence[str], rows: Iterable[Sequence[str]], *, folded: Sequence[str] = (), numbers: int = 0
) -> None:
    """Print a table of plain text; in a pipe, each row is one line.

    `folded`: headings of the columns that a terminal shows on several lines if there is no room. `numbers`: how many of
    the last columns are numbers.
    """
    table, console = Table(box=None, pad_edge=False), Console(markup=False, emoji=False)
    for left, heading in enumerate(headings, numbers - len(headings)):
        no_wrap = heading not in folded
        table.add_column(heading, justify="left" if left < 0 else "right", overflow="fold", no_wrap=no_wrap)
    for row in rows:
        table.add_row(*row)
    console.width = max(console.width, LEAST_WIDTH) if sys.stdout.isatty() else WIDEST
    console.print(table)
