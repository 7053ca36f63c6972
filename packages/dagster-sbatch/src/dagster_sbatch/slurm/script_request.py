"""The request of an existing batch script: what its #SBATCH lines ask for, as fields of SlurmRequest."""

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dagster_sbatch.errors import ConfigurationError, nearest
from dagster_sbatch.slurm.request import FURTHER_OPTIONS, OPTIONS, SlurmRequest
from dagster_sbatch.slurm.units import count_of, format_memory, parse_memory, show_value

_LETTERS = {
    pair[0]: pair[2:]
    for pair in """
    A:account a:array B:extra-node-info b:begin c:cpus-per-task C:constraint d:dependency D:chdir e:error
    F:nodefile G:gpus H:hold i:input J:job-name k:no-kill L:licenses m:distribution M:clusters n:ntasks N:nodes
    O:overcommit o:output p:partition q:qos Q:quiet S:core-spec s:oversubscribe t:time v:verbose W:wait
    w:nodelist x:exclude
    """.split()
}
_WITHOUT_VALUE = frozenset(
    """
    contiguous exclusive get-user-env hold ignore-pbs nice no-kill no-requeue overcommit oversubscribe parsable
    propagate quiet reboot requeue spread-job test-only use-min-nodes verbose wait x11
    """.split()
)
"""Options whose value, if they have one, follows a `=` (man sbatch)."""
_DAGSTERS = frozenset(
    """
    chdir comment error export get-user-env job-name kill-on-invalid-dep no-kill open-mode output parsable quiet signal
    verbose wait
    """.split()
)
"""Options without effect: the job script has its own, or they are about the sbatch command."""
_FIELDS = {
    **{option: field for field, option in OPTIONS.items()},
    "gpus": "gpus_per_node",
    "gpus-per-node": "gpus_per_node",
    "gpus-per-task": "gpus_per_node",
    "mem-per-gpu": "mem",
    "ntasks": "ntasks_per_node",
}
"""Field of SlurmRequest by option."""
_MEMORY = {"mem", "mem_per_cpu"}
_MEMORY_OPTIONS = ("mem", "mem-per-cpu", "mem-per-gpu")
_GPU_OPTIONS = ("gres", "gpus-per-node", "gpus", "gpus-per-task")


@dataclass(frozen=True)
class Directive:
    """An option on an #SBATCH line."""

    line: int  # its number, from 1
    name: str  # its long name, without dashes
    value: str  # empty if it has none

    def __str__(self) -> str:
        """Return it as on a command line."""
        return f"--{self.name}={self.value}" if self.value else f"--{self.name}"


def read_directives(script: str) -> list[Directive]:
    """Return the options of a batch script, in its order; sbatch reads them up to the first command.

    A comment may be indented; an indented #SBATCH is one.
    Raises ConfigurationError: a line cannot be read.
    """
    found: list[Directive] = []
    for number, line in _comments(script):
        if re.match(r"#SBATCH(\s|-)", line):
            found += _read_line(number, line.removeprefix("#SBATCH"))
    return found


def _comments(script: str) -> Iterator[tuple[int, str]]:
    """Yield the lines before the first command, with their numbers."""
    for number, line in enumerate(script.split("\n"), 1):
        if not re.match(r"\s*(#|$)", line):
            return
        yield number, line


def _read_line(number: int, text: str) -> list[Directive]:
    found: list[Directive] = []
    try:
        words = shlex.split(text, comments=True)
    except ValueError as error:
        raise ConfigurationError(f"line {number}: {error}") from None
    while words:
        word = words.pop(0)
        match = re.fullmatch(r"--([a-z][a-z0-9-]*)(?:=(.*))?|-([A-Za-z])=?(.*)", word)
        name = match and (match[1] or _LETTERS.get(match[3]))
        if not match or not name:
            raise ConfigurationError(f"line {number}: {word!r} is not an option of sbatch")
        value = match[2] if match[1] else match[4] or None
        if value is None and name not in _WITHOUT_VALUE:
            if not words:
                raise ConfigurationError(f"line {number}: {word} has no value")
            value = words.pop(0)
        found.append(Directive(number, name, value or ""))
    return found


def complete_request(request: SlurmRequest, script: str, name: str) -> tuple[SlurmRequest, list[str]]:
    """Fill in a request from the #SBATCH lines of a batch script; fields that the request sets stay.

    Returns the request, and a sentence for each line that does not apply.
    Raises ConfigurationError: a line cannot be read, or the job of an asset cannot have its option.
    """
    mine = {field: getattr(request, field) for field in sorted(request.model_fields_set)}
    try:
        directives = read_directives(script)
        fields = _fields_of(directives, mine)
        theirs = SlurmRequest(**fields)
    except (ConfigurationError, ValueError) as error:
        raise ConfigurationError(f"{name}: its #SBATCH lines cannot be used. {error}") from None
    closed = {*mine, *(_MEMORY if _MEMORY & mine.keys() else ())} - {"options"}
    filled = {field: getattr(theirs, field) for field in fields if field not in closed}
    own = {each.partition("=")[0] for each in request.options}
    options = (*(each for each in theirs.options if each.partition("=")[0] not in own), *request.options)
    notes = [
        f"{name}, line {each.line}: {each} does not apply. The asset requests {_shown(mine, field)}."
        for each in directives
        for field in [_FIELDS.get(each.name, "options")]
        if field in closed and getattr(theirs, field) != mine.get(field)
    ]
    notes += [f"{name}, line {line}: {text}" for line, text in _explain(script, directives, options)]
    without = [each for each in directives if each.name in _DAGSTERS]
    if without:
        listed = ", ".join(f"{each} (line {each.line})" for each in without)
        notes.append(f"{name}: these do not apply, because the job of an asset has its own: {listed}.")
    return SlurmRequest(**{**filled, **mine, "options": options}), notes


def _explain(script: str, directives: Sequence[Directive], options: Sequence[str]) -> Iterator[tuple[int, str]]:
    """Yield line number and sentence for what does not apply, unless a field of the asset's request replaces it.

    `options`: of the completed request.
    """
    last = {each.name: each for each in directives}
    for each in directives:
        if each.name in FURTHER_OPTIONS and str(each) not in options:
            yield each.line, f"{each} does not apply. The asset has another value in options."
    for each in directives:
        if each.value != last[each.name].value and each.name not in _DAGSTERS:
            yield each.line, f"{each} does not apply. Line {last[each.name].line} has {last[each.name]}."
        if each.name == "export" and "=" in each.value:
            yield each.line, "the variables of --export are not set. Pass them to compute.run in env={...}."
    for line, text in _comments(script):
        if re.match(r"#(PBS|BSUB)\s", text):  # for PBS or LSF; sbatch translates some of their options
            yield line, f"{text.strip()} does not apply. Write what it requests as an #SBATCH line."


def _shown(mine: Mapping[str, Any], field: str) -> str:
    """Return the asset's own value of a field; of the two fields for memory, the asset may set the other one."""
    name = field if field in mine else next(iter(_MEMORY & mine.keys()))
    return f"{name}={show_value(mine[name])}"


def _fields_of(directives: Sequence[Directive], mine: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a request; of an option that occurs twice, the last one counts.

    `mine`: the fields that the asset sets.
    """
    values = {each.name: each.value for each in directives}
    for each in directives:
        if each.name not in {*_FIELDS, *_DAGSTERS, *FURTHER_OPTIONS}:
            raise ConfigurationError(f"line {each.line}: {_advice(each)}")
    fields: dict[str, Any] = {
        field: values[option]
        for field, option in OPTIONS.items()
        if option in values and field != "gpus_per_node"  # see _layout
    }
    if "exclusive" in values:
        fields["exclusive"] = values["exclusive"] or True
    memory = [f"--{name}={values[name]}" for name in _MEMORY_OPTIONS if name in values]
    if len(memory) > 1 and not _MEMORY & mine.keys():
        raise ConfigurationError(f"{' and '.join(memory)} exclude each other. Remove one of them")
    for name in _MEMORY & fields.keys():
        if len(memory) > 1:
            del fields[name]  # the asset decides
        else:
            fields[name] = _memory(fields[name])
    fields |= _layout(values, mine)
    options = {each.name: str(each) for each in directives if each.name in FURTHER_OPTIONS}
    if "gpus-per-task" in values and "gpus_per_node" not in mine:  # srun in the script divides them, as with sbatch
        options.setdefault("gpu-bind", f"--gpu-bind=per_task:{_gpus('gpus-per-task', values['gpus-per-task'])}")
    return {**fields, "options": tuple(options.values())}


def _advice(directive: Directive) -> str:
    """Return why an option cannot be used, and what to do instead."""
    if directive.name == "array":
        return (
            f"{directive}: an asset divides its work itself. Remove the line, and pass array=JobArray(...) to "
            "compute.run; SLURM_ARRAY_TASK_ID counts its tasks from 0"
        )
    known = [*_FIELDS, *FURTHER_OPTIONS]
    return f"--{directive.name} cannot be an option of an asset's job{nearest(directive.name, known)}"


def _layout(values: Mapping[str, str], mine: Mapping[str, Any]) -> dict[str, Any]:
    """Return nodes, tasks, GPUs and memory per node, from the options that count them in another way.

    Where an option depends on a field that the asset sets, the asset's value counts.
    """
    total, per_node = (_number(values, name) for name in ("ntasks", "ntasks-per-node"))
    nodes = mine.get("nodes") or _number(values, "nodes") or (-(-total // per_node) if total and per_node else 1)
    found: dict[str, Any] = {"nodes": nodes} if nodes > 1 else {}
    tasks = per_node or (_divide("ntasks", total, nodes) if total else 1)
    if total and total != nodes * tasks and not {"nodes", "ntasks_per_node"} & mine.keys():
        raise ConfigurationError(
            f"--ntasks={total} contradicts --ntasks-per-node={tasks}: with it, {count_of(nodes, 'node')} can have "
            f"{count_of(nodes * tasks, 'task')}. Remove one of the two"
        )
    if tasks > 1:
        found["ntasks_per_node"] = tasks
    gpus = _gpus_per_node(values, nodes, mine.get("ntasks_per_node", tasks), decided="gpus_per_node" in mine)
    if gpus:
        found["gpus_per_node"] = gpus
    if "mem-per-gpu" in values:
        gpus = mine.get("gpus_per_node", gpus)
        found["mem"] = format_memory(parse_memory(_memory(values["mem-per-gpu"])) * max(gpus, 1))
    return found


def _gpus_per_node(values: Mapping[str, str], nodes: int, tasks: int, *, decided: bool) -> int:
    """Return the GPUs per node, 0 without any.

    `decided`: whether the asset's number applies.
    """
    counts = {name: _gpus(name, values[name]) for name in _GPU_OPTIONS if name in values}
    if "gpus" in counts:
        counts["gpus"] = _divide("gpus", counts["gpus"], nodes)
    if "gpus-per-task" in counts:
        counts["gpus-per-task"] *= tasks
    if len(set(counts.values())) > 1 and not decided:
        listed = " and ".join(f"--{name}={values[name]}" for name in counts)
        raise ConfigurationError(f"{listed} request different numbers of GPUs per node. Keep one of them")
    return next(iter(counts.values()), 0)


def _number(values: Mapping[str, str], name: str) -> int | None:
    if name not in values:
        return None
    if not re.fullmatch(r"[1-9]\d*", values[name]):
        raise ConfigurationError(f"--{name}={values[name]}: an asset's job needs one whole number")
    return int(values[name])


def _divide(name: str, total: int, nodes: int) -> int:
    if total % nodes:
        raise ConfigurationError(f"--{name}={total} cannot be divided among {nodes} nodes. Give a number per node")
    return total // nodes


def _gpus(name: str, value: str) -> int:
    """Read a number of GPUs; the type before it (`h100:2`), or alone (`h100`: one), is that of the partition."""
    if name == "gres":
        kind, _, number = value.removeprefix("gres/").partition(":")
        if kind != "gpu" or "," in value:
            raise ConfigurationError(f"--gres={value}: an asset's job can request GPUs only, as in --gres=gpu:2")
        value = number or "1"
    found = re.fullmatch(r"(?:[A-Za-z]\w*:)?(\d+)|[A-Za-z]\w*", value)
    if not found:
        raise ConfigurationError(f"--{name}={value} is not a number of GPUs")
    return int(found[1] or 1)


def _memory(text: str) -> str:
    return text.upper().removesuffix("B")
