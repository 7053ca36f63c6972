"""docs/reference.md is what the docstrings and fields of the public names say."""

import inspect
import os
import textwrap
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from pydantic import BaseModel

import dagster_sbatch
from dagster_sbatch.slurm.site import ContainerRuntime, Partition, Qos
from dagster_sbatch.slurm.units import format_time
from support import ROOT

PAGE = ROOT / "packages" / "dagster-sbatch" / "docs" / "reference.md"
PARTS = {"Site": (Partition, Qos, ContainerRuntime)}
"""Models that stand in the fields of a public one."""
CALLED_BY_OTHERS = ("Container", "ForkingRunLauncher", "SlurmRequest")
"""Classes whose methods only the engine or Dagster calls."""
HEAD = """\
# Reference

The public names of `dagster_sbatch`: `from dagster_sbatch import ...`. Everything else is private and may change with
any version. This page is made from the docstrings.
"""


def page() -> str:
    return HEAD + "".join(f"\n{section(name)}" for name in sorted(dagster_sbatch.__all__))


def section(name: str) -> str:
    found = getattr(dagster_sbatch, name)
    parts = [f"## {name}\n", docstring(found)]
    if inspect.isclass(found) and issubclass(found, BaseModel):
        parts.append("".join(fields(found)))
        for part in PARTS.get(name, ()):
            parts.append(f"### {part.__name__}\n\n{docstring(part)}\n{''.join(fields(part))}")
    elif not inspect.isclass(found):
        parts.insert(1, f"`{name}{signature(found)}`\n")
    if inspect.isclass(found) and name not in CALLED_BY_OTHERS:
        parts += [f"### {name}.{method.__name__}\n\n{docstring(method)}" for method in methods(found)]
    return "\n".join(part for part in parts if part)


def docstring(found: Any) -> str:
    return f"```text\n{textwrap.dedent(inspect.getdoc(found) or '')}\n```\n"


def signature(found: Any) -> str:
    text = str(inspect.signature(found)).replace("'", "").replace("dagster_sbatch.", "")
    return text.replace("pathlib._local.", "pathlib.")  # Python 3.13 keeps it there


def fields(model: type[BaseModel]) -> Iterator[str]:
    yield "| field | meaning | default |\n|---|---|---|\n"
    for name, field in model.model_fields.items():
        default = "" if field.is_required() else f"`{shown(field.get_default(call_default_factory=True))}`"
        yield f"| `{name}` | {(field.description or '').replace('|', chr(92) + '|')} | {default} |\n"


def shown(default: Any) -> str:
    """Return a default as an asset would write it."""
    if isinstance(default, timedelta):
        return repr(format_time(default))
    return f"{type(default).__name__}()" if isinstance(default, BaseModel) else repr(default)


def methods(found: type) -> Iterator[Any]:
    """Those that the class defines itself and that have a docstring of their own, as they stand there."""
    for name, value in vars(found).items():
        function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        if not name.startswith("_") and inspect.isfunction(function) and function.__doc__:
            yield function


def test_the_reference_is_current() -> None:
    if os.environ.get("UPDATE_DOCS"):
        PAGE.write_text(page())
    assert PAGE.read_text() == page()


@pytest.mark.parametrize("name", dagster_sbatch.__all__)
def test_every_public_name_explains_itself(name: str) -> None:
    found = getattr(dagster_sbatch, name)
    text = inspect.getdoc(found)
    assert text and len(text) > 40, name
    if inspect.isclass(found) and issubclass(found, BaseModel):
        assert all(field.description for field in found.model_fields.values()), name
