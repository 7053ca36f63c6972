"""The texts of failures."""

import json
import subprocess
import traceback

import pytest

from dagster_sbatch.run.failures import name_exception


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("why"), "ValueError: why"),
        (ValueError(), "ValueError"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (json.JSONDecodeError("why", "", 0), "json.decoder.JSONDecodeError: why: line 1 column 1 (char 0)"),
        (subprocess.TimeoutExpired("it", 1), "subprocess.TimeoutExpired: Command 'it' timed out after 1 seconds"),
    ],
)
def test_the_name_of_an_exception_stands_there_once(error: BaseException, text: str) -> None:
    message = "".join(traceback.format_exception_only(error))  # as dagster_pipes sends it
    assert name_exception({"name": type(error).__name__, "message": message}, with_stack=False) == text


@pytest.mark.parametrize(
    ("message", "text"), [("why", "anError: why"), ("", "anError"), ("anErrors", "anError: anErrors")]
)
def test_an_exception_of_another_language_is_named_too(message: str, text: str) -> None:
    assert name_exception({"name": "anError", "message": message}, with_stack=False) == text
