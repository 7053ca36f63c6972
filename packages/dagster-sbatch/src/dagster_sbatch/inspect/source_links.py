"""Links from the assets in Dagster's UI to their source code."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import dagster as dg

from dagster_sbatch.environments.code import ask_git

_REMOTE = re.compile(
    r"(?:\w+://)?(?:[^@/]*@)?(?P<host>[\w.-]*(?P<kind>github|gitlab)[\w.-]*)(?::\d+/|[:/])(?P<path>.+?)(?:\.git)?/*"
)
"""The address of a git remote: https://[user[:password]@]host/path, ssh://git@host:port/path or git@host:path."""


def link_to_source(assets: Iterable[Any], root: Path) -> list[Any]:
    """Return the assets with links to their source code, for Dagster's UI.

    Each asset links to the file and the line of its function. If the current commit was pushed to a remote `origin` on
    GitHub or GitLab, each asset also links to its page there.

    Args:
        assets: for instance from `dg.load_assets_from_package_module`.
        root: a folder in the git repository of the assets. Without git, only files are linked.
    """
    linked = dg.with_source_code_references(list(assets))
    page = forge_page(ask_git(root, "remote", "get-url", "origin"))
    commit = ask_git(root, "rev-parse", "HEAD")
    if page is None or not ask_git(root, "for-each-ref", "--count=1", "--contains=HEAD", "refs/remotes/origin"):
        return list(linked)
    top = dg.AnchorBasedFilePathMapping(Path(ask_git(root, "rev-parse", "--show-toplevel")), "")
    linked = dg.link_code_references_to_git(linked, page[0], commit, top, platform=page[1])
    return list(dg.with_source_code_references(linked))


def forge_page(remote: str) -> tuple[str, Literal["github", "gitlab"]] | None:
    """Return the web address of a git remote, without user and password, and what it is; None if it is neither."""
    match = _REMOTE.fullmatch(remote)
    if match is None:
        return None
    return f"https://{match['host']}/{match['path']}", "github" if match["kind"] == "github" else "gitlab"
