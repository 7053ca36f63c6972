"""Report to Dagster from a program of any language.

  pipes materialize --metadata rows=12 --metadata plot=@plot.png
  pipes check no_gaps --passed
  pipes log "half of it is done"
  pipes extra partition_keys

Several processes may call it at once. CommandLauncher and BatchScriptLauncher put it on the PATH of the program that
they start. Exit codes: 0 done, 1 not reported (stderr says why), 2 wrong arguments.
"""

import argparse
import base64
import fcntl
import io
import json
import logging
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dagster_pipes import (
    DAGSTER_PIPES_CONTEXT_ENV_VAR,
    DAGSTER_PIPES_MESSAGES_ENV_VAR,
    DagsterPipesError,
    PipesContext,
    PipesMessage,
    PipesMessageWriter,
    PipesMessageWriterChannel,
    PipesParams,
    decode_param,
    open_dagster_pipes,
)

LARGEST = 100_000  # bytes of a metadata value. Dagster stores it with every materialization
CHECKS = "checks.json"  # file in the run directory: names of the asset checks that the step declares, by asset key
MOST_NAMES = 10  # partitions that a message lists
PICTURES = {".gif": "gif", ".jpeg": "jpeg", ".jpg": "jpeg", ".png": "png", ".svg": "svg+xml", ".webp": "webp"}
"""Types of images (MIME) by suffix."""
TEXTS = ("text", "md", "path", "url")
VALUES: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "bool": (bool,), "json": (dict, list)}
"""Types of metadata, and what JSON each of them is."""
ONCE = ("report_asset_materialization", "report_asset_check")
"""Methods that Dagster accepts once from a job, per asset or check; see `subject_of`."""
_INTEGER = re.compile(r"[+-]?(0|[1-9]\d*)")  # a number with more leading zeros is an identifier, and stays a text
_FLOAT = re.compile(r"[+-]?((0|[1-9]\d*)(\.\d*)?|\.\d+)([eE][+-]?\d+)?")


class _Channel(PipesMessageWriterChannel):
    """Appends each message as one line, also while other processes do. The session is the launcher's."""

    def __init__(self, path: str) -> None:
        self._path = path

    def write_message(self, message: PipesMessage) -> None:
        if message["method"] in ("opened", "closed"):
            return
        with os.fdopen(os.open(self._path, os.O_RDWR | os.O_APPEND), "r+b", buffering=0) as file:
            with suppress(OSError):  # a file system without locks: one write, at the end of the file
                fcntl.lockf(file, fcntl.LOCK_EX)
            if message["method"] in ONCE:
                self._check_first(message, file)
            self._append(json.dumps(message).encode() + b"\n", file)

    @staticmethod
    def _append(data: bytes, file: io.FileIO) -> None:
        """Write all of the data, or nothing: half a line would spoil the next message."""
        size = file.seek(0, os.SEEK_END)
        try:
            while data:
                data = data[file.write(data) :]
        except OSError:  # the disk is full
            file.truncate(size)
            raise

    @staticmethod
    def _check_first(message: PipesMessage, file: io.FileIO) -> None:
        """Refuse a second report.

        The file is read through its open descriptor: closing another one of the same file would release the lock.
        """
        subject = subject_of(message)
        for line in reversed(file.readall().splitlines()):
            found: Any = {}
            with suppress(ValueError, TypeError):  # rubbish, or dagster_pipes is writing it just now
                found = dict(json.loads(line))
            if found.get("method") == "job_started":
                return  # before that, the job was requeued
            if found.get("method") in ONCE and subject_of(found) == subject:
                raise DagsterPipesError(f"{subject} has been reported already. Report all of it in one call.")


def subject_of(message: PipesMessage) -> str:
    """Return what a report is about. Dagster accepts one report on it from a job."""
    params = message["params"] or {}
    asset, check = params.get("asset_key"), params.get("check_name")
    return f"The check {check} of {asset}" if check else f"The asset {asset}"


class _Writer(PipesMessageWriter[_Channel]):
    @contextmanager
    def open(self, params: PipesParams) -> Iterator[_Channel]:
        yield _Channel(params["path"])


def read_metadata(text: str) -> tuple[str, Any]:
    """Return name and value of NAME=VALUE, NAME:TYPE=VALUE or NAME=@FILE.

    Raises ArgumentTypeError: it has another form, or the file cannot be metadata.
    """
    name, equals, value = text.partition("=")
    name, _, kind = name.partition(":")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text[:200]!r} is not of the form NAME=VALUE, NAME:TYPE=VALUE or NAME=@FILE")
    if (size := len(os.fsencode(value))) > LARGEST:
        raise argparse.ArgumentTypeError(_too_large(name, f"the value of {name}", size, "FILE"))
    if kind in TEXTS:
        return name, {"type": kind, "raw_value": value}
    if kind in VALUES:
        return name, {"type": kind, "raw_value": _read_json(kind, value, value)}
    if kind:
        known = ", ".join([*TEXTS, *VALUES])
        raise argparse.ArgumentTypeError(f"{text!r}: there is no type {kind!r}. Use one of {known}")
    return name, _read_file(name, Path(value[1:])) if value.startswith("@") else _infer(value)


def _too_large(name: str, what: str, size: int, path: object) -> str:
    return (
        f"{what} has {size} bytes, and metadata may have {LARGEST}. Make it smaller (a picture: fewer dots per inch), "
        f"or report where it is: {name}:path={path}"
    )


def _read_json(kind: str, text: str | bytes, what: str) -> Any:
    with suppress(ValueError, RecursionError):
        value = json.loads(text, parse_constant=str)  # Dagster stores neither NaN nor Infinity
        if type(value) in VALUES[kind]:
            return value
    wanted = "a JSON object or list" if kind == "json" else f"of type {kind}"
    raise argparse.ArgumentTypeError(f"{what} is not {wanted}")


def _infer(value: str) -> Any:
    if _INTEGER.fullmatch(value):
        with suppress(ValueError):  # Python reads 4300 digits at most
            return int(value)
    if _FLOAT.fullmatch(value) and math.isfinite(number := float(value)):
        return number
    return {"true": True, "false": False}.get(value, value)


def _read_file(name: str, path: Path) -> dict[str, Any]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{path} cannot be read from {Path.cwd()}: {error.strerror}") from None
    if len(content) > LARGEST:
        raise argparse.ArgumentTypeError(_too_large(name, str(path), len(content), path))
    kind = path.suffix.lower()
    if kind in PICTURES:
        encoded = base64.b64encode(content).decode()
        return {"type": "md", "raw_value": f"![{name}](data:image/{PICTURES[kind]};base64,{encoded})"}
    if kind == ".json":
        return {"type": "json", "raw_value": _read_json("json", content, str(path))}
    if kind in (".md", ".txt"):
        return {"type": "md" if kind == ".md" else "text", "raw_value": content.decode(errors="replace")}
    known = " ".join([*PICTURES, ".json", ".md", ".txt"])
    raise argparse.ArgumentTypeError(f"{path}: of files, only {known} can be metadata. Or write {name}:path={path}")


def materialize(pipes: PipesContext, arguments: argparse.Namespace) -> None:
    """Report a materialization, or on one of its partitions."""
    metadata, version = dict(arguments.metadata), arguments.data_version
    if arguments.partition is None:
        pipes.report_asset_materialization(metadata, version, arguments.asset)
        return
    _refuse_partition(pipes, arguments.partition, arguments.asset)
    named = {name: value for name, value in (("asset_key", arguments.asset), ("data_version", version)) if value}
    pipes.report_custom_message({"musica.partition": {"partition": arguments.partition, "metadata": metadata, **named}})


def _refuse_partition(pipes: PipesContext, partition: str, asset: str | None) -> None:
    """Refuse a partition or an asset that this run lacks: Dagster would refuse it only after the program's end."""
    known, keys = pipes.asset_keys, pipes.extras.get("partition_keys") or ()
    if asset not in (known if len(known) > 1 else (None, *known)):
        raise DagsterPipesError(f"The assets of this step are {', '.join(known)}. Name one of them: --asset KEY")
    if not keys:
        raise DagsterPipesError("This run has no partitions. Leave out --partition.")
    if partition not in keys:
        listed = ", ".join(keys[:MOST_NAMES]) + (f" and {len(keys) - MOST_NAMES} more" if keys[MOST_NAMES:] else "")
        raise DagsterPipesError(
            f"This run has no partition {partition!r}. It has {listed}. This command prints them:\n"
            "pipes extra partition_keys"
        )


def check(pipes: PipesContext, arguments: argparse.Namespace) -> None:
    """Report the result of an asset check."""
    name, asset = arguments.name, arguments.asset
    folder = Path(decode_param(os.environ[DAGSTER_PIPES_CONTEXT_ENV_VAR])["path"]).parent
    path = folder / CHECKS
    if not path.exists():
        path = folder.parent.parent / CHECKS  # the task of an array
    if problem := explain_undeclared(json.loads(path.read_text()), name, asset):
        raise DagsterPipesError(problem)
    pipes.report_asset_check(name, arguments.passed, arguments.severity, dict(arguments.metadata), asset)


def explain_undeclared(declared: Mapping[str, Sequence[str]], name: Any, asset: str | None) -> str | None:
    """Return why a check cannot be reported; None if it can. `declared`: names of checks, by asset key."""
    if any(name in names for key, names in declared.items() if asset in (None, key)):
        return None
    listed = ", ".join(f"{each} of {key}" for key, names in declared.items() for each in names)
    return (
        f"{asset or 'This step'} does not declare the check {name!r}. The checks of this step are: {listed or 'none'}. "
        f"Correct the name, or declare the check: check_specs=[AssetCheckSpec({name!r}, asset=...)]"
    )


def log(pipes: PipesContext, arguments: argparse.Namespace) -> None:
    """Write a line into the log of the run."""
    pipes.log.log(logging.getLevelName(arguments.level.upper()), "%s", " ".join(arguments.text))


def extra(pipes: PipesContext, arguments: argparse.Namespace) -> None:
    """Print a value of `extras`: a list as one line per element, a text as it is, anything else as JSON."""
    value = pipes.get_extra(arguments.name)
    for each in value if isinstance(value, list) else [value]:
        print(each if isinstance(each, str) else json.dumps(each))


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser("pipes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    made = {each: commands.add_parser(each.__name__, help=each.__doc__) for each in (materialize, check, log, extra)}
    for function, command in made.items():
        command.set_defaults(run=function)
    for command in (made[materialize], made[check]):
        command.add_argument(
            "--metadata",
            type=read_metadata,
            action="append",
            default=[],
            metavar="NAME=VALUE",
            help="a VALUE that is a number becomes one; NAME:TYPE=VALUE has the type text, md, path, url, int, float, "
            f"bool or json; NAME=@FILE is a picture, .json, .md or .txt of at most {LARGEST} bytes",
        )
        command.add_argument("--asset", metavar="KEY", help="needed if the step has several assets")
    made[materialize].add_argument("--data-version", metavar="TEXT", help="data version of the asset")
    made[materialize].add_argument("--partition", metavar="KEY", help="report on one partition of the run")
    made[check].add_argument("name", help="name of the check")
    result = made[check].add_mutually_exclusive_group(required=True)
    result.add_argument("--passed", action="store_true", dest="passed", default=None)
    result.add_argument("--failed", action="store_false", dest="passed")
    made[check].add_argument("--severity", choices=("ERROR", "WARN"), default="ERROR", help="default: ERROR")
    made[log].add_argument("--level", choices=("debug", "info", "warning", "error", "critical"), default="info")
    made[log].add_argument("text", nargs="+", help="the line; write -- before one that begins with a dash")
    made[extra].add_argument("name", help="name of the value, for instance partition_keys")
    return parser


def main() -> int:
    """Run the command line."""
    arguments = make_parser().parse_args()
    try:
        if DAGSTER_PIPES_MESSAGES_ENV_VAR in os.environ:
            arguments.run(open_dagster_pipes(message_writer=_Writer()), arguments)
            return 0
        problem = (
            "this process was not started by Dagster, so there is nobody to report to. "
            "Run the program from an asset with CommandLauncher or BatchScriptLauncher."
        )
    except FileNotFoundError as error:
        problem = (
            f"{error.filename} does not exist. The run has ended or was cancelled, so nothing is reported. "
            "Let the program wait for all processes that report."
        )
    except (DagsterPipesError, OSError) as error:
        problem = str(error)
    print(f"pipes: {problem}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
