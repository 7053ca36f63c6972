"""Small helpers around Dagster Pipes: metadata that the UI shows as a table, a picture or a column list."""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

from dagster_pipes import PipesContext, PipesMetadataValue
from matplotlib.figure import Figure

PICTURE_LIMIT = 100_000
"""Bytes. Dagster stores the picture with every materialization."""


def partition_keys(pipes: PipesContext) -> list[str]:
    """Return the partitions of this run, one or many: `compute.run` always sends them."""
    return list(pipes.get_extra("partition_keys"))


def report_partition(pipes: PipesContext, partition: str, metadata: Mapping[str, int | float | str]) -> None:
    """Attach numbers to one partition of this run (a run has only one materialization message)."""
    pipes.report_custom_message({"musica.partition": {"partition": partition, "metadata": dict(metadata)}})


def table(rows: Sequence[Mapping[str, Any]]) -> PipesMetadataValue:
    """Return a table whose columns are those of its first row."""
    kinds = {bool: "bool", int: "int", float: "float"}
    columns = [{"name": name, "type": kinds.get(type(value), "string")} for name, value in rows[0].items()]
    return {"type": "table", "raw_value": {"records": [dict(row) for row in rows], "schema": columns}}


def column_schema(columns: Mapping[str, tuple[str, str]]) -> PipesMetadataValue:
    """Return the content of the UI's Columns tab: type and meaning by column name."""
    listed = [{"name": name, "type": kind, "description": text} for name, (kind, text) in columns.items()]
    return {"type": "table_schema", "raw_value": {"columns": listed}}


def picture(figure: Figure, title: str) -> PipesMetadataValue:
    """Return a figure as PNG inside Markdown, which the UI shows behind "Show Markdown".

    Raises:
        ValueError: it is larger than PICTURE_LIMIT.
    """
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=90)
    size = png.tell()
    if size > PICTURE_LIMIT:
        raise ValueError(
            f"the picture {title!r} has {size} bytes, more than {PICTURE_LIMIT}: draw less, or at a lower dpi"
        )
    encoded = base64.b64encode(png.getvalue()).decode()
    return {"type": "md", "raw_value": f"![{title}](data:image/png;base64,{encoded})"}
