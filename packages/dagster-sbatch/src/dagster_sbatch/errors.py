"""The error for what a user has written, and its text: what is wrong, where, and what to do."""

import difflib
from collections.abc import Callable, Iterable
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

Place = tuple[int | str, ...]  # the keys and indices that lead to a problem that pydantic found
_TEXTS = {
    "dict_type": "this is not a dictionary. Write {...}",
    "tuple_type": "this is not a list. Write [...], also around a single value",
    "string_type": "this is not a text. Write it in quotes",
    "string_pattern_mismatch": "this does not have the right form",
    "float_parsing": "this is not a number",
    "int_parsing": "this is not a whole number",
    "bool_parsing": "write true or false",
    "date_from_datetime_parsing": "this is not a day of the form YYYY-MM-DD",
}
"""What is wrong, by pydantic's type of the problem; for other types, pydantic's own text is shown."""


class ConfigurationError(ValueError):
    """A setting, a launcher, a Slurm request or a file of the project cannot work. The text is meant for its author."""


class NoSettingsFileError(ConfigurationError):
    """The settings of a supercomputer are not complete, and there is no file for them: there is no account yet."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for a known word that is close, or the only one that begins so; else list all."""
    names = sorted(known)
    longer = [name for name in names if word and name.startswith(word)]
    close = difflib.get_close_matches(word, names, n=1) or (longer if len(longer) == 1 else [])
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; valid are {', '.join(names)}" if names else "; it has none"


def printable(text: str) -> str:
    """Return what a stranger says as a part of one line, without the signs that control a terminal."""
    return "".join(sign if sign.isprintable() else "?" for sign in text)


def describe_instance_error(error: Exception) -> str:
    """Return why Dagster's instance cannot be opened, without the types of the fields and the stack in its text.

    `error`: of `DagsterInstance.get`.
    """
    return str(error).partition("\n\nStack Trace:")[0].rpartition("PostProcessingError: ")[2]


def describe_at(
    error: ValidationError,
    name: Callable[[Place], str],
    known: Callable[[Place], Iterable[str]] = lambda _: (),
    advice: Callable[[Place], str] = lambda _: "",
    model: str = _TEXTS["dict_type"],
) -> str:
    """Return the problems that pydantic found, one per line, without the values, which may be secret.

    `name`: how the user calls a place in the input. `known`: the valid names beside an unknown one; the nearest of them
    is shown. `advice`: further sentences about a place. `model`: what to write for a model, with its `class_name`.
    """
    lines = []
    for problem in error.errors(include_url=False, include_input=False):
        place, more = problem["loc"], advice(problem["loc"])
        text = _TEXTS.get(problem["type"]) or problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            text = f"unknown field{nearest(str(place[-1]), known(place))}"
        elif problem["type"] == "model_type":
            text = model.replace("class_name", problem["ctx"]["class_name"])
        if more:
            text += f"{'' if text.endswith('?') else '.'} {more}"
        lines.append(f"{name(place)}: {text}")
    return "\n".join(lines)


class CheckedModel(BaseModel):
    """What an asset writes: it does not change, and one ConfigurationError lists all that is wrong with it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            own, known = type(self).__name__, type(self).model_fields

            def name(place: Place) -> str:
                return f"{own}: {'.'.join(map(str, place))}" if place else own

            raise ConfigurationError(describe_at(error, name, lambda _: known, model="write class_name(...)")) from None
