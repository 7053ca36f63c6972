"""Text files of the user: UTF-8 in any locale."""

from pathlib import Path

from dagster_sbatch.errors import ConfigurationError


def read_text(path: Path) -> str:
    """Return the text of a file.

    Raises ConfigurationError: it cannot be read, or is not in UTF-8.
    """
    try:
        return path.read_bytes().decode().replace("\r\n", "\n")
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        text = f"{path} cannot be read: line {line} is not in UTF-8. Save the file in UTF-8."
        raise ConfigurationError(text) from None


def write_text(path: Path, text: str) -> None:
    """Write a file; its former content is lost."""
    path.write_bytes(text.encode())
